//! `Store`: where outputs lie, and `Source`: where inputs do.
//!
//! An output folder holds the outputs under the names of their inputs and, in its folder `_batch`, the settings, a
//! record of each shard and whatever is unfinished. Readers of data sets skip names that begin with `_`. The record is
//! written before the output, so an output is never without one.

mod aside;
mod local;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::BatchError;
pub use aside::{Aside, discard_unfinished};
use local::Folder;

/// Where outputs are written.
#[derive(Debug)]
pub struct Store(Place);

#[derive(Debug)]
enum Place {
    Folder(Folder),
}

/// An input's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    File(PathBuf),
}

impl Source {
    pub fn file(path: &Path) -> Source {
        Source::File(path.to_path_buf())
    }

    /// Its file name.
    pub fn name(&self) -> String {
        match self {
            Source::File(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        }
    }

    /// Opens it as a file; one from elsewhere is fetched first.
    pub fn open(&self) -> Result<File, BatchError> {
        match self {
            Source::File(path) => File::open(path).map_err(|error| BatchError::file(path.display(), error)),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Folder(folder) => folder.path().display().fmt(f),
        }
    }
}

impl Store {
    /// The folder `output`, which need not exist yet.
    ///
    /// # Errors
    /// It is a file.
    pub fn open(output: &str) -> Result<Store, BatchError> {
        Ok(Store(Place::Folder(Folder::new(Path::new(output))?)))
    }

    /// The inputs that a pattern matches, with their sizes; `None` for a pattern of local files.
    pub(crate) fn list_remote(_pattern: &str) -> Option<Result<Vec<(Source, u64)>, BatchError>> {
        None
    }

    /// The names of the outputs that exist, and of other files.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn names(&self) -> Result<BTreeSet<String>, BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.names(),
        }
    }

    /// Whether an input lies where outputs would.
    pub(crate) fn holds(&self, source: &Source) -> bool {
        match (&self.0, source) {
            (Place::Folder(folder), Source::File(path)) => folder.holds(path),
        }
    }

    /// Removes what processes that no longer run have left in a folder that was begun.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn sweep(&self) -> Result<(), BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.sweep(),
        }
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn prepare(&self) -> Result<(), BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.prepare(),
        }
    }

    /// The path or URL of a record, for messages.
    pub(crate) fn record_path(&self, name: &str) -> String {
        match &self.0 {
            Place::Folder(folder) => folder.record(name).display().to_string(),
        }
    }

    /// Reads a record, if there is one of that name.
    pub(crate) fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.read_record(name),
        }
    }

    /// Writes a record in one piece, over an older one.
    pub(crate) fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.put_record(name, bytes),
        }
    }

    /// Writes a record in one piece unless there is one. Returns whether it has.
    pub(crate) fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.put_record_if_absent(name, bytes),
        }
    }

    /// Begins an output.
    pub(crate) fn create(&self, name: &str) -> Result<Aside, BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.create(name),
        }
    }

    /// Publishes a complete output under its name, unless there is one. Returns whether it has.
    pub(crate) fn publish(&self, aside: Aside, name: &str) -> Result<bool, BatchError> {
        match &self.0 {
            Place::Folder(folder) => folder.publish(aside, name),
        }
    }
}
