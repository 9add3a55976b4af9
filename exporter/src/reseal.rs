//! Updates `manifest.json` after deliberate changes to text files of a model folder. Graphs, weights and the files that
//! determine what the graphs compute must be unchanged since the export.

use std::fs;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{DOCUMENTS, FileRecord, KEPT_TOKENS, MANIFEST, Manifest};

use crate::checkpoint::{COMPANIONS, companion};
use crate::error::{Error, Result};
use crate::files;
use crate::model_folder::{path_of, read_manifest};

/// Updates the manifest of a model folder with the current sizes and hashes of its text files. Returns the changes.
///
/// # Errors
/// A folder that is not a model folder, graphs or weights that differ from the export, or an unusable file.
pub fn reseal(folder: &Path) -> Result<Vec<String>> {
    let mut manifest = read_manifest(folder)?;
    let graphs = manifest.graphs.values().map(|graph| (graph.file.as_str(), &graph.record));
    let weights = (manifest.weights.file.as_str(), &manifest.weights.record);
    let sealed =
        manifest.files.iter().filter(|(name, _)| is_sealed(name)).map(|(name, record)| (name.as_str(), record));
    for (name, record) in graphs.chain([weights]).chain(sealed) {
        let path = path_of(folder, name)?;
        if record_of(&path)? != *record {
            let found = "a different one (export the checkpoint again)";
            return Err(Error::invalid(path.display(), "the exported file", found));
        }
    }
    let mut changes = Vec::new();
    let names: Vec<String> = manifest.files.keys().filter(|name| !is_sealed(name)).cloned().collect();
    for name in names {
        let path = path_of(folder, &name)?;
        if !files::entry_exists(&path) {
            if !COMPANIONS.contains(&name.as_str()) && !DOCUMENTS.contains(&name.as_str()) {
                return Err(Error::invalid(path.display(), "a file", files::describe_missing(&path)));
            }
            manifest.files.remove(&name);
            changes.push(format!("{name} removed"));
            continue;
        }
        let record = record_of(&path)?;
        if manifest.files[&name] != record {
            manifest.files.insert(name.clone(), record);
            changes.push(format!("{name} changed"));
        }
    }
    for name in COMPANIONS.iter().filter(|name| files::entry_exists(&folder.join(name))) {
        // Only for the check whether the file is usable.
        companion(folder, name)?;
        if !manifest.files.contains_key(*name) {
            manifest.files.insert(name.to_string(), record_of(&folder.join(name))?);
            changes.push(format!("{name} added"));
        }
    }
    if !changes.is_empty() {
        write(folder, &manifest)?;
    }
    Ok(changes)
}

/// Whether a file is a graph or determines what the graphs compute.
fn is_sealed(name: &str) -> bool {
    name == "config.json" || name == KEPT_TOKENS || name.ends_with(".onnx")
}

fn record_of(path: &Path) -> Result<FileRecord> {
    let mut file = files::open(path)?;
    let (mut hash, mut bytes, mut block) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut block).map_err(Error::io(path, "cannot be read"))? {
            0 => return Ok(FileRecord { bytes, sha256: hex::encode(hash.finalize()) }),
            read => {
                hash.update(&block[..read]);
                bytes += read as u64;
            }
        }
    }
}

/// Replaces the manifest atomically.
fn write(folder: &Path, manifest: &Manifest) -> Result<()> {
    let (path, partial) = (folder.join(MANIFEST), folder.join(format!(".{MANIFEST}.partial-{}", std::process::id())));
    let text =
        serde_json::to_string_pretty(manifest).expect("a manifest has no maps with other keys than strings") + "\n";
    let written = fs::write(&partial, text).and_then(|()| fs::rename(&partial, &path));
    written.map_err(|error| {
        // The first error is the one to report.
        let _ = fs::remove_file(&partial);
        Error::io(&path, "cannot be written")(error)
    })
}
