//! The cache of a repository, in huggingface_hub's layout: `blobs` by ETag, `snapshots` of links to them by commit, and
//! `refs` with the commit of each branch and tag.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use t5gemma_graphs::adapter::CONFIG_FILE;

use super::{Downloaded, HubError};
use crate::progress::Progress;
use crate::repository::{Repository, is_commit};

/// The cache of one repository.
pub(super) struct Cache {
    hub: hf_hub::Cache,
    repository: hf_hub::Repo,
}

/// Where a file of the server comes to lie.
pub(super) struct Blob {
    /// The content.
    pub path: PathBuf,
    /// The content while it is incomplete.
    pub incomplete: PathBuf,
    /// The link to it.
    pub link: PathBuf,
}

impl Cache {
    pub fn new(repository: &Repository, folder: &Path) -> Cache {
        let revision = repository.revision().unwrap_or("main").to_string();
        let repository = hf_hub::Repo::with_revision(repository.id().to_string(), hf_hub::RepoType::Model, revision);
        Cache { hub: hf_hub::Cache::new(folder.to_path_buf()), repository }
    }

    /// The snapshot of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.hub.repo(self.repository.clone()).pointer_path(commit)
    }

    /// The snapshot of the revision, if the cache has it with a configuration.
    pub fn find(&self) -> Option<Downloaded> {
        let revision = self.repository.revision();
        let reference = self.folder().join("refs").join(revision);
        let commit = fs::read_to_string(reference).map(|commit| commit.trim().to_string());
        let commit = commit.ok().or_else(|| is_commit(revision).then(|| revision.to_string()))?;
        let folder = self.snapshot(&commit);
        let is_usable = ["config.json", CONFIG_FILE].iter().any(|name| folder.join(name).exists());
        is_usable.then_some(Downloaded { folder, commit, files: 0, bytes: 0, warning: None })
    }

    /// Where a file of a commit comes to lie.
    pub fn blob(&self, commit: &str, name: &str, etag: &str) -> Blob {
        let path = self.folder().join("blobs").join(etag);
        let incomplete = path.with_file_name(format!("{etag}.incomplete"));
        Blob { path, incomplete, link: self.snapshot(commit).join(name) }
    }

    /// Records the commit of the revision.
    pub fn record(&self, commit: &str) -> Result<(), HubError> {
        if self.repository.revision() == commit {
            return Ok(());
        }
        let written = self.hub.repo(self.repository.clone()).create_ref(commit);
        written.map_err(HubError::io(&self.folder().join("refs").join(self.repository.revision()), "cannot be written"))
    }

    /// Waits until no other program downloads this blob. They stay away until the result is dropped.
    pub fn lock(&self, etag: &str, name: &str, progress: &dyn Progress) -> Result<File, HubError> {
        let folder = self.hub.path().join(".locks").join(self.repository.folder_name());
        create_folder(&folder)?;
        let path = folder.join(format!("{etag}.lock"));
        let options = File::options().create(true).write(true).truncate(false).open(&path);
        let file = options.map_err(HubError::io(&path, "cannot be created"))?;
        let mut is_noted = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                // On some network file systems; two downloads at once then only cost time.
                Err(TryLockError::Error(_)) => return Ok(file),
                Err(TryLockError::WouldBlock) if progress.is_cancelled() => return Err(HubError::Cancelled),
                Err(TryLockError::WouldBlock) => {
                    if !is_noted {
                        progress.noted(&format!("waiting for another program to download {name}"));
                        is_noted = true;
                    }
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn folder(&self) -> PathBuf {
        self.hub.path().join(self.repository.folder_name())
    }
}

impl Blob {
    /// Creates the folders that it needs.
    pub fn create_folders(&self) -> Result<(), HubError> {
        [&self.path, &self.link].into_iter().filter_map(|path| path.parent()).try_for_each(create_folder)
    }

    /// Makes the complete content the blob.
    ///
    /// # Errors
    /// What is wrong with the content, which is then removed.
    pub fn complete(&self, size: u64) -> Result<Result<(), String>, HubError> {
        let fault = self.fault(size)?;
        if let Some(fault) = fault {
            fs::remove_file(&self.incomplete).map_err(HubError::io(&self.incomplete, "cannot be removed"))?;
            return Ok(Err(fault));
        }
        fs::rename(&self.incomplete, &self.path).map_err(HubError::io(&self.path, "cannot be written"))?;
        Ok(Ok(()))
    }

    /// What is wrong with the content. The ETag of a large file is its SHA-256.
    fn fault(&self, size: u64) -> Result<Option<String>, HubError> {
        let failed = |error| HubError::io(&self.incomplete, "cannot be read")(error);
        let mut file = File::open(&self.incomplete).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length != size {
            return Ok(Some(format!("expected {size} bytes, found {length}")));
        }
        let etag = self.path.file_name().unwrap_or_default().to_string_lossy();
        if etag.len() != 64 {
            return Ok(None);
        }
        let (mut hash, mut block) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut block).map_err(failed)? {
                0 => break,
                read => hash.update(&block[..read]),
            }
        }
        let found = hex::encode(hash.finalize());
        Ok((found != *etag).then(|| format!("expected SHA-256 {etag}, found {found}")))
    }

    /// Links the snapshot's file to the blob. Another program may be reading the file if it is there.
    pub fn link(&self) -> Result<(), HubError> {
        if self.link.exists() {
            return Ok(());
        }
        let failed = |error| HubError::io(&self.link, "cannot be linked")(error);
        match fs::remove_file(&self.link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        #[cfg(unix)]
        {
            // Relative, so that the cache can be moved: out of the folders within the repository's.
            let root = self.path.parent().and_then(Path::parent).unwrap_or(Path::new("."));
            let below = self.link.strip_prefix(root).map_or(1, |link| link.components().count());
            let target: PathBuf = (1..below).map(|_| "..").collect();
            let blob = self.path.strip_prefix(root).unwrap_or(&self.path);
            std::os::unix::fs::symlink(target.join(blob), &self.link).map_err(failed)
        }
        #[cfg(not(unix))]
        fs::copy(&self.path, &self.link).map(|_| ()).map_err(failed)
    }
}

fn create_folder(folder: &Path) -> Result<(), HubError> {
    fs::create_dir_all(folder).map_err(HubError::io(folder, "cannot be created"))
}
