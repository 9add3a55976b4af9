//! Few rows, or columns here and there: the weights are read in the order in which they lie in memory, once for all rows of a tile.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Columns;
use super::super::avx2::{SUMS, To, across, at_a_time};
use super::{Product, step};
use crate::avx512::mask;

/// Spans are of `SPAN` numbers, whatever the blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn multiply<const BITS: usize, const SPAN: usize, const PLANES: usize>(product: &Product, columns: Columns) {
    let (to, places, near) = To::of(&columns, product.w);
    for first in places.clone().step_by(near) {
        of_some::<BITS, SPAN, PLANES>(product, first..places.end.min(first + near), &to);
    }
}

/// The columns at some places.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn of_some<const BITS: usize, const SPAN: usize, const PLANES: usize>(
    product: &Product,
    places: Range<usize>,
    to: &To,
) {
    let mut row = product.rows.start;
    while row < product.rows.end {
        let together = at_a_time(product.rows.end - row);
        match together {
            1 => of_rows::<BITS, SPAN, PLANES, 1, 8>(product, row, places.clone(), to),
            2 => of_rows::<BITS, SPAN, PLANES, 2, 4>(product, row, places.clone(), to),
            _ => of_rows::<BITS, SPAN, PLANES, 4, 2>(product, row, places.clone(), to),
        }
        row += together;
    }
}

/// `R` rows, `C` columns at a time.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn of_rows<const BITS: usize, const SPAN: usize, const PLANES: usize, const R: usize, const C: usize>(
    product: &Product,
    row: usize,
    places: Range<usize>,
    to: &To,
) {
    let whole = places.start + places.len() / C * C;
    for place in (places.start..whole).step_by(C) {
        tile::<BITS, SPAN, PLANES, R, C>(product, row, place, to);
    }
    for place in whole..places.end {
        tile::<BITS, SPAN, PLANES, R, 1>(product, row, place, to);
    }
}

/// `R` rows of `C` columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const BITS: usize, const SPAN: usize, const PLANES: usize, const R: usize, const C: usize>(
    Product { x, w, rows, bias, y }: &Product,
    row: usize,
    place: usize,
    to: &To,
) {
    const { assert!(R * C <= SUMS) };
    let (span, step, size) = (SPAN, const { step(BITS) }, w.block_size);
    let (blocks, bytes, stride) = (w.blocks(), w.blocks() * w.block_bytes(), x.layout.stride);
    assert!(span == x.layout.span() && w.bits == BITS, "a span of {span} numbers of {BITS} bits");
    let (spans, in_span) = (stride / span, span / size);
    // Everything below stays within these.
    let (mut columns, mut last) = ([0; C], 0);
    for (at, column) in columns.iter_mut().enumerate() {
        *column = to.column(place + at);
        last = last.max(*column);
    }
    assert!((last + 1) * bytes <= w.numbers.len() && (last + 1) * blocks <= w.scales.len() && last < y.n);
    assert!((row + R) * stride * PLANES <= x.numbers.len() && row + R <= y.rows);
    assert!((row + R) * spans <= x.starts.len().min(x.scales.len()));
    // SAFETY: within the operands, see above.
    let (numbers, starts, scales) = unsafe {
        (
            x.numbers.as_ptr().add(row * stride * PLANES),
            x.starts.as_ptr().add(row * spans),
            x.scales.as_ptr().add(row * spans),
        )
    };
    let mut totals = [_mm256_setzero_ps(); SUMS];
    for (at_column, &column) in columns.iter().enumerate() {
        // SAFETY: as above.
        let (packed, of_column) =
            unsafe { (w.numbers.as_ptr().add(column * bytes), w.scales.as_ptr().add(column * blocks)) };
        let later = to.later(place + at_column);
        let mut of_rows = [_mm512_setzero_ps(); R];
        for at_span in 0..spans {
            // SAFETY: as above.
            unsafe {
                if row == rows.start {
                    for line in (0..span * BITS / 8).step_by(64) {
                        // A hint, which may name any address.
                        _mm_prefetch::<_MM_HINT_T0>(later.wrapping_add(at_span * span * BITS / 8 + line).cast());
                    }
                }
                let mut low = [_mm512_setzero_si512(); R];
                for (at_row, low) in low.iter_mut().enumerate() {
                    *low = _mm512_loadu_si512(starts.add(at_row * spans + at_span).cast());
                }
                let mut high = [_mm512_setzero_si512(); R];
                for at in (at_span * span..(at_span + 1) * span).step_by(step) {
                    let first = at * BITS / 8;
                    // Beyond the last block there is nothing to read.
                    let there = bytes.saturating_sub(first);
                    let codes = match there {
                        64.. => _mm512_loadu_si512(packed.add(first).cast()),
                        _ => _mm512_maskz_loadu_epi8((1 << there) - 1, packed.wrapping_add(first).cast()),
                    };
                    let nibbles = _mm512_set1_epi8(15);
                    let parts = match BITS {
                        8 => [codes, codes],
                        _ => {
                            [_mm512_and_si512(codes, nibbles), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibbles)]
                        }
                    };
                    for (part, codes) in parts.into_iter().enumerate().take(8 / BITS) {
                        for at_row in 0..R {
                            let x = numbers.add(at_row * stride * PLANES + at + part * 64);
                            if PLANES == 2 {
                                high[at_row] = _mm512_dpbusd_epi32(high[at_row], codes, _mm512_loadu_si512(x.cast()));
                            }
                            let x = _mm512_loadu_si512(x.add((PLANES - 1) * stride).cast());
                            low[at_row] = _mm512_dpbusd_epi32(low[at_row], codes, x);
                        }
                    }
                }
                let block = at_span * in_span;
                let scale = lanes(of_column.wrapping_add(block), in_span, blocks.saturating_sub(block));
                for at_row in 0..R {
                    let sum = match PLANES {
                        2 => _mm512_add_epi32(low[at_row], _mm512_slli_epi32::<8>(high[at_row])),
                        _ => low[at_row],
                    };
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*scales.add(at_row * spans + at_span)));
                    of_rows[at_row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, of_rows[at_row]);
                }
            }
        }
        for (at_row, sum) in of_rows.into_iter().enumerate() {
            let half = _mm512_extractf32x8_ps::<1>(sum);
            totals[at_row * C + at_column] = _mm256_add_ps(_mm512_castps512_ps256(sum), half);
        }
    }
    let mut sums = across(totals);
    if w.zero_points.is_some() {
        for (at, sum) in sums.iter_mut().enumerate().take(R * C) {
            let (row, column) = (row + at / C, columns[at % C]);
            *sum -= w.taken_off(column, &x.sums[row * blocks..][..blocks]);
        }
    }
    for at_row in 0..R {
        for (at_column, &column) in columns.iter().enumerate() {
            let bias = bias.map_or(0.0, |bias| bias[column]);
            // SAFETY: within the output, and no one else writes there.
            unsafe { *y.values.add((row + at_row) * y.n + column) = sums[at_row * C + at_column] + bias };
        }
    }
}

/// The scales of the `count` blocks of a span, each for its lanes, of which there may be fewer.
///
/// # Safety
/// There are as many as `count` and `left` allow.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn lanes(scales: *const f32, count: usize, left: usize) -> __m512 {
    if count == 1 {
        // SAFETY: the caller's.
        return _mm512_set1_ps(unsafe { *scales });
    }
    // SAFETY: no more than there are.
    let scales = unsafe { _mm512_maskz_loadu_ps(mask(count.min(left)), scales) };
    let order = match count {
        2 => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
        4 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        _ => _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
    };
    _mm512_permutexvar_ps(order, scales)
}
