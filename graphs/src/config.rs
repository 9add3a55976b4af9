//! `Config`: a checkpoint's `config.json` as a checked value. Every field that changes what the model computes is read here
//! or refused here, so nothing downstream meets a value that the graphs do not implement. Files of fine-tunes have many others,
//! which transformers does not read either: they are listed.
//!
//! Both layouts that Hugging Face writes are read: that of transformers 4.53 (the official checkpoints: flat `rope_theta`,
//! `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`, token ids on each side).

use std::fmt;

use serde_json::{Map, Value};

use crate::json;
pub use crate::json::{cut, shown};

/// A T5Gemma model's shape: two Gemma 2 stacks that may differ in everything but the token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The bidirectional stack that reads the source.
    pub encoder: Side,
    /// The causal stack that writes the target and attends to the encoder's output.
    pub decoder: Side,
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

/// The class of transformers that a checkpoint was saved from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Architecture {
    /// `T5GemmaForConditionalGeneration`, which is meant where none is named.
    #[default]
    ConditionalGeneration,
    /// `T5GemmaModel`: both stacks without a head.
    Model,
    /// `T5GemmaEncoderModel`.
    EncoderModel,
    /// `T5GemmaForSequenceClassification`.
    SequenceClassification,
    /// `T5GemmaForTokenClassification`.
    TokenClassification,
}

impl Architecture {
    const ALL: [Architecture; 5] = [
        Architecture::ConditionalGeneration,
        Architecture::Model,
        Architecture::EncoderModel,
        Architecture::SequenceClassification,
        Architecture::TokenClassification,
    ];

    /// The name of the class.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::ConditionalGeneration => "T5GemmaForConditionalGeneration",
            Architecture::Model => "T5GemmaModel",
            Architecture::EncoderModel => "T5GemmaEncoderModel",
            Architecture::SequenceClassification => "T5GemmaForSequenceClassification",
            Architecture::TokenClassification => "T5GemmaForTokenClassification",
        }
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
    /// The token put before the source that the decoder reads: its side's `bos_token_id`.
    pub decoder_start: i64,
    /// The tokens that the decoder does not see: its side's `pad_token_id`.
    pub decoder_pad: i64,
}

/// What the scores of labels mean, as `problem_type` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemType {
    /// Numbers to be predicted.
    Regression,
    /// Exactly one label holds.
    SingleLabelClassification,
    /// Each label holds or does not.
    MultiLabelClassification,
}

/// The special token ids that `config.json` names.
#[derive(Clone, Debug, Default, PartialEq)]
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
pub struct Side {
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

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// The first field that is missing, malformed, contradictory, unknown or unsupported.
    pub fn parse(json: &str) -> Result<Config, ConfigError> {
        let value = json::parse(json).map_err(|error| ConfigError {
            field: String::new(),
            expected: "a JSON object".into(),
            found: error.to_string(),
        })?;
        let mut top = Fields::of("", &value)?;
        if let Some(found) = top.text("model_type")?.filter(|kind| kind != "t5gemma") {
            let hint = match found.as_str() {
                "t5gemma2" => " (T5Gemma 2 is another architecture)",
                "t5_gemma_module" => " (one side of a T5Gemma; the whole model's config.json is needed)",
                _ => "",
            };
            return Err(top.error("model_type", "\"t5gemma\"", format!("{found:?}{hint}")));
        }
        let architecture = top.architecture()?;
        let is_encoder_decoder = top.is_encoder_decoder(architecture)?;

        let encoder = top.side("encoder")?;
        let decoder = top.side("decoder")?;
        let classifier = match architecture {
            Architecture::SequenceClassification | Architecture::TokenClassification => Some(Classifier {
                is_encoder_decoder,
                labels: top.labels()?,
                problem_type: top.problem_type()?,
                decoder_start: decoder.bos.unwrap_or(2),
                decoder_pad: decoder.pad.unwrap_or(0),
            }),
            _ => None,
        };
        let mut config = Config {
            architecture,
            classifier,
            generation: Map::new(),
            ignored: Vec::new(),
            tie_word_embeddings: top.boolean("tie_word_embeddings")?.unwrap_or(true),
            tokens: TokenIds {
                bos: top.token("bos_token_id")?.or(decoder.bos).or(Some(2)),
                eos: top.tokens("eos_token_id")?.or(decoder.eos).unwrap_or_else(|| vec![1]),
                pad: top.padding()?.or(decoder.pad).or(Some(0)),
            },
            encoder: encoder.side,
            decoder: decoder.side,
        };
        // The sides' own sizes decide; the top-level copy is informative in every layout.
        top.whole("vocab_size")?;
        top.refuse(REFUSED)?;
        for (mut side, fields) in [(decoder.left, REFUSED_IN_DECODER), (encoder.left, REFUSED_IN_SIDE)] {
            side.refuse(fields)?;
            if side.path == "decoder" {
                config.generation.extend(side.settings_for_generation());
            }
            config.ignored.extend(side.paths());
        }
        config.generation.extend(top.settings_for_generation());
        config.ignored.extend(top.paths());
        config.ignored.sort();
        Ok(config)
    }
}

/// Fields without effect that transformers itself writes, or that many checkpoints have: training settings, output selection
/// and provenance.
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

/// The settings for generation that transformers 5 takes from a `config.json` where there is no `generation_config.json`.
const FROM_CONFIG: &[&str] = &[
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

/// Fields that the model's own code does not read but what it is built on does, and what they may be instead of absent.
const REFUSED: &[Refused] = &[
    ("quantization_config", "null (only weights in float32, float16 or bfloat16 can be exported)", Value::is_null),
    ("per_layer_config", "null or {} (the layers of a side have the same sizes)", is_empty),
    ("transformers_weights", "\"model.safetensors\" or null", |value| value == "model.safetensors"),
];

/// See [`REFUSED`].
const REFUSED_IN_SIDE: &[Refused] = &[
    ("quantization_config", "null (only weights in float32, float16 or bfloat16 can be exported)", Value::is_null),
    ("per_layer_config", "null or {} (the layers of a side have the same sizes)", is_empty),
];

/// See [`REFUSED`].
const REFUSED_IN_DECODER: &[Refused] = &[
    REFUSED_IN_SIDE[0],
    REFUSED_IN_SIDE[1],
    ("is_causal", "true or null", |value| value == &Value::Bool(true)),
    ("kv_sharing_modes", "null (each layer has keys and values of its own)", Value::is_null),
];

/// A field, what it may be, and whether a value is that.
type Refused = (&'static str, &'static str, fn(&Value) -> bool);

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// Far beyond any real model: a damaged number is refused before a graph of its size is built.
const MOST_LAYERS: usize = 4096;
/// See [`MOST_LAYERS`]; the rotary frequencies of a head are written into the graph.
const MOST_HEAD_DIM: usize = 65536;
/// See [`MOST_LAYERS`]; each label has a name.
const MOST_LABELS: usize = 65536;

/// A side with the token ids that transformers 5 repeats in it.
struct ParsedSide {
    side: Side,
    bos: Option<i64>,
    eos: Option<Vec<i64>>,
    pad: Option<i64>,
    left: Fields,
}

/// The fields of one JSON object that have not been read yet.
struct Fields {
    path: String,
    left: Map<String, Value>,
    /// Those that were read and found to be without effect.
    ignored: Vec<String>,
}

impl Fields {
    fn of(path: &str, value: &Value) -> Result<Fields, ConfigError> {
        match value {
            Value::Object(left) => Ok(Fields { path: path.to_string(), left: left.clone(), ignored: Vec::new() }),
            other => {
                Err(ConfigError { field: path.to_string(), expected: "a JSON object".into(), found: shown(other) })
            }
        }
    }

    fn error(&self, field: &str, expected: impl Into<String>, found: impl Into<String>) -> ConfigError {
        ConfigError { field: self.path_of(field), expected: expected.into(), found: found.into() }
    }

    fn path_of(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_string() } else { format!("{}.{field}", self.path) }
    }

    /// Takes a field as a `T`; absent and `null` are `None`.
    fn take<T>(
        &mut self,
        field: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.left.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.error(field, expected, shown(&value))),
            },
        }
    }

    /// Takes a field that may only have one value when it is there.
    fn expect(&mut self, field: &str, expected: &str, holds: impl FnOnce(&Value) -> bool) -> Result<(), ConfigError> {
        self.take(field, expected, |value| holds(value).then_some(())).map(|_| ())
    }

    fn text(&mut self, field: &str) -> Result<Option<String>, ConfigError> {
        self.take(field, "a string", |value| value.as_str().map(str::to_string))
    }

    fn boolean(&mut self, field: &str) -> Result<Option<bool>, ConfigError> {
        self.take(field, "true or false", Value::as_bool)
    }

    fn whole(&mut self, field: &str) -> Result<Option<usize>, ConfigError> {
        // Every product of two sizes stays below 2^62, so shape arithmetic cannot overflow.
        self.whole_up_to(i32::MAX as usize, field)
    }

    fn whole_up_to(&mut self, most: usize, field: &str) -> Result<Option<usize>, ConfigError> {
        self.take(field, &format!("a whole number between 1 and {most}"), |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=most).contains(n))
        })
    }

    fn positive(&mut self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.take(field, "a positive number", |value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    /// A positive number whose `null` means "off" and whose absence means the default.
    fn cap(&mut self, field: &str, default: f64) -> Result<Option<f64>, ConfigError> {
        if self.left.contains_key(field) { self.positive(field) } else { Ok(Some(default)) }
    }

    fn token(&mut self, field: &str) -> Result<Option<i64>, ConfigError> {
        self.take(field, "a token id", |value| value.as_i64().filter(|&id| id >= 0))
    }

    fn tokens(&mut self, field: &str) -> Result<Option<Vec<i64>>, ConfigError> {
        self.take(field, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(|id| id.as_i64().filter(|&id| id >= 0)).collect(),
            one => one.as_i64().filter(|&id| id >= 0).map(|id| vec![id]),
        })
    }

    /// `pad_token_id`, of which -1 is a way to say that there is none.
    fn padding(&mut self) -> Result<Option<i64>, ConfigError> {
        if self.left.get("pad_token_id").and_then(Value::as_i64).is_some_and(|id| id < 0) {
            self.left.remove("pad_token_id");
            self.ignored.push("pad_token_id".to_string());
        }
        self.token("pad_token_id")
    }

    fn side(&mut self, name: &str) -> Result<ParsedSide, ConfigError> {
        let Some(value) = self.left.remove(name) else {
            return Err(self.error(name, "the settings of this side", "nothing"));
        };
        let mut fields = Fields::of(name, &value)?;
        // transformers takes either side for a T5Gemma's, whatever it calls itself.
        if fields.left.get("model_type").is_some_and(|kind| kind == "t5_gemma_module") {
            fields.left.remove("model_type");
        }
        fields.expect("hidden_activation", "\"gelu_pytorch_tanh\"", |value| value == "gelu_pytorch_tanh")?;

        let num_hidden_layers = fields.whole_up_to(MOST_LAYERS, "num_hidden_layers")?.unwrap_or(26);
        let has_no_window = fields.left.get("sliding_window").is_some_and(Value::is_null);
        let sliding_window = fields.whole("sliding_window")?;
        let side = Side {
            vocab_size: fields.whole("vocab_size")?.unwrap_or(256_000),
            hidden_size: fields.whole("hidden_size")?.unwrap_or(2304),
            intermediate_size: fields.whole("intermediate_size")?.unwrap_or(9216),
            num_attention_heads: fields.whole("num_attention_heads")?.unwrap_or(8),
            num_key_value_heads: fields.whole("num_key_value_heads")?.unwrap_or(4),
            head_dim: fields.whole_up_to(MOST_HEAD_DIM, "head_dim")?.unwrap_or(256),
            query_pre_attn_scalar: fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
            attn_logit_softcapping: fields.cap("attn_logit_softcapping", 50.0)?,
            final_logit_softcapping: fields.cap("final_logit_softcapping", 30.0)?,
            attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: fields.rope_theta()?,
            max_position_embeddings: fields.whole("max_position_embeddings")?.unwrap_or(8192),
            layers: fields.layers(num_hidden_layers, sliding_window.unwrap_or(4096))?,
        };
        if !side.num_attention_heads.is_multiple_of(side.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads ({})", side.num_attention_heads);
            return Err(fields.error("num_key_value_heads", expected, side.num_key_value_heads.to_string()));
        }
        if !side.head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", "an even number (rotary halves)", side.head_dim.to_string()));
        }
        if has_no_window && side.layers.iter().any(|layer| layer.window().is_some()) {
            let expected = "a window for the layers of sliding_attention";
            return Err(fields.error("sliding_window", expected, "null"));
        }
        let (bos, pad) = (fields.token("bos_token_id")?, fields.padding()?);
        let eos = fields.tokens("eos_token_id")?;
        Ok(ParsedSide { side, bos, eos, pad, left: fields })
    }

    /// The class of a checkpoint. A class of someone else's is taken for the one that its name ends with, or for what a
    /// checkpoint is taken for that names none.
    fn architecture(&mut self) -> Result<Architecture, ConfigError> {
        let names = self.take("architectures", "a list of names of classes", |value| {
            value.as_array()?.iter().map(|name| Some(name.as_str()?.to_string())).collect::<Option<Vec<_>>>()
        })?;
        let names = names.unwrap_or_default();
        let known = |name: &str| Architecture::ALL.into_iter().find(|known| name.ends_with(known.name()));
        let mut classes: Vec<Architecture> = names.iter().filter_map(|name| known(name)).collect();
        classes.dedup();
        if names.iter().any(|name| known(name).is_none_or(|known| known.name() != name)) {
            self.ignored.push("architectures".to_string());
        }
        match classes[..] {
            [] => Ok(Architecture::default()),
            [class] => Ok(class),
            _ => Err(self.error("architectures", "one class", names.join(" and "))),
        }
    }

    fn is_encoder_decoder(&mut self, architecture: Architecture) -> Result<bool, ConfigError> {
        let given = self.boolean("is_encoder_decoder")?;
        match (architecture, given) {
            (Architecture::Model, Some(false)) => {
                Err(self.error("is_encoder_decoder", format!("true for {}", architecture.name()), "false"))
            }
            // The class sets it itself.
            (Architecture::ConditionalGeneration, Some(false)) => {
                self.ignored.push("is_encoder_decoder".to_string());
                Ok(true)
            }
            (_, given) => Ok(given.unwrap_or(true)),
        }
    }

    /// The names of a classifier's labels: those of `id2label`, or transformers' own for `num_labels`, or for two.
    fn labels(&mut self) -> Result<Vec<String>, ConfigError> {
        let number = self.whole_up_to(MOST_LABELS, "num_labels")?;
        let named = self.take("id2label", "an object with a name for each label from \"0\" on", |value| {
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

    fn problem_type(&mut self) -> Result<Option<ProblemType>, ConfigError> {
        let expected = "\"regression\", \"single_label_classification\" or \"multi_label_classification\"";
        self.take("problem_type", expected, |value| match value.as_str()? {
            "regression" => Some(ProblemType::Regression),
            "single_label_classification" => Some(ProblemType::SingleLabelClassification),
            "multi_label_classification" => Some(ProblemType::MultiLabelClassification),
            _ => None,
        })
    }

    /// The base of the rotary frequencies: that of `rope_scaling`, as it was called, or of `rope_parameters`; or the flat one.
    fn rope_theta(&mut self) -> Result<f64, ConfigError> {
        let flat = self.positive("rope_theta")?;
        let (scaling, parameters) = (self.left.remove("rope_scaling"), self.left.remove("rope_parameters"));
        let is_given = |value: &Value| !value.is_null() && !is_empty(value);
        let found = [("rope_scaling", scaling), ("rope_parameters", parameters)];
        let mut given = found.into_iter().filter_map(|(name, value)| Some((name, value.filter(is_given)?)));
        let Some((name, value)) = given.next() else { return Ok(flat.unwrap_or(10_000.0)) };
        self.ignored.extend(given.map(|(name, _)| name.to_string()));
        let mut rope = Fields::of(&self.path_of(name), &value)?;
        let name_of_type = if rope.left.contains_key("rope_type") { "rope_type" } else { "type" };
        rope.expect(name_of_type, "\"default\"", |value| value == "default")?;
        rope.left.remove("type");
        for layers in ["full_attention", "sliding_attention"] {
            rope.expect(layers, "nothing (all layers of a side have the same rotary positions)", |_| false)?;
        }
        let theta = rope.positive("rope_theta")?.or(flat).unwrap_or(10_000.0);
        let left = rope.left.iter().filter(|(_, value)| !value.is_null());
        self.ignored.extend(left.map(|(field, _)| format!("{name}.{field}")));
        Ok(theta)
    }

    fn layers(&mut self, count: usize, window: usize) -> Result<Vec<LayerType>, ConfigError> {
        let named = self.take("layer_types", "a list of \"sliding_attention\" and \"full_attention\"", |value| {
            value
                .as_array()?
                .iter()
                .map(|name| match name.as_str()? {
                    "sliding_attention" => Some(LayerType::Sliding(window)),
                    // As transformers reads an older name.
                    "full_attention" | "attention" => Some(LayerType::Full),
                    _ => None,
                })
                .collect::<Option<Vec<_>>>()
        })?;
        match named {
            None => Ok((0..count)
                .map(|layer| if layer % 2 == 0 { LayerType::Sliding(window) } else { LayerType::Full })
                .collect()),
            Some(layers) if layers.len() == count => Ok(layers),
            Some(layers) => {
                let expected = format!("one entry per layer (num_hidden_layers is {count})");
                Err(self.error("layer_types", expected, format!("{} entries", layers.len())))
            }
        }
    }

    /// Refuses fields that change what is computed, unless they have a value that does not.
    fn refuse(&mut self, fields: &[Refused]) -> Result<(), ConfigError> {
        fields.iter().try_for_each(|(field, expected, holds)| self.expect(field, expected, holds))
    }

    /// What transformers takes for generation where there is no `generation_config.json`.
    fn settings_for_generation(&self) -> Map<String, Value> {
        let taken = |field: &&str| Some((field.to_string(), self.left.get(*field)?.clone()));
        FROM_CONFIG.iter().filter_map(taken).filter(|(_, value)| !value.is_null()).collect()
    }

    /// The paths of what is left, but for what many checkpoints have.
    fn paths(&self) -> Vec<String> {
        let left = self.left.iter().filter(|(field, value)| !IGNORED.contains(&field.as_str()) && !value.is_null());
        let left = left.map(|(field, _)| field).chain(&self.ignored);
        left.map(|field| cut(&self.path_of(field))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn minimal() -> Value {
        json!({
            "model_type": "t5gemma",
            "encoder": {"num_hidden_layers": 2, "sliding_window": 3},
            "decoder": {"num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        })
    }

    #[test]
    fn missing_fields_take_the_documented_defaults() {
        let config = Config::parse(&minimal().to_string()).expect("a minimal config is valid");
        assert_eq!(config.encoder.layers, [LayerType::Sliding(3), LayerType::Full]);
        assert_eq!(config.decoder.layers[2], LayerType::Sliding(4096));
        assert_eq!(config.decoder.attn_logit_softcapping, Some(50.0));
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn null_switches_a_softcap_off() {
        let mut json = minimal();
        json["decoder"]["attn_logit_softcapping"] = Value::Null;
        let config = Config::parse(&json.to_string()).expect("null is allowed");
        assert_eq!(config.decoder.attn_logit_softcapping, None);
        assert_eq!(config.encoder.attn_logit_softcapping, Some(50.0));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            ("/model_type", json!("t5gemma2"), "model_type"),
            ("/encoder/hidden_activation", json!("silu"), "encoder.hidden_activation"),
            ("/decoder/rope_scaling", json!({"type": "linear"}), "decoder.rope_scaling.type"),
            ("/decoder/rope_parameters", json!({"rope_type": "yarn"}), "decoder.rope_parameters.rope_type"),
            ("/decoder/num_key_value_heads", json!(3), "decoder.num_key_value_heads"),
            ("/decoder/layer_types", json!(["full_attention"]), "decoder.layer_types"),
            ("/encoder/hidden_size", json!("wide"), "encoder.hidden_size"),
            ("/encoder/hidden_size", json!(0), "encoder.hidden_size"),
            ("/encoder/head_dim", json!(7), "encoder.head_dim"),
            ("/encoder/head_dim", json!(2_147_483_646), "encoder.head_dim"),
            ("/decoder/num_hidden_layers", json!(2_147_483_647), "decoder.num_hidden_layers"),
            ("/decoder/rope_scaling", json!({"rope_type": "linear", "factor": 1.0}), "decoder.rope_scaling.rope_type"),
            ("/decoder/rope_parameters", json!({"type": "yarn"}), "decoder.rope_parameters.type"),
            (
                "/decoder/rope_parameters",
                json!({"sliding_attention": {"rope_type": "default"}}),
                "decoder.rope_parameters.sliding_attention",
            ),
            ("/encoder/sliding_window", Value::Null, "encoder.sliding_window"),
            ("/encoder/per_layer_config", json!({"0": {"head_dim": 8}}), "encoder.per_layer_config"),
            ("/decoder/is_causal", json!(false), "decoder.is_causal"),
            ("/quantization_config", json!({"quant_method": "bitsandbytes"}), "quantization_config"),
            ("/transformers_weights", json!("other.safetensors"), "transformers_weights"),
            ("/architectures", json!("T5GemmaModel"), "architectures"),
            ("/architectures", json!(["T5GemmaEncoderModel", "T5GemmaModel"]), "architectures"),
            ("/encoder/rms_norm_eps", json!("NaN"), "encoder.rms_norm_eps"),
            ("/encoder", json!([]), "encoder"),
        ];
        for (pointer, value, field) in cases {
            let mut json = minimal();
            let (parent, key) = pointer.rsplit_once('/').expect("pointers start with a slash");
            json.pointer_mut(parent).expect("the parent exists")[key] = value;
            let error = Config::parse(&json.to_string()).expect_err(field);
            assert_eq!(error.field, field, "{error}");
        }
    }

    #[test]
    fn fields_that_transformers_does_not_read_are_listed() {
        let cases = [
            ("/num_beams", json!(4), Some("num_beams")),
            ("/task_specific_params", json!({"summarization": {"max_length": 200}}), Some("task_specific_params")),
            ("/auto_map", json!({"AutoModel": "x.Y"}), Some("auto_map")),
            ("/_attn_implementation", json!("eager"), Some("_attn_implementation")),
            ("/transformers.js_config", json!({"dtype": "q4"}), Some("transformers.js_config")),
            ("/is_encoder_decoder", json!(false), Some("is_encoder_decoder")),
            ("/architectures", json!(["MyT5GemmaForConditionalGeneration"]), Some("architectures")),
            ("/architectures", json!(["PeftModelForSeq2SeqLM"]), Some("architectures")),
            ("/architectures", json!([]), None),
            ("/quantization_config", Value::Null, None),
            ("/torch_dtype", json!("bfloat16"), None),
            ("/is_decoder", json!(false), None),
            ("/problem_type", json!("riddle"), None),
            ("/pad_token_id", json!(-1), Some("pad_token_id")),
            ("/encoder/qk_norm", json!(true), Some("encoder.qk_norm")),
            ("/encoder/model_type", json!("gemma2"), Some("encoder.model_type")),
            ("/encoder/is_decoder", json!(true), None),
            ("/encoder/is_causal", json!(false), Some("encoder.is_causal")),
            ("/encoder/rope_scaling", json!({}), None),
            ("/encoder/rope_parameters", json!({"type": "default", "rope_theta": 9.0}), None),
            ("/encoder/rope_parameters", json!({"factor": 2.0}), Some("encoder.rope_parameters.factor")),
            ("/decoder/pad_token_id", json!(-1), Some("decoder.pad_token_id")),
        ];
        for (pointer, value, ignored) in cases {
            let mut json = minimal();
            let (parent, key) = pointer.rsplit_once('/').expect("pointers start with a slash");
            json.pointer_mut(parent).expect("the parent exists")[key] = value;
            let config = Config::parse(&json.to_string()).unwrap_or_else(|error| panic!("{pointer}: {error}"));
            assert_eq!(config.ignored, ignored.into_iter().map(str::to_string).collect::<Vec<_>>(), "{pointer}");
        }
        let mut json = minimal();
        json["x".repeat(1000)] = json!(1);
        let config = Config::parse(&json.to_string()).expect("a long name is a name");
        assert!(config.ignored[0].chars().count() < 100);
    }

    #[test]
    fn the_rotary_base_is_where_transformers_finds_it() {
        for (changes, theta) in [
            (json!({"rope_theta": 3.0}), 3.0),
            (json!({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}), 5.0),
            (json!({"rope_theta": 3.0, "rope_parameters": {}}), 3.0),
            (json!({"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}), 7.0),
            (json!({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}}), 10_000.0),
        ] {
            let mut json = minimal();
            json["decoder"].as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            assert_eq!(Config::parse(&json.to_string()).expect("valid").decoder.rope_theta, theta, "{changes}");
        }
    }

    #[test]
    fn training_fields_may_be_no_numbers() {
        let text = minimal().to_string().replacen("{", "\u{feff}{\"initializer_range\": NaN, \"loss\": -Infinity,", 1);
        let config = Config::parse(&text).expect("as Python writes it");
        assert_eq!(config.ignored, ["loss"]);
    }

    #[test]
    fn settings_for_generation_are_kept_as_transformers_keeps_them() {
        let mut json = minimal();
        json["decoder_start_token_id"] = json!(7);
        json["max_length"] = json!(128);
        json["decoder"]["decoder_start_token_id"] = json!(5);
        json["decoder"]["stop_strings"] = json!(["x"]);
        json["encoder"]["min_p"] = json!(0.5);
        let config = Config::parse(&json.to_string()).expect("valid");
        let expected = json!({"decoder_start_token_id": 7, "stop_strings": ["x"]});
        assert_eq!(Value::Object(config.generation), expected);
    }

    #[test]
    fn classifiers_name_their_labels() {
        let classifier = |changes: Value| {
            let mut json = minimal();
            json["architectures"] = json!(["T5GemmaForSequenceClassification"]);
            json.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            Config::parse(&json.to_string()).map(|config| config.classifier.expect("a classifier").labels)
        };
        for (changes, labels) in [
            (json!({}), vec!["LABEL_0", "LABEL_1"]),
            (json!({"num_labels": 3}), vec!["LABEL_0", "LABEL_1", "LABEL_2"]),
            (json!({"id2label": {"1": "no", "0": "yes"}}), vec!["yes", "no"]),
        ] {
            assert_eq!(classifier(changes).expect("well-formed"), labels);
        }
        for (changes, field) in [
            (json!({"id2label": {"1": "no"}}), "id2label"),
            (json!({"id2label": {}}), "id2label"),
            (json!({"id2label": {"0": "no"}, "num_labels": 2}), "num_labels"),
            (json!({"num_labels": 1_000_000}), "num_labels"),
            (json!({"problem_type": "riddle"}), "problem_type"),
        ] {
            assert_eq!(classifier(changes).expect_err(field).field, field);
        }
        let mut json = minimal();
        json["id2label"] = json!(7);
        Config::parse(&json.to_string()).expect("labels mean nothing to a generating model");
    }

    #[test]
    fn a_side_must_be_there() {
        let error = Config::parse(r#"{"model_type": "t5gemma", "encoder": {}}"#).expect_err("no decoder");
        assert_eq!(error.to_string(), "decoder: expected the settings of this side, found nothing");
    }
}
