//! Checkpoints and adapters from the Hugging Face hub: which files of a repository an export needs, and where they lie in
//! the cache. The cache is huggingface_hub's, so that both find what the other has downloaded. Only `hub/http.rs` talks
//! to a server.
//!
//! The crate has this module with the feature `hub`, which is on by default.

mod cache;
mod error;
mod fetch;
mod http;
mod needed;
mod settings;

use std::path::PathBuf;

use t5gemma_graphs::task::Task;

use crate::progress::Progress;
use crate::repository::Repository;
use cache::Cache;

pub use error::HubError;
pub use settings::HubSettings;

/// What to [`download`] of a repository.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Wanted<'t> {
    /// A checkpoint, without the weights files that an export for this task does not read. `None` for the task that the
    /// checkpoint was saved for.
    Checkpoint(Option<&'t Task>),
    /// A PEFT adapter.
    Adapter,
}

/// Files in the cache.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Downloaded {
    /// The folder with the files, as a checkpoint or adapter.
    pub folder: PathBuf,
    /// The commit that they are of.
    pub commit: String,
    /// The number of files that were not in the cache.
    pub files: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// Why the files of the cache were used without asking the server, if that was not wanted.
    pub warning: Option<String>,
}

/// Downloads the files of a repository that the cache does not have.
///
/// If the server cannot be reached, or [`HubSettings::offline`] is set, the cache must have the revision. A download
/// that was interrupted continues where it stopped. [`Progress::started`] is called again when more is known of the
/// size.
///
/// # Errors
/// A repository, revision or file that does not exist or may not be read, a server that cannot be reached, or a cache
/// that cannot be written.
pub fn download(
    repository: &Repository,
    wanted: Wanted<'_>,
    settings: &HubSettings,
    progress: &dyn Progress,
) -> Result<Downloaded, HubError> {
    let cache = Cache::new(repository, &settings.cache);
    if settings.offline {
        let offline = || HubError::Offline { repository: repository.clone(), cache: settings.cache.clone() };
        return cache.find().ok_or_else(offline);
    }
    match fetch::fetch(repository, wanted, settings, &cache, progress) {
        Err(error @ HubError::Unreachable { .. }) => {
            let Some(found) = cache.find() else { return Err(error) };
            Ok(Downloaded { warning: Some(format!("{error}; using the files in the cache")), ..found })
        }
        fetched => fetched,
    }
}
