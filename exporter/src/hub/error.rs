//! [`HubError`]: why files of a repository are not there.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::repository::Repository;

/// Why files of a repository are not there.
///
/// `Display` writes one line without the cause, which is the [`source`](StdError::source).
#[derive(Debug)]
#[non_exhaustive]
pub enum HubError {
    /// An environment variable has an invalid value.
    Variable {
        /// The variable.
        name: &'static str,
        /// What would have been accepted.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// There is no such repository, or this user may not see it.
    NoRepository {
        /// The repository.
        repository: Repository,
        /// The server.
        endpoint: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The repository has no such revision.
    NoRevision {
        /// The repository at the revision.
        repository: Repository,
        /// The server.
        endpoint: String,
    },
    /// The repository can be read only after its licence was accepted, or by some users.
    Gated {
        /// The repository.
        repository: Repository,
        /// The server.
        endpoint: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The token is not accepted.
    Token {
        /// The server.
        endpoint: String,
        /// What the server says.
        message: String,
    },
    /// The repository has not the files that are needed.
    Files {
        /// The repository.
        repository: Repository,
        /// The files that would have been accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The server cannot be reached.
    Unreachable {
        /// The server.
        endpoint: String,
        /// What failed.
        failure: String,
    },
    /// The server answers with an error, or with something that is not the hub's.
    Answer {
        /// What was asked for.
        place: String,
        /// What would have been accepted.
        expected: String,
        /// What the answer was.
        found: String,
    },
    /// The network may not be used, and the cache does not have the files.
    Offline {
        /// The repository.
        repository: Repository,
        /// The folder of the cache.
        cache: PathBuf,
    },
    /// A file of the cache cannot be read or written.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What failed, such as `cannot be written`.
        failure: String,
        /// The system's error.
        source: io::Error,
    },
    /// A file that was downloaded cannot be used.
    File(Box<crate::Error>),
    /// The caller cancelled the download.
    Cancelled,
}

impl HubError {
    /// For `map_err` on the system's errors.
    pub(super) fn io(path: &Path, failure: impl Into<String>) -> impl FnOnce(io::Error) -> HubError {
        move |source| HubError::Io { path: path.to_path_buf(), failure: failure.into(), source }
    }

    pub(super) fn answer(place: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> HubError {
        HubError::Answer { place: place.into(), expected: expected.into(), found: found.into() }
    }
}

impl From<crate::Error> for HubError {
    fn from(error: crate::Error) -> HubError {
        HubError::File(Box::new(error))
    }
}

impl fmt::Display for HubError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HubError::Variable { name, expected, found } => write!(f, "{name}: expected {expected}, found {found}"),
            HubError::NoRepository { repository, endpoint, has_token } => {
                let id = repository.id();
                write!(f, "{id}: neither a local folder nor a repository on {endpoint} that ")?;
                f.write_str(if *has_token {
                    "the token gives access to"
                } else {
                    "can be read without a token (for a private one, set HF_TOKEN)"
                })
            }
            HubError::NoRevision { repository, endpoint } => {
                let (id, revision) = (repository.id(), repository.revision().unwrap_or("main"));
                write!(f, "{id}: no branch, tag or commit {revision} on {endpoint}")
            }
            HubError::Gated { repository, endpoint, has_token } => {
                let id = repository.id();
                write!(f, "{id}: access is restricted: accept the licence on {endpoint}/{id}, and ")?;
                if *has_token {
                    f.write_str("use a token of the account that accepted it, which may read gated repositories")
                } else {
                    write!(f, "set HF_TOKEN to a token of your account (from {endpoint}/settings/tokens)")
                }
            }
            HubError::Token { endpoint, message } => {
                write!(f, "{endpoint} does not accept the token in HF_TOKEN or the token file: {message}")
            }
            HubError::Files { repository, expected, found } => {
                write!(f, "{repository}: expected {expected}, found {found}")
            }
            HubError::Unreachable { endpoint, failure } => write!(
                f,
                "{endpoint} cannot be reached: {failure} (HF_ENDPOINT names another server; with HF_HUB_OFFLINE=1 only \
                 the cache is used; a local folder works too)"
            ),
            HubError::Answer { place, expected, found } => write!(f, "{place}: expected {expected}, found {found}"),
            HubError::Offline { repository, cache } => write!(
                f,
                "{repository}: HF_HUB_OFFLINE is set, and the cache {} does not have this repository at this revision",
                cache.display()
            ),
            HubError::Io { path, failure, .. } => write!(f, "{}: {failure}", path.display()),
            HubError::File(error) => error.fmt(f),
            HubError::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl StdError for HubError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            HubError::Io { source, .. } => Some(source),
            HubError::File(error) => error.source(),
            _ => None,
        }
    }
}
