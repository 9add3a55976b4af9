//! Inputs and outputs that are objects of a store that speaks S3. Only here and below is object_store used.
//!
//! # Design
//! An object appears when its last byte has been sent, so nothing is written aside. The request that makes it appear, a
//! put or the completion of a multipart upload, has the header `If-None-Match: *`, so it fails for the second of two
//! processes that compute the same shard. The job's threads wait for each request; object_store repeats what fails in passing.

mod bucket;
mod connection;
mod reader;
mod upload;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::time::Duration;

use chrono::Utc;
use glob::{MatchOptions, Pattern};
use object_store::ObjectMeta;
use object_store::path::Path;
use serde_json::Value;

use super::{Place, RECORDS, Source, Unpublished, refused};
use crate::error::BatchError;
use bucket::{Bucket, Depth};
pub use reader::Reader;
use upload::Upload;
pub use upload::discard_unfinished;

/// The folder of records that tell which uploads are in progress.
const UPLOADS: &str = "uploads";

/// The age from which an upload counts as left behind, unless its record was renewed.
const STALE: Duration = Duration::from_secs(3600);

/// Where the special characters of a pattern begin.
const SPECIAL: [char; 3] = ['*', '?', '['];

/// An input.
#[derive(Clone, Debug)]
pub struct Object {
    bucket: Bucket,
    meta: ObjectMeta,
}

impl Object {
    pub fn name(&self) -> &str {
        self.meta.location.filename().unwrap_or_default()
    }

    pub fn reader(&self) -> Reader {
        Reader::new(self.bucket.clone(), self.meta.clone())
    }
}

impl PartialEq for Object {
    fn eq(&self, other: &Object) -> bool {
        self.bucket.name() == other.bucket.name() && self.meta.location == other.meta.location
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket, self.meta.location)
    }
}

/// The objects of a bucket that a key or pattern matches, with their sizes.
///
/// # Errors
/// A malformed pattern, a folder instead of objects, or a bucket that cannot be read.
pub fn matching(pattern: &str, bucket: &str, key: &str) -> Result<Vec<(Source, u64)>, BatchError> {
    let flag = format!("--input {pattern}");
    let bucket = Bucket::open(bucket)?;
    let source = |meta: ObjectMeta| {
        let bytes = meta.size;
        (Source::Object(Object { bucket: bucket.clone(), meta }), bytes)
    };
    // A key may itself have brackets.
    if !key.is_empty()
        && !key.contains(['*', '?'])
        && let Some(meta) = bucket.head(key)?
    {
        return Ok(vec![source(meta)]);
    }
    let Some(special) = key.find(SPECIAL) else {
        let is_folder = key.is_empty() || !bucket.list(key, Depth::Folder)?.is_empty();
        let problem = format!("expected objects, found a folder (write {}/*)", pattern.trim_end_matches('/'));
        return if is_folder { Err(refused(&flag, problem)) } else { Ok(Vec::new()) };
    };
    let glob = Pattern::new(key)
        .map_err(|error| refused(&flag, format!("{} at character {} of the key", error.msg, error.pos + 1)))?;
    let folder = key[..special].rsplit_once('/').map_or("", |(folder, _)| folder);
    let depth = if key[special..].contains('/') { Depth::All } else { Depth::Folder };
    let options =
        MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };
    let mut found = bucket.list(folder, depth)?;
    found.retain(|meta| glob.matches_with(meta.location.as_ref(), options));
    Ok(found.into_iter().map(source).collect())
}

/// The objects of a bucket under a prefix, as a place of outputs.
#[derive(Debug)]
pub struct Objects {
    bucket: Bucket,
    /// Without a slash at its end; empty for the whole bucket.
    prefix: String,
}

impl Objects {
    pub fn open(bucket: &str, prefix: &str) -> Result<Objects, BatchError> {
        Path::parse(prefix).map_err(|error| refused("--output", error.to_string()))?;
        Ok(Objects { bucket: Bucket::open(bucket)?, prefix: prefix.to_string() })
    }

    fn key(&self, name: &str) -> String {
        match self.prefix.as_str() {
            "" => name.to_string(),
            prefix => format!("{prefix}/{name}"),
        }
    }

    fn key_of_record(&self, name: &str) -> String {
        self.key(&format!("{RECORDS}/{name}"))
    }
}

impl fmt::Display for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix.as_str() {
            "" => self.bucket.fmt(f),
            prefix => write!(f, "{}/{prefix}", self.bucket),
        }
    }
}

impl Place for Objects {
    fn names(&self) -> Result<BTreeSet<String>, BatchError> {
        let objects = self.bucket.list(&self.prefix, Depth::Folder)?;
        Ok(objects.iter().filter_map(|meta| meta.location.filename()).map(String::from).collect())
    }

    fn holds(&self, source: &Source) -> bool {
        let Source::Object(object) = source else { return false };
        let prefix = Path::parse(&self.prefix).unwrap_or_default();
        object.bucket.name() == self.bucket.name() && object.meta.location.prefix_matches(&prefix)
    }

    fn prepare(&self) -> Result<(), BatchError> {
        Ok(())
    }

    fn sweep(&self) -> Result<(), BatchError> {
        let now = Utc::now();
        for meta in self.bucket.list(&self.key_of_record(UPLOADS), Depth::Folder)? {
            let age = (now - meta.last_modified).to_std().unwrap_or_default();
            if age < STALE {
                continue;
            }
            let record = meta.location.as_ref();
            let Some(bytes) = self.bucket.get(record)? else { continue };
            let upload: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            if let (Some(output), Some(id)) = (upload["output"].as_str(), upload["upload_id"].as_str()) {
                self.bucket.abort(&self.key(output), id, record);
            }
        }
        Ok(())
    }

    fn record(&self, name: &str) -> String {
        format!("{}/{}", self.bucket, self.key_of_record(name))
    }

    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, BatchError> {
        Ok(self.bucket.get(&self.key_of_record(name))?.map(|bytes| bytes.to_vec()))
    }

    fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), BatchError> {
        self.bucket.put(&self.key_of_record(name), bytes.to_vec().into())
    }

    fn put_record_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, BatchError> {
        self.bucket.put_if_absent(&self.key_of_record(name), bytes.to_vec().into())
    }

    fn create(&self, name: &str) -> Result<Box<dyn Unpublished>, BatchError> {
        Ok(Box::new(Upload::new(self.bucket.clone(), name, self.key(name), self.key_of_record(UPLOADS))))
    }

    fn scratch(&self) -> io::Result<File> {
        tempfile::tempfile()
    }
}
