//! How a command ends: its outcome, errors in the arguments, and the exit status of each.

use std::fmt;
use std::io;
use std::process::ExitCode;

use anyhow::Result;
use t5gemma_runtime::Error;

use crate::stderr::note;

/// The outcome of a command that ran to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything succeeded.
    Done,
    /// Some requests failed; the reasons are on stderr or in their results.
    SomeFailed,
}

/// Contradictory arguments, or an argument with an invalid value.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Returns a [`Usage`] error from the function.
macro_rules! bail_usage {
    ($($message:tt)*) => {
        return Err(anyhow::Error::new($crate::exit::Usage(format!($($message)*))))
    };
}

/// Returns a [`Usage`] error from the function unless the condition holds.
macro_rules! ensure_usage {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            $crate::exit::bail_usage!($($message)*);
        }
    };
}

pub(crate) use {bail_usage, ensure_usage};

/// Reports an error of the command on stderr and returns the program's exit status.
pub fn status(result: Result<Outcome>) -> ExitCode {
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::SomeFailed) => ExitCode::FAILURE,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if matches!(error.downcast_ref(), Some(Error::Cancelled)) => ExitCode::from(130),
        Err(error) => {
            note!("t5gemma: {error:#}");
            match error.downcast_ref::<Usage>() {
                Some(_) => ExitCode::from(2),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe))
}
