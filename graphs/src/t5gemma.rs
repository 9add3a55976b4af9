//! The first family, T5Gemma (arXiv 2504.06225): two Gemma 2 stacks (arXiv 2408.00118), the decoder's with
//! cross-attention. The equations are those of transformers 5.23 with eager attention.
//!
//! Read `config.rs` for what varies from model to model and `voice.rs` for T5Gemma-TTS, `encoder.rs` and `decoder.rs` for the layers, then
//! `decoder_init.rs` and `decoder_step.rs`, the two graphs of the decoder; `features.rs` and `classifier.rs` are the
//! graphs of the other tasks.

pub mod config;
mod tensors;
pub mod voice;

mod encoder;

mod decoder;
mod decoder_init;
mod decoder_step;

mod classifier;
mod features;

pub use tensors::TENSORS;

use crate::config::{Config, Stack};
use crate::onnx::{Definition, Graph};
use crate::options::Options;
use crate::task::Task;
use crate::weights::Weights;

/// The graphs of the options' task, in the order of [`interface::graphs`](crate::interface::graphs).
pub fn definitions(config: &Config, options: &Options) -> Vec<Definition> {
    match &options.task {
        Task::Text2TextGeneration => vec![
            encoder::encoder(config, options),
            decoder_init::decoder_init(config, options),
            decoder_step::decoder_step(config, options),
        ],
        Task::FeatureExtraction(wanted) => vec![features::features(config, options, wanted)],
        Task::TextClassification | Task::TokenClassification => vec![classifier::classifier(config, options)],
    }
}

/// The root of the checkpoint, for the blocks of one of its stacks.
fn root<'g>(graph: &'g Graph, stack: &'g Stack, options: &'g Options) -> Weights<'g> {
    Weights::root(graph, stack, options, tensors::role)
}
