//! Few rows, or listed columns: weights are read in memory order, once for all rows of a tile.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Columns;
use super::super::columns::{ColumnWalk, rows_at_a_time};
use super::Operands;
use super::layout::step;
use crate::avx2::{SUMS, horizontal_sums};
use crate::avx512::first_lanes;

/// Spans have `SPAN` weights, whatever the size of blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn multiply<const BITS: usize, const SPAN: usize, const PLANES: usize>(operands: &Operands, columns: Columns) {
    let (walk, positions, group) = ColumnWalk::new(&columns, operands.w);
    for first in positions.clone().step_by(group) {
        multiply_group::<BITS, SPAN, PLANES>(operands, first..positions.end.min(first + group), &walk);
    }
}

/// Multiplies all rows with the columns at these positions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply_group<const BITS: usize, const SPAN: usize, const PLANES: usize>(
    operands: &Operands,
    positions: Range<usize>,
    walk: &ColumnWalk,
) {
    let mut row = operands.rows.start;
    while row < operands.rows.end {
        let together = rows_at_a_time(operands.rows.end - row);
        match together {
            1 => multiply_rows::<BITS, SPAN, PLANES, 1, 8>(operands, row, positions.clone(), walk),
            2 => multiply_rows::<BITS, SPAN, PLANES, 2, 4>(operands, row, positions.clone(), walk),
            _ => multiply_rows::<BITS, SPAN, PLANES, 4, 2>(operands, row, positions.clone(), walk),
        }
        row += together;
    }
}

/// Multiplies `R` rows, `C` columns at a time.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply_rows<const BITS: usize, const SPAN: usize, const PLANES: usize, const R: usize, const C: usize>(
    operands: &Operands,
    row: usize,
    positions: Range<usize>,
    walk: &ColumnWalk,
) {
    let tail_start = positions.start + positions.len() / C * C;
    for position in (positions.start..tail_start).step_by(C) {
        multiply_tile::<BITS, SPAN, PLANES, R, C>(operands, row, position, walk);
    }
    for position in tail_start..positions.end {
        multiply_tile::<BITS, SPAN, PLANES, R, 1>(operands, row, position, walk);
    }
}

/// Computes `R` rows of the `C` columns from a position on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply_tile<const BITS: usize, const SPAN: usize, const PLANES: usize, const R: usize, const C: usize>(
    Operands { x, w, rows, bias, y }: &Operands,
    row: usize,
    position: usize,
    walk: &ColumnWalk,
) {
    const { assert!(R * C <= SUMS) };
    let (span, step, size) = (SPAN, const { step(BITS) }, w.block_size);
    let (blocks, bytes, stride) = (w.blocks(), w.row_bytes(), x.layout.stride);
    assert!(span == x.layout.span() && w.bits == BITS, "a span of {span} weights of {BITS} bits");
    let (spans, blocks_in_span) = (stride / span, span / size);
    let (mut columns, mut last) = ([0; C], 0);
    for (at, column) in columns.iter_mut().enumerate() {
        *column = walk.column(position + at);
        last = last.max(*column);
    }
    // All unchecked accesses below stay within these bounds.
    assert!((last + 1) * bytes <= w.codes.len() && (last + 1) * blocks <= w.scales.len() && last < y.n);
    assert!((row + R) * stride * PLANES <= x.values.len() && row + R <= y.rows);
    assert!((row + R) * spans <= x.initial.len().min(x.scales.len()));
    // SAFETY: the assertions above keep the rows within the operands.
    let (values, initial, scales) = unsafe {
        (
            x.values.as_ptr().add(row * stride * PLANES),
            x.initial.as_ptr().add(row * spans),
            x.scales.as_ptr().add(row * spans),
        )
    };
    let mut totals = [_mm256_setzero_ps(); SUMS];
    for (at_column, &column) in columns.iter().enumerate() {
        // SAFETY: the assertions above keep the column within the weights.
        let (codes, column_scales) =
            unsafe { (w.codes.as_ptr().add(column * bytes), w.scales.as_ptr().add(column * blocks)) };
        let later = walk.later(position + at_column);
        let mut row_totals = [_mm512_setzero_ps(); R];
        for at_span in 0..spans {
            // SAFETY: the assertions above keep the spans of these rows within the activations; of the weights, which
            // may end within a span, no more is read than there is.
            unsafe {
                if row == rows.start {
                    for line in (0..span * BITS / 8).step_by(64) {
                        // A hint, for which any address will do.
                        _mm_prefetch::<_MM_HINT_T0>(later.wrapping_add(at_span * span * BITS / 8 + line).cast());
                    }
                }
                let mut low = [_mm512_setzero_si512(); R];
                for (at_row, low) in low.iter_mut().enumerate() {
                    *low = _mm512_loadu_si512(initial.add(at_row * spans + at_span).cast());
                }
                let mut high = [_mm512_setzero_si512(); R];
                for at in (at_span * span..(at_span + 1) * span).step_by(step) {
                    let first = at * BITS / 8;
                    let left = bytes.saturating_sub(first);
                    let codes = match left {
                        64.. => _mm512_loadu_si512(codes.add(first).cast()),
                        _ => _mm512_maskz_loadu_epi8((1 << left) - 1, codes.wrapping_add(first).cast()),
                    };
                    let low_nibbles = _mm512_set1_epi8(15);
                    let parts = match BITS {
                        8 => [codes, codes],
                        _ => {
                            let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_nibbles);
                            [_mm512_and_si512(codes, low_nibbles), odd]
                        }
                    };
                    for (part, codes) in parts.into_iter().enumerate().take(8 / BITS) {
                        for at_row in 0..R {
                            let x = values.add(at_row * stride * PLANES + at + part * 64);
                            if PLANES == 2 {
                                high[at_row] = _mm512_dpbusd_epi32(high[at_row], codes, _mm512_loadu_si512(x.cast()));
                            }
                            let x = _mm512_loadu_si512(x.add((PLANES - 1) * stride).cast());
                            low[at_row] = _mm512_dpbusd_epi32(low[at_row], codes, x);
                        }
                    }
                }
                let block = at_span * blocks_in_span;
                let left = blocks.saturating_sub(block);
                let scale = broadcast_blocks(column_scales.wrapping_add(block), blocks_in_span, left);
                for at_row in 0..R {
                    let sum = match PLANES {
                        2 => _mm512_add_epi32(low[at_row], _mm512_slli_epi32::<8>(high[at_row])),
                        _ => low[at_row],
                    };
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*scales.add(at_row * spans + at_span)));
                    row_totals[at_row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, row_totals[at_row]);
                }
            }
        }
        for (at_row, sum) in row_totals.into_iter().enumerate() {
            let half = _mm512_extractf32x8_ps::<1>(sum);
            totals[at_row * C + at_column] = _mm256_add_ps(_mm512_castps512_ps256(sum), half);
        }
    }
    let mut sums = horizontal_sums(totals);
    if w.zero_points.is_some() {
        for (at, sum) in sums.iter_mut().enumerate().take(R * C) {
            let (row, column) = (row + at / C, columns[at % C]);
            *sum -= w.zero_point_correction(column, &x.sums[row * blocks..][..blocks]);
        }
    }
    for at_row in 0..R {
        for (at_column, &column) in columns.iter().enumerate() {
            let bias = bias.map_or(0.0, |bias| bias[column]);
            // SAFETY: the assertions above keep row and column within the output; no other thread has them.
            unsafe { *y.at(row + at_row, column) = sums[at_row * C + at_column] + bias };
        }
    }
}

/// The scales of the `count` blocks of a span, of which `left` exist, each in the lanes of its block.
///
/// # Safety
/// `count.min(left)` numbers can be read from `scales`; at least one if `count` is 1.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn broadcast_blocks(scales: *const f32, count: usize, left: usize) -> __m512 {
    if count == 1 {
        // SAFETY: the caller promises a number.
        return _mm512_set1_ps(unsafe { *scales });
    }
    // SAFETY: the mask leaves out the numbers that the caller does not promise.
    let scales = unsafe { _mm512_maskz_loadu_ps(first_lanes(count.min(left)), scales) };
    let order = match count {
        2 => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
        4 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        _ => _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
    };
    _mm512_permutexvar_ps(order, scales)
}
