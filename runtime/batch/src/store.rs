//! `Store`: where outputs lie, and `Source`: where inputs do. Either is a path or, with the feature `object-stores`, the
//! URL of objects in a store that speaks S3.
//!
//! Outputs have the names of their inputs. Beside them, in the folder `_batch`, lie the settings, a record of each shard
//! and, in folders, whatever is unfinished. Readers of data sets skip names that begin with `_`. The record is written
//! before the output, so an output is never without one.

mod aside;
mod folder;
#[cfg(feature = "object-stores")]
mod objects;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::error::BatchError;
use folder::Folder;

/// The folder of records and unfinished files.
const RECORDS: &str = "_batch";

/// Where outputs are written.
#[derive(Debug)]
pub struct Store(Box<dyn Place>);

/// A folder, or the objects of a bucket under a prefix.
trait Place: fmt::Debug + fmt::Display + Send + Sync {
    /// The names of the outputs that exist, and of other files.
    fn names(&self) -> Result<BTreeSet<String>, BatchError>;
    /// Whether an input lies where outputs would.
    fn holds(&self, source: &Source) -> bool;
    /// Makes the place, if need be.
    fn prepare(&self) -> Result<(), BatchError>;
    /// Removes what processes that no longer run have left.
    fn sweep(&self) -> Result<(), BatchError>;
    /// The path of a record, for messages.
    fn record(&self, name: &str) -> String;
    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError>;
    /// Writes a record in one piece, over an older one.
    fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError>;
    /// Writes a record in one piece unless there is one. Returns whether it has.
    fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError>;
    fn create(&self, name: &str) -> Result<Box<dyn Unpublished>, BatchError>;
    /// An empty file without a name, for data that becomes an output later.
    fn scratch(&self) -> io::Result<File>;
}

/// What has been written of an output, which has no name yet. Dropping it discards it.
trait Unpublished: Write + Send + fmt::Debug {
    /// Tells other processes now and then that the output is still being written.
    fn renew(&mut self);
    /// Stores everything as durably as it is before it has its name.
    fn sync(&mut self) -> io::Result<()>;
    /// Gives the complete output its name unless there is one of that name. Returns whether it has.
    fn publish(self: Box<Self>) -> io::Result<bool>;
}

impl Store {
    /// The folder or `s3://` URL `output`. A folder need not exist yet.
    ///
    /// # Errors
    /// It is a file, or a URL that cannot be used.
    pub fn open(output: &str) -> Result<Store, BatchError> {
        let place: Box<dyn Place> = match Location::of(output).map_err(|problem| refused("--output", problem))? {
            Location::Path(path) => Box::new(Folder::open(path)?),
            #[cfg(feature = "object-stores")]
            Location::Object { bucket, key } => Box::new(objects::Objects::open(bucket, key)?),
        };
        Ok(Store(place))
    }

    /// The names of the outputs that exist, and of other files.
    ///
    /// # Errors
    /// A place that cannot be read.
    pub fn names(&self) -> Result<BTreeSet<String>, BatchError> {
        self.0.names()
    }

    /// Removes what processes that no longer run have left in a place that was begun.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn sweep(&self) -> Result<(), BatchError> {
        self.0.sweep()
    }

    /// Whether an input lies where outputs would.
    pub(crate) fn holds(&self, source: &Source) -> bool {
        self.0.holds(source)
    }

    pub(crate) fn prepare(&self) -> Result<(), BatchError> {
        self.0.prepare()
    }

    /// The path of a record, for messages.
    pub(crate) fn record(&self, name: &str) -> String {
        self.0.record(name)
    }

    /// Reads a record, if there is one of that name.
    pub(crate) fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError> {
        self.0.read_record(name)
    }

    /// Writes a record in one piece, over an older one.
    pub(crate) fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError> {
        self.0.put_record(name, bytes)
    }

    /// Writes a record in one piece unless there is one. Returns whether it has.
    pub(crate) fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError> {
        self.0.put_record_if_absent(name, bytes)
    }

    /// Begins an output.
    pub(crate) fn create(&self, name: &str) -> Result<Output, BatchError> {
        Ok(Output { out: self.0.create(name)?, bytes: 0, hash: Sha256::new() })
    }

    /// An empty file without a name, for data that becomes an output later.
    pub(crate) fn scratch(&self) -> io::Result<File> {
        self.0.scratch()
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Removes what this process has not finished, for a process that ends at once.
pub fn discard_unfinished() {
    aside::discard_unfinished();
    #[cfg(feature = "object-stores")]
    objects::discard_unfinished();
}

/// An output in progress, with its size and SHA-256.
#[derive(Debug)]
pub(crate) struct Output {
    out: Box<dyn Unpublished>,
    bytes: u64,
    hash: Sha256,
}

impl Output {
    /// The number of bytes written.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The SHA-256 of the bytes written, in hexadecimal.
    pub fn sha256(&self) -> String {
        hex::encode(self.hash.clone().finalize())
    }

    /// Tells other processes that the output is still being written.
    pub fn renew(&mut self) {
        self.out.renew();
    }

    /// Stores everything, before the output's record is written.
    pub fn sync(&mut self) -> io::Result<()> {
        self.out.sync()
    }

    /// Gives the complete output its name unless there is one of that name. Returns whether it has.
    pub fn publish(self) -> io::Result<bool> {
        self.out.publish()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Where an input lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
    File(PathBuf),
    #[cfg(feature = "object-stores")]
    Object(objects::Object),
}

impl Source {
    /// Its file name.
    pub fn name(&self) -> String {
        match self {
            Source::File(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            #[cfg(feature = "object-stores")]
            Source::Object(object) => object.name().to_string(),
        }
    }

    /// Opens it, to be read from its beginning to its end.
    pub fn open(&self) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Source::File(path) => Box::new(File::open(path)?),
            #[cfg(feature = "object-stores")]
            Source::Object(object) => Box::new(object.reader()),
        })
    }

    /// Opens it as a file that can be read in any order. An object is copied into a temporary file, because Parquet is
    /// read in many small pieces.
    pub fn open_file(&self) -> io::Result<File> {
        match self {
            Source::File(path) => File::open(path),
            #[cfg(feature = "object-stores")]
            Source::Object(object) => {
                let mut file = tempfile::tempfile()?;
                io::copy(&mut object.reader(), &mut file)?;
                io::Seek::rewind(&mut file)?;
                Ok(file)
            }
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File(path) => path.display().fmt(f),
            #[cfg(feature = "object-stores")]
            Source::Object(object) => object.fmt(f),
        }
    }
}

/// The objects that a pattern matches, with their sizes.
#[cfg(feature = "object-stores")]
pub(crate) use objects::matching as matching_objects;

/// What a path or URL points at.
#[derive(Debug, PartialEq)]
pub(crate) enum Location<'a> {
    Path(&'a str),
    #[cfg(feature = "object-stores")]
    Object {
        bucket: &'a str,
        key: &'a str,
    },
}

impl Location<'_> {
    /// The location of a path, of `file:///…` or of `s3://bucket/…`.
    ///
    /// # Errors
    /// Another URL.
    pub fn of(text: &str) -> Result<Location<'_>, String> {
        let expected = |expected: &str| Err(format!("expected {expected}, found {text}"));
        match text.split_once("://") {
            Some(("file", path)) if path.starts_with('/') => Ok(Location::Path(path)),
            Some(("file", _)) => expected("an absolute path after file://"),
            #[cfg(feature = "object-stores")]
            Some(("s3" | "s3a", rest)) => match rest.split_once('/').unwrap_or((rest, "")) {
                ("", _) => expected("s3://BUCKET/…"),
                (bucket, key) => Ok(Location::Object { bucket, key: key.trim_end_matches('/') }),
            },
            #[cfg(not(feature = "object-stores"))]
            Some(("s3" | "s3a", _)) => expected("a path, since this program was built without object-stores"),
            Some((scheme, _)) if scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+.-".contains(c)) => {
                expected("a path, file:///… or s3://…")
            }
            _ => Ok(Location::Path(text)),
        }
    }
}

/// An argument that cannot be used.
pub(crate) fn refused(flag: &str, problem: String) -> BatchError {
    BatchError::Arguments(format!("{flag}: {problem}"))
}

#[cfg(all(test, feature = "object-stores"))]
mod tests {
    use super::*;

    #[test]
    fn locations_are_paths_or_urls() {
        let object = |bucket, key| Ok(Location::Object { bucket, key });
        let refused = |expected: &str, text: &str| Err(format!("expected {expected}, found {text}"));
        for (text, expected) in [
            ("data/*.jsonl", Ok(Location::Path("data/*.jsonl"))),
            ("a:b/c", Ok(Location::Path("a:b/c"))),
            ("file:///data/x", Ok(Location::Path("/data/x"))),
            ("file://data/x", refused("an absolute path after file://", "file://data/x")),
            ("s3://bucket", object("bucket", "")),
            ("s3://bucket/a/*.jsonl", object("bucket", "a/*.jsonl")),
            ("s3a://bucket/a/", object("bucket", "a")),
            ("s3:///a", refused("s3://BUCKET/…", "s3:///a")),
            ("gs://bucket/a", refused("a path, file:///… or s3://…", "gs://bucket/a")),
        ] {
            assert_eq!(Location::of(text), expected, "{text}");
        }
    }
}
