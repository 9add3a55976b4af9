//! The fields that transformers reads in the same way for every family: class, labels, padding, generation settings,
//! and those without effect.

use serde_json::{Map, Value};

use super::{Architecture, ConfigError, Family, Fields, MOST_LABELS, ProblemType};
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
