//! The output folder while it is being written: aside under another name, renamed when complete, removed when not.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FileRecord, MANIFEST};

/// What to do when the output folder exists and is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Stop with an error.
    Refuse,
    /// Replace it if it is an exported model; any other folder is refused still.
    Overwrite,
}

/// A folder beside the output folder, removed on drop unless published.
pub struct Aside {
    temporary: PathBuf,
    out: PathBuf,
    published: bool,
}

impl Aside {
    /// Makes the folder, after checking that `out` may be written.
    pub fn create(out: &Path, existing: Existing) -> Result<Aside> {
        let Some(name) = out.file_name() else { bail!("{}: expected the name of a folder to make", out.display()) };
        if out.exists() {
            ensure!(out.is_dir(), "{}: expected a folder or nothing, found a file", out.display());
            let mut entries = fs::read_dir(out).with_context(|| format!("{}: cannot be listed", out.display()))?;
            let empty = entries.next().is_none();
            let ours = out.join(MANIFEST).exists();
            match existing {
                _ if empty => {}
                Existing::Refuse => {
                    bail!("{}: exists and is not empty; name another folder or pass --overwrite", out.display())
                }
                Existing::Overwrite => ensure!(
                    ours,
                    "{}: has no {MANIFEST}, so it is not an exported model and is not overwritten",
                    out.display()
                ),
            }
        }
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).with_context(|| format!("{}: cannot be made", parent.display()))?;
        let temporary = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&temporary).with_context(|| format!("{}: cannot be made", temporary.display()))?;
        Ok(Aside { temporary, out: out.to_path_buf(), published: false })
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

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a folder that cannot be removed; its name says that it is partial.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}
