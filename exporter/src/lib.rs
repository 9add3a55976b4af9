//! Exports a Hugging Face T5Gemma checkpoint to a model folder: ONNX graphs over one weights file, with the
//! checkpoint's settings and tokenizer, and a manifest that describes them.
//!
//! ```no_run
//! use t5gemma_exporter::{Checkpoint, Export, Source};
//!
//! let source = Source::Checkpoint(Checkpoint::open("t5gemma-2b-2b-ul2-it".as_ref())?);
//! Export::default().run(&source, "t5gemma-2b-2b-ul2-it-onnx".as_ref())?;
//! # Ok::<(), t5gemma_exporter::Error>(())
//! ```
//!
//! Read `export.rs` first, then `checkpoint.rs` (input), `weights.rs` (which tensor becomes which weight),
//! `external_data.rs` and `proto.rs` (output). The graphs themselves come from `t5gemma_graphs`. Nothing here needs
//! ONNX Runtime. `adapt.rs` makes T5Gemma checkpoints from Gemma 2 checkpoints, before all of this.

mod error;
mod progress;
mod settings;

mod export;
mod source;

mod adapt;

mod adapter;
mod checkpoint;
mod files;
mod images;
mod names;
mod notes;
mod presets;

mod convert;
mod dummy;
mod external_data;
mod parameters;
mod quantize;
mod splitmix;
mod weights;

mod proto;
mod staging;

#[cfg(feature = "hub")]
pub mod hub;
mod repository;

mod inspect;
mod model_card;
mod model_folder;
mod reseal;
mod tensorrt;
mod triton;

pub use adapt::{Adapt, Adapted, CrossAttention, CrossInit, CrossNorms, Resolved, Side};
pub use checkpoint::Checkpoint;
pub use error::{Error, ParseError, Result};
pub use export::{Alignment, CustomHead, CustomInterface, Export, Exported, PaddingRow};
pub use images::{PREPROCESSOR, PROCESSOR, image_settings};
pub use inspect::{GraphReport, InspectReport, ModelReport, inspect};
pub use parameters::parameters;
pub use presets::{PRESETS, preset};
pub use progress::Progress;
pub use repository::Repository;
pub use reseal::reseal;
pub use settings::{Setting, SettingError};
pub use source::Source;
pub use staging::Existing;
pub use t5gemma_graphs::Target;
pub use t5gemma_graphs::config::Activation;
pub use t5gemma_graphs::interface::{DType, Logits};
pub use t5gemma_graphs::manifest::{EncoderWindow, Manifest};
pub use t5gemma_graphs::onnx::Blocks;
pub use t5gemma_graphs::quantization::{Activations, Quantization};
pub use t5gemma_graphs::task::{Features, PaddingRows, Pooling, Task};
pub use tensorrt::{
    CheckReport, Finding, FindingKind, MemoryEstimate, MemorySize, ServingPlan, TensorRtVersion, check,
};
pub use triton::TritonBackend;
