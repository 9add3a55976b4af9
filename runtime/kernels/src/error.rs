//! `Error`: what can go wrong before or beside the arithmetic.

use std::fmt;

/// What the kernels report instead of a result.
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
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::InstructionSet { variable, found } => {
                write!(
                    f,
                    "{variable}: expected generic, avx2, avx512_vnni or avx512_amx, found {found:?}; set it to one of these or unset it"
                )
            }
        }
    }
}

impl std::error::Error for Error {}
