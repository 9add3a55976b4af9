//! Runs exported T5Gemma models.

pub mod onnxruntime;

pub mod options;
pub mod scores;
pub mod search;

mod error;

pub use error::Error;
