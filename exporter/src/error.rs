//! [`Error`]: why an export, an adaptation, an inspection or a check failed.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use t5gemma_graphs::config::ConfigError;

use crate::settings::SettingError;

/// Why an export, an adaptation, an inspection or a check failed.
///
/// `Display` writes one line without the cause, which is the [`source`](StdError::source).
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Options of an [`Export`](crate::Export) contradict each other or do not fit the checkpoint.
    Setting(SettingError),
    /// A file or folder cannot be read or written.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What failed, such as `cannot be read`.
        failure: String,
        /// The system's error.
        source: io::Error,
    },
    /// A file or folder, or a field of a file, is not as expected.
    Invalid {
        /// The file or folder, or where a configuration without a file comes from.
        place: String,
        /// The field or tensor.
        field: Option<String>,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file cannot be parsed.
    Parse {
        /// The file.
        path: PathBuf,
        /// What the file should be, such as `an ONNX model`.
        expected: &'static str,
        /// The parser's error.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The tensors of a checkpoint do not match its `config.json`.
    Tensors {
        /// The folder or file of the checkpoint.
        checkpoint: PathBuf,
        /// One line for each tensor that is missing or has another shape.
        mismatches: Vec<String>,
        /// The probable cause, or empty.
        hint: String,
    },
    /// The checkpoints that should become one have different tokenizers.
    TokenizersDiffer {
        /// The file in which they differ.
        file: String,
        /// The bytes of the encoder's; `None` if there is no such file.
        encoder: Option<u64>,
        /// The same for the decoder's.
        decoder: Option<u64>,
    },
    /// The output folder exists, is not empty, and may not be replaced.
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// The output folder holds something other than an exported model.
    NotReplaced {
        /// The folder, or the file in it that is in the way.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The caller cancelled the export or adaptation.
    Cancelled,
}

/// The library's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err` on the system's errors.
    pub(crate) fn io(path: &Path, failure: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { path: path.to_path_buf(), failure: failure.into(), source }
    }

    pub(crate) fn invalid(place: impl fmt::Display, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Invalid { place: place.to_string(), field: None, expected: expected.into(), found: found.into() }
    }

    /// A field of the configuration that comes from `place`.
    pub(crate) fn config(place: impl fmt::Display, error: ConfigError) -> Error {
        let invalid = Error::invalid(place, error.expected, error.found);
        if error.field.is_empty() { invalid } else { invalid.of(error.field) }
    }

    /// The same with a field or tensor.
    pub(crate) fn of(self, name: impl Into<String>) -> Error {
        match self {
            Error::Invalid { place, expected, found, .. } => {
                Error::Invalid { place, field: Some(name.into()), expected, found }
            }
            error => error,
        }
    }

    /// The same with what the file or tensors are for, such as `encoder`.
    pub(crate) fn on(self, side: impl fmt::Display) -> Error {
        match self {
            Error::Invalid { place, field, expected, found } => {
                Error::Invalid { place: format!("{side}: {place}"), field, expected, found }
            }
            Error::Tensors { checkpoint, mismatches, hint } => {
                let mismatches = mismatches.into_iter().map(|mismatch| format!("{side}: {mismatch}")).collect();
                Error::Tensors { checkpoint, mismatches, hint }
            }
            error => error,
        }
    }
}

impl From<SettingError> for Error {
    fn from(error: SettingError) -> Error {
        Error::Setting(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Setting(error) => error.fmt(f),
            Error::Io { path, failure, .. } => write!(f, "{}: {failure}", path.display()),
            Error::Invalid { place, field: None, expected, found } => {
                write!(f, "{place}: expected {expected}, found {found}")
            }
            Error::Invalid { place, field: Some(field), expected, found } => {
                write!(f, "{place}: {field}: expected {expected}, found {found}")
            }
            Error::Parse { path, expected, .. } => write!(f, "{}: not {expected}", path.display()),
            Error::Tensors { checkpoint, mismatches, hint } => {
                write!(f, "{}: the tensors do not match config.json", checkpoint.display())?;
                if let Some(first) = mismatches.first() {
                    write!(f, ": {first}")?;
                }
                if mismatches.len() > 1 {
                    write!(f, " (and {} more)", mismatches.len() - 1)?;
                }
                if hint.is_empty() { Ok(()) } else { write!(f, "; {hint}") }
            }
            Error::TokenizersDiffer { file, encoder, decoder } => {
                let size = |bytes: &Option<u64>| bytes.map_or("no file".to_string(), |bytes| format!("{bytes} bytes"));
                let (encoder, decoder) = (size(encoder), size(decoder));
                write!(
                    f,
                    "{file}: expected the same in both checkpoints, found different ones: {encoder} (encoder), {decoder} (decoder)"
                )
            }
            Error::OutputExists { path } => write!(f, "{}: exists and is not empty", path.display()),
            Error::NotReplaced { path, reason } => write!(f, "{}: not replaced: {reason}", path.display()),
            Error::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Parse { source, .. } => Some(&**source),
            _ => None,
        }
    }
}

/// A text that cannot be parsed as a [`ServingPlan`](crate::ServingPlan), [`MemorySize`](crate::MemorySize) or
/// [`TensorRtVersion`](crate::TensorRtVersion).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError(String);

impl ParseError {
    pub(crate) fn new(message: impl Into<String>) -> ParseError {
        ParseError(message.into())
    }

    pub(crate) fn expected(expected: impl fmt::Display, found: impl fmt::Display) -> ParseError {
        ParseError(format!("expected {expected}, found {found}"))
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for ParseError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_and_keep_their_cause() {
        let io = Error::io(Path::new("a/b"), "cannot be read")(io::Error::other("broken disk"));
        let parse = Error::Parse { path: "a.onnx".into(), expected: "an ONNX model", source: "truncated".into() };
        let mismatches = vec!["a: missing".to_string(), "b: missing".to_string()];
        let tensors = Error::Tensors { checkpoint: "c".into(), mismatches, hint: "merge the adapter".into() };
        for (error, message, source) in [
            (io, "a/b: cannot be read", Some("broken disk")),
            (parse, "a.onnx: not an ONNX model", Some("truncated")),
            (Error::invalid("a.json", "an object", "[]"), "a.json: expected an object, found []", None),
            (Error::invalid("a.json", "8", "9").of("head"), "a.json: head: expected 8, found 9", None),
            (tensors, "c: the tensors do not match config.json: a: missing (and 1 more); merge the adapter", None),
        ] {
            assert_eq!(error.to_string(), message);
            assert_eq!(error.source().map(ToString::to_string).as_deref(), source, "{message}");
        }
    }
}
