//! `Config`: a checkpoint's `config.json` as a checked value. Every field that changes what a model computes is either
//! read or rejected by the family's folder, so nothing downstream sees a value that the graphs do not implement.
//! Fine-tunes have many other fields, which transformers does not read either: they are listed.
//!
//! The types, the same for every family, are here; code for reading them that families share is in `config/`;
//! [`Config::parse`] is in `family.rs`.

mod common;
mod custom;
mod fields;
mod limits;
mod vision;

pub(crate) use common::{IS_CAUSAL, PER_LAYER_CONFIG, QUANTIZATION_CONFIG, TRANSFORMERS_WEIGHTS};
pub use custom::{Activation, Custom, Head, Positions, Progress, StackInput};
pub(crate) use fields::{Fields, Refused, is_empty};
pub(crate) use limits::{MOST_HEAD_DIM, MOST_LABELS, MOST_LAYERS, MOST_SIZE};
pub use vision::Vision;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::task::{Features, Task};
use crate::tensors::Role;

/// A model's shape: an encoder and a decoder, which may differ in everything but the token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The family of models.
    pub family: Family,
    /// The bidirectional stack, which reads the source.
    pub encoder: Stack,
    /// The causal stack, which writes the target and attends to the encoder's output.
    pub decoder: Stack,
    /// Whether the decoder attends to target and source in one softmax, instead of one after the other.
    pub merged_attention: bool,
    /// Whether the output head shares the decoder's embedding table when the checkpoint stores no head of its own.
    pub tie_word_embeddings: bool,
    /// Special token ids; those of `generation_config.json` take precedence.
    pub tokens: TokenIds,
    /// The class that the checkpoint was saved from.
    pub architecture: Architecture,
    /// The part that only classifiers have.
    pub classifier: Option<Classifier>,
    /// The part that reads images; none if there is none, or if it is not exported.
    pub vision: Option<Vision>,
    /// The token whose embedding is a vector of its own, in both stacks: the one behind an image.
    pub end_of_image: Option<i64>,
    /// How its interface differs from the family's own.
    pub custom: Custom,
    /// Generation settings, which transformers takes from here if there is no `generation_config.json`, except those
    /// for which it uses its own defaults.
    pub generation: Map<String, Value>,
    /// The paths of fields without effect, sorted; without those that most checkpoints have.
    pub ignored: Vec<String>,
}

/// A family of models. Its graphs, its reader of `config.json` and the names of its tensors are in a folder of its
/// name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Two Gemma 2 stacks (arXiv 2504.06225).
    T5Gemma,
    /// Two Gemma 3 stacks and a SigLIP tower (arXiv 2512.14856).
    T5Gemma2,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 2] = [Family::T5Gemma, Family::T5Gemma2];

    /// The name in manifests, and `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Family::T5Gemma => "t5gemma",
            Family::T5Gemma2 => "t5gemma2",
        }
    }

    /// The prefix of its class names in transformers.
    pub fn class_prefix(self) -> &'static str {
        match self {
            Family::T5Gemma => "T5Gemma",
            Family::T5Gemma2 => "T5Gemma2",
        }
    }
}

/// The class of transformers that a checkpoint was saved from; every family has the same, with a prefix of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Architecture {
    /// `…ForConditionalGeneration`, the default.
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

/// The part that only classifiers have.
#[derive(Clone, Debug, PartialEq)]
pub struct Classifier {
    /// Whether the decoder reads the source again and the labels are scored from it; otherwise from the encoder.
    pub is_encoder_decoder: bool,
    /// The name of each label.
    pub labels: Vec<String>,
    /// The meaning of label scores.
    pub problem_type: Option<ProblemType>,
    /// The token before the source that the decoder reads: `decoder.bos_token_id`.
    pub decoder_start: i64,
    /// The token that the decoder does not see: `decoder.pad_token_id`.
    pub decoder_pad: i64,
}

/// The meaning of label scores, from `problem_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// Each is a predicted number.
    Regression,
    /// Logits of mutually exclusive labels.
    SingleLabelClassification,
    /// Logits of independent labels.
    MultiLabelClassification,
}

/// The special token ids that `config.json` names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenIds {
    /// `bos_token_id`, which starts a target unless `decoder_start_token_id` is given.
    pub bos: Option<i64>,
    /// `eos_token_id`: any of them ends a target.
    pub eos: Vec<i64>,
    /// `pad_token_id`.
    pub pad: Option<i64>,
}

/// The sizes of one stack, under the names that `config.json` has for them in `encoder` and `decoder`.
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
    /// Width of one head, even; `num_attention_heads * head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    /// Scores are multiplied by `query_pre_attn_scalar^-0.5`.
    pub query_pre_attn_scalar: f64,
    /// Scores become `cap * tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Logits become `cap * tanh(logit / cap)`; of the decoder only.
    pub final_logit_softcapping: Option<f64>,
    /// Whether the q, k, v and o projections have a bias.
    pub attention_bias: bool,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether queries and keys are normed, each head by itself, before they are rotated.
    pub qk_norm: bool,
    /// Rotary positions of the layers that see every position.
    pub full_rope: Rope,
    /// Rotary positions of the layers with a window.
    pub sliding_rope: Rope,
    /// The longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// What the self-attention of each layer sees; there are `num_hidden_layers`.
    pub layers: Vec<LayerType>,
}

/// Rotary frequencies: `θ^(−2j/head_dim) / factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base `θ`.
    pub theta: f64,
    /// What every frequency is divided by.
    pub factor: f64,
}

/// What the self-attention of a layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerType {
    /// Every position (of the past, in the decoder).
    Full,
    /// A window of this many positions; `attention.rs` has the rules, which differ between encoder and decoder.
    Sliding(usize),
}

impl Config {
    /// What a tensor is for, by its name; none for tensors that the graphs of no task have.
    pub fn role(&self, tensor: &str) -> Option<Role> {
        self.custom.role(self.family, tensor)
    }

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

impl Stack {
    /// The rotary positions of a layer.
    pub fn rope(&self, layer: LayerType) -> Rope {
        match layer {
            LayerType::Full => self.full_rope,
            LayerType::Sliding(_) => self.sliding_rope,
        }
    }
}

impl LayerType {
    /// The width of the window, if there is one.
    pub fn window(self) -> Option<usize> {
        match self {
            LayerType::Full => None,
            LayerType::Sliding(window) => Some(window),
        }
    }
}

/// A field of `config.json` that is missing, malformed, or has a value that the graphs do not implement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The field's path, such as `decoder.rope_parameters.rope_type`; empty for the whole document.
    pub field: String,
    /// What is accepted.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = if self.field.is_empty() { "the document" } else { &self.field };
        write!(f, "{field}: expected {}, found {}", self.expected, self.found)
    }
}

impl std::error::Error for ConfigError {}
