//! Shell completions and man pages, generated from the definitions of the command line.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

use crate::exit::Outcome;

/// Prints a completion script.
pub fn completions(command: &mut Command, shell: Shell) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "t5gemma", &mut script);
    io::stdout().write_all(&script)?;
    Ok(Outcome::Done)
}

/// Writes a man page for the program and one for each subcommand.
pub fn man_pages(command: Command, dir: &Path) -> Result<Outcome> {
    let failed = || format!("{}: cannot be written", dir.display());
    fs::create_dir_all(dir).with_context(failed)?;
    clap_mangen::generate_to(command, dir).with_context(failed)?;
    Ok(Outcome::Done)
}
