//! The coarse matrix multiplication of block-quantized weights with 6-bit or 8-bit activations, with AVX2: half the
//! work of the exact one, or less. Its results have a known error bound, which rules out most of the very many columns
//! from exact computation.
//!
//! # Design
//! Two products of 8-bit weights with 6-bit activations fit into 16 bits, and so do two such pairs: `4 · 255 · 31 <
//! 2¹⁵`. So do eight products of 4-bit weights with 8-bit activations, `8 · 15 · 127 < 2¹⁵`: as many as meet in a block
//! of 128. Each span of activations has its own scale, so that a few large ones cost the others no precision.
//!
//! Where the processor has VNNI, 8-bit activations are as fast as any, and [`vnni`] does all this.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2::broadcast_two;
use super::columns::{COLUMN_GROUP, PREFETCH_DISTANCE, rows_at_a_time};
use super::{Columns, Output, Weights, vnni};
use crate::aligned::AlignedVec;
use crate::avx2::{SUMS, horizontal_sums, prefetch};
use crate::isa::{Level, level};
use crate::simd::ROUND_TO_INTEGER;

/// The largest integer that an activation is rounded to, for weights with this many bits.
fn greatest(bits: usize) -> f32 {
    if bits == 4 { 127.0 } else { 31.0 }
}

/// Weights that are multiplied at a time.
const STEP: usize = 64;

/// Coarsely quantized rows of activations.
#[derive(Default)]
pub struct CoarseActivations {
    /// `[rows, spans · span]`, padded with zeros; for 4-bit weights, the even ones before the odd ones of each 64.
    values: AlignedVec<i8>,
    /// `[rows, spans]`: the initial accumulators of a span, in the first lane of each block what the zero point
    /// subtracts.
    initial: AlignedVec<[i32; 8]>,
    /// `[rows, spans]`: the scale of a span, in eight lanes.
    scales: AlignedVec<[f32; 8]>,
    /// `[rows]`: the Euclidean norms of the quantization errors.
    errors: Vec<f32>,
    /// Replaces all this where the processor has VNNI.
    int8: Option<vnni::Activations>,
}

/// Whether [`multiply`] supports these weights.
pub fn supports(w: &Weights) -> bool {
    let fits = matches!((w.bits, w.block_size), (8, 64 | 128) | (4, 32 | 64 | 128))
        && (w.blocks() * w.block_size).is_multiple_of(w.span());
    level() >= Level::Vnni || w.zero_points.is_none() && fits
}

/// Whether activations for these weights have 8 bits, rather than 6.
pub fn uses_int8(w: &Weights) -> bool {
    level() >= Level::Vnni || w.bits == 4
}

impl CoarseActivations {
    /// Quantizes the rows `x` for supported weights.
    pub fn quantize(&mut self, x: &[f32], w: &Weights) {
        if level() >= Level::Vnni {
            let int8 = self.int8.get_or_insert_default();
            int8.prepare(x.len() / w.k, w, vnni::Planes::One, vnni::panels_from(w));
            for (row, x) in x.chunks_exact(w.k).enumerate() {
                // SAFETY: the processor supports the level in use; each row is quantized once, on this thread.
                unsafe { int8.writer().quantize_row(row, x, w) };
            }
            return;
        }
        self.int8 = None;
        let (span, spans) = (w.span(), w.blocks() * w.block_size / w.span());
        let rows = x.len() / w.k;
        let zero = w.shared_zero_point().unwrap_or(0);
        self.values.clear();
        self.values.resize(rows * spans * span, 0);
        self.initial.clear();
        self.initial.resize(rows * spans, [0; 8]);
        self.scales.clear();
        self.errors.clear();
        let rows = self.values.chunks_exact_mut(spans * span).zip(self.initial.chunks_exact_mut(spans));
        for (x, (values, initial)) in x.chunks_exact(w.k).zip(rows) {
            let is_finite = x.iter().all(|x| x.is_finite());
            let (mut error, mut square, mut dot) = (0.0, 0.0, 0.0);
            for (at, (values, initial)) in values.chunks_exact_mut(span).zip(initial).enumerate() {
                let x = &x[(at * span).min(w.k)..((at + 1) * span).min(w.k)];
                let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                let scale = largest / greatest(w.bits);
                let inverse = if largest > 0.0 { greatest(w.bits) / largest } else { 0.0 };
                for (at, &x) in x.iter().enumerate() {
                    let value = (x * inverse + ROUND_TO_INTEGER).to_bits() as i8;
                    let lost = x - f32::from(value) * scale;
                    error += lost * lost;
                    square += x * x;
                    dot += x * (x - lost);
                    initial[at / w.block_size * 4 % 8] -= zero * i32::from(value);
                    let place = if w.bits == 4 { at / 64 * 64 + at % 2 * 32 + at % 64 / 2 } else { at };
                    values[place] = value;
                }
                // NaN or infinity anywhere in the row makes all of its products NaN, as in the exact multiplication.
                self.scales.push([if is_finite { scale } else { f32::NAN }; 8]);
            }
            let correction = vnni::LengthCorrection::of(square, dot);
            let first = self.scales.len() - spans;
            self.scales[first..].as_flattened_mut().iter_mut().for_each(|scale| *scale *= correction.factor);
            self.errors.push(error.sqrt() * 1.001 + correction.error);
        }
    }

    /// `[rows]`: the Euclidean norms of the quantization errors.
    pub fn errors(&self) -> &[f32] {
        self.int8.as_ref().map_or(&self.errors, |int8| int8.errors())
    }
}

/// Computes these columns of the product for all rows.
///
/// # Safety
/// The processor has AVX2 and FMA, `x` was quantized for weights like `w`, and no other thread reads or writes the
/// columns meanwhile.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply(x: &CoarseActivations, w: &Weights, columns: Range<usize>, y: &Output) {
    if let Some(int8) = &x.int8 {
        // SAFETY: activations for VNNI exist only where the processor has it; the caller promises that no other thread
        // has the columns.
        return unsafe { vnni::multiply(int8, w, None, 0..y.rows, Columns::Range(columns), y) };
    }
    assert!(columns.end <= y.n && x.errors.len() == y.rows && supports(w), "sizes of a matrix multiplication");
    match (w.bits, w.block_size) {
        (8, 128) => multiply_blocks::<8, 128>(x, w, columns, y),
        (8, _) => multiply_blocks::<8, 64>(x, w, columns, y),
        (_, 128) => multiply_blocks::<4, 128>(x, w, columns, y),
        (_, 64) => multiply_blocks::<4, 64>(x, w, columns, y),
        _ => multiply_blocks::<4, 32>(x, w, columns, y),
    }
}

#[target_feature(enable = "avx2,fma")]
fn multiply_blocks<const BITS: usize, const SIZE: usize>(
    x: &CoarseActivations,
    w: &Weights,
    columns: Range<usize>,
    y: &Output,
) {
    for first in columns.clone().step_by(COLUMN_GROUP) {
        let columns = first..columns.end.min(first + COLUMN_GROUP);
        let mut row = 0;
        while row < y.rows {
            let together = rows_at_a_time(y.rows - row);
            match together {
                1 => multiply_rows::<BITS, SIZE, 1, 8>(x, w, row, columns.clone(), y),
                2 => multiply_rows::<BITS, SIZE, 2, 4>(x, w, row, columns.clone(), y),
                _ => multiply_rows::<BITS, SIZE, 4, 2>(x, w, row, columns.clone(), y),
            }
            row += together;
        }
    }
}

/// Multiplies `R` rows, `C` columns at a time.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_rows<const BITS: usize, const SIZE: usize, const R: usize, const C: usize>(
    x: &CoarseActivations,
    w: &Weights,
    row: usize,
    columns: Range<usize>,
    y: &Output,
) {
    let tail_start = columns.start + columns.len() / C * C;
    for column in (columns.start..tail_start).step_by(C) {
        write::<R, C>(y, row, column, multiply_tile::<BITS, SIZE, R, C>(x, w, row, column));
    }
    for column in tail_start..columns.end {
        write::<R, 1>(y, row, column, multiply_tile::<BITS, SIZE, R, 1>(x, w, row, column));
    }
}

/// Writes a tile's results `[R, C]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn write<const R: usize, const C: usize>(y: &Output, row: usize, column: usize, results: [f32; SUMS]) {
    for (at_row, results) in results.as_chunks::<C>().0.iter().enumerate().take(R) {
        // SAFETY: `multiply` checked rows and columns; its caller promises that no other thread has them.
        unsafe { y.at(row + at_row, column).cast::<[f32; C]>().write_unaligned(*results) };
    }
}

/// The results `[R, C]` of a tile.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_tile<const BITS: usize, const SIZE: usize, const R: usize, const C: usize>(
    x: &CoarseActivations,
    w: &Weights,
    row: usize,
    column: usize,
) -> [f32; SUMS] {
    const { assert!(R * C <= SUMS) };
    let span = const { if SIZE < STEP { STEP } else { SIZE } };
    let (blocks, bytes) = (w.blocks(), w.blocks() * SIZE * BITS / 8);
    let (length, spans) = (blocks * SIZE, blocks * SIZE / span);
    // All unchecked accesses below stay within these bounds.
    assert!(w.bits == BITS && w.block_size == SIZE && spans * span == length);
    assert!((row + R) * length <= x.values.len() && (row + R) * spans <= x.initial.len().min(x.scales.len()));
    assert!((column + C) * bytes <= w.codes.len() && (column + C) * blocks <= w.scales.len());
    let mut values: [*const i8; R] = [std::ptr::null(); R];
    for (at, values) in values.iter_mut().enumerate() {
        *values = x.values[(row + at) * length..].as_ptr();
    }
    let mut initial: [*const [i32; 8]; R] = [std::ptr::null(); R];
    for (at, initial) in initial.iter_mut().enumerate() {
        *initial = x.initial[(row + at) * spans..].as_ptr();
    }
    let mut row_scales: [*const [f32; 8]; R] = [std::ptr::null(); R];
    for (at, row_scales) in row_scales.iter_mut().enumerate() {
        *row_scales = x.scales[(row + at) * spans..].as_ptr();
    }
    let (ones, low) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));

    let mut totals = [_mm256_setzero_ps(); SUMS];
    for at_column in 0..C {
        let codes = w.codes[(column + at_column) * bytes..].as_ptr();
        let scales = w.scales[(column + at_column) * blocks..].as_ptr();
        let mut column_totals = [_mm256_setzero_ps(); R];
        for at_span in 0..spans {
            // SAFETY: the assertions above keep the spans of these rows and columns within the operands.
            unsafe {
                if row == 0 {
                    prefetch(codes.wrapping_add(PREFETCH_DISTANCE), at_span * span * BITS / 8, span * BITS / 8);
                }
                let codes = codes.add(at_span * (span * BITS / 8));
                let mut sums = [_mm256_setzero_si256(); R];
                for (sum, initial) in sums.iter_mut().zip(initial) {
                    *sum = _mm256_loadu_si256(initial.add(at_span).cast());
                }
                let mut pairs = [_mm256_setzero_si256(); R];
                for step in 0..span / STEP {
                    let codes = codes.add(step * (STEP * BITS / 8));
                    let first = _mm256_loadu_si256(codes.cast());
                    let halves = match BITS {
                        8 => [first, _mm256_loadu_si256(codes.add(32).cast())],
                        _ => [_mm256_and_si256(first, low), _mm256_and_si256(_mm256_srli_epi16::<4>(first), low)],
                    };
                    for row in 0..R {
                        let x = values[row].add(at_span * span + step * STEP);
                        let here = _mm256_add_epi16(
                            _mm256_maddubs_epi16(halves[0], _mm256_loadu_si256(x.cast())),
                            _mm256_maddubs_epi16(halves[1], _mm256_loadu_si256(x.add(32).cast())),
                        );
                        if BITS == 8 {
                            sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(here, ones));
                        } else {
                            pairs[row] = _mm256_add_epi16(pairs[row], here);
                        }
                    }
                }
                if BITS == 4 {
                    for row in 0..R {
                        sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(pairs[row], ones));
                    }
                }
                let scale = match SIZE {
                    32 => broadcast_two(scales.add(2 * at_span)),
                    _ => _mm256_broadcast_ss(&*scales.add(at_span)),
                };
                for row in 0..R {
                    let scale = _mm256_mul_ps(scale, _mm256_loadu_ps(row_scales[row].add(at_span).cast()));
                    column_totals[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[row]), scale, column_totals[row]);
                }
            }
        }
        for (at_row, total) in column_totals.into_iter().enumerate() {
            totals[at_row * C + at_column] = total;
        }
    }
    horizontal_sums(totals)
}
