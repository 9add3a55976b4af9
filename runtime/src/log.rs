//! ONNX Runtime's own messages and this library's, for programs that embed this library and have a log of their own. Where no one asks for
//! them, ONNX Runtime writes its errors to stderr.

use std::sync::{Arc, Mutex, PoisonError};

use ort::logging::{LogLevel, LoggerFunction};

/// How grave a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Of interest to developers of ONNX Runtime.
    Verbose,
    /// What is being done.
    Info,
    /// Something is not as it could be, such as a provider that leaves work to the CPU.
    Warning,
    /// Something failed.
    Error,
    /// ONNX Runtime cannot go on.
    Fatal,
}

/// A function that is given messages, from whichever thread they come.
type Log = dyn Fn(Severity, &str) + Send + Sync;

/// Where messages go, and from which severity on.
static LOG: Mutex<Option<(Severity, Arc<Log>)>> = Mutex::new(None);

/// Gives messages of at least `severity` to `log`. It takes effect when the library is loaded, so it is to be called before
/// the first model is opened.
pub fn set(severity: Severity, log: impl Fn(Severity, &str) + Send + Sync + 'static) {
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = Some((severity, Arc::new(log)));
}

/// Gives a message of this library's own to the log, if there is one and it wants it.
pub(crate) fn tell(severity: Severity, message: &str) {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some((_, log)) = log.filter(|(least, _)| severity >= *least) {
        log(severity, message);
    }
}

/// Whether messages below warnings are written, too.
pub(crate) fn wants_more_than_warnings() -> bool {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    matches!(log.as_ref(), Some((Severity::Verbose | Severity::Info, _)))
}

/// The log as `ort` takes it, and the least level that is written.
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
