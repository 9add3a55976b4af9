//! The product for many rows of activations with AVX-512: 32 columns of weights at a time are brought into an order in which no sum
//! has to be taken across a register.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Product;
use crate::kernels::avx512::{turn, write};

/// Columns of a panel, two registers of sums.
pub const WIDTH: usize = 32;
/// The most numbers of each column in a panel. It is read in order, so that the second cache holds it as well as the first would.
const DEPTH: usize = 512;
/// The most rows that are computed at a time: what the processor has registers for.
const ROWS: usize = 12;

/// Numbers from what is read of a panel to what will be.
const AHEAD: usize = 16 * WIDTH;

/// A part of 32 columns, `[numbers, columns]`.
#[repr(align(64))]
struct Panel([f32; WIDTH * DEPTH]);

/// A part of the product that is computed at a time.
struct Part {
    row: usize,
    columns: Range<usize>,
    /// Numbers of each.
    depth: Range<usize>,
}

/// Computes the rows `rows` of the columns `columns`.
///
/// # Safety
/// The processor has AVX-512, and no one else computes these.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn multiply(product: &Product, [rows, columns]: [Range<usize>; 2]) {
    let mut panel = Panel([0.0; WIDTH * DEPTH]);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..product.k).step_by(DEPTH) {
            let depth = from..product.k.min(from + DEPTH);
            panel.fill(product, columns.clone(), depth.clone());
            let mut row = rows.start;
            for left in (1..=rows.len().div_ceil(ROWS)).rev() {
                let part = Part { row, columns: columns.clone(), depth: depth.clone() };
                // As many rows in each tile as in the others, but for one.
                row += match (rows.end - row).div_ceil(left) {
                    1 => tile::<1>(product, &panel, part),
                    2 => tile::<2>(product, &panel, part),
                    3 => tile::<3>(product, &panel, part),
                    4 => tile::<4>(product, &panel, part),
                    5 => tile::<5>(product, &panel, part),
                    6 => tile::<6>(product, &panel, part),
                    7 => tile::<7>(product, &panel, part),
                    8 => tile::<8>(product, &panel, part),
                    9 => tile::<9>(product, &panel, part),
                    10 => tile::<10>(product, &panel, part),
                    11 => tile::<11>(product, &panel, part),
                    _ => tile::<ROWS>(product, &panel, part),
                };
            }
        }
    }
}

impl Panel {
    /// Takes these numbers of the columns. Columns that are not there are as the last; no one reads them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn fill(&mut self, product: &Product, columns: Range<usize>, depth: Range<usize>) {
        let Product { w, k, .. } = *product;
        let whole = depth.len() / 16 * 16;
        for half in (0..WIDTH).step_by(16) {
            let mut from: [&[f32]; 16] = [&[]; 16];
            for (at, from) in from.iter_mut().enumerate() {
                let column = (columns.start + half + at).min(columns.end - 1);
                *from = &w[column * k..][depth.clone()];
            }
            for at in (0..whole).step_by(16) {
                // SAFETY: sixteen numbers of each column, which the panel has room for.
                unsafe {
                    let to = self.0.as_mut_ptr().add(at * WIDTH + half);
                    let mut here = [std::ptr::null(); 16];
                    for (here, from) in here.iter_mut().zip(&from) {
                        *here = from.as_ptr().add(at).cast();
                    }
                    for quarter in 0..4 {
                        for (word, numbers) in turn(&here, quarter).into_iter().enumerate() {
                            _mm512_store_si512(to.add((quarter * 4 + word) * WIDTH).cast(), numbers);
                        }
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

/// Computes `R` rows of the panel's columns, or adds to them what its depth brings. Returns `R`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tile<const R: usize>(product: &Product, panel: &Panel, Part { row, columns, depth }: Part) -> usize {
    let Product { x: all, y, n, k, .. } = *product;
    let mut x: [&[f32]; R] = [&[][..]; R];
    for (at, x) in x.iter_mut().enumerate() {
        *x = &all[(row + at) * k..][depth.clone()];
    }
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    assert!(depth.len() <= DEPTH && columns.end <= n && row + R <= product.rows);
    for at in 0..depth.len() {
        // SAFETY: within the panel and the rows.
        unsafe {
            let w = panel.0.as_ptr().add(at * WIDTH);
            // It lies in the second cache.
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + 16).cast());
            let w = [_mm512_load_ps(w), _mm512_load_ps(w.add(16))];
            for row in 0..R {
                let x = _mm512_set1_ps(*x[row].get_unchecked(at));
                sums[row][0] = _mm512_fmadd_ps(w[0], x, sums[row][0]);
                sums[row][1] = _mm512_fmadd_ps(w[1], x, sums[row][1]);
            }
        }
    }
    for (at, sums) in sums.into_iter().enumerate() {
        // SAFETY: within the output, and no one else has these columns of the row.
        unsafe {
            let to = y.add((row + at) * n + columns.start);
            write(sums, (depth.start > 0).then_some(to.cast_const()), to, columns.len());
        }
    }
    R
}
