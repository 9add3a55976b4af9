//! Errors as values: a code, a message, and the field at fault.

use std::ffi::{CStr, CString};
use std::time::Duration;

use t5gemma_protocol::RequestError;
use t5gemma_runtime::{Error, OptionError};

/// `t5g_code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum t5g_code {
    Ok = 0,
    Argument = 1,
    Handle = 2,
    Busy = 3,
    Buffer = 4,
    Library = 5,
    File = 6,
    Model = 7,
    Unsupported = 8,
    Tokenizer = 9,
    Input = 10,
    Options = 11,
    Constraint = 12,
    NotFinite = 13,
    OnnxRuntime = 14,
    Cancelled = 15,
    Deadline = 16,
    Internal = 17,
    TooLarge = 18,
    Full = 19,
    Closed = 20,
}

/// A `t5g_error`.
#[derive(Clone, Debug)]
pub struct t5g_error {
    code: t5g_code,
    message: CString,
    field: Option<CString>,
    retry_after: Duration,
}

/// A zero-terminated text for C; zeros in it are replaced.
pub fn c_string(text: impl Into<String>) -> CString {
    CString::new(text.into().replace('\0', "\u{fffd}")).unwrap_or_default()
}

impl t5g_error {
    pub fn new(code: t5g_code, message: impl Into<String>) -> t5g_error {
        t5g_error { code, message: c_string(message), field: None, retry_after: Duration::ZERO }
    }

    /// Sets the field at fault.
    pub fn at(self, field: &str) -> t5g_error {
        t5g_error { field: Some(c_string(field)), ..self }
    }

    /// An argument that the header does not allow.
    pub fn argument(name: &str, expected: impl Into<String>, found: impl Into<String>) -> t5g_error {
        t5g_error::expected(t5g_code::Argument, name, expected, found)
    }

    /// A handle of another type, or that is not live.
    pub fn handle(name: &str, kind: &str, found: impl Into<String>) -> t5g_error {
        t5g_error::expected(t5g_code::Handle, name, format!("a live {kind}"), found)
    }

    pub fn expected(code: t5g_code, name: &str, expected: impl Into<String>, found: impl Into<String>) -> t5g_error {
        t5g_error::new(code, format!("{name}: expected {}, found {}", expected.into(), found.into())).at(name)
    }

    pub fn code(&self) -> t5g_code {
        self.code
    }

    pub fn message(&self) -> &CStr {
        &self.message
    }

    /// When to try again; zero if that is unknown.
    pub fn retry_after(&self) -> Duration {
        self.retry_after
    }

    /// The message as text.
    #[cfg(test)]
    pub fn text(&self) -> &str {
        self.message.to_str().expect("made of text")
    }

    pub fn field(&self) -> Option<&CStr> {
        self.field.as_deref()
    }
}

/// The error and its sources, in one line.
fn with_sources(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl From<Error> for t5g_error {
    fn from(error: Error) -> t5g_error {
        let message = with_sources(&error);
        let retry_after = if let Error::Full { retry_after, .. } = &error { *retry_after } else { Duration::ZERO };
        let (code, field) = match error {
            Error::Library { .. } => (t5g_code::Library, None),
            Error::Io { .. } | Error::File { .. } => (t5g_code::File, None),
            Error::Folder { field, .. } => (t5g_code::Model, Some(field)),
            Error::Config { error, .. } => (t5g_code::Model, Some(error.field)),
            Error::GenerationConfig { error, .. } => (t5g_code::Model, Some(error.option)),
            Error::Interface { port, .. } => (t5g_code::Model, Some(port)),
            Error::Unsupported { .. } | Error::Kernels(_) => (t5g_code::Unsupported, None),
            Error::OnnxRuntime { .. } => (t5g_code::OnnxRuntime, None),
            Error::Input { field, .. } | Error::Requires { field, .. } => (t5g_code::Input, Some(field)),
            Error::Options(error) => (t5g_code::Options, Some(error.option)),
            Error::Tokenizer { .. } => (t5g_code::Tokenizer, None),
            Error::NotFinite { .. } => (t5g_code::NotFinite, None),
            Error::Constraint { .. } => (t5g_code::Constraint, None),
            Error::Cancelled => (t5g_code::Cancelled, None),
            Error::Deadline => (t5g_code::Deadline, Some("deadline_seconds".to_string())),
            Error::TooLarge { .. } => (t5g_code::TooLarge, None),
            Error::Full { .. } => (t5g_code::Full, None),
            Error::Closed | Error::Forked { .. } | Error::ForkedInCall => (t5g_code::Closed, None),
            _ => (t5g_code::Internal, None),
        };
        let error = t5g_error { retry_after, ..t5g_error::new(code, message) };
        match field.filter(|field| !field.is_empty()) {
            Some(field) => error.at(&field),
            None => error,
        }
    }
}

impl From<RequestError> for t5g_error {
    fn from(error: RequestError) -> t5g_error {
        match error {
            RequestError::Runtime(error) => error.into(),
            RequestError::Form { field, expected, found } => {
                t5g_error::expected(t5g_code::Input, &field, expected, found)
            }
            other => t5g_error::new(t5g_code::Input, other.to_string()),
        }
    }
}

impl From<OptionError> for t5g_error {
    fn from(error: OptionError) -> t5g_error {
        Error::from(error).into()
    }
}
