//! The shards of a job: the files that patterns match, in the order of their names, and this process's part of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::columns::Columns;
use crate::error::BatchError;
use crate::store::{Location, Source, Store, refused};

/// An input shard.
#[derive(Clone, Debug)]
pub struct Shard {
    /// Its file name, which is also the output's.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    pub(crate) source: Source,
}

/// What [`find`] found.
#[derive(Clone, Debug, Default)]
pub struct Shards {
    /// This process's shards, in the order of their names.
    pub shards: Vec<Shard>,
    /// How many there are in all parts together.
    pub all: usize,
    /// Patterns that match no file.
    pub unmatched: Vec<String>,
}

/// Which shards a process runs: those whose number in the order of names, from 0, is `index` modulo `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: usize,
    /// At least 1.
    pub count: usize,
}

/// Finds the shards that `patterns` match: paths or URLs, or globs of them with `*`, `?`, `[…]` and `**`.
///
/// # Errors
/// Two files of one name, or with the same file beside their outputs, a file within the output folder, a malformed pattern, or a folder that cannot be read.
pub fn find(patterns: &[String], output: &Store, columns: &Columns, part: Part) -> Result<Shards, BatchError> {
    let mut found: BTreeMap<String, Shard> = BTreeMap::new();
    let mut unmatched = Vec::new();
    for pattern in patterns {
        let matched = sources(pattern)?;
        if matched.is_empty() {
            unmatched.push(pattern.clone());
        }
        for (source, bytes) in matched {
            let name = source.name();
            if output.holds(&source) {
                return Err(BatchError::Arguments(format!(
                    "--input {pattern}: matches {source}, which is in the output folder {output}"
                )));
            }
            match found.get(&name) {
                Some(other) if other.source != source => {
                    return Err(BatchError::Arguments(format!(
                        "--input: expected files of different names, since each names its output, found {} and {source}",
                        other.source
                    )));
                }
                Some(_) => {}
                None => drop(found.insert(name.clone(), Shard { name, bytes, source })),
            }
        }
    }
    let mut beside = BTreeMap::new();
    for name in found.keys() {
        if let Some(file) = columns.beside(name)
            && let Some(other) = beside.insert(file.clone(), name)
        {
            return Err(refused(
                "--input",
                format!("expected files with vectors of their own, found {other} and {name}, both for {file}"),
            ));
        }
    }
    let all = found.len();
    let of_part = |(number, _): &(usize, Shard)| number % part.count == part.index;
    let shards = found.into_values().enumerate().filter(of_part).map(|(_, shard)| shard).collect();
    Ok(Shards { shards, all, unmatched })
}

/// The files of a pattern with their sizes.
fn sources(pattern: &str) -> Result<Vec<(Source, u64)>, BatchError> {
    match Location::of(pattern).map_err(|problem| refused("--input", problem))? {
        Location::Path(path) => files(path),
        #[cfg(feature = "object-stores")]
        Location::Object { bucket, key } => crate::store::matching_objects(pattern, bucket, key),
    }
}

/// The files that a path or pattern of paths matches, with their sizes.
fn files(pattern: &str) -> Result<Vec<(Source, u64)>, BatchError> {
    let size = |path: &Path| fs::metadata(path).map_err(|error| BatchError::file(path.display(), error));
    let path = Path::new(pattern);
    // A name may itself have brackets.
    if let Ok(metadata) = fs::metadata(path) {
        if metadata.is_dir() {
            let problem = format!("--input: expected files, found the folder {pattern} (write {pattern}/*)");
            return Err(BatchError::Arguments(problem));
        }
        return Ok(vec![(Source::File(path.to_path_buf()), metadata.len())]);
    }
    let paths = glob::glob(pattern).map_err(|error| {
        BatchError::Arguments(format!("--input {pattern}: {} at character {}", error.msg, error.pos + 1))
    })?;
    let mut files = Vec::new();
    for path in paths {
        let path: PathBuf = path.map_err(|error| BatchError::file(error.path().display(), error.error()))?;
        let metadata = size(&path)?;
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if metadata.is_file() && !is_hidden {
            files.push((Source::File(path), metadata.len()));
        }
    }
    Ok(files)
}
