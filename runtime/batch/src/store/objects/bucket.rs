//! A bucket: its objects by key, and what to do about what goes wrong. The settings are the variables that AWS's own
//! programs read.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{Error, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::{Builder, Runtime};

use super::connection::Connector;
use crate::error::BatchError;

/// How object_store's text of an answer begins.
pub const STATUS: &str = "Server returned non-2xx status code: ";

/// How often a put is repeated that conflicts with another one and then finds no object.
const CONFLICTS: u32 = 5;

/// How long the end of an upload that failed may take; its record is still there for another process.
const ABORT: Duration = Duration::from_secs(3);

/// A bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    name: String,
    client: AmazonS3,
}

/// What [`Bucket::list`] lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The objects directly in a folder.
    Folder,
    /// Those in its folders too.
    All,
}

/// Where requests wait; the threads of a job have none of their own.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let runtime = Builder::new_multi_thread().worker_threads(1).max_blocking_threads(16).enable_time().build();
        runtime.expect("a thread can be started")
    })
}

impl Bucket {
    /// A bucket with the settings of the environment.
    pub fn open(name: &str) -> Result<Bucket, BatchError> {
        let failed = |problem: String| BatchError::File { path: format!("s3://{name}"), problem };
        let connector = Connector::new().map_err(failed)?;
        let builder = AmazonS3Builder::from_env().with_http_connector(connector).with_disable_bulk_delete(true);
        let client = builder.with_bucket_name(name).build().map_err(|error| failed(describe(&error)))?;
        Ok(Bucket { name: name.to_string(), client })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn client(&self) -> &AmazonS3 {
        &self.client
    }

    /// The error of an object.
    pub fn failed(&self, key: impl fmt::Display, error: &Error) -> BatchError {
        BatchError::File { path: format!("{self}/{key}"), problem: describe(error) }
    }

    /// What is known of an object, if there is one.
    pub fn head(&self, key: &str) -> Result<Option<ObjectMeta>, BatchError> {
        let path = self.path(key)?;
        self.found(key, wait(self.client.head(&path)))
    }

    /// The content of an object, if there is one.
    pub fn get(&self, key: &str) -> Result<Option<Bytes>, BatchError> {
        let path = self.path(key)?;
        let get = async { self.client.get_opts(&path, GetOptions::default()).await?.bytes().await };
        self.found(key, wait(get))
    }

    fn found<T>(&self, key: &str, result: Result<T, Error>) -> Result<Option<T>, BatchError> {
        match result {
            Ok(found) => Ok(Some(found)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(key, &error)),
        }
    }

    /// The objects of a folder.
    pub fn list(&self, folder: &str, depth: Depth) -> Result<Vec<ObjectMeta>, BatchError> {
        let path = self.path(folder)?;
        let path = (!folder.is_empty()).then_some(&path);
        let list = async {
            match depth {
                Depth::Folder => Ok(self.client.list_with_delimiter(path).await?.objects),
                Depth::All => self.client.list(path).try_collect().await,
            }
        };
        wait(list).map_err(|error| match folder {
            "" => BatchError::file(self, describe(&error)),
            folder => self.failed(folder, &error),
        })
    }

    /// Writes an object, over an older one.
    pub fn put(&self, key: &str, bytes: Bytes) -> Result<(), BatchError> {
        let path = self.path(key)?;
        wait(self.client.put(&path, bytes.into())).map(|_| ()).map_err(|error| self.failed(key, &error))
    }

    /// Writes an object unless there is one. Returns whether it has.
    pub fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<bool, BatchError> {
        let path = self.path(key)?;
        let payload = PutPayload::from(bytes);
        let mut conflicts = 0;
        loop {
            let put = self.client.put_opts(&path, payload.clone(), PutMode::Create.into());
            match wait(put) {
                Ok(_) => return Ok(true),
                // Stores without conditional writes, with AWS_CONDITIONAL_PUT=disabled. Whoever else writes the object
                // writes the same bytes.
                Err(Error::NotImplemented { .. }) => {
                    let is_new = self.head(key)?.is_none();
                    if is_new {
                        wait(self.client.put(&path, payload)).map_err(|error| self.failed(key, &error))?;
                    }
                    return Ok(is_new);
                }
                // It is also said of two puts at a time, of which none may have written anything.
                Err(error @ Error::AlreadyExists { .. }) => {
                    if self.head(key)?.is_some() {
                        return Ok(false);
                    }
                    conflicts += 1;
                    if conflicts == CONFLICTS {
                        return Err(self.failed(key, &error));
                    }
                    thread::sleep(Duration::from_millis(200));
                }
                Err(error) => return Err(self.failed(key, &error)),
            }
        }
    }

    /// Ends an upload without an object, and then removes its record; whatever fails is left to another process.
    pub fn abort(&self, key: &str, id: &str, record: &str) {
        let (Ok(path), Ok(record)) = (self.path(key), self.path(record)) else { return };
        let id = id.to_string();
        let abort = async {
            match self.client.abort_multipart(&path, &id).await {
                // It has ended already.
                Ok(()) | Err(Error::NotFound { .. }) => drop(self.client.delete(&record).await),
                Err(_) => {}
            }
        };
        let _ = wait(async { tokio::time::timeout(ABORT, abort).await });
    }

    /// The key as object_store wants it.
    pub fn path(&self, key: &str) -> Result<Path, BatchError> {
        Path::parse(key).map_err(|error| BatchError::file(format!("{self}/{key}"), error))
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.name)
    }
}

/// Waits for requests.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    runtime().block_on(future)
}

/// What is wrong, and what to do about it.
pub fn describe(error: &Error) -> String {
    let mut deepest: &dyn StdError = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    let text = deepest.to_string();
    let answer = answer(&text);
    let advice = match error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            "; the credentials are those of AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or of the machine's role"
        }
        Error::Precondition { .. } => "; it has been replaced since it was listed",
        _ if text.contains("NoSuchBucket") => "; AWS_ENDPOINT_URL and AWS_REGION say where it is looked for",
        _ if text.contains("LOCATION") || text.contains("PermanentRedirect") => {
            "; set AWS_REGION to the bucket's region"
        }
        _ if text.contains("501 Not Implemented") => {
            "; if this store has no conditional writes, set AWS_CONDITIONAL_PUT=disabled"
        }
        _ => "",
    };
    format!("{answer}{advice}")
}

/// The status, code and message of an answer that is an error of S3.
fn answer(text: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(inner, _)| inner)
    };
    let status = text.strip_prefix(STATUS).map(|rest| rest.split(':').next().unwrap_or(rest));
    match (status, element("Code"), element("Message")) {
        (Some(status), Some(code), message) => {
            format!("{status}, {code}: {}", message.unwrap_or_default().trim_end_matches('.'))
        }
        (Some(status), None, _) => status.to_string(),
        _ => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_in_a_line() {
        for (text, expected) in [
            (
                "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>",
                "403 Forbidden, AccessDenied: No",
            ),
            ("Server returned non-2xx status code: 403 Forbidden: ", "403 Forbidden"),
            ("Connection refused (os error 111)", "Connection refused (os error 111)"),
        ] {
            assert_eq!(answer(text), expected);
        }
    }
}
