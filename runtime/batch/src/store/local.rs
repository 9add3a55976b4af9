//! An output folder in a file system.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::aside::{Aside, is_left_behind};
use crate::error::BatchError;

/// The folder of records and unfinished files.
const RECORDS: &str = "_batch";

#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    pub fn new(path: &Path) -> Result<Folder, BatchError> {
        match path.exists() && !path.is_dir() {
            true => {
                Err(BatchError::Arguments(format!("--output: expected a folder, found the file {}", path.display())))
            }
            false => Ok(Folder { path: path.to_path_buf() }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn record(&self, name: &str) -> PathBuf {
        self.records().join(name)
    }

    fn records(&self) -> PathBuf {
        self.path.join(RECORDS)
    }

    pub fn names(&self) -> Result<BTreeSet<String>, BatchError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries.map_err(|error| BatchError::file(self.path.display(), error))?,
        };
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        entries.map(name).collect::<io::Result<_>>().map_err(|error| BatchError::file(self.path.display(), error))
    }

    pub fn holds(&self, path: &Path) -> bool {
        let folder = path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
        let folder = folder.and_then(|folder| folder.canonicalize().ok());
        match (folder, self.path.canonicalize()) {
            (Some(folder), Ok(own)) => folder.starts_with(own),
            _ => false,
        }
    }

    pub fn prepare(&self) -> Result<(), BatchError> {
        let records = self.records();
        fs::create_dir_all(&records).map_err(|error| BatchError::file(records.display(), error))
    }

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

    pub fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError> {
        let path = self.record(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => Ok(None),
            Err(error) => Err(BatchError::file(path.display(), error)),
        }
    }

    pub fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError> {
        let path = self.record(name);
        let put = || {
            let mut aside = Aside::create(&self.records(), name)?;
            aside.write_all(bytes)?;
            aside.sync()?;
            fs::rename(aside.path(), &path)?;
            sync_folder(&self.records())
        };
        put().map_err(|error| BatchError::file(path.display(), error))
    }

    pub fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError> {
        let path = self.record(name);
        let put = || {
            let mut aside = Aside::create(&self.records(), name)?;
            aside.write_all(bytes)?;
            aside.sync()?;
            let is_new = rename_if_absent(aside.path(), &path)?;
            sync_folder(&self.records())?;
            Ok(is_new)
        };
        put().map_err(|error: io::Error| BatchError::file(path.display(), error))
    }

    pub fn create(&self, name: &str) -> Result<Aside, BatchError> {
        Aside::create(&self.records(), name).map_err(|error| BatchError::file(self.records().display(), error))
    }

    pub fn publish(&self, mut aside: Aside, name: &str) -> Result<bool, BatchError> {
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
