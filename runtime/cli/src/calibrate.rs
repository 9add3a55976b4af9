//! `t5gemma calibrate`: the ranges that an export needs which computes in 8 bits.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::json;
use t5gemma_runtime::{Calibration, Cancellation};

use crate::files::without_mark;
use crate::progress::counter;
use crate::requests::{self, Kind, Request};
use crate::tensors::{Aside, write_text};
use crate::{Opening, Outcome};

/// Tells how large the numbers become that a model's matrices are multiplied with
///
/// Of a model that was exported with --observe. The texts should be like those that will be served. Each is run alone, with
/// the target that the model makes of it; `t5gemma-export --calibrate` reads what is written.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    opening: Opening,
    /// Requests as for `generate --jsonl`, a line each
    #[arg(long, value_name = "FILE.jsonl")]
    texts: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "RANGES.json")]
    output: PathBuf,
    /// Tokens of a target at most
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,
    /// Give this percentile of the texts' greatest numbers: below 100, what is rare is cut, so that the rest is rounded less
    /// coarsely
    #[arg(long, value_name = "P", default_value_t = 100.0)]
    percentile: f64,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let Arguments { opening, texts, output, max_new_tokens, percentile } = arguments;
    ensure!(percentile > 0.0 && percentile <= 100.0, "--percentile: expected more than 0 to 100, found {percentile}");
    let model = opening.open()?;
    let mut calibration = Calibration::new(&model)?;
    let output = Aside::create(&output)?;
    let lines = fs::read(&texts).with_context(|| format!("{}: cannot be read", texts.display()))?;
    let lines = without_mark(&lines).map_err(|problem| anyhow!("{}: {problem}", texts.display()))?;
    let lines = lines.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let done = counter("texts", true);
    for (number, line) in lines {
        let place = || format!("{}: line {}", texts.display(), number + 1);
        let request = match Request::parse(line, number, Kind::Generate, &model) {
            Ok(request) => request,
            Err(refused) => bail!("{}: {}", place(), refused.reason),
        };
        let length = json!({"max_new_tokens": max_new_tokens});
        let options = model.options().with(length.as_object().context("written above")?);
        let options = options.and_then(|options| options.with(&request.options)).with_context(place)?;
        let batch = requests::batch(&[request], options.pad_token_id).with_context(place)?;
        calibration.add(&batch, &options, cancel).with_context(place)?;
        done.inc(1);
    }
    done.finish_and_clear();
    let ranges = calibration.ranges(percentile);
    ensure!(ranges.texts > 0, "{}: expected a request a line, found none", texts.display());
    write_text(output, &(serde_json::to_string_pretty(&ranges)? + "\n"))?;
    Ok(Outcome::Done)
}
