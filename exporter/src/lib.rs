//! Writes a Hugging Face T5Gemma checkpoint as a model folder: three ONNX graphs over one file of weights, with the
//! checkpoint's settings and tokenizer and a manifest that says what is what.
//!
//! ```no_run
//! use t5gemma_exporter::{Checkpoint, Export, Silent, Source};
//!
//! let source = Source::Checkpoint(Checkpoint::open("t5gemma-2b-2b-ul2-it".as_ref())?);
//! Export::default().run(&source, "t5gemma-2b-2b-ul2-it-onnx".as_ref(), &Silent)?;
//! # anyhow::Ok(())
//! ```
//!
//! Read `export.rs` first, then `checkpoint.rs` (what is read), `weights.rs` (which tensor goes where), `external_data.rs` and
//! `proto.rs` (what is written). The graphs themselves come from `t5gemma_graphs`; no ONNX Runtime is needed here.

mod export;
mod progress;
mod source;

mod checkpoint;
mod found;
mod names;
mod notes;
mod presets;

mod dummy;
mod external_data;
mod parameters;
mod weights;

mod convert;
mod float8;
mod quantize;
mod signed;

mod proto;
mod settings;
mod staging;

mod inspect;
mod reseal;
mod tensorrt;

pub use checkpoint::{Checkpoint, Tensor};
pub use export::{Export, Exported};
pub use inspect::{Report, inspect};
pub use parameters::parameters;
pub use presets::{PRESETS, preset};
pub use progress::{Silent, Watch};
pub use reseal::reseal;
pub use settings::{Setting, SettingError};
pub use source::Source;
pub use staging::Existing;
pub use tensorrt::{Bytes, Checked, Finding, Plan, TensorRt, check};
