//! `Aside`: a file that is written under a temporary name, and removed unless it is published.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::Unpublished;

/// How temporary names end.
const SUFFIX: &str = ".tmp";

/// How often the time of a file that is still written is renewed.
const RENEWAL: Duration = Duration::from_secs(60);

/// The age from which a file of another machine counts as left behind.
const STALE: Duration = Duration::from_secs(3600);

/// The paths of the files that this process is writing.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the files that this process has not finished, for a process that ends at once.
pub fn discard_unfinished() {
    // A thread that panicked while it held the lock has left a complete list.
    for path in UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = fs::remove_file(path);
    }
}

/// A file under a temporary name.
#[derive(Debug)]
pub struct Aside {
    out: BufWriter<File>,
    path: PathBuf,
    /// The path that it gets.
    target: PathBuf,
    renewed: Instant,
}

impl Aside {
    /// Creates an empty file in `folder`, to become `target` later.
    ///
    /// Its lock tells processes of this machine that it is still written, and its time tells those of others.
    pub fn create(folder: &Path, target: PathBuf) -> io::Result<Aside> {
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        loop {
            let random = RandomState::new().build_hasher().finish();
            let path = folder.join(format!("{name}.{}.{random:016x}{SUFFIX}", host()));
            let file = File::create_new(&path)?;
            // Before it is locked, another process may take it for one that was left behind.
            let is_locked = !matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock));
            if is_locked && path.exists() {
                UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
                let out = BufWriter::with_capacity(1 << 18, file);
                return Ok(Aside { out, path, target, renewed: Instant::now() });
            }
        }
    }

    /// The temporary path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Unpublished for Aside {
    fn renew(&mut self) {
        if self.renewed.elapsed() >= RENEWAL {
            self.renewed = Instant::now();
            let _ = self.out.get_ref().set_modified(SystemTime::now());
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.out.get_ref().sync_all()
    }

    fn publish(mut self: Box<Self>) -> io::Result<bool> {
        self.sync()?;
        let is_new = rename_if_absent(&self.path, &self.target)?;
        sync_folder(self.target.parent().unwrap_or(Path::new(".")))?;
        Ok(is_new)
    }
}

impl Write for Aside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // What was published has another name by now.
        let _ = fs::remove_file(&self.path);
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.path);
    }
}

/// Whether a file was left behind by a process that no longer runs, and can be removed.
pub fn is_left_behind(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((rest, _)) = name.strip_suffix(SUFFIX).and_then(|rest| rest.rsplit_once('.')) else { return false };
    let Ok(file) = File::open(path) else { return false };
    let is_of_this_host = rest.ends_with(&format!(".{}", host()));
    if is_of_this_host {
        return file.try_lock().is_ok();
    }
    let age = file.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed().unwrap_or_default());
    age.is_ok_and(|age| age > STALE)
}

/// The name of this machine, without dots.
fn host() -> &'static str {
    static HOST: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    HOST.get_or_init(|| {
        let name = fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
        let name = name.unwrap_or_else(|_| "host".into());
        name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
    })
}

/// Gives a complete file its name unless there is one of that name, in one step. Returns whether it has. The old name
/// may remain.
pub fn rename_if_absent(from: &Path, to: &Path) -> io::Result<bool> {
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
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = (folder, File::open);
    Ok(())
}
