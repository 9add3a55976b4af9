//! `Options`: everything that decides the graphs besides the configuration and the numbers of the weights.

use std::sync::Arc;

use crate::config::{Config, Head, Positions};
use crate::interface::{CacheLayout, DType, DecoderOutputs, Interface, Logits};
use crate::manifest::EncoderWindow;
use crate::quantization::{Activations, Quantization};
use crate::target::Target;
use crate::task::{Pooling, Task};
use crate::tensors::Role;

/// Everything that decides the graphs besides the configuration and the numbers of the weights.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the graphs are for.
    pub task: Task,
    /// The runtime that the graphs are written for.
    pub target: Target,
    /// Dtype of weights, activations and caches.
    pub dtype: DType,
    /// The logits that the decoder graphs return.
    pub logits: Logits,
    /// The decoder layers whose mean cross-attention the decoder graphs return; none if empty.
    pub alignment_layers: Vec<usize>,
    /// Whether positions exactly one window apart see each other in the encoder.
    pub encoder_window: EncoderWindow,
    /// Which matrices are quantized, and how.
    pub quantization: Quantization,
    /// What is known of activations, and what is done to them.
    pub activations: Activations,
    /// A fixed capacity of the cache, in target tokens; none for the layout that the target has.
    pub capacity: Option<usize>,
    /// The hidden state at padding for [`PaddingRows::Learned`](crate::task::PaddingRows::Learned),
    /// `[encoder.hidden_size]`.
    pub padding_row: Option<Arc<[f32]>>,
    /// Which checkpoint tensors are the decoder's embedding and the output head.
    pub vocabulary: Vocabulary,
    /// Whether the graphs take LoRA adapters as inputs.
    pub takes_adapters: bool,
}

/// The checkpoint's names of the vocabulary-wide tensors; equal where they are tied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// `[vocab_size, hidden_size]`, looked up by source tokens.
    pub source_embedding: String,
    /// `[vocab_size, hidden_size]`, looked up by target tokens.
    pub embedding: String,
    /// `[vocab_size, hidden_size]`, multiplied with the last hidden state.
    pub head: String,
    /// The tokens that can be generated, ascending; all if none. The others have no logits.
    pub kept: Option<Arc<[usize]>>,
    /// A head that is not the family's own; `head` is then its last matrix.
    pub custom_head: Head,
    /// The vectors of the token behind an image, by which source and target tokens are embedded: `[hidden_size]`. None
    /// if they are zeros.
    pub end_of_image: Option<[String; 2]>,
}

impl Options {
    /// What a tensor is for; `family` knows the family's own. A table that is both embedding and head is the head.
    pub fn role(&self, tensor: &str, family: impl Fn(&str) -> Option<Role>) -> Option<Role> {
        if self.is_head(tensor) {
            return Some(Role::Head);
        }
        self.vocabulary.custom_head.role(Some(&self.vocabulary.embedding), tensor, family)
    }

    /// Whether a tensor is the output head, whatever else it is.
    pub fn is_head(&self, tensor: &str) -> bool {
        self.task.is_generation() && tensor == self.vocabulary.head
    }

    /// The ports of the graphs that these options give.
    pub fn interface(&self, config: &Config) -> Interface {
        Interface::of(&config.facts(), self.dtype, self.decoder_outputs(), self.cache(config))
    }

    /// The outputs of the decoder graphs besides keys and values.
    pub fn decoder_outputs(&self) -> DecoderOutputs {
        let kept_tokens = self.vocabulary.kept.as_ref().map(|kept| kept.len());
        DecoderOutputs { logits: self.logits, kept_tokens, cross_attentions: !self.alignment_layers.is_empty() }
    }

    /// Whether the numbers in the encoder's `attention_mask` say which of several sources in a row a token belongs to.
    /// Only graphs that return states of each token can keep sources apart, and only if rows have any length and padding
    /// has no states of its own.
    pub fn reads_side_by_side(&self, config: &Config) -> bool {
        let returns_tokens = match &self.task {
            Task::Text2TextGeneration => true,
            Task::FeatureExtraction(features) => {
                features.pooling == Pooling::None
                    && features.fixed_length.is_none()
                    && features.padding_rows.is_unspecified()
            }
            Task::TextClassification | Task::TokenClassification => false,
        };
        let are_integer = config.custom.source_positions == Positions::Integer;
        returns_tokens && are_integer && self.target.capabilities().side_by_side
    }

    /// How the keys and values of the target tokens pass from step to step.
    pub fn cache(&self, config: &Config) -> CacheLayout {
        // The operators over a cache in place rotate by integer positions.
        let are_integer = config.custom.target_positions == Positions::Integer;
        let capabilities = self.target.capabilities();
        let is_in_place = match capabilities.in_place_head_dim {
            _ if config.merged_attention => capabilities.merges_in_place,
            unit => unit.is_some_and(|unit| are_integer && config.decoder.head_dim.is_multiple_of(unit)),
        };
        match self.capacity {
            Some(capacity) => CacheLayout::Static(capacity),
            None if is_in_place => CacheLayout::InPlace,
            None => CacheLayout::Growing,
        }
    }
}
