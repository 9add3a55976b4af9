//! The program `t5gemma`: parse, run, exit code. Each command is a file; `requests.rs` is the JSONL contract that several
//! of them share, `tensors.rs` the files of numbers that are read and written. Nothing here is an interface for other crates.

mod bench;
mod calibrate;
mod chat;
mod classify;
mod doctor;
mod encode;
mod engines;
mod generate;
mod score;
mod shortlist;
mod verify;

mod requests;

mod constraints;
mod files;
mod options;
mod packing;
mod progress;
mod tensors;
mod usage;

#[doc(hidden)]
pub mod fuzzing;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use t5gemma_runtime::{Cancellation, Encoder, Error, Limits, Model, OpenOptions, Placement, Provider};

use usage::{Usage, bail_usage, ensure_usage};

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

/// What every command that opens a model takes.
#[derive(Args)]
struct Opening {
    /// Folder that t5gemma-export has made
    model: PathBuf,
    /// ONNX Runtime library to load [default: ORT_DYLIB_PATH, or as `t5gemma doctor` lists]
    #[arg(long, value_name = "FILE")]
    onnxruntime: Option<PathBuf>,
    /// Threads to compute with [default: one a core]
    #[arg(long)]
    threads: Option<usize>,
    /// Compare the hash of the whole weights file, however large, before running
    #[arg(long)]
    check_weights: bool,
    /// What computes the model; `tensorrt` leaves what it does not take to `cuda`. One that cannot be had is an error, see
    /// `t5gemma doctor`
    #[arg(long, default_value = "cpu", value_parser = PossibleValuesParser::new(Provider::ALL.map(Provider::name)))]
    provider: String,
    /// Number of the GPU; several, as in 0,1, have `generate --jsonl` answer with a copy of the model on each
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',', default_value = "0")]
    device: Vec<u32>,
    /// Run the usual sizes of the model's serving plan once before anything else, so that the first answer takes no longer
    /// than the others; without a plan, a source of 64 tokens
    #[arg(long)]
    warm_up: bool,
    /// Option of the provider by ONNX Runtime's name of it, over those of the model's serving plan; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = provider_option)]
    provider_option: Vec<(String, String)>,
    /// Folder with the engines of the model's serving plan, as build_engines.sh --engines or build-engines --engines has made
    /// it [default: the model's own]
    #[arg(long, value_name = "DIR")]
    engines: Option<PathBuf>,
    /// Have ONNX Runtime write how long each operator takes into the files PREFIX-GRAPH_TIME.json, which chrome://tracing
    /// shows; it slows the operators down a little
    #[arg(long, value_name = "PREFIX")]
    profile: Option<PathBuf>,
    /// For commands that encode the same source more than once.
    #[arg(skip)]
    encoder_cache_bytes: usize,
    /// For commands that run batches.
    #[arg(skip)]
    limits: Limits,
}

impl Opening {
    fn open(&self) -> Result<Model> {
        self.open_model(&self.model)
    }

    /// Another model in the same way.
    fn open_model(&self, path: &Path) -> Result<Model> {
        self.open_on(path, self.one_device()?)
    }

    /// The model on each of the devices.
    fn open_all(&self) -> Result<Vec<Arc<Model>>> {
        self.device.iter().map(|&device| Ok(Arc::new(self.open_on(&self.model, device)?))).collect()
    }

    fn open_on(&self, path: &Path, device: u32) -> Result<Model> {
        let model = Model::open_with(path, &self.options(device)).map_err(usage::of_opening)?;
        for elsewhere in model.elsewhere() {
            eprintln!("t5gemma: {elsewhere}");
        }
        for warning in model.warnings() {
            eprintln!("t5gemma: {}: {warning}", path.display());
        }
        if self.warm_up {
            model.warm_up(&Cancellation::new())?;
        }
        Ok(model)
    }

    fn open_encoder(&self) -> Result<Encoder> {
        ensure_usage!(!self.warm_up, "--warm-up: expected a command that generates");
        Encoder::open_with(&self.model, &self.options(self.one_device()?)).map_err(usage::of_opening)
    }

    fn one_device(&self) -> Result<u32> {
        let [device] = self.device[..] else {
            bail_usage!(
                "--device: expected one number, found {} (several are for generate --jsonl)",
                self.device.len()
            );
        };
        Ok(device)
    }

    fn options(&self, device: u32) -> OpenOptions {
        let (library, threads) = (self.onnxruntime.clone(), self.threads);
        let (check_weights, encoder_cache_bytes) = (self.check_weights, self.encoder_cache_bytes);
        let limits = self.limits;
        let provider = Provider::ALL.into_iter().find(|provider| provider.name() == self.provider).unwrap_or_default();
        let placement = Placement { provider, device, options: self.provider_option.clone() };
        let (profile, engines) = (self.profile.clone(), self.engines.clone());
        OpenOptions {
            library,
            threads,
            check_weights,
            encoder_cache_bytes,
            limits,
            placement,
            profile,
            engines,
            ..OpenOptions::default()
        }
    }
}

fn provider_option(text: &str) -> Result<(String, String), String> {
    let option = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, found {text}"))?;
    Ok((option.0.to_string(), option.1.to_string()))
}

/// How a command that did not fail as a whole ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    SomeFailed,
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
    t5gemma_runtime::hush_caught_panics();
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
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::SomeFailed) => ExitCode::FAILURE,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if matches!(error.downcast_ref(), Some(Error::Cancelled)) => ExitCode::from(130),
        Err(error) => {
            eprintln!("t5gemma: {error:#}");
            match error.downcast_ref::<Usage>() {
                Some(_) => ExitCode::from(2),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe))
}
