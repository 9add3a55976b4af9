//! The logits processors one by one. Their arithmetic is that of Hugging Face's classes of the same names, in float32.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Debug;
use std::sync::Arc;

use t5gemma_kernels::LogSumExp;

use super::warpers::Warper;
use crate::options::{LogitsProcessor, Position};

/// Forbids tokens depending on the history, such as those that a constraint on the whole output does not allow.
pub trait TokenFilter: Debug + Send + Sync {
    /// Sets the scores of the tokens that may not follow `history` to −∞.
    fn apply(&self, scores: &mut [f32], history: &[i64]);
}

/// A logits processor and its parameters.
#[derive(Clone, Debug)]
pub(super) enum Processor {
    /// Adds a bias to the score of a token that would complete a sequence. Bad words are sequences with a bias of −∞.
    SequenceBias(Vec<TokenBias>),
    /// Subtracts from the scores of tokens for each beam of an earlier group that chose them in this step.
    Diversity(f32),
    /// [`Processor::RepetitionPenalty`] for the tokens of the source.
    EncoderRepetitionPenalty { source: Vec<i64>, penalty: f32 },
    /// Scales the scores of tokens that occur in the history.
    RepetitionPenalty(f32),
    /// Subtracts from the scores of generated tokens: for each occurrence, and for occurring at all.
    OccurrencePenalty { frequency: f32, presence: f32, prompt_len: usize },
    /// Forbids n-grams that occur in the history.
    NoRepeatNgram(usize),
    /// Forbids n-grams that occur in the source.
    EncoderNoRepeatNgram { source: Vec<i64>, size: usize },
    /// Forbids tokens while the length of the history is in `from..to`.
    Forbid { tokens: Vec<i64>, from: usize, to: usize },
    /// Forbids all other tokens at one length of the history.
    Force { tokens: Vec<i64>, at: usize },
    /// Replaces NaN and infinite scores.
    RemoveInvalid,
    /// Raises the scores of end-of-sequence tokens, the more the longer the history is than `start`.
    ExponentialDecay { eos: Vec<i64>, start: usize, factor: f64 },
    /// A processor of the caller's, with its index among them.
    Caller { processor: LogitsProcessor, index: usize, source: Vec<i64>, prompt_len: usize },
    /// Forbids all other tokens where an end-of-sequence token has the highest score.
    EndOnArgmax { eos: Vec<i64> },
    /// Forbids the tokens that a constraint on the whole output does not allow.
    Filter(Arc<dyn TokenFilter>),
    /// Prepares the scores for sampling.
    Warp(Warper),
    /// Takes the log-softmax.
    Renormalize,
}

/// The biases of all sequences that end in one token.
#[derive(Clone, Debug)]
pub(super) struct TokenBias {
    token: i64,
    prefixes: Vec<PrefixBias>,
}

/// What is added to a token's score where the history ends with a prefix.
#[derive(Clone, Debug)]
struct PrefixBias {
    prefix: Vec<i64>,
    bias: f32,
}

/// A row of scores.
pub(super) struct Row<'r> {
    pub scores: &'r mut [f32],
    /// The tokens of a sparse row, ascending; empty if the row has a score for each token.
    pub tokens: &'r [u32],
}

impl Row<'_> {
    /// The score of a token, if there is one.
    fn at(&mut self, token: i64) -> Option<&mut f32> {
        let index = match self.tokens {
            [] => usize::try_from(token).ok()?,
            tokens => tokens.binary_search(&u32::try_from(token).ok()?).ok()?,
        };
        self.scores.get_mut(index)
    }
}

impl Processor {
    /// Whether it can change anything for a history of this length.
    pub fn is_active(&self, length: usize) -> bool {
        match *self {
            Processor::NoRepeatNgram(size) => length >= size,
            Processor::EncoderNoRepeatNgram { size, .. } => length + 1 >= size,
            Processor::Forbid { from, to, .. } => (from..to).contains(&length),
            Processor::Force { at, .. } => length == at,
            Processor::OccurrencePenalty { prompt_len, .. } => length > prompt_len,
            Processor::ExponentialDecay { start, .. } => length > start,
            Processor::SequenceBias(_)
            | Processor::Diversity(_)
            | Processor::EncoderRepetitionPenalty { .. }
            | Processor::RepetitionPenalty(_)
            | Processor::RemoveInvalid
            | Processor::Caller { .. }
            | Processor::EndOnArgmax { .. }
            | Processor::Warp(_)
            | Processor::Filter(_)
            | Processor::Renormalize => true,
        }
    }

    /// Whether it needs rows with a score for each token of the vocabulary, at the token's index.
    pub fn needs_full_rows(&self) -> bool {
        matches!(self, Processor::Caller { .. } | Processor::Filter(_))
    }

    /// Whether it prepares the scores that are left for the choice, and runs after everything that forbids tokens.
    pub fn is_final(&self) -> bool {
        matches!(self, Processor::EndOnArgmax { .. } | Processor::Warp(_) | Processor::Renormalize)
    }

    /// Replaces token ids by others, such as indices in a
    /// [`VocabularySubset`](crate::vocabulary_subset::VocabularySubset).
    ///
    /// # Panics
    /// If the processor needs full rows.
    pub fn map_tokens(&mut self, map: impl Fn(i64) -> i64) {
        let replace = |tokens: &mut [i64]| tokens.iter_mut().for_each(|token| *token = map(*token));
        match self {
            Processor::SequenceBias(biases) => {
                for TokenBias { token, prefixes } in biases {
                    *token = map(*token);
                    prefixes.iter_mut().for_each(|entry| replace(&mut entry.prefix));
                }
            }
            Processor::EncoderRepetitionPenalty { source, .. } | Processor::EncoderNoRepeatNgram { source, .. } => {
                replace(source)
            }
            Processor::Forbid { tokens, .. }
            | Processor::Force { tokens, .. }
            | Processor::EndOnArgmax { eos: tokens }
            | Processor::ExponentialDecay { eos: tokens, .. } => replace(tokens),
            Processor::Caller { .. } | Processor::Filter(_) => unreachable!("these need rows of the whole vocabulary"),
            Processor::Diversity(_)
            | Processor::RepetitionPenalty(_)
            | Processor::OccurrencePenalty { .. }
            | Processor::NoRepeatNgram(_)
            | Processor::RemoveInvalid
            | Processor::Warp(_)
            | Processor::Renormalize => {}
        }
    }

    /// Changes the scores. `history` has a length for which the processor is active; `chosen` are the tokens that
    /// earlier groups of beams chose in this step, one for each beam.
    pub fn apply(&self, row: &mut Row, history: &[i64], chosen: &[i64]) {
        match self {
            Processor::Diversity(penalty) => {
                for &token in chosen {
                    if let Some(score) = row.at(token) {
                        *score -= penalty;
                    }
                }
            }
            Processor::SequenceBias(biases) => {
                for TokenBias { token, prefixes } in biases {
                    let active = prefixes.iter().filter(|entry| history.ends_with(&entry.prefix));
                    if let Some(bias) = active.map(|entry| entry.bias).reduce(|sum, bias| sum + bias)
                        && let Some(score) = row.at(*token)
                    {
                        *score += bias;
                    }
                }
            }
            Processor::EncoderRepetitionPenalty { source, penalty } => penalize(row, source, *penalty),
            Processor::RepetitionPenalty(penalty) => penalize(row, history, *penalty),
            Processor::OccurrencePenalty { frequency, presence, prompt_len } => {
                let mut counts: HashMap<i64, u32> = HashMap::new();
                history[*prompt_len..].iter().for_each(|&token| *counts.entry(token).or_default() += 1);
                for (token, count) in counts {
                    if let Some(score) = row.at(token) {
                        *score -= count as f32 * frequency + presence;
                    }
                }
            }
            Processor::NoRepeatNgram(size) => forbid_ngrams(row, history, history, *size),
            Processor::EncoderNoRepeatNgram { source, size } => forbid_ngrams(row, source, history, *size),
            Processor::Forbid { tokens, .. } => set(row, tokens, f32::NEG_INFINITY),
            Processor::Force { tokens, .. } => {
                row.scores.fill(f32::NEG_INFINITY);
                set(row, tokens, 0.0);
            }
            Processor::RemoveInvalid => {
                for score in row.scores.iter_mut() {
                    *score = if score.is_nan() { 0.0 } else { score.clamp(f32::MIN, f32::MAX) };
                }
            }
            Processor::ExponentialDecay { eos, start, factor } => {
                let growth = (factor.powf((history.len() - start) as f64) - 1.0) as f32;
                update(row, eos, |score| if score.is_finite() { score + score.abs() * growth } else { score });
            }
            Processor::Caller { processor, source, prompt_len, .. } => {
                processor.apply(&Position { source, history, prompt_len: *prompt_len }, row.scores);
            }
            Processor::EndOnArgmax { eos } => {
                let mut best = f32::NEG_INFINITY;
                let ends: Vec<(i64, f32)> = eos.iter().filter_map(|&end| Some((end, *row.at(end)?))).collect();
                row.scores.iter().for_each(|&score| best = best.max(score));
                // Of equal scores the lowest token counts, as in greedy search.
                let first = row.scores.iter().position(|&score| score == best);
                let first = first.map(|at| row.tokens.get(at).map_or(at as i64, |&token| i64::from(token)));
                if let Some((end, score)) = ends.into_iter().find(|(end, _)| Some(*end) == first) {
                    row.scores.fill(f32::NEG_INFINITY);
                    set(row, &[end], score);
                }
            }
            Processor::Warp(warper) => warper.apply(row.scores),
            Processor::Filter(filter) => filter.apply(row.scores, history),
            Processor::Renormalize => LogSumExp::of(row.scores).apply(row.scores),
        }
    }
}

/// Groups biased sequences by their last token. Of a sequence given twice the last bias counts, as in a Python
/// dictionary.
pub(super) fn sequence_bias<'a>(sequences: impl Iterator<Item = (&'a [i64], f32)>) -> Processor {
    let mut indices: HashMap<&[i64], usize> = HashMap::new();
    let mut distinct: Vec<(&[i64], f32)> = Vec::new();
    for (tokens, bias) in sequences.filter(|(tokens, _)| !tokens.is_empty()) {
        match indices.entry(tokens) {
            Entry::Occupied(index) => distinct[*index.get()].1 = bias,
            Entry::Vacant(index) => {
                index.insert(distinct.len());
                distinct.push((tokens, bias));
            }
        }
    }
    // float32 sums depend on their order: single tokens first, then by length in the order in which lengths first
    // appear.
    let mut lengths: HashMap<usize, usize> = HashMap::from([(1, 0)]);
    for (tokens, _) in &distinct {
        let next = lengths.len();
        lengths.entry(tokens.len()).or_insert(next);
    }
    distinct.sort_by_key(|(tokens, _)| lengths[&tokens.len()]);

    let mut indices: HashMap<i64, usize> = HashMap::new();
    let mut biases: Vec<TokenBias> = Vec::new();
    for (tokens, bias) in distinct {
        let (&token, prefix) = tokens.split_last().expect("empty sequences are filtered out above");
        let index = *indices.entry(token).or_insert_with(|| {
            biases.push(TokenBias { token, prefixes: Vec::new() });
            biases.len() - 1
        });
        biases[index].prefixes.push(PrefixBias { prefix: prefix.to_vec(), bias });
    }
    Processor::SequenceBias(biases)
}

/// Applies a repetition penalty to the scores of tokens; a token that occurs twice is penalized once.
fn penalize(row: &mut Row, tokens: &[i64], penalty: f32) {
    update(row, tokens, |score| if score < 0.0 { score * penalty } else { score / penalty });
}

/// Forbids every token that would complete an n-gram of `text`.
fn forbid_ngrams(row: &mut Row, text: &[i64], history: &[i64], size: usize) {
    let prefix = &history[history.len() + 1 - size..];
    for ngram in text.windows(size).filter(|ngram| ngram.starts_with(prefix)) {
        set(row, &ngram[size - 1..], f32::NEG_INFINITY);
    }
}

/// Replaces the scores of tokens by a function of their old scores; a token that occurs twice is updated once.
fn update(row: &mut Row, tokens: &[i64], new: impl Fn(f32) -> f32) {
    let replaced: Vec<(i64, f32)> =
        tokens.iter().filter_map(|&token| row.at(token).map(|score| (token, new(*score)))).collect();
    for (token, score) in replaced {
        set(row, &[token], score);
    }
}

fn set(row: &mut Row, tokens: &[i64], score: f32) {
    for &token in tokens {
        if let Some(old) = row.at(token) {
            *old = score;
        }
    }
}
