//! Shell completions and man pages, generated from the definitions of the command line.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::arguments::Cli;

/// Prints a completion script.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "t5gemma-export", &mut script);
    Ok(io::stdout().write_all(&script)?)
}

/// Writes a man page for the program and one for each subcommand.
pub fn man_pages(dir: &Path) -> Result<()> {
    let failed = || format!("{}: cannot be written", dir.display());
    fs::create_dir_all(dir).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(failed)
}
