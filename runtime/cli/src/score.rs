//! `t5gemma score`: log-probabilities of given targets.

use std::io::{self, Write};
use std::sync::Arc;

use anyhow::{Context, Result};
use t5gemma_protocol::{Score, ScoreResponse, ScoreResult, TokenizedRequest, Usage, batch};
use t5gemma_runtime::{Batch, Cancellation, CrossAttentions, Error, Logprobs, Model, TargetScore};

use crate::exit::Outcome;
use crate::images::{ImageArguments, WithFiles};
use crate::lines::Lines;
use crate::opening::{AdapterArguments, ModelArguments, Opening, RuntimeArguments};
use crate::packing::Packing;
use crate::progress::counter;
use crate::requests::{self, Kind, Refused};

/// Score given targets
///
/// Computes the log-probability of each target given its source. Requests and results are JSON lines, described below.
#[derive(clap::Args)]
#[command(after_long_help = JSON_LINES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Do not append the end token to targets given as text
    #[arg(long, help_heading = "Input")]
    no_eos: bool,
    /// Return the log-probabilities of the N most likely tokens at each position
    #[arg(long, value_name = "N", help_heading = "Output", default_value_t = 0)]
    top_logprobs: usize,
    /// Return the attention of each token to the source
    ///
    /// The model must be exported with --alignment.
    #[arg(long, help_heading = "Output")]
    output_attentions: bool,
    #[command(flatten)]
    images: ImageArguments,
    #[command(flatten)]
    adapters: AdapterArguments,
    #[command(flatten)]
    packing: Packing,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

const JSON_LINES: &str = r#"JSON lines:
Each line of stdin is a request, each line of stdout its result, in the same order:

  request  {"id"?, "text" | "input_ids", "attention_mask"?,
            "images"? | "pixel_values"?, "pan_and_scan"?,
            "target" | "target_ids", "decoder_text"? | "decoder_input_ids"?,
            "adapter"?}
  result   {"id", "scores": [{"tokens", "logprob", "perplexity", "logprobs",
            "top_logprobs"?, "cross_attentions"?}, ...], "usage"}
  or       {"id", "error"}

Fields of a request, besides those of `t5gemma generate`:
  target            text, or list of texts, one per source; the end token is
                    appended and scored, unless --no-eos is given
  target_ids        the same as token ids, scored as they are
  adapter           name of the LoRA adapter to score with

Fields of a result:
  logprobs          log-probability of each token of the target, without the
                    decoder prompt
  logprob           their sum
  perplexity        exp(-mean of logprobs)
  top_logprobs      as for `t5gemma generate`
  cross_attentions  as for `t5gemma generate`

Examples:
  Score a target:
    echo '{"text": "Mr. Brown paid $5.", "target": "mister brown paid five dollars"}' |
      t5gemma score model

  Score captions of an image:
    t5gemma score model --image photo.jpg < captions.jsonl

  Score the requests of a file, with the three most likely tokens at each position:
    t5gemma score model --top-logprobs 3 < requests.jsonl > scores.jsonl"#;

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let mut opening = Opening::new(arguments.model, arguments.runtime);
    opening.limits = arguments.packing.limits();
    let models = [Arc::new(opening.open()?)];
    arguments.adapters.load(&models)?;
    let [model] = &models;
    let end = model.generation_config().eos_token_id.first().copied().filter(|_| !arguments.no_eos);
    let kind = Kind::Score { end };
    let packing = &arguments.packing;
    let (top, output_attentions) = (arguments.top_logprobs, arguments.output_attentions);
    let scoring = Scoring { model, cancel, top, output_attentions };
    let with_files = WithFiles(&**model);
    let images = arguments.images.fields();
    let read = |line: &[u8], number| requests::read_line(line, &images, number, kind, &with_files);
    let mut lines = Lines::requests();
    let mut outcome = Outcome::Done;
    let done = counter("requests", true);
    while let Some((number, line)) = lines.next(cancel)? {
        let mut requests = vec![read(&line, number)];
        while requests.len() < packing.window() && lines.is_ready(packing.patience())? {
            let Some((number, line)) = lines.next(cancel)? else { break };
            requests.push(read(&line, number));
        }
        let answers = match packing.is_by_tokens() {
            true => packing.run(requests, fits, |pack| scoring.group(pack)),
            false => scoring.answers(requests),
        };
        for answer in answers? {
            let response = match answer {
                Ok((request, scores)) => ScoreResponse::Result(result(&request, &scores)),
                Err(refused) => {
                    outcome = Outcome::SomeFailed;
                    ScoreResponse::Error(refused.into())
                }
            };
            let line = serde_json::to_string(&response)?;
            let mut out = io::stdout().lock();
            writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot write to stdout")?;
            done.inc(1);
        }
    }
    Ok(outcome)
}

struct Scoring<'a> {
    model: &'a Model,
    cancel: &'a Cancellation,
    top: usize,
    output_attentions: bool,
}

/// A target's log-probabilities and, if requested, cross-attentions.
type Scored = (Logprobs, Option<CrossAttentions>);

type Answer = Result<(TokenizedRequest, Vec<Scored>), Refused>;

/// Whether two requests can be one batch.
fn fits(a: &TokenizedRequest, b: &TokenizedRequest) -> bool {
    a.prompts.is_none() && b.prompts.is_none()
}

impl Scoring<'_> {
    /// Answers requests in order, neighbours without decoder prompts as one batch.
    fn answers(&self, requests: Vec<Result<TokenizedRequest, Refused>>) -> Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut group: Vec<TokenizedRequest> = Vec::new();
        for request in requests {
            match request {
                Ok(request) if request.prompts.is_none() => group.push(request),
                alone => {
                    answers.extend(self.group(std::mem::take(&mut group))?);
                    match alone {
                        Ok(request) => answers.extend(self.group(vec![request])?),
                        Err(refused) => answers.push(Err(refused)),
                    }
                }
            }
        }
        answers.extend(self.group(group)?);
        Ok(answers)
    }

    fn score(&self, batch: &Batch, targets: &[Vec<i64>]) -> Result<Vec<Scored>, Error> {
        if self.output_attentions {
            self.model.check_cross_attentions()?;
        }
        let scored = self.model.score(batch, targets, self.top, self.cancel)?;
        let requested =
            |score: TargetScore| (score.logprobs, score.cross_attentions.filter(|_| self.output_attentions));
        Ok(scored.into_iter().map(requested).collect())
    }

    /// Answers requests as one batch. If it fails, each request runs alone, so that only the one at fault fails.
    fn group(&self, mut group: Vec<TokenizedRequest>) -> Result<Vec<Answer>> {
        if group.is_empty() {
            return Ok(Vec::new());
        }
        let pad = self.model.generation_config().pad_token_id;
        let targets: Vec<Vec<i64>> = group.iter().flat_map(|request| request.targets.clone()).collect();
        match batch(&group, pad).and_then(|batch| self.score(&batch, &targets)) {
            Ok(mut rows) => Ok(group
                .into_iter()
                .map(|request| {
                    let rest = rows.split_off(request.sources.len());
                    Ok((request, std::mem::replace(&mut rows, rest)))
                })
                .collect()),
            Err(Error::Cancelled) => Err(Error::Cancelled.into()),
            Err(error) if group.len() == 1 => {
                let reason = error.to_string();
                let reason = ["output_attentions", "top_logprobs"]
                    .iter()
                    .find(|name| reason.starts_with(**name))
                    .map_or(reason.clone(), |name| reason.replacen(name, &format!("--{}", name.replace('_', "-")), 1));
                Ok(vec![Err(Refused { id: group.remove(0).id, reason })])
            }
            Err(_) => {
                let alone = group.into_iter().map(|request| self.group(vec![request]));
                Ok(alone.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
            }
        }
    }
}

/// The result of a request.
fn result(request: &TokenizedRequest, scores: &[Scored]) -> ScoreResult {
    let score = |((tokens, source), (found, attentions)): ((&Vec<i64>, &Vec<i64>), &Scored)| {
        Score::new(tokens, found, attentions.as_ref(), source.len())
    };
    let target_tokens = request.targets.iter().map(Vec::len).sum();
    let scores = request.targets.iter().zip(&request.sources).zip(scores).map(score).collect();
    let usage = Usage { source_tokens: request.source_tokens(), target_tokens };
    ScoreResult { id: Some(request.id.clone()), scores, usage }
}
