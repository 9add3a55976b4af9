//! `Store`: where outputs lie, and `Source`: where inputs do.
//!
//! An output folder holds the outputs under the names of their inputs and, in its folder `_batch`, the settings, a
//! record of each shard and whatever is unfinished. Readers of data sets skip names that begin with `_`. The record is
//! written before the output, so an output is never without one.

mod aside;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::BatchError;
use aside::is_left_behind;
pub use aside::{Aside, discard_unfinished};

/// The folder of records and unfinished files.
const RECORDS: &str = "_batch";

/// The folder that outputs are written to.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
}

/// The path of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source(pub PathBuf);

impl Source {
    /// Its file name.
    pub fn name(&self) -> String {
        self.0.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Opens it.
    pub fn open(&self) -> Result<File, BatchError> {
        File::open(&self.0).map_err(|error| BatchError::file(self, error))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Store {
    /// The folder `output`, which need not exist yet.
    ///
    /// # Errors
    /// It is a file.
    pub fn open(output: &str) -> Result<Store, BatchError> {
        let path = Path::new(output);
        if path.exists() && !path.is_dir() {
            let problem = format!("--output: expected a folder, found the file {}", path.display());
            return Err(BatchError::Arguments(problem));
        }
        Ok(Store { path: path.to_path_buf() })
    }

    /// The path of a record.
    pub(crate) fn record(&self, name: &str) -> PathBuf {
        self.records().join(name)
    }

    fn records(&self) -> PathBuf {
        self.path.join(RECORDS)
    }

    /// The names of the outputs that exist, and of other files.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn names(&self) -> Result<BTreeSet<String>, BatchError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries.map_err(|error| BatchError::file(self.path.display(), error))?,
        };
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        entries.map(name).collect::<io::Result<_>>().map_err(|error| BatchError::file(self.path.display(), error))
    }

    /// Whether an input lies where outputs would.
    pub(crate) fn holds(&self, Source(path): &Source) -> bool {
        let folder = path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
        let folder = folder.and_then(|folder| folder.canonicalize().ok());
        match (folder, self.path.canonicalize()) {
            (Some(folder), Ok(own)) => folder.starts_with(own),
            _ => false,
        }
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn prepare(&self) -> Result<(), BatchError> {
        let records = self.records();
        fs::create_dir_all(&records).map_err(|error| BatchError::file(records.display(), error))
    }

    /// Removes what processes that no longer run have left in a folder that was begun.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn sweep(&self) -> Result<(), BatchError> {
        let records = self.records();
        let failed = |error: io::Error| BatchError::file(records.display(), error);
        for entry in fs::read_dir(&records).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if is_left_behind(&path) {
                // Another process may have been faster.
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// Reads a record, if there is one of that name.
    pub(crate) fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError> {
        let path = self.record(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => Ok(None),
            Err(error) => Err(BatchError::file(path.display(), error)),
        }
    }

    /// Writes a record in one piece, over an older one.
    pub(crate) fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError> {
        self.put(name, bytes, |from, to| fs::rename(from, to))
    }

    /// Writes a record in one piece unless there is one. Returns whether it has.
    pub(crate) fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError> {
        self.put(name, bytes, rename_if_absent)
    }

    /// Writes a record aside, and lets `place` give it its name.
    fn put<T>(
        &self,
        name: &str,
        bytes: &[u8],
        place: impl FnOnce(&Path, &Path) -> io::Result<T>,
    ) -> Result<T, BatchError> {
        let path = self.record(name);
        let put = || {
            let mut aside = Aside::create(&self.records(), name)?;
            aside.write_all(bytes)?;
            aside.sync()?;
            let placed = place(aside.path(), &path)?;
            sync_folder(&self.records())?;
            Ok(placed)
        };
        put().map_err(|error: io::Error| BatchError::file(path.display(), error))
    }

    /// Begins an output.
    pub(crate) fn create(&self, name: &str) -> Result<Aside, BatchError> {
        Aside::create(&self.records(), name).map_err(|error| BatchError::file(self.records().display(), error))
    }

    /// Publishes a complete output under its name, unless there is one. Returns whether it has.
    pub(crate) fn publish(&self, mut aside: Aside, name: &str) -> Result<bool, BatchError> {
        let path = self.path.join(name);
        let mut publish = || {
            aside.sync()?;
            let is_new = rename_if_absent(aside.path(), &path)?;
            sync_folder(&self.path)?;
            Ok(is_new)
        };
        publish().map_err(|error: io::Error| BatchError::file(path.display(), error))
    }
}

/// Gives a complete file its name unless there is one of that name, in one step. Returns whether it has. The old name
/// may remain.
fn rename_if_absent(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        // File systems without hard links. Whoever else writes the file writes the same bytes.
        Err(error) if [ErrorKind::Unsupported, ErrorKind::PermissionDenied].contains(&error.kind()) => {
            if to.exists() {
                return Ok(false);
            }
            fs::rename(from, to).map(|()| true)
        }
        Err(error) => Err(error),
    }
}

/// Makes the names in a folder outlast a crash of the machine.
fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = (folder, File::open);
    Ok(())
}
