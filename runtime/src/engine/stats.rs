//! `EngineStats`: what an engine has done and is doing.

/// Statistics of an [`Engine`](crate::Engine).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests that were accepted, including those that have ended.
    pub submitted: u64,
    /// Requests that succeeded.
    pub finished: u64,
    /// Requests that ended with an error, including cancellations and deadlines.
    pub failed: u64,
    /// Requests with a source that has not been admitted.
    pub waiting_requests: usize,
    /// Sources that have not been admitted.
    pub waiting_sources: usize,
    /// Target rows that these sources will have.
    pub waiting_rows: usize,
    /// Tokens of these sources.
    pub waiting_tokens: usize,
    /// Bytes that these sources may eventually need, as for
    /// [`EngineOptions::max_waiting_bytes`](crate::EngineOptions::max_waiting_bytes).
    pub waiting_bytes: usize,
    /// Sources in flight.
    pub sources: usize,
    /// Target rows in flight.
    pub rows: usize,
    /// Bytes that the rows in flight may eventually need, counted as for
    /// [`EngineOptions::max_bytes`](crate::EngineOptions::max_bytes).
    pub planned_bytes: usize,
    /// Runs of a decoder graph.
    pub steps: u64,
    /// Target rows of all these runs; divided by `steps`, the average number of rows that shared a step.
    pub stepped_rows: u64,
    /// Tokens of all sources that were admitted.
    pub source_tokens: u64,
    /// New tokens of all hypotheses of the rows that were finished.
    pub new_tokens: u64,
}

impl EngineStats {
    /// The sum of what copies of the model count each for itself, beside what `self` says of the queue.
    pub(super) fn with_copies(self, copies: &[EngineStats]) -> EngineStats {
        copies.iter().fold(self, |sum, copy| EngineStats {
            sources: sum.sources + copy.sources,
            rows: sum.rows + copy.rows,
            planned_bytes: sum.planned_bytes + copy.planned_bytes,
            steps: sum.steps + copy.steps,
            stepped_rows: sum.stepped_rows + copy.stepped_rows,
            source_tokens: sum.source_tokens + copy.source_tokens,
            new_tokens: sum.new_tokens + copy.new_tokens,
            ..sum
        })
    }
}
