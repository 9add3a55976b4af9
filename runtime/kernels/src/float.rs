//! The product with weights in float32, as they lie in the mapped file: neither packed nor copied, read once for all rows.
//! For x86-64 with AVX2 alone; elsewhere ONNX Runtime's own is used.

mod panels;
mod wide;

use std::arch::x86_64::*;
use std::ops::Range;

use super::processor::{Level, level};
pub use wide::Tiles;

/// Whether this machine has what [`multiply`] needs.
pub fn is_here() -> bool {
    level() >= Level::Avx2
}

/// The most rows, and with them columns, that are computed at a time: what the processor has registers for.
const ROWS: usize = 4;
const COLUMNS: usize = 3;
/// So many rows are worth bringing the weights into another order for, with AVX2 and with AVX-512.
const MANY: usize = 24;
const MANY_WIDE: usize = 6;
/// Numbers of a row that are taken before the next row is: four rows of them stay in the first cache.
const DEPTH: usize = 2048;

/// The operands `x [rows, k]` and `w [n, k]`, and the result `[rows, n]`.
pub struct Product<'p> {
    x: &'p [f32],
    /// The same in tiles, where those are of use.
    tiles: Option<&'p Tiles>,
    w: &'p [f32],
    y: *mut f32,
    rows: usize,
    n: usize,
    k: usize,
}

// SAFETY: plain memory; who writes where is what `multiply` asks its callers to see to.
unsafe impl Sync for Product<'_> {}

impl<'p> Product<'p> {
    /// `y` is written by [`multiply`] alone.
    pub fn new(x: &'p [f32], w: &'p [f32], y: &'p mut [f32], [rows, n, k]: [usize; 3]) -> Product<'p> {
        assert!(x.len() == rows * k && w.len() == n * k && y.len() == rows * n, "sizes of a product");
        Product { x, tiles: None, w, y: y.as_mut_ptr(), rows, n, k }
    }

    /// With the rows in tiles, so that they need not be brought into these for each call of [`multiply`], which is for whole ones then.
    pub fn in_tiles(self, tiles: &'p Tiles) -> Product<'p> {
        Product { tiles: Some(tiles), ..self }
    }

    /// Has the memory send the weights of a column.
    #[inline]
    pub fn fetch(&self, column: usize) {
        for line in self.w[column * self.k..][..self.k].chunks(16) {
            // SAFETY: a hint, which may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }
}

/// Whether so many rows are worth bringing into tiles.
pub fn takes_tiles(rows: usize) -> bool {
    level() >= Level::Vnni && rows >= MANY_WIDE
}

/// How many columns are computed together for so many rows: [`multiply`] is for multiples of them.
pub fn width(rows: usize) -> usize {
    match level() {
        _ if takes_tiles(rows) => wide::WIDTH,
        _ if rows >= MANY => panels::WIDTH,
        _ => ROWS * COLUMNS,
    }
}

/// Computes the rows `of_rows` of the columns `columns`.
///
/// # Safety
/// The processor has AVX2 and FMA, and no one else computes these.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply(product: &Product, of: [Range<usize>; 2]) {
    // SAFETY: the caller's, and the level is no higher than the processor's.
    unsafe { multiply_at(level(), product, of) };
}

/// The same, on a processor of this level.
///
/// # Safety
/// As for [`multiply`]; the processor is of the level.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_at(level: Level, product: &Product, [of_rows, columns]: [Range<usize>; 2]) {
    assert!(of_rows.end <= product.rows && columns.end <= product.n, "rows and columns of a product");
    // SAFETY: the caller's.
    unsafe {
        match level {
            Level::Vnni | Level::Amx if product.tiles.is_some() || of_rows.len() >= MANY_WIDE => {
                let mut own = Tiles::default();
                let tiles = product.tiles.unwrap_or_else(|| {
                    own.prepare(product.rows, product.k);
                    let (target, count) = (own.target(), own.count());
                    // The level has the features, and there is one thread.
                    (0..count).for_each(|tile| target.fill(tile, product.x));
                    &own
                });
                return wide::multiply(product, tiles, [of_rows, columns]);
            }
            _ if of_rows.len() >= MANY => return panels::multiply(product, [of_rows, columns]),
            _ => {}
        }
    }
    for first in (0..product.k).step_by(DEPTH) {
        let depth = first..product.k.min(first + DEPTH);
        for row in of_rows.clone().step_by(ROWS) {
            let rows = ROWS.min(of_rows.end - row);
            // Few rows wait for the memory, which is fastest when it is read in order.
            let width = if product.rows > ROWS && rows == ROWS { COLUMNS } else { 1 };
            for column in columns.clone().step_by(width) {
                let at = Place { row, column, depth: depth.clone() };
                // SAFETY: rows, columns and depth are within the operands.
                unsafe {
                    match (rows, width.min(columns.end - column)) {
                        (4, 3) => tile::<4, 3, 1>(product, at),
                        (4, 2) => tile::<4, 2, 1>(product, at),
                        (4, 1) => tile::<4, 1, 2>(product, at),
                        (3, 1) => tile::<3, 1, 2>(product, at),
                        (2, 1) => tile::<2, 1, 4>(product, at),
                        (1, 1) => tile::<1, 1, 8>(product, at),
                        other => unreachable!("a tile of {other:?}"),
                    }
                }
            }
        }
    }
}

/// Where a tile begins, and which numbers of its rows are taken.
struct Place {
    row: usize,
    column: usize,
    depth: Range<usize>,
}

/// `R` rows by `C` columns, `U` times eight numbers of each at a time.
///
/// # Safety
/// The tile is within the product, and no one else writes it.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize, const C: usize, const U: usize>(product: &Product, Place { row, column, depth }: Place) {
    let Product { x: all, w: weights, y, n, k, .. } = *product;
    let mut x: [*const f32; R] = [std::ptr::null(); R];
    for (at, x) in x.iter_mut().enumerate() {
        *x = all[(row + at) * k..].as_ptr();
    }
    let mut w: [*const f32; C] = [std::ptr::null(); C];
    for (at, w) in w.iter_mut().enumerate() {
        *w = weights[(column + at) * k..].as_ptr();
    }
    let whole = depth.start + depth.len() / (8 * U) * (8 * U);
    let mut parts = [[[_mm256_setzero_ps(); R]; C]; U];
    for at in (depth.start..whole).step_by(8 * U) {
        for (part, at) in parts.iter_mut().zip((at..).step_by(8)) {
            // SAFETY: within the rows and columns of the tile.
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
    // The eight lanes of four sums at a time.
    let mut lanes = [_mm256_setzero_ps(); 12];
    for (lanes, sums) in lanes.iter_mut().zip(sums.as_flattened()) {
        *lanes = *sums;
    }
    let mut totals = [0.0_f32; 12];
    for (fours, totals) in lanes.chunks_exact(4).zip(totals.chunks_exact_mut(4)).take((R * C).div_ceil(4)) {
        let all = _mm256_hadd_ps(_mm256_hadd_ps(fours[0], fours[1]), _mm256_hadd_ps(fours[2], fours[3]));
        let all = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
        // SAFETY: four numbers.
        unsafe { _mm_storeu_ps(totals.as_mut_ptr(), all) };
    }
    for at_column in 0..C {
        for at_row in 0..R {
            // SAFETY: within the tile.
            unsafe {
                let mut total = totals[at_column * R + at_row];
                for at in whole..depth.end {
                    total += *w[at_column].add(at) * *x[at_row].add(at);
                }
                let to = y.add((row + at_row) * n + column + at_column);
                *to = if depth.start == 0 { total } else { *to + total };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::processor::found;
    use super::*;

    #[test]
    fn products_are_those_of_float64() {
        if !is_here() {
            return;
        }
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
        let levels = [Level::Avx2, Level::Vnni].into_iter().filter(|&level| level <= found());
        for (level, [rows, n, k]) in levels.flat_map(|level| SHAPES.map(|shape| (level, shape))) {
            let mut state = (rows * 31 + n * 7 + k) as u32;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / 8_388_608.0 - 1.0
            };
            let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
            let w: Vec<f32> = (0..n * k).map(|_| next()).collect();
            let mut y = vec![f32::NAN; rows * n];
            let product = Product::new(&x, &w, &mut y, [rows, n, k]);
            // SAFETY: the features are there, and there is one thread.
            unsafe {
                multiply_at(level, &product, [0..rows, 0..n / 2]);
                multiply_at(level, &product, [0..rows, n / 2..n]);
            }
            for (at, &found) in y.iter().enumerate() {
                let terms = x[at / n * k..][..k].iter().zip(&w[at % n * k..][..k]);
                let terms: Vec<f64> = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).collect();
                let size = terms.iter().map(|term| term.abs()).sum::<f64>();
                let apart = (f64::from(found) - terms.iter().sum::<f64>()).abs();
                assert!(apart <= 1e-6 * size, "{level:?}, [{rows}, {k}] by [{n}, {k}], at {at}: {apart}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        if !is_here() {
            return;
        }
        let (x, w) = ([1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0; 9]);
        let mut y = [0.0];
        let product = Product::new(&x, &w, &mut y, [1, 1, 9]);
        // SAFETY: as above.
        unsafe { multiply(&product, [0..1, 0..1]) };
        assert!(y[0].is_nan());
    }
}
