//! The program `t5gemma`: parse, run, exit code. Each command has its own file; `requests.rs` reads requests for
//! several of them, `tensors.rs` reads and writes tensor files. Nothing here is an API for other crates.

mod batch;
mod bench;
mod calibrate;
mod classify;
mod doctor;
mod encode;
mod engines;
mod generate;
mod score;
#[cfg(all(feature = "server", unix))]
mod serve;
mod shortlist;
mod verify;

mod chat;
mod images;
mod lines;
mod requests;

mod constraints;
mod flag_errors;
mod opening;
mod options;
mod packing;

mod documents;
mod exit;
mod files;
mod progress;
mod stderr;
mod tensors;

#[doc(hidden)]
pub mod fuzzing;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use t5gemma_runtime::Cancellation;

/// Run T5Gemma models exported by t5gemma-export
///
/// Results are written to stdout, everything else to stderr.
#[derive(Parser)]
#[command(name = "t5gemma", version, after_long_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Export a checkpoint and generate text with four beams:
    t5gemma-export t5gemma-2b-2b-ul2-it model
    t5gemma generate model --num-beams 4 'Translate to German: Good morning.'

  Answer requests from a file:
    t5gemma generate model --jsonl < requests.jsonl > results.jsonl

  Find out why a model does not open:
    t5gemma doctor

Exit status:
  0    success
  1    failure, or some requests failed; the results or stderr say why
  2    invalid arguments
  130  interrupted or terminated";

#[derive(Subcommand)]
enum Command {
    Generate(generate::Arguments),
    Score(score::Arguments),
    Encode(encode::Arguments),
    Classify(classify::Arguments),
    Batch(Box<batch::Arguments>),
    #[cfg(all(feature = "server", unix))]
    Serve(Box<serve::Arguments>),
    Verify(verify::Arguments),
    Bench(bench::Arguments),
    Calibrate(calibrate::Arguments),
    Shortlist(shortlist::Arguments),
    BuildEngines(engines::Arguments),
    Doctor(doctor::Arguments),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// Shell to complete for
        shell: Shell,
    },
    /// Write man pages
    #[command(hide = true)]
    Man {
        /// Folder to write into
        dir: PathBuf,
    },
}

/// How long an interrupt waits for the cancelled call to return.
const GRACE: Duration = Duration::from_millis(300);

/// Exits immediately, without leaving half-written files.
fn end_at_once() -> ! {
    tensors::Aside::remove_all();
    t5gemma_batch::discard_unfinished();
    // Other threads may be within ONNX Runtime, whose destructors `exit` would run beside them.
    #[cfg(unix)]
    // SAFETY: the call has no preconditions and does not return.
    unsafe {
        libc::_exit(130)
    }
    #[cfg(not(unix))]
    std::process::exit(130)
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(options::joined(std::env::args_os()));
    t5gemma_runtime::silence_caught_panics();
    #[cfg(all(feature = "server", unix))]
    if let Command::Serve(arguments) = cli.command {
        // It has its own way to end.
        return exit::status(serve::run(*arguments));
    }
    let cancel = Cancellation::new();
    let handler = cancel.clone();
    let result = ctrlc::set_handler(move || {
        if handler.is_cancelled() {
            end_at_once();
        }
        handler.cancel();
        // Opening a model, reading a file or compiling a constraint cannot be cancelled.
        thread::spawn(|| {
            thread::sleep(GRACE);
            end_at_once();
        });
    })
    .context("cannot set the interrupt handler")
    .and_then(|()| match cli.command {
        Command::Generate(arguments) => generate::run(arguments, &cancel),
        Command::Score(arguments) => score::run(arguments, &cancel),
        Command::Encode(arguments) => encode::run(arguments, &cancel),
        Command::Classify(arguments) => classify::run(arguments, &cancel),
        Command::Batch(arguments) => batch::run(*arguments, &cancel),
        #[cfg(all(feature = "server", unix))]
        Command::Serve(_) => unreachable!("run above"),
        Command::Verify(arguments) => verify::run(arguments, &cancel),
        Command::Bench(arguments) => bench::run(arguments, &cancel),
        Command::Calibrate(arguments) => calibrate::run(arguments, &cancel),
        Command::Shortlist(arguments) => shortlist::run(arguments, &cancel),
        Command::BuildEngines(arguments) => engines::run(arguments),
        Command::Doctor(arguments) => doctor::run(arguments, &cancel),
        Command::Completions { shell } => documents::completions(&mut Cli::command(), shell),
        Command::Man { dir } => documents::man_pages(Cli::command(), &dir),
    });
    exit::status(result)
}
