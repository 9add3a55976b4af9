//! Matrix multiplication with float32 weights in place in the mapped file: neither packed nor copied beforehand, and
//! read once for all rows. Only for x86-64 with AVX2; elsewhere ONNX Runtime's own is used.

mod avx2_panels;
mod avx512_panels;
mod tasks;

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Output, Shape, Tile};
use crate::isa::{Avx2Token, Level, level};
pub use avx512_panels::PackedRows;
pub use tasks::FloatMatMul;

/// The most rows, and columns with them, that are multiplied at a time: as many as there are registers for.
const ROWS: usize = 4;
const COLUMNS: usize = 3;
/// Minimum number of rows for which packing the weights into panels pays, with AVX2 and with AVX-512.
const MANY: usize = 24;
const MANY_FOR_AVX512: usize = 6;
/// Numbers of a row that are multiplied before the next row is: four rows of them stay in the L1 cache.
const DEPTH: usize = 2048;

/// The operands `x [rows, k]` and `w [n, k]`, and the result `y [rows, n]`.
pub struct Operands<'p> {
    x: &'p [f32],
    /// The rows of `x` packed for AVX-512, where this has been done.
    packed: Option<&'p PackedRows>,
    w: &'p [f32],
    y: Output<'p>,
    shape: Shape,
}

impl<'p> Operands<'p> {
    pub fn new(x: &'p [f32], w: &'p [f32], y: Output<'p>, shape: Shape) -> Operands<'p> {
        let Shape { rows, n, k } = shape;
        let fits = x.len() == rows * k && w.len() == n * k && (y.rows, y.n) == (rows, n);
        assert!(fits, "sizes of a matrix multiplication");
        Operands { x, packed: None, w, y, shape }
    }

    /// Uses packed rows, so that not every call of [`multiply`] packs them; it then takes whole tiles of them.
    pub fn with_packed(self, packed: &'p PackedRows) -> Operands<'p> {
        Operands { packed: Some(packed), ..self }
    }

    /// Prefetches the weights of a column.
    #[inline]
    pub fn prefetch(&self, column: usize) {
        for line in self.w[column * self.shape.k..][..self.shape.k].chunks(16) {
            // SAFETY: prefetching is a hint, for which any address will do.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }
}

/// Whether packing pays for this many rows.
pub fn packs_rows(rows: usize) -> bool {
    level() >= Level::Vnni && rows >= MANY_FOR_AVX512
}

/// Number of columns computed together for this many rows: [`multiply`] is fastest for multiples of it.
pub fn columns_together(rows: usize) -> usize {
    match level() {
        _ if packs_rows(rows) => avx512_panels::WIDTH,
        _ if rows >= MANY => avx2_panels::WIDTH,
        _ => ROWS * COLUMNS,
    }
}

/// Computes these rows of these columns.
///
/// # Safety
/// No other thread reads or writes them meanwhile.
pub unsafe fn multiply(_: Avx2Token, operands: &Operands, rows: Range<usize>, columns: Range<usize>) {
    // SAFETY: the token proves AVX2 and FMA; the caller promises that no other thread has the results.
    unsafe { multiply_with_avx2(operands, rows, columns) };
}

/// # Safety
/// As for [`multiply`].
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_with_avx2(operands: &Operands, rows: Range<usize>, columns: Range<usize>) {
    let Shape { rows: all_rows, n, k } = operands.shape;
    assert!(rows.end <= all_rows && columns.end <= n, "rows and columns of a matrix multiplication");
    match level() {
        Level::Vnni | Level::Amx if operands.packed.is_some() || rows.len() >= MANY_FOR_AVX512 => {
            let mut own = PackedRows::default();
            // SAFETY: the processor supports the level in use; each tile is packed once, on this thread; the caller
            // promises that no other thread has the results.
            unsafe {
                let packed = operands.packed.unwrap_or_else(|| {
                    own.prepare(all_rows, k);
                    let tiles = own.tiles();
                    let writer = own.writer();
                    (0..tiles).for_each(|tile| writer.pack(tile, operands.x));
                    &own
                });
                return avx512_panels::multiply(operands, packed, rows, columns);
            }
        }
        // SAFETY: the caller promises that no other thread has the results.
        _ if rows.len() >= MANY => return unsafe { avx2_panels::multiply(operands, rows, columns) },
        _ => {}
    }
    for first in (0..k).step_by(DEPTH) {
        let depth = first..k.min(first + DEPTH);
        for row in rows.clone().step_by(ROWS) {
            let height = ROWS.min(rows.end - row);
            // Few rows wait for the memory, which is fastest in order.
            let width = if all_rows > ROWS && height == ROWS { COLUMNS } else { 1 };
            for column in columns.clone().step_by(width) {
                let columns = column..columns.end.min(column + width);
                let tile = Tile { rows: row..row + height, columns, depth: depth.clone() };
                // SAFETY: the assertion above keeps the tile within the operands; the caller promises that no other
                // thread has it.
                unsafe {
                    match (height, tile.columns.len()) {
                        (4, 3) => multiply_tile::<4, 3, 1>(operands, tile),
                        (4, 2) => multiply_tile::<4, 2, 1>(operands, tile),
                        (4, 1) => multiply_tile::<4, 1, 2>(operands, tile),
                        (3, 1) => multiply_tile::<3, 1, 2>(operands, tile),
                        (2, 1) => multiply_tile::<2, 1, 4>(operands, tile),
                        (1, 1) => multiply_tile::<1, 1, 8>(operands, tile),
                        other => unreachable!("a tile of {other:?}"),
                    }
                }
            }
        }
    }
}

/// Multiplies `R` rows by `C` columns, `U · 8` numbers of each at a time.
///
/// # Safety
/// The tile is within the operands, and no other thread reads or writes it.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_tile<const R: usize, const C: usize, const U: usize>(
    Operands { x: all, w: weights, y, shape: Shape { k, .. }, .. }: &Operands,
    Tile { rows, columns, depth }: Tile,
) {
    let (row, column) = (rows.start, columns.start);
    let mut x: [*const f32; R] = [std::ptr::null(); R];
    for (at, x) in x.iter_mut().enumerate() {
        *x = all[(row + at) * k..].as_ptr();
    }
    let mut w: [*const f32; C] = [std::ptr::null(); C];
    for (at, w) in w.iter_mut().enumerate() {
        *w = weights[(column + at) * k..].as_ptr();
    }
    let tail_start = depth.start + depth.len() / (8 * U) * (8 * U);
    let mut parts = [[[_mm256_setzero_ps(); R]; C]; U];
    for at in (depth.start..tail_start).step_by(8 * U) {
        for (part, at) in parts.iter_mut().zip((at..).step_by(8)) {
            // SAFETY: `depth` is within the rows of both operands.
            unsafe {
                let mut here = [_mm256_setzero_ps(); C];
                for (here, w) in here.iter_mut().zip(w) {
                    *here = _mm256_loadu_ps(w.add(at));
                }
                for row in 0..R {
                    let x = _mm256_loadu_ps(x[row].add(at));
                    for column in 0..C {
                        part[column][row] = _mm256_fmadd_ps(here[column], x, part[column][row]);
                    }
                }
            }
        }
    }
    let mut sums = parts[0];
    for part in &parts[1..] {
        for (sums, part) in sums.as_flattened_mut().iter_mut().zip(part.as_flattened()) {
            *sums = _mm256_add_ps(*sums, *part);
        }
    }
    // Horizontal sums, four at a time.
    let mut lanes = [_mm256_setzero_ps(); 12];
    for (lanes, sums) in lanes.iter_mut().zip(sums.as_flattened()) {
        *lanes = *sums;
    }
    let mut totals = [0.0_f32; 12];
    for (fours, totals) in lanes.chunks_exact(4).zip(totals.chunks_exact_mut(4)).take((R * C).div_ceil(4)) {
        let all = _mm256_hadd_ps(_mm256_hadd_ps(fours[0], fours[1]), _mm256_hadd_ps(fours[2], fours[3]));
        let all = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
        // SAFETY: a chunk has four numbers.
        unsafe { _mm_storeu_ps(totals.as_mut_ptr(), all) };
    }
    for at_column in 0..C {
        for at_row in 0..R {
            // SAFETY: the caller promises the tile.
            unsafe {
                let mut total = totals[at_column * R + at_row];
                for at in tail_start..depth.end {
                    total += *w[at_column].add(at) * *x[at_row].add(at);
                }
                let to = y.at(row + at_row, column + at_column);
                *to = if depth.start == 0 { total } else { *to + total };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;
    use crate::parallel::SharedSlice;

    #[test]
    fn products_are_those_of_float64() {
        const SHAPES: [[usize; 3]; 9] = [
            [1, 1, 1],
            [1, 9, 64],
            [2, 7, 100],
            [3, 10, 8],
            [4, 11, 513],
            [9, 25, 1100],
            [6, 4, 2050],
            [24, 16, 256],
            [31, 71, 517],
        ];
        at_each_level(Level::Avx2, |level| {
            let token = Avx2Token::new().expect("the level has AVX2");
            for [rows, n, k] in SHAPES {
                let seed = (rows * 31 + n * 7 + k) as u32;
                let (x, w) = (noise(rows * k, seed), noise(n * k, seed + 1));
                let mut y = vec![f32::NAN; rows * n];
                let output = Output::new(SharedSlice::new(&mut y), rows, n);
                let operands = Operands::new(&x, &w, output, Shape { rows, n, k });
                for columns in [0..n / 2, n / 2..n] {
                    // SAFETY: there is one thread.
                    unsafe { multiply(token, &operands, 0..rows, columns) };
                }
                for (at, &found) in y.iter().enumerate() {
                    let terms = x[at / n * k..][..k].iter().zip(&w[at % n * k..][..k]);
                    let terms: Vec<f64> = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).collect();
                    let size = terms.iter().map(|term| term.abs()).sum::<f64>();
                    let apart = (f64::from(found) - terms.iter().sum::<f64>()).abs();
                    assert!(apart <= 1e-6 * size, "{level:?}, [{rows}, {k}] by [{n}, {k}], at {at}: {apart}");
                }
            }
        });
    }

    #[test]
    fn nan_is_not_hidden() {
        at_each_level(Level::Avx2, |level| {
            let token = Avx2Token::new().expect("the level has AVX2");
            let (x, w) = ([1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0; 9]);
            let mut y = [0.0];
            let output = Output::new(SharedSlice::new(&mut y), 1, 1);
            let operands = Operands::new(&x, &w, output, Shape { rows: 1, n: 1, k: 9 });
            // SAFETY: there is one thread.
            unsafe { multiply(token, &operands, 0..1, 0..1) };
            assert!(y[0].is_nan(), "{level:?}");
        });
    }
}
