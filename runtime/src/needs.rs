//! What rows may come to need, known before they run: rows and bytes, and nothing of tensors. An engine admits rows by it,
//! and a call that needs too much is split by it into pieces that run one after the other.

use std::ops::Range;

use t5gemma_graphs::interface::{CacheLayout, DType};

use crate::batch::Batch;
use crate::item::Call;
use crate::limits::{Scratch, pieces};
use crate::model::Model;
use crate::state::capacity;

/// What one source needs while it is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
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

    /// What a row needs whose target of so many tokens, prompt included, is given.
    pub fn of_target(batch: &Batch, row: usize, target: usize) -> Need {
        Need { rows: 1, target, source: batch.source(row).len(), attended: 0 }
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
pub(crate) struct Plan {
    layout: CacheLayout,
    /// Tensors that are there twice while rows change.
    moved: usize,
    /// Bytes of one token's keys and values, in one of the tensors of a cache.
    of_tensor: usize,
    /// Tensors of the targets, and as many of the sources.
    tensors: usize,
    /// Bytes of a row of logits.
    logits: usize,
    /// Rows of an engine that can share steps, each with its source's keys and values: those of the serving plan's batch.
    pub side_by_side: usize,
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
            side_by_side: model.profiles().map_or(usize::MAX, |profiles| profiles.batch.most),
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
}

/// The pieces in which a model takes a batch for whose rows it needs as much as `need` says, after prompts of so many tokens.
pub(crate) fn pieces_to_decode(
    model: &Model,
    batch: &Batch,
    prompt: usize,
    need: impl Fn(usize) -> Need,
) -> Vec<Range<usize>> {
    let (config, dtype, limits) = (model.config(), model.manifest().dtype, model.limits());
    let [encoder, decoder] = [&config.encoder, &config.decoder].map(|side| Scratch::of(side, dtype));
    let (plan, most) = (Plan::of(model), limits.bytes(model.is_on_cpu()));
    pieces(batch, limits, |rows, length| {
        let (sources, needs) = (rows.len(), rows.map(&need).reduce(Need::beside));
        let Some(needs) = needs else { return true };
        let first = decoder.bytes(sources, prompt, prompt + length);
        let step = decoder.bytes(needs.rows, 1, needs.target.saturating_add(length));
        let bytes = encoder.bytes(sources, length, length).saturating_add(first.max(step));
        bytes.saturating_add(plan.bytes(&needs)) <= most
    })
}

#[cfg(test)]
impl Need {
    /// Of two rows.
    pub const FOR_TESTS: Need = Need { rows: 2, target: 65, source: 10, attended: 0 };
}

#[cfg(test)]
impl Plan {
    /// Of a model with a cache of four small tensors.
    pub fn for_tests(layout: CacheLayout) -> Plan {
        Plan { layout, moved: 1, of_tensor: 100, tensors: 4, logits: 1000, side_by_side: usize::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Need = Need::FOR_TESTS;

    fn plan(layout: CacheLayout) -> Plan {
        Plan::for_tests(layout)
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
}
