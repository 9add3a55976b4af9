//! Log messages of ONNX Runtime and of this library, for programs with their own log. Without a listener, ONNX Runtime
//! writes its errors to stderr.

use std::sync::{Arc, Mutex, PoisonError};

use ort::logging::{LogLevel, LoggerFunction};

/// The severity of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Debugging messages of ONNX Runtime.
    Verbose,
    /// Progress.
    Info,
    /// A possible problem, such as operators that fall back to the CPU.
    Warning,
    /// Something failed.
    Error,
    /// ONNX Runtime cannot continue.
    Fatal,
}

/// Receives messages, on the threads that they come from.
type Log = dyn Fn(Severity, &str) + Send + Sync;

/// The listener, and the least severity that it receives.
static LOG: Mutex<Option<(Severity, Arc<Log>)>> = Mutex::new(None);

/// Sends messages of at least `severity` to `log`. Takes effect when ONNX Runtime is loaded, so call it before the
/// first model is opened.
pub fn set(severity: Severity, log: impl Fn(Severity, &str) + Send + Sync + 'static) {
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = Some((severity, Arc::new(log)));
}

/// Sends a message of this library to the listener, if its severity is high enough.
pub(crate) fn write(severity: Severity, message: &str) {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some((_, log)) = log.filter(|(least, _)| severity >= *least) {
        log(severity, message);
    }
}

/// Whether messages below warnings are logged.
pub(crate) fn wants_more_than_warnings() -> bool {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    matches!(log.as_ref(), Some((Severity::Verbose | Severity::Info, _)))
}

/// The listener in the form that `ort` takes, and the least level.
pub(crate) fn logger() -> Option<(LogLevel, LoggerFunction)> {
    let (severity, log) = LOG.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
    let logger = move |level: LogLevel, _: &str, _: &str, place: &str, message: &str| {
        log(of_level(level), &format!("{message} ({place})"));
    };
    Some((level_of(severity), Arc::new(logger)))
}

fn level_of(severity: Severity) -> LogLevel {
    match severity {
        Severity::Verbose => LogLevel::Verbose,
        Severity::Info => LogLevel::Info,
        Severity::Warning => LogLevel::Warning,
        Severity::Error => LogLevel::Error,
        Severity::Fatal => LogLevel::Fatal,
    }
}

fn of_level(level: LogLevel) -> Severity {
    match level {
        LogLevel::Verbose => Severity::Verbose,
        LogLevel::Info => Severity::Info,
        LogLevel::Warning => Severity::Warning,
        LogLevel::Error => Severity::Error,
        LogLevel::Fatal => Severity::Fatal,
    }
}
