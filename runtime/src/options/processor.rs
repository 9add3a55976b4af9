//! `LogitsProcessor`: a callback that changes scores, as a generation option.

use std::fmt;
use std::sync::Arc;

/// A callback that changes scores. Only clones of the same processor are equal.
#[derive(Clone)]
pub struct LogitsProcessor(Arc<Change>);

type Change = dyn Fn(&Position, &mut [f32]) + Send + Sync;

/// The position in a target whose scores a [`LogitsProcessor`] changes.
#[derive(Clone, Copy, Debug)]
pub struct Position<'a> {
    /// The tokens of the source, including the caller's padding.
    pub source: &'a [i64],
    /// Prompt and generated tokens of the target so far.
    pub history: &'a [i64],
    /// Number of prompt tokens in `history`.
    pub prompt_len: usize,
}

impl LogitsProcessor {
    /// Wraps a function that changes the scores of the next token, one for each token of the vocabulary: logits, or
    /// log-probabilities in beam search. A score of −∞ forbids its token. The function is called for each target in
    /// each step and must depend on its arguments only, or results depend on the other rows of a batch.
    pub fn new(change: impl Fn(&Position, &mut [f32]) + Send + Sync + 'static) -> LogitsProcessor {
        LogitsProcessor(Arc::new(change))
    }

    pub(crate) fn apply(&self, position: &Position, scores: &mut [f32]) {
        (self.0)(position, scores);
    }
}

impl fmt::Debug for LogitsProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogitsProcessor(…)")
    }
}

impl PartialEq for LogitsProcessor {
    fn eq(&self, other: &LogitsProcessor) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
