//! What an engine can never hold: refused before it waits for ever.

use crate::engine::EngineOptions;
use crate::error::Error;
pub(super) use crate::needs::{Need, Plan};

impl Plan {
    /// Whether rows fit into an engine that does nothing else.
    pub fn check(&self, need: &Need, options: &EngineOptions) -> Result<(), Error> {
        for (what, needed, limit) in [
            ("target rows (num_beams or num_return_sequences)", need.rows, options.max_rows),
            ("bytes of keys, values and logits", self.bytes(need), options.max_bytes),
            ("source in flight (max_sources)", 1, options.max_sources),
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
    fn what_can_never_fit_is_refused_with_the_figures() {
        let plan = Plan::for_tests(CacheLayout::InPlace);
        let options = |max_rows, max_bytes| EngineOptions { max_rows, max_bytes, ..EngineOptions::default() };
        assert!(plan.check(&Need::FOR_TESTS, &options(2, 140_000)).is_ok());
        for (options, expected) in [
            (
                options(1, 140_000),
                "the request needs 2 target rows (num_beams or num_return_sequences), more than the 1",
            ),
            (options(2, 139_999), "the request needs 140000 bytes of keys, values and logits, more than the 139999"),
        ] {
            let error = plan.check(&Need::FOR_TESTS, &options).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let endless = Need { target: usize::MAX >> 1, ..Need::FOR_TESTS };
        assert!(plan.check(&endless, &options(2, usize::MAX - 1)).is_err());
    }
}
