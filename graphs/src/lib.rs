//! What T5Gemma computes, as ONNX graphs written from the model's equations: no files, no weight bytes, no ONNX
//! Runtime, no protobuf.
//!
//! | graph | from | to |
//! |---|---|---|
//! | encoder | source tokens, mask | hidden states |
//! | decoder | first target tokens, hidden states, mask | logits; keys and values of target and source |
//! | decoder with past | next target tokens, keys and values, mask | logits; keys and values of the target |
//!
//! Models for other tasks (see [`task`]) have one graph: the encoder with pooling, or a classifier.
//!
//! # Reading order
//!
//! 1. [`config`], the shape of a model, and [`interface`], the contract with the runtime;
//! 2. `t5gemma/`, a family of models as equations: `encoder.rs`, `decoder.rs`, then the graphs made of them;
//! 3. the blocks that families are made of: `attention.rs`, `nn.rs`, `rotary.rs`, `sequence.rs`, `weights.rs`;
//! 4. `lower.rs`, how an operator is written for a target, and [`onnx`], the graph builder.
//!
//! Imports run in this direction only. A new family is a folder beside `t5gemma/`, a variant of
//! [`Family`](config::Family) and an arm in each `match` of `family.rs`: `config.rs` reads its `config.json` into a
//! [`Config`](config::Config), `tensors.rs` names its tensors, and `definitions` returns its graphs. A block that
//! differs gets its difference as data (a field of [`Stack`](config::Stack)) or is another function. A new target is
//! another `impl Lowering` with its [`Capabilities`].

pub mod adapter;
pub mod config;
pub mod facts;
pub mod images;
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
mod t5gemma2;

mod decoder;
mod encoder;
mod features;
mod outputs;

mod attention;
mod merged_attention;
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
