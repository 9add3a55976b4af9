//! Configurations: what a Gemma 2 `config.json` says, checked, and the T5Gemma configuration that two of them make.

use serde_json::{Map, Value, json};
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::json::{cut, shown};

/// A field that is missing, malformed or of a model that cannot be adapted; see [`crate::Error::Invalid`].
#[derive(Debug)]
pub struct FieldError {
    pub field: String,
    pub expected: String,
    pub found: String,
}

pub type Result<T, E = FieldError> = std::result::Result<T, E>;

pub fn error(field: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> FieldError {
    FieldError { field: field.into(), expected: expected.into(), found: found.into() }
}

/// What a field may be.
#[derive(Clone, Copy)]
pub enum Kind {
    Size,
    Positive,
    NotNegative,
    Flag,
    /// A positive number, or null for none.
    SoftCap,
    /// A size, or null in a stack without sliding layers.
    Window,
    /// The one activation that T5Gemma has here; null for it too.
    Activation,
}

pub const ACTIVATION: &str = "gelu_pytorch_tanh";
/// As in `graphs`, which refuses larger ones: any size, and `num_hidden_layers`.
const MOST_SIZE: u64 = i32::MAX as u64;
const MOST_LAYERS: usize = 4096;

/// The fields that each stack takes from its Gemma as they are, with Gemma 2's default; `layer_types` is another.
pub fn copied() -> [(&'static str, Kind, Value); 16] {
    [
        ("vocab_size", Kind::Size, json!(256_000)),
        ("hidden_size", Kind::Size, json!(2304)),
        ("intermediate_size", Kind::Size, json!(9216)),
        ("num_hidden_layers", Kind::Size, json!(26)),
        ("num_attention_heads", Kind::Size, json!(8)),
        ("num_key_value_heads", Kind::Size, json!(4)),
        ("head_dim", Kind::Size, json!(256)),
        ("hidden_activation", Kind::Activation, json!(ACTIVATION)),
        ("max_position_embeddings", Kind::Size, json!(8192)),
        ("initializer_range", Kind::NotNegative, json!(0.02)),
        ("rms_norm_eps", Kind::Positive, json!(1e-6)),
        ("attention_bias", Kind::Flag, json!(false)),
        ("query_pre_attn_scalar", Kind::Positive, json!(256)),
        ("sliding_window", Kind::Window, json!(4096)),
        ("final_logit_softcapping", Kind::SoftCap, json!(30.0)),
        ("attn_logit_softcapping", Kind::SoftCap, json!(50.0)),
    ]
}

/// Other fields that are read, written anew, or without effect, and so no surprise if they are not copied.
const KNOWN: &[&str] = &[
    "model_type",
    "architectures",
    "layer_types",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "use_cache",
    "attention_dropout",
    "hidden_act",
    "cache_implementation",
    "use_bidirectional_attention",
    "transformers_version",
    "_name_or_path",
];

/// What the `config.json` of a Gemma 2 says.
pub struct Gemma2Config {
    /// The fields of [`copied`] and `layer_types`, as they are in the file or by default.
    stack: Map<String, Value>,
    pub sizes: Sizes,
    pub initializer_range: f64,
    pub tie_word_embeddings: bool,
    /// `use_bidirectional_attention`, if it is on.
    pub bidirectional: Option<Value>,
    pub tokens: TokenIds,
    rope_theta: f64,
    /// Fields that T5Gemma does not have.
    pub dropped: Vec<String>,
}

/// The sizes that the shapes of a stack's tensors follow from.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub attention_bias: bool,
}

/// The special tokens, null where there is none.
#[derive(Clone)]
pub struct TokenIds {
    pub bos: Value,
    /// One or a list.
    pub eos: Value,
    pub pad: Value,
}

impl Gemma2Config {
    /// Reads a `config.json`, and the token ids of `generation_config.json`, which take precedence.
    pub fn read(config: &Map<String, Value>, generation: Option<&Map<String, Value>>) -> Result<Gemma2Config> {
        check_kind_of_model(config)?;
        let mut stack = stack(config, &copied())?;
        let sizes = Sizes::of(&stack)?;
        let layer_types = layer_types(config, sizes.num_hidden_layers, 2)?;
        check_window(&stack, &layer_types)?;
        Ok(Gemma2Config {
            sizes,
            initializer_range: stack["initializer_range"].as_f64().expect("it was checked"),
            tie_word_embeddings: match config.get("tie_word_embeddings") {
                None => true,
                Some(value) => Kind::Flag.check("tie_word_embeddings", value)? == true,
            },
            bidirectional: config.get("use_bidirectional_attention").filter(|value| is_on(value)).cloned(),
            tokens: TokenIds::read(config, generation)?,
            rope_theta: rope_theta(config)?,
            dropped: {
                let is_known = |field: &str| stack.contains_key(field) || KNOWN.contains(&field);
                let rest = config.iter().filter(|(field, value)| !value.is_null() && !is_known(field));
                rest.map(|(field, _)| cut(field)).collect()
            },
            stack: {
                stack.insert("layer_types".into(), layer_types.into());
                stack
            },
        })
    }

    /// A field that is copied, as it is written.
    pub fn field(&self, name: &str) -> &Value {
        &self.stack[name]
    }
}

/// The fields of a stack, as they are in `config.json` or by default.
pub fn stack(config: &Map<String, Value>, fields: &[(&str, Kind, Value)]) -> Result<Map<String, Value>> {
    let mut stack = Map::new();
    for (field, kind, default) in fields {
        let value = match config.get(*field) {
            None => default.clone(),
            Some(Value::Null) if matches!(kind, Kind::Activation) => default.clone(),
            Some(value) => kind.check(field, value)?,
        };
        stack.insert(field.to_string(), value);
    }
    Ok(stack)
}

/// Requires a window where layers have one.
pub fn check_window(stack: &Map<String, Value>, layer_types: &[Value]) -> Result<()> {
    if stack["sliding_window"].is_null() && layer_types.iter().any(|layer| layer == SLIDING) {
        return Err(error("sliding_window", "a window for the layers of sliding_attention", "null"));
    }
    Ok(())
}

impl Sizes {
    /// The sizes of a stack that was read.
    pub fn of(stack: &Map<String, Value>) -> Result<Sizes> {
        let size = |field: &str| stack[field].as_u64().expect("sizes were checked") as usize;
        let sizes = Sizes {
            vocab_size: size("vocab_size"),
            hidden_size: size("hidden_size"),
            intermediate_size: size("intermediate_size"),
            num_hidden_layers: size("num_hidden_layers"),
            num_attention_heads: size("num_attention_heads"),
            num_key_value_heads: size("num_key_value_heads"),
            head_dim: size("head_dim"),
            attention_bias: stack["attention_bias"] == true,
        };
        sizes.check()?;
        Ok(sizes)
    }

    fn check(&self) -> Result<()> {
        let layers = self.num_hidden_layers;
        if layers > MOST_LAYERS {
            return Err(error("num_hidden_layers", format!("at most {MOST_LAYERS}"), layers.to_string()));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !self.hidden_size.is_multiple_of(heads) {
            let expected = format!("a multiple of num_attention_heads ({heads})");
            return Err(error("hidden_size", expected, self.hidden_size.to_string()));
        }
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads ({heads})");
            return Err(error("num_key_value_heads", expected, kv_heads.to_string()));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(error("head_dim", "an even number (rotary halves)", self.head_dim.to_string()));
        }
        Ok(())
    }
}

impl Kind {
    /// Returns a field's value, as it is written, if it is of this kind.
    pub fn check(self, field: &str, value: &Value) -> Result<Value> {
        let number = value.as_f64().filter(|x| x.is_finite());
        let is_size = value.as_u64().is_some_and(|size| (1..=MOST_SIZE).contains(&size));
        let is_positive = number.is_some_and(|x| x > 0.0);
        let (is_valid, expected) = match self {
            Kind::Size => (is_size, format!("an integer between 1 and {MOST_SIZE}")),
            Kind::Positive => (is_positive, "a positive number".to_string()),
            Kind::NotNegative => (number.is_some_and(|x| x >= 0.0), "a number of at least 0".to_string()),
            Kind::Flag => (value.is_boolean(), "true or false".to_string()),
            Kind::SoftCap => (is_positive || value.is_null(), "a positive number or null".to_string()),
            Kind::Window => (is_size || value.is_null(), format!("an integer between 1 and {MOST_SIZE}, or null")),
            Kind::Activation => (value == ACTIVATION, format!("{ACTIVATION:?}")),
        };
        if is_valid { Ok(value.clone()) } else { Err(error(field, expected, shown(value))) }
    }
}

/// Whether Python would take a value for true.
pub fn is_on(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false)) && value != 0 && value != ""
}

/// Refuses other models and quantized ones.
fn check_kind_of_model(config: &Map<String, Value>) -> Result<()> {
    let kind = config.get("model_type").unwrap_or(&Value::Null);
    if kind != "gemma2" {
        let why = match kind.as_str().unwrap_or_default() {
            "gemma" => " (Gemma 1 has no norms behind attention and feed-forward)",
            kind if kind.starts_with("gemma3") => {
                " (Gemma 3 has norms of queries and keys: two of them adapt to T5Gemma 2)"
            }
            kind if kind.starts_with("t5gemma") => " (it is an encoder-decoder already)",
            _ => "",
        };
        return Err(error("model_type", "\"gemma2\"", shown(kind) + why));
    }
    check_is_not_quantized(config)
}

pub fn check_is_not_quantized(config: &Map<String, Value>) -> Result<()> {
    match config.get("quantization_config").filter(|value| is_on(value)) {
        None => Ok(()),
        Some(value) => {
            let expected = "null (only weights in float32, bfloat16 or float16 can be adapted)";
            Err(error("quantization_config", expected, shown(value)))
        }
    }
}

pub const SLIDING: &str = "sliding_attention";
pub const FULL: &str = "full_attention";

/// `layer_types`, or all sliding but every `pattern`th.
pub fn layer_types(config: &Map<String, Value>, count: usize, pattern: usize) -> Result<Vec<Value>> {
    let is_sliding = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    let default = || (0..count).map(|layer| if is_sliding(layer) { SLIDING } else { FULL }.into()).collect();
    let layers = match config.get("layer_types") {
        None | Some(Value::Null) => return Ok(default()),
        Some(Value::Array(layers)) if layers.iter().all(|layer| layer == SLIDING || layer == FULL) => layers,
        Some(value) => {
            return Err(error("layer_types", format!("a list of {SLIDING:?} and {FULL:?}"), shown(value)));
        }
    };
    if layers.len() != count {
        let expected = format!("one entry per layer (num_hidden_layers is {count})");
        return Err(error("layer_types", expected, format!("{} entries", layers.len())));
    }
    Ok(layers.clone())
}

/// The base of the rotary frequencies: that of `rope_parameters` (or `rope_scaling`, its older name), or else the flat one.
fn rope_theta(config: &Map<String, Value>) -> Result<f64> {
    let mut theta = config.get("rope_theta").map(|value| ("rope_theta".to_string(), value));
    for name in ["rope_scaling", "rope_parameters"] {
        let rope = match config.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::Object(rope)) => rope,
            Some(value) => return Err(error(name, "an object or null", shown(value))),
        };
        let kind = ["rope_type", "type"].into_iter().find_map(|field| Some((field, rope.get(field)?)));
        if let Some((field, kind)) = kind.filter(|(_, kind)| *kind != "default") {
            return Err(error(format!("{name}.{field}"), "\"default\"", shown(kind)));
        }
        for layers in [FULL, SLIDING] {
            if let Some(value) = rope.get(layers) {
                let expected = "nothing (all layers have the same rotary positions)";
                return Err(error(format!("{name}.{layers}"), expected, shown(value)));
            }
        }
        theta = rope.get("rope_theta").map(|value| (format!("{name}.rope_theta"), value)).or(theta);
    }
    match theta.filter(|(_, value)| !value.is_null()) {
        None => Ok(10_000.0),
        Some((field, value)) => Ok(Kind::Positive.check(&field, value)?.as_f64().expect("a positive number")),
    }
}

impl TokenIds {
    pub fn read(config: &Map<String, Value>, generation: Option<&Map<String, Value>>) -> Result<TokenIds> {
        let id = |field: &str, default: i64| {
            let given = generation.and_then(|generation| generation.get(field)).filter(|value| !value.is_null());
            let value = given.or_else(|| config.get(field)).cloned().unwrap_or(default.into());
            let is_id = |value: &Value| value.as_i64().is_some_and(|id| id >= 0);
            let is_list = |value: &Value| value.as_array().is_some_and(|ids| !ids.is_empty() && ids.iter().all(is_id));
            match field {
                _ if value.is_null() || is_id(&value) => Ok(value),
                "eos_token_id" if is_list(&value) => Ok(value),
                "eos_token_id" => Err(error(field, "a token id or a list of them", shown(&value))),
                _ => Err(error(field, "a token id", shown(&value))),
            }
        };
        Ok(TokenIds { bos: id("bos_token_id", 2)?, eos: id("eos_token_id", 1)?, pad: id("pad_token_id", 0)? })
    }

    /// The ids for both stacks, from those of the decoder's source: a model that generates needs the first two.
    pub fn of_decoder(&self) -> Result<TokenIds> {
        for (field, id) in [("bos_token_id", &self.bos), ("eos_token_id", &self.eos)] {
            if id.is_null() {
                return Err(error(field, "a token id", "null"));
            }
        }
        let pad = if self.pad.is_null() { json!(0) } else { self.pad.clone() };
        Ok(TokenIds { pad, ..self.clone() })
    }

    fn put(&self, fields: &mut Map<String, Value>) {
        for (field, id) in [("bos_token_id", &self.bos), ("eos_token_id", &self.eos), ("pad_token_id", &self.pad)] {
            fields.insert(field.into(), id.clone());
        }
    }
}

/// What both stacks and the whole have in common.
pub struct Common {
    pub dtype: DType,
    pub tied: bool,
    pub tokens: TokenIds,
}

impl Common {
    /// The name of the dtype in `config.json`.
    pub fn dtype(&self) -> &'static str {
        match self.dtype {
            DType::BFloat16 => "bfloat16",
            DType::Float16 => "float16",
            _ => "float32",
        }
    }

    /// The T5Gemma configuration.
    ///
    /// transformers 4.5x and 5.x read the same setting in different places: the rotary base in `rope_theta` or `rope_parameters`, the
    /// dtype in `torch_dtype` or `dtype`, and whether the head is tied in the decoder's settings or in those of the whole. Both
    /// places are written.
    pub fn config(&self, encoder: &Gemma2Config, decoder: &Gemma2Config) -> Value {
        let mut of_decoder = self.stack(decoder, true);
        of_decoder.insert("cross_attention_hidden_size".into(), encoder.sizes.hidden_size.into());
        let mut config = json!({
            "architectures": ["T5GemmaForConditionalGeneration"],
            "model_type": "t5gemma",
            "is_encoder_decoder": true,
            "encoder": self.stack(encoder, false),
            "decoder": of_decoder,
            "vocab_size": decoder.sizes.vocab_size,
            "initializer_range": decoder.field("initializer_range"),
            "torch_dtype": self.dtype(),
        });
        self.put(config.as_object_mut().expect("an object"));
        config.sort_all_objects();
        config
    }

    fn stack(&self, source: &Gemma2Config, is_decoder: bool) -> Map<String, Value> {
        let mut stack = source.stack.clone();
        stack.insert("model_type".into(), "t5_gemma_module".into());
        stack.insert("is_decoder".into(), is_decoder.into());
        stack.insert("rope_theta".into(), source.rope_theta.into());
        let rope = json!({"rope_type": "default", "rope_theta": source.rope_theta});
        stack.insert("rope_parameters".into(), rope);
        self.put(&mut stack);
        stack
    }

    /// The fields that both stacks and the whole have.
    pub fn put(&self, fields: &mut Map<String, Value>) {
        for dropout in ["attention_dropout", "classifier_dropout_rate", "dropout_rate"] {
            fields.insert(dropout.into(), json!(0.0));
        }
        fields.insert("use_cache".into(), true.into());
        fields.insert("dtype".into(), self.dtype().into());
        fields.insert("tie_word_embeddings".into(), self.tied.into());
        self.tokens.put(fields);
    }

    /// The generation settings: a target starts with the token that begins a text.
    pub fn generation_config(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("_from_model_config".into(), true.into());
        fields.insert("decoder_start_token_id".into(), self.tokens.bos.clone());
        self.tokens.put(&mut fields);
        let mut config = Value::Object(fields);
        config.sort_all_objects();
        config
    }
}
