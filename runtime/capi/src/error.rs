//! Errors as values: a code, a message, and the field at fault. `guarded` is the wall that no panic passes.

use std::any::Any;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use t5gemma_runtime::{Error, OptionError};

use crate::handle::{Handle, Object};

/// `t5g_code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
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

/// What becomes a `t5g_error`.
#[derive(Clone, Debug)]
pub struct Failure {
    code: Code,
    message: CString,
    field: Option<CString>,
}

impl Object for Failure {
    const NAME: &'static str = "t5g_error";
}

/// A text for C, which ends at its first zero.
pub fn c_string(text: impl Into<String>) -> CString {
    CString::new(text.into().replace('\0', "\u{fffd}")).unwrap_or_default()
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: c_string(message), field: None }
    }

    /// Names the field at fault.
    pub fn at(self, field: &str) -> Failure {
        Failure { field: Some(c_string(field)), ..self }
    }

    /// An argument that the header forbids.
    pub fn argument(name: &str, expected: impl Into<String>, found: impl Into<String>) -> Failure {
        Failure::expected(Code::Argument, name, expected, found)
    }

    /// A handle that is none of the kind.
    pub fn handle(name: &str, kind: &str, found: impl Into<String>) -> Failure {
        Failure::expected(Code::Handle, name, format!("a live {kind}"), found)
    }

    pub fn expected(code: Code, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Failure {
        Failure::new(code, format!("{name}: expected {}, found {}", expected.into(), found.into())).at(name)
    }

    pub fn code(&self) -> Code {
        self.code
    }

    #[cfg(test)]
    pub fn message(&self) -> &str {
        self.message.to_str().expect("made of text")
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let message = error.to_string();
        let (code, field) = match error {
            Error::Library { .. } => (Code::Library, None),
            Error::File { .. } => (Code::File, None),
            Error::Folder { field, .. } => (Code::Model, Some(field)),
            Error::Config { error, .. } => (Code::Model, Some(error.field)),
            Error::GenerationConfig { error, .. } => (Code::Model, Some(error.option)),
            Error::Interface { port, .. } => (Code::Model, Some(port)),
            Error::Unsupported { .. } | Error::Kernels(_) => (Code::Unsupported, None),
            Error::OnnxRuntime { .. } => (Code::OnnxRuntime, None),
            Error::Input { field, .. } => (Code::Input, Some(field)),
            Error::Options(error) => (Code::Options, Some(error.option)),
            Error::Tokenizer { .. } => (Code::Tokenizer, None),
            Error::NotFinite { .. } => (Code::NotFinite, None),
            Error::Constraint { .. } => (Code::Constraint, None),
            Error::Cancelled => (Code::Cancelled, None),
            Error::Deadline => (Code::Deadline, Some("deadline_seconds".to_string())),
            Error::TooLarge { .. } => (Code::TooLarge, None),
            Error::Busy { .. } => (Code::Full, None),
            Error::Closed | Error::Forked { .. } => (Code::Closed, None),
            _ => (Code::Internal, None),
        };
        let failure = Failure::new(code, message);
        match field.filter(|field| !field.is_empty()) {
            Some(field) => failure.at(&field),
            None => failure,
        }
    }
}

impl From<OptionError> for Failure {
    fn from(error: OptionError) -> Failure {
        Error::from(error).into()
    }
}

/// Does the work of a function, of which a panic becomes an error too.
pub fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // The library's Rust runtime is its own, so this replaces no hook of the host's.
    t5gemma_runtime::silence_caught_panics();
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(of_panic(panic)))
}

fn of_panic(panic: Box<dyn Any + Send>) -> Failure {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    // What was thrown may itself panic when it is dropped.
    std::mem::forget(panic);
    Failure::new(Code::Internal, format!("a bug of t5gemma: {}", text.unwrap_or_else(|| "a panic".to_string())))
}

/// A function that returns a `t5g_error *`.
pub fn fallible(work: impl FnOnce() -> Result<(), Failure>) -> Handle<Failure> {
    match guarded(work) {
        Ok(()) => Handle::NULL,
        Err(failure) => Handle::new(failure),
    }
}

/// A function that returns a value, and `otherwise` where it cannot.
pub fn value<T>(otherwise: T, work: impl FnOnce() -> Result<T, Failure>) -> T {
    guarded(work).unwrap_or(otherwise)
}

/// A function that frees.
pub fn free<O: Object>(handle: Handle<O>, argument: &str) -> i32 {
    match guarded(|| handle.free(argument)) {
        Ok(()) => Code::Ok as i32,
        Err(failure) => failure.code() as i32,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_code(error: Handle<Failure>) -> i32 {
    value(Code::Handle as i32, || Ok(error.get("error")?.code as i32))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_message(error: Handle<Failure>) -> *const c_char {
    const NONE: &std::ffi::CStr = c"no t5g_error, or one that was freed";
    value(NONE.as_ptr(), || Ok(error.get("error")?.message.as_ptr()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_field(error: Handle<Failure>) -> *const c_char {
    value(ptr::null(), || Ok(error.get("error")?.field.as_ref().map_or(ptr::null(), |field| field.as_ptr())))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_free(error: Handle<Failure>) -> i32 {
    free(error, "error")
}
