//! `EngineOptions`: the limits of an engine, for what is in flight and for the queue.

use crate::error::Error;

/// The limits of an [`Engine`](crate::Engine); those of rows, bytes and sources in flight apply to each copy of the
/// model, those of the queue to all copies together.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Maximum number of target rows in flight: the beams or samples of all sources together. 64 by default.
    pub max_rows: usize,
    /// Maximum bytes of keys, values and logits that the rows in flight may eventually need, each row counted with the
    /// longest source and the longest target of all; 4 GiB by default. Weights and scratch memory come on top.
    pub max_bytes: usize,
    /// Maximum number of sources in flight; by default limited only by the rows.
    pub max_sources: usize,
    /// Maximum number of requests with sources waiting to be admitted; 1024 by default.
    pub max_waiting: usize,
    /// Maximum number of target rows that the waiting sources will have; unlimited by default.
    pub max_waiting_rows: usize,
    /// Maximum number of tokens of the waiting sources; unlimited by default.
    pub max_waiting_tokens: usize,
    /// Maximum bytes that the waiting sources may eventually need, each counted alone as for
    /// [`EngineOptions::max_bytes`]; unlimited by default.
    pub max_waiting_bytes: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            max_rows: 64,
            max_bytes: 4 << 30,
            max_sources: usize::MAX,
            max_waiting: 1024,
            max_waiting_rows: usize::MAX,
            max_waiting_tokens: usize::MAX,
            max_waiting_bytes: usize::MAX,
        }
    }
}

impl EngineOptions {
    /// Sets [`EngineOptions::max_rows`].
    pub fn max_rows(self, max_rows: usize) -> EngineOptions {
        EngineOptions { max_rows, ..self }
    }

    /// Sets [`EngineOptions::max_bytes`].
    pub fn max_bytes(self, max_bytes: usize) -> EngineOptions {
        EngineOptions { max_bytes, ..self }
    }

    /// Sets [`EngineOptions::max_sources`].
    pub fn max_sources(self, max_sources: usize) -> EngineOptions {
        EngineOptions { max_sources, ..self }
    }

    /// Sets [`EngineOptions::max_waiting`].
    pub fn max_waiting(self, max_waiting: usize) -> EngineOptions {
        EngineOptions { max_waiting, ..self }
    }

    /// Sets [`EngineOptions::max_waiting_rows`].
    pub fn max_waiting_rows(self, max_waiting_rows: usize) -> EngineOptions {
        EngineOptions { max_waiting_rows, ..self }
    }

    /// Sets [`EngineOptions::max_waiting_tokens`].
    pub fn max_waiting_tokens(self, max_waiting_tokens: usize) -> EngineOptions {
        EngineOptions { max_waiting_tokens, ..self }
    }

    /// Sets [`EngineOptions::max_waiting_bytes`].
    pub fn max_waiting_bytes(self, max_waiting_bytes: usize) -> EngineOptions {
        EngineOptions { max_waiting_bytes, ..self }
    }

    /// Rejects limits within which nothing can run.
    pub(super) fn check(&self) -> Result<(), Error> {
        let bounds = [
            ("max_rows", self.max_rows),
            ("max_bytes", self.max_bytes),
            ("max_sources", self.max_sources),
            ("max_waiting", self.max_waiting),
            ("max_waiting_rows", self.max_waiting_rows),
            ("max_waiting_tokens", self.max_waiting_tokens),
            ("max_waiting_bytes", self.max_waiting_bytes),
        ];
        match bounds.into_iter().find(|&(_, bound)| bound == 0) {
            Some((name, _)) => Err(Error::input(name, "at least 1", "0")),
            None => Ok(()),
        }
    }
}
