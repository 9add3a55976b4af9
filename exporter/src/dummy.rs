//! Random weights of sensible scale, for measuring a size without its checkpoint. Never zeros: they compress, and run faster
//! than real numbers on some hardware.

use t5gemma_graphs::config::Family;
use t5gemma_graphs::onnx::{Adjust, Part};

/// From a state of the generator to the next.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The numbers of one tensor, from `seed` and the tensor's name alone, so that they do not depend on order or chunking.
pub struct Numbers {
    start: u64,
    centre: f32,
    reach: f32,
}

impl Numbers {
    /// The numbers of a tensor, uniform around 0 (1 for norm factors): matrices keep the variance of what they are
    /// multiplied with, embeddings have unit variance once scaled by `√hidden`.
    pub fn of(part: &Part, adjust: Adjust, seed: u64) -> Numbers {
        // FNV-1a over the name keeps the streams of different tensors apart.
        let name = part
            .tensor
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let is_decoder_norm = Family::ALL.into_iter().any(|family| family.tensors().decoder_norm == part.tensor);
        let (centre, deviation) = match (adjust, part.shape.as_slice()) {
            // A head tied to the embedding finds the last token most like itself, for ever, unless signs are mixed before it.
            (Adjust::OnePlus, _) if is_decoder_norm => (0.0, 1.0),
            (Adjust::OnePlus, _) => (1.0, 0.1),
            (_, [_, columns]) => (0.0, (*columns as f32).powf(-0.5)),
            _ => (0.0, 0.02),
        };
        Numbers { start: name ^ seed.wrapping_mul(STEP), centre, reach: deviation * 3f32.sqrt() }
    }

    /// Fills `out` with the numbers from the `first` on.
    pub fn fill(&self, first: usize, out: &mut [f32]) {
        // Two come of one state; of the one before an odd place the second.
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
        // SplitMix64 (Steele, Lea, Flood 2014).
        *state = state.wrapping_add(STEP);
        let mut bits = *state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        [bits as u32, (bits >> 32) as u32].map(|half| {
            // 24 bits make an odd multiple of 2^-24 in (-1, 1): never zero.
            let unit = (2 * (half >> 8) as i32 + 1 - (1 << 24)) as f32 / (1 << 24) as f32;
            self.centre + self.reach * unit
        })
    }
}
