//! `t5gemma build-engines`: the engines of a serving plan, built before anyone asks for anything.

use std::time::Instant;

use anyhow::{Result, ensure};
use t5gemma_runtime::{ExistingEngines, build_engines};

use crate::exit::Outcome;
use crate::opening::Opening;

/// Has --provider tensorrt or nv-tensorrt-rtx build its engines for the GPU of this machine, into the folder `engines` of the
/// model or of --engines DIR
///
/// The model has to be exported with --target tensorrt and a --plan. What is there for the same graphs is used again; what is
/// there for others is refused.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    opening: Opening,
    /// Remove what is there, and build anew
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<Outcome> {
    ensure!(!arguments.opening.warm_up, "--warm-up: expected a command that generates");
    let options = arguments.opening.options(arguments.opening.one_device()?);
    let start = Instant::now();
    let mut tell = |graph: &str| eprintln!("{:>6.1} s  building the engine of {graph}", start.elapsed().as_secs_f32());
    let existing = if arguments.force { ExistingEngines::Replace } else { ExistingEngines::Keep };
    build_engines(&arguments.opening.model, &options, existing, &mut tell)?;
    eprintln!("{:>6.1} s  done", start.elapsed().as_secs_f32());
    Ok(Outcome::Done)
}
