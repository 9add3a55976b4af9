//! `t5gemma build-engines`: the engines of a serving plan, built ahead of the first request.

use std::time::Instant;

use anyhow::Result;
use t5gemma_runtime::{ExistingEngines, build_engines};

use crate::exit::{Outcome, ensure_usage};
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::stderr::note;

/// Build the TensorRT engines of a model's serving plan
///
/// Builds them for this machine's GPU, with --provider tensorrt or nv-tensorrt-rtx, in MODEL/engines or in the folder
/// given by --engines. The model must be exported with --target tensorrt and --plan. Existing engines of the same
/// graphs are reused; engines of other graphs are an error.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  t5gemma build-engines model --provider tensorrt
  t5gemma build-engines model --provider tensorrt --engines engines-l4 --force")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Remove existing engines and build them again
    #[arg(long, help_heading = "Output")]
    force: bool,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<Outcome> {
    let opening = Opening::new(arguments.model, arguments.runtime);
    ensure_usage!(!opening.runtime.warm_up, "--warm-up requires a command that generates");
    let options = opening.options(opening.one_device()?);
    let start = Instant::now();
    let mut tell = |graph: &str| note!("{:>6.1} s  building the engine for {graph}", start.elapsed().as_secs_f32());
    let existing = if arguments.force { ExistingEngines::Replace } else { ExistingEngines::Keep };
    build_engines(opening.path(), &options, existing, &mut tell)?;
    note!("{:>6.1} s  done", start.elapsed().as_secs_f32());
    Ok(Outcome::Done)
}
