//! Which files of a repository an export reads.

use std::collections::BTreeSet;
use std::path::Path;

use t5gemma_graphs::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use t5gemma_graphs::config::Config;
use t5gemma_graphs::task::Task;

use super::{HubError, Wanted};
use crate::checkpoint::{COMPANIONS, DEFAULT_CHAT_TEMPLATE, INDEX, SINGLE, weight_map};
use crate::error::Error;
use crate::files;
use crate::names;
use crate::repository::Repository;
use crate::weights::is_for;

/// The names of the files that a kind of repository has.
struct Needed {
    required: &'static str,
    /// One of these is required.
    weights: &'static [&'static str],
    others: Vec<&'static str>,
}

/// The files to download first, of those that the repository has: all but shards.
///
/// # Errors
/// The repository holds something else.
pub fn first(repository: &Repository, wanted: Wanted<'_>, present: &[&str]) -> Result<Vec<String>, HubError> {
    let has = |name: &str| present.contains(&name);
    let Needed { required, weights, others } = match wanted {
        Wanted::Adapter => Needed { required: CONFIG_FILE, weights: &[WEIGHTS_FILE], others: Vec::new() },
        Wanted::Checkpoint(_) => Needed {
            required: "config.json",
            weights: &[SINGLE, INDEX],
            others: COMPANIONS.iter().copied().chain([DEFAULT_CHAT_TEMPLATE]).collect(),
        },
    };
    let weights_file = weights.iter().find(|name| has(name));
    let Some(weights_file) = weights_file.filter(|_| has(required)) else {
        let expected = format!("{required} and {}", weights.join(" or "));
        return Err(HubError::Files { repository: repository.clone(), expected, found: describe(wanted, present) });
    };
    let files = [required].into_iter().chain(others).filter(|name| has(name)).chain([*weights_file]);
    Ok(files.map(str::to_string).collect())
}

/// Describes a repository that is not what is wanted.
fn describe(wanted: Wanted<'_>, present: &[&str]) -> String {
    let has = |name: &str| present.contains(&name);
    let is_adapter = has(CONFIG_FILE);
    if has("manifest.json") && has("model.onnx_data") {
        return "an exported model".to_string();
    }
    if matches!(wanted, Wanted::Checkpoint(_)) && is_adapter {
        return "a LoRA adapter (merge it into its base model with --adapter)".to_string();
    }
    let pickle = present.iter().find(|name| name.starts_with("pytorch_model") || name.starts_with("adapter_model.bin"));
    if let Some(pickle) = pickle {
        return format!("{pickle} (a pickle: load the model and save it with safe_serialization=True)");
    }
    let (count, shown) = (present.len(), &present[..present.len().min(8)]);
    match count {
        0 => "no files".to_string(),
        _ => format!("{count} files: {}{}", shown.join(", "), if count > shown.len() { ", …" } else { "" }),
    }
}

/// The shards of a checkpoint whose configuration and index are in `folder`. For feature extraction they are those with
/// a tensor of the encoder.
///
/// # Errors
/// An unusable index or configuration.
pub fn shards(folder: &Path, task: Option<&Task>) -> Result<BTreeSet<String>, Error> {
    let Some(map) = weight_map(folder)? else { return Ok(BTreeSet::new()) };
    let stored: Vec<&str> = map.keys().map(String::as_str).collect();
    if let Some(task @ Task::FeatureExtraction(_)) = task
        // Names that fit more than one model are an error when the checkpoint is opened.
        && let Ok(names) = names::of_model(&stored)
    {
        let path = folder.join("config.json");
        let config = Config::parse(&files::read_text(&path)?).map_err(|error| Error::config(path.display(), error))?;
        let needed = names.into_iter().filter(|(name, _)| is_for(name, &config, task));
        return Ok(needed.filter_map(|(_, stored)| map.get(stored).cloned()).collect());
    }
    Ok(map.into_values().collect())
}
