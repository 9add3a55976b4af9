//! Reads an object from its beginning to its end.

use std::io::{self, Read};
use std::ops::Range;

use bytes::{Buf, Bytes};
use object_store::{Error, GetOptions, ObjectMeta, ObjectStore};
use tokio::task::JoinHandle;

use super::bucket::{Bucket, describe, runtime, wait};

/// Bytes of a request. One block is read while the next one is on its way.
const BLOCK: u64 = 4 << 20;

/// An object that is being read. All requests name its version, so that an object that is replaced meanwhile is an error.
#[derive(Debug)]
pub struct Reader {
    bucket: Bucket,
    meta: ObjectMeta,
    block: Bytes,
    /// Where the next request begins.
    next: u64,
    ahead: Option<JoinHandle<Result<Bytes, Error>>>,
}

impl Reader {
    pub fn new(bucket: Bucket, meta: ObjectMeta) -> Reader {
        Reader { bucket, meta, block: Bytes::new(), next: 0, ahead: None }
    }

    /// Asks for the next block.
    fn ask(&mut self) {
        if self.next >= self.meta.size {
            return;
        }
        let range: Range<u64> = self.next..self.meta.size.min(self.next + BLOCK);
        self.next = range.end;
        let (client, path) = (self.bucket.client().clone(), self.meta.location.clone());
        let options = GetOptions { if_match: self.meta.e_tag.clone(), ..GetOptions::default() }.with_range(Some(range));
        self.ahead = Some(runtime().spawn(async move { client.get_opts(&path, options).await?.bytes().await }));
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.block.is_empty() {
            if self.ahead.is_none() {
                self.ask();
            }
            let Some(ahead) = self.ahead.take() else { return Ok(0) };
            let block = wait(ahead).map_err(io::Error::other)?;
            self.block = block.map_err(|error| io::Error::other(describe(&error)))?;
            self.ask();
        }
        let count = buffer.len().min(self.block.len());
        self.block.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
