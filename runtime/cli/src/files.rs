//! Reads text and JSON files, with errors that name the file and the line.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;
use t5gemma_protocol::{describe_error, describe_invalid_utf8, without_byte_order_mark};

/// Reads a text file, without a byte-order mark at its beginning.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let text = without_byte_order_mark(&bytes).map_err(|problem| anyhow!("{}: {problem}", path.display()))?;
    match str::from_utf8(text) {
        Ok(text) => Ok(text.to_string()),
        Err(error) => {
            let line = 1 + text[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
            Err(anyhow!("{}: line {line}: {}", path.display(), describe_invalid_utf8(text, &error)))
        }
    }
}

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse_json(path, &read_text(path)?)
}

/// Reads the text of a JSON file.
pub fn parse_json<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|error| anyhow!("{}: expected JSON: {}", path.display(), describe_error(text, &error)))
}
