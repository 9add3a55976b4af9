//! What rows may come to need, known before they are admitted: rows and bytes, and nothing of tensors.

use t5gemma_graphs::interface::{CacheLayout, DType};

use crate::engine::EngineOptions;
use crate::error::Error;
use crate::item::Call;
use crate::model::Model;
use crate::state::capacity;

/// What one source needs while it is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Need {
    /// Target rows: beams or samples.
    pub rows: usize,
    /// Tokens of the target at most, prompt included.
    pub target: usize,
    /// Tokens of the source.
    pub source: usize,
    /// Bytes of what its targets attended to, where that is kept.
    pub attended: usize,
}

impl Need {
    /// What a row of a call needs.
    pub fn of(call: &Call, row: usize) -> Need {
        let options = &call.options;
        let rows = options.num_beams.max(options.num_return_sequences);
        let source = call.batch.source(row).len();
        let is_attending = options.output_attentions || options.coverage_penalty != 0.0;
        let new_tokens = call.max_length.saturating_sub(call.prompts.length);
        let numbers = rows.saturating_mul(new_tokens).saturating_mul(source);
        let attended = if is_attending { numbers.saturating_mul(size_of::<f32>()) } else { 0 };
        Need { rows, target: call.max_length, source, attended }
    }

    /// What both need side by side, in memory that is a rectangle.
    pub fn beside(self, other: Need) -> Need {
        Need {
            rows: self.rows.saturating_add(other.rows),
            target: self.target.max(other.target),
            source: self.source.max(other.source),
            attended: self.attended.saturating_add(other.attended),
        }
    }
}

/// What a model's rows take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    layout: CacheLayout,
    /// Tensors that are there twice while rows change.
    moved: usize,
    /// Bytes of one token's keys and values, in one of the tensors of a cache.
    of_tensor: usize,
    /// Tensors of the targets, and as many of the sources.
    tensors: usize,
    /// Bytes of a row of logits.
    logits: usize,
}

impl Plan {
    /// The plan of a model.
    pub fn of(model: &Model) -> Plan {
        let decoder = &model.config().decoder;
        let width = match model.manifest().dtype {
            DType::Float16 | DType::BFloat16 => 2,
            _ => 4,
        };
        let tensors = 2 * decoder.layers.len();
        Plan {
            layout: model.manifest().cache,
            // On a device one run of a graph moves them all.
            moved: if model.is_resident() { tensors } else { 1 },
            of_tensor: decoder.num_key_value_heads * decoder.head_dim * width,
            tensors,
            logits: 4 * model.manifest().kept_tokens.unwrap_or(decoder.vocab_size),
        }
    }

    /// Bytes that rows may come to need at most.
    pub fn bytes(&self, need: &Need) -> usize {
        let times = usize::saturating_mul;
        let target = match self.layout {
            CacheLayout::InPlace => times(capacity(need.target), self.tensors.saturating_add(self.moved)),
            // The past is there as long as the present is made.
            CacheLayout::Growing => times(need.target, times(2, self.tensors)),
            CacheLayout::Static(capacity) => times(capacity, times(2, self.tensors)),
        };
        let source = times(need.source, self.tensors.saturating_add(self.moved));
        times(need.rows, times(target.saturating_add(source), self.of_tensor).saturating_add(self.logits))
            .saturating_add(need.attended)
    }

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
    use super::*;

    const NEED: Need = Need { rows: 2, target: 65, source: 10, attended: 0 };

    fn plan(layout: CacheLayout) -> Plan {
        Plan { layout, moved: 1, of_tensor: 100, tensors: 4, logits: 1000 }
    }

    #[test]
    fn bytes_are_those_of_the_fullest_rectangle() {
        // A row: 128 tokens of room, 10 of source, in 4 tensors and one more that is moved.
        assert_eq!(plan(CacheLayout::InPlace).bytes(&NEED), 2 * ((128 + 10) * 5 * 100 + 1000));
        // Or the past and the present of 65 tokens.
        assert_eq!(plan(CacheLayout::Growing).bytes(&NEED), 2 * ((65 * 8 + 10 * 5) * 100 + 1000));
        let other = Need { rows: 1, target: 9, source: 20, attended: 720 };
        let both = Need { rows: 3, target: 65, source: 20, attended: 720 };
        assert_eq!(NEED.beside(other), both);
        let attending = Need { attended: 5200, ..NEED };
        assert_eq!(plan(CacheLayout::InPlace).bytes(&attending), plan(CacheLayout::InPlace).bytes(&NEED) + 5200);
        // On a device all 4 tensors are moved at a time; what has a capacity takes it whatever the target's length.
        let resident = |layout| Plan { moved: 4, ..plan(layout) };
        assert_eq!(resident(CacheLayout::InPlace).bytes(&NEED), 2 * ((128 + 10) * 8 * 100 + 1000));
        assert_eq!(resident(CacheLayout::Growing).bytes(&NEED), 2 * ((65 + 10) * 8 * 100 + 1000));
        assert_eq!(resident(CacheLayout::Static(256)).bytes(&NEED), 2 * ((256 + 10) * 8 * 100 + 1000));
    }

    #[test]
    fn what_can_never_fit_is_refused_with_the_figures() {
        let plan = plan(CacheLayout::InPlace);
        let options = |max_rows, max_bytes| EngineOptions { max_rows, max_bytes, ..EngineOptions::default() };
        assert!(plan.check(&NEED, &options(2, 140_000)).is_ok());
        for (options, expected) in [
            (
                options(1, 140_000),
                "the request needs 2 target rows (num_beams or num_return_sequences), more than the 1",
            ),
            (options(2, 139_999), "the request needs 140000 bytes of keys, values and logits, more than the 139999"),
        ] {
            let error = plan.check(&NEED, &options).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let endless = Need { target: usize::MAX >> 1, ..NEED };
        assert!(plan.check(&endless, &options(2, usize::MAX - 1)).is_err());
    }
}
