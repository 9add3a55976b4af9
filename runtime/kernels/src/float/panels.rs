//! The product for many rows of activations: sixteen columns of weights at a time are brought into an order in which no sum has
//! to be taken across a register.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Product;

/// Columns of a panel.
pub const WIDTH: usize = 16;
/// The most numbers of each column in a panel. It is read in order, so that the second cache holds it as well as the first would.
const DEPTH: usize = 1024;
/// The most rows that are computed at a time: what the processor has registers for.
const ROWS: usize = 6;

/// A part of sixteen columns, `[numbers, columns]`.
#[repr(align(64))]
struct Panel([f32; WIDTH * DEPTH]);

/// Computes the rows `rows` of the columns `columns`.
///
/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply(product: &Product, [rows, columns]: [Range<usize>; 2]) {
    let mut panel = Panel([0.0; WIDTH * DEPTH]);
    let parts = product.k.div_ceil(DEPTH);
    let step = product.k.div_ceil(parts.max(1)).next_multiple_of(8).max(8);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..product.k).step_by(step) {
            let depth = from..product.k.min(from + step);
            panel.fill(product, columns.clone(), depth.clone());
            let mut row = rows.start;
            for left in (1..=rows.len().div_ceil(ROWS)).rev() {
                // As many rows in each tile as in the others, but for one.
                let taken = (rows.end - row).div_ceil(left);
                match taken {
                    1 => tile::<1>(product, &panel, row, columns.clone(), depth.clone()),
                    2 => tile::<2>(product, &panel, row, columns.clone(), depth.clone()),
                    3 => tile::<3>(product, &panel, row, columns.clone(), depth.clone()),
                    4 => tile::<4>(product, &panel, row, columns.clone(), depth.clone()),
                    5 => tile::<5>(product, &panel, row, columns.clone(), depth.clone()),
                    _ => tile::<ROWS>(product, &panel, row, columns.clone(), depth.clone()),
                }
                row += taken;
            }
        }
    }
}

impl Panel {
    /// Takes these numbers of the columns. Columns that are not there are as the last; no one reads them.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn fill(&mut self, product: &Product, columns: Range<usize>, depth: Range<usize>) {
        let Product { w, k, .. } = *product;
        let whole = depth.len() / 8 * 8;
        for half in (0..WIDTH).step_by(8) {
            let mut from: [&[f32]; 8] = [&[]; 8];
            for (at, from) in from.iter_mut().enumerate() {
                let column = (columns.start + half + at).min(columns.end - 1);
                *from = &w[column * k..][depth.clone()];
            }
            for at in (0..whole).step_by(8) {
                // SAFETY: eight numbers of each column, which the panel has room for.
                unsafe {
                    let mut rows = [_mm256_setzero_ps(); 8];
                    for (row, from) in rows.iter_mut().zip(&from) {
                        *row = _mm256_loadu_ps(from.as_ptr().add(at));
                    }
                    for (number, row) in (at..).zip(transposed(rows)) {
                        _mm256_store_ps(self.0.as_mut_ptr().add(number * WIDTH + half), row);
                    }
                }
            }
            for at in whole..depth.len() {
                for (column, from) in from.iter().enumerate() {
                    self.0[at * WIDTH + half + column] = from[at];
                }
            }
        }
    }
}

/// Computes `R` rows of the panel's columns, or adds to them what its depth brings.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tile<const R: usize>(product: &Product, panel: &Panel, row: usize, columns: Range<usize>, depth: Range<usize>) {
    let Product { x: all, y, n, k, .. } = *product;
    let mut x: [&[f32]; R] = [&[][..]; R];
    for (at, x) in x.iter_mut().enumerate() {
        *x = &all[(row + at) * k..][depth.clone()];
    }
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    assert!(depth.len() <= DEPTH && columns.end <= n && row + R <= product.rows);
    for at in 0..depth.len() {
        // SAFETY: within the panel and the rows.
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
        // SAFETY: within the output, and no one else has these columns of the row.
        let to = unsafe { std::slice::from_raw_parts_mut(y.add(row * n + columns.start), columns.len()) };
        if to.len() == WIDTH {
            for (to, sum) in to.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                // SAFETY: eight numbers.
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
        // SAFETY: sixteen numbers are two times eight.
        let found = unsafe { std::mem::transmute::<[__m256; 2], [f32; WIDTH]>(sums) };
        match depth.start {
            0 => to.iter_mut().zip(found).for_each(|(to, found)| *to = found),
            _ => to.iter_mut().zip(found).for_each(|(to, found)| *to += found),
        }
    }
}

/// Eight rows of eight numbers, by columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(rows: [__m256; 8]) -> [__m256; 8] {
    // Of each lane: the columns 0 to 3 of the first four rows, and then those of the others.
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
