//! The index of a sharded checkpoint, and what a folder without weights has instead.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use t5gemma_graphs::adapter::CONFIG_FILE;
use t5gemma_graphs::json::{cut, shown};

use super::mapping::SAFETENSORS;
use crate::error::{Error, Result};
use crate::files;

/// The weights file of a checkpoint that is not sharded.
pub const SINGLE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub const INDEX: &str = "model.safetensors.index.json";
/// More weights files than any checkpoint has.
const MAX_SHARDS: usize = 10_000;

/// Reads the index of a sharded checkpoint, the file of each tensor. `None` if the checkpoint is a single file.
pub fn weight_map(folder: &Path) -> Result<Option<BTreeMap<String, String>>> {
    let path = folder.join(INDEX);
    if folder.join(SINGLE).exists() {
        return Ok(None);
    }
    if !path.exists() {
        return Err(no_weights(folder));
    }
    let (_, index) = files::read_json_object(&path)?;
    let invalid = |expected: &str, found: String| Error::invalid(path.display(), expected, found);
    let expected = "an object of file names by tensor";
    let Some(map) = index.get("weight_map") else { return Err(invalid(expected, "none".into()).of("weight_map")) };
    let map: BTreeMap<String, String> =
        serde_json::from_value(map.clone()).map_err(|_| invalid(expected, shown(map)).of("weight_map"))?;
    if map.is_empty() {
        return Err(invalid("tensors", "none".into()).of("weight_map"));
    }
    let mut seen = BTreeSet::new();
    for (tensor, shard) in &map {
        if !seen.insert(shard) {
            continue;
        }
        if Path::new(shard).file_name().is_none_or(|name| name != shard.as_str()) {
            let found = shown(&shard.as_str().into());
            return Err(invalid("a file name without a folder", found).of(cut(tensor)));
        }
        if seen.len() > MAX_SHARDS {
            return Err(invalid(&format!("at most {MAX_SHARDS} files"), "more".into()));
        }
    }
    Ok(Some(map))
}

/// The error for a folder with neither a weights file nor an index.
fn no_weights(folder: &Path) -> Error {
    // A broken link or an unfinished download explains more than what else is there.
    let broken = [SINGLE, INDEX].map(|name| folder.join(name)).into_iter();
    let mut broken = broken.filter(|path| files::entry_exists(path) || files::partial_download(path).is_some());
    if let Some(path) = broken.next() {
        return Error::invalid(path.display(), SAFETENSORS, files::describe_missing(&path));
    }
    let exists = |name: &str| folder.join(name).exists();
    let first_file = |start: &str, end: &str| {
        let names = folder.read_dir().ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with(start) && name.ends_with(end)).min()
    };
    let hint = if exists("manifest.json") {
        " (this is an exported model, not a checkpoint)".to_string()
    } else if exists(CONFIG_FILE) {
        " (this is a LoRA adapter: merge it into its base model and save the result)".to_string()
    } else if exists("pytorch_model.bin") || exists("pytorch_model.bin.index.json") {
        let name = first_file("pytorch_model.bin", "").unwrap_or_default();
        format!(" (there is {name}: load the model and save it with safe_serialization=True)")
    } else if let Some(shard) = first_file("model-", ".safetensors") {
        format!(" (there is {shard}, a shard without its index)")
    } else if let Some(other) = first_file("", ".safetensors") {
        format!(" (there is {other}: rename it)")
    } else {
        super::hint(folder)
    };
    Error::invalid(folder.display(), format!("{SINGLE} or {INDEX}"), format!("neither{hint}"))
}
