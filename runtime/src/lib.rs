//! Runs exported T5Gemma models.

pub mod onnxruntime;

mod tokenizer;

mod batch;
pub mod options;
pub mod scores;
pub mod search;

mod error;

pub use batch::Batch;
pub use error::Error;
pub use tokenizer::{SpecialTokens, TextStream, Tokenizer};
