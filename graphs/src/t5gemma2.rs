//! The second family, T5Gemma 2 (arXiv 2512.14856): two Gemma 3 stacks (arXiv 2503.19786), whose decoder attends to the
//! target and to the source in one softmax, and a SigLIP tower that reads images. The equations are those of
//! transformers 5.24 with eager attention.
//!
//! Read `config.rs` for what varies from model to model, `embedding.rs` for how tokens and images become vectors,
//! `decoder.rs` for the decoder's layer, and `vision.rs` for the tower; the encoder's layers are those of every family.
//! `decoder_init.rs` and `decoder_step.rs` are the two graphs of the decoder, `classifier.rs` is the graph of classification.

pub mod config;
mod tensors;

mod embedding;
mod encoder;

mod decoder;
mod decoder_init;
mod decoder_step;

mod classifier;
mod vision;

pub use tensors::TENSORS;

use crate::config::{Config, Stack};
use crate::onnx::{Definition, Graph};
use crate::options::Options;
use crate::task::Task;
use crate::weights::Weights;

/// The graphs of the options' task, in the order of [`interface::graphs`](crate::interface::graphs).
pub fn definitions(config: &Config, options: &Options) -> Vec<Definition> {
    let mut all = match &options.task {
        Task::Text2TextGeneration => vec![
            encoder::encoder(config, options),
            decoder_init::decoder_init(config, options),
            decoder_step::decoder_step(config, options),
        ],
        Task::FeatureExtraction(wanted) => vec![encoder::features(config, options, wanted)],
        Task::TextClassification | Task::TokenClassification => vec![classifier::classifier(config, options)],
    };
    // Adapters change the text stacks alone.
    let vision = config.vision.as_ref().filter(|_| !options.takes_adapters);
    all.extend(vision.map(|vision| vision::vision_encoder(config, vision, options)));
    all
}

/// The root of the checkpoint, for the blocks of one of its stacks.
fn root<'g>(graph: &'g Graph, stack: &'g Stack, options: &'g Options) -> Weights<'g> {
    Weights::root(graph, stack, options, tensors::role)
}
