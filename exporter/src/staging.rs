//! The output folder while it is being written: a hidden folder beside it, renamed when complete, removed otherwise.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FORMAT, FileRecord, MANIFEST};

/// What to do when the output folder exists and is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Stop with an error.
    Refuse,
    /// Replace it if it is an exported model and holds nothing else; any other folder is refused still.
    Overwrite,
}

/// A folder beside the output folder, removed on drop unless published.
pub struct StagingDir {
    temporary: PathBuf,
    out: PathBuf,
    existing: Existing,
    published: bool,
    /// Dropped after the folder itself is gone.
    _parents: CreatedParents,
}

impl StagingDir {
    /// Makes the folder, after checking that `out` may be written.
    pub fn create(out: &Path, existing: Existing) -> Result<StagingDir> {
        // A folder that is there is replaced where it is, however it is named: `.`, or through a link.
        let out =
            &if out.exists() { fs::canonicalize(out).with_context(|| out.display().to_string())? } else { out.into() };
        let Some(name) = out.file_name() else { bail!("{}: expected the name of a folder to make", out.display()) };
        check(out, existing)?;
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parents = CreatedParents::make(parent)?;
        let temporary = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&temporary).with_context(|| match temporary.exists() {
            true => format!("{}: left over from an export that was killed; remove it", temporary.display()),
            false => format!("{}: cannot be made", temporary.display()),
        })?;
        Ok(StagingDir { temporary, out: out.to_path_buf(), existing, published: false, _parents: parents })
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.temporary.join(name)
    }

    /// Writes a whole file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<FileRecord> {
        let path = self.path(name);
        fs::write(&path, bytes).with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(FileRecord { bytes: bytes.len() as u64, sha256: hex::encode(Sha256::digest(bytes)) })
    }

    /// Gives the folder its name.
    pub fn publish(mut self) -> Result<()> {
        let failed = || format!("{}: cannot be renamed to {}", self.temporary.display(), self.out.display());
        // Another export may have come first.
        check(&self.out, self.existing)?;
        if self.out.exists() {
            let mut old = self.temporary.clone().into_os_string();
            old.push("-replaced");
            let old = PathBuf::from(old);
            fs::rename(&self.out, &old).with_context(failed)?;
            if let Err(error) = fs::rename(&self.temporary, &self.out) {
                // The model that was there comes back before the error is told.
                fs::rename(&old, &self.out).with_context(failed)?;
                return Err(error).with_context(failed);
            }
            fs::remove_dir_all(&old).with_context(|| format!("{}: cannot be removed", old.display()))?;
        } else {
            fs::rename(&self.temporary, &self.out).with_context(failed)?;
        }
        self.published = true;
        Ok(())
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a folder that cannot be removed; its name says that it is partial.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// The folders above the output folder that were not there before. Those that stay empty are removed on drop.
struct CreatedParents(Vec<PathBuf>);

impl CreatedParents {
    fn make(folder: &Path) -> Result<CreatedParents> {
        let missing = folder.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists());
        let parents = CreatedParents(missing.map(Path::to_path_buf).collect());
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        Ok(parents)
    }
}

impl Drop for CreatedParents {
    fn drop(&mut self) {
        for folder in &self.0 {
            // Fails where something is in it, which is then the model or someone else's.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Checks that `out` may become the model folder: nothing, an empty folder, or what `existing` allows.
fn check(out: &Path, existing: Existing) -> Result<()> {
    if !out.exists() {
        ensure!(!out.is_symlink(), "{}: expected a folder or nothing, found a link to nothing", out.display());
        return Ok(());
    }
    ensure!(out.is_dir(), "{}: expected a folder or nothing, found a file", out.display());
    ensure!(!is_mount_point(out), "{}: is a mount point, which cannot be replaced; name a folder in it", out.display());
    let entries = fs::read_dir(out).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.with_context(|| format!("{}: cannot be listed", out.display()))?;
    match existing {
        _ if entries.is_empty() => return Ok(()),
        Existing::Refuse => {
            bail!("{}: exists and is not empty; name another folder or pass --overwrite", out.display())
        }
        Existing::Overwrite => {}
    }
    // Other programs have a manifest.json too, so its name alone says nothing. The format's version does not matter here.
    let text = fs::read_to_string(out.join(MANIFEST)).unwrap_or_default();
    let manifest: Value = serde_json::from_str(&text).unwrap_or_default();
    ensure!(
        manifest["format"] == FORMAT,
        "{}: has no {MANIFEST} of an exported model and is not overwritten",
        out.display()
    );
    let listed = |name: &str| {
        name == MANIFEST
            || manifest["weights"]["file"] == name
            || manifest["files"].get(name).is_some()
            || manifest["graphs"].as_object().is_some_and(|graphs| graphs.values().any(|graph| graph["file"] == name))
    };
    let foreign = entries.iter().find(|entry| !entry.file_name().to_str().is_some_and(listed));
    if let Some(foreign) = foreign {
        bail!("{}: is not of the exported model beside it, which is not overwritten", foreign.path().display());
    }
    Ok(())
}

/// Whether something is mounted on a folder, which then can be neither renamed nor removed.
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
    fn a_folder_that_came_to_be_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let out = folder.path().join("above/out");
        for existing in [Existing::Refuse, Existing::Overwrite] {
            let aside = StagingDir::create(&out, existing).expect("nothing is there");
            aside.write("manifest.json", b"{}").expect("writable");
            fs::create_dir(&out).expect("nothing is there");
            fs::write(out.join("thesis.txt"), "years of work").expect("writable");
            aside.publish().expect_err("something is there");
            assert_eq!(fs::read_to_string(out.join("thesis.txt")).expect("left alone"), "years of work");
            assert_eq!(
                fs::read_dir(folder.path().join("above")).expect("listed").count(),
                1,
                "the folder aside is gone"
            );
            fs::remove_dir_all(&out).expect("ours");
        }
    }
}
