//! Reads the manifest of a model folder.

use std::path::{Path, PathBuf};

use serde_json::Value;
use t5gemma_graphs::manifest::{FORMAT, FORMAT_VERSION, MANIFEST, Manifest};

use crate::error::{Error, Result};
use crate::files;

/// Reads the manifest of a model folder.
pub fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let (_, value) = files::read_json_object(&path)?;
    for (field, expected) in [("format", Value::from(FORMAT)), ("format_version", FORMAT_VERSION.into())] {
        let found = value.get(field).unwrap_or(&Value::Null);
        if *found != expected {
            return Err(Error::invalid(path.display(), expected.to_string(), found.to_string()).of(field));
        }
    }
    serde_json::from_value(value).map_err(|error| Error::Parse { path, expected: "a manifest", source: error.into() })
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
