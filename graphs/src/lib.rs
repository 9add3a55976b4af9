//! What T5Gemma computes.

pub mod config;
pub mod interface;
pub mod manifest;
pub mod onnx;
