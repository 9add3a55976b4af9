//! The program `t5gemma-export`: parse, run, exit code.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use t5gemma_exporter::{
    Bytes, Checkpoint, Existing, Export, PRESETS, Plan, Setting, SettingError, Source, TensorRt, Watch, check, inspect,
    preset, reseal,
};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::json::{self, cut};
use t5gemma_graphs::manifest::{ActivationRanges, EncoderWindow};
use t5gemma_graphs::onnx::{Blocks, Code};
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_graphs::task::{Features, Pooling, Task};

/// Writes a T5Gemma checkpoint as ONNX graphs that `t5gemma` and any ONNX runtime can run.
///
/// CHECKPOINT is a folder as Hugging Face saves or downloads it (config.json, safetensors, tokenizer.json). OUT becomes a
/// folder with encoder_model.onnx, decoder_model.onnx (the first decoder step), decoder_with_past_model.onnx (the cached
/// steps), their one weights file model.onnx_data, the settings and the tokenizer, and manifest.json.
///
/// Exit status: 0 done, 1 failed (the reason is on stderr, and nothing is left behind), 2 arguments that cannot be parsed,
/// contradict each other or do not suit the checkpoint, 130 interrupted or terminated.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    override_usage = USAGE
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    export: ExportArgs,
}

const USAGE: &str = "t5gemma-export [OPTIONS] CHECKPOINT OUT
       t5gemma-export [OPTIONS] --dummy-weights --preset SIZE OUT
       t5gemma-export <COMMAND>";

#[derive(Subcommand)]
enum Command {
    /// Shows what a model folder or checkpoint holds: sizes, parameters by part, dtypes, opset, ports, operators
    Inspect {
        /// An exported model or a checkpoint
        dir: PathBuf,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Tells without TensorRT whether it would take an ONNX file or all of a folder, with reasons; exit status 1 if not
    Check {
        /// An ONNX file, or an exported model or other folder of ONNX files
        path: PathBuf,
        /// tensorrt (10.16, the last that ONNX Runtime works with), tensorrt=10.0 to 10.16, tensorrt=11.0 or 11.1, or tensorrt=rtx
        #[arg(long, default_value = "tensorrt")]
        target: TensorRt,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Accepts the text files of a model folder as they are now, after they were edited, added or removed on purpose
    ///
    /// The tokenizer's files and chat templates get their new hashes in manifest.json. Graphs, weights, config.json and
    /// kept_tokens.json have to be those of the export. An edited generation_config.json needs no resealing.
    Reseal {
        /// An exported model
        dir: PathBuf,
    },
}

#[derive(Args)]
struct ExportArgs {
    /// Folder of the checkpoint, left out with --dummy-weights, and folder to make
    // One argument: of two, clap would take the first for OUT as soon as an option follows it.
    #[arg(required = true, num_args = 1..=2, value_names = ["CHECKPOINT", "OUT"])]
    folders: Vec<PathBuf>,
    /// What the model is for [default: what the checkpoint was saved for, by config.json's architectures];
    /// feature-extraction exports the encoder of any checkpoint, alone
    #[arg(long, value_parser = PossibleValuesParser::new(Task::all().map(|task| task.name())))]
    task: Option<String>,
    /// One vector for each source of feature-extraction, by its tokens' states: their mean, that of the first or the last
    #[arg(long, value_name = "HOW", value_parser = PossibleValuesParser::new(Pooling::ALL.map(Pooling::name)))]
    pooling: Option<String>,
    /// Divide the vectors of feature-extraction by their length
    #[arg(long)]
    normalize: bool,
    /// The hidden states of feature-extraction: 0 the embedding, N what layer N returns, negative from the end, last the
    /// normed output [default: last]
    #[arg(long, value_name = "N|last", allow_negative_numbers = true, value_parser = hidden_layer)]
    hidden_layer: Option<i64>,
    /// Runtime to write the graphs for
    #[arg(long, default_value = "portable", value_parser = PossibleValuesParser::new(Target::ALL.map(Target::name)))]
    target: String,
    /// Type of weights, activations and caches; norms, soft-caps, softmax and logits are float32 in each, and for float16
    /// the residual stream too [default: float32; for targets cuda and tensorrt bfloat16]
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// Return the logits of every position given to a decoder graph, not of the last only
    #[arg(long)]
    all_logits: bool,
    /// Return beside the logits of the last position its N greatest, their tokens and the logarithm of the sum of all
    /// exponentials, so that logits need not leave a GPU
    #[arg(long, value_name = "N", conflicts_with = "all_logits")]
    candidates: Option<usize>,
    /// Have the model generate the tokens of this file only, a JSON array of ids as `t5gemma shortlist` writes it: the head,
    /// of which every step reads all, is as much smaller, and the scores of those tokens are what they were
    #[arg(long, value_name = "TOKENS.json")]
    keep_tokens: Option<PathBuf>,
    /// Return beside the logits how much each target token attends to each source token (cross_attentions), for
    /// output_attentions and coverage_penalty of t5gemma: probabilities, the mean over heads and layers
    #[arg(long)]
    alignment: bool,
    /// The decoder layers that this is the mean of, such as 0,3 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', requires = "alignment")]
    alignment_layers: Vec<usize>,
    /// Give the cache room for N target tokens and every step, the first too, one graph (target tensorrt); by default the
    /// cache is as the target has it
    #[arg(long, value_name = "static=N", value_parser = capacity)]
    cache: Option<usize>,
    /// What is going to be served, such as batch=1..16,source=1..1024,target=256,beams=1..4 (target tensorrt)
    ///
    /// Adds to OUT the optimisation profiles, options for ONNX Runtime's providers, a script that builds engines, wrappers for
    /// these, and a table of the memory they take. The sizes: batch, sources in a batch; source, tokens of a source with its
    /// padding; and of models that generate target, tokens of a target at most; beams, target rows of a source; prompt, tokens
    /// given to the first decoder step. source is required, target too where there is one, and the others are 1 if left out.
    /// Each is N, LEAST..MOST or LEAST..USUAL..MOST, target N only. Kernels are chosen for USUAL: of LEAST..MOST that is MOST
    /// for batch and beams, and half of MOST (LEAST if that is more) for source and prompt. `t5gemma` holds requests to the
    /// plan with every provider: it pads up to LEAST, splits batches above MOST and refuses what is longer.
    #[arg(long, value_name = "PLAN")]
    plan: Option<Plan>,
    /// Refuse a plan that takes more of a GPU's memory than this, such as 24GB or 22.5GiB, by the table in memory.txt
    #[arg(long, value_name = "SIZE", requires = "plan")]
    fits: Option<Bytes>,
    /// Whether encoder positions exactly one window apart see each other: inclusive as in transformers 5.4 and later,
    /// exclusive as in Google's code and earlier transformers; no difference for sources up to the window (4096)
    #[arg(long, value_enum, default_value = "inclusive")]
    encoder_window: WindowArg,
    #[command(flatten)]
    quantize: QuantizeArgs,
    /// Replace OUT if it holds an exported model and nothing else
    #[arg(long)]
    overwrite: bool,
    /// Export random weights of the shapes that --preset or --config gives, to measure a size without its checkpoint
    #[arg(long)]
    dummy_weights: bool,
    /// One of Google's sizes, encoder first
    #[arg(long, requires = "dummy_weights", conflicts_with = "config", value_parser = PossibleValuesParser::new(PRESETS.iter().map(|(name, _)| *name)))]
    preset: Option<String>,
    /// A config.json
    #[arg(long, requires = "dummy_weights")]
    config: Option<PathBuf>,
    /// Seed of the random weights
    #[arg(long, requires = "dummy_weights", default_value_t = 0)]
    seed: u64,
    /// Show no progress and no notes, only errors and warnings
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Args)]
struct QuantizeArgs {
    /// Hold the weight matrices in blocks of this many bits, with activations as they are (targets cpu and cuda, and int4 for
    /// tensorrt; int8 and fp8 for tensorrt compute in 8 bits and need --calibrate, fp8 also a GPU that has it: Ada, Hopper or
    /// newer, compute capability 8.9 and up)
    #[arg(long, value_enum, default_value = "none")]
    quantize: Bits,
    /// The same for the encoder's layers [default: as --quantize]
    #[arg(long, value_enum)]
    quantize_encoder: Option<Bits>,
    /// The same for the decoder's layers [default: as --quantize]
    #[arg(long, value_enum)]
    quantize_decoder: Option<Bits>,
    /// The same for the output head, and for the embedding that is tied to it [default: as --quantize]
    #[arg(long, value_enum)]
    quantize_head: Option<Bits>,
    /// Numbers that share a scale: 16, 32, 64 or 128 [default: 128 for int8, 32 for int4]
    #[arg(long, value_name = "N")]
    block_size: Option<usize>,
    /// Give every block a zero point of its own
    #[arg(long)]
    asymmetric: bool,
    /// Leave the matrices of this checkpoint name as they are; `*` stands for any text; may be repeated
    #[arg(long, value_name = "PATTERN")]
    quantize_exclude: Vec<String>,
    /// Return how large the numbers become that matrices are multiplied with, for `t5gemma calibrate` (target portable)
    #[arg(long)]
    observe: bool,
    /// What `t5gemma calibrate` has written of this model: has int8 matrices of target tensorrt, with a scale a row, and fp8
    /// ones, with one scale, multiplied in 8 bits
    #[arg(long, value_name = "RANGES.json", conflicts_with = "observe")]
    calibrate: Option<PathBuf>,
}

impl QuantizeArgs {
    fn activations(&self) -> Result<Activations> {
        let Some(path) = &self.calibrate else {
            return Ok(if self.observe { Activations::Observed } else { Activations::Unknown });
        };
        let place = || format!("--calibrate {}", path.display());
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", place()))?;
        let read: Result<ActivationRanges, _> = serde_json::from_str(json::without_mark(&text));
        let expected = "expected what `t5gemma calibrate` writes";
        let read =
            read.map_err(|error| anyhow!("{}: {expected}, found {}", place(), json::malformed(&text, &error)))?;
        Ok(Activations::Ranges(read.ranges))
    }

    fn quantization(&self) -> Result<Quantization> {
        let blocks = |part: Option<Bits>| {
            let blocks = match part.unwrap_or(self.quantize) {
                Bits::None => return None,
                Bits::Fp8 => return Some(Blocks::float8()),
                Bits::Int8 => Blocks::whole(8, 128),
                Bits::Int4 => Blocks::whole(4, 32),
            };
            Some(Blocks { size: self.block_size.unwrap_or(blocks.size), symmetric: !self.asymmetric, ..blocks })
        };
        let quantization = Quantization {
            encoder: blocks(self.quantize_encoder),
            decoder: blocks(self.quantize_decoder),
            head: blocks(self.quantize_head),
            exclude: self.quantize_exclude.clone(),
        };
        let of_blocks = [
            ("--block-size", self.block_size.is_some()),
            ("--asymmetric", self.asymmetric),
            ("--quantize-exclude", !self.quantize_exclude.is_empty()),
        ];
        if let Some((flag, _)) = of_blocks.iter().find(|(_, given)| *given && !quantization.is_any()) {
            bail!(Usage(format!("{flag} requires --quantize, or --quantize-encoder, -decoder or -head")));
        }
        let is_blocked = quantization.parts().any(|blocks| blocks.code == Code::Whole);
        if let Some((flag, _)) = of_blocks[..2].iter().find(|(_, given)| *given && !is_blocked) {
            bail!(Usage(format!("{flag} requires --quantize int8 or int4 (got fp8, which has no blocks)")));
        }
        Ok(quantization)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Bits {
    None,
    Int8,
    Fp8,
    Int4,
}

#[derive(Clone, Copy, ValueEnum)]
enum DTypeArg {
    Float32,
    Float16,
    Bfloat16,
}

#[derive(Clone, Copy, ValueEnum)]
enum WindowArg {
    Inclusive,
    Exclusive,
}

/// The same without subcommands, of which clap would take OUT for one behind an option.
#[derive(Parser)]
#[command(name = "t5gemma-export", version, override_usage = USAGE)]
struct ExportAlone {
    #[command(flatten)]
    export: ExportArgs,
}

fn parse() -> Cli {
    let first = std::env::args().nth(1);
    let named = |name: &str| first.as_deref() == Some(name);
    if named("help") || Cli::command().get_subcommands().any(|command| named(command.get_name())) {
        return Cli::parse();
    }
    match ExportAlone::try_parse() {
        Ok(ExportAlone { export }) => Cli { command: None, export },
        // What is shown and said is the whole program's.
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Cli::parse(),
        Err(error) => error.exit(),
    }
}

fn main() -> ExitCode {
    let cli = parse();
    let ExportArgs { keep_tokens, quantize: QuantizeArgs { calibrate, .. }, .. } = &cli.export;
    let files = Files { kept_tokens: keep_tokens.clone(), ranges: calibrate.clone() };
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let result = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .context("the interrupt handler cannot be set")
        .and_then(|()| run(cli, &interrupted));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("t5gemma-export: interrupted; nothing was left behind");
            ExitCode::from(130)
        }
        Err(error) => {
            if let Some(refused) = error.downcast_ref::<SettingError>() {
                eprintln!("t5gemma-export: {}", refused.told(|setting| argument(setting, &files)));
            } else {
                eprintln!("t5gemma-export: {error:#}");
            }
            if is_of_arguments(&error) { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Arguments that contradict each other.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Whether it is the arguments that have to be changed. What is in a file that one names is that file's.
fn is_of_arguments(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<SettingError>();
    error.is::<Usage>()
        || refused.is_some_and(|refused| {
            !matches!(refused, SettingError::Value { setting: Setting::KeptTokens | Setting::Ranges, .. })
        })
}

/// What sets a setting on the command line, with the file where it is one.
fn argument(setting: Setting, files: &Files) -> String {
    let with = |flag: &str, file: &Option<PathBuf>| match file {
        Some(file) => format!("{flag} {}", file.display()),
        None => flag.to_string(),
    };
    let flag = match setting {
        Setting::Task => "--task",
        Setting::HiddenLayer => "--hidden-layer",
        Setting::Target => "--target",
        Setting::Dtype => "--dtype",
        Setting::AllLogits => "--all-logits",
        Setting::Candidates => "--candidates",
        Setting::KeptTokens => return with("--keep-tokens", &files.kept_tokens),
        Setting::Alignment => "--alignment",
        Setting::AlignmentLayers => "--alignment-layers",
        Setting::Capacity => "--cache static=N",
        Setting::Plan => "--plan",
        Setting::Fits => "--fits",
        Setting::Observed => "--observe",
        Setting::Ranges => return with("--calibrate", &files.ranges),
        Setting::Quantization => "--quantize",
        Setting::BlockSize => "--block-size",
        Setting::Asymmetric => "--asymmetric",
        Setting::Exclude => "--quantize-exclude",
    };
    flag.to_string()
}

/// The files that arguments name, for messages.
struct Files {
    kept_tokens: Option<PathBuf>,
    ranges: Option<PathBuf>,
}

fn run(cli: Cli, interrupted: &AtomicBool) -> Result<()> {
    match cli.command {
        Some(Command::Inspect { dir, json }) => {
            let report = inspect(&dir)?;
            let text = if json { serde_json::to_string_pretty(&report)? + "\n" } else { report.to_string() };
            io::stdout().write_all(text.as_bytes())?;
            Ok(())
        }
        Some(Command::Check { path, target, json }) => {
            let checked = check(&path, target)?;
            let text = if json { serde_json::to_string_pretty(&checked)? + "\n" } else { checked.to_string() };
            io::stdout().write_all(text.as_bytes())?;
            let findings = checked.findings.len();
            ensure!(findings == 0, "{target} would not take {}: {findings} findings", path.display());
            Ok(())
        }
        Some(Command::Reseal { dir }) => {
            let changes = reseal(&dir)?;
            let changes = if changes.is_empty() { "nothing has changed".to_string() } else { changes.join(", ") };
            eprintln!("resealed {}: {changes}", dir.display());
            Ok(())
        }
        None => export(cli.export, interrupted),
    }
}

/// Unused tensors listed by name.
const SHOWN: usize = 10;

fn export(args: ExportArgs, interrupted: &AtomicBool) -> Result<()> {
    let (checkpoint, out) = match &args.folders[..] {
        [out] => (None, out),
        [checkpoint, out] => (Some(checkpoint), out),
        folders => bail!(Usage(format!("expected CHECKPOINT and OUT, found {} folders; see --help", folders.len()))),
    };
    let target = Target::ALL.into_iter().find(|target| target.name() == args.target).context("unknown target")?;
    let export = Export {
        task: task(&args)?,
        target,
        dtype: match args.dtype {
            None => target.capabilities().default_dtype,
            Some(DTypeArg::Float32) => DType::Float32,
            Some(DTypeArg::Float16) => DType::Float16,
            Some(DTypeArg::Bfloat16) => DType::BFloat16,
        },
        logits: match args.candidates {
            Some(count) => Logits::Candidates(count),
            None if args.all_logits => Logits::All,
            None => Logits::Last,
        },
        kept_tokens: args.keep_tokens.as_deref().map(kept_tokens).transpose()?,
        alignment: args.alignment.then(|| args.alignment_layers.clone()),
        capacity: args.cache,
        plan: args.plan.clone(),
        fits: args.fits,
        encoder_window: match args.encoder_window {
            WindowArg::Inclusive => EncoderWindow::Inclusive,
            WindowArg::Exclusive => EncoderWindow::Exclusive,
        },
        quantization: args.quantize.quantization()?,
        activations: args.quantize.activations()?,
        existing: if args.overwrite { Existing::Overwrite } else { Existing::Refuse },
    };
    let source = source(&args, checkpoint)?;
    let progress = Progress { bar: bar(args.quiet), interrupted };
    let exported = export.run(&source, out, &progress)?;
    progress.bar.finish_and_clear();
    for warning in &exported.warnings {
        eprintln!("t5gemma-export: {warning}");
    }
    if args.quiet {
        return Ok(());
    }
    if !exported.unused.is_empty() {
        eprintln!("t5gemma-export: {} tensors of the checkpoint are not used:", exported.unused.len());
        exported.unused.iter().take(SHOWN).for_each(|name| eprintln!("  {}", cut(name)));
        if exported.unused.len() > SHOWN {
            eprintln!("  … and {} more", exported.unused.len() - SHOWN);
        }
    }
    for note in &exported.notes {
        eprintln!("t5gemma-export: {note}");
    }
    let (parameters, weights) = (exported.manifest.parameters, &exported.manifest.weights.record);
    eprintln!("wrote {}: {parameters} parameters, {} bytes of weights", out.display(), weights.bytes);
    if let Some(plan) = &args.plan {
        let left_out = match &plan.left_out()[..] {
            [] => String::new(),
            names => format!(" (1 as they were left out: {})", names.join(", ")),
        };
        eprintln!("planned for {}{left_out}", exported.manifest.plan.as_deref().unwrap_or_default());
    }
    Ok(())
}

/// The ids in a file of tokens, ascending.
fn kept_tokens(path: &Path) -> Result<Vec<usize>> {
    let place = || format!("--keep-tokens {}", path.display());
    let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", place()))?;
    let tokens: Result<BTreeSet<usize>, _> = serde_json::from_str(json::without_mark(&text));
    let expected = "expected a JSON array of ids";
    let tokens =
        tokens.map_err(|error| anyhow!("{}: {expected}, found {}", place(), json::malformed(&text, &error)))?;
    Ok(tokens.into_iter().collect())
}

fn capacity(text: &str) -> Result<usize, String> {
    let number = text.strip_prefix("static=").and_then(|number| number.parse().ok());
    number.ok_or_else(|| "expected static=N".to_string())
}

fn hidden_layer(text: &str) -> Result<i64, String> {
    if text == "last" { Ok(-1) } else { text.parse().map_err(|_| "expected a whole number or last".to_string()) }
}

fn task(args: &ExportArgs) -> Result<Option<Task>> {
    let pooling = args.pooling.as_deref().and_then(|name| Pooling::ALL.into_iter().find(|known| known.name() == name));
    let task = args.task.as_deref().and_then(|name| Task::all().into_iter().find(|known| known.name() == name));
    if let Some(Task::FeatureExtraction(defaults)) = task {
        return Ok(Some(Task::FeatureExtraction(Features {
            pooling: pooling.unwrap_or(defaults.pooling),
            normalize: args.normalize,
            hidden_layer: args.hidden_layer.unwrap_or(defaults.hidden_layer),
        })));
    }
    let given = [
        ("--pooling", pooling.is_some()),
        ("--normalize", args.normalize),
        ("--hidden-layer", args.hidden_layer.is_some()),
    ];
    if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
        bail!(Usage(format!("{flag} requires --task feature-extraction")));
    }
    Ok(task)
}

fn source(args: &ExportArgs, checkpoint: Option<&PathBuf>) -> Result<Source> {
    if !args.dummy_weights {
        let Some(checkpoint) = checkpoint else {
            bail!(Usage("expected CHECKPOINT and OUT, found only one folder; see --help".to_string()))
        };
        return Ok(Source::Checkpoint(Checkpoint::open(checkpoint)?));
    }
    if checkpoint.is_some() {
        bail!(Usage("--dummy-weights takes OUT only: no checkpoint is read".to_string()));
    }
    let (config, origin) = match (&args.preset, &args.config) {
        (Some(name), _) => (preset(name).context("unknown preset")?.to_string(), format!("preset {name}")),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
            (text, path.display().to_string())
        }
        (None, None) => bail!(Usage("--dummy-weights requires --preset SIZE or --config FILE".to_string())),
    };
    Ok(Source::Dummy { config, origin, seed: args.seed })
}

fn bar(quiet: bool) -> ProgressBar {
    let target =
        if quiet || !io::stderr().is_terminal() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, target).with_style(style)
}

struct Progress<'i> {
    bar: ProgressBar,
    interrupted: &'i AtomicBool,
}

impl Watch for Progress<'_> {
    fn started(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    fn advanced(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
