//! `Facts`: what a runtime needs to know about a model besides its graphs, in one form for every family. The exporter
//! derives them from the configuration and writes them into the manifest, so that serving does not read `config.json`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{Config, ConfigError, Custom, MOST_HEAD_DIM, MOST_LAYERS, MOST_SIZE, ProblemType, Stack, TokenIds};

/// What a runtime needs to know about a model besides its graphs. Fields have the names that `config.json` gives them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// The stack that reads the source.
    pub encoder: StackFacts,
    /// The stack that writes the target. Its vocabulary is that of the logits, unless only some tokens are kept.
    pub decoder: StackFacts,
    /// Logits are `cap * tanh(x / cap)`; none without a soft-cap.
    pub final_logit_softcapping: Option<f64>,
    /// Special token ids; those of `generation_config.json` take precedence.
    pub tokens: TokenIds,
    /// The settings for generation in `config.json`, such as `decoder_start_token_id`; they count if there is no
    /// `generation_config.json`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub generation: Map<String, Value>,
    /// The part that only classifiers have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier: Option<ClassifierFacts>,
    /// The part that reads images, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<VisionFacts>,
    /// How the interface differs from the family's own.
    #[serde(default, skip_serializing_if = "Custom::is_stock")]
    pub custom: Custom,
}

/// The sizes of one stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackFacts {
    /// Rows of the embedding table: token ids are below this.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width between the gate and down projections of the feed-forward block.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The longest sequence, in tokens.
    pub max_position_embeddings: usize,
}

/// The part that only classifiers have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierFacts {
    /// Whether the decoder reads the source again and the labels are scored from it; otherwise from the encoder.
    pub is_encoder_decoder: bool,
    /// The name of each label, in the order of the logits.
    pub labels: Vec<String>,
    /// What the logits mean; by default that one of several labels holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem_type: Option<ProblemType>,
}

/// The part that reads images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionFacts {
    /// Pixels of a side of the square image.
    pub image_size: usize,
    /// Tokens of an image.
    pub tokens_per_image: usize,
    /// The token that stands for a token of an image.
    pub image_token: i64,
    /// The token before an image.
    pub start_of_image: i64,
    /// The token behind an image.
    pub end_of_image: i64,
    /// Width of the tower.
    pub hidden_size: usize,
    /// Width between the two layers of its feed-forward blocks.
    pub intermediate_size: usize,
    /// Heads of the tower.
    pub num_attention_heads: usize,
    /// Patches of an image.
    pub patches: usize,
}

impl Config {
    /// What a runtime needs to know.
    pub fn facts(&self) -> Facts {
        Facts {
            encoder: StackFacts::of(&self.encoder),
            decoder: StackFacts::of(&self.decoder),
            final_logit_softcapping: self.decoder.final_logit_softcapping,
            tokens: self.tokens.clone(),
            generation: self.generation.clone(),
            classifier: self.classifier.as_ref().map(|classifier| ClassifierFacts {
                is_encoder_decoder: classifier.is_encoder_decoder,
                labels: classifier.labels.clone(),
                problem_type: classifier.problem_type,
            }),
            vision: self.vision.as_ref().map(|vision| VisionFacts {
                image_size: vision.image_size,
                tokens_per_image: vision.tokens_per_image,
                image_token: vision.image_token,
                start_of_image: vision.start_of_image,
                end_of_image: self.end_of_image.unwrap_or_default(),
                hidden_size: vision.hidden_size,
                intermediate_size: vision.intermediate_size,
                num_attention_heads: vision.num_attention_heads,
                patches: vision.grid() * vision.grid(),
            }),
            custom: self.custom.clone(),
        }
    }
}

impl StackFacts {
    fn of(stack: &Stack) -> StackFacts {
        StackFacts {
            vocab_size: stack.vocab_size,
            hidden_size: stack.hidden_size,
            intermediate_size: stack.intermediate_size,
            num_hidden_layers: stack.layers.len(),
            num_attention_heads: stack.num_attention_heads,
            num_key_value_heads: stack.num_key_value_heads,
            head_dim: stack.head_dim,
            max_position_embeddings: stack.max_position_embeddings,
        }
    }
}

impl Facts {
    /// Checks facts from a file against the limits of a configuration, so that sizes computed from them cannot
    /// overflow.
    ///
    /// # Errors
    /// The first fact outside its limits.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (name, stack) in [("encoder", &self.encoder), ("decoder", &self.decoder)] {
            for (field, size, most) in [
                ("vocab_size", stack.vocab_size, MOST_SIZE),
                ("hidden_size", stack.hidden_size, MOST_SIZE),
                ("intermediate_size", stack.intermediate_size, MOST_SIZE),
                ("num_hidden_layers", stack.num_hidden_layers, MOST_LAYERS),
                ("num_attention_heads", stack.num_attention_heads, MOST_SIZE),
                ("num_key_value_heads", stack.num_key_value_heads, MOST_SIZE),
                ("head_dim", stack.head_dim, MOST_HEAD_DIM),
                ("max_position_embeddings", stack.max_position_embeddings, MOST_SIZE),
            ] {
                if !(1..=most).contains(&size) {
                    let (field, expected) = (format!("{name}.{field}"), format!("an integer between 1 and {most}"));
                    return Err(ConfigError { field, expected, found: size.to_string() });
                }
            }
        }
        if let Some(cap) = self.final_logit_softcapping.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            let (field, expected) = ("final_logit_softcapping".to_string(), "a positive number or null".to_string());
            return Err(ConfigError { field, expected, found: cap.to_string() });
        }
        if let Some(vision) = &self.vision {
            for (field, size) in [
                ("image_size", vision.image_size),
                ("tokens_per_image", vision.tokens_per_image),
                ("hidden_size", vision.hidden_size),
                ("intermediate_size", vision.intermediate_size),
                ("num_attention_heads", vision.num_attention_heads),
                ("patches", vision.patches),
            ] {
                // Squares of these are allocated.
                if !(1..=MOST_HEAD_DIM * MOST_HEAD_DIM / 4).contains(&size) {
                    let field = format!("vision.{field}");
                    return Err(ConfigError {
                        field,
                        expected: "the size of an image".into(),
                        found: size.to_string(),
                    });
                }
            }
        }
        self.custom.check()?;
        let TokenIds { bos, eos, pad } = &self.tokens;
        let fields = [("bos", bos.as_slice()), ("eos", eos.as_slice()), ("pad", pad.as_slice())];
        for (field, tokens) in fields {
            if let Some(token) = tokens.iter().find(|token| **token < 0) {
                let field = format!("tokens.{field}");
                return Err(ConfigError { field, expected: "a token id".into(), found: token.to_string() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let stack = r#"{"num_hidden_layers": 2}"#;
        let config = format!(r#"{{"encoder": {stack}, "decoder": {stack}, "decoder_start_token_id": 7}}"#);
        Config::parse(&config).expect("a minimal config").facts()
    }

    #[test]
    fn facts_survive_json() {
        let facts = facts();
        assert_eq!(facts.generation["decoder_start_token_id"], 7);
        let text = serde_json::to_string(&facts).expect("facts are an object");
        assert_eq!(serde_json::from_str::<Facts>(&text).expect("reads what was written"), facts);
    }

    #[test]
    fn facts_are_checked_against_the_limits_of_a_configuration() {
        type Change = fn(&mut Facts);
        let cases: [(&str, Change); 7] = [
            ("encoder.hidden_size", |facts| facts.encoder.hidden_size = 0),
            ("decoder.vocab_size", |facts| facts.decoder.vocab_size = usize::MAX),
            ("decoder.num_hidden_layers", |facts| facts.decoder.num_hidden_layers = 5000),
            ("encoder.head_dim", |facts| facts.encoder.head_dim = 1 << 20),
            ("final_logit_softcapping", |facts| facts.final_logit_softcapping = Some(-1.0)),
            ("tokens.pad", |facts| facts.tokens.pad = Some(-1)),
            ("tokens.eos", |facts| facts.tokens.eos = vec![1, -2]),
        ];
        facts().check().expect("the facts of a configuration are within its limits");
        for (field, change) in cases {
            let mut facts = facts();
            change(&mut facts);
            assert_eq!(facts.check().expect_err(field).field, field);
        }
    }
}
