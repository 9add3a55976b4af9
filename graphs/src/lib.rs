//! What T5Gemma computes, as three ONNX graphs written from the model's equations: no files, no weight bytes, no ONNX
//! Runtime, no protobuf.
//!
//! | graph | from | to |
//! |---|---|---|
//! | [`encoder`] | source tokens, mask | hidden states |
//! | [`decoder_init`] | first target tokens, hidden states, mask | logits; keys and values of the target and of the source |
//! | [`decoder_step`] | next target tokens, the keys and values so far, mask | logits; the target's keys and values |
//!
//! Models for other tasks (see [`task`]) have a single graph: the encoder with a pooling, or with a classifier's head.
//!
//! Read [`config`] (the model's shape) and [`interface`] (the names at the borders) first, then `encoder.rs`, `decoder.rs`,
//! `attention.rs` and `nn.rs` for the equations, `lower.rs` for how a composite operator is written for a target, and
//! [`onnx`] for the builder beneath. The equations are those of the T5Gemma implementation in transformers 5.23 with eager
//! attention, and of the Gemma 2 report (arXiv 2408.00118) that both stacks come from.

pub mod config;
pub mod interface;
pub mod json;
pub mod manifest;
pub mod quantization;
pub mod task;

mod encoder;

mod decoder;
mod decoder_init;
mod decoder_step;
mod reorder;

mod classifier;
mod features;

mod attention;
mod nn;

mod lower;
pub mod onnx;

pub use decoder_init::decoder_init;
pub use decoder_step::decoder_step;
pub use encoder::encoder;
pub use lower::Target;
pub use reorder::reorder;

use std::sync::Arc;

use config::Config;
use interface::{CacheLayout, DType, Interface, Logits, Returned};
use manifest::EncoderWindow;
use onnx::Definition;
use quantization::{Activations, Quantization};
use task::{Pooling, Task};

/// Everything that decides the graphs besides the weights' numbers.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the graphs are for.
    pub task: Task,
    /// The runtime that the composite operators are written for.
    pub target: Target,
    /// Type of weights, activations and caches.
    pub dtype: DType,
    /// Positions whose logits the decoder graphs return.
    pub logits: Logits,
    /// Decoder layers whose cross-attention the decoder graphs return the mean of; none if empty.
    pub alignment_layers: Vec<usize>,
    /// Whether positions exactly one window apart see each other in the encoder.
    pub encoder_window: EncoderWindow,
    /// Which matrices are held in few bits.
    pub quantization: Quantization,
    /// What is known of the numbers that matrices are multiplied with.
    pub activations: Activations,
    /// Target tokens that the cache has room for, where it is given a fixed capacity.
    pub capacity: Option<usize>,
    /// Which checkpoint tensors are the decoder's embedding and the output head.
    pub vocabulary: Vocabulary,
}

/// The checkpoint's names of the decoder's two vocabulary-wide tensors; equal where the head is tied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// `[vocab_size, hidden_size]`, looked up by target tokens.
    pub embedding: String,
    /// `[vocab_size, hidden_size]`, multiplied with the last hidden state.
    pub head: String,
    /// The tokens that can be generated, ascending; all if none. The others have no logits.
    pub kept: Option<Arc<[usize]>>,
}

/// The graphs of the options' task, in the order of [`interface::parts`].
pub fn definitions(config: &Config, options: &Options) -> Vec<Definition> {
    match &options.task {
        Task::Text2TextGeneration => {
            vec![encoder(config, options), decoder_init(config, options), decoder_step(config, options)]
        }
        Task::FeatureExtraction(wanted) => vec![features::features(config, options, wanted)],
        Task::TextClassification | Task::TokenClassification => vec![classifier::classifier(config, options)],
    }
}

impl Options {
    /// The ports of the graphs these options give.
    pub fn interface(&self, config: &Config) -> Interface {
        Interface::of(config, self.dtype, self.returned(), self.cache(config))
    }

    /// What the decoder graphs return besides keys and values.
    pub fn returned(&self) -> Returned {
        let kept_tokens = self.vocabulary.kept.as_ref().map(|kept| kept.len());
        Returned { logits: self.logits, kept_tokens, alignment: !self.alignment_layers.is_empty() }
    }

    /// Whether a number in the encoder's `attention_mask` says which of several sources of a row a token belongs to: where
    /// what it returns is of each token.
    pub fn reads_side_by_side(&self) -> bool {
        let is_of_tokens = match &self.task {
            Task::Text2TextGeneration => true,
            Task::FeatureExtraction(features) => features.pooling == Pooling::None,
            Task::TextClassification | Task::TokenClassification => false,
        };
        is_of_tokens && self.target.reads_side_by_side()
    }

    /// How the keys and values of the target pass from step to step.
    pub fn cache(&self, config: &Config) -> CacheLayout {
        self.capacity.map_or_else(|| self.target.cache(config), CacheLayout::Static)
    }
}
