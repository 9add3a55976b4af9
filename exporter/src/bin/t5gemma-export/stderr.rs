//! Messages for people on stderr. `eprintln!` panics if stderr is closed or its disk is full; [`note`] goes on, because
//! results and the exit status do not depend on who reads the messages.

use std::fmt;
use std::io::{self, Write};

/// Writes a line to stderr, with the arguments of `format!`.
macro_rules! note {
    ($($message:tt)*) => {
        $crate::stderr::write(format_args!($($message)*))
    };
}

pub(crate) use note;

/// Writes a line to stderr if it can be written.
pub fn write(message: fmt::Arguments) {
    // In one piece, so that lines of several threads are not mixed.
    let _ = io::stderr().write_all(format!("{message}\n").as_bytes());
}
