//! The program `t5gemma`; all of it is in the library beside this file, so that fuzzers reach what reads requests and
//! files.

use std::process::ExitCode;

fn main() -> ExitCode {
    t5gemma_cli::main()
}
