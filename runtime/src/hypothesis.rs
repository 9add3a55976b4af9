//! `Hypothesis`: one generated target and why it ended, with what a call may ask for besides its tokens: log-probabilities and
//! cross-attention. Plain data, which the search makes and callers read; `logprobs` and `alignment` fill the latter two in.

use std::slice::ChunksExact;

/// Why a hypothesis ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// Its last token is an end-of-sequence token.
    Eos,
    /// It is as long as the options allow.
    Length,
    /// Its text contains one of `stop_strings`, which its last token completes.
    StopString,
    /// `max_time` was over.
    Time,
    /// It meets its constraint, and nothing may follow it, not even an end-of-sequence token.
    Constraint,
    /// It ended before it met its constraint, or the options forbid every token that could follow.
    ConstraintIncomplete,
}

impl FinishReason {
    /// Names the reason as results spell it: `eos`, `length`, `stop_string`, `time`, `constraint` or
    /// `constraint_incomplete`.
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
pub struct Hypothesis {
    /// The generated tokens: without the prompt, without filling, with the end-of-sequence token if there is one.
    pub tokens: Vec<i64>,
    /// Summed log-probability divided by `length^length_penalty`, Hugging Face's `sequences_scores`, and what
    /// `coverage_penalty` adds; beam search only.
    pub score: Option<f32>,
    /// Why it ends.
    pub finish_reason: FinishReason,
    /// The model's log-probabilities of the tokens, with `output_logprobs`.
    pub logprobs: Option<Logprobs>,
    /// What the tokens attended to in the source, with `output_attentions`.
    pub cross_attentions: Option<CrossAttentions>,
}

/// The log-probabilities of one target's tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// Of each token, given everything before it.
    pub tokens: Vec<f32>,
    /// For each token, the likeliest tokens at its place with theirs, best first; empty if none were asked for.
    pub top: Vec<Vec<(i64, f32)>>,
}

impl Logprobs {
    /// The log-probability of the whole target.
    pub fn sum(&self) -> f64 {
        self.tokens.iter().map(|&logprob| f64::from(logprob)).sum()
    }

    /// `e^(−mean)` of the tokens' log-probabilities; that of no token is 1.
    pub fn perplexity(&self) -> f64 {
        (-self.sum() / self.tokens.len().max(1) as f64).exp()
    }
}

/// How much each token of a target attended to each token of its source when it was chosen: probabilities, the mean over heads
/// and those decoder layers that the model was exported with. A row sums to 1; padding of the source has 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossAttentions {
    source: usize,
    values: Vec<f32>,
}

impl CrossAttentions {
    /// Before the first token, for a source of so many tokens with its padding.
    pub(crate) fn of_source(source: usize) -> CrossAttentions {
        CrossAttentions { source, values: Vec::new() }
    }

    /// Takes the next token's; what is behind the source made rows equally long.
    pub(crate) fn push(&mut self, attended: &[f32]) {
        self.values.extend_from_slice(&attended[..self.source]);
    }

    /// The source's tokens as it was given, with padding of its own.
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

    /// The numbers of each target token with as many digits as tell float32 apart, as JSON is to have them.
    pub fn decimals(&self) -> impl Iterator<Item = Vec<f64>> {
        let number = |x: &f32| x.to_string().parse::<f64>().unwrap_or_else(|_| f64::from(*x));
        self.tokens().map(move |row| row.iter().map(number).collect())
    }

    /// The source token that each target token attended to most; of several the first.
    pub fn most_attended(&self) -> Vec<usize> {
        let most = |row: &[f32]| (1..row.len()).fold(0, |most, at| if row[at] > row[most] { at } else { most });
        self.tokens().map(most).collect()
    }
}
