//! `Error`: everything that can go wrong between a model folder and its answers. Each variant names the file, field, port
//! or row, what was expected and what was found, so that a caller can act on it without reading code.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use t5gemma_graphs::config::ConfigError;
use t5gemma_graphs::manifest::KEPT_TOKENS;

use crate::options::OptionError;
use crate::scores::InvalidScores;

/// What the runtime reports instead of an answer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// No usable ONNX Runtime library: what is wrong, and on a second line how to get one.
    Library {
        /// Where was looked and what was found there.
        problem: String,
        /// The commands that bring a usable library.
        remedy: String,
    },
    /// A file that cannot be read, or is not of its kind.
    File {
        /// The file.
        path: PathBuf,
        /// The system's or the parser's words.
        problem: String,
    },
    /// A model folder whose parts do not agree with its manifest.
    Folder {
        /// The file.
        path: PathBuf,
        /// What of the file: `size`, `sha256`, or a field of the manifest.
        field: String,
        /// What the manifest or this runtime asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A `config.json` that this runtime does not implement.
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        error: ConfigError,
    },
    /// A `generation_config.json` with an option that cannot be taken as it is.
    GenerationConfig {
        /// The file.
        path: PathBuf,
        /// The option.
        error: OptionError,
    },
    /// A graph whose inputs or outputs are not those of its configuration.
    Interface {
        /// The graph's file.
        path: PathBuf,
        /// The first port that differs, such as `input 2`.
        port: String,
        /// The port that the configuration asks for.
        expected: String,
        /// The port of the graph.
        found: String,
    },
    /// A model that is well-formed but that this machine's ONNX Runtime cannot run.
    Unsupported {
        /// What is not supported.
        what: String,
        /// What to do instead.
        remedy: String,
    },
    /// The kernels for CPUs cannot be used as they are told to.
    Kernels(t5gemma_kernels::Error),
    /// ONNX Runtime failed.
    OnnxRuntime {
        /// What was being done.
        during: String,
        /// Its own words.
        message: String,
    },
    /// A request's tokens, mask or lengths are not acceptable.
    Input {
        /// The field, with the row and position where there is one.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// An option of opening or a part of a request requires something else.
    Requires {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What it requires.
        requirement: String,
    },
    /// A generation option is not acceptable.
    Options(OptionError),
    /// Text was given or asked for and the folder's tokenizer cannot serve it.
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The model computed a NaN or an infinity, or a logits processor of the caller's wrote scores that no token can be chosen by.
    NotFinite {
        /// The source row.
        row: usize,
        /// The step, 0 for the first token.
        step: usize,
        /// The model's element type, which decides what helps.
        dtype: t5gemma_graphs::interface::DType,
        /// The processor and what it wrote, if it was not the model.
        processor: Option<InvalidScores>,
    },
    /// A constraint that cannot be followed: a grammar became too complex, or `prefix_allowed_tokens` returned what it may not.
    Constraint {
        /// The source row.
        row: usize,
        /// The grammar's own words, or what was returned.
        problem: String,
    },
    /// A function of the caller's (a logits processor, allowed tokens) panicked.
    Panicked {
        /// The source row.
        row: usize,
    },
    /// A request that an [`Engine`](crate::Engine) can never hold, whatever else it does.
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much the request needs.
        needed: usize,
        /// How much there is in all.
        limit: usize,
    },
    /// An [`Engine`](crate::Engine) with as many requests waiting as it may have.
    Busy {
        /// The requests that wait.
        waiting: usize,
    },
    /// An [`Engine`](crate::Engine) that takes no more requests.
    Closed,
    /// An [`Engine`](crate::Engine), or a request of one, in a process that was forked from the engine's.
    Forked {
        /// The process that has the engine's threads.
        process: u32,
    },
    /// The request's deadline passed before it was done.
    Deadline,
    /// The caller asked to stop.
    Cancelled,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Library { problem, remedy } => write!(f, "{problem}\n{remedy}"),
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
            Error::OnnxRuntime { during, message } => write!(f, "{during}: onnx runtime: {message}"),
            Error::Input { field, expected, found } => write!(f, "{field}: expected {expected}, found {found}"),
            Error::Requires { field, value, requirement } => write!(f, "{field} {value} requires {requirement}"),
            Error::Options(error) => error.fmt(f),
            Error::NotFinite { row, step, processor: Some(fault), .. } => write!(f, "row {row}, step {step}: {fault}"),
            Error::NotFinite { row, step, dtype, processor: None } => {
                write!(f, "row {row}, step {step}: the logits are not finite")?;
                if *dtype == t5gemma_graphs::interface::DType::Float16 {
                    f.write_str("; float16 overflows above 65504, export with --dtype float32")?;
                }
                Ok(())
            }
            Error::Constraint { row, problem } => write!(f, "row {row}: the constraint cannot be followed: {problem}"),
            Error::Panicked { row } => write!(f, "row {row}: a function given with the options panicked"),
            Error::TooLarge { what, needed, limit } => {
                write!(f, "the request needs {needed} {what}, more than the {limit} there may be")
            }
            Error::Busy { waiting } => write!(f, "{waiting} requests are waiting already"),
            Error::Closed => f.write_str("the engine takes no more requests"),
            Error::Forked { process } => write!(
                f,
                "the engine runs in process {process}, from which this process was forked without its threads; start an engine here"
            ),
            Error::Deadline => f.write_str("the deadline has passed"),
            Error::Cancelled => f.write_str("cancelled"),
        }
    }
}

/// What to do about a file that is not the one that was exported.
fn advice(path: &Path, field: &str) -> &'static str {
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    let of_graphs =
        matches!(extension, "onnx" | "onnx_data") || path.ends_with("config.json") || path.ends_with(KEPT_TOKENS);
    match (field, of_graphs) {
        ("sha256" | "sample_sha256" | "size", true) => {
            " (damaged, or of another export: copy the folder again, or export again)"
        }
        ("sha256" | "size", false) => {
            " (changed since export: if that is meant, `t5gemma-export reseal MODEL` accepts it; otherwise export again)"
        }
        _ => "",
    }
}

/// Without a `source`: `Display` says all that there is to say.
impl std::error::Error for Error {}

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
    /// A failure of ONNX Runtime while doing something.
    pub(crate) fn onnxruntime<R>(during: impl Into<String>) -> impl FnOnce(ort::Error<R>) -> Error {
        move |error| Error::OnnxRuntime { during: during.into(), message: error.message().to_string() }
    }

    /// A file that could not be read.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        move |error| Error::File { path: path.into(), problem: error.to_string() }
    }

    /// A part of a request that is not acceptable.
    pub(crate) fn input(field: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Input { field: field.into(), expected: expected.into(), found: found.into() }
    }

    /// An option of opening or a part of a request that requires something else.
    pub(crate) fn requires(
        field: impl Into<String>,
        value: impl Into<String>,
        requirement: impl Into<String>,
    ) -> Error {
        Error::Requires { field: field.into(), value: value.into(), requirement: requirement.into() }
    }
}
