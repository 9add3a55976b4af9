//! Downloads missing files into the cache, resumes interrupted downloads, and retries after temporary failures.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use super::cache::{Blob, Cache};
use super::http::{Client, Failure, Remote};
use super::{Downloaded, HubError, HubSettings, Wanted, needed};
use crate::checkpoint::INDEX;
use crate::progress::Progress;
use crate::repository::{Repository, is_commit};

/// Attempts without any progress before a request counts as failed.
const ATTEMPTS: u32 = 5;
/// The pause before the second attempt; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Downloads the needed files that the cache does not have.
pub(super) fn fetch(
    repository: &Repository,
    wanted: Wanted<'_>,
    settings: &HubSettings,
    cache: &Cache,
    progress: &dyn Progress,
) -> Result<Downloaded, HubError> {
    let client = Client::new(repository, settings)?;
    let listing = retrying(&client, progress, |_| client.listing())?;
    if !is_commit(&listing.sha) {
        return Err(HubError::answer(repository.to_string(), "the hash of a commit", listing.sha));
    }
    let sizes: BTreeMap<&str, u64> =
        listing.siblings.iter().map(|file| (file.rfilename.as_str(), file.size.unwrap_or(0))).collect();
    let mut fetch =
        Fetch { client: &client, cache, progress, commit: &listing.sha, sizes: &sizes, files: 0, bytes: 0, total: 0 };
    let folder = cache.snapshot(&listing.sha);
    let present: Vec<&str> = sizes.keys().copied().collect();
    let first = needed::first(repository, wanted, &present)?;
    fetch.files(&first)?;
    if let Wanted::Checkpoint(task) = wanted
        && first.iter().any(|name| name == INDEX)
    {
        let shards: Vec<String> = needed::shards(&folder, task)?.into_iter().collect();
        // A shard that the repository lacks is an error only if the export needs it.
        fetch.files(&shards.into_iter().filter(|name| sizes.contains_key(name.as_str())).collect::<Vec<_>>())?;
    }
    cache.record(&listing.sha)?;
    let Fetch { files, bytes, .. } = fetch;
    Ok(Downloaded { folder, commit: listing.sha.clone(), files, bytes, warning: None })
}

/// A download of several files of one commit.
struct Fetch<'f> {
    client: &'f Client<'f>,
    cache: &'f Cache,
    progress: &'f dyn Progress,
    commit: &'f str,
    sizes: &'f BTreeMap<&'f str, u64>,
    /// Files that were downloaded.
    files: usize,
    /// Their size.
    bytes: u64,
    /// The size of all files that the snapshot lacked.
    total: u64,
}

impl Fetch<'_> {
    fn files(&mut self, names: &[String]) -> Result<(), HubError> {
        let folder = self.cache.snapshot(self.commit);
        let missing: Vec<&String> = names.iter().filter(|name| !folder.join(name).exists()).collect();
        self.total += missing.iter().filter_map(|name| self.sizes.get(name.as_str())).sum::<u64>();
        if !missing.is_empty() {
            self.progress.started(self.total);
        }
        missing.into_iter().try_for_each(|name| self.file(name))
    }

    fn file(&mut self, name: &str) -> Result<(), HubError> {
        let Remote { etag, size } = retrying(self.client, self.progress, |_| self.client.remote(self.commit, name))?;
        let blob = self.cache.blob(self.commit, name, &etag);
        blob.create_folders()?;
        let _lock = self.cache.lock(&etag, name, self.progress)?;
        if blob.path.exists() {
            self.progress.advanced(size);
        } else {
            let length = blob.incomplete.metadata().map_or(0, |metadata| metadata.len());
            self.progress.advanced(if length > size { 0 } else { length });
            retrying(self.client, self.progress, |has_advanced| self.content(name, &blob, size, has_advanced))?;
            self.files += 1;
            self.bytes += size;
        }
        blob.link()
    }

    /// Downloads the rest of a file.
    fn content(&self, name: &str, blob: &Blob, size: u64, has_advanced: &mut bool) -> Result<(), Failure> {
        let path = &blob.incomplete;
        let failed = |error| Failure::Final(HubError::io(path, "cannot be written")(error));
        let mut file = File::options().create(true).append(true).open(path).map_err(failed)?;
        let mut length = file.metadata().map_err(failed)?.len();
        if length > size {
            file.set_len(0).map_err(failed)?;
            length = 0;
        }
        if length < size {
            let (start, mut content) = self.client.content(self.commit, name, length)?;
            if start < length {
                file.set_len(start).map_err(failed)?;
                length = start;
            }
            let (mut block, mut rest) = (vec![0; 1 << 16], size - length);
            while rest > 0 {
                if self.progress.is_cancelled() {
                    return Err(Failure::Final(HubError::Cancelled));
                }
                let broken =
                    |error: std::io::Error| Failure::Passing { reason: format!("{name}: {error}"), after: None };
                let read = match content.read(&mut block).map_err(broken)? {
                    0 => break,
                    read => read.min(usize::try_from(rest).unwrap_or(usize::MAX)),
                };
                file.write_all(&block[..read]).map_err(failed)?;
                self.progress.advanced(read as u64);
                *has_advanced = true;
                rest -= read as u64;
            }
            if rest > 0 {
                let reason = format!("{name}: the connection was closed {rest} bytes before the end");
                return Err(Failure::Passing { reason, after: None });
            }
        }
        drop(file);
        let complete = blob.complete(size).map_err(Failure::Final)?;
        complete.map_err(|fault| Failure::Passing { reason: format!("{name}: {fault}"), after: None })
    }
}

/// Makes a request again while it fails for passing reasons. `request` tells in its argument whether it got any further,
/// for which it is granted all attempts anew.
fn retrying<T>(
    client: &Client<'_>,
    progress: &dyn Progress,
    mut request: impl FnMut(&mut bool) -> Result<T, Failure>,
) -> Result<T, HubError> {
    let mut failures = 0;
    loop {
        let mut has_advanced = false;
        let (reason, after) = match request(&mut has_advanced) {
            Ok(value) => return Ok(value),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing { reason, after }) => (reason, after),
        };
        failures = if has_advanced { 1 } else { failures + 1 };
        if failures == ATTEMPTS {
            return Err(client.unreachable(format!("{reason} ({ATTEMPTS} attempts)")));
        }
        let pause = after.unwrap_or(FIRST_PAUSE * 2_u32.pow(failures - 1)).min(LONGEST_PAUSE);
        progress.noted(&format!("{reason}; trying again in {:.1} s", pause.as_secs_f64()));
        wait(pause, progress)?;
    }
}

fn wait(pause: Duration, progress: &dyn Progress) -> Result<(), HubError> {
    let end = Instant::now() + pause;
    while Instant::now() < end {
        if progress.is_cancelled() {
            return Err(HubError::Cancelled);
        }
        thread::sleep(Duration::from_millis(50).min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}
