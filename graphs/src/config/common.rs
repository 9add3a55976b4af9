//! The fields that transformers reads in the same way for every family: class, labels, padding, generation settings,
//! and those without effect.

use serde_json::{Map, Value};

use super::{Architecture, ConfigError, Family, Fields, LayerType, MOST_LABELS, ProblemType, Refused, Stack, is_empty};
use crate::json::cut;

/// Fields without effect that transformers itself writes, or that many checkpoints have: training settings, output
/// selection and provenance.
const IGNORED: &[&str] = &[
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout_rate",
    "cross_attention_hidden_size",
    "dropout_rate",
    "dtype",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// The settings for generation that transformers 5 takes from a `config.json` where there is no
/// `generation_config.json`.
const GENERATION_SETTINGS: &[&str] = &[
    "decoder_start_token_id",
    "dola_layers",
    "guidance_scale",
    "max_new_tokens",
    "max_time",
    "min_new_tokens",
    "min_p",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "renormalize_logits",
    "sequence_bias",
    "stop_strings",
    "token_healing",
    "top_h",
    "watermarking_config",
];

// Fields that change what transformers computes without the model's own code reading them.

pub(crate) const QUANTIZATION_CONFIG: Refused = Refused {
    field: "quantization_config",
    expected: "null (only weights in float32, float16 or bfloat16 can be exported)",
    accepts: Value::is_null,
};
pub(crate) const PER_LAYER_CONFIG: Refused = Refused {
    field: "per_layer_config",
    expected: "null or {} (all layers of a stack have the same sizes)",
    accepts: is_empty,
};
pub(crate) const TRANSFORMERS_WEIGHTS: Refused = Refused {
    field: "transformers_weights",
    expected: "\"model.safetensors\" or null",
    accepts: |value| value == "model.safetensors",
};
pub(crate) const IS_CAUSAL: Refused =
    Refused { field: "is_causal", expected: "true or null", accepts: |value| value == &Value::Bool(true) };

impl Fields {
    /// The class of a checkpoint. A custom class counts as the transformers class that its name ends with; without any,
    /// the default applies.
    pub fn architecture(&mut self, family: Family) -> Result<Architecture, ConfigError> {
        let names = self.take("architectures", "a list of class names", |value| {
            value.as_array()?.iter().map(|name| Some(name.as_str()?.to_string())).collect::<Option<Vec<_>>>()
        })?;
        let names = names.unwrap_or_default();
        let known = |name: &str| Architecture::ALL.into_iter().find(|known| name.ends_with(&known.name(family)));
        let mut classes: Vec<Architecture> = names.iter().filter_map(|name| known(name)).collect();
        classes.dedup();
        if names.iter().any(|name| known(name).is_none_or(|known| known.name(family) != *name)) {
            self.ignore("architectures");
        }
        match classes[..] {
            [] => Ok(Architecture::default()),
            [class] => Ok(class),
            _ => Err(self.error("architectures", "one class", names.join(" and "))),
        }
    }

    pub fn is_encoder_decoder(&mut self, family: Family, architecture: Architecture) -> Result<bool, ConfigError> {
        let given = self.boolean("is_encoder_decoder")?;
        match (architecture, given) {
            (Architecture::Model, Some(false)) => {
                Err(self.error("is_encoder_decoder", format!("true for {}", architecture.name(family)), "false"))
            }
            // The class sets it itself.
            (Architecture::ConditionalGeneration, Some(false)) => {
                self.ignore("is_encoder_decoder");
                Ok(true)
            }
            (_, given) => Ok(given.unwrap_or(true)),
        }
    }

    /// The names of a classifier's labels: those of `id2label`, or transformers' own for `num_labels`, or for two.
    pub fn labels(&mut self) -> Result<Vec<String>, ConfigError> {
        let number = self.size_up_to(MOST_LABELS, "num_labels")?;
        let named = self.take("id2label", "an object with a name for each label, from \"0\" on", |value| {
            let names = value.as_object().filter(|names| !names.is_empty())?;
            (0..names.len())
                .map(|id| Some(names.get(&id.to_string())?.as_str()?.to_string()))
                .collect::<Option<Vec<_>>>()
        })?;
        match (named, number) {
            (Some(named), Some(number)) if named.len() != number => {
                let expected = format!("{} as id2label has, or none", named.len());
                Err(self.error("num_labels", expected, number.to_string()))
            }
            (Some(named), _) => Ok(named),
            (None, number) => Ok((0..number.unwrap_or(2)).map(|id| format!("LABEL_{id}")).collect()),
        }
    }

    pub fn problem_type(&mut self) -> Result<Option<ProblemType>, ConfigError> {
        let expected = "\"regression\", \"single_label_classification\" or \"multi_label_classification\"";
        self.take("problem_type", expected, |value| match value.as_str()? {
            "regression" => Some(ProblemType::Regression),
            "single_label_classification" => Some(ProblemType::SingleLabelClassification),
            "multi_label_classification" => Some(ProblemType::MultiLabelClassification),
            _ => None,
        })
    }

    /// `pad_token_id`, which is also -1 where there is none.
    pub fn padding(&mut self) -> Result<Option<i64>, ConfigError> {
        if self.get("pad_token_id").and_then(Value::as_i64).is_some_and(|id| id < 0) {
            self.remove("pad_token_id");
            self.ignore("pad_token_id");
        }
        self.token("pad_token_id")
    }

    /// What each of `count` layers sees: `layer_types`, or a window but where `is_full`.
    pub fn layer_types(
        &mut self,
        count: usize,
        window: usize,
        is_full: impl Fn(usize) -> bool,
    ) -> Result<Vec<LayerType>, ConfigError> {
        let named = self.take("layer_types", "a list of \"sliding_attention\" and \"full_attention\"", |value| {
            value
                .as_array()?
                .iter()
                .map(|name| match name.as_str()? {
                    "sliding_attention" => Some(LayerType::Sliding(window)),
                    // The second is an older name, which transformers reads too.
                    "full_attention" | "attention" => Some(LayerType::Full),
                    _ => None,
                })
                .collect::<Option<Vec<_>>>()
        })?;
        match named {
            None => Ok((0..count)
                .map(|layer| if is_full(layer) { LayerType::Full } else { LayerType::Sliding(window) })
                .collect()),
            Some(layers) if layers.len() == count => Ok(layers),
            Some(layers) => {
                let expected = format!("one entry per layer (num_hidden_layers is {count})");
                Err(self.error("layer_types", expected, format!("{} entries", layers.len())))
            }
        }
    }

    /// Checks the sizes of heads, which were taken from here.
    pub fn check_heads(&self, stack: &Stack) -> Result<(), ConfigError> {
        if !stack.num_attention_heads.is_multiple_of(stack.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads ({})", stack.num_attention_heads);
            return Err(self.error("num_key_value_heads", expected, stack.num_key_value_heads.to_string()));
        }
        if !stack.head_dim.is_multiple_of(2) {
            return Err(self.error("head_dim", "an even number (rotary halves)", stack.head_dim.to_string()));
        }
        Ok(())
    }

    /// The settings for generation that transformers takes where there is no `generation_config.json`.
    pub fn generation_settings(&self) -> Map<String, Value> {
        let taken = |field: &&str| Some((field.to_string(), self.get(field)?.clone()));
        GENERATION_SETTINGS.iter().filter_map(taken).filter(|(_, value)| !value.is_null()).collect()
    }

    /// The paths of the fields without effect, but for those that many checkpoints have.
    pub fn without_effect(&self) -> Vec<String> {
        let rest = self.rest().filter(|field| !IGNORED.contains(&field.as_str()));
        rest.chain(&self.ignored).map(|field| cut(&self.path_of(field))).collect()
    }
}
