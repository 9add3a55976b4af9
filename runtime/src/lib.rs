//! Runs exported T5Gemma models.

pub mod options;
