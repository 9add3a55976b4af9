//! The JSON requests: lines of `t5gemma generate --jsonl`, `score`, `encode` and `classify`. Parsing checks the form of
//! every field; checks that need a model happen when the request is tokenized.

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use crate::error::RequestError;
use crate::id::Id;
use crate::images::{ImageFields, Images, TensorFile};
use crate::json::abbreviated;

/// A request to generate targets. Exactly one of `text`, `messages` and `input_ids` is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = one_of_text_messages_input_ids, transform = not_both_prompts)]
pub struct GenerateRequest {
    /// Returned with the result. Default: the line's number, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// The source, or several sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<Texts>,
    /// A conversation for an instruction-tuned model: objects with `role` and `content`, formatted by the checkpoint's chat
    /// template. Other fields are passed to the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Map<String, Value>>>")]
    pub messages: Option<Vec<Value>>,
    /// The source as token ids, or several sources of equal length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_ids: Option<TokenRows>,
    /// Same shape as `input_ids`: 0 where a token is padding, anywhere in the row. Default: no padding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_mask: Option<TokenRows>,
    /// The beginning of each target, without special tokens; not part of the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder_text: Option<Texts>,
    /// The beginning of each target as token ids; not part of the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder_input_ids: Option<TokenRows>,
    /// The images of the sources.
    #[serde(flatten)]
    pub images: ImageFields,
    /// The expected length of each target in tokens, the start token included, for models whose positions depend on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_total: Option<Integers>,
    /// Generation options under their Hugging Face names; they override those of the command line and the model.
    #[serde(skip_serializing_if = "Map::is_empty")]
    #[schemars(default, schema_with = "crate::options::schema")]
    pub options: Map<String, Value>,
}

/// A request to score given targets. Exactly one of `text` and `input_ids`, and of `target` and `target_ids`, is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = one_of_text_input_ids, transform = one_of_targets, transform = not_both_prompts)]
pub struct ScoreRequest {
    /// Returned with the result. Default: the line's number, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// The source, or several sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<Texts>,
    /// The source as token ids, or several sources of equal length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_ids: Option<TokenRows>,
    /// Same shape as `input_ids`: 0 where a token is padding, anywhere in the row. Default: no padding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_mask: Option<TokenRows>,
    /// The target of each source; the end token is appended and scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Texts>,
    /// The target of each source as token ids, scored as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_ids: Option<TokenRows>,
    /// The beginning of each target, without special tokens; not scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder_text: Option<Texts>,
    /// The beginning of each target as token ids; not scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder_input_ids: Option<TokenRows>,
    /// The expected length of each target in tokens, the start token included, for models whose positions depend on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_total: Option<Integers>,
    /// The images of the sources.
    #[serde(flatten)]
    pub images: ImageFields,
    /// Name of the loaded LoRA adapter to score with. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
}

/// A request to encode or classify sources. Exactly one of `text` and `input_ids` is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = one_of_text_input_ids)]
pub struct EncodeRequest {
    /// Returned with the result. Default: the line's number, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// The source, or several sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<Texts>,
    /// The source as token ids, or several sources of equal length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_ids: Option<TokenRows>,
    /// Same shape as `input_ids`: 0 where a token is padding, anywhere in the row. Default: no padding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_mask: Option<TokenRows>,
    /// The images of the sources.
    #[serde(flatten)]
    pub images: ImageFields,
}

/// One text, or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Texts {
    /// One text.
    One(String),
    /// One text for each row.
    Several(Vec<String>),
}

impl Texts {
    /// The texts, one for each row.
    pub fn rows(&self) -> &[String] {
        match self {
            Texts::One(text) => std::slice::from_ref(text),
            Texts::Several(texts) => texts,
        }
    }
}

/// One row of integers, or several of equal length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TokenRows {
    /// One row.
    One(Vec<i64>),
    /// Several rows.
    Several(Vec<Vec<i64>>),
}

impl TokenRows {
    /// The rows.
    pub fn rows(&self) -> &[Vec<i64>] {
        match self {
            TokenRows::One(row) => std::slice::from_ref(row),
            TokenRows::Several(rows) => rows,
        }
    }
}

/// One integer for all rows, or one for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Integers {
    /// One for all rows.
    One(i64),
    /// One for each row.
    Several(Vec<i64>),
}

impl Integers {
    /// One integer for each of `rows` rows, if one was given for all.
    pub fn of_rows(&self, rows: usize) -> Vec<i64> {
        match self {
            Integers::One(integer) => vec![*integer; rows],
            Integers::Several(integers) => integers.clone(),
        }
    }
}

/// The kind of sources in a request.
pub(crate) struct SourcesGiven {
    pub text: bool,
    pub input_ids: bool,
    /// `None` if the request cannot be a conversation.
    pub messages: Option<bool>,
}

impl SourcesGiven {
    /// Requires exactly one.
    pub fn check(self) -> Result<(), RequestError> {
        let refused = |expected, found| Err(RequestError::form("", expected, found));
        match (self.text, self.input_ids, self.messages) {
            (false, false, Some(false)) => refused("text, messages or input_ids", "none of them"),
            (false, false, None) => refused("text or input_ids", "neither"),
            (true, true, None | Some(false)) => refused("text or input_ids", "both"),
            (true, _, Some(true)) | (_, true, Some(true)) => refused("messages alone", "text or input_ids beside them"),
            _ => Ok(()),
        }
    }
}

impl TryFrom<Map<String, Value>> for GenerateRequest {
    type Error = RequestError;

    fn try_from(fields: Map<String, Value>) -> Result<GenerateRequest, RequestError> {
        let known = "id, text, messages, input_ids, attention_mask, images, pixel_values, pan_and_scan, decoder_text, \
                     decoder_input_ids, progress_total and options";
        let mut fields = Fields::new(fields, known)?;
        let messages = Some(fields.has("messages"));
        SourcesGiven { text: fields.has("text"), input_ids: fields.has("input_ids"), messages }.check()?;
        let request = GenerateRequest {
            id: Id::take(&mut fields.0)?,
            text: fields.texts("text")?,
            messages: fields.messages()?,
            input_ids: fields.rows("input_ids")?,
            attention_mask: fields.rows("attention_mask")?,
            images: fields.images()?,
            decoder_text: fields.texts("decoder_text")?,
            decoder_input_ids: fields.rows("decoder_input_ids")?,
            progress_total: fields.integers("progress_total")?,
            options: fields.options()?,
        };
        check_prompts(&request.decoder_text, &request.decoder_input_ids)?;
        Ok(request)
    }
}

impl TryFrom<Map<String, Value>> for ScoreRequest {
    type Error = RequestError;

    fn try_from(fields: Map<String, Value>) -> Result<ScoreRequest, RequestError> {
        let known = "id, text, input_ids, attention_mask, images, pixel_values, pan_and_scan, target, target_ids, \
                     decoder_text, decoder_input_ids, progress_total and adapter";
        let mut fields = Fields::new(fields, known)?;
        SourcesGiven { text: fields.has("text"), input_ids: fields.has("input_ids"), messages: None }.check()?;
        let request = ScoreRequest {
            id: Id::take(&mut fields.0)?,
            text: fields.texts("text")?,
            input_ids: fields.rows("input_ids")?,
            attention_mask: fields.rows("attention_mask")?,
            images: fields.images()?,
            target: fields.texts("target")?,
            target_ids: fields.rows("target_ids")?,
            decoder_text: fields.texts("decoder_text")?,
            decoder_input_ids: fields.rows("decoder_input_ids")?,
            progress_total: fields.integers("progress_total")?,
            adapter: fields.text("adapter")?,
        };
        check_prompts(&request.decoder_text, &request.decoder_input_ids)?;
        check_targets(&request.target, &request.target_ids)?;
        Ok(request)
    }
}

impl TryFrom<Map<String, Value>> for EncodeRequest {
    type Error = RequestError;

    fn try_from(fields: Map<String, Value>) -> Result<EncodeRequest, RequestError> {
        let known = "id, text, input_ids, attention_mask, images, pixel_values and pan_and_scan";
        let mut fields = Fields::new(fields, known)?;
        SourcesGiven { text: fields.has("text"), input_ids: fields.has("input_ids"), messages: None }.check()?;
        Ok(EncodeRequest {
            id: Id::take(&mut fields.0)?,
            text: fields.texts("text")?,
            input_ids: fields.rows("input_ids")?,
            attention_mask: fields.rows("attention_mask")?,
            images: fields.images()?,
        })
    }
}

/// Rejects two decoder prompts.
pub(crate) fn check_prompts(text: &Option<Texts>, ids: &Option<TokenRows>) -> Result<(), RequestError> {
    match (text, ids) {
        (Some(_), Some(_)) => Err(RequestError::form("", "decoder_text or decoder_input_ids", "both")),
        _ => Ok(()),
    }
}

/// Requires exactly one kind of targets.
pub(crate) fn check_targets(text: &Option<Texts>, ids: &Option<TokenRows>) -> Result<(), RequestError> {
    match (text, ids) {
        (Some(_), Some(_)) => Err(RequestError::form("", "target or target_ids", "both")),
        (None, None) => Err(RequestError::form("", "target or target_ids", "neither")),
        _ => Ok(()),
    }
}

/// Fields that have not been read yet. A null field counts as absent.
struct Fields(Map<String, Value>);

impl Fields {
    /// Rejects a field that is not among `known`, a list for messages.
    fn new(fields: Map<String, Value>, known: &str) -> Result<Fields, RequestError> {
        let is_known = |name: &str| known.split([' ', ',']).any(|known| known == name && known != "and");
        match fields.keys().find(|name| !is_known(name)) {
            Some(name) => {
                let found = abbreviated(&name.as_str().into());
                Err(RequestError::form("", format!("only the fields {known}"), found))
            }
            None => Ok(Fields(fields)),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// `"…"` or `["…", "…"]`.
    fn texts(&mut self, field: &str) -> Result<Option<Texts>, RequestError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let texts = match &value {
            Value::String(text) => Some(Texts::One(text.clone())),
            Value::Array(texts) => {
                let texts = texts.iter().map(|text| text.as_str().map(str::to_string));
                texts.collect::<Option<_>>().map(Texts::Several)
            }
            _ => None,
        };
        let refused = || RequestError::form(field, "a string or a list of strings", abbreviated(&value));
        texts.ok_or_else(refused).map(Some)
    }

    fn text(&mut self, field: &str) -> Result<Option<String>, RequestError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(RequestError::form(field, "a string", abbreviated(&other))),
        }
    }

    /// `[1, 2]` or `[[1, 2], [3, 4]]`.
    fn rows(&mut self, field: &str) -> Result<Option<TokenRows>, RequestError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let row = |value: &Value| value.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>();
        let rows = match value.as_array() {
            Some(list) if list.first().is_some_and(Value::is_array) => {
                list.iter().map(row).collect::<Option<_>>().map(TokenRows::Several)
            }
            Some(_) => row(&value).map(TokenRows::One),
            None => None,
        };
        let refused = || RequestError::form(field, "integers in a list or a list of lists", abbreviated(&value));
        rows.ok_or_else(refused).map(Some)
    }

    /// `1` or `[1, 2]`.
    fn integers(&mut self, field: &str) -> Result<Option<Integers>, RequestError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let integers = match &value {
            Value::Array(list) => list.iter().map(Value::as_i64).collect::<Option<_>>().map(Integers::Several),
            one => one.as_i64().map(Integers::One),
        };
        let refused = || RequestError::form(field, "an integer or a list of integers", abbreviated(&value));
        integers.ok_or_else(refused).map(Some)
    }

    fn images(&mut self) -> Result<ImageFields, RequestError> {
        let pan_and_scan = match self.take("pan_and_scan") {
            None => None,
            Some(Value::Bool(pan_and_scan)) => Some(pan_and_scan),
            Some(other) => return Err(RequestError::form("pan_and_scan", "true or false", abbreviated(&other))),
        };
        let images = self.take("images").map(|value| Images::parse(&value)).transpose()?;
        let pixel_values = self.take("pixel_values").map(TensorFile::parse).transpose()?;
        let fields = ImageFields { images, pixel_values, pan_and_scan };
        fields.check()?;
        Ok(fields)
    }

    fn messages(&mut self) -> Result<Option<Vec<Value>>, RequestError> {
        match self.take("messages") {
            None => Ok(None),
            Some(Value::Array(messages)) => Ok(Some(messages)),
            Some(other) => Err(RequestError::form("messages", "a list of messages", abbreviated(&other))),
        }
    }

    fn options(&mut self) -> Result<Map<String, Value>, RequestError> {
        match self.take("options") {
            None => Ok(Map::new()),
            Some(Value::Object(options)) => Ok(options),
            Some(other) => Err(RequestError::form("options", "an object of generation options", abbreviated(&other))),
        }
    }
}

macro_rules! deserialize_as_object {
    ($($request:ident)*) => {
        $(impl<'de> Deserialize<'de> for $request {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$request, D::Error> {
                $request::try_from(Map::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        })*
    };
}

deserialize_as_object!(GenerateRequest ScoreRequest EncodeRequest);

fn one_of_text_messages_input_ids(schema: &mut Schema) {
    one_of(schema, &["text", "messages", "input_ids"]);
}

fn one_of_text_input_ids(schema: &mut Schema) {
    one_of(schema, &["text", "input_ids"]);
}

fn one_of_targets(schema: &mut Schema) {
    one_of(schema, &["target", "target_ids"]);
}

/// Requires exactly one of the fields to be present and not null.
fn one_of(schema: &mut Schema, fields: &[&str]) {
    let given = |field: &&str| json!({"required": [field], "properties": {*field: {"not": {"type": "null"}}}});
    require(schema, json!({"oneOf": fields.iter().map(given).collect::<Vec<_>>()}));
}

/// Requires at most one of the two forms of decoder prompts.
fn not_both_prompts(schema: &mut Schema) {
    let fields = ["decoder_text", "decoder_input_ids"];
    let given = fields.map(|field| (field.to_string(), json!({"not": {"type": "null"}})));
    require(schema, json!({"not": {"required": fields, "properties": Map::from_iter(given)}}));
}

fn require(schema: &mut Schema, rule: Value) {
    let rules = schema.ensure_object().entry("allOf").or_insert_with(|| json!([]));
    rules.as_array_mut().expect("a list of schemas").push(rule);
}
