//! `Config`: a checkpoint's `config.json` as a checked value. Every field that changes what a model computes is read or refused
//! by the family's folder, so nothing downstream meets a value that the graphs do not implement. Files of fine-tunes have many
//! others, which transformers does not read either: they are listed.
//!
//! Here are the types, the same for every family, and in `config/` what families share for reading them;
//! [`Config::parse`] is in `family.rs`.

mod common;
mod fields;
mod limits;

pub(crate) use fields::{Fields, Refused, is_empty};
pub(crate) use limits::{MOST_HEAD_DIM, MOST_LABELS, MOST_LAYERS, MOST_SIZE};

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::task::{Features, Task};

/// A model's shape: an encoder and a decoder, which may differ in everything but the token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The family of models, which decides what the rest means.
    pub family: Family,
    /// The bidirectional stack that reads the source.
    pub encoder: Stack,
    /// The causal stack that writes the target and attends to the encoder's output.
    pub decoder: Stack,
    /// Whether the output head shares the decoder's embedding table when the checkpoint stores no head of its own.
    pub tie_word_embeddings: bool,
    /// Special token ids; `generation_config.json` has precedence over them.
    pub tokens: TokenIds,
    /// The class that the checkpoint was saved from.
    pub architecture: Architecture,
    /// What only the classifiers have.
    pub classifier: Option<Classifier>,
    /// Settings for generation that stand here instead of in a `generation_config.json`. Where there is none, transformers
    /// takes them, but for those that it has defaults of its own for.
    pub generation: Map<String, Value>,
    /// The paths of the fields without effect that are not in every checkpoint, sorted.
    pub ignored: Vec<String>,
}

/// A family of models: the graphs, the reading of `config.json` and the names of tensors are in a folder of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Two Gemma 2 stacks (arXiv 2504.06225).
    T5Gemma,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 1] = [Family::T5Gemma];

    /// The name in manifests, and `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Family::T5Gemma => "t5gemma",
        }
    }

    /// What the names of its classes in transformers begin with.
    pub fn class_prefix(self) -> &'static str {
        match self {
            Family::T5Gemma => "T5Gemma",
        }
    }
}

/// The class of transformers that a checkpoint was saved from, the same for all families but for the beginning of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Architecture {
    /// `…ForConditionalGeneration`, which is meant where none is named.
    #[default]
    ConditionalGeneration,
    /// `…Model`: both stacks without a head.
    Model,
    /// `…EncoderModel`.
    EncoderModel,
    /// `…ForSequenceClassification`.
    SequenceClassification,
    /// `…ForTokenClassification`.
    TokenClassification,
}

impl Architecture {
    /// Every class.
    pub const ALL: [Architecture; 5] = [
        Architecture::ConditionalGeneration,
        Architecture::Model,
        Architecture::EncoderModel,
        Architecture::SequenceClassification,
        Architecture::TokenClassification,
    ];

    /// The name of the class in a family.
    pub fn name(self, family: Family) -> String {
        let end = match self {
            Architecture::ConditionalGeneration => "ForConditionalGeneration",
            Architecture::Model => "Model",
            Architecture::EncoderModel => "EncoderModel",
            Architecture::SequenceClassification => "ForSequenceClassification",
            Architecture::TokenClassification => "ForTokenClassification",
        };
        format!("{}{end}", family.class_prefix())
    }
}

/// What a classifier is besides its stacks.
#[derive(Clone, Debug, PartialEq)]
pub struct Classifier {
    /// Whether the decoder reads the source again and is what the labels are scored from; otherwise the encoder is.
    pub is_encoder_decoder: bool,
    /// The name of each label.
    pub labels: Vec<String>,
    /// What the scores of the labels mean.
    pub problem_type: Option<ProblemType>,
    /// The token before the source that the decoder reads: `decoder.bos_token_id`.
    pub decoder_start: i64,
    /// The token that the decoder does not see: `decoder.pad_token_id`.
    pub decoder_pad: i64,
}

/// What the scores of labels mean, as `problem_type` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// Numbers to be predicted.
    Regression,
    /// Exactly one label holds.
    SingleLabelClassification,
    /// Each label holds or does not.
    MultiLabelClassification,
}

/// The special token ids that `config.json` names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenIds {
    /// `bos_token_id`, the token a target starts with unless `decoder_start_token_id` is given.
    pub bos: Option<i64>,
    /// `eos_token_id`, one or several; any of them ends a target.
    pub eos: Vec<i64>,
    /// `pad_token_id`.
    pub pad: Option<i64>,
}

/// One stack: the fields of `encoder` or `decoder` in `config.json`, under the names used there.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the gate and down projections of the feed-forward block.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; `num_attention_heads * head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    /// Scores are multiplied by `query_pre_attn_scalar^-0.5`.
    pub query_pre_attn_scalar: f64,
    /// Scores become `cap * tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Logits become `cap * tanh(logit / cap)`; read on the decoder side only.
    pub final_logit_softcapping: Option<f64>,
    /// Whether the q, k, v and o projections have a bias.
    pub attention_bias: bool,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The longest sequence the model was configured for, in tokens.
    pub max_position_embeddings: usize,
    /// What each layer's self-attention sees, in order; the length is `num_hidden_layers`.
    pub layers: Vec<LayerType>,
}

/// What the self-attention of a layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerType {
    /// Every position (of the past, in the decoder).
    Full,
    /// A window of this many positions: see `attention` for the exact rule on each side.
    Sliding(usize),
}

impl Config {
    /// What the checkpoint was made for.
    pub fn task(&self) -> Task {
        match self.architecture {
            Architecture::ConditionalGeneration => Task::Text2TextGeneration,
            Architecture::Model | Architecture::EncoderModel => Task::FeatureExtraction(Features::default()),
            Architecture::SequenceClassification => Task::TextClassification,
            Architecture::TokenClassification => Task::TokenClassification,
        }
    }
}

impl LayerType {
    /// The number of positions of a layer that does not see all.
    pub fn window(self) -> Option<usize> {
        match self {
            LayerType::Full => None,
            LayerType::Sliding(window) => Some(window),
        }
    }
}

/// A field of `config.json` that is missing, of the wrong kind, or asks for something the graphs do not implement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The field's path, such as `decoder.rope_parameters.rope_type`; empty for the document as a whole.
    pub field: String,
    /// What would have been accepted.
    pub expected: String,
    /// What stands there.
    pub found: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = if self.field.is_empty() { "the document" } else { &self.field };
        write!(f, "{field}: expected {}, found {}", self.expected, self.found)
    }
}

impl std::error::Error for ConfigError {}
