//! `t5gemma calibrate`: measures activation ranges for an 8-bit export.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, json};
use t5gemma_protocol::{Tokenize, without_byte_order_mark};
use t5gemma_runtime::{Calibration, Cancellation, GenerationConfig, task_of};

use crate::chat::Chat;
use crate::exit::Outcome;
use crate::flag_errors;
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::progress::counter;
use crate::requests::{self, Kind};
use crate::tensors::{Aside, write_text};

/// Measure activation ranges for an 8-bit export
///
/// The model must be exported with --observe, and the texts should be representative of real requests. Each runs alone;
/// a generation model first generates its target. `t5gemma-export --calibrate` reads the file.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  t5gemma-export --observe checkpoint observed
  t5gemma calibrate observed --texts requests.jsonl -o ranges.json
  t5gemma-export --target tensorrt --quantize fp8 --calibrate ranges.json \\
      checkpoint model")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests as for `generate --jsonl`, or for other tasks as for `encode --jsonl`
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Input")]
    texts: PathBuf,
    /// Maximum number of tokens of a generated target [default: 64]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    max_new_tokens: Option<usize>,
    /// File to write
    #[arg(short, long, value_name = "RANGES.json", help_heading = "Output")]
    output: PathBuf,
    /// Percentile of the per-text maxima to write as the range
    ///
    /// Values below 100 clip rare outliers, so that other activations keep more precision.
    #[arg(long, value_name = "P", help_heading = "Output", default_value_t = 100.0)]
    percentile: f64,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let Arguments { model, runtime, texts, output, max_new_tokens, percentile } = arguments;
    let opening = Opening::new(model, runtime);
    ensure!(
        percentile > 0.0 && percentile <= 100.0,
        "--percentile: expected a number above 0, up to 100, found {percentile}"
    );
    let task = task_of(opening.path())?;
    let (model, chat, encoder);
    let (mut calibration, reader, kind, defaults): (_, &dyn Tokenize, _, _) = match task.is_generation() {
        true => {
            model = opening.open()?;
            let length = json!({"max_new_tokens": max_new_tokens.unwrap_or(64)});
            let defaults = model.generation_config().with_json(length.as_object().context("written above")?)?;
            chat = Chat::new(opening.path(), &model);
            (Calibration::new(&model).map_err(flag_errors::of_calibration)?, &chat, Kind::Generate, defaults)
        }
        false => {
            ensure!(
                max_new_tokens.is_none(),
                "--max-new-tokens requires the task text2text-generation (got {})",
                task.name()
            );
            encoder = opening.open_encoder()?;
            let mut defaults = GenerationConfig::default();
            defaults.pad_token_id = encoder.pad_token_id();
            let calibration = Calibration::of_encoder(&encoder).map_err(flag_errors::of_calibration)?;
            (calibration, &encoder, Kind::Encode { truncates: false }, defaults)
        }
    };
    let output = Aside::create(&output)?;
    let lines = fs::read(&texts).with_context(|| format!("{}: cannot be read", texts.display()))?;
    let lines = without_byte_order_mark(&lines).map_err(|problem| anyhow!("{}: {problem}", texts.display()))?;
    let lines = lines.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let done = counter("texts", true);
    for (number, line) in lines {
        let place = || format!("{}: line {}", texts.display(), number + 1);
        let request = match requests::read_line(line, &Map::new(), number, kind, reader) {
            Ok(request) => request,
            Err(refused) => bail!("{}: {}", place(), refused.reason),
        };
        let options = defaults.with_json(&request.options).with_context(place)?;
        let batch = t5gemma_protocol::batch(&[request], options.pad_token_id).with_context(place)?;
        calibration.add(&batch, &options, cancel).with_context(place)?;
        done.inc(1);
    }
    done.finish_and_clear();
    let ranges = calibration.ranges(percentile);
    ensure!(ranges.texts > 0, "{}: expected one request per line, found none", texts.display());
    write_text(output, &(serde_json::to_string_pretty(&ranges)? + "\n"))?;
    Ok(Outcome::Done)
}
