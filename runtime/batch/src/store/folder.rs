//! Outputs in a folder: written aside, synced, and linked to their names.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::aside::{Aside, is_left_behind, rename_if_absent, sync_folder};
use super::{Place, RECORDS, Source, Unpublished};
use crate::error::BatchError;

/// The folder that outputs are written to.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    pub fn open(path: &str) -> Result<Folder, BatchError> {
        let path = Path::new(path);
        if path.exists() && !path.is_dir() {
            let problem = format!("--output: expected a folder, found the file {}", path.display());
            return Err(BatchError::Arguments(problem));
        }
        Ok(Folder { path: path.to_path_buf() })
    }

    fn records(&self) -> PathBuf {
        self.path.join(RECORDS)
    }

    fn holds_file(&self, path: &Path) -> bool {
        let folder = path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
        let folder = folder.and_then(|folder| folder.canonicalize().ok());
        match (folder, self.path.canonicalize()) {
            (Some(folder), Ok(own)) => folder.starts_with(own),
            _ => false,
        }
    }

    /// Writes a record aside, and lets `place` give it its name.
    fn put<T>(
        &self,
        name: &str,
        bytes: &[u8],
        place: impl FnOnce(&Path, &Path) -> io::Result<T>,
    ) -> Result<T, BatchError> {
        let path = self.records().join(name);
        let put = || {
            let mut aside = Aside::create(&self.records(), path.clone())?;
            aside.write_all(bytes)?;
            aside.sync()?;
            let placed = place(aside.path(), &path)?;
            sync_folder(&self.records())?;
            Ok(placed)
        };
        put().map_err(|error: io::Error| BatchError::file(path.display(), error))
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Place for Folder {
    fn names(&self) -> Result<BTreeSet<String>, BatchError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries.map_err(|error| BatchError::file(self.path.display(), error))?,
        };
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        entries.map(name).collect::<io::Result<_>>().map_err(|error| BatchError::file(self.path.display(), error))
    }

    fn holds(&self, source: &Source) -> bool {
        match source {
            Source::File(path) => self.holds_file(path),
            #[cfg(feature = "object-stores")]
            Source::Object(_) => false,
        }
    }

    fn prepare(&self) -> Result<(), BatchError> {
        let records = self.records();
        fs::create_dir_all(&records).map_err(|error| BatchError::file(records.display(), error))
    }

    fn sweep(&self) -> Result<(), BatchError> {
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

    fn record(&self, name: &str) -> String {
        self.records().join(name).display().to_string()
    }

    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError> {
        let path = self.records().join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => Ok(None),
            Err(error) => Err(BatchError::file(path.display(), error)),
        }
    }

    fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError> {
        self.put(name, bytes, |from, to| fs::rename(from, to))
    }

    fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError> {
        self.put(name, bytes, rename_if_absent)
    }

    fn create(&self, name: &str) -> Result<Box<dyn Unpublished>, BatchError> {
        let aside = Aside::create(&self.records(), self.path.join(name));
        Ok(Box::new(aside.map_err(|error| BatchError::file(self.records().display(), error))?))
    }

    fn scratch(&self) -> io::Result<File> {
        tempfile::tempfile_in(self.records())
    }
}
