//! `Prepared`: the quantized copy that a coarse pass reads instead of the weights, and the norms that bound its errors.

use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::MmapMut;

use super::pass::PassWeights;
use super::{CHUNK, HeadWeights};
use crate::error::Error;
use crate::isa::Avx2Token;
use crate::matmul::Shape;
use crate::matmul::quantized::Weights;
use crate::parallel::{ParallelFor, SharedSlice, part};
use crate::simd::ROUND_TO_INTEGER;

/// Weights of a copy that share a scale.
const BLOCK: usize = 128;

/// Euclidean norms of rows of weights, or the greatest of several rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Norms {
    /// Of the quantization errors; of the weights themselves where there is no copy.
    pub error: f32,
    pub weights: f32,
}

/// The preparation of weights `[n, k]` for a coarse pass.
pub struct Prepared {
    /// `[n]`: the norms of the weights.
    pub norms: Vec<f32>,
    pub greatest: Norms,
    /// The greatest of each [`CHUNK`] rows.
    pub chunk_norms: Vec<Norms>,
    /// `None` if the coarse pass reads the weights themselves.
    pub copy: Option<Copy>,
    /// How often, lately, a pass in 4 bits has left too much to compute exactly.
    int4_misses: AtomicU32,
}

/// A copy `[n, k]` in 4 or 8 bits.
pub struct Copy {
    /// In huge pages where there are any: in small ones the processor looks up addresses as often as it reads.
    codes: MmapMut,
    scales: Vec<f32>,
    bits: usize,
    /// `[n]`: the norms of the rows' quantization errors.
    pub errors: Vec<f32>,
}

impl Copy {
    fn new(bits: usize, Shape { n, k, .. }: Shape) -> Result<Copy, Error> {
        let blocks = k.div_ceil(BLOCK);
        let codes = MmapMut::map_anon(n * blocks * BLOCK * bits / 8)
            .map_err(|error| Error::OutOfMemory { bits, message: error.to_string() })?;
        // Without huge pages it is slower.
        #[cfg(all(target_os = "linux", not(miri)))]
        let _ = codes.advise(memmap2::Advice::HugePage);
        Ok(Copy { codes, scales: vec![0.0; n * blocks], bits, errors: vec![0.0; n] })
    }

    pub fn weights(&self, k: usize) -> Weights<'_> {
        let Copy { codes, scales, bits, .. } = self;
        Weights { codes, scales, zero_points: None, k, bits: *bits, block_size: BLOCK }
    }
}

/// Rows of weights in a task: about 1 MiB of float32, in whole chunks.
pub fn rows_per_task(k: usize) -> usize {
    ((256 << 10) / k).clamp(1, 4096).next_multiple_of(CHUNK)
}

impl Prepared {
    pub fn new(
        _: Avx2Token,
        w: HeadWeights,
        pass_weights: PassWeights,
        shape: Shape,
        parallel_for: ParallelFor,
    ) -> Result<Prepared, Error> {
        let Shape { n, k, .. } = shape;
        let bits = match (pass_weights, w) {
            (PassWeights::Int4Copy, _) => Some(4),
            (PassWeights::Int8, HeadWeights::Float(_)) => Some(8),
            (PassWeights::Int8, HeadWeights::Quantized(_)) => None,
        };
        let mut norms = vec![0.0; n];
        let mut copy = bits.map(|bits| Copy::new(bits, shape)).transpose()?;
        let to_norms = SharedSlice::new(&mut norms);
        let to_copy = copy.as_mut().map(|Copy { codes, scales, bits, errors }| CopyWriter {
            codes: SharedSlice::new(codes),
            scales: SharedSlice::new(scales),
            errors: SharedSlice::new(errors),
            bits: *bits,
        });
        let size = rows_per_task(k);
        parallel_for(n.div_ceil(size), &|task| {
            let mut dequantized = Vec::new();
            for row in part(task, size, n) {
                // SAFETY: every row is prepared by one task.
                let norm = unsafe { &mut to_norms.slice_mut(row..row + 1)[0] };
                let Some(to_copy) = &to_copy else {
                    if let HeadWeights::Quantized(w) = w {
                        *norm = w.row_norm(row);
                    }
                    continue;
                };
                let weights = match w {
                    HeadWeights::Float(w) => &w[row * k..][..k],
                    HeadWeights::Quantized(w) => {
                        dequantized.resize(k, 0.0);
                        // SAFETY: the token proves AVX2 and FMA.
                        unsafe { dequantize(w, row, &mut dequantized) };
                        &dequantized
                    }
                };
                // SAFETY: the token proves AVX2 and FMA; every row is prepared by one task.
                *norm = unsafe { to_copy.quantize_row(row, weights) };
            }
        })?;
        let greatest = |norms: &[f32]| norms.iter().copied().fold(0.0, f32::max);
        let errors = copy.as_ref().map_or(&norms, |copy| &copy.errors);
        let chunks = errors.chunks(CHUNK).zip(norms.chunks(CHUNK));
        let chunk_norms =
            chunks.map(|(errors, norms)| Norms { error: greatest(errors), weights: greatest(norms) }).collect();
        let greatest = Norms { error: greatest(errors), weights: greatest(&norms) };
        Ok(Prepared { greatest, chunk_norms, norms, copy, int4_misses: AtomicU32::new(0) })
    }

    pub fn int4_misses(&self) -> u32 {
        self.int4_misses.load(Ordering::Relaxed)
    }

    /// Counts a pass in 4 bits that left too much to compute exactly.
    pub fn count_int4_miss(&self) {
        self.update_int4_misses(|misses| misses + 1);
    }

    /// Counts a pass in 4 bits that left little, which makes up for a miss.
    pub fn count_int4_hit(&self) {
        self.update_int4_misses(|misses| misses.saturating_sub(1));
    }

    fn update_int4_misses(&self, change: impl Fn(u32) -> u32) {
        // It always succeeds, with the count before.
        let _ = self.int4_misses.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |misses| Some(change(misses)));
    }
}

/// Writes rows of a [`Copy`] from several threads.
struct CopyWriter<'c> {
    codes: SharedSlice<'c, u8>,
    scales: SharedSlice<'c, f32>,
    errors: SharedSlice<'c, f32>,
    bits: usize,
}

impl CopyWriter<'_> {
    /// Quantizes a row of weights, and returns the weights' norm.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA, and no other thread quantizes this row.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn quantize_row(&self, row: usize, weights: &[f32]) -> f32 {
        let blocks = weights.len().div_ceil(BLOCK);
        let bytes = blocks * BLOCK * self.bits / 8;
        // SAFETY: the caller promises that no other thread has the row.
        let (codes, scales, error) = unsafe {
            (
                self.codes.slice_mut(row * bytes..(row + 1) * bytes),
                self.scales.slice_mut(row * blocks..(row + 1) * blocks),
                &mut self.errors.slice_mut(row..row + 1)[0],
            )
        };
        let norms = match self.bits {
            4 => quantize_to_int4(weights, codes, scales),
            _ => quantize_to_int8(weights, codes, scales),
        };
        *error = norms.error;
        norms.weights
    }
}

/// [`Weights::dequantize_row`] with AVX2.
#[target_feature(enable = "avx2,fma")]
fn dequantize(w: &Weights, row: usize, to: &mut [f32]) {
    w.dequantize_row(row, to);
}

/// Quantizes a row to 8 bits.
#[target_feature(enable = "avx2,fma")]
fn quantize_to_int8(row: &[f32], codes: &mut [u8], scales: &mut [f32]) -> Norms {
    let (mut error, mut weights) = (SquareSums::default(), SquareSums::default());
    let mut padded = [0.0; BLOCK];
    for ((block, codes), scale) in row.chunks(BLOCK).zip(codes.chunks_exact_mut(BLOCK)).zip(scales) {
        let block = pad(block, &mut padded);
        *scale = furthest_from_zero(block).abs() / 127.0;
        let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
        for (eight, codes) in block.as_chunks::<8>().0.iter().zip(codes.as_chunks_mut::<8>().0) {
            for at in 0..8 {
                let shifted = eight[at] * inverse + ROUND_TO_INTEGER;
                codes[at] = (shifted.to_bits() as u8).wrapping_add(128);
                error.add(at, eight[at] - (shifted - ROUND_TO_INTEGER) * *scale);
                weights.add(at, eight[at]);
            }
        }
    }
    Norms { error: error.norm(), weights: weights.norm() }
}

/// Quantizes a row to 4 bits.
#[target_feature(enable = "avx2,fma")]
fn quantize_to_int4(row: &[f32], codes: &mut [u8], scales: &mut [f32]) -> Norms {
    let (mut error, mut weights) = (SquareSums::default(), SquareSums::default());
    let mut padded = [0.0; BLOCK];
    for ((block, codes), scale) in row.chunks(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(scales) {
        let block = pad(block, &mut padded);
        // Of −8 to 7, the former is for the weight that is furthest from zero, whatever its sign.
        *scale = furthest_from_zero(block) / -8.0;
        let inverse = if *scale != 0.0 { 1.0 / *scale } else { 0.0 };
        for (eight, pairs) in block.as_chunks::<8>().0.iter().zip(codes.as_chunks_mut::<4>().0) {
            let mut codes = [0; 8];
            for at in 0..8 {
                let shifted = (eight[at] * inverse).clamp(-8.0, 7.0) + ROUND_TO_INTEGER;
                codes[at] = (shifted.to_bits() as u8).wrapping_add(8);
                error.add(at, eight[at] - (shifted - ROUND_TO_INTEGER) * *scale);
                weights.add(at, eight[at]);
            }
            *pairs = std::array::from_fn(|at| codes[2 * at] | codes[2 * at + 1] << 4);
        }
    }
    Norms { error: error.norm(), weights: weights.norm() }
}

/// The block itself, or a copy padded with zeros.
#[inline]
fn pad<'b>(block: &'b [f32], padded: &'b mut [f32; BLOCK]) -> &'b [f32; BLOCK] {
    match block.try_into() {
        Ok(block) => block,
        Err(_) => {
            padded.fill(0.0);
            padded[..block.len()].copy_from_slice(block);
            padded
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn furthest_from_zero(block: &[f32]) -> f32 {
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
struct SquareSums([f32; 8]);

impl SquareSums {
    #[inline(always)]
    fn add(&mut self, at: usize, number: f32) {
        self.0[at] += number * number;
    }

    /// The Euclidean norm, rounded up.
    #[inline(always)]
    fn norm(self) -> f32 {
        self.0.into_iter().sum::<f32>().sqrt() * 1.0001
    }
}
