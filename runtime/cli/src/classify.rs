//! `t5gemma classify`: text in, labels and their scores out.

use std::io::{self, Write};

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use t5gemma_protocol::{
    ClassifyResponse, EncoderUsage, Label, LabelsResult, TokenLabels, TokenLabelsResult, TokenizedRequest,
};
use t5gemma_runtime::{Cancellation, Encoder, Error, ScoreFunction, Task};

use crate::exit::Outcome;
use crate::images::{ImageArguments, WithFiles};
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::packing::Packing;
use crate::progress::counter;
use crate::requests::{Kind, Refused, Requests};
use crate::stderr::note;

/// Label texts or their tokens
///
/// A text-classification model prints one line per text: its best labels with their scores, separated by tabs. A
/// token-classification model prints one line per token: the token, its label and the score, with an empty line after
/// each text. With --jsonl, requests and results are JSON lines, described below.
#[derive(clap::Args)]
#[command(after_long_help = JSON_LINES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Texts to label [default: the lines of stdin]
    #[arg(value_name = "TEXT", help_heading = None::<&str>)]
    texts: Vec<String>,
    /// Read requests and write results as JSON lines
    #[arg(long, help_heading = "Input", conflicts_with = "texts")]
    jsonl: bool,
    #[command(flatten)]
    images: ImageArguments,
    /// Number of labels per text or token, best first
    #[arg(long, value_name = "N|all", help_heading = "Output", default_value = "1", value_parser = top_k)]
    top_k: usize,
    /// Function that turns logits into scores [default: depends on the model]
    ///
    /// For text classification, the model's problem_type decides: sigmoid for multi-label models and for models with a
    /// single label, none for regression, softmax for the others.
    #[arg(
        long,
        value_name = "NAME",
        help_heading = "Output",
        value_parser = PossibleValuesParser::new(ScoreFunction::ALL.map(ScoreFunction::name))
    )]
    function_to_apply: Option<String>,
    /// Maximum number of sources in a batch
    ///
    /// Larger requests run in several batches.
    #[arg(
        long,
        value_name = "ROWS",
        help_heading = "Runtime",
        default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    batch_size: u32,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

const JSON_LINES: &str = r#"JSON lines (--jsonl):
Each line of stdin is a request, each line of stdout its result, in the same order:

  request  {"id"?, "text" | "input_ids", "attention_mask"?,
            "images"? | "pixel_values"?, "pan_and_scan"?}
  result   {"id", "labels": [[{"label", "score"}, ...], ...], "usage"}
  or       {"id", "tokens": [[{"token", "text"?, "labels": [{"label",
            "score"}, ...]}, ...], ...], "usage"}
  or       {"id", "error"}

"labels" has one list per source, best first. "token" is a token's id and "text" its vocabulary entry; padding is left out. "usage" counts "source_tokens".

Examples:
  Label texts, with the scores of all labels:
    t5gemma classify model --top-k all 'A wonderful film.' 'Two hours of my life.'

  Label the tokens of each line of a file:
    t5gemma classify token-model < texts.txt"#;

fn top_k(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(k) if k > 0 => Ok(k),
        _ if text == "all" => Ok(usize::MAX),
        _ => Err("expected a positive integer or all".into()),
    }
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let packing = Packing::of_rows(arguments.batch_size);
    let mut opening = Opening::new(arguments.model, arguments.runtime);
    opening.limits = packing.limits();
    let encoder = opening.open_encoder()?;
    let classifier = encoder.classifier()?;
    if !arguments.jsonl {
        encoder.tokenizer()?;
    }
    let of_tokens = encoder.manifest().task == Task::TokenClassification;
    let default = if of_tokens { ScoreFunction::Softmax } else { ScoreFunction::of(classifier) };
    let wanted = arguments.function_to_apply.as_deref();
    let function = ScoreFunction::ALL.into_iter().find(|known| Some(known.name()) == wanted).unwrap_or(default);
    let labels = &classifier.labels;
    let classifying = Classifying { encoder: &encoder, cancel, labels, function, top_k: arguments.top_k };

    let mut outcome = Outcome::Done;
    let done = counter("classified", true);
    let with_files = WithFiles(&encoder);
    let kind = Kind::Encode { truncates: false };
    let read = Requests::open(&arguments.texts, arguments.jsonl, kind, &with_files);
    let mut read = read.with_images(arguments.images.fields());
    let mut number = 0;
    loop {
        let group = read.next_group(&packing, cancel)?;
        if group.is_empty() {
            return Ok(outcome);
        }
        for answer in classifying.answers(group)? {
            number += 1;
            let line = match answer {
                Ok((request, rows)) if arguments.jsonl => serde_json::to_string(&classifying.result(&request, rows))?,
                Ok((_, rows)) => classifying.text(&rows),
                Err(refused) => {
                    outcome = Outcome::SomeFailed;
                    if arguments.jsonl {
                        serde_json::to_string(&ClassifyResponse::Error(refused.into()))?
                    } else {
                        done.suspend(|| note!("t5gemma: text {number}: {}", refused.reason));
                        String::new()
                    }
                }
            };
            let mut out = io::stdout().lock();
            writeln!(out, "{line}").and_then(|()| out.flush())?;
            done.inc(1);
        }
    }
}

/// The scores of a row: of the whole source, or of each token.
enum Row {
    Source(Vec<f32>),
    Tokens(Vec<(i64, Vec<f32>)>),
}

struct Classifying<'a> {
    encoder: &'a Encoder,
    cancel: &'a Cancellation,
    labels: &'a [String],
    function: ScoreFunction,
    top_k: usize,
}

type Answer = Result<(TokenizedRequest, Vec<Row>), Refused>;

impl Classifying<'_> {
    /// Answers requests as one batch; if it fails, each alone, so that only the one at fault fails.
    fn answers(&self, group: Vec<Result<TokenizedRequest, Refused>>) -> Result<Vec<Answer>> {
        let requests: Vec<&TokenizedRequest> = group.iter().flatten().collect();
        let mut together = match self.rows(&requests) {
            Ok(rows) => Some(rows.into_iter()),
            Err(Error::Cancelled) => return Err(Error::Cancelled.into()),
            Err(_) => None,
        };
        let answer = |request: Result<TokenizedRequest, Refused>| {
            let request = match request {
                Ok(request) => request,
                Err(refused) => return Ok(Err(refused)),
            };
            if let Some(rows) = &mut together {
                let rows = rows.by_ref().take(request.sources.len()).collect();
                return Ok(Ok((request, rows)));
            }
            match self.rows(&[&request]) {
                Ok(rows) => Ok(Ok((request, rows))),
                Err(Error::Cancelled) => Err(Error::Cancelled.into()),
                Err(error) => Ok(Err(Refused { id: request.id, reason: error.to_string() })),
            }
        };
        group.into_iter().map(answer).collect()
    }

    fn rows(&self, requests: &[&TokenizedRequest]) -> Result<Vec<Row>, Error> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let batch = t5gemma_protocol::batch(requests, self.encoder.pad_token_id())?;
        if self.encoder.manifest().task == Task::TextClassification {
            let logits = self.encoder.classify(&batch, self.cancel)?;
            return Ok(logits.outer_iter().map(|row| Row::Source(self.function.scores(&row.to_vec()))).collect());
        }
        let logits = self.encoder.classify_tokens(&batch, self.cancel)?;
        let row = |(row, logits): (usize, ndarray::ArrayView2<'_, f32>)| {
            let tokens = batch.source(row).iter().zip(batch.row_mask(row)).zip(logits.outer_iter());
            let seen = tokens.filter(|((_, mask), _)| **mask != 0);
            Row::Tokens(seen.map(|((&id, _), logits)| (id, self.function.scores(&logits.to_vec()))).collect())
        };
        Ok(logits.outer_iter().enumerate().map(row).collect())
    }

    /// The best labels with their scores; ties keep the model's order.
    fn best(&self, scores: &[f32]) -> Vec<(&str, f32)> {
        let mut labels: Vec<(&str, f32)> = self.labels.iter().map(String::as_str).zip(scores.iter().copied()).collect();
        labels.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        labels.truncate(self.top_k);
        labels
    }

    /// The lines of a text.
    fn text(&self, rows: &[Row]) -> String {
        let best = |scores: &[f32]| {
            let pairs: Vec<String> =
                self.best(scores).iter().map(|(label, score)| format!("{label}\t{score}")).collect();
            pairs.join("\t")
        };
        let lines = rows.iter().flat_map(|row| match row {
            Row::Source(scores) => vec![best(scores)],
            Row::Tokens(tokens) => {
                let line = |(id, scores): &(i64, Vec<f32>)| {
                    format!("{}\t{}\n", self.piece(*id).unwrap_or_else(|| id.to_string()), best(scores))
                };
                vec![tokens.iter().map(line).collect()]
            }
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    fn piece(&self, id: i64) -> Option<String> {
        self.encoder.tokenizer().ok()?.token(id)
    }

    /// The result of a request.
    fn result(&self, request: &TokenizedRequest, rows: Vec<Row>) -> ClassifyResponse {
        let labels = |scores: &[f32]| {
            let label = |(label, score): (&str, f32)| Label { label: label.to_string(), score: score.into() };
            self.best(scores).into_iter().map(label).collect::<Vec<_>>()
        };
        let (mut sources, mut tokens) = (Vec::new(), Vec::new());
        for row in &rows {
            match row {
                Row::Source(scores) => sources.push(labels(scores)),
                Row::Tokens(row) => {
                    let token = |(id, scores): &(i64, Vec<f32>)| TokenLabels {
                        token: *id,
                        text: self.piece(*id),
                        labels: labels(scores),
                    };
                    tokens.push(row.iter().map(token).collect());
                }
            }
        }
        let (id, usage) = (Some(request.id.clone()), EncoderUsage { source_tokens: request.source_tokens() });
        match rows.first() {
            Some(Row::Tokens(_)) => ClassifyResponse::Tokens(TokenLabelsResult { id, tokens, usage }),
            _ => ClassifyResponse::Labels(LabelsResult { id, labels: sources, usage }),
        }
    }
}
