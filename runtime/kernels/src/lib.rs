//! CPU kernels for T5Gemma: operators that replace ONNX Runtime's in a session and run on its threads, and log-softmax.
//! Every graph also runs with ONNX Runtime's own operators; a kernel registered with a session takes precedence over
//! the built-in one of the same name.
//!
//! The modules in reading order: `isa`, `simd` and `parallel` are the building blocks of kernels; `matmul`,
//! `attention`, `stats` and `gelu` are the arithmetic, over slices; `head` is the two-pass head, which computes only
//! the top k of a vocabulary exactly; `ops` turns them into operators, and is the only module that uses ONNX Runtime.
//! Nothing here knows graphs, models or the name of a tensor.

mod isa;
mod parallel;
mod simd;

mod aligned;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod math;
mod noise;

mod log_softmax;
mod logits;
mod source_mask;

mod attention;
mod gelu;
mod matmul;
mod stats;

#[cfg(target_arch = "x86_64")]
mod head;

mod ops;

#[doc(hidden)]
pub mod bench;
mod error;

pub use error::Error;
pub use exp::exp;
pub use isa::{Level, instructions, level};
pub use log_softmax::LogSumExp;
pub use logits::{LogitsRequest, LogitsStats, LogitsStatsView};
pub use ops::{GraphKind, Kernels, attention_skips_other_sources, reads_packed_weights_in_place};
