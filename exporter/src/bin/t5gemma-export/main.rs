//! The program `t5gemma-export`: parse, run, exit status.

mod adapt;
mod arguments;
mod custom;
mod documents;
mod export;
mod flags;
#[cfg(feature = "hub")]
mod hub;
mod progress;
mod stderr;
mod values;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use serde::Serialize;
use t5gemma_exporter::{check, inspect, reseal};

use arguments::{Cli, Command, ExportAlone};
use flags::Flags;
use stderr::note;

fn main() -> ExitCode {
    let cli = parse();
    let flags = Flags::new(&cli.export);
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let result = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .context("cannot set the interrupt handler")
        .and_then(|()| run(cli, &interrupted));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            note!("t5gemma-export: interrupted; no output was left behind");
            ExitCode::from(130)
        }
        Err(error) => {
            note!("t5gemma-export: {}", flags.message(&error));
            ExitCode::from(flags::exit_status(&error))
        }
    }
}

fn parse() -> Cli {
    let first = std::env::args().nth(1);
    let is_first = |name: &str| first.as_deref() == Some(name);
    if is_first("help") || Cli::command().get_subcommands().any(|command| is_first(command.get_name())) {
        return Cli::parse();
    }
    match ExportAlone::try_parse() {
        Ok(ExportAlone { export }) => Cli { command: None, export },
        // Help and version are those of the whole program.
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Cli::parse(),
        Err(error) => error.exit(),
    }
}

fn run(cli: Cli, interrupted: &AtomicBool) -> Result<()> {
    match cli.command {
        None => export::export(cli.export, interrupted),
        Some(Command::Adapt(args)) => adapt::adapt(args, interrupted),
        Some(Command::Inspect { dir, json }) => {
            let report = inspect(&dir)?;
            if json { print_json(&report) } else { print(&report) }
        }
        Some(Command::Check { path, target, json }) => {
            let report = check(&path, target)?;
            if json { print_json(&report) } else { print(&report) }?;
            let findings = report.findings.len();
            if findings > 0 {
                bail!("{target} does not accept {}: {findings} findings", path.display());
            }
            Ok(())
        }
        Some(Command::Reseal { dir }) => {
            let changes = reseal(&dir)?;
            let changes = if changes.is_empty() { "no changes".to_string() } else { changes.join(", ") };
            note!("resealed {}: {changes}", dir.display());
            Ok(())
        }
        Some(Command::Completions { shell }) => documents::completions(shell),
        Some(Command::Man { dir }) => documents::man_pages(&dir),
    }
}

fn print(report: &impl ToString) -> Result<()> {
    Ok(io::stdout().write_all(report.to_string().as_bytes())?)
}

fn print_json(report: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string_pretty(report)? + "\n"))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
