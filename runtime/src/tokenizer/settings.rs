//! `Settings`: the special and added tokens that the files beside a `tokenizer.json` name, read as transformers'
//! `AutoTokenizer` reads them: `tokenizer_config.json`, and the older `special_tokens_map.json` and
//! `added_tokens.json`.
//!
//! # Design
//! Follows transformers 5.24: `_from_pretrained` and `__init__` of `tokenization_utils_base.py`, and `__init__` of
//! `tokenization_utils_tokenizers.py`. With a `tokenizer.json` these ignore `add_bos_token`, `add_eos_token`,
//! `add_prefix_space`, lengths and sides.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};
use t5gemma_graphs::json;
use tokenizers::AddedToken;

/// The contents of the files.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Settings {
    /// The named special tokens, such as `bos_token`, as chat templates see them.
    pub named: Vec<(String, AddedToken)>,
    /// The texts of those in `named` that the tokenizer's class names, and no file.
    pub of_class: Vec<String>,
    /// Further special tokens.
    pub extra: Vec<AddedToken>,
    /// The tokens of `added_tokens_decoder` or `added_tokens.json`, in the order of their ids.
    pub listed: Vec<AddedToken>,
    /// Whether the names of special tokens in a text are plain text.
    pub splits_special_tokens: bool,
    /// Whether spaces before punctuation are removed from decoded text.
    pub cleans_up: bool,
    /// Whether that applies to BPE tokenizers too.
    pub cleans_up_bpe: bool,
}

/// The names of special tokens that every tokenizer may have.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The special tokens of `GemmaTokenizer`, where no file names others.
const OF_GEMMA: [(&str, &str); 5] = [
    ("unk_token", "<unk>"),
    ("bos_token", "<bos>"),
    ("eos_token", "<eos>"),
    ("pad_token", "<pad>"),
    ("mask_token", "<mask>"),
];

impl Settings {
    pub const FILE: &str = "tokenizer_config.json";

    /// Reads the files of a folder that exist.
    ///
    /// # Errors
    /// The name of a file of the wrong form, and the problem.
    pub fn read(folder: &Path) -> Result<Settings, (String, String)> {
        let read = |name: &str| object(folder, name).map_err(|problem| (name.to_string(), problem));
        let config = read(Settings::FILE)?;
        let is_gemma = match config.as_ref().and_then(|config| config.get("tokenizer_class")).and_then(Value::as_str) {
            Some(class) => class.trim_end_matches("Fast") == "GemmaTokenizer",
            // The class that AutoTokenizer chooses for the model.
            None => read("config.json").ok().flatten().is_some_and(|config| config["model_type"] == "t5gemma"),
        };
        let mut fields = config.unwrap_or_default();
        let in_config = |problem: String| (Settings::FILE.to_string(), problem);

        if !is_given(&fields, "extra_special_tokens")
            && let Some(tokens) = fields.remove("additional_special_tokens")
        {
            fields.insert("extra_special_tokens".into(), tokens);
        }
        let mut own = Vec::new();
        name_all(&mut own, &mut fields, "extra_special_tokens").map_err(in_config)?;

        let mut listed: BTreeMap<i64, AddedToken> = BTreeMap::new();
        if let Some(tokens) = fields.remove("added_tokens_decoder") {
            const FIELD: &str = "added_tokens_decoder";
            let tokens =
                tokens.as_object().ok_or_else(|| in_config(wrong(FIELD, "an object of tokens by id", &tokens)))?;
            for (id, token) in tokens {
                let field = format!("{FIELD}[{id:?}]");
                let place =
                    id.parse().map_err(|_| in_config(format!("{FIELD}: expected ids as names, found {id:?}")))?;
                let token = added(token, false).filter(|_| token.is_object());
                let token = token.ok_or_else(|| in_config(format!("{field}: expected a token as an object")))?;
                listed.insert(place, token);
            }
        } else {
            let of_map = read("special_tokens_map.json")?.unwrap_or_default();
            for (name, mut value) in of_map {
                if name == "extra_special_tokens"
                    && let (Some(more), Some(tokens)) = (value.as_array(), fields.get(&name).and_then(Value::as_array))
                {
                    let more = more.iter().filter(|token| !tokens.contains(token));
                    value = tokens.iter().chain(more).cloned().collect();
                } else if value.is_object() && name != "extra_special_tokens" {
                    value["special"] = true.into();
                }
                fields.insert(name, value);
            }
            let in_map = |problem: String| ("special_tokens_map.json".to_string(), problem);
            name_all(&mut own, &mut fields, "extra_special_tokens").map_err(in_map)?;
            let special = special_texts(&fields);
            for (token, id) in read("added_tokens.json")?.unwrap_or_default() {
                let Some(id) = id.as_i64() else {
                    return Err(("added_tokens.json".into(), wrong(&format!("{token:?}"), "an id", &id)));
                };
                let is_special = special.contains(&token);
                listed.insert(id, AddedToken::from(token, is_special));
            }
        }
        if !is_given(&fields, "extra_special_tokens")
            && let Some(tokens) = fields.remove("additional_special_tokens")
        {
            fields.insert("extra_special_tokens".into(), tokens);
        }

        name_all(&mut own, &mut fields, "model_specific_special_tokens").map_err(in_config)?;
        let extra = match fields.remove("extra_special_tokens") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(tokens)) => tokens
                .iter()
                .map(|token| {
                    added(token, true).ok_or_else(|| in_config(wrong("extra_special_tokens", "tokens", token)))
                })
                .collect::<Result<_, _>>()?,
            Some(other) => {
                return Err(in_config(wrong("extra_special_tokens", "a list or an object of tokens", &other)));
            }
        };
        let mut named = Vec::new();
        for (name, value) in &fields {
            if !NAMES.contains(&name.as_str()) && !name.ends_with("_token") {
                continue;
            }
            match added(value, true) {
                Some(token) => put(&mut named, name.clone(), token),
                None if value.is_null() || !NAMES.contains(&name.as_str()) => {}
                None => return Err(in_config(wrong(name, "a token", value))),
            }
        }
        own.into_iter().for_each(|(name, token)| put(&mut named, name, token));
        let mut of_class = Vec::new();
        if is_gemma {
            for (name, text) in OF_GEMMA.iter().filter(|(name, _)| !fields.contains_key(*name)) {
                put(&mut named, name.to_string(), AddedToken::from(*text, true));
                of_class.push(text.to_string());
            }
        }
        // New tokens get their ids in this order, the common names first.
        named.sort_by_key(|(name, _)| NAMES.iter().position(|known| known == name).unwrap_or(NAMES.len()));
        // The flags of a listed token take precedence.
        for (_, token) in &mut named {
            if let Some(listed) = listed.values().find(|listed| listed.content == token.content) {
                *token = listed.clone();
            }
        }
        let is_set = |name: &str| fields.get(name).is_some_and(|value| *value == true);
        Ok(Settings {
            splits_special_tokens: is_set("split_special_tokens"),
            cleans_up: is_set("clean_up_tokenization_spaces"),
            cleans_up_bpe: is_set("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
            named,
            of_class,
            extra,
            listed: listed.into_values().collect(),
        })
    }

    /// The tokens to add, in this order, to a tokenizer that has the tokens in `present`.
    pub fn missing(&self, present: &[AddedToken]) -> Vec<AddedToken> {
        let mut missing: Vec<AddedToken> =
            self.listed.iter().filter(|token| !present.contains(token)).cloned().collect();
        for token in self.named.iter().map(|(_, token)| token).chain(&self.extra) {
            if !present.iter().chain(&missing).any(|known| known.content == token.content) {
                missing.push(token.clone());
            }
        }
        for token in &mut missing {
            token.special |= self.named.iter().any(|(_, named)| named.content == token.content);
        }
        missing
    }
}

/// Whether a field is truthy in Python.
fn is_given(fields: &Map<String, Value>, name: &str) -> bool {
    match fields.get(name) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(object)) => !object.is_empty(),
        Some(_) => true,
    }
}

/// Moves the tokens of a field that is an object of tokens by name into `named`.
fn name_all(named: &mut Vec<(String, AddedToken)>, fields: &mut Map<String, Value>, field: &str) -> Result<(), String> {
    if !fields.get(field).is_some_and(Value::is_object) {
        return Ok(());
    }
    let Some(Value::Object(tokens)) = fields.remove(field) else { unreachable!("checked above") };
    for (name, token) in tokens {
        let token = added(&token, true).ok_or_else(|| wrong(&format!("{field}.{name}"), "a token", &token))?;
        put(named, name, token);
    }
    Ok(())
}

/// Names a token; it replaces another of the same name.
fn put(named: &mut Vec<(String, AddedToken)>, name: String, token: AddedToken) {
    match named.iter_mut().find(|(known, _)| *known == name) {
        Some((_, place)) => *place = token,
        None => named.push((name, token)),
    }
}

/// The texts of the special tokens in the fields, named or listed.
fn special_texts(fields: &Map<String, Value>) -> Vec<String> {
    let named = NAMES.iter().filter_map(|name| fields.get(*name));
    let extra = fields.get("extra_special_tokens").and_then(Value::as_array).into_iter().flatten();
    named.chain(extra).filter_map(|token| added(token, true)).map(|token| token.content).collect()
}

/// A token, given as text or as an object.
fn added(value: &Value, is_special: bool) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, true));
    }
    let flag = |name: &str, neutral: bool| value.get(name).map_or(Some(neutral), Value::as_bool);
    let special = flag("special", is_special)?;
    Some(AddedToken {
        content: value.get("content")?.as_str()?.to_string(),
        single_word: flag("single_word", false)?,
        lstrip: flag("lstrip", false)?,
        rstrip: flag("rstrip", false)?,
        normalized: flag("normalized", !special)?,
        special,
    })
}

fn wrong(field: &str, expected: &str, found: &Value) -> String {
    format!("{field}: expected {expected}, found {}", t5gemma_graphs::json::shown(found))
}

/// The JSON object of a file, if it exists.
fn object(folder: &Path, name: &str) -> Result<Option<Map<String, Value>>, String> {
    let path = folder.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let text = read_text(&path)?;
    serde_json::from_str(&text).map(Some).map_err(|error| format!("expected a JSON object: {error}"))
}

/// The text of a file, without the byte-order mark that some editors put first.
pub(crate) fn read_text(path: &Path) -> Result<String, String> {
    let mut text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    text.drain(..text.len() - json::without_mark(&text).len());
    Ok(text)
}
