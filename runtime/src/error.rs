//! `Error`: everything that can go wrong between a model folder and its results. Each variant names the file, field,
//! port or row, what was expected and what was found, so that a caller can act on it without reading code.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use t5gemma_graphs::config::ConfigError;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::manifest::KEPT_TOKENS;

use crate::options::OptionError;
use crate::scores::InvalidScores;

/// An error of the runtime.
///
/// `Display` writes one line. It leaves out a [`source`](std::error::Error::source), which [`Error::Io`] has.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// No usable ONNX Runtime library.
    Library {
        /// Where it was searched for and what was found there.
        problem: String,
        /// How to install a usable library.
        remedy: String,
    },
    /// A file or folder that cannot be read or written.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What failed: `cannot be read` or `cannot be written`.
        failure: &'static str,
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// A file with unexpected contents.
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A model folder that does not match its manifest.
    Folder {
        /// The file.
        path: PathBuf,
        /// The property of the file, such as `size` or `sha256`, or a field of the manifest.
        field: String,
        /// What the manifest or this runtime requires.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A `config.json` that this runtime does not support.
    Config {
        /// The file.
        path: PathBuf,
        /// The field at fault.
        error: ConfigError,
    },
    /// A `generation_config.json` with an invalid option.
    GenerationConfig {
        /// The file.
        path: PathBuf,
        /// The option at fault.
        error: OptionError,
    },
    /// A graph whose inputs or outputs do not match its configuration.
    Interface {
        /// The graph's file.
        path: PathBuf,
        /// The first one that differs, such as `input 2`.
        port: String,
        /// The port that the configuration implies.
        expected: String,
        /// The port of the graph.
        found: String,
    },
    /// A valid request that this machine, this build or this model cannot serve.
    Unsupported {
        /// What is not supported.
        what: String,
        /// What to do instead.
        remedy: String,
    },
    /// The CPU kernels cannot be used.
    Kernels(t5gemma_kernels::Error),
    /// ONNX Runtime failed.
    OnnxRuntime {
        /// What was being done.
        during: String,
        /// Its message.
        message: String,
    },
    /// A part of a request, or an open option, has an invalid value.
    Input {
        /// The field, with the row and position where there is one.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A part of a request, or an open option, requires something else.
    Requires {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What it requires.
        requirement: String,
    },
    /// A generation option is invalid.
    Options(OptionError),
    /// A call needs a tokenizer, and the folder has no usable one.
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The model computed NaN or infinity, or a caller's logits processor wrote scores from which no token can be
    /// chosen.
    NotFinite {
        /// The source row.
        row: usize,
        /// The step, 0 for the first token.
        step: usize,
        /// The model's dtype, on which the remedy depends.
        dtype: DType,
        /// The processor at fault and what it wrote; `None` if it is the model.
        processor: Option<InvalidScores>,
    },
    /// A constraint failed during generation: a grammar became too complex, or `prefix_allowed_tokens` returned
    /// invalid tokens.
    Constraint {
        /// The source row.
        row: usize,
        /// The grammar's error, or what was returned.
        problem: String,
    },
    /// A callback (a logits processor or `prefix_allowed_tokens`) panicked.
    Panicked {
        /// The source row.
        row: usize,
    },
    /// A request that an [`Engine`](crate::Engine) can never hold.
    TooLarge {
        /// The resource.
        what: &'static str,
        /// How much the request needs.
        needed: usize,
        /// The engine's limit.
        limit: usize,
    },
    /// An [`Engine`](crate::Engine) whose queue is full.
    Full {
        /// The resource whose limit is reached: requests, rows, tokens or bytes.
        what: &'static str,
        /// How much of it is waiting.
        waiting: usize,
        /// The engine's limit.
        limit: usize,
        /// When to submit again: see [`Engine::retry_after`](crate::Engine::retry_after).
        retry_after: Duration,
    },
    /// An [`Engine`](crate::Engine) that accepts no more requests.
    Closed,
    /// An [`Engine`](crate::Engine), or a request of one, in a process forked from the engine's.
    Forked {
        /// The process that has the engine's threads.
        process: u32,
    },
    /// Something opened before a process was forked during a call, in the child, where its locks may be held by threads
    /// that do not exist.
    ForkedInCall,
    /// The request's deadline passed before it was done.
    Deadline,
    /// The caller cancelled the call.
    Cancelled,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Library { problem, remedy } => write!(f, "{problem}; {remedy}"),
            Error::Io { path, failure, .. } => write!(f, "{}: {failure}", path.display()),
            Error::File { path, problem } | Error::Tokenizer { path, problem } => {
                write!(f, "{}: {problem}", path.display())
            }
            Error::Folder { path, field, expected, found } => {
                write!(f, "{}: {field}: expected {expected}, found {found}", path.display())?;
                f.write_str(advice(path, field))
            }
            Error::Config { path, error } => write!(f, "{}: {error}", path.display()),
            Error::GenerationConfig { path, error } => write!(f, "{}: {error}", path.display()),
            Error::Interface { path, port, expected, found } => {
                write!(f, "{}: {port}: expected {expected}, found {found}", path.display())
            }
            Error::Unsupported { what, remedy } => write!(f, "{what}; {remedy}"),
            Error::Kernels(error) => error.fmt(f),
            Error::OnnxRuntime { during, message } => write!(f, "{during}: ONNX Runtime: {message}"),
            Error::Input { field, expected, found } => write!(f, "{field}: expected {expected}, found {found}"),
            Error::Requires { field, value, requirement } => write!(f, "{field} {value} requires {requirement}"),
            Error::Options(error) => error.fmt(f),
            Error::NotFinite { row, step, processor: Some(fault), .. } => write!(f, "row {row}, step {step}: {fault}"),
            Error::NotFinite { row, step, dtype, processor: None } => {
                write!(f, "row {row}, step {step}: the logits are not finite")?;
                if *dtype == DType::Float16 {
                    f.write_str("; float16 overflows above 65504, so export with dtype float32")?;
                }
                Ok(())
            }
            Error::Constraint { row, problem } => write!(f, "row {row}: the constraint failed: {problem}"),
            Error::Panicked { row } => {
                write!(f, "row {row}: a callback (logits_processor or prefix_allowed_tokens) panicked")
            }
            Error::TooLarge { what, needed, limit } => {
                write!(f, "the request needs {needed} {what}, but the engine's limit is {limit}")
            }
            Error::Full { what, waiting, limit, retry_after } => {
                let seconds = retry_after.as_secs_f64().ceil().max(1.0);
                write!(
                    f,
                    "the queue is full ({waiting} {what} are waiting, the limit is {limit}); try again in {seconds} s"
                )
            }
            Error::Closed => f.write_str("the engine accepts no more requests"),
            Error::Forked { process } => write!(
                f,
                "the engine belongs to process {process}, from which this process was forked; start an engine after forking"
            ),
            Error::ForkedInCall => f.write_str(
                "this process was forked during a call that uses ONNX Runtime; open the model again in this process",
            ),
            Error::Deadline => f.write_str("the deadline has passed"),
            Error::Cancelled => f.write_str("cancelled"),
        }
    }
}

/// What to do about a file that differs from the exported one.
fn advice(path: &Path, field: &str) -> &'static str {
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    let of_graphs =
        matches!(extension, "onnx" | "onnx_data") || path.ends_with("config.json") || path.ends_with(KEPT_TOKENS);
    match (field, of_graphs) {
        ("sha256" | "sample_sha256" | "size", true) => {
            " (damaged, or from another export: copy the folder again, or export again)"
        }
        ("sha256" | "size", false) => {
            " (changed since the export: if intended, run `t5gemma-export reseal MODEL`, otherwise export again)"
        }
        _ => "",
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(&**source),
            _ => None,
        }
    }
}

impl From<t5gemma_kernels::Error> for Error {
    fn from(error: t5gemma_kernels::Error) -> Error {
        Error::Kernels(error)
    }
}

impl From<OptionError> for Error {
    fn from(error: OptionError) -> Error {
        Error::Options(error)
    }
}

impl Error {
    /// For `map_err` on ONNX Runtime's errors; `during` is what was being done.
    pub(crate) fn onnxruntime<R>(during: impl Into<String>) -> impl FnOnce(ort::Error<R>) -> Error {
        move |error| Error::OnnxRuntime { during: during.into(), message: error.message().to_string() }
    }

    /// For `map_err` on the system's errors in reading.
    pub(crate) fn reading(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::Io { path: path.into(), failure: "cannot be read", source: Arc::new(error) }
    }

    /// For `map_err` on the system's errors in writing.
    pub(crate) fn writing(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::Io { path: path.into(), failure: "cannot be written", source: Arc::new(error) }
    }

    /// A value that is refused.
    pub(crate) fn input(field: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Input { field: field.into(), expected: expected.into(), found: found.into() }
    }

    /// A value that requires something else.
    pub(crate) fn requires(
        field: impl Into<String>,
        value: impl Into<String>,
        requirement: impl Into<String>,
    ) -> Error {
        Error::Requires { field: field.into(), value: value.into(), requirement: requirement.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_file_error_has_the_systems_error_as_its_source() {
        let error = Error::reading("model/manifest.json")(io::ErrorKind::PermissionDenied.into());
        assert_eq!(error.to_string(), "model/manifest.json: cannot be read");
        let source = error.source().and_then(|source| source.downcast_ref::<io::Error>()).expect("an io::Error");
        assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
        let other = Error::input("threads", "1 to 1024", "0");
        assert_eq!(
            (other.to_string().as_str(), other.source().is_none()),
            ("threads: expected 1 to 1024, found 0", true)
        );
    }
}
