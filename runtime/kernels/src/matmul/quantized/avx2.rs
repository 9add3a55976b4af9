//! The matrix multiplication with AVX2 for few rows: weights are read in memory order, and each is widened to 16 bits
//! once for all rows of a tile.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Operands;
use super::columns::{ColumnWalk, rows_at_a_time};
use crate::avx2::{SUMS, horizontal_sums, prefetch};

/// Activations of 4-bit weights are in [`Order::EveryFourth`](super::activations::Order::EveryFourth).
#[target_feature(enable = "avx2,fma")]
pub fn multiply<const BITS: usize>(operands: &Operands) {
    match operands.w.span() {
        128 => multiply_spans::<BITS, 128>(operands),
        64 => multiply_spans::<BITS, 64>(operands),
        32 => multiply_spans::<BITS, 32>(operands),
        _ => multiply_spans::<BITS, 16>(operands),
    }
}

/// With the length of a span as a constant, the compiler unrolls the loop over it.
#[target_feature(enable = "avx2,fma")]
fn multiply_spans<const BITS: usize, const SPAN: usize>(operands: &Operands) {
    let (walk, positions, group) = ColumnWalk::new(&operands.columns, operands.w);
    for first in positions.clone().step_by(group) {
        let positions = first..positions.end.min(first + group);
        multiply_group::<BITS, SPAN>(operands, operands.rows.clone(), positions, &walk);
    }
}

/// Multiplies all rows with the columns at these positions.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_group<const BITS: usize, const SPAN: usize>(
    operands: &Operands,
    rows: Range<usize>,
    positions: Range<usize>,
    walk: &ColumnWalk,
) {
    let mut row = rows.start;
    while row < rows.end {
        let together = rows_at_a_time(rows.end - row);
        match together {
            1 => multiply_rows::<BITS, SPAN, 1, 8>(operands, row, positions.clone(), walk),
            2 => multiply_rows::<BITS, SPAN, 2, 4>(operands, row, positions.clone(), walk),
            _ => multiply_rows::<BITS, SPAN, 4, 2>(operands, row, positions.clone(), walk),
        }
        row += together;
    }
}

/// Multiplies `R` rows, `C` columns at a time.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn multiply_rows<const BITS: usize, const SPAN: usize, const R: usize, const C: usize>(
    operands: &Operands,
    row: usize,
    positions: Range<usize>,
    walk: &ColumnWalk,
) {
    let tail_start = positions.start + positions.len() / C * C;
    for position in (positions.start..tail_start).step_by(C) {
        let (mut columns, mut later) = ([0; C], [std::ptr::null(); C]);
        for at in 0..C {
            (columns[at], later[at]) = (walk.column(position + at), walk.later(position + at));
        }
        let sums = multiply_tile::<BITS, SPAN, R, C>(operands, row, columns, later);
        write::<R, C>(operands, row, columns, sums);
    }
    for position in tail_start..positions.end {
        let columns = [walk.column(position)];
        let sums = multiply_tile::<BITS, SPAN, R, 1>(operands, row, columns, [walk.later(position)]);
        write::<R, 1>(operands, row, columns, sums);
    }
}

/// Scales a tile's sums `[R, C]`, adds the bias and writes them.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn write<const R: usize, const C: usize>(operands: &Operands, row: usize, columns: [usize; C], sums: [f32; SUMS]) {
    let Operands { x, bias, y, .. } = operands;
    for (row, sums) in (row..row + R).zip(sums.chunks_exact(C)) {
        let scale = x.scales[row];
        for (column, sum) in columns.into_iter().zip(sums) {
            let bias = bias.map_or(0.0, |bias| bias[column]);
            // SAFETY: `super::multiply` checked rows and columns; its caller promises that no other thread has them.
            unsafe { *y.at(row, column) = sum * scale + bias };
        }
    }
}

/// The sums `[R, C]` of a tile; as many bytes as a column has are prefetched from each address of `later`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_tile<const BITS: usize, const SPAN: usize, const R: usize, const C: usize>(
    Operands { x, w, rows, .. }: &Operands,
    row: usize,
    columns: [usize; C],
    later: [*const u8; C],
) -> [f32; SUMS] {
    const { assert!(R * C <= SUMS) };
    let (blocks, size, span) = (w.blocks(), w.block_size, SPAN);
    let (length, bytes, spans) = (blocks * size, w.row_bytes(), blocks * size / span);
    // All unchecked accesses below stay within these bounds; `Order::EveryFourth` comes in whole spans of 64.
    assert!((row + R) * length <= x.values.len() && (row + R) * spans <= x.initial.len());
    let last = columns.into_iter().fold(0, usize::max);
    assert!((last + 1) * bytes <= w.codes.len() && (last + 1) * blocks <= w.scales.len());
    assert!(spans * span == length && span == w.span() && span.is_multiple_of(if BITS == 4 { 64 } else { 16 }));
    let mut values: [*const i16; R] = [std::ptr::null(); R];
    for (at, values) in values.iter_mut().enumerate() {
        *values = x.values[(row + at) * length..].as_ptr();
    }
    let mut initial: [*const [i32; 8]; R] = [std::ptr::null(); R];
    for (at, initial) in initial.iter_mut().enumerate() {
        *initial = x.initial[(row + at) * spans..].as_ptr();
    }

    let mut totals = [_mm256_setzero_ps(); SUMS];
    for (at_column, (column, later)) in columns.into_iter().zip(later).enumerate() {
        let codes = w.codes[column * bytes..].as_ptr();
        let scales = w.scales[column * blocks..].as_ptr();
        let mut column_totals = [_mm256_setzero_ps(); R];
        for at_span in 0..spans {
            // SAFETY: the assertions above keep the spans of these rows and columns within the operands.
            unsafe {
                let mut sums = [_mm256_setzero_si256(); R];
                for (sum, initial) in sums.iter_mut().zip(initial) {
                    *sum = _mm256_loadu_si256(initial.add(at_span).cast());
                }
                // For further rows the weights are in the cache.
                if row == rows.start {
                    prefetch(later, at_span * span * BITS / 8, span * BITS / 8);
                }
                if BITS == 8 {
                    for at in (at_span * span..(at_span + 1) * span).step_by(16) {
                        let weights = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.add(at).cast()));
                        for row in 0..R {
                            let x = _mm256_loadu_si256(values[row].add(at).cast());
                            sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(weights, x));
                        }
                    }
                } else {
                    for at in (at_span * span..(at_span + 1) * span).step_by(64) {
                        let weights = unpack_nibbles(_mm256_loadu_si256(codes.add(at / 2).cast()));
                        for row in 0..R {
                            for (i, &weights) in weights.iter().enumerate() {
                                let x = _mm256_loadu_si256(values[row].add(at + 16 * i).cast());
                                sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(weights, x));
                            }
                        }
                    }
                }
                let scale = if span == size {
                    _mm256_broadcast_ss(&*scales.add(at_span))
                } else {
                    broadcast_two(scales.add(2 * at_span))
                };
                for row in 0..R {
                    column_totals[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[row]), scale, column_totals[row]);
                }
            }
        }
        if w.zero_points.is_some() {
            for (row, total) in (row..).zip(&mut column_totals) {
                let zeros = w.zero_point_correction(column, &x.sums[row * blocks..][..blocks]);
                *total = _mm256_sub_ps(*total, _mm256_setr_ps(zeros, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0));
            }
        }
        for (at_row, total) in column_totals.into_iter().enumerate() {
            totals[at_row * C + at_column] = total;
        }
    }
    horizontal_sums(totals)
}

/// The 64 4-bit codes of 32 bytes as int16, in [`Order::EveryFourth`](super::activations::Order::EveryFourth).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn unpack_nibbles(words: __m256i) -> [__m256i; 4] {
    let low = _mm256_set1_epi16(15);
    [
        _mm256_and_si256(words, low),
        _mm256_and_si256(_mm256_srli_epi16::<4>(words), low),
        _mm256_and_si256(_mm256_srli_epi16::<8>(words), low),
        _mm256_srli_epi16::<12>(words),
    ]
}

/// Two adjacent scales, each in four of eight lanes.
///
/// # Safety
/// Two numbers can be read from `scales`.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub unsafe fn broadcast_two(scales: *const f32) -> __m256 {
    // SAFETY: the caller promises two numbers, which need not be aligned as a float64 is.
    let two = _mm256_castpd_ps(_mm256_set1_pd(unsafe { scales.cast::<f64>().read_unaligned() }));
    _mm256_permutevar_ps(two, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))
}
