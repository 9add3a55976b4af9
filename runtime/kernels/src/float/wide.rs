//! The product for many rows of activations with AVX-512: 32 columns of weights at a time are brought into an order in which no sum
//! has to be taken across a register.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Product;
use crate::aligned::Aligned;
use crate::avx512::{mask, read, turn, write};
use crate::{Parts, evenly};

/// Columns of a panel, two registers of sums.
pub const WIDTH: usize = 32;
/// The most numbers of each column in a panel. It is read in order, so that the second cache holds it as well as the first would.
const DEPTH: usize = 512;
/// The most rows that are computed at a time: what the processor has registers for.
const ROWS: usize = 12;

/// Numbers from what is read of a panel to what will be.
const AHEAD: usize = 16 * WIDTH;

/// Rows of activations, as many of them side by side as are computed at a time: `[tiles, k, rows of a tile]`, filled up with the last
/// row. Rows by themselves would be as many places to read from, which the first cache holds in the same few lines where they are a
/// power of two apart.
#[derive(Default)]
pub struct Tiles {
    numbers: Aligned<f32>,
    rows: usize,
    k: usize,
    /// Rows of a tile.
    height: usize,
}

impl Tiles {
    /// Makes room for rows of `k` numbers.
    pub fn prepare(&mut self, rows: usize, k: usize) {
        (self.rows, self.k, self.height) = (rows, k, evenly(rows, ROWS));
        let length = self.count() * k * self.height;
        self.numbers.resize(length, 0.0);
    }

    pub fn count(&self) -> usize {
        self.rows.div_ceil(self.height.max(1))
    }

    pub fn height(&self) -> usize {
        self.height
    }

    /// Where rows are written, a tile by one thread.
    pub fn target(&mut self) -> Target {
        let [rows, k, height] = [self.rows, self.k, self.height];
        Target { numbers: Parts::new(&mut self.numbers), rows, k, height }
    }
}

/// The memory of [`Tiles`].
pub struct Target {
    numbers: Parts<f32>,
    rows: usize,
    k: usize,
    height: usize,
}

impl Target {
    /// Writes a tile of the rows `x`.
    ///
    /// # Safety
    /// The processor has AVX-512, what this came from lives, and no one else writes the tile.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn fill(&self, tile: usize, x: &[f32]) {
        let Target { rows, k, height, .. } = *self;
        assert!(x.len() == rows * k && height <= ROWS, "rows as many and as long as there is room for");
        // SAFETY: the caller's.
        let to = unsafe { self.numbers.of(tile * k * height..(tile + 1) * k * height) };
        let mut from: [&[f32]; 16] = [&[]; 16];
        for (at, from) in from.iter_mut().enumerate() {
            let row = (tile * height + at).min(rows - 1);
            *from = &x[row * k..][..k];
        }
        let whole = k / 16 * 16;
        for at in (0..whole).step_by(16) {
            let mut here = [std::ptr::null(); 16];
            for (here, from) in here.iter_mut().zip(&from) {
                *here = from[at..].as_ptr().cast();
            }
            for quarter in 0..4 {
                // SAFETY: sixteen numbers of each row, and room for as many of each as the tile has rows.
                unsafe {
                    for (word, numbers) in turn(&here, quarter).into_iter().enumerate() {
                        let to = to.as_mut_ptr().add((at + quarter * 4 + word) * height);
                        _mm512_mask_storeu_epi32(to.cast(), mask(height), numbers);
                    }
                }
            }
        }
        for at in whole..k {
            for (to, from) in to[at * height..][..height].iter_mut().zip(&from) {
                *to = from[at];
            }
        }
    }
}

/// A part of 32 columns, `[numbers, columns]`.
#[repr(align(64))]
struct Panel([f32; WIDTH * DEPTH]);

/// A part of the product that is computed at a time.
struct Part {
    /// Those of a tile that are there.
    rows: Range<usize>,
    columns: Range<usize>,
    /// Numbers of each.
    depth: Range<usize>,
}

/// Computes the rows `rows`, whole tiles, of the columns `columns`.
///
/// # Safety
/// The processor has AVX-512, and no one else computes these.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn multiply(product: &Product, tiles: &Tiles, [rows, columns]: [Range<usize>; 2]) {
    let fits = (tiles.rows, tiles.k) == (product.rows, product.k) && rows.start.is_multiple_of(tiles.height);
    assert!(fits && rows.end <= product.rows && columns.end <= product.n, "tiles of a product");
    let mut panel = Panel([0.0; WIDTH * DEPTH]);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..product.k).step_by(DEPTH) {
            let depth = from..product.k.min(from + DEPTH);
            panel.fill(product, columns.clone(), depth.clone());
            for row in rows.clone().step_by(tiles.height) {
                let rows = row..rows.end.min(row + tiles.height);
                let part = Part { rows, columns: columns.clone(), depth: depth.clone() };
                match tiles.height {
                    ..=6 => tile::<6>(product, tiles, &panel, part),
                    7 => tile::<7>(product, tiles, &panel, part),
                    8 => tile::<8>(product, tiles, &panel, part),
                    9 => tile::<9>(product, tiles, &panel, part),
                    10 => tile::<10>(product, tiles, &panel, part),
                    11 => tile::<11>(product, tiles, &panel, part),
                    _ => tile::<ROWS>(product, tiles, &panel, part),
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

/// Computes a tile of `R` rows of the panel's columns, or adds to them what its depth brings.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tile<const R: usize>(product: &Product, tiles: &Tiles, panel: &Panel, Part { rows, columns, depth }: Part) {
    let Product { y, n, k, .. } = *product;
    assert!(tiles.height == R, "a tile of {R} rows");
    assert!(depth.len() <= DEPTH && depth.end <= k && columns.end <= n && rows.end <= product.rows && rows.len() <= R);
    let mut x = tiles.numbers[(rows.start * k + depth.start * R)..][..depth.len() * R].as_ptr();
    let mut w = panel.0.as_ptr();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for _ in 0..depth.len() {
        // SAFETY: within the panel and the tile.
        unsafe {
            // It lies in the second cache.
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + 16).cast());
            let here = [_mm512_load_ps(w), _mm512_load_ps(w.add(16))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*x.add(row));
                sums[0] = _mm512_fmadd_ps(here[0], x, sums[0]);
                sums[1] = _mm512_fmadd_ps(here[1], x, sums[1]);
            }
            (x, w) = (x.add(R), w.add(WIDTH));
        }
    }
    for (row, mut sums) in rows.zip(sums) {
        // SAFETY: within the output, and no one else has these columns of the row.
        unsafe {
            let to = y.add(row * n + columns.start);
            if depth.start > 0 {
                let before = read(to, columns.len());
                sums = [_mm512_add_ps(before[0], sums[0]), _mm512_add_ps(before[1], sums[1])];
            }
            write(sums, to, columns.len());
        }
    }
}
