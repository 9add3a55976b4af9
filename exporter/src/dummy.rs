//! Random weights of a realistic scale, to benchmark a model size without its checkpoint. Zeros would compress, and run
//! faster than real numbers on some hardware.

use t5gemma_graphs::config::Family;
use t5gemma_graphs::onnx::{Adjust, Part};

use crate::splitmix::{STEP, fnv1a, mix};

/// The random elements of one tensor. They follow from the seed and the tensor's name alone, not from order or
/// chunking.
pub struct RandomTensor {
    start: u64,
    center: f32,
    range: f32,
}

impl RandomTensor {
    /// The elements are uniform around 0 (1 for norm factors): matrices preserve the variance of their inputs,
    /// embeddings have unit variance once scaled by `√hidden`.
    pub fn new(part: &Part, adjust: Adjust, seed: u64) -> RandomTensor {
        let is_decoder_norm = Family::ALL.into_iter().any(|family| family.tensors().decoder_norm == part.tensor);
        let (center, deviation) = match (adjust, part.shape.as_slice()) {
            // With a head tied to the embedding, the last token would be most similar to itself and repeat forever,
            // unless signs are mixed before the head.
            (Adjust::OnePlus, _) if is_decoder_norm => (0.0, 1.0),
            (Adjust::OnePlus, _) => (1.0, 0.1),
            (_, [_, columns]) => (0.0, (*columns as f32).powf(-0.5)),
            _ => (0.0, 0.02),
        };
        RandomTensor { start: fnv1a(&part.tensor) ^ seed.wrapping_mul(STEP), center, range: deviation * 3f32.sqrt() }
    }

    /// Fills `out` with the elements from index `first` on.
    pub fn fill(&self, first: usize, out: &mut [f32]) {
        // Each state makes two elements; an odd `first` is the second of its state.
        let mut state = self.start.wrapping_add((first as u64 / 2).wrapping_mul(STEP));
        let (before, out) = out.split_at_mut(out.len().min(first % 2));
        if let [number] = before {
            *number = self.pair(&mut state)[1];
        }
        for numbers in out.chunks_mut(2) {
            numbers.iter_mut().zip(self.pair(&mut state)).for_each(|(number, new)| *number = new);
        }
    }

    fn pair(&self, state: &mut u64) -> [f32; 2] {
        *state = state.wrapping_add(STEP);
        let bits = mix(*state);
        [bits as u32, (bits >> 32) as u32].map(|half| {
            // 24 bits make an odd multiple of 2^-24 in (-1, 1): never zero.
            let unit = (2 * (half >> 8) as i32 + 1 - (1 << 24)) as f32 / (1 << 24) as f32;
            self.center + self.range * unit
        })
    }
}
