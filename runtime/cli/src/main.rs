//! The program `t5gemma`. All of it is in the library next to this file, so that fuzzers can call the code that reads
//! requests and files.

use std::process::ExitCode;

fn main() -> ExitCode {
    t5gemma_cli::main()
}
