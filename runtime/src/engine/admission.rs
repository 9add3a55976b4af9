//! Rejects requests that an engine can never hold, which would otherwise wait forever, and those for which its queue has
//! no room.

use std::time::Duration;

use super::EngineOptions;
use super::line::{Load, Waiting};
use crate::error::Error;
use crate::item::Call;
use crate::memory::{Footprint, MemoryModel};

impl EngineOptions {
    /// The limits of the queue by name, each with what `load` has of it.
    fn of_queue(&self, load: &Load) -> [(&'static str, usize, usize); 4] {
        [
            ("requests", load.requests, self.max_waiting),
            ("target rows", load.rows, self.max_waiting_rows),
            ("source tokens", load.tokens, self.max_waiting_tokens),
            ("bytes of keys, values and logits", load.bytes, self.max_waiting_bytes),
        ]
    }

    /// Whether the queue can hold a request when nothing else waits.
    pub(super) fn check_alone(&self, request: &Load) -> Result<(), Error> {
        let beyond = self.of_queue(request).into_iter().find(|&(_, needed, limit)| needed > limit);
        match beyond {
            Some((what, needed, limit)) => Err(Error::TooLarge { what, needed, limit }),
            None => Ok(()),
        }
    }

    /// Whether the queue has room for a request beside what waits.
    pub(super) fn check_room(&self, waiting: &Load, request: &Load, retry_after: Duration) -> Result<(), Error> {
        let both = self.of_queue(waiting).into_iter().zip(self.of_queue(request));
        match both.into_iter().find(|((_, waiting, limit), (_, needed, _))| waiting.saturating_add(*needed) > *limit) {
            Some(((what, waiting, limit), _)) => Err(Error::Full { what, waiting, limit, retry_after }),
            None => Ok(()),
        }
    }
}

impl MemoryModel {
    /// What a source amounts to while it waits.
    pub(super) fn waiting(&self, call: &Call, source: &Footprint) -> Waiting {
        let new_tokens = call.max_length.saturating_sub(call.prompts.length);
        let work = source.source.saturating_add(source.rows.saturating_mul(new_tokens)) as u64;
        Waiting { rows: source.rows, tokens: source.source, bytes: self.bytes(source), work }
    }

    /// Whether a source fits into an engine that does nothing else.
    pub fn check(&self, source: &Footprint, options: &EngineOptions) -> Result<(), Error> {
        for (what, needed, limit) in [
            ("target rows (num_beams or num_return_sequences)", source.rows, options.max_rows),
            ("bytes of keys, values and logits", self.bytes(source), options.max_bytes),
            ("source in flight (max_sources)", 1, options.max_sources),
            (
                "target rows (num_beams or num_return_sequences), which count as sources of the serving plan's batch",
                source.rows,
                self.max_shared_rows,
            ),
        ] {
            if needed > limit {
                return Err(Error::TooLarge { what, needed, limit });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use t5gemma_graphs::interface::CacheLayout;

    use super::*;

    #[test]
    fn the_queue_is_bounded_in_each_unit() {
        let load = |requests, rows, tokens, bytes| Load { requests, sources: requests, rows, tokens, bytes };
        let options =
            EngineOptions::default().max_waiting(3).max_waiting_rows(8).max_waiting_tokens(100).max_waiting_bytes(1000);
        let hint = Duration::from_secs(7);
        let waiting = load(2, 4, 60, 500);
        for (request, expected) in [
            (load(1, 4, 40, 500), ""),
            (load(1, 5, 1, 1), "the queue is full (4 target rows are waiting, the limit is 8); try again in 7 s"),
            (load(1, 1, 41, 1), "the queue is full (60 source tokens are waiting, the limit is 100); try again in 7 s"),
            (
                load(1, 1, 1, 501),
                "the queue is full (500 bytes of keys, values and logits are waiting, the limit is 1000); \
                 try again in 7 s",
            ),
        ] {
            assert!(options.check_alone(&request).is_ok());
            let found = options.check_room(&waiting, &request, hint).err();
            assert_eq!(found.map(|error| error.to_string()).unwrap_or_default(), expected);
        }
        let full = options.check_room(&load(3, 3, 3, 3), &load(1, 1, 1, 1), hint).expect_err("3 of 3").to_string();
        assert_eq!(full, "the queue is full (3 requests are waiting, the limit is 3); try again in 7 s");
        let error = options.check_alone(&load(1, 1, 101, 1)).expect_err("101 of 100").to_string();
        assert_eq!(error, "the request needs 101 source tokens, but the engine's limit is 100");
    }

    #[test]
    fn what_can_never_fit_is_refused_with_the_numbers() {
        let memory = MemoryModel::for_tests(CacheLayout::InPlace);
        let options = |max_rows, max_bytes| EngineOptions { max_rows, max_bytes, ..EngineOptions::default() };
        assert!(memory.check(&Footprint::FOR_TESTS, &options(2, 140_000)).is_ok());
        for (options, expected) in [
            (
                options(1, 140_000),
                "the request needs 2 target rows (num_beams or num_return_sequences), but the engine's limit is 1",
            ),
            (
                options(2, 139_999),
                "the request needs 140000 bytes of keys, values and logits, but the engine's limit is 139999",
            ),
        ] {
            let error = memory.check(&Footprint::FOR_TESTS, &options).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let mut planned = memory.clone();
        planned.max_shared_rows = 1;
        let error = planned.check(&Footprint::FOR_TESTS, &options(2, 140_000)).expect_err("2 rows for a batch of 1");
        let error = error.to_string();
        assert!(
            error.contains("2 target rows") && error.contains("serving plan's batch") && error.contains("limit is 1"),
            "{error}"
        );
        let endless = Footprint { target: usize::MAX >> 1, ..Footprint::FOR_TESTS };
        assert!(memory.check(&endless, &options(2, usize::MAX - 1)).is_err());
    }
}
