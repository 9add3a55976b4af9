//! `t5gemma verify`: whether a model computes what it should.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::json;
use t5gemma_runtime::Cancellation;
use t5gemma_runtime::verify::{Check, Golden, against, comparison, consistency};

use crate::exit::Outcome;
use crate::files;
use crate::opening::Opening;
use crate::tensors::Tensors;

/// Checks a model against itself and, with --golden, against reference numbers
///
/// Prints the largest error of each comparison: cached steps = recomputation, a ragged batch = its rows alone, left = right
/// padding, beam width 1 = greedy, beam scores = recomputed ones, and each kind of reference tensor. Exit status 1 if one is
/// beyond its limit. With --against, tells instead how far the model is from another of the same checkpoint, which nothing
/// limits.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    opening: Opening,
    /// Reference tensors: in.B.input_ids and in.B.attention_mask for any names B, with enc.B.last_hidden_state,
    /// dec.B.first.logits, dec.B.forced_ids and dec.B.forced_logits, dec.B.prefill.logits where there are any
    #[arg(long, value_name = "FILE.safetensors")]
    golden: Option<PathBuf>,
    /// Largest absolute error that passes [default: 5e-4 in float32, a thousandth of the largest number with weights of few
    /// bits, a tenth of it in half precision]
    #[arg(long, value_parser = tolerance)]
    tolerance: Option<f32>,
    /// A model of the same checkpoint, in more bits or for another target: reports how far hidden states and logits are
    /// from its own, along its own greedy answers, and how often both have the same likeliest token
    #[arg(long, value_name = "OTHER_MODEL", conflicts_with_all = ["golden", "tolerance"])]
    against: Option<PathBuf>,
    /// Sources for --against, one a line, like those that will be served [default: random tokens, whose answers agree less]
    #[arg(long, value_name = "FILE", requires = "against")]
    texts: Option<PathBuf>,
    /// Print the report of --against as JSON
    #[arg(long, requires = "against")]
    json: bool,
}

fn tolerance(text: &str) -> Result<f32, String> {
    let tolerance = text.parse().ok().filter(|x: &f32| x.is_finite() && *x >= 0.0);
    tolerance.ok_or_else(|| "expected a number of at least 0".to_string())
}

/// Runs the command.
pub fn run(mut arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    if let Some(other) = &arguments.against {
        return compare(&arguments, other, cancel);
    }
    let golden = arguments.golden.as_deref().map(Tensors::read).transpose()?.map(|file| read(&file)).transpose()?;
    arguments.opening.check_weights = true;
    let model = arguments.opening.open()?;
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

fn compare(arguments: &Arguments, other: &Path, cancel: &Cancellation) -> Result<Outcome> {
    let model = arguments.opening.open()?;
    let other = arguments.opening.open_model(other)?;
    let sources = match &arguments.texts {
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
    let of_sources = match &arguments.texts {
        Some(path) => format!("{} texts of {}", sources.len(), path.display()),
        None => "random tokens; --texts FILE gives the numbers for texts like yours".to_string(),
    };
    if arguments.json {
        let report = json!({
            "sources": of_sources,
            "positions": found.positions,
            "hidden_relative_error": found.hidden_relative_error,
            "logits_relative_error": found.logits_relative_error,
            "logits_largest_error": found.logits_largest_error,
            "top1_agreement": found.top1_agreement,
            "top1_in_top5": found.top1_in_top5,
            "kl_divergence": found.kl_divergence,
        });
        writeln!(io::stdout(), "{report:#}")?;
        return Ok(Outcome::Done);
    }
    writeln!(io::stdout(), "sources: {of_sources}")?;
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    for (name, value) in [
        ("target positions", found.positions.to_string()),
        ("hidden states, relative error", format!("{:.2e}", found.hidden_relative_error)),
        ("logits, relative error", format!("{:.2e}", found.logits_relative_error)),
        ("logits, largest error", format!("{:.2e}", found.logits_largest_error)),
        ("same likeliest token", percent(found.top1_agreement)),
        ("its likeliest token among the five likeliest", percent(found.top1_in_top5)),
        ("Kullback-Leibler divergence, nats", format!("{:.2e}", found.kl_divergence)),
    ] {
        writeln!(io::stdout(), "{name:<46} {value:>10}")?;
    }
    Ok(Outcome::Done)
}

/// The reference that a file holds.
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
