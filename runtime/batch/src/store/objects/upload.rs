//! `Upload`: an output that becomes an object. What fits into one part is put at once; larger ones are multipart uploads,
//! whose parts are sent as they are written.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::mem;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::Error;
use object_store::multipart::{MultipartStore, PartId};
use serde_json::json;
use tokio::task::JoinHandle;

use super::super::Unpublished;
use super::bucket::{Bucket, describe, runtime, wait};
use crate::error::BatchError;

/// Bytes of a part. Some stores want parts of one size.
const PART: usize = 16 << 20;

/// The most parts of an upload.
const MAX_PARTS: usize = 10_000;

/// Parts that are on their way at a time, besides the one that is being filled.
const SENDING: usize = 2;

/// How often the record of an upload is renewed.
const RENEWAL: Duration = Duration::from_secs(600);

/// The uploads of this process that have not ended.
static UNFINISHED: Mutex<Vec<Begun>> = Mutex::new(Vec::new());

/// Ends the uploads of this process, for a process that ends at once.
pub fn discard_unfinished() {
    let begun = mem::take(&mut *UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner));
    begun.iter().for_each(Begun::abort);
}

/// An output in progress.
#[derive(Debug)]
pub struct Upload {
    bucket: Bucket,
    name: String,
    key: String,
    /// The folder of records of uploads.
    records: String,
    /// The part that is being filled.
    part: Vec<u8>,
    begun: Option<Begun>,
    sent: Vec<PartId>,
    sending: VecDeque<JoinHandle<Result<PartId, Error>>>,
    renewed: Instant,
}

/// A multipart upload that the store knows.
#[derive(Clone, Debug)]
struct Begun {
    bucket: Bucket,
    key: String,
    id: String,
    /// The key of the record that tells other processes of it.
    record: String,
}

impl Begun {
    fn abort(&self) {
        self.bucket.abort(&self.key, &self.id, &self.record);
    }
}

fn failed(error: Error) -> io::Error {
    io::Error::other(describe(&error))
}

/// What is wrong with the object. The caller adds its name.
fn problem(error: BatchError) -> io::Error {
    io::Error::other(match error {
        BatchError::File { problem, .. } => problem,
        error => error.to_string(),
    })
}

impl Upload {
    pub fn new(bucket: Bucket, name: &str, key: String, records: String) -> Upload {
        let (name, part) = (name.to_string(), Vec::new());
        let (sent, sending) = (Vec::new(), VecDeque::new());
        Upload { bucket, name, key, records, part, begun: None, sent, sending, renewed: Instant::now() }
    }

    fn put_record(&self, Begun { id, record, .. }: &Begun) -> io::Result<()> {
        let bytes = json!({"output": self.name, "upload_id": id}).to_string().into_bytes();
        self.bucket.put(record, bytes.into()).map_err(problem)
    }

    fn begin(&mut self) -> io::Result<Begun> {
        if let Some(begun) = &self.begun {
            return Ok(begun.clone());
        }
        let path = self.bucket.path(&self.key).map_err(problem)?;
        let id = wait(self.bucket.client().create_multipart(&path)).map_err(failed)?;
        let random = RandomState::new().build_hasher().finish();
        let record = format!("{}/{}.{random:016x}.json", self.records, self.name);
        let begun = Begun { bucket: self.bucket.clone(), key: self.key.clone(), id, record };
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).push(begun.clone());
        self.begun = Some(begun.clone());
        self.put_record(&begun)?;
        Ok(begun)
    }

    /// Waits until fewer than `most` parts are on their way.
    fn wait_for(&mut self, most: usize) -> io::Result<()> {
        while self.sending.len() >= most
            && let Some(part) = self.sending.pop_front()
        {
            self.sent.push(wait(part).map_err(io::Error::other)?.map_err(failed)?);
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let Begun { id, .. } = self.begin()?;
        self.wait_for(SENDING)?;
        let number = self.sent.len() + self.sending.len();
        if number == MAX_PARTS {
            let most = (MAX_PARTS * PART) >> 30;
            return Err(io::Error::other(format!("expected an output of at most {most} GiB, found a larger one")));
        }
        let path = self.bucket.path(&self.key).map_err(problem)?;
        let (client, part) = (self.bucket.client().clone(), Bytes::from(mem::take(&mut self.part)));
        self.sending.push_back(runtime().spawn(async move { client.put_part(&path, &id, number, part.into()).await }));
        Ok(())
    }

    /// Forgets the upload, which has become an object.
    fn forget(&mut self) {
        let Some(begun) = self.begun.take() else { return };
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other.record != begun.record);
        // A record that stays names an upload that has ended; it is removed like one that was left behind.
        if let Ok(path) = self.bucket.path(&begun.record) {
            let _ = wait(object_store::ObjectStoreExt::delete(self.bucket.client(), &path));
        }
    }
}

impl Write for Upload {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.part.len() == PART {
            self.send()?;
        }
        if self.part.capacity() == 0 && self.begun.is_some() {
            self.part.reserve_exact(PART);
        }
        let count = bytes.len().min(PART - self.part.len());
        self.part.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Unpublished for Upload {
    fn renew(&mut self) {
        if self.renewed.elapsed() >= RENEWAL {
            self.renewed = Instant::now();
            if let Some(begun) = &self.begun {
                let _ = self.put_record(begun);
            }
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        // What can be sent has been; the rest makes the object appear.
        Ok(())
    }

    fn publish(mut self: Box<Self>) -> io::Result<bool> {
        if self.begun.is_none() {
            return self.bucket.put_if_absent(&self.key, mem::take(&mut self.part).into()).map_err(problem);
        }
        self.send()?;
        self.wait_for(1)?;
        let Begun { id, .. } = self.begin()?;
        let path = self.bucket.path(&self.key).map_err(problem)?;
        let parts = mem::take(&mut self.sent);
        match wait(self.bucket.client().complete_multipart(&path, &id, parts)) {
            Ok(_) => {
                self.forget();
                Ok(true)
            }
            // Another process may have been faster, or the answer to a request that has succeeded got lost.
            Err(error) => match self.bucket.head(&self.key) {
                Ok(Some(_)) => Ok(false),
                _ => Err(failed(error)),
            },
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(begun) = self.begun.take() else { return };
        self.sending.drain(..).for_each(|part| part.abort());
        begun.abort();
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other.record != begun.record);
    }
}
