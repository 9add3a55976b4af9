//! Rejects requests that an engine can never hold, which would otherwise wait forever.

use super::EngineOptions;
use crate::error::Error;
use crate::memory::{Footprint, MemoryModel};

impl MemoryModel {
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
