//! `Error`: errors outside the arithmetic.

use std::fmt;

/// An error of the kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The environment variable that limits the instruction set names no level.
    InstructionSet {
        /// The variable.
        variable: &'static str,
        /// Its value.
        found: String,
    },
    /// No memory for a quantized copy of the head.
    OutOfMemory {
        /// Bits per weight of the copy.
        bits: usize,
        /// The system's message.
        message: String,
    },
    /// The thread pool did not run the tasks of an operator.
    ThreadPool {
        /// The pool's message.
        message: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::InstructionSet { variable, found } => write!(
                f,
                "{variable}: expected generic, avx2, avx512_vnni or avx512_amx, found {found:?}; set it to one of these or unset it"
            ),
            Error::OutOfMemory { bits, message } => write!(f, "no memory for an int{bits} copy of the head: {message}"),
            Error::ThreadPool { message } => write!(f, "thread pool: {message}"),
        }
    }
}

impl std::error::Error for Error {}
