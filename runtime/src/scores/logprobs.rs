//! The log-probabilities that a row of logits gives to tokens.

use t5gemma_kernels::LogSumExp;

use super::top_k::TopK;

/// A row of logits with its log-sum-exp.
pub(crate) struct LogProbabilities<'a> {
    logits: &'a [f32],
    log_sum_exp: LogSumExp,
}

impl<'a> LogProbabilities<'a> {
    /// Those of a row of logits.
    pub fn of(logits: &'a [f32]) -> LogProbabilities<'a> {
        LogProbabilities { logits, log_sum_exp: LogSumExp::of(logits) }
    }

    /// The log-probability of a token of the vocabulary.
    pub fn token(&self, token: i64) -> f32 {
        self.log_sum_exp.log_probability(self.logits[token as usize])
    }

    /// The most likely tokens with their log-probabilities, best first.
    pub fn top(&self, count: usize) -> Vec<(i64, f32)> {
        let mut top = TopK::new(count);
        top.take_row(0, self.logits, &[], |x| self.log_sum_exp.log_probability(x));
        top.candidates.into_iter().map(|candidate| (candidate.token, candidate.score)).collect()
    }
}
