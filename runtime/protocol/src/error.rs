//! Why a request cannot be answered: its own form, or what the runtime says of its content.

use std::fmt;

use t5gemma_runtime::Error;

/// An unacceptable request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RequestError {
    /// The request is not an object, or a field is missing, unknown or of the wrong form.
    Form {
        /// The field, or the empty string for the request as a whole.
        field: String,
        /// The forms that are accepted.
        expected: String,
        /// The value that was given, abbreviated.
        found: String,
    },
    /// The bytes are not UTF-8, as [`describe_invalid_utf8`](crate::describe_invalid_utf8) says.
    Encoding(String),
    /// The text is not JSON: the problem and its place.
    Json(String),
    /// The runtime refuses the request.
    Runtime(Error),
}

impl RequestError {
    /// A field, or with an empty name the request, of the wrong form.
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
            // Its text is this error's, so that what comes next is its source.
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
