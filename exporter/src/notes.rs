//! What is to be known of an export that succeeds: what of the checkpoint has no effect, what the model will lack, and numbers
//! that are not as they should be. Sentences for people; nothing is decided here.

use std::path::Path;

use serde_json::Value;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::json::cut;
use t5gemma_graphs::onnx::{Adjust, Blocks, Part};

use crate::checkpoint::GENERATION_CONFIG;
use crate::found;
use crate::weights::Weight;

/// Names that are shown of many.
const SHOWN: usize = 10;

/// Some names, and how many more there are.
pub fn listed(names: &[String]) -> String {
    let mut shown: Vec<String> = names.iter().take(SHOWN).map(|name| cut(name)).collect();
    if names.len() > SHOWN {
        shown.push(format!("… and {} more", names.len() - SHOWN));
    }
    shown.join(", ")
}

/// What of the settings has no effect, and what of them stands where it is not looked for.
pub fn of_settings(config: &Config, defaults: Option<&Value>) -> Vec<String> {
    let mut notes = Vec::new();
    let is_taken = |path: &String| {
        let name = path.strip_prefix("decoder.").unwrap_or(path);
        defaults.is_none() && config.generation.contains_key(name)
    };
    let (taken, ignored): (Vec<String>, Vec<String>) = config.ignored.iter().cloned().partition(is_taken);
    if !ignored.is_empty() {
        notes.push(format!("config.json: fields without effect: {}", listed(&ignored)));
    }
    if !taken.is_empty() {
        notes
            .push(format!("config.json: taken for generation, as there is no {GENERATION_CONFIG}: {}", listed(&taken)));
    }
    notes
}

/// What lengths of [`GENERATION_CONFIG`] do not fit a cache for so many target tokens.
pub fn of_capacity(capacity: Option<usize>, defaults: Option<&Value>) -> Option<String> {
    let (capacity, defaults) = (capacity? as u64, defaults?);
    // The start token takes a place too.
    let longest = [("max_new_tokens", 1), ("max_length", 0)].into_iter().find_map(|(name, prompt)| {
        let tokens = defaults.get(name)?.as_u64()?;
        Some((name, tokens, tokens.saturating_add(prompt)))
    });
    let (name, tokens, _) = longest.filter(|(.., length)| *length > capacity)?;
    Some(format!(
        "{GENERATION_CONFIG}: {name} {tokens} is more than the cache has room for: where a request says nothing of lengths, targets end at {capacity} tokens"
    ))
}

/// What a model without a tokenizer cannot do.
pub fn of_tokenizer(folder: &Path) -> Option<String> {
    let path = folder.join("tokenizer.json");
    if path.exists() {
        return None;
    }
    let instead = match (found::part(&path), folder.join("tokenizer.model").exists()) {
        (Some(part), _) => format!("only {part}, a download that is not finished"),
        (None, true) => "only tokenizer.model, which is not read".to_string(),
        (None, false) => "none".to_string(),
    };
    Some(format!(
        "no tokenizer.json ({instead}): the model will take and give token ids, but no text; transformers writes one by AutoTokenizer.from_pretrained({0:?}).save_pretrained({0:?})",
        folder.display().to_string()
    ))
}

/// What numbers of the weights are none.
pub fn of_numbers(not_finite: &[(String, u64)]) -> Option<String> {
    let named: Vec<String> = not_finite.iter().map(|(tensor, count)| format!("{tensor} ({count})")).collect();
    (!named.is_empty()).then(|| format!("weights that are NaN or infinite, by tensor: {}", listed(&named)))
}

/// What blocks make larger than they need be, as the last of each row is filled up.
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
    let remedy = fits.map_or_else(String::new, |size| format!("; a block size of {size} fits all"));
    Some(format!(
        "{count} of {} matrices in {} have rows, such as those of {width} numbers, that are no multiple of the block size {} and are filled up to one{remedy}",
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
    fn lengths_are_held_to_the_cache() {
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

    #[test]
    fn many_names_are_listed_in_part() {
        let names: Vec<String> = (0..12).map(|number| format!("n{number}")).collect();
        assert_eq!(listed(&names), "n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, … and 2 more");
    }
}
