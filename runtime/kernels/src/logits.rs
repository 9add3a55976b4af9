//! The logits that a caller requests from the head, and the per-row statistics returned with them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::log_softmax::LogSumExp;

/// The logits that a step needs from each row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogitsRequest {
    /// All of them.
    #[default]
    All,
    /// None: the run is for its keys and values. The logits may be empty.
    Nothing,
    /// The greatest `k`; of the others only that they are no greater.
    TopK {
        /// How many.
        k: usize,
        /// Whether the log-sum-exp of the whole row is needed too.
        log_sum_exp: bool,
        /// Whether sparse rows are acceptable: the logits of some tokens with their token ids.
        sparse: bool,
    },
}

impl LogitsRequest {
    /// The request that satisfies both.
    pub fn union(self, other: LogitsRequest) -> LogitsRequest {
        use LogitsRequest::{All, Nothing, TopK};
        match (self, other) {
            (Nothing, request) | (request, Nothing) => request,
            (TopK { k, log_sum_exp, sparse }, TopK { k: other_k, log_sum_exp: other_sum, sparse: other_sparse }) => {
                TopK { k: k.max(other_k), log_sum_exp: log_sum_exp || other_sum, sparse: sparse && other_sparse }
            }
            _ => All,
        }
    }

    /// The same request for dense rows.
    pub fn dense(self) -> LogitsRequest {
        match self {
            LogitsRequest::TopK { k, log_sum_exp, .. } => LogitsRequest::TopK { k, log_sum_exp, sparse: false },
            request => request,
        }
    }
}

/// The request for the run that is under way.
#[derive(Debug, Default)]
pub(crate) struct AtomicRequest(AtomicU64);

impl AtomicRequest {
    pub fn set(&self, request: LogitsRequest) {
        let bits = match request {
            LogitsRequest::All => 0,
            LogitsRequest::Nothing => u64::MAX,
            LogitsRequest::TopK { k, log_sum_exp, sparse } => {
                (k.clamp(1, u32::MAX as usize) as u64) << 2 | u64::from(sparse) << 1 | u64::from(log_sum_exp)
            }
        };
        self.0.store(bits, Ordering::Release);
    }

    #[cfg(target_arch = "x86_64")]
    pub fn get(&self) -> LogitsRequest {
        match self.0.load(Ordering::Acquire) {
            0 => LogitsRequest::All,
            u64::MAX => LogitsRequest::Nothing,
            bits => LogitsRequest::TopK { k: (bits >> 2) as usize, log_sum_exp: bits & 1 == 1, sparse: bits & 2 == 2 },
        }
    }
}

/// Per-row statistics computed by the kernel that produced the logits, so that nobody has to scan the vocabulary again.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitsStats {
    log_sum_exps: Vec<LogSumExp>,
    /// `[rows, blocks]`: the maximum of each [`LogitsStats::BLOCK`] logits of a row, NaN ignored; or empty.
    block_maxima: Vec<f32>,
    /// `[rows, logits per row]`: the token ids of sparse rows, ascending and padded with [`LogitsStats::NO_TOKEN`];
    /// empty for dense rows.
    tokens: Vec<u32>,
}

impl LogitsStats {
    /// Logits that share a maximum.
    pub const BLOCK: usize = LogSumExp::BLOCK;

    /// Pads the token ids of sparse rows that hold fewer logits than others; the logit there is −∞.
    pub const NO_TOKEN: u32 = u32::MAX;

    /// Statistics of dense rows: `log_sum_exps [rows]`, NaN where a row holds a NaN, and `block_maxima [rows, blocks]`.
    pub fn new(log_sum_exps: Vec<LogSumExp>, block_maxima: Vec<f32>) -> LogitsStats {
        LogitsStats { log_sum_exps, block_maxima, tokens: Vec::new() }
    }

    /// Statistics of sparse rows with these token ids. Without a request for log-sum-exp, `log_sum_exps` may hold
    /// anything.
    pub fn sparse(log_sum_exps: Vec<LogSumExp>, tokens: Vec<u32>) -> LogitsStats {
        LogitsStats { tokens, ..LogitsStats::new(log_sum_exps, Vec::new()) }
    }

    /// Computes the statistics of dense rows of `width` logits.
    pub fn of(rows: &[f32], width: usize) -> LogitsStats {
        let (mut log_sum_exps, mut block_maxima, mut of_row) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows.chunks_exact(width) {
            log_sum_exps.push(LogSumExp::with_block_maxima(row, &mut of_row));
            block_maxima.append(&mut of_row);
        }
        LogitsStats::new(log_sum_exps, block_maxima)
    }

    /// Whether the rows are sparse.
    pub fn is_sparse(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Makes the log-sum-exp of a sparse row NaN where one of its logits is not finite. `None` if `logits` are not
    /// `rows` rows with one logit per token id.
    pub fn checked_against(mut self, logits: &[f32], rows: usize) -> Option<LogitsStats> {
        if logits.len() != self.tokens.len() || self.log_sum_exps.len() != rows {
            return None;
        }
        let width = logits.len() / rows;
        let rows = logits.chunks(width).zip(self.tokens.chunks(width));
        for (log_sum_exp, (logits, tokens)) in self.log_sum_exps.iter_mut().zip(rows) {
            let is_broken = |(logit, &token): (&f32, &u32)| token != LogitsStats::NO_TOKEN && !logit.is_finite();
            if logits.iter().zip(tokens).any(is_broken) {
                log_sum_exp.max = f32::NAN;
            }
        }
        Some(self)
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.log_sum_exps.len()
    }

    /// All rows.
    pub fn view(&self) -> LogitsStatsView<'_> {
        LogitsStatsView { log_sum_exps: &self.log_sum_exps, block_maxima: &self.block_maxima, tokens: &self.tokens }
    }

    /// The log-sum-exps by themselves.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn into_log_sum_exps(self) -> Vec<LogSumExp> {
        self.log_sum_exps
    }

    /// Itself, with the other's log-sums where the two differ by rounding alone.
    #[cfg(test)]
    pub(crate) fn rounded_as(mut self, other: &LogitsStats) -> LogitsStats {
        for (ours, theirs) in self.log_sum_exps.iter_mut().zip(&other.log_sum_exps) {
            if (ours.log_sum - theirs.log_sum).abs() < 2e-6 * (1.0 + ours.log_sum.abs()) {
                ours.log_sum = theirs.log_sum;
            }
        }
        self
    }
}

/// A range of rows of [`LogitsStats`].
#[derive(Clone, Copy, Debug)]
pub struct LogitsStatsView<'s> {
    log_sum_exps: &'s [LogSumExp],
    block_maxima: &'s [f32],
    tokens: &'s [u32],
}

impl<'s> LogitsStatsView<'s> {
    /// `count` of the rows, from `first` on.
    #[inline]
    pub fn rows(self, first: usize, count: usize) -> LogitsStatsView<'s> {
        let rows = self.log_sum_exps.len().max(1);
        let (blocks, width) = (self.block_maxima.len() / rows, self.tokens.len() / rows);
        LogitsStatsView {
            log_sum_exps: &self.log_sum_exps[first..][..count],
            block_maxima: &self.block_maxima[first * blocks..][..count * blocks],
            tokens: &self.tokens[first * width..][..count * width],
        }
    }

    /// The log-sum-exp of a row.
    #[inline]
    pub fn log_sum_exp(self, row: usize) -> LogSumExp {
        self.log_sum_exps[row]
    }

    /// The maximum of each [`LogitsStats::BLOCK`] logits of a row; empty if these are unknown.
    #[inline]
    pub fn block_maxima(self, row: usize) -> &'s [f32] {
        self.rows(row, 1).block_maxima
    }

    /// The token ids of sparse rows, row after row; empty for dense rows.
    #[inline]
    pub fn tokens(self) -> &'s [u32] {
        self.tokens
    }

    /// The token id of the logit at `index` of a sparse row.
    #[inline]
    pub fn token(self, row: usize, index: usize) -> i64 {
        self.tokens[row * (self.tokens.len() / self.log_sum_exps.len()) + index].into()
    }

    /// Whether no logit is NaN or infinite. Assumes soft-capped logits.
    pub fn all_finite(self) -> bool {
        self.log_sum_exps.iter().all(|norm| norm.max.is_finite() && norm.log_sum.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_request_is_read_as_it_was_set() {
        let request = AtomicRequest::default();
        assert_eq!(request.get(), LogitsRequest::All);
        for log_sum_exp in [false, true] {
            for sparse in [false, true] {
                for k in [1, 7, u32::MAX as usize] {
                    let expected = LogitsRequest::TopK { k, log_sum_exp, sparse };
                    request.set(expected);
                    assert_eq!(request.get(), expected);
                }
            }
        }
        for expected in [LogitsRequest::Nothing, LogitsRequest::All] {
            request.set(expected);
            assert_eq!(request.get(), expected);
        }
    }

    #[test]
    fn a_union_satisfies_both_requests() {
        let top_k = |k, log_sum_exp, sparse| LogitsRequest::TopK { k, log_sum_exp, sparse };
        let cases = [
            (LogitsRequest::All, top_k(3, false, true), LogitsRequest::All),
            (LogitsRequest::All, LogitsRequest::Nothing, LogitsRequest::All),
            (top_k(3, true, false), LogitsRequest::Nothing, top_k(3, true, false)),
            (top_k(3, false, true), top_k(5, true, true), top_k(5, true, true)),
            (top_k(3, false, true), top_k(1, false, false), top_k(3, false, false)),
        ];
        for (a, b, expected) in cases {
            assert_eq!((a.union(b), b.union(a)), (expected, expected));
        }
    }

    #[test]
    fn sparse_rows_with_a_logit_that_is_not_finite_are_not_finite() {
        let zero = LogSumExp { max: 0.0, log_sum: 0.0 };
        let stats = || LogitsStats::sparse(vec![zero; 2], vec![3, 8, 1, LogitsStats::NO_TOKEN]);
        let all_finite = |logits: &[f32]| stats().checked_against(logits, 2).map(|stats| stats.view().all_finite());
        assert_eq!(all_finite(&[1.0, 2.0, 3.0, f32::NEG_INFINITY]), Some(true));
        assert_eq!(all_finite(&[1.0, f32::NAN, 3.0, f32::NEG_INFINITY]), Some(false));
        assert_eq!(all_finite(&[1.0, 2.0, f32::NEG_INFINITY, f32::NEG_INFINITY]), Some(false));
        assert_eq!(all_finite(&[1.0, 2.0]), None);
    }
}
