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
            (
                "target rows (num_beams or num_return_sequences), each a source of the --plan's batch in an engine",
                need.rows,
                self.side_by_side,
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
        let mut planned = plan.clone();
        planned.side_by_side = 1;
        let error =
            planned.check(&Need::FOR_TESTS, &options(2, 140_000)).expect_err("2 rows for a batch of 1").to_string();
        assert!(
            error.contains("2 target rows") && error.contains("--plan's batch") && error.contains("the 1"),
            "{error}"
        );
        let endless = Need { target: usize::MAX >> 1, ..Need::FOR_TESTS };
        assert!(plan.check(&endless, &options(2, usize::MAX - 1)).is_err());
    }
}
