//! The product of weights of few bits with activations of 6 or 8 bits, with AVX2: about half the work of the product proper, or
//! less. Its results are off by a known length at most, and so tell which of very many columns need not be computed at all.
//!
//! # Design
//! Two products of 8 bits by 6, and two such pairs, fit into 16 bits: `4 · 255 · 31 < 2¹⁵`. So do eight products of 4 bits by 8,
//! `8 · 15 · 127 < 2¹⁵`: as many as meet in a block of 128. Each span of activations has a scale of its own, so that a few large
//! ones cost the others no bits.
//!
//! Where the processor has VNNI activations of 8 bits are as fast as any, and [`vnni`] does all this.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2::{AHEAD, SUMS, across, at_a_time, fetch, two_scales};
use super::{Columns, Output, SHIFT, Weights, vnni};
use crate::aligned::Aligned;
use crate::processor::{Level, level};

/// The greatest number that an activation is rounded to, by the bits of the weights.
fn greatest(bits: usize) -> f32 {
    if bits == 4 { 127.0 } else { 31.0 }
}

/// Numbers that are multiplied at a time.
const STEP: usize = 64;
/// Columns that all rows are computed of before the next ones: they stay in the first cache.
const NEAR: usize = 32;

/// The rows of activations, rounded.
#[derive(Default)]
pub struct Rough {
    /// `[rows, spans · span]`, of 4 bits of weights each 64 in the order even, odd; filled up with zeros.
    numbers: Aligned<i8>,
    /// `[rows, spans]`: what the zero point takes off the sums of a span, in the first lane of each block.
    starts: Aligned<[i32; 8]>,
    /// `[rows, spans]`: the scale of a span, eight times.
    scales: Aligned<[f32; 8]>,
    /// `[rows]`: the Euclidean lengths of what the rows lost.
    errors: Vec<f32>,
    /// Instead of all this, where the processor has VNNI.
    bytes: Option<vnni::Rounded>,
}

/// Whether [`multiply`] can take these weights.
pub fn takes(w: &Weights) -> bool {
    let fits = matches!((w.bits, w.block_size), (8, 64 | 128) | (4, 32 | 64 | 128))
        && (w.blocks() * w.block_size).is_multiple_of(w.span());
    level() >= Level::Vnni || w.zero_points.is_none() && fits
}

/// What the scales of a row are to be multiplied by, of which this is the square of its length and that its product with what it was
/// rounded to; and how much further from the row that is, at most. 8 bits are few enough for a row to come out longer or shorter along
/// itself, which moves all great products the same way, and the sum of their exponentials with them.
#[inline(always)]
pub fn along(square: f32, met: f32) -> (f32, f32) {
    let longer = square / met;
    // Neither of nothing nor of what is not finite.
    if (0.9..1.1).contains(&longer) { (longer, (longer - 1.0).abs() * square.sqrt() * 1.1) } else { (1.0, 0.0) }
}

/// Whether activations are rounded to 8 bits for these, not to 6.
pub fn in_8_bits(w: &Weights) -> bool {
    level() >= Level::Vnni || w.bits == 4
}

impl Rough {
    /// Rounds the rows `x` for weights that can be taken.
    pub fn round(&mut self, x: &[f32], w: &Weights) {
        if level() >= Level::Vnni {
            let bytes = self.bytes.get_or_insert_default();
            bytes.prepare(level(), x.len() / w.k, w, vnni::Planes::One, vnni::panels_from(level(), w));
            for (row, x) in x.chunks_exact(w.k).enumerate() {
                // SAFETY: room was made, there is one thread, and the level is no higher than the processor's.
                unsafe { bytes.target().round(row, x, w) };
            }
            return;
        }
        self.bytes = None;
        let (span, spans) = (w.span(), w.blocks() * w.block_size / w.span());
        let rows = x.len() / w.k;
        let zero = w.same_zero_point().unwrap_or(0);
        self.numbers.clear();
        self.numbers.resize(rows * spans * span, 0);
        self.starts.clear();
        self.starts.resize(rows * spans, [0; 8]);
        self.scales.clear();
        self.errors.clear();
        let of_rows = self.numbers.chunks_exact_mut(spans * span).zip(self.starts.chunks_exact_mut(spans));
        for (x, (numbers, starts)) in x.chunks_exact(w.k).zip(of_rows) {
            let is_finite = x.iter().all(|x| x.is_finite());
            let (mut error, mut square, mut met) = (0.0, 0.0, 0.0);
            let of_spans = numbers.chunks_exact_mut(span).zip(starts);
            for (at, (numbers, starts)) in of_spans.enumerate() {
                let x = &x[(at * span).min(w.k)..((at + 1) * span).min(w.k)];
                let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                let scale = largest / greatest(w.bits);
                let inverse = if largest > 0.0 { greatest(w.bits) / largest } else { 0.0 };
                for (at, &x) in x.iter().enumerate() {
                    let number = (x * inverse + SHIFT).to_bits() as i8;
                    let lost = x - f32::from(number) * scale;
                    error += lost * lost;
                    square += x * x;
                    met += x * (x - lost);
                    starts[at / w.block_size * 4 % 8] -= zero * i32::from(number);
                    let place = if w.bits == 4 { at / 64 * 64 + at % 2 * 32 + at % 64 / 2 } else { at };
                    numbers[place] = number;
                }
                // What is not finite makes all of the row's products NaN, as in the product proper.
                self.scales.push([if is_finite { scale } else { f32::NAN }; 8]);
            }
            // A row that came out longer or shorter along itself is made up for: see [`along`].
            let (longer, more) = along(square, met);
            let first = self.scales.len() - spans;
            self.scales[first..].as_flattened_mut().iter_mut().for_each(|scale| *scale *= longer);
            self.errors.push(error.sqrt() * 1.001 + more);
        }
    }

    /// How much of each row was lost: the Euclidean length of it.
    pub fn errors(&self) -> &[f32] {
        self.bytes.as_ref().map_or(&self.errors, |bytes| bytes.errors())
    }
}

/// Computes the columns `columns`.
///
/// # Safety
/// The processor has AVX2 and FMA, `x` was rounded for `w`, which can be taken, no one else writes these columns of `y`
/// meanwhile, and what `y` was made from lives.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply(x: &Rough, w: &Weights, columns: Range<usize>, y: &Output) {
    if let Some(bytes) = &x.bytes {
        // SAFETY: they are there for such processors alone; the rest is the caller's.
        return unsafe { vnni::multiply(bytes, w, None, (0..y.rows, Columns::All(columns)), y) };
    }
    assert!(columns.end <= y.n && x.errors.len() == y.rows && takes(w), "sizes of a product");
    match (w.bits, w.block_size) {
        (8, 128) => of_size::<8, 128>(x, w, columns, y),
        (8, _) => of_size::<8, 64>(x, w, columns, y),
        (_, 128) => of_size::<4, 128>(x, w, columns, y),
        (_, 64) => of_size::<4, 64>(x, w, columns, y),
        _ => of_size::<4, 32>(x, w, columns, y),
    }
}

#[target_feature(enable = "avx2,fma")]
fn of_size<const BITS: usize, const SIZE: usize>(x: &Rough, w: &Weights, columns: Range<usize>, y: &Output) {
    for first in columns.clone().step_by(NEAR) {
        let columns = first..columns.end.min(first + NEAR);
        let mut row = 0;
        while row < y.rows {
            let together = at_a_time(y.rows - row);
            match together {
                1 => of_rows::<BITS, SIZE, 1, 8>(x, w, row, columns.clone(), y),
                2 => of_rows::<BITS, SIZE, 2, 4>(x, w, row, columns.clone(), y),
                _ => of_rows::<BITS, SIZE, 4, 2>(x, w, row, columns.clone(), y),
            }
            row += together;
        }
    }
}

/// `R` rows, `C` columns at a time.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn of_rows<const BITS: usize, const SIZE: usize, const R: usize, const C: usize>(
    x: &Rough,
    w: &Weights,
    row: usize,
    columns: Range<usize>,
    y: &Output,
) {
    let whole = columns.start + columns.len() / C * C;
    for column in (columns.start..whole).step_by(C) {
        write::<R, C>(y, row, column, tile::<BITS, SIZE, R, C>(x, w, row, column));
    }
    for column in whole..columns.end {
        write::<R, 1>(y, row, column, tile::<BITS, SIZE, R, 1>(x, w, row, column));
    }
}

/// Writes a tile's results `[rows, columns]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn write<const R: usize, const C: usize>(y: &Output, row: usize, column: usize, sums: [f32; SUMS]) {
    for (at_row, sums) in sums.as_chunks::<C>().0.iter().enumerate().take(R) {
        // SAFETY: within the output, and no one else has these columns.
        unsafe { y.values.add((row + at_row) * y.n + column).cast::<[f32; C]>().write_unaligned(*sums) };
    }
}

/// The results `[rows, columns]` of a tile.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tile<const BITS: usize, const SIZE: usize, const R: usize, const C: usize>(
    x: &Rough,
    w: &Weights,
    row: usize,
    column: usize,
) -> [f32; SUMS] {
    const { assert!(R * C <= SUMS) };
    let span = const { if SIZE < STEP { STEP } else { SIZE } };
    let (blocks, bytes) = (w.blocks(), w.blocks() * SIZE * BITS / 8);
    let (length, spans) = (blocks * SIZE, blocks * SIZE / span);
    // Everything below stays within these.
    assert!(w.bits == BITS && w.block_size == SIZE && spans * span == length);
    assert!((row + R) * length <= x.numbers.len() && (row + R) * spans <= x.starts.len().min(x.scales.len()));
    assert!((column + C) * bytes <= w.numbers.len() && (column + C) * blocks <= w.scales.len());
    let mut numbers: [*const i8; R] = [std::ptr::null(); R];
    for (at, numbers) in numbers.iter_mut().enumerate() {
        *numbers = x.numbers[(row + at) * length..].as_ptr();
    }
    let mut starts: [*const [i32; 8]; R] = [std::ptr::null(); R];
    for (at, starts) in starts.iter_mut().enumerate() {
        *starts = x.starts[(row + at) * spans..].as_ptr();
    }
    let mut factors: [*const [f32; 8]; R] = [std::ptr::null(); R];
    for (at, factors) in factors.iter_mut().enumerate() {
        *factors = x.scales[(row + at) * spans..].as_ptr();
    }
    let (ones, low) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));

    let mut totals = [_mm256_setzero_ps(); SUMS];
    for at_column in 0..C {
        let packed = w.numbers[(column + at_column) * bytes..].as_ptr();
        let scales = w.scales[(column + at_column) * blocks..].as_ptr();
        let mut of_column = [_mm256_setzero_ps(); R];
        for of_span in 0..spans {
            // SAFETY: within the tile.
            unsafe {
                if row == 0 {
                    fetch(packed.wrapping_add(AHEAD), of_span * span * BITS / 8, span * BITS / 8);
                }
                let packed = packed.add(of_span * (span * BITS / 8));
                let mut sums = [_mm256_setzero_si256(); R];
                for (sum, starts) in sums.iter_mut().zip(starts) {
                    *sum = _mm256_loadu_si256(starts.add(of_span).cast());
                }
                let mut pairs = [_mm256_setzero_si256(); R];
                for step in 0..span / STEP {
                    let packed = packed.add(step * (STEP * BITS / 8));
                    let first = _mm256_loadu_si256(packed.cast());
                    let halves = match BITS {
                        8 => [first, _mm256_loadu_si256(packed.add(32).cast())],
                        _ => [_mm256_and_si256(first, low), _mm256_and_si256(_mm256_srli_epi16::<4>(first), low)],
                    };
                    for row in 0..R {
                        let x = numbers[row].add(of_span * span + step * STEP);
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
                    32 => two_scales(scales.add(2 * of_span)),
                    _ => _mm256_broadcast_ss(&*scales.add(of_span)),
                };
                for row in 0..R {
                    let scale = _mm256_mul_ps(scale, _mm256_loadu_ps(factors[row].add(of_span).cast()));
                    of_column[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[row]), scale, of_column[row]);
                }
            }
        }
        for (at_row, total) in of_column.into_iter().enumerate() {
            totals[at_row * C + at_column] = total;
        }
    }
    across(totals)
}
