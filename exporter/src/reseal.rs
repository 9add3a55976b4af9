//! The seal of a model folder, `manifest.json`, made anew for files that were changed on purpose: text files that only say how
//! the model is used. What the graphs are made of, and the graphs, have to be those of the export.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FORMAT, FORMAT_VERSION, FileRecord, KEPT_TOKENS, MANIFEST, Manifest};

use crate::checkpoint::{COMPANIONS, companion};
use crate::found;

/// Writes the manifest of a model folder anew, with the sizes and hashes that its text files have now. Returns what has changed.
///
/// # Errors
/// A folder that is no model, a graph or weights that are not those of the export, or a file that could not be used.
pub fn reseal(folder: &Path) -> Result<Vec<String>> {
    let mut manifest = manifest(folder)?;
    let graphs = manifest.graphs.values().map(|graph| (graph.file.as_str(), &graph.record));
    let weights = (manifest.weights.file.as_str(), &manifest.weights.record);
    let sealed =
        manifest.files.iter().filter(|(name, _)| is_sealed(name)).map(|(name, record)| (name.as_str(), record));
    for (name, record) in graphs.chain([weights]).chain(sealed) {
        let path = folder.join(plain(folder, name)?);
        ensure!(
            recorded(&path)? == *record,
            "{}: is not that of the export, which is not resealed: export the checkpoint again",
            path.display()
        );
    }
    let mut changes = Vec::new();
    let names: Vec<String> = manifest.files.keys().filter(|name| !is_sealed(name)).cloned().collect();
    for name in names {
        let path = folder.join(plain(folder, &name)?);
        if !found::is_there(&path) {
            ensure!(
                COMPANIONS.contains(&name.as_str()),
                "{}: expected a file, found {}",
                path.display(),
                found::absent(&path)
            );
            manifest.files.remove(&name);
            changes.push(format!("{name} is gone"));
            continue;
        }
        let record = recorded(&path)?;
        if manifest.files[&name] != record {
            manifest.files.insert(name.clone(), record);
            changes.push(format!("{name} has changed"));
        }
    }
    for name in COMPANIONS.iter().filter(|name| found::is_there(&folder.join(name))) {
        // Whatever reads it must be able to.
        companion(folder, name)?;
        if !manifest.files.contains_key(*name) {
            manifest.files.insert(name.to_string(), recorded(&folder.join(name))?);
            changes.push(format!("{name} is new"));
        }
    }
    if !changes.is_empty() {
        write(folder, &manifest)?;
    }
    Ok(changes)
}

/// Whether a file beside the graphs decides what they compute, or is one.
fn is_sealed(name: &str) -> bool {
    name == "config.json" || name == KEPT_TOKENS || name.ends_with(".onnx")
}

/// The manifest of a folder.
pub fn manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let place = path.display();
    let (_, value) = found::read_object(&path)?;
    for (field, expected) in [("format", Value::from(FORMAT)), ("format_version", FORMAT_VERSION.into())] {
        let found = value.get(field).unwrap_or(&Value::Null);
        ensure!(*found == expected, "{place}: {field}: expected {expected}, found {found}");
    }
    serde_json::from_value(value).map_err(|error| anyhow!("{place}: not a manifest: {error}"))
}

/// A name that a manifest has for a file of its own folder.
fn plain<'n>(folder: &Path, name: &'n str) -> Result<&'n str> {
    let is_plain = Path::new(name).file_name().is_some_and(|file| file == name);
    if !is_plain {
        bail!("{}: expected the name of a file in the folder, found {name:?}", folder.join(MANIFEST).display());
    }
    Ok(name)
}

fn recorded(path: &Path) -> Result<FileRecord> {
    let mut file: File = found::open(path)?;
    let (mut hash, mut bytes, mut block) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut block).with_context(|| format!("{}: cannot be read", path.display()))? {
            0 => return Ok(FileRecord { bytes, sha256: hex::encode(hash.finalize()) }),
            read => {
                hash.update(&block[..read]);
                bytes += read as u64;
            }
        }
    }
}

/// Puts a manifest in the place of the old one, whole or not at all.
fn write(folder: &Path, manifest: &Manifest) -> Result<()> {
    let (path, aside) = (folder.join(MANIFEST), folder.join(format!(".{MANIFEST}.partial-{}", std::process::id())));
    let text = serde_json::to_string_pretty(manifest).context("the manifest cannot be written as JSON")? + "\n";
    let written = fs::write(&aside, text).and_then(|()| fs::rename(&aside, &path));
    written.with_context(|| {
        // What is left of it is of no use; that it cannot be removed is not worth another error.
        let _ = fs::remove_file(&aside);
        format!("{}: cannot be written", path.display())
    })
}
