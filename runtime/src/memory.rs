//! Estimates the memory that rows may need, before they run. An engine uses it to admit rows, and a call to split
//! itself into pieces.

use std::ops::Range;

use t5gemma_graphs::interface::{CacheLayout, DType};

use crate::batch::Batch;
use crate::item::Call;
use crate::limits::{Scratch, pieces};
use crate::model::Model;
use crate::state::capacity;

/// What one source occupies while it is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// Target rows: beams or samples.
    pub rows: usize,
    /// The greatest length of a target, prompt included.
    pub target: usize,
    /// Tokens of the source.
    pub source: usize,
    /// Images of the source.
    pub images: usize,
    /// Bytes of cross-attentions, if they are kept.
    pub cross_attention_bytes: usize,
}

impl Footprint {
    /// The footprint of a row of a call.
    pub fn of(call: &Call, row: usize) -> Footprint {
        let options = &call.options;
        let rows = options.num_beams.max(options.num_return_sequences);
        let source = call.batch.source(row).len();
        let keeps_attentions = options.output_attentions || options.coverage_penalty != 0.0;
        let new_tokens = call.max_length.saturating_sub(call.prompts.length);
        let numbers = rows.saturating_mul(new_tokens).saturating_mul(source);
        let cross_attention_bytes = if keeps_attentions { numbers.saturating_mul(size_of::<f32>()) } else { 0 };
        let images = call.batch.images()[row].len();
        Footprint { rows, target: call.max_length, source, images, cross_attention_bytes }
    }

    /// The footprint of a row whose target is given; `target` is its length, prompt included.
    pub fn of_target(batch: &Batch, row: usize, target: usize) -> Footprint {
        let images = batch.images()[row].len();
        Footprint { rows: 1, target, source: batch.source(row).len(), images, cross_attention_bytes: 0 }
    }

    /// The footprint of both in memory that is one rectangle.
    pub fn beside(self, other: Footprint) -> Footprint {
        Footprint {
            rows: self.rows.saturating_add(other.rows),
            target: self.target.max(other.target),
            source: self.source.max(other.source),
            images: self.images.saturating_add(other.images),
            cross_attention_bytes: self.cross_attention_bytes.saturating_add(other.cross_attention_bytes),
        }
    }
}

/// The sizes from which the bytes of a footprint follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryModel {
    layout: CacheLayout,
    /// Tensors that exist twice while rows change.
    moved: usize,
    /// Bytes of one token's keys and values in one tensor of a cache.
    token_bytes: usize,
    /// Tensors of self-attention, and as many of cross-attention.
    tensors: usize,
    /// Bytes of a row of logits.
    logits_bytes: usize,
    /// Bytes of an image's pixel values and features.
    image_bytes: usize,
    /// Scratch memory of the vision tower, which reads the images of all sources one after the other.
    tower_bytes: usize,
    /// Rows of an engine that can share steps, each with its source's keys and values: those of the serving plan's
    /// batch.
    pub max_shared_rows: usize,
}

impl MemoryModel {
    pub fn of(model: &Model) -> MemoryModel {
        let decoder = &model.facts().decoder;
        let width = match model.manifest().dtype {
            DType::Float16 | DType::BFloat16 => 2,
            _ => 4,
        };
        let tensors = 2 * decoder.num_hidden_layers;
        let vision = model.facts().vision.as_ref();
        let features = vision.map_or(0, |vision| vision.tokens_per_image * model.facts().encoder.hidden_size);
        let pixels = vision.map_or(0, |vision| 3 * vision.image_size * vision.image_size);
        MemoryModel {
            layout: model.manifest().cache,
            // On a device one run of a graph moves all of them.
            moved: if model.is_on_device() { tensors } else { 1 },
            token_bytes: decoder.num_key_value_heads * decoder.head_dim * width,
            tensors,
            logits_bytes: 4 * model.manifest().kept_tokens.unwrap_or(decoder.vocab_size),
            image_bytes: (pixels + features).saturating_mul(size_of::<f32>()),
            tower_bytes: vision.map_or(0, |vision| {
                Scratch::of_tower(vision, model.manifest()).bytes(1, vision.patches, vision.patches)
            }),
            max_shared_rows: model.profiles().map_or(usize::MAX, |profiles| profiles.batch.max),
        }
    }

    /// The greatest number of bytes of a footprint.
    pub fn bytes(&self, footprint: &Footprint) -> usize {
        let times = usize::saturating_mul;
        let target = match self.layout {
            CacheLayout::InPlace => times(capacity(footprint.target), self.tensors.saturating_add(self.moved)),
            // Past and present exist at the same time.
            CacheLayout::Growing => times(footprint.target, times(2, self.tensors)),
            CacheLayout::Static(capacity) => times(capacity, times(2, self.tensors)),
        };
        let source = times(footprint.source, self.tensors.saturating_add(self.moved));
        let row = times(target.saturating_add(source), self.token_bytes).saturating_add(self.logits_bytes);
        let tower = if footprint.images > 0 { self.tower_bytes } else { 0 };
        let images = times(footprint.images, self.image_bytes).saturating_add(tower);
        times(footprint.rows, row).saturating_add(footprint.cross_attention_bytes).saturating_add(images)
    }
}

/// The pieces in which a model decodes a batch. `footprint` is of a row; prompts have `prompt` tokens.
pub(crate) fn pieces_to_decode(
    model: &Model,
    batch: &Batch,
    prompt: usize,
    footprint: impl Fn(usize) -> Footprint,
) -> Vec<Range<usize>> {
    let (manifest, limits) = (model.manifest(), model.limits());
    let (encoder, decoder) = (Scratch::of_encoder(manifest), Scratch::of_decoder(manifest));
    let memory = MemoryModel::of(model);
    pieces(batch, limits, |rows, longest| {
        let (sources, footprints) = (rows.len(), rows.map(&footprint).reduce(Footprint::beside));
        let Some(all) = footprints else { return true };
        let first = decoder.bytes(sources, prompt, prompt + longest);
        let step = decoder.bytes(all.rows, 1, all.target.saturating_add(longest));
        let bytes = encoder.bytes(sources, longest, longest).saturating_add(first.max(step));
        limits.holds(bytes.saturating_add(memory.bytes(&all)))
    })
}

#[cfg(test)]
impl Footprint {
    /// A source with two rows.
    pub const FOR_TESTS: Footprint = Footprint { rows: 2, target: 65, source: 10, images: 0, cross_attention_bytes: 0 };
}

#[cfg(test)]
impl MemoryModel {
    /// Of a model with a cache of four small tensors.
    pub fn for_tests(layout: CacheLayout) -> MemoryModel {
        MemoryModel {
            layout,
            moved: 1,
            token_bytes: 100,
            tensors: 4,
            logits_bytes: 1000,
            image_bytes: 300,
            tower_bytes: 5000,
            max_shared_rows: usize::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_fullest_rectangle() {
        const ONE: Footprint = Footprint::FOR_TESTS;
        let in_process = MemoryModel::for_tests;
        // A row: capacity for 128 tokens and 10 of the source, in 4 tensors and one more that is moved.
        assert_eq!(in_process(CacheLayout::InPlace).bytes(&ONE), 2 * ((128 + 10) * 5 * 100 + 1000));
        // Or the past and the present of 65 tokens.
        assert_eq!(in_process(CacheLayout::Growing).bytes(&ONE), 2 * ((65 * 8 + 10 * 5) * 100 + 1000));
        let other = Footprint { rows: 1, target: 9, source: 20, images: 2, cross_attention_bytes: 720 };
        let both = Footprint { rows: 3, target: 65, source: 20, images: 2, cross_attention_bytes: 720 };
        assert_eq!(ONE.beside(other), both);
        let attending = Footprint { cross_attention_bytes: 5200, ..ONE };
        let bytes = |footprint: &Footprint| in_process(CacheLayout::InPlace).bytes(footprint);
        assert_eq!(bytes(&attending), bytes(&ONE) + 5200);
        // The tower reads the images of all rows one after the other.
        let seeing = |images| bytes(&Footprint { images, ..ONE });
        assert_eq!([1, 3].map(seeing), [5300, 5900].map(|images| bytes(&ONE) + images));
        // On a device all 4 tensors are moved at once; a static cache has its capacity whatever the target's length.
        let on_device = |layout| MemoryModel { moved: 4, ..in_process(layout) };
        assert_eq!(on_device(CacheLayout::InPlace).bytes(&ONE), 2 * ((128 + 10) * 8 * 100 + 1000));
        assert_eq!(on_device(CacheLayout::Growing).bytes(&ONE), 2 * ((65 + 10) * 8 * 100 + 1000));
        assert_eq!(on_device(CacheLayout::Static(256)).bytes(&ONE), 2 * ((256 + 10) * 8 * 100 + 1000));
    }
}
