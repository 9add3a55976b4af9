//! Notes and warnings about a successful export: checkpoint fields without effect, missing files, and NaN or infinite
//! weights. Decides nothing.

use std::path::Path;

use serde_json::Value;
use t5gemma_graphs::Vocabulary;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::onnx::{Adjust, Blocks, Part};

use crate::checkpoint::GENERATION_CONFIG;
use crate::files;
use crate::weights::Weight;
use t5gemma_graphs::json::list;

/// Fields of `config.json` that have no effect, and generation options that are read from it.
pub fn of_config(config: &Config, generation_config: Option<&Value>) -> Vec<String> {
    let mut notes = Vec::new();
    let is_read = |path: &String| {
        let name = path.strip_prefix("decoder.").unwrap_or(path);
        generation_config.is_none() && config.generation.contains_key(name)
    };
    let (read, ignored): (Vec<String>, Vec<String>) = config.ignored.iter().cloned().partition(is_read);
    if !ignored.is_empty() {
        notes.push(format!("config.json: ignored fields: {}", list(&ignored)));
    }
    if !read.is_empty() {
        let fields = list(&read);
        notes.push(format!(
            "config.json: used for generation options because there is no {GENERATION_CONFIG}: {fields}"
        ));
    }
    notes
}

/// Warns of default lengths in `generation_config.json` that exceed a fixed cache capacity.
pub fn of_capacity(capacity: Option<usize>, generation_config: Option<&Value>) -> Option<String> {
    let (capacity, fields) = (capacity? as u64, generation_config?);
    // The start token takes a place of the cache too.
    let longest = [("max_new_tokens", 1), ("max_length", 0)].into_iter().find_map(|(name, prompt)| {
        let tokens = fields.get(name)?.as_u64()?;
        Some((name, tokens, tokens.saturating_add(prompt)))
    });
    let (name, tokens, _) = longest.filter(|(.., length)| *length > capacity)?;
    Some(format!(
        "{GENERATION_CONFIG}: {name} {tokens} exceeds the cache: targets of requests without a length end at \
         {capacity} tokens"
    ))
}

/// Warns of a model without a tokenizer.
pub fn of_tokenizer(folder: &Path) -> Option<String> {
    let path = folder.join("tokenizer.json");
    if path.exists() {
        return None;
    }
    let instead = match (files::partial_download(&path), folder.join("tokenizer.model").exists()) {
        (Some(partial), _) => format!(" (only {partial}, an unfinished download)"),
        (None, true) => " (tokenizer.model is not supported)".to_string(),
        (None, false) => String::new(),
    };
    let folder = folder.display().to_string();
    Some(format!(
        "no tokenizer.json{instead}: the model accepts and returns token ids, not text; to create the file with \
         transformers, call AutoTokenizer.from_pretrained({folder:?}).save_pretrained({folder:?})"
    ))
}

/// Says that the vector of the token behind an image is not stored, where a model has one.
pub fn of_end_of_image(config: &Config, vocabulary: &Vocabulary) -> Option<String> {
    let is_missing = config.end_of_image.is_some() && vocabulary.end_of_image.is_none();
    is_missing.then(|| "no eoi_embedding in the checkpoint: zeros are used, as in transformers".to_string())
}

/// Warns of tensors with NaNs or infinities.
pub fn of_numbers(not_finite: &[(String, u64)]) -> Option<String> {
    let named: Vec<String> = not_finite.iter().map(|(tensor, count)| format!("{tensor} ({count})")).collect();
    (!named.is_empty()).then(|| format!("NaN or infinite weights, by tensor: {}", list(&named)))
}

/// Warns of quantized matrices that are padded because their rows are no multiple of the block size.
pub fn of_blocks(weights: &[Weight]) -> Option<String> {
    let packed = |weight: &Weight| match (weight.adjust, weight.parts.as_slice()) {
        (Adjust::Packed(blocks), [Part { shape, .. }, ..]) => Some((*shape.last()?, blocks)),
        _ => None,
    };
    let all: Vec<(usize, Blocks)> = weights.iter().filter_map(packed).collect();
    let mut padded = all.iter().filter(|(width, blocks)| !width.is_multiple_of(blocks.size));
    let (width, blocks) = *padded.next()?;
    let count = 1 + padded.count();
    let fits = [64, 32, 16].into_iter().find(|size| all.iter().all(|(width, _)| width.is_multiple_of(*size)));
    let remedy = fits.map_or_else(String::new, |size| format!("; block size {size} needs no padding"));
    Some(format!(
        "{count} of {} {} matrices are padded: their row length, such as {width}, is no multiple of the block size \
         {}{remedy}",
        all.len(),
        blocks.name(),
        blocks.size
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn default_lengths_are_compared_with_the_capacity() {
        for (defaults, word) in [
            (json!({"max_new_tokens": 64}), Some("max_new_tokens 64")),
            (json!({"max_new_tokens": 63}), None),
            (json!({"max_length": 65}), Some("max_length 65")),
            (json!({"max_length": 64}), None),
            (json!({"max_new_tokens": 8, "max_length": 500}), None),
            (json!({}), None),
        ] {
            let note = of_capacity(Some(64), Some(&defaults));
            assert_eq!(note.is_some(), word.is_some(), "{defaults}");
            assert!(note.unwrap_or_default().contains(word.unwrap_or_default()), "{defaults}");
        }
    }
}
