//! Why a job cannot run, or a shard cannot be finished.

use std::fmt;

use t5gemma_runtime::Error;

/// An error of a job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum BatchError {
    /// Arguments that contradict each other or the output folder: a retry fails again.
    Arguments(String),
    /// A file or folder that cannot be used.
    File {
        /// Its path or URL.
        path: String,
        /// What is wrong.
        problem: String,
    },
    /// The runtime failed.
    Runtime(Error),
}

impl BatchError {
    pub(crate) fn file(path: impl fmt::Display, problem: impl fmt::Display) -> BatchError {
        BatchError::File { path: path.to_string(), problem: problem.to_string() }
    }
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BatchError::Arguments(problem) => f.write_str(problem),
            BatchError::File { path, problem } => write!(f, "{path}: {problem}"),
            BatchError::Runtime(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BatchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            // Its message is this error's message, so the next cause is its own source.
            BatchError::Runtime(error) => error.source(),
            _ => None,
        }
    }
}

impl From<Error> for BatchError {
    fn from(error: Error) -> BatchError {
        BatchError::Runtime(error)
    }
}
