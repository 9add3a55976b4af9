//! Reads the manifest of a model folder.

use std::path::{Path, PathBuf};

use t5gemma_graphs::config::Config;
use t5gemma_graphs::manifest::{MANIFEST, Manifest, ManifestError};

use crate::error::{Error, Result};
use crate::files;

/// Reads the manifest of a model folder.
pub fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let (_, document) = files::read_json_object(&path)?;
    let config = || {
        let path = folder.join("config.json");
        Config::parse(&files::read_text(&path)?).map_err(|error| Error::config(path.display(), error))
    };
    Manifest::read(document, config).map_err(|error| match error {
        ManifestError::Field(error) => Error::config(path.display(), error),
        ManifestError::Malformed(error) => Error::Parse { path, expected: "a manifest", source: error.into() },
        ManifestError::Config(error) => error,
    })
}

/// The path of a file that the manifest names.
///
/// # Errors
/// A name that leads out of the folder.
pub fn path_of(folder: &Path, name: &str) -> Result<PathBuf> {
    if Path::new(name).file_name().is_none_or(|file| file != name) {
        let manifest = folder.join(MANIFEST);
        return Err(Error::invalid(manifest.display(), "the name of a file in the folder", format!("{name:?}")));
    }
    Ok(folder.join(name))
}
