//! The program `t5gemma`: parse, run, exit code. Each command is a file; `requests.rs` reads requests for several
//! of them, `tensors.rs` the files of numbers that are read and written. Nothing here is an interface for other crates.

mod bench;
mod calibrate;
mod classify;
mod doctor;
mod encode;
mod engines;
mod generate;
mod score;
mod shortlist;
mod verify;

mod chat;
mod lines;
mod requests;

mod constraints;
mod flag_errors;
mod opening;
mod options;
mod packing;

mod exit;
mod files;
mod progress;
mod tensors;

#[doc(hidden)]
pub mod fuzzing;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use t5gemma_runtime::Cancellation;

/// Runs T5Gemma models that t5gemma-export has written.
///
/// Results go to stdout, everything else to stderr.
#[derive(Parser)]
#[command(version, after_help = EXIT_STATUS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status:
  0    done
  1    failed, or some request failed: the reason is on stderr or in its result
  2    wrong arguments: unknown, with a value that they cannot have, or
       contradicting each other
  130  interrupted or terminated";

#[derive(Subcommand)]
enum Command {
    Generate(generate::Arguments),
    Score(score::Arguments),
    Encode(encode::Arguments),
    Classify(classify::Arguments),
    Verify(verify::Arguments),
    Bench(bench::Arguments),
    Calibrate(calibrate::Arguments),
    Shortlist(shortlist::Arguments),
    BuildEngines(engines::Arguments),
    Doctor(doctor::Arguments),
}

/// How long an interrupt waits for what was asked to end.
const GRACE: Duration = Duration::from_millis(300);

/// Ends the program wherever it is, without leaving files half written.
fn end_at_once() -> ! {
    tensors::Aside::remove_all();
    std::process::exit(130);
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(options::joined(std::env::args_os()));
    t5gemma_runtime::silence_caught_panics();
    let cancel = Cancellation::new();
    let handler = cancel.clone();
    let result = ctrlc::set_handler(move || {
        if handler.is_cancelled() {
            end_at_once();
        }
        handler.cancel();
        // Opening a model, reading a text or compiling a constraint cannot be cancelled.
        thread::spawn(|| {
            thread::sleep(GRACE);
            end_at_once();
        });
    })
    .context("the interrupt handler cannot be set")
    .and_then(|()| match cli.command {
        Command::Generate(arguments) => generate::run(arguments, &cancel),
        Command::Score(arguments) => score::run(arguments, &cancel),
        Command::Encode(arguments) => encode::run(arguments, &cancel),
        Command::Classify(arguments) => classify::run(arguments, &cancel),
        Command::Verify(arguments) => verify::run(arguments, &cancel),
        Command::Bench(arguments) => bench::run(arguments, &cancel),
        Command::Calibrate(arguments) => calibrate::run(arguments, &cancel),
        Command::Shortlist(arguments) => shortlist::run(arguments, &cancel),
        Command::BuildEngines(arguments) => engines::run(arguments),
        Command::Doctor(arguments) => doctor::run(arguments),
    });
    exit::status(result)
}
