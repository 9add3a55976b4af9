//! Gemma 3 as the encoder or decoder of T5Gemma 2: its configuration, and its tensors under their new names.
//!
//! Attention of the decoder to the source is merged with its self-attention, so that both stacks are those of a Gemma 3. New is
//! only the vector of the token behind an image, which replaces its row of the table, times √hidden_size as the table is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::json::{cut, shown};

use super::config::{
    self, Common, FULL, FieldError, Kind, Result as FieldResult, SLIDING, Sizes, TokenIds, check_is_not_quantized,
    check_window, error, is_on, layer_types, stack,
};
use super::source::{self, Configs, field_error, is_ignored, same_bytes};
use super::tensors::{Origin, Planned, renamed};
use super::{Side, gemma3_vision as vision};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::error::{Error, Result};

/// What stands before the name of a text tensor: in files of text-only models, and in those of models with images, new and old.
const TEXT_PREFIXES: [&str; 4] = ["model.language_model.", "language_model.model.", "model.", ""];
const HEADS: [&str; 2] = ["lm_head.weight", "language_model.lm_head.weight"];
const EMBEDDING: &str = "embed_tokens.weight";
/// The norms of queries and keys of a layer. Shape `[head_dim]`.
const HEAD_NORMS: [&str; 2] = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"];

/// The token ids of T5Gemma 2's published models, for sources without images: of an image's tokens, before and behind an image.
const IMAGE_TOKENS: [(&str, u64); 3] =
    [("image_token_index", 256_001), ("boi_token_index", 255_999), ("eoi_token_index", 256_000)];

/// The defaults that are not Gemma 2's.
fn defaults() -> [(&'static str, Value); 4] {
    [
        ("vocab_size", json!(262_208)),
        ("max_position_embeddings", json!(131_072)),
        ("final_logit_softcapping", Value::Null),
        ("attn_logit_softcapping", Value::Null),
    ]
}

/// The fields that each stack takes from its Gemma 3 as they are, with Gemma 3's default.
fn copied() -> [(&'static str, Kind, Value); 16] {
    config::copied().map(|(field, kind, default)| {
        let other = defaults().into_iter().find(|(name, _)| *name == field);
        (field, kind, other.map_or(default, |(_, default)| default))
    })
}

/// A Gemma 3 checkpoint, opened and checked, so that a plan of its tensors cannot fail.
pub struct Gemma3 {
    checkpoint: Checkpoint,
    pub sizes: Sizes,
    pub tokens: TokenIds,
    /// The fields of [`copied`] with `layer_types` and `rope_parameters`.
    stack: Map<String, Value>,
    /// The fields of the configuration around that of the text, of a model with images.
    images: Option<Map<String, Value>>,
    bidirectional: Option<Value>,
}

/// Whether a `config.json` is of a Gemma 3.
pub fn is_gemma3(config: &Value) -> bool {
    config["model_type"].as_str().is_some_and(|kind| kind.starts_with("gemma3"))
}

impl Gemma3 {
    /// Opens a folder.
    ///
    /// # Errors
    /// Not a Gemma 3 checkpoint, or one that T5Gemma 2 cannot be made of; with the side.
    pub fn open(folder: &Path, side: Side) -> Result<Gemma3> {
        let (checkpoint, Configs { path, config, generation }) = source::open(folder, side)?;
        let source =
            Gemma3::read(checkpoint, &config, generation.as_ref()).map_err(|error| field_error(&path, side, error))?;
        source.check_tensors(side)?;
        Ok(source)
    }

    fn read(
        checkpoint: Checkpoint,
        config: &Map<String, Value>,
        generation: Option<&Map<String, Value>>,
    ) -> FieldResult<Gemma3> {
        check_is_not_quantized(config)?;
        let kind = config.get("model_type").unwrap_or(&Value::Null);
        let empty = Map::new();
        let (text, has_images) = match (kind.as_str(), config.get("text_config")) {
            (Some("gemma3_text"), _) => (config, false),
            (Some("gemma3"), Some(Value::Object(text))) => (text, true),
            (Some("gemma3"), None | Some(Value::Null)) => (&empty, true),
            (Some("gemma3"), Some(other)) => return Err(error("text_config", "an object", shown(other))),
            _ => return Err(error("model_type", "\"gemma3_text\" or \"gemma3\", as on the other side", shown(kind))),
        };
        let mut stack = stack(text, &copied())?;
        let sizes = Sizes::of(&stack)?;
        let pattern = ["sliding_window_pattern", "_sliding_window_pattern"].into_iter().find_map(|name| text.get(name));
        let pattern = match pattern.filter(|pattern| !pattern.is_null()) {
            None => 6,
            Some(pattern) => {
                Kind::Size.check("sliding_window_pattern", pattern)?.as_u64().expect("a size was checked") as usize
            }
        };
        let layer_types = layer_types(text, sizes.num_hidden_layers, pattern)?;
        check_window(&stack, &layer_types)?;
        stack.insert("layer_types".into(), layer_types.into());
        stack.insert("rope_parameters".into(), rope_parameters(text)?);
        // The special tokens of a model with images are in either place.
        let of_tokens: Map<String, Value> = text.clone().into_iter().chain(config.clone()).collect();
        Ok(Gemma3 {
            checkpoint,
            sizes,
            tokens: TokenIds::read(&of_tokens, generation)?,
            stack,
            images: has_images.then(|| config.clone()),
            bidirectional: text.get("use_bidirectional_attention").filter(|value| is_on(value)).cloned(),
        })
    }

    pub fn folder(&self) -> &Path {
        self.checkpoint.folder()
    }

    pub fn reads_images(&self) -> bool {
        self.images.is_some()
    }

    /// An error in the configuration.
    pub fn error(&self, side: Side, error: FieldError) -> Error {
        field_error(&self.checkpoint.config_path(), side, error)
    }

    /// What the decoder must be besides.
    pub fn check_decoder(&self) -> Result<()> {
        match &self.bidirectional {
            None => Ok(()),
            Some(value) => {
                let expected = "false or null (a decoder predicts the next token)";
                Err(self.error(Side::Decoder, error("use_bidirectional_attention", expected, value.to_string())))
            }
        }
    }

    /// The stored name of a text tensor.
    fn text_name(&self, name: &str) -> String {
        let has_table = |prefix: &&&str| self.checkpoint.stored_tensor(&format!("{prefix}{EMBEDDING}")).is_some();
        let prefix = TEXT_PREFIXES.iter().find(has_table).copied().unwrap_or("model.");
        format!("{prefix}{name}")
    }

    fn text(&self, name: &str) -> Tensor<'_> {
        self.checkpoint.stored_tensor(&self.text_name(name)).expect("all tensors of a source were checked")
    }

    /// The text tensors: the name in Gemma 3 and in a stack of T5Gemma 2, and the shape.
    fn text_tensors(&self) -> Vec<(String, String, Vec<usize>)> {
        let norms = (0..self.sizes.num_hidden_layers).flat_map(|i| {
            HEAD_NORMS.map(|norm| {
                let name = format!("layers.{i}.{norm}");
                (name.clone(), name, vec![self.sizes.head_dim])
            })
        });
        renamed(&self.sizes).into_iter().map(|tensor| (tensor.from, tensor.to, tensor.shape)).chain(norms).collect()
    }

    /// The head, if it is not the table.
    fn head(&self) -> Option<Tensor<'_>> {
        let head = HEADS.iter().find_map(|name| self.checkpoint.stored_tensor(name))?;
        (!is_same((self, head), (self, self.text(EMBEDDING)))).then_some(head)
    }

    fn check_tensors(&self, side: Side) -> Result<()> {
        let mut expected: BTreeMap<String, Vec<usize>> =
            self.text_tensors().into_iter().map(|(name, _, shape)| (self.text_name(&name), shape)).collect();
        if let Some(config) = &self.images {
            let tower = vision::tensors(config, self.sizes.hidden_size).map_err(|error| self.error(side, error))?;
            expected
                .extend(tower.into_iter().map(|(name, shape)| (vision::stored_name(&self.checkpoint, &name), shape)));
        }
        let mut mismatches = Vec::new();
        for (name, shape) in &expected {
            match self.checkpoint.stored_tensor(name) {
                Some(tensor) if tensor.shape == *shape && tensor.float().is_none() => {
                    let found = format!("{:?}", tensor.dtype);
                    let path = self.checkpoint.path().display();
                    return Err(Error::invalid(path, "F32, BF16 or F16", found).of(name).on(side));
                }
                tensor => mismatches.extend(source::mismatch(name, shape, tensor)),
            }
        }
        let heads: BTreeSet<&str> = HEADS.into();
        for (name, tensor) in self.checkpoint.stored_tensors() {
            match heads.contains(name) {
                true if tensor.shape != self.table_shape() => {
                    let (expected, found) = (self.table_shape(), tensor.shape);
                    mismatches.push(format!("{name}: expected shape {expected:?}, found {found:?}"));
                }
                false if !(expected.contains_key(name) || is_ignored(name) || vision::is_ignored(name)) => {
                    let (name, shape) = (cut(name), tensor.shape);
                    mismatches.push(format!("{name}: expected no tensor of this name, found one of shape {shape:?}"));
                }
                _ => {}
            }
        }
        if mismatches.is_empty() {
            return Ok(());
        }
        let checkpoint = self.checkpoint.path().to_path_buf();
        Err(Error::Tensors { checkpoint, mismatches, hint: String::new() }.on(side))
    }

    fn table_shape(&self) -> [usize; 2] {
        [self.sizes.vocab_size, self.sizes.hidden_size]
    }

    /// The configuration of a stack of T5Gemma 2.
    fn stack_config(&self, common: &Common, kind: &str) -> Map<String, Value> {
        let mut stack = self.stack.clone();
        stack.insert("model_type".into(), kind.into());
        common.put(&mut stack);
        // It would win over the dtype that transformers is asked for; that of the whole is enough.
        stack.remove("dtype");
        stack
    }

    /// The id of a token that has to do with images.
    fn image_token(&self, name: &str) -> Value {
        let (_, default) = IMAGE_TOKENS.into_iter().find(|(known, _)| *known == name).expect("it is one of them");
        match (&self.images, name) {
            (Some(config), _) if config.contains_key(name) => config[name].clone(),
            (Some(_), "image_token_index") => json!(262_144),
            _ => json!(default),
        }
    }

    /// The dtypes of all tensors that are read.
    fn dtypes(&self) -> impl Iterator<Item = DType> {
        self.checkpoint.stored_tensors().filter_map(|(_, tensor)| tensor.float())
    }
}

/// Whether two tensors are the same.
fn is_same((of_a, a): (&Gemma3, Tensor), (of_b, b): (&Gemma3, Tensor)) -> bool {
    a.dtype == b.dtype && same_bytes((&of_a.checkpoint, a.bytes), (&of_b.checkpoint, b.bytes))
}

/// `rope_parameters` by layer type, from this field or from the older flat ones.
fn rope_parameters(config: &Map<String, Value>) -> FieldResult<Value> {
    let object = |name: &str, value: Option<&Value>| match value {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(rope)) => Ok(rope.clone()),
        Some(value) => Err(error(name, "an object or null", shown(value))),
    };
    let mut by_type = object("rope_parameters", config.get("rope_parameters"))?;
    if let Some(other) = by_type.keys().find(|key| ![FULL, SLIDING].contains(&key.as_str())) {
        let expected = format!("an object of {FULL:?} and {SLIDING:?}");
        return Err(error("rope_parameters", expected, format!("{:?}", cut(other))));
    }
    let mut found = Map::new();
    for (kind, theta, default) in [(FULL, "rope_theta", 1_000_000.0), (SLIDING, "rope_local_base_freq", 10_000.0)] {
        let mut rope = object(&format!("rope_parameters.{kind}"), by_type.remove(kind).as_ref())?;
        if kind == FULL {
            rope.extend(object("rope_scaling", config.get("rope_scaling"))?);
        }
        let old_name = rope.remove("type");
        rope.entry("rope_type").or_insert(old_name.unwrap_or_else(|| json!("default")));
        let base = config.get(theta).filter(|value| !value.is_null()).cloned().unwrap_or(json!(default));
        rope.entry("rope_theta").or_insert(Kind::Positive.check(theta, &base)?);
        found.insert(kind.into(), rope.into());
    }
    Ok(found.into())
}

/// The T5Gemma 2 configuration.
pub fn config(common: &Common, encoder: &Gemma3, decoder: &Gemma3) -> Value {
    let mut of_encoder = Map::new();
    of_encoder.insert("text_config".into(), encoder.stack_config(common, "t5gemma2_text").into());
    let nothing = Map::new();
    let images = encoder.images.as_ref().unwrap_or(&nothing);
    for field in ["vision_config", "mm_tokens_per_image"] {
        if let Some(value) = images.get(field) {
            of_encoder.insert(field.into(), value.clone());
        }
    }
    for (name, _) in IMAGE_TOKENS {
        of_encoder.insert(name.into(), encoder.image_token(name));
    }
    of_encoder.insert("model_type".into(), "t5gemma2_encoder".into());
    of_encoder.insert("initializer_range".into(), encoder.stack["initializer_range"].clone());
    of_encoder.insert("tie_word_embeddings".into(), true.into());
    let mut config = json!({
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "model_type": "t5gemma2",
        "is_encoder_decoder": true,
        "encoder": of_encoder,
        "decoder": decoder.stack_config(common, "t5gemma2_decoder"),
        "vocab_size": decoder.sizes.vocab_size,
        "initializer_range": decoder.stack["initializer_range"],
        "image_token_index": encoder.image_token("image_token_index"),
        "eoi_token_index": encoder.image_token("eoi_token_index"),
    });
    common.put(config.as_object_mut().expect("an object"));
    config.sort_all_objects();
    config
}

/// The dtype that holds every number of the sources.
pub fn common_dtype(encoder: &Gemma3, decoder: &Gemma3) -> DType {
    let mut dtypes = encoder.dtypes().chain(decoder.dtypes());
    let first = dtypes.next().unwrap_or(DType::Float32);
    if dtypes.all(|dtype| dtype == first) { first } else { DType::Float32 }
}

/// All tensors of the new checkpoint, by name, and whether table and head are one for both stacks. Where they are not, each
/// has its own: the decoder's would be taken from the encoder.
pub fn plan<'s>(encoder: &'s Gemma3, decoder: &'s Gemma3) -> (Vec<Planned<'s>>, bool) {
    let (table, other) = (encoder.text(EMBEDDING), decoder.text(EMBEDDING));
    let head = decoder.head();
    let is_shared = head.is_none() && is_same((encoder, table), (decoder, other));
    let mut planned = Vec::new();
    for (source, stack, has_table) in [(encoder, "model.encoder", true), (decoder, "model.decoder", !is_shared)] {
        for (from, to, _) in source.text_tensors() {
            if from != EMBEDDING || has_table {
                planned.push(Planned::copy(&source.checkpoint, source.text(&from), format!("{stack}.{to}")));
            }
        }
        if has_table {
            let name = format!("{stack}.embed_tokens.eoi_embedding");
            planned.push(end_of_image(source, &encoder.image_token("eoi_token_index"), name));
        }
    }
    if !is_shared {
        let head = head.unwrap_or(other);
        planned.push(Planned::copy(&decoder.checkpoint, head, "lm_head.out_proj.weight".into()));
    }
    if let Some(config) = &encoder.images {
        for (name, _) in vision::tensors(config, encoder.sizes.hidden_size).expect("it was checked") {
            let stored = vision::stored_name(&encoder.checkpoint, &name);
            let tensor = encoder.checkpoint.stored_tensor(&stored).expect("it was checked");
            planned.push(Planned::copy(&encoder.checkpoint, tensor, format!("model.encoder.{name}")));
        }
    }
    planned.sort_by(|a, b| a.name.cmp(&b.name));
    (planned, is_shared)
}

/// The vector of the token behind an image: its row of the table as the stack reads it, or zeros where there is none.
fn end_of_image<'s>(source: &'s Gemma3, token: &Value, name: String) -> Planned<'s> {
    let Sizes { vocab_size, hidden_size, .. } = source.sizes;
    let table = source.text(EMBEDDING);
    let dtype = table.float().expect("the dtypes of a source were checked");
    let row = token.as_u64().and_then(|row| usize::try_from(row).ok()).filter(|&row| row < vocab_size);
    let origin = match row {
        None => Origin::Constant(0.0),
        Some(row) => {
            let width = hidden_size * dtype.size();
            let tensor = Tensor { bytes: &table.bytes[row * width..(row + 1) * width], ..table };
            Origin::Scaled { dtype, tensor, factor: (hidden_size as f32).sqrt() }
        }
    };
    Planned { name, shape: vec![hidden_size], origin }
}
