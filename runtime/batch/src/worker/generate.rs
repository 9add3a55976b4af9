//! Generates targets, and scores given ones.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use t5gemma_protocol::{
    GenerateRequest, RequestError, Score, ScoreRequest, Sequence, Tokenize, TokenizedRequest, Usage, batch,
};
use t5gemma_runtime::{Cancellation, Controls, EngineOptions, Error, GenerationConfig, Hypothesis, Model};

use super::refused;
use crate::answer::{Answer, Answered, Cell, Kind, ResultColumn};
use crate::columns::{Columns, Task};

/// Why a row fails, in the words of whoever gave its options.
pub type Explain<'a> = Box<dyn Fn(&Error, &Map<String, Value>) -> String + Send + Sync + 'a>;

/// Generates targets, with an engine or in fixed batches.
pub struct Generating<'a> {
    /// Copies of a model, each on its own device.
    pub models: Vec<Arc<Model>>,
    /// What rows are tokenized with.
    pub tokenize: &'a (dyn Tokenize + Sync),
    /// Options that those of rows override. Sampling needs a seed.
    pub options: GenerationConfig,
    /// The engine's limits; those of its queue are not used.
    pub engine: EngineOptions,
    /// Runs this many rows at a time with the first model instead. How rows share an engine's steps depends on time, and the
    /// last bits of scores depend on that.
    pub fixed_batches: Option<usize>,
    /// Whether results have all details.
    pub details: bool,
    /// The messages of rows that fail.
    pub explain: Explain<'a>,
}

impl fmt::Debug for Generating<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generating")
            .field("options", &self.options)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl Generating<'_> {
    fn has_texts(&self) -> bool {
        self.models[0].target_tokenizer().is_ok()
    }

    pub(super) fn results(&self, columns: &Columns) -> Vec<ResultColumn> {
        let kind = match (self.has_texts(), self.options.num_return_sequences) {
            (true, 1) => Kind::Text,
            (true, _) => Kind::Texts,
            (false, 1) => Kind::Integers,
            (false, _) => Kind::Json,
        };
        let details: &[_] = if self.details { &[("details", Kind::Json)] } else { &[] };
        columns.results(Task::Generate, kind, details)
    }

    pub(super) fn tokenize(&self, fields: Map<String, Value>) -> Result<TokenizedRequest, RequestError> {
        let mut request = GenerateRequest::try_from(fields)?.tokenize(0.into(), self.tokenize)?;
        let own;
        let options = match request.options.is_empty() {
            true => &self.options,
            false => {
                own = self.options.with_json(&request.options);
                match &own {
                    Ok(options) => options,
                    // The engine refuses them too, with the message that names the flag.
                    Err(_) => return Ok(request),
                }
            }
        };
        // Either would make results depend on when and where they are computed.
        if options.max_time.is_some() {
            return Err(refused("options.max_time", "none in a batch", "a time"));
        }
        if options.do_sample && options.seed.is_none() {
            return Err(refused("options.seed", "a seed, since do_sample is true", "none"));
        }
        if options.num_return_sequences != self.options.num_return_sequences {
            let expected = format!("{}, as for all rows", self.options.num_return_sequences);
            return Err(refused("options.num_return_sequences", &expected, options.num_return_sequences.to_string()));
        }
        if self.details && self.fixed_batches.is_none() && has_scores(options) {
            return Err(refused(
                "options",
                "none that return scores (without --fixed-batches)",
                "beams, logprobs or attentions",
            ));
        }
        request.seed = options.seed.filter(|_| options.do_sample);
        Ok(request)
    }

    /// The request to the engine of a row.
    pub(crate) fn request(&self, row: &TokenizedRequest) -> Result<t5gemma_runtime::Request, Error> {
        let options = self.options.with_json(&row.options)?;
        let batch = batch(std::slice::from_ref(row), options.pad_token_id)?;
        Ok(t5gemma_runtime::Request::new(batch, options))
    }

    /// The answers to rows with the same options that run as one batch.
    pub(super) fn answers(&self, rows: &[&TokenizedRequest], cancel: &Cancellation) -> Result<Vec<Answered>, Error> {
        let options = self.options.with_json(&rows[0].options)?;
        let batch = batch(rows, options.pad_token_id)?;
        let found = self.models[0].generate_batch(&batch, &options, Controls::default().cancellation(cancel))?;
        Ok(rows.iter().zip(found).map(|(row, hypotheses)| self.answer(row, &hypotheses)).collect())
    }

    /// The answer to a row, from its hypotheses.
    pub(crate) fn answer(&self, row: &TokenizedRequest, hypotheses: &[Hypothesis]) -> Answered {
        let tokenizer = self.models[0].target_tokenizer().ok();
        let length = row.sources[0].len();
        let sequence = |hypothesis: &Hypothesis| Sequence::generated(hypothesis, length, tokenizer);
        let sequences: Vec<Sequence> =
            hypotheses.iter().map(sequence).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let target_tokens = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let usage = Usage { source_tokens: row.source_tokens(), target_tokens };
        let text = |sequence: &Sequence| sequence.text.clone().unwrap_or_default();
        let result = match (tokenizer.is_some(), &sequences[..]) {
            (true, [only]) if self.options.num_return_sequences == 1 => Cell::Text(text(only)),
            (true, several) => Cell::Texts(several.iter().map(text).collect()),
            (false, [only]) if self.options.num_return_sequences == 1 => Cell::Integers(only.tokens.clone()),
            (false, several) => Cell::Json(several.iter().map(|sequence| sequence.tokens.clone()).collect()),
        };
        let mut cells = vec![result];
        if self.details {
            let mut details = json!({"sequences": sequences});
            if let Some(seed) = row.seed {
                details["seed"] = seed.into();
            }
            details["usage"] = json!(usage);
            cells.push(Cell::Json(details));
        }
        Ok(Answer { cells, source_tokens: usage.source_tokens, target_tokens })
    }
}

/// Whether details of results with these options have scores, whose last bits depend on the rows that share a step.
pub fn has_scores(options: &GenerationConfig) -> bool {
    options.num_beams > 1 || options.output_logprobs || options.top_logprobs > 0 || options.output_attentions
}

/// Scores given targets.
pub struct Scoring<'a> {
    /// The model.
    pub model: &'a Model,
    /// What rows are tokenized with.
    pub tokenize: &'a (dyn Tokenize + Sync),
    /// The token that is appended to targets that are texts.
    pub end: Option<i64>,
    /// The most likely tokens of each position among the details.
    pub top_logprobs: usize,
    /// Whether results have all details.
    pub details: bool,
    /// Rows of a batch.
    pub batch_size: usize,
}

impl fmt::Debug for Scoring<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scoring").field("batch_size", &self.batch_size).finish_non_exhaustive()
    }
}

impl Scoring<'_> {
    pub(super) fn results(&self, columns: &Columns) -> Vec<ResultColumn> {
        let details: &[_] = if self.details { &[("details", Kind::Json)] } else { &[] };
        columns.results(Task::Score, Kind::Float, details)
    }

    pub(super) fn tokenize(&self, fields: Map<String, Value>) -> Result<TokenizedRequest, RequestError> {
        ScoreRequest::try_from(fields)?.tokenize(0.into(), self.tokenize, self.end)
    }

    pub(super) fn answers(&self, rows: &[&TokenizedRequest], cancel: &Cancellation) -> Result<Vec<Answer>, Error> {
        let targets: Vec<Vec<i64>> = rows.iter().map(|row| row.targets[0].clone()).collect();
        let batch = batch(rows, self.model.generation_config().pad_token_id)?;
        let scored = self.model.score(&batch, &targets, self.top_logprobs, cancel)?;
        let answer = |((row, tokens), scored): ((&&TokenizedRequest, &Vec<i64>), t5gemma_runtime::TargetScore)| {
            let score = Score::new(tokens, &scored.logprobs, None, row.sources[0].len());
            let usage = Usage { source_tokens: row.source_tokens(), target_tokens: tokens.len() };
            let mut cells = vec![Cell::Float(score.logprob)];
            if self.details {
                cells.push(Cell::Json(json!({"scores": [score], "usage": usage})));
            }
            Answer { cells, source_tokens: usage.source_tokens, target_tokens: tokens.len() }
        };
        Ok(rows.iter().zip(&targets).zip(scored).map(answer).collect())
    }
}
