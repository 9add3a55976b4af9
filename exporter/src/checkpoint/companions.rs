//! The files of a checkpoint besides its weights: tokenizer, chat template, generation options, and how it takes images.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde::de::IgnoredAny;
use t5gemma_graphs::json;

use crate::error::{Error, Result};
use crate::files;
use crate::images::{PREPROCESSOR, PROCESSOR};

/// Files that are copied into the model folder if they exist, besides `config.json`.
pub const COMPANIONS: &[&str] = &[
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    SENTENCEPIECE_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    PREPROCESSOR,
    PROCESSOR,
];

/// The chat template.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The chat template that transformers uses if [`CHAT_TEMPLATE`] does not exist.
pub const DEFAULT_CHAT_TEMPLATE: &str = "additional_chat_templates/default.jinja";
/// The model's default generation options.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// The file of a SentencePiece model.
pub const SENTENCEPIECE_FILE: &str = "tokenizer.model";
/// The tensor in which repackaged checkpoints keep the bytes of a SentencePiece model.
pub const SENTENCEPIECE_TENSOR: &str = "spiece_model";

/// Reads one of [`COMPANIONS`], without a byte-order mark.
///
/// # Errors
/// A file that the programs which read it could not use.
pub fn companion(folder: &Path, name: &str) -> Result<Vec<u8>> {
    let path = folder.join(name);
    if name == "tokenizer.json" {
        let text = files::read_text(&path)?;
        let text = json::without_mark(&text);
        // A whole vocabulary as JSON values would take ten times its size in memory.
        serde_json::from_str::<BTreeMap<String, IgnoredAny>>(text).map_err(|error| {
            Error::invalid(path.display(), "a JSON object", json::malformed(text, &error).to_string())
        })?;
        return Ok(text.as_bytes().to_vec());
    }
    if name.ends_with(".json") {
        return Ok(files::read_json_object(&path)?.0.into_bytes());
    }
    let mut bytes = Vec::new();
    files::open(&path)?.read_to_end(&mut bytes).map_err(Error::io(&path, "cannot be read"))?;
    let is_empty_template = bytes.is_empty() && name.ends_with(".jinja");
    match files::identify(&bytes).filter(|_| !is_empty_template) {
        Some(found) => Err(Error::invalid(path.display(), "a file of the tokenizer", found)),
        None => Ok(bytes),
    }
}
