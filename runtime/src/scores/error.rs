//! `InvalidScores`: scores of a caller's logits processor from which no token can be chosen.

use std::fmt;

/// Scores of a caller's [`LogitsProcessor`](crate::LogitsProcessor) from which no token can be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidScores {
    /// The index of the processor in `logits_processor`.
    pub processor: usize,
    /// What is wrong with them.
    pub problem: ScoresProblem,
}

/// What is wrong with scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoresProblem {
    /// A score is NaN.
    NaN,
    /// A score is +∞.
    Infinity,
    /// All scores are −∞.
    AllForbidden,
}

impl ScoresProblem {
    /// What is wrong with scores one by one.
    pub(super) fn of(scores: &[f32]) -> Option<ScoresProblem> {
        // In blocks, so that the compiler can compare many at once.
        let is_usable = |block: &[f32]| block.iter().fold(true, |usable, &score| usable & (score < f32::INFINITY));
        let block = scores.chunks(4096).find(|block| !is_usable(block))?;
        let has_nan = block.iter().any(|score| score.is_nan());
        Some(if has_nan { ScoresProblem::NaN } else { ScoresProblem::Infinity })
    }
}

impl fmt::Display for InvalidScores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = match self.problem {
            ScoresProblem::NaN => "wrote NaN, expected finite scores, or -inf to forbid a token",
            ScoresProblem::Infinity => "wrote +inf, expected finite scores, or -inf to forbid a token",
            ScoresProblem::AllForbidden => "left no token: the scores of all are -inf",
        };
        write!(f, "logits_processor[{}] {problem}", self.processor)
    }
}
