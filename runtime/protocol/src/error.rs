//! Why a request cannot be answered: its form is wrong, or the runtime rejects its content.

use std::fmt;

use t5gemma_runtime::Error;

/// An invalid request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RequestError {
    /// The request is not an object, or a field is missing, unknown or of the wrong form.
    Form {
        /// The field; empty for the whole request.
        field: String,
        /// The forms that are accepted.
        expected: String,
        /// The value that was given, abbreviated.
        found: String,
    },
    /// The bytes are not UTF-8; the message is from [`describe_invalid_utf8`](crate::describe_invalid_utf8).
    Encoding(String),
    /// The text is not JSON: the problem and its position.
    Json(String),
    /// The runtime rejects the request.
    Runtime(Error),
}

impl RequestError {
    /// A field of the wrong form, or the whole request if `field` is empty.
    pub fn form(field: &str, expected: impl Into<String>, found: impl Into<String>) -> RequestError {
        RequestError::Form { field: field.to_string(), expected: expected.into(), found: found.into() }
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestError::Form { field, expected, found } if field.is_empty() => {
                write!(f, "expected {expected}, found {found}")
            }
            RequestError::Form { field, expected, found } => write!(f, "{field}: expected {expected}, found {found}"),
            RequestError::Encoding(problem) => f.write_str(problem),
            RequestError::Json(problem) => write!(f, "expected JSON: {problem}"),
            RequestError::Runtime(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for RequestError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            // Its message is this error's message, so the next cause is its own source.
            RequestError::Runtime(error) => error.source(),
            _ => None,
        }
    }
}

impl From<Error> for RequestError {
    fn from(error: Error) -> RequestError {
        RequestError::Runtime(error)
    }
}
