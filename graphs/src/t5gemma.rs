//! The first family, T5Gemma (arXiv 2504.06225): two Gemma 2 stacks (arXiv 2408.00118), the decoder's with cross-attention. The
//! equations are those of transformers 5.23 with eager attention.
//!
//! Read `encoder.rs` and `decoder.rs` for the layers, then `decoder_init.rs` and `decoder_step.rs`, the two graphs of the decoder;
//! `features.rs` and `classifier.rs` are the graphs of the other tasks.

mod classifier;
mod decoder;
mod decoder_init;
mod decoder_step;
mod encoder;
mod features;

pub use decoder_init::decoder_init;
pub use decoder_step::decoder_step;
pub use encoder::encoder;

use crate::config::Config;
use crate::onnx::Definition;
use crate::options::Options;
use crate::task::Task;

/// The graphs of the options' task, in the order of [`interface::parts`](crate::interface::parts).
pub fn definitions(config: &Config, options: &Options) -> Vec<Definition> {
    match &options.task {
        Task::Text2TextGeneration => {
            vec![encoder(config, options), decoder_init(config, options), decoder_step(config, options)]
        }
        Task::FeatureExtraction(wanted) => vec![features::features(config, options, wanted)],
        Task::TextClassification | Task::TokenClassification => vec![classifier::classifier(config, options)],
    }
}
