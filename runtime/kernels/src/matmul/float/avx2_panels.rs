//! Many rows with AVX2: sixteen columns of weights at a time are packed into a panel, in an order that needs no
//! horizontal sums.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{Shape, Tile};
use super::Operands;

/// Columns of a panel.
pub const WIDTH: usize = 16;
/// Maximum number of weights per column in a panel. It is read sequentially, so the L2 cache is fast enough.
const DEPTH: usize = 1024;
/// The most rows that are multiplied at a time: as many as there are registers for.
const ROWS: usize = 6;

/// Weights of sixteen columns, `[weights, columns]`.
#[repr(align(64))]
struct Panel([f32; WIDTH * DEPTH]);

/// Computes these rows of these columns.
///
/// # Safety
/// No other thread reads or writes them meanwhile.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply(operands: &Operands, rows: Range<usize>, columns: Range<usize>) {
    let k = operands.shape.k;
    let mut panel = Panel([0.0; WIDTH * DEPTH]);
    let parts = k.div_ceil(DEPTH);
    let step = k.div_ceil(parts.max(1)).next_multiple_of(8).max(8);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..k).step_by(step) {
            let depth = from..k.min(from + step);
            panel.pack(operands, columns.clone(), depth.clone());
            let mut row = rows.start;
            for left in (1..=rows.len().div_ceil(ROWS)).rev() {
                // Tiles of equal height, except one.
                let height = (rows.end - row).div_ceil(left);
                let tile = Tile { rows: row..row + height, columns: columns.clone(), depth: depth.clone() };
                match height {
                    1 => multiply_tile::<1>(operands, &panel, tile),
                    2 => multiply_tile::<2>(operands, &panel, tile),
                    3 => multiply_tile::<3>(operands, &panel, tile),
                    4 => multiply_tile::<4>(operands, &panel, tile),
                    5 => multiply_tile::<5>(operands, &panel, tile),
                    _ => multiply_tile::<ROWS>(operands, &panel, tile),
                }
                row += height;
            }
        }
    }
}

impl Panel {
    /// Packs the weights `depth` of the columns. Columns beyond the last repeat it, and are not read.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn pack(&mut self, operands: &Operands, columns: Range<usize>, depth: Range<usize>) {
        let Operands { w, shape: Shape { k, .. }, .. } = *operands;
        let tail_start = depth.len() / 8 * 8;
        for half in (0..WIDTH).step_by(8) {
            let mut from: [&[f32]; 8] = [&[]; 8];
            for (at, from) in from.iter_mut().enumerate() {
                let column = (columns.start + half + at).min(columns.end - 1);
                *from = &w[column * k..][depth.clone()];
            }
            for at in (0..tail_start).step_by(8) {
                // SAFETY: each column has eight weights at `at`, for which the panel has room: `depth` is no longer
                // than `DEPTH`.
                unsafe {
                    let mut rows = [_mm256_setzero_ps(); 8];
                    for (row, from) in rows.iter_mut().zip(&from) {
                        *row = _mm256_loadu_ps(from.as_ptr().add(at));
                    }
                    for (weight, row) in (at..).zip(transpose(rows)) {
                        _mm256_store_ps(self.0.as_mut_ptr().add(weight * WIDTH + half), row);
                    }
                }
            }
            for at in tail_start..depth.len() {
                for (column, from) in from.iter().enumerate() {
                    self.0[at * WIDTH + half + column] = from[at];
                }
            }
        }
    }
}

/// Computes a tile of `R` rows from a panel, or adds to it if the panel is not the first of its columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_tile<const R: usize>(operands: &Operands, panel: &Panel, Tile { rows, columns, depth }: Tile) {
    let Operands { x: all, ref y, shape: Shape { rows: all_rows, n, k }, .. } = *operands;
    let row = rows.start;
    let mut x: [&[f32]; R] = [&[][..]; R];
    for (at, x) in x.iter_mut().enumerate() {
        *x = &all[(row + at) * k..][depth.clone()];
    }
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    assert!(depth.len() <= DEPTH && columns.end <= n && row + R <= all_rows);
    for at in 0..depth.len() {
        // SAFETY: `at` is within the panel, by the assertion above, and within the rows, which are as long as `depth`.
        unsafe {
            let w = panel.0.as_ptr().add(at * WIDTH);
            let w = [_mm256_load_ps(w), _mm256_load_ps(w.add(8))];
            for row in 0..R {
                let x = _mm256_broadcast_ss(x[row].get_unchecked(at));
                sums[row][0] = _mm256_fmadd_ps(w[0], x, sums[row][0]);
                sums[row][1] = _mm256_fmadd_ps(w[1], x, sums[row][1]);
            }
        }
    }
    for (row, sums) in (row..).zip(sums) {
        // SAFETY: the assertion above keeps row and columns within the output; the caller of `multiply` promises that
        // no other thread has them.
        let to = unsafe { std::slice::from_raw_parts_mut(y.at(row, columns.start), columns.len()) };
        if to.len() == WIDTH {
            for (to, sum) in to.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                // SAFETY: a chunk has eight numbers.
                unsafe {
                    let sum = match depth.start {
                        0 => sum,
                        _ => _mm256_add_ps(_mm256_loadu_ps(to.as_ptr()), sum),
                    };
                    _mm256_storeu_ps(to.as_mut_ptr(), sum);
                }
            }
            continue;
        }
        // SAFETY: both types are sixteen float32.
        let sums = unsafe { std::mem::transmute::<[__m256; 2], [f32; WIDTH]>(sums) };
        match depth.start {
            0 => to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum),
            _ => to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum),
        }
    }
}

/// Transposes eight rows of eight numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transpose(rows: [__m256; 8]) -> [__m256; 8] {
    // Each 128-bit lane: the columns 0 to 3 of the rows 0 to 3, and then of the rows 4 to 7.
    let mut fours = [_mm256_setzero_ps(); 8];
    for (half, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
        let [low, high] = [_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[0], rows[1])];
        let [lower, higher] = [_mm256_unpacklo_ps(rows[2], rows[3]), _mm256_unpackhi_ps(rows[2], rows[3])];
        fours[half * 4] = _mm256_shuffle_ps::<0b01_00_01_00>(low, lower);
        fours[half * 4 + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(low, lower);
        fours[half * 4 + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(high, higher);
        fours[half * 4 + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(high, higher);
    }
    let mut columns = [_mm256_setzero_ps(); 8];
    for at in 0..4 {
        columns[at] = _mm256_permute2f128_ps::<0x20>(fours[at], fours[at + 4]);
        columns[at + 4] = _mm256_permute2f128_ps::<0x31>(fours[at], fours[at + 4]);
    }
    columns
}
