//! Runs exported T5Gemma models.

pub mod options;
pub mod scores;
pub mod search;
