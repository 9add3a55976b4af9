//! `t5gemma verify`: checks the computation of a model.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::json;
use t5gemma_runtime::Cancellation;
use t5gemma_runtime::verify::{Check, Comparison, Golden, against, comparison, consistency};

use crate::exit::Outcome;
use crate::files;
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::tensors::Tensors;

/// Check the computation of a model
///
/// Compares a model with itself: cached steps with recomputation, a ragged batch with its rows alone, left with right
/// padding, one beam with greedy search, and beam scores with recomputed ones. With --golden, compares it with
/// reference tensors, too. Prints the largest error of each comparison; the exit status is 1 if one exceeds its limit.
/// With --against, reports the difference from another model of the same checkpoint, without a limit.
#[derive(clap::Args)]
#[command(after_long_help = GOLDEN)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Reference tensors to compare with, described below
    #[arg(long, value_name = "FILE.safetensors", help_heading = "Input")]
    golden: Option<PathBuf>,
    /// Model of the same checkpoint to compare with, such as one with more bits
    ///
    /// Reports the errors of hidden states and logits along that model's greedy outputs, and how often both models have
    /// the same likeliest token.
    #[arg(long, value_name = "OTHER_MODEL", help_heading = "Input", conflicts_with_all = ["golden", "tolerance"])]
    against: Option<PathBuf>,
    /// Sources for --against, one per line, like those that will be served [default: random tokens]
    ///
    /// The outputs for random tokens agree less.
    #[arg(long, value_name = "FILE", help_heading = "Input", requires = "against")]
    texts: Option<PathBuf>,
    /// Largest absolute error that passes [default: depends on the element type]
    ///
    /// The default is 5e-4 for float32, a thousandth of the largest number for quantized weights, and a tenth of it for
    /// half precision.
    #[arg(long, value_name = "X", help_heading = "Output", value_parser = tolerance)]
    tolerance: Option<f32>,
    /// Print the report of --against as JSON
    #[arg(long, help_heading = "Output", requires = "against")]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

const GOLDEN: &str = "\
Tensors of --golden, for any names B of batches:
  in.B.input_ids, in.B.attention_mask        the sources
  enc.B.last_hidden_state                    hidden states of the encoder
  dec.B.first.logits, dec.B.prefill.logits   logits of the first step
  dec.B.forced_ids, dec.B.forced_logits      targets, and logits along them
All but the sources may be left out.

Examples:
  Check a model after an export:
    t5gemma verify model

  Report what 8-bit weights cost:
    t5gemma verify model-int8 --against model --texts texts.txt";

fn tolerance(text: &str) -> Result<f32, String> {
    let tolerance = text.parse().ok().filter(|x: &f32| x.is_finite() && *x >= 0.0);
    tolerance.ok_or_else(|| "expected a number of at least 0".to_string())
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let mut opening = Opening::new(arguments.model, arguments.runtime);
    if let Some(other) = &arguments.against {
        let compared = compare(&opening, other, arguments.texts.as_deref(), cancel)?;
        let text = if arguments.json { compared.json() } else { compared.table() };
        io::stdout().write_all(text.as_bytes())?;
        return Ok(Outcome::Done);
    }
    let golden = arguments.golden.as_deref().map(Tensors::read).transpose()?.map(|file| read(&file)).transpose()?;
    opening.model.check_weights = true;
    let model = opening.open()?;
    let mut checks = consistency(&model, arguments.tolerance, cancel)?;
    if let Some(golden) = &golden {
        let compared = against(&model, golden, arguments.tolerance, cancel)?;
        ensure!(!compared.is_empty(), "the reference file holds nothing to compare with; see --help for the names");
        checks.extend(compared);
    }
    for check in &checks {
        let verdict = if check.passed() { "ok  " } else { "FAIL" };
        let Check { name, largest, limit } = check;
        writeln!(io::stdout(), "{verdict} {name:<52} {largest:>9.2e}  (limit {limit:.2e})")?;
    }
    Ok(if checks.iter().all(|check| check.passed()) { Outcome::Done } else { Outcome::SomeFailed })
}

/// The difference between two models, and the sources that it was measured with.
struct Compared {
    sources: String,
    found: Comparison,
}

fn compare(opening: &Opening, other: &Path, texts: Option<&Path>, cancel: &Cancellation) -> Result<Compared> {
    let model = opening.open()?;
    let other = opening.open_model(other)?;
    let sources = match texts {
        None => Vec::new(),
        Some(path) => {
            let text = files::read_text(path)?;
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            let sources = lines.map(|line| other.tokenizer()?.encode(line)).collect::<Result<Vec<_>, _>>()?;
            ensure!(!sources.is_empty(), "{}: expected lines of text, found none", path.display());
            sources
        }
    };
    let found = comparison(&model, &other, &sources, cancel)?;
    let sources = match texts {
        Some(path) => format!("{} texts of {}", sources.len(), path.display()),
        None => "random tokens; --texts FILE gives the numbers for texts like yours".to_string(),
    };
    Ok(Compared { sources, found })
}

impl Compared {
    fn json(&self) -> String {
        let report = json!({
            "sources": self.sources,
            "positions": self.found.positions,
            "hidden_relative_error": self.found.hidden_relative_error,
            "logits_relative_error": self.found.logits_relative_error,
            "logits_largest_error": self.found.logits_largest_error,
            "top1_agreement": self.found.top1_agreement,
            "top1_in_top5": self.found.top1_in_top5,
            "kl_divergence": self.found.kl_divergence,
        });
        format!("{report:#}\n")
    }

    fn table(&self) -> String {
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        let rows = [
            ("target positions", self.found.positions.to_string()),
            ("hidden states, relative error", format!("{:.2e}", self.found.hidden_relative_error)),
            ("logits, relative error", format!("{:.2e}", self.found.logits_relative_error)),
            ("logits, largest error", format!("{:.2e}", self.found.logits_largest_error)),
            ("same likeliest token", percent(self.found.top1_agreement)),
            ("its likeliest token among the five likeliest", percent(self.found.top1_in_top5)),
            ("Kullback-Leibler divergence, nats", format!("{:.2e}", self.found.kl_divergence)),
        ];
        let rows = rows.map(|(name, value)| format!("{name:<46} {value:>10}\n")).concat();
        format!("sources: {}\n{rows}", self.sources)
    }
}

/// Reads the reference tensors of a file.
pub fn read(file: &Tensors) -> Result<Golden> {
    let mut golden = Golden::default();
    for name in file.names()? {
        // Other tensors of the file, in whatever type, are not looked at.
        if name.starts_with("in.") || name.ends_with(".forced_ids") {
            golden.integers.extend(file.whole(&name)?.map(|tensor| (name, tensor)));
        } else if name.starts_with("enc.") || name.starts_with("dec.") {
            golden.floats.extend(file.floats(&name)?.map(|tensor| (name, tensor)));
        }
    }
    Ok(golden)
}
