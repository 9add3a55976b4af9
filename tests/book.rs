//! The book, README.md and the other pages for people: `scripts/book.py` runs, compiles or parses every fenced block of
//! them and follows their links, the charts are those of the committed results, and its plan holds in a simulation.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::capi::installed;
use crate::common::{from_make, program, python, stdout, tests};

/// The folder of the programs.
fn programs() -> PathBuf {
    let program = program("t5gemma");
    Path::new(program.get_program()).parent().expect("a program lies in a folder").to_path_buf()
}

#[test]
fn every_block_of_the_pages_does_what_they_say() {
    let mut check = Command::new(from_make("T5GEMMA_PYTHON"));
    check.arg(tests().join("scripts/book.py"));
    check.arg("--programs").arg(programs());
    check.arg("--checkpoint").arg(tests().join("demo/checkpoint"));
    check.arg("--classifier").arg(tests().join("fixtures/tasks/sequence-decoder/checkpoint"));
    check.arg("--prefix").arg(installed().prefix()).arg("--site").arg(installed().site());
    let counts = stdout(check.output().expect("Python runs"));
    // The log of a passing run shows what was done with how many blocks.
    let _ = writeln!(std::io::stderr(), "the book: {}", counts.trim_end().replace('\n', "; "));
}

#[test]
fn generated_pages_tables_and_charts_are_current() {
    let mut check = Command::new(from_make("T5GEMMA_PYTHON"));
    check.arg(tests().join("../docs/generate.py")).arg("--check").arg("--programs").arg(programs());
    stdout(check.output().expect("Python runs"));
}

#[test]
fn the_plan_for_many_documents_holds_in_a_simulation() {
    python::<&str>("simulate_shards.py", []);
}
