//! What T5Gemma computes, as ONNX graphs written from the model's equations: no files, no weight bytes, no ONNX Runtime, no
//! protobuf.
//!
//! | graph | from | to |
//! |---|---|---|
//! | encoder | source tokens, mask | hidden states |
//! | decoder_init | first target tokens, hidden states, mask | logits; keys and values of the target and of the source |
//! | decoder_step | next target tokens, the keys and values so far, mask | logits; the target's keys and values |
//!
//! Models for other tasks (see [`task`]) have a single graph: the encoder with a pooling, or with a classifier's head.
//!
//! Reading order: [`config`] (the model's shape) and [`interface`] (the names at the borders); then `t5gemma/`, a family of models
//! as equations; then the blocks that families are made of, `attention.rs`, `rotary.rs`, `nn.rs`, `sequence.rs` and `weights.rs`;
//! then `lower.rs`, how an operator is written for a target; and [`onnx`], the builder beneath. Imports run in this direction only.

pub mod config;
pub mod facts;
pub mod interface;
pub mod json;
pub mod manifest;
pub mod quantization;
pub mod task;
pub mod tensors;

mod family;
mod options;
mod reorder;
mod versions;

mod t5gemma;

mod attention;
mod nn;
mod rotary;
mod sequence;
mod weights;

mod lower;
mod target;

pub mod onnx;

pub use family::definitions;
pub use lower::{Capabilities, Packing};
pub use options::{Options, Vocabulary};
pub use reorder::reorder;
pub use target::Target;
