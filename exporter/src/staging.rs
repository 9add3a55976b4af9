//! [`StagingDir`]: the output folder while it is being written, under another name until it is complete.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FORMAT, FileRecord, MANIFEST};

use crate::error::{Error, Result};

/// What to do when the output folder exists and is not empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Stop with an error.
    #[default]
    Refuse,
    /// Replace it if it holds an exported model and nothing else; any other folder is an error.
    Overwrite,
}

/// A folder beside the output folder, removed on drop unless it was published.
pub struct StagingDir {
    path: PathBuf,
    out: PathBuf,
    existing: Existing,
    published: bool,
    /// Dropped after the folder itself was removed.
    _parents: CreatedParents,
}

impl StagingDir {
    /// Creates the folder, after checking that `out` may be written.
    pub fn create(out: &Path, existing: Existing) -> Result<StagingDir> {
        // A folder named `.` or by a link is replaced where it is.
        let out = if out.exists() {
            fs::canonicalize(out).map_err(Error::io(out, "cannot be resolved"))?
        } else {
            out.into()
        };
        let Some(name) = out.file_name() else {
            return Err(Error::invalid(out.display(), "the name of a folder to create", "none"));
        };
        check(&out, existing)?;
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parents = CreatedParents::create(parent)?;
        let path = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            return Err(if path.exists() {
                Error::invalid(path.display(), "nothing", "the remains of an export that was killed (remove them)")
            } else {
                Error::io(&path, "cannot be created")(error)
            });
        }
        Ok(StagingDir { path, out, existing, published: false, _parents: parents })
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a whole file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<FileRecord> {
        let path = self.path(name);
        fs::write(&path, bytes).map_err(Error::io(&path, "cannot be written"))?;
        Ok(FileRecord { bytes: bytes.len() as u64, sha256: hex::encode(Sha256::digest(bytes)) })
    }

    /// Renames the folder to the output folder.
    pub fn publish(mut self) -> Result<()> {
        let failed = |error| Error::io(&self.path, format!("cannot be renamed to {}", self.out.display()))(error);
        // Another export may have created it in the meantime.
        check(&self.out, self.existing)?;
        if self.out.exists() {
            let mut old = self.path.clone().into_os_string();
            old.push("-replaced");
            let old = PathBuf::from(old);
            fs::rename(&self.out, &old).map_err(failed)?;
            if let Err(error) = fs::rename(&self.path, &self.out) {
                fs::rename(&old, &self.out).map_err(failed)?;
                return Err(failed(error));
            }
            fs::remove_dir_all(&old).map_err(Error::io(&old, "cannot be removed"))?;
        } else {
            fs::rename(&self.path, &self.out).map_err(failed)?;
        }
        self.published = true;
        Ok(())
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        if !self.published {
            // If this fails, the folder's name still says that it is partial.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The parent folders that had to be created. Those that are empty are removed on drop.
struct CreatedParents(Vec<PathBuf>);

impl CreatedParents {
    fn create(folder: &Path) -> Result<CreatedParents> {
        let missing = folder.ancestors().take_while(|parent| !parent.as_os_str().is_empty() && !parent.exists());
        let parents = CreatedParents(missing.map(Path::to_path_buf).collect());
        fs::create_dir_all(folder).map_err(Error::io(folder, "cannot be created"))?;
        Ok(parents)
    }
}

impl Drop for CreatedParents {
    fn drop(&mut self) {
        for folder in &self.0 {
            // Fails if the folder is not empty, as after a successful export.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Checks that `out` may become the model folder: nothing is there, or an empty folder, or what `existing` allows.
fn check(out: &Path, existing: Existing) -> Result<()> {
    let invalid = |expected: &str, found: &str| Err(Error::invalid(out.display(), expected, found));
    if !out.exists() {
        return if out.is_symlink() { invalid("a folder or nothing", "a broken link") } else { Ok(()) };
    }
    if !out.is_dir() {
        return invalid("a folder or nothing", "a file");
    }
    if is_mount_point(out) {
        return invalid("a folder that can be replaced", "a mount point (name a folder in it)");
    }
    let entries = fs::read_dir(out).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(Error::io(out, "cannot be listed"))?;
    if entries.is_empty() {
        return Ok(());
    }
    if existing == Existing::Refuse {
        return Err(Error::OutputExists { path: out.to_path_buf() });
    }
    // Other programs write files named manifest.json too. The version of the format does not matter here.
    let text = fs::read_to_string(out.join(MANIFEST)).unwrap_or_default();
    let manifest: Value = serde_json::from_str(&text).unwrap_or_default();
    if manifest["format"] != FORMAT {
        let reason = format!("it has no {MANIFEST} of an exported model");
        return Err(Error::NotReplaced { path: out.to_path_buf(), reason });
    }
    let is_listed = |name: &str| {
        name == MANIFEST
            || manifest["weights"]["file"] == name
            || manifest["files"].get(name).is_some()
            || manifest["graphs"].as_object().is_some_and(|graphs| graphs.values().any(|graph| graph["file"] == name))
    };
    let is_foreign = |name: Option<&str>| !name.is_some_and(is_listed);
    if let Some(foreign) = entries.iter().find(|entry| is_foreign(entry.file_name().to_str())) {
        let reason = "the exported model beside it does not own it".to_string();
        return Err(Error::NotReplaced { path: foreign.path(), reason });
    }
    Ok(())
}

/// Whether a folder is a mount point, which can be neither renamed nor removed.
fn is_mount_point(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        folder.parent().is_some_and(|parent| device(parent) != device(folder))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_created_in_the_meantime_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a temporary folder can be created");
        let out = folder.path().join("parent/out");
        for existing in [Existing::Refuse, Existing::Overwrite] {
            let staging = StagingDir::create(&out, existing).expect("nothing is there");
            staging.write("manifest.json", b"{}").expect("writable");
            fs::create_dir(&out).expect("nothing is there");
            fs::write(out.join("thesis.txt"), "years of work").expect("writable");
            staging.publish().expect_err("something is there");
            assert_eq!(fs::read_to_string(out.join("thesis.txt")).expect("left alone"), "years of work");
            let entries = fs::read_dir(folder.path().join("parent")).expect("listed").count();
            assert_eq!(entries, 1, "the staging folder is removed");
            fs::remove_dir_all(&out).expect("ours");
        }
    }
}
