//! `t5gemma verify`: checks a model's numerics.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use t5gemma_runtime::verify::{
    Check, Comparison, EncoderComparison, Golden, OutputComparison, against, comparison, consistency,
    encoder_comparison, encoder_consistency,
};
use t5gemma_runtime::{Cancellation, Error, Task, Tokenizer, task_of};

use crate::exit::{Outcome, ensure_usage};
use crate::files;
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::tensors::Tensors;

/// Check a model's numerics
///
/// Checks a model against itself: cached steps against recomputation, a ragged batch against its rows alone, left
/// against right padding, beam search with one beam against greedy search, beam scores against recomputed ones, and
/// rows with images beside others against the same alone.
/// With --golden, also checks it against reference tensors. Prints the largest error of each comparison; the exit
/// status is 1 if one exceeds its limit. With --against, only reports the differences from another model of the same
/// checkpoint.
///
/// For a model exported with --task feature-extraction, compares hidden states or embeddings: a ragged batch against
/// its rows alone, left against right padding and, with --against, each output of both models. Models exported with
/// --output-hidden-states are compared layer by layer.
#[derive(clap::Args)]
#[command(after_long_help = GOLDEN)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Reference tensors to compare with, described below
    #[arg(long, value_name = "FILE.safetensors", help_heading = "Input")]
    golden: Option<PathBuf>,
    /// Model of the same checkpoint to compare with, such as the unquantized one
    ///
    /// Reports the errors of hidden states and logits along that model's greedy outputs, and how often both models
    /// agree on the most likely token; for encoders, the error and the cosine similarity of each output. Both report the
    /// same of image features, of three synthetic images.
    #[arg(long, value_name = "OTHER_MODEL", help_heading = "Input", conflicts_with_all = ["golden", "tolerance"])]
    against: Option<PathBuf>,
    /// Sources for --against, one per line, representative of real requests [default: random tokens]
    ///
    /// Models agree less on random tokens than on texts.
    #[arg(long, value_name = "FILE", help_heading = "Input", requires = "against")]
    texts: Option<PathBuf>,
    /// Largest absolute error that passes [default: depends on the dtype]
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
Tensors of --golden, where B is any batch name:
  in.B.input_ids, in.B.attention_mask        the sources
  enc.B.last_hidden_state                    hidden states of the encoder
  dec.B.first.logits, dec.B.prefill.logits   logits of the first step
  dec.B.forced_ids, dec.B.forced_logits      targets, and logits along them
Only the sources are required.

Examples:
  Check a model after an export:
    t5gemma verify model

  Measure the error of 8-bit weights:
    t5gemma verify model-int8 --against model --texts texts.txt

  Report the cosine similarity of an encoder's states by layer:
    for q in none int8; do
      t5gemma-export --task feature-extraction --output-hidden-states \\
        --target cpu --quantize $q t5gemma-b-b-ul2 encoder-$q
    done
    t5gemma verify encoder-int8 --against encoder-none --texts texts.txt";

fn tolerance(text: &str) -> Result<f32, String> {
    let tolerance = text.parse().ok().filter(|x: &f32| x.is_finite() && *x >= 0.0);
    tolerance.ok_or_else(|| "expected a number of at least 0".to_string())
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let Arguments { model, golden, against: other, texts, tolerance, json, runtime } = arguments;
    let mut opening = Opening::new(model, runtime);
    let is_encoder = matches!(task_of(opening.path())?, Task::FeatureExtraction(_));
    if let Some(other) = &other {
        let report = if is_encoder {
            compare_encoders(&opening, other, texts.as_deref(), cancel)?
        } else {
            compare(&opening, other, texts.as_deref(), cancel)?
        };
        let text = if json { format!("{:#}\n", report.json) } else { report.table };
        io::stdout().write_all(text.as_bytes())?;
        return Ok(Outcome::Done);
    }
    opening.model.check_weights = true;
    let checks = if is_encoder {
        ensure_usage!(golden.is_none(), "--golden requires a model that generates (got task feature-extraction)");
        encoder_consistency(&opening.open_encoder()?, tolerance, cancel)?
    } else {
        let golden = golden.as_deref().map(Tensors::read).transpose()?.map(|file| read(&file)).transpose()?;
        let model = opening.open()?;
        let mut checks = consistency(&model, tolerance, cancel)?;
        if let Some(golden) = &golden {
            let compared = against(&model, golden, tolerance, cancel)?;
            ensure!(
                !compared.is_empty(),
                "--golden: expected reference tensors, found none to compare with; see --help for their names"
            );
            checks.extend(compared);
        }
        checks
    };
    for check in &checks {
        let verdict = if check.passed() { "ok  " } else { "FAIL" };
        let Check { name, largest, limit } = check;
        writeln!(io::stdout(), "{verdict} {name:<52} {largest:>9.2e}  (limit {limit:.2e})")?;
    }
    Ok(if checks.iter().all(|check| check.passed()) { Outcome::Done } else { Outcome::SomeFailed })
}

/// The difference between two models, as a table and as JSON.
struct Report {
    table: String,
    json: Value,
}

/// Sources to compare models on.
struct Sources {
    ids: Vec<Vec<i64>>,
    /// Where they come from, for people.
    description: String,
}

impl Sources {
    /// Reads the lines of a file. Without a file there are none, and random tokens are used.
    fn read(texts: Option<&Path>, tokenizer: impl FnOnce() -> Result<Tokenizer, Error>) -> Result<Sources> {
        let Some(path) = texts else {
            let description = "random tokens; use --texts FILE for your own texts".to_string();
            return Ok(Sources { ids: Vec::new(), description });
        };
        let (text, tokenizer) = (files::read_text(path)?, tokenizer()?);
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let ids: Vec<Vec<i64>> = lines.map(|line| tokenizer.encode(line)).collect::<Result<_, _>>()?;
        ensure!(!ids.is_empty(), "{}: expected lines of text, found none", path.display());
        let description = format!("{} texts of {}", ids.len(), path.display());
        Ok(Sources { ids, description })
    }
}

fn compare(opening: &Opening, other: &Path, texts: Option<&Path>, cancel: &Cancellation) -> Result<Report> {
    let model = opening.open()?;
    let other = opening.open_model(other)?;
    let sources = Sources::read(texts, || other.tokenizer().cloned())?;
    let Comparison {
        positions,
        hidden_relative_error,
        logits_relative_error,
        logits_largest_error,
        top1_agreement,
        top1_in_top5,
        kl_divergence,
        image_features,
    } = comparison(&model, &other, &sources.ids, cancel)?;
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let rows = [
        ("target positions", positions.to_string()),
        ("hidden states, relative error", format!("{hidden_relative_error:.2e}")),
        ("logits, relative error", format!("{logits_relative_error:.2e}")),
        ("logits, largest error", format!("{logits_largest_error:.2e}")),
        ("same most likely token", percent(top1_agreement)),
        ("its most likely token in the other's top 5", percent(top1_in_top5)),
        ("Kullback-Leibler divergence, nats", format!("{kl_divergence:.2e}")),
    ];
    let of_images = image_features.as_ref().map(|features| {
        [
            ("image features, relative error", format!("{:.2e}", features.relative_error)),
            ("image features, mean cosine", format!("{:.6}", features.mean_cosine)),
            ("image features, least cosine", format!("{:.6}", features.min_cosine)),
        ]
    });
    let rows = rows.into_iter().chain(of_images.into_iter().flatten());
    let rows: String = rows.map(|(name, value)| format!("{name:<46} {value:>10}\n")).collect();
    let mut json = json!({
            "sources": sources.description,
            "positions": positions,
            "hidden_relative_error": hidden_relative_error,
            "logits_relative_error": logits_relative_error,
            "logits_largest_error": logits_largest_error,
            "top1_agreement": top1_agreement,
            "top1_in_top5": top1_in_top5,
            "kl_divergence": kl_divergence,
    });
    if let Some(OutputComparison { relative_error, mean_cosine, min_cosine, .. }) = image_features {
        json["image_features"] =
            json!({"relative_error": relative_error, "mean_cosine": mean_cosine, "min_cosine": min_cosine});
    }
    Ok(Report { table: format!("sources: {}\n{rows}", sources.description), json })
}

fn compare_encoders(opening: &Opening, other: &Path, texts: Option<&Path>, cancel: &Cancellation) -> Result<Report> {
    let encoder = opening.open_encoder()?;
    let other = opening.open_encoder_of(other)?;
    let sources = Sources::read(texts, || other.tokenizer().cloned())?;
    let EncoderComparison { vectors, outputs } = encoder_comparison(&encoder, &other, &sources.ids, cancel)?;
    let mut table = format!("sources: {}\nvectors: {vectors}\n", sources.description);
    table += &format!("{:<22} {:>14} {:>14} {:>14}\n", "output", "relative error", "mean cosine", "least cosine");
    for OutputComparison { name, relative_error, mean_cosine, min_cosine } in &outputs {
        table += &format!("{name:<22} {relative_error:>14.2e} {mean_cosine:>14.6} {min_cosine:>14.6}\n");
    }
    let outputs: Vec<Value> = outputs
        .iter()
        .map(|OutputComparison { name, relative_error, mean_cosine, min_cosine }| {
            json!({
                "name": name,
                "relative_error": relative_error,
                "mean_cosine": mean_cosine,
                "min_cosine": min_cosine,
            })
        })
        .collect();
    Ok(Report { table, json: json!({"sources": sources.description, "vectors": vectors, "outputs": outputs}) })
}

/// Reads the reference tensors of a file.
pub fn read(file: &Tensors) -> Result<Golden> {
    let mut golden = Golden::default();
    for name in file.names()? {
        // Other tensors in the file are ignored, whatever their type.
        let is_pixels = name.starts_with("in.") && name.ends_with(".pixel_values");
        if is_pixels {
            golden.floats.extend(file.floats(&name)?.map(|tensor| (name, tensor)));
        } else if name.starts_with("in.") || name.ends_with(".forced_ids") {
            golden.integers.extend(file.whole(&name)?.map(|tensor| (name, tensor)));
        } else if name.starts_with("enc.") || name.starts_with("dec.") {
            golden.floats.extend(file.floats(&name)?.map(|tensor| (name, tensor)));
        }
    }
    Ok(golden)
}
