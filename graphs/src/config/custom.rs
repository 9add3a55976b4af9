//! `Custom`: how a model's interface differs from T5Gemma's own, as data: what positions are made of, what stands in
//! the place of token ids and of the head. The exporter takes it from `config.json` or from its options and records it
//! in the facts, from which the ports follow.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Family, MOST_SIZE};
use crate::tensors::Role;

/// How a model's interface differs from T5Gemma's own, which is the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Custom {
    /// The rotary positions of source tokens.
    pub source_positions: Positions,
    /// The rotary positions of target tokens.
    pub target_positions: Positions,
    /// Whether queries and keys of cross-attention are rotated too, by the positions of the target and of the source.
    pub cross_rope: bool,
    /// What the encoder reads.
    pub encoder_input: StackInput,
    /// What the decoder reads.
    pub decoder_input: StackInput,
    /// The checkpoint's name of the table that target tokens are looked up in; none for the family's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder_embedding: Option<String>,
    /// What follows the decoder's last norm.
    pub head: Head,
    /// For models whose targets have an estimated length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// What rotary angles are computed from. Masks and windows go by the index of a token in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// The index of a token in its sequence.
    #[default]
    Integer,
    /// A float32 input of the graphs.
    Float,
}

/// What a stack reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StackInput {
    /// Token ids, which are looked up.
    #[default]
    InputIds,
    /// Vectors in the place of looked-up rows; like these, they are multiplied by `√hidden` in the graph.
    InputsEmbeds,
}

/// What follows the decoder's last norm.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Head {
    /// `x · Wᵀ` with the family's own matrix, perhaps tied to the embedding.
    #[default]
    Stock,
    /// `x · Wᵀ + b`.
    Linear {
        /// The checkpoint's name of `W`, `[vocab_size, hidden_size]`.
        weight: String,
        /// The checkpoint's name of `b`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bias: Option<String>,
    },
    /// `act(x · W₁ᵀ + b₁) · W₂ᵀ + b₂`.
    Mlp {
        /// The checkpoint's names of `W₁` `[size, hidden_size]`, `b₁`, `W₂` `[vocab_size, size]` and `b₂`.
        tensors: [String; 4],
        /// Rows of `W₁`.
        size: usize,
        /// The function between the layers.
        activation: Activation,
    },
    /// Nothing: the graphs return the normed hidden states.
    None,
}

/// The function between the layers of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `½x(1 + erf(x/√2))`.
    Gelu,
    /// Its approximation by tanh.
    GeluTanh,
    /// `x / (1 + exp(−x))`.
    Silu,
}

/// Targets of an estimated length, as those of T5Gemma-TTS (arXiv 2604.01760). A request has the estimate of each row:
/// `progress_total`, the start token included. Float positions say how far a sequence has come: from 0 at its first
/// token to `scale` at its last.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// The float position of a sequence's last token.
    pub scale: f64,
    /// Target tokens per second.
    pub tokens_per_second: f64,
    /// Seconds beyond the estimate after which a target ends.
    pub extra_seconds: f64,
}

impl Activation {
    /// Every function.
    pub const ALL: [Activation; 3] = [Activation::Gelu, Activation::GeluTanh, Activation::Silu];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::Silu => "silu",
        }
    }
}

impl Head {
    /// The checkpoint tensors of a head that is not the family's own.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let names: Vec<&String> = match self {
            Head::Stock | Head::None => Vec::new(),
            Head::Linear { weight, bias } => [weight].into_iter().chain(bias).collect(),
            Head::Mlp { tensors, .. } => tensors.iter().collect(),
        };
        names.into_iter().map(String::as_str)
    }

    /// What a tensor is for in a model with this head and this decoder embedding; `family` knows the family's own.
    pub fn role(&self, embedding: Option<&str>, tensor: &str, family: impl Fn(&str) -> Option<Role>) -> Option<Role> {
        if self.tensors().any(|name| name == tensor) {
            return Some(Role::Head);
        }
        family(tensor).or_else(|| (embedding == Some(tensor)).then_some(Role::DecoderEmbedding))
    }

    /// Whether it is the family's own.
    pub fn is_stock(&self) -> bool {
        *self == Head::Stock
    }
}

impl Custom {
    /// Whether the interface is T5Gemma's own.
    pub fn is_stock(&self) -> bool {
        *self == Custom::default()
    }

    /// Whether target tokens are those of the text tokenizer.
    pub fn has_text_targets(&self) -> bool {
        self.decoder_embedding.is_none() && self.head.is_stock() && self.decoder_input == StackInput::InputIds
    }

    /// The float position of a source's last token, if source positions follow from the progress of a sequence.
    pub fn source_scale(&self) -> Option<f32> {
        let progress = self.progress.filter(|_| self.source_positions == Positions::Float)?;
        Some(progress.scale as f32)
    }

    /// The float position of a target's last token, as [`Custom::source_scale`].
    pub fn target_scale(&self) -> Option<f32> {
        let progress = self.progress.filter(|_| self.target_positions == Positions::Float)?;
        Some(progress.scale as f32)
    }

    /// What a tensor is for: see [`Tensors::role`](crate::tensors::Tensors::role).
    pub fn role(&self, family: Family, tensor: &str) -> Option<Role> {
        self.head.role(self.decoder_embedding.as_deref(), tensor, family.tensors().role)
    }

    /// The differences, in words for people.
    pub fn describe(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut say = |is_so: bool, text: &str| words.extend(is_so.then(|| text.to_string()));
        say(self.source_positions == Positions::Float, "float source positions");
        say(self.target_positions == Positions::Float, "float target positions");
        say(self.cross_rope, "rotary positions in cross-attention");
        say(self.encoder_input == StackInput::InputsEmbeds, "the encoder reads inputs_embeds");
        say(self.decoder_input == StackInput::InputsEmbeds, "the decoder reads decoder_inputs_embeds");
        if let Some(table) = &self.decoder_embedding {
            words.push(format!("target tokens are looked up in {table}"));
        }
        match &self.head {
            Head::Stock => {}
            Head::Linear { weight, bias: None } => words.push(format!("head {weight}")),
            Head::Linear { weight, bias: Some(bias) } => words.push(format!("head {weight} with {bias}")),
            Head::Mlp { tensors: [first, _, second, _], activation, .. } => {
                words.push(format!("head of two layers, {first}, {} and {second}", activation.name()));
            }
            Head::None => words.push("no head: the decoder returns hidden states".to_string()),
        }
        if let Some(Progress { scale, tokens_per_second, .. }) = self.progress {
            words.push(format!("progress_total in requests (scale {scale}, {tokens_per_second} tokens per second)"));
        }
        words
    }

    /// Fast operators that the graphs do without, and why, in words for people.
    pub fn left_aside(&self) -> Vec<String> {
        let mut words = Vec::new();
        if self.target_positions == Positions::Float {
            words.push("GroupQueryAttention and a cache in place (they rotate by integer positions)".to_string());
        }
        if self.source_positions == Positions::Float {
            words.push("RotaryEmbedding and sources side by side (integer positions)".to_string());
        }
        words
    }

    /// Checks one that comes from a file.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let error = |field: &str, expected: &str, found: String| {
            Err(ConfigError { field: format!("custom.{field}"), expected: expected.into(), found })
        };
        if let Head::Mlp { size, .. } = &self.head
            && !(1..=MOST_SIZE).contains(size)
        {
            return error("head.mlp.size", "a size", size.to_string());
        }
        let Some(Progress { scale, tokens_per_second, extra_seconds }) = self.progress else { return Ok(()) };
        for (field, number) in [("scale", scale), ("tokens_per_second", tokens_per_second)] {
            if !(number.is_finite() && number > 0.0) {
                return error(&format!("progress.{field}"), "a positive number", number.to_string());
            }
        }
        if !(extra_seconds.is_finite() && extra_seconds >= 0.0) {
            return error("progress.extra_seconds", "a number of at least 0", extra_seconds.to_string());
        }
        Ok(())
    }
}
