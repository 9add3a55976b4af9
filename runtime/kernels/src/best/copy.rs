//! What a first pass reads instead of a matrix, and what its results can be off by.

use std::sync::atomic::AtomicU32;

use memmap2::MmapMut;

use super::{CHUNK, Reads, Spread, Table, share};
use crate::Parts;
use crate::product::Weights;

/// Numbers with one scale.
const BLOCK: usize = 128;
/// 1.5 · 2²³ leaves the nearest whole number in the low bits of a sum.
const SHIFT: f32 = 12_582_912.0;

/// What is known of a matrix `[n, k]`.
pub(super) struct Known {
    /// `[n]`: the Euclidean lengths of the rows.
    pub lengths: Vec<f32>,
    /// The greatest lengths among all rows: of their errors, or of themselves where there is no copy, and of themselves.
    pub longest: [f32; 2],
    /// The same among each [`CHUNK`] of them.
    pub longest_of_chunks: Vec<[f32; 2]>,
    /// None if the first pass reads the matrix itself.
    pub copy: Option<Copy>,
    /// How often, lately, this has told too little.
    pub blunt: AtomicU32,
}

/// A matrix `[n, k]` in 4 or 8 bits.
pub(super) struct Copy {
    /// In large pages where there are any: in small ones the processor looks up addresses as often as it reads.
    numbers: MmapMut,
    scales: Vec<f32>,
    bits: usize,
    /// `[n]`: the Euclidean lengths of the rows' errors.
    pub errors: Vec<f32>,
}

impl Copy {
    pub fn weights(&self, k: usize) -> Weights<'_> {
        let Copy { numbers, scales, bits, .. } = self;
        Weights { numbers, scales, zero_points: None, k, bits: *bits, block_size: BLOCK }
    }
}

impl Known {
    /// # Safety
    /// The processor has AVX2 and FMA.
    pub unsafe fn new(w: Table, reads: Reads, [n, k]: [usize; 2], spread: Spread) -> ort::Result<Known> {
        let bits = match (reads, w) {
            (Reads::FourBits, _) => Some(4),
            (Reads::EightBits, Table::Float(_)) => Some(8),
            (Reads::EightBits, Table::Packed(_)) => None,
        };
        let mut lengths = vec![0.0; n];
        let new = |bits: usize| -> ort::Result<Copy> {
            let blocks = k.div_ceil(BLOCK);
            let numbers = MmapMut::map_anon(n * blocks * BLOCK * bits / 8)
                .map_err(|error| ort::Error::new(format!("memory for a copy of the head in {bits} bits: {error}")))?;
            // Small pages do too.
            #[cfg(target_os = "linux")]
            let _ = numbers.advise(memmap2::Advice::HugePage);
            Ok(Copy { numbers, scales: vec![0.0; n * blocks], bits, errors: vec![0.0; n] })
        };
        let mut copy = bits.map(new).transpose()?;
        let of_lengths = Parts::new(&mut lengths);
        let of_copy = copy.as_mut().map(|Copy { numbers, scales, bits, errors, .. }| {
            (Parts::new(numbers), Parts::new(scales), Parts::new(errors), *bits)
        });
        let share = share(k);
        spread(n.div_ceil(share), &|part| {
            let mut room = Vec::new();
            for row in part * share..n.min((part + 1) * share) {
                // SAFETY: every row is taken by one call only; the features are the caller's.
                unsafe {
                    let length = &mut of_lengths.of(row..row + 1)[0];
                    let Some((numbers, scales, errors, bits)) = &of_copy else {
                        if let Table::Packed(w) = w {
                            *length = w.length_of(row);
                        }
                        continue;
                    };
                    let (blocks, bytes) = (k.div_ceil(BLOCK), k.div_ceil(BLOCK) * BLOCK * bits / 8);
                    let numbers = numbers.of(row * bytes..(row + 1) * bytes);
                    let scales = scales.of(row * blocks..(row + 1) * blocks);
                    let row_of = match w {
                        Table::Float(w) => &w[row * k..][..k],
                        Table::Packed(w) => {
                            room.resize(k, 0.0);
                            unpacked(w, row, &mut room);
                            &room
                        }
                    };
                    let rounded = match bits {
                        4 => in_4_bits(row_of, numbers, scales),
                        _ => in_8_bits(row_of, numbers, scales),
                    };
                    [errors.of(row..row + 1)[0], *length] = rounded;
                }
            }
        })?;
        let largest = |lengths: &[f32]| lengths.iter().copied().fold(0.0, f32::max);
        let errors = copy.as_ref().map_or(&lengths, |copy| &copy.errors);
        let chunks = errors.chunks(CHUNK).zip(lengths.chunks(CHUNK));
        let longest_of_chunks = chunks.map(|(errors, lengths)| [largest(errors), largest(lengths)]).collect();
        let longest = [largest(errors), largest(&lengths)];
        Ok(Known { longest, longest_of_chunks, lengths, copy, blunt: AtomicU32::new(0) })
    }
}

/// [`Weights::unpack`] by vectors.
#[target_feature(enable = "avx2,fma")]
fn unpacked(w: &Weights, row: usize, to: &mut [f32]) {
    w.unpack(row, to);
}

/// Rounds a row to 8 bits, and returns the lengths of its error and of itself.
#[target_feature(enable = "avx2,fma")]
fn in_8_bits(row: &[f32], numbers: &mut [u8], scales: &mut [f32]) -> [f32; 2] {
    let mut lengths = [Lanes::default(); 2];
    let mut padded = [0.0; BLOCK];
    for ((block, numbers), scale) in row.chunks(BLOCK).zip(numbers.chunks_exact_mut(BLOCK)).zip(scales) {
        let block = filled(block, &mut padded);
        *scale = of_largest(block).abs() / 127.0;
        let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
        for (eight, numbers) in block.as_chunks::<8>().0.iter().zip(numbers.as_chunks_mut::<8>().0) {
            for at in 0..8 {
                let shifted = eight[at] * inverse + SHIFT;
                numbers[at] = (shifted.to_bits() as u8).wrapping_add(128);
                lengths[0].add(at, eight[at] - (shifted - SHIFT) * *scale);
                lengths[1].add(at, eight[at]);
            }
        }
    }
    lengths.map(Lanes::length)
}

/// Rounds a row to 4 bits, and returns the lengths of its error and of itself.
#[target_feature(enable = "avx2,fma")]
fn in_4_bits(row: &[f32], numbers: &mut [u8], scales: &mut [f32]) -> [f32; 2] {
    let mut lengths = [Lanes::default(); 2];
    let mut padded = [0.0; BLOCK];
    for ((block, numbers), scale) in row.chunks(BLOCK).zip(numbers.chunks_exact_mut(BLOCK / 2)).zip(scales) {
        let block = filled(block, &mut padded);
        // Of −8 to 7 the former is for the largest, whichever sign it has.
        *scale = of_largest(block) / -8.0;
        let inverse = if *scale != 0.0 { 1.0 / *scale } else { 0.0 };
        for (eight, pairs) in block.as_chunks::<8>().0.iter().zip(numbers.as_chunks_mut::<4>().0) {
            let mut codes = [0; 8];
            for at in 0..8 {
                let shifted = (eight[at] * inverse).clamp(-8.0, 7.0) + SHIFT;
                codes[at] = (shifted.to_bits() as u8).wrapping_add(8);
                lengths[0].add(at, eight[at] - (shifted - SHIFT) * *scale);
                lengths[1].add(at, eight[at]);
            }
            *pairs = std::array::from_fn(|at| codes[2 * at] | codes[2 * at + 1] << 4);
        }
    }
    lengths.map(Lanes::length)
}

/// The block itself, or with zeros after its end.
#[inline]
fn filled<'b>(block: &'b [f32], padded: &'b mut [f32; BLOCK]) -> &'b [f32; BLOCK] {
    match block.try_into() {
        Ok(block) => block,
        Err(_) => {
            padded.fill(0.0);
            padded[..block.len()].copy_from_slice(block);
            padded
        }
    }
}

/// The number that is furthest from zero.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn of_largest(block: &[f32]) -> f32 {
    let (mut least, mut most) = ([0.0_f32; 8], [0.0_f32; 8]);
    for eight in block.as_chunks::<8>().0 {
        for at in 0..8 {
            least[at] = least[at].min(eight[at]);
            most[at] = most[at].max(eight[at]);
        }
    }
    let (least, most) = (least.into_iter().fold(0.0, f32::min), most.into_iter().fold(0.0, f32::max));
    if -least > most { least } else { most }
}

/// Eight sums of squares side by side.
#[derive(Clone, Copy, Default)]
struct Lanes([f32; 8]);

impl Lanes {
    #[inline(always)]
    fn add(&mut self, at: usize, number: f32) {
        self.0[at] += number * number;
    }

    /// The Euclidean length, rather too great than too small.
    #[inline(always)]
    fn length(self) -> f32 {
        self.0.into_iter().sum::<f32>().sqrt() * 1.0001
    }
}
