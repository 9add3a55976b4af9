//! The matrix multiplication with AVX2 for many rows: sixteen columns of weights at a time are packed into a panel of
//! int16, in an order that needs no horizontal sums.

use std::arch::x86_64::*;
use std::array::from_fn;
use std::ops::Range;

use super::super::Tile;
use super::{Columns, Operands, Weights};

/// Columns of a panel.
const WIDTH: usize = 16;
/// Weights per column in a panel: it stays in the L1 cache, together with some rows of activations.
const DEPTH: usize = 512;
/// The most rows that are multiplied at a time: as many as there are registers for.
const ROWS: usize = 6;
/// Rows that all panels of a task's columns are multiplied by before the next rows: `DEPTH` of their activations stay in
/// a part of the L2 cache.
const ROWS_OF_PANEL: usize = 256;

/// `DEPTH` weights of sixteen columns.
#[repr(align(32))]
struct Panel {
    /// `[pairs, columns, 2]`, without their zero points.
    weights: [i16; WIDTH * DEPTH],
    /// `[blocks, columns]`
    scales: [[f32; WIDTH]; DEPTH / 16],
    /// Weights of each column that it holds.
    depth: usize,
}

/// Activations are in [`Order::Plain`](super::activations::Order::Plain).
#[target_feature(enable = "avx2,fma")]
pub fn multiply<const BITS: usize>(operands: &Operands) {
    match operands.w.block_size {
        128 => multiply_blocks::<BITS, 128>(operands),
        64 => multiply_blocks::<BITS, 64>(operands),
        32 => multiply_blocks::<BITS, 32>(operands),
        _ => multiply_blocks::<BITS, 16>(operands),
    }
}

/// With the length of a block as a constant, the compiler unrolls the loop over it.
#[target_feature(enable = "avx2,fma")]
fn multiply_blocks<const BITS: usize, const SIZE: usize>(operands: &Operands) {
    let Operands { x, w, rows, columns: Columns::Range(columns), .. } = operands else {
        unreachable!("activations for panels are not for listed columns")
    };
    let length = w.blocks() * w.block_size;
    const { assert!(DEPTH.is_multiple_of(SIZE) && SIZE.is_multiple_of(16)) };
    assert!(w.block_size == SIZE && x.values.len() == x.rows * length);
    let mut panel = Panel { weights: [0; WIDTH * DEPTH], scales: [[0.0; WIDTH]; DEPTH / 16], depth: 0 };
    for first_row in rows.clone().step_by(ROWS_OF_PANEL) {
        let rows = first_row..rows.end.min(first_row + ROWS_OF_PANEL);
        for from in (0..length).step_by(DEPTH) {
            for first in columns.clone().step_by(WIDTH) {
                let columns_here = first..columns.end.min(first + WIDTH);
                panel.pack::<BITS>(w, columns_here.clone(), from..length.min(from + DEPTH));
                let next = match from + DEPTH {
                    _ if columns_here.end < columns.end => PanelStart { column: columns_here.end, depth: from },
                    depth if depth < length => PanelStart { column: columns.start, depth },
                    _ if rows.end < operands.rows.end => PanelStart { column: columns.start, depth: 0 },
                    _ => PanelStart { column: columns.end, depth: 0 },
                };
                let depth = from..from + panel.depth;
                multiply_panel::<BITS, SIZE>(
                    operands,
                    &panel,
                    Tile { rows: rows.clone(), columns: columns_here, depth },
                    next,
                );
            }
        }
    }
}

/// Multiplies the rows of `area` by a panel, in tiles of equal height except one, and prefetches the next panel.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_panel<const BITS: usize, const SIZE: usize>(
    operands: &Operands,
    panel: &Panel,
    area: Tile,
    next: PanelStart,
) {
    let Tile { rows, columns, depth } = area;
    let tiles = rows.len().div_ceil(ROWS);
    let mut row = rows.start;
    for left in (1..=tiles).rev() {
        prefetch_panel::<BITS>(operands.w, &next, tiles - left..tiles - left + 1, tiles);
        let height = (rows.end - row).div_ceil(left);
        let tile = Tile { rows: row..row + height, columns: columns.clone(), depth: depth.clone() };
        match height {
            1 => multiply_tile::<SIZE, 1>(operands, panel, tile),
            2 => multiply_tile::<SIZE, 2>(operands, panel, tile),
            3 => multiply_tile::<SIZE, 3>(operands, panel, tile),
            4 => multiply_tile::<SIZE, 4>(operands, panel, tile),
            5 => multiply_tile::<SIZE, 5>(operands, panel, tile),
            _ => multiply_tile::<SIZE, ROWS>(operands, panel, tile),
        }
        row += height;
    }
}

/// The first column of a panel, and the first weight of it.
struct PanelStart {
    column: usize,
    depth: usize,
}

/// Prefetches the parts `parts` of `count` of the next panel's source: the hardware prefetcher does not look that far
/// ahead.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn prefetch_panel<const BITS: usize>(w: &Weights, next: &PanelStart, parts: Range<usize>, count: usize) {
    const LINE: usize = 64;
    let (bytes, lines) = (w.row_bytes(), const { DEPTH * BITS / 8 / LINE });
    let all = WIDTH * lines;
    for line in all * parts.start / count..all * parts.end / count {
        let at = (next.column + line / lines) * bytes + next.depth * BITS / 8 + line % lines * LINE;
        // A hint, for which any address will do.
        _mm_prefetch::<_MM_HINT_T0>(w.codes.as_ptr().wrapping_add(at).cast());
    }
}

impl Panel {
    /// Packs the weights `depth` of the columns.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn pack<const BITS: usize>(&mut self, w: &Weights, columns: Range<usize>, depth: Range<usize>) {
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.row_bytes());
        self.depth = depth.len();
        assert!(columns.end * bytes <= w.codes.len() && depth.end <= blocks * size && depth.len() <= DEPTH);
        let panel_blocks = depth.start / size..depth.end / size;
        for (at, column) in columns.clone().enumerate() {
            let scales = &w.scales[column * blocks..][..blocks][panel_blocks.clone()];
            self.scales.iter_mut().zip(scales).for_each(|(to, &scale)| to[at] = scale);
        }
        // In this order, interleaving 16-bit words of the lower and the upper lanes yields eight columns beside the
        // next eight. Columns beyond the last repeat it, and are not read.
        let [lower, upper] = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]].map(|lanes| {
            let column = |at: usize| (columns.start + at).min(columns.end - 1);
            lanes.map(|at| w.codes[column(at) * bytes..].as_ptr())
        });
        let mut zeros = [_mm256_set1_epi16(w.shared_zero_point().unwrap_or(0) as i16); 2];
        // 16 bytes of each column, or less in short blocks.
        let step = size.min(128 / BITS);
        for block in panel_blocks {
            if w.zero_points.is_some() {
                let zeros_of_eight = |half: usize| {
                    let zero = |at: usize| w.zero_point((columns.start + 8 * half + at).min(columns.end - 1), block);
                    let [a, b, c, d, e, f, g, h] = from_fn(|at| zero(at) * 0x0001_0001);
                    _mm256_setr_epi32(a, b, c, d, e, f, g, h)
                };
                zeros = [zeros_of_eight(0), zeros_of_eight(1)];
            }
            for from in (block * size..(block + 1) * size).step_by(step) {
                // SAFETY: the assertion above keeps the codes within the columns and the packed weights within the
                // panel.
                unsafe {
                    let mut rows = [_mm256_setzero_si256(); 8];
                    for (row, (lower, upper)) in rows.iter_mut().zip(lower.iter().zip(upper)) {
                        let [lower, upper] = [lower.add(from * BITS / 8).cast(), upper.add(from * BITS / 8).cast()];
                        *row = match step * BITS {
                            128 => _mm256_set_m128i(_mm_loadu_si128(upper), _mm_loadu_si128(lower)),
                            _ => _mm256_set_m128i(_mm_loadl_epi64(upper), _mm_loadl_epi64(lower)),
                        };
                    }
                    let mut to = self.weights.as_mut_ptr().add((from - depth.start) * WIDTH);
                    for word in transpose_words(rows).into_iter().take(step * BITS / 16) {
                        // Pairs of weights of eight columns, and of the next eight.
                        let (pairs, count) = if BITS == 8 {
                            let zero = _mm256_setzero_si256();
                            let pair = [_mm256_unpacklo_epi8(word, zero), _mm256_unpackhi_epi8(word, zero)];
                            ([pair, pair], 1)
                        } else {
                            let low = _mm256_set1_epi16(15);
                            let a = _mm256_and_si256(word, low);
                            let b = _mm256_and_si256(_mm256_srli_epi16::<4>(word), low);
                            let c = _mm256_and_si256(_mm256_srli_epi16::<8>(word), low);
                            let d = _mm256_srli_epi16::<12>(word);
                            let first = [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)];
                            ([first, [_mm256_unpacklo_epi16(c, d), _mm256_unpackhi_epi16(c, d)]], 2)
                        };
                        for pair in pairs.into_iter().take(count) {
                            _mm256_store_si256(to.cast(), _mm256_sub_epi16(pair[0], zeros[0]));
                            _mm256_store_si256(to.add(WIDTH).cast(), _mm256_sub_epi16(pair[1], zeros[1]));
                            to = to.add(2 * WIDTH);
                        }
                    }
                }
            }
        }
    }
}

/// Computes a tile of `R` rows from a panel, or adds to it if the panel is not the first of its columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_tile<const SIZE: usize, const R: usize>(
    Operands { x, bias, y, .. }: &Operands,
    panel: &Panel,
    Tile { rows, columns, depth }: Tile,
) {
    // Pairs that are multiplied at a time.
    const PAIRS: usize = 2;
    let row = rows.start;
    let length = x.values.len() / x.rows;
    assert!(row + R <= x.rows && depth.end <= length && depth.len() <= DEPTH && columns.end <= y.n);
    let mut values: [*const i16; R] = [std::ptr::null(); R];
    for (at, values) in values.iter_mut().enumerate() {
        *values = x.values[(row + at) * length + depth.start..].as_ptr();
    }
    let mut totals = [[_mm256_setzero_ps(); 2]; R];
    for (block, scales) in panel.scales[..depth.len() / SIZE].iter().enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for first in (0..SIZE).step_by(2 * PAIRS) {
            for at in (block * SIZE + first..).step_by(2).take(PAIRS) {
                // SAFETY: the assertion above keeps the pairs within the panel and the rows.
                unsafe {
                    let w = panel.weights.as_ptr().add(at * WIDTH);
                    let w = [_mm256_load_si256(w.cast()), _mm256_load_si256(w.add(WIDTH).cast())];
                    for row in 0..R {
                        let x = _mm256_set1_epi32(values[row].add(at).cast::<i32>().read_unaligned());
                        sums[row][0] = _mm256_add_epi32(sums[row][0], _mm256_madd_epi16(w[0], x));
                        sums[row][1] = _mm256_add_epi32(sums[row][1], _mm256_madd_epi16(w[1], x));
                    }
                }
            }
        }
        // SAFETY: sixteen scales are two times eight.
        let scales = unsafe { [_mm256_loadu_ps(scales.as_ptr()), _mm256_loadu_ps(scales[8..].as_ptr())] };
        for row in 0..R {
            for half in 0..2 {
                let sum = _mm256_cvtepi32_ps(sums[row][half]);
                totals[row][half] = _mm256_fmadd_ps(sum, scales[half], totals[row][half]);
            }
        }
    }
    for (row, totals) in (row..).zip(totals) {
        let scale = _mm256_set1_ps(x.scales[row]);
        let results = totals.map(|total| _mm256_mul_ps(total, scale));
        // SAFETY: the rows and columns are within the output; the caller of `super::multiply` promises that no other
        // thread has them.
        let to = unsafe { std::slice::from_raw_parts_mut(y.at(row, columns.start), columns.len()) };
        write(results, to, bias.map(|bias| &bias[columns.clone()]), depth.start);
    }
}

/// Writes the results of a panel whose weights begin at `depth`: the first of its columns with their bias, others by
/// adding them.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn write(results: [__m256; 2], to: &mut [f32], bias: Option<&[f32]>, depth: usize) {
    if let (None, [low, high]) = (bias, to.as_chunks_mut::<8>().0) {
        for (to, results) in [low, high].into_iter().zip(results) {
            // SAFETY: a chunk has eight numbers.
            unsafe {
                let results = if depth == 0 { results } else { _mm256_add_ps(_mm256_loadu_ps(to.as_ptr()), results) };
                _mm256_storeu_ps(to.as_mut_ptr(), results);
            }
        }
        return;
    }
    // SAFETY: both types are sixteen float32.
    let results = unsafe { std::mem::transmute::<[__m256; 2], [f32; WIDTH]>(results) };
    match (depth, bias) {
        (0, None) => to.iter_mut().zip(results).for_each(|(to, result)| *to = result),
        (0, Some(bias)) => to.iter_mut().zip(results).zip(bias).for_each(|((to, result), bias)| *to = result + bias),
        _ => to.iter_mut().zip(results).for_each(|(to, result)| *to += result),
    }
}

/// Transposes eight rows of eight 16-bit words, in either lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transpose_words(rows: [__m256i; 8]) -> [__m256i; 8] {
    // The first half has the words 0 to 3 of the rows 0 to 3, then of the rows 4 to 7; the second half the words 4 to
    // 7.
    let mut fours = [_mm256_setzero_si256(); 8];
    for (half, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
        let [low, high] = [_mm256_unpacklo_epi16(rows[0], rows[1]), _mm256_unpackhi_epi16(rows[0], rows[1])];
        let [lower, higher] = [_mm256_unpacklo_epi16(rows[2], rows[3]), _mm256_unpackhi_epi16(rows[2], rows[3])];
        fours[half * 2] = _mm256_unpacklo_epi32(low, lower);
        fours[half * 2 + 1] = _mm256_unpackhi_epi32(low, lower);
        fours[half * 2 + 4] = _mm256_unpacklo_epi32(high, higher);
        fours[half * 2 + 5] = _mm256_unpackhi_epi32(high, higher);
    }
    let mut words = [_mm256_setzero_si256(); 8];
    for (at, pair) in words.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let first = at / 2 * 4 + at % 2;
        *pair = [
            _mm256_unpacklo_epi64(fours[first], fours[first + 2]),
            _mm256_unpackhi_epi64(fours[first], fours[first + 2]),
        ];
    }
    words
}
