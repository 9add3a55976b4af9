//! `Hypothesis`: one generated target and why it ended, optionally with log-probabilities and cross-attentions. Plain
//! data that the search makes and callers read; `item` fills in the optional parts.

use std::slice::ChunksExact;

/// Why a hypothesis ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// Its last token is an end-of-sequence token.
    Eos,
    /// It is as long as the options allow.
    Length,
    /// Its last token completes one of `stop_strings`.
    StopString,
    /// `max_time` has passed.
    Time,
    /// It satisfies its constraint, and nothing may follow, not even an end-of-sequence token.
    Constraint,
    /// It ended before satisfying its constraint, or the options forbid every possible next token.
    ConstraintIncomplete,
}

impl FinishReason {
    /// The name in results: `eos`, `length`, `stop_string`, `time`, `constraint` or `constraint_incomplete`.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Eos => "eos",
            FinishReason::Length => "length",
            FinishReason::StopString => "stop_string",
            FinishReason::Time => "time",
            FinishReason::Constraint => "constraint",
            FinishReason::ConstraintIncomplete => "constraint_incomplete",
        }
    }
}

/// One generated target.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Hypothesis {
    /// The generated tokens: without the prompt, without padding, with the end-of-sequence token if there is one.
    pub tokens: Vec<i64>,
    /// The summed log-probability divided by `length^length_penalty` (`sequences_scores` in transformers), plus the
    /// term of `coverage_penalty`; beam search only.
    pub score: Option<f32>,
    /// Why it ends.
    pub finish_reason: FinishReason,
    /// The model's log-probabilities of the tokens, with `output_logprobs`.
    pub logprobs: Option<Logprobs>,
    /// The cross-attentions of the tokens, with `output_attentions`.
    pub cross_attentions: Option<CrossAttentions>,
}

/// The log-probabilities of one target's tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// For each token, its log-probability given everything before it.
    pub tokens: Vec<f32>,
    /// For each token, the likeliest tokens at its position with their log-probabilities, best first; empty unless
    /// requested.
    pub top: Vec<Vec<(i64, f32)>>,
}

impl Logprobs {
    /// The log-probability of the whole target.
    pub fn sum(&self) -> f64 {
        self.tokens.iter().map(|&logprob| f64::from(logprob)).sum()
    }

    /// Those of the tokens from `from` on.
    pub(crate) fn after(&self, from: usize) -> Logprobs {
        let (tokens, top) = (self.tokens.get(from..), self.top.get(from..));
        Logprobs { tokens: tokens.unwrap_or_default().to_vec(), top: top.unwrap_or_default().to_vec() }
    }

    /// Each token's own.
    pub(crate) fn each(self) -> impl Iterator<Item = Logprobs> {
        let mut top = self.top.into_iter();
        self.tokens
            .into_iter()
            .map(move |token| Logprobs { tokens: vec![token], top: top.next().into_iter().collect() })
    }

    /// `e^(−mean)` of the tokens' log-probabilities; 1 without tokens.
    pub fn perplexity(&self) -> f64 {
        (-self.sum() / self.tokens.len().max(1) as f64).exp()
    }
}

/// How much each token of a target attended to each token of its source when it was chosen: probabilities, averaged
/// over heads and over the decoder layers that the model was exported with. A row sums to 1; padding of the source has
/// 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossAttentions {
    source: usize,
    values: Vec<f32>,
}

impl CrossAttentions {
    /// Before the first token, for a source of `source` tokens with its padding.
    pub(crate) fn of_source(source: usize) -> CrossAttentions {
        CrossAttentions { source, values: Vec::new() }
    }

    /// Appends those of the next token; entries after the source are padding of the batch.
    pub(crate) fn push(&mut self, attentions: &[f32]) {
        self.values.extend_from_slice(&attentions[..self.source]);
    }

    /// The number of source tokens as given, padding included.
    pub fn source_length(&self) -> usize {
        self.source
    }

    /// All numbers, `[target tokens, source tokens]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The numbers of each target token.
    pub fn tokens(&self) -> ChunksExact<'_, f32> {
        self.values.chunks_exact(self.source.max(1))
    }

    /// The numbers of each target token as the float64 with the fewest digits that round to the float32, for JSON.
    pub fn decimals(&self) -> impl Iterator<Item = Vec<f64>> {
        let number = |x: &f32| x.to_string().parse::<f64>().unwrap_or_else(|_| f64::from(*x));
        self.tokens().map(move |row| row.iter().map(number).collect())
    }

    /// The source token that each target token attended to most; the first one in a tie.
    pub fn most_attended(&self) -> Vec<usize> {
        let most = |row: &[f32]| (1..row.len()).fold(0, |most, at| if row[at] > row[most] { at } else { most });
        self.tokens().map(most).collect()
    }
}
