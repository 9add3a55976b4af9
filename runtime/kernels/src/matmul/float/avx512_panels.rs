//! Many rows with AVX-512: 32 columns of weights at a time are packed into a panel, in an order that needs no
//! horizontal sums.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{Shape, Tile};
use super::Operands;
use crate::aligned::AlignedVec;
use crate::avx512::{first_lanes, load_up_to_32, store_up_to_32, transpose_rows};
use crate::parallel::{SharedSlice, even_part};

/// Columns of a panel: two registers of sums.
pub const WIDTH: usize = 32;
/// Maximum number of weights per column in a panel. It is read sequentially, so the L2 cache is fast enough.
const DEPTH: usize = 512;
/// The most rows that are multiplied at a time: as many as there are registers for.
const ROWS: usize = 12;

/// Prefetch distance within a panel, in numbers.
const PREFETCH_DISTANCE: usize = 16 * WIDTH;

/// Rows of activations, interleaved in tiles of those that are multiplied at a time: `[tiles, k, rows of a tile]`,
/// padded with the last row. Rows read side by side would compete for the same sets of the L1 cache where they are a
/// power of two apart.
#[derive(Default)]
pub struct PackedRows {
    values: AlignedVec<f32>,
    rows: usize,
    k: usize,
    /// Rows of a tile.
    height: usize,
}

impl PackedRows {
    /// Makes room for `rows` rows of `k` numbers.
    pub fn prepare(&mut self, rows: usize, k: usize) {
        (self.rows, self.k, self.height) = (rows, k, even_part(rows, ROWS));
        let length = self.tiles() * k * self.height;
        self.values.resize(length, 0.0);
    }

    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(self.height.max(1))
    }

    pub fn height(&self) -> usize {
        self.height
    }

    /// Packs tiles from several threads.
    pub fn writer(&mut self) -> TileWriter<'_> {
        let [rows, k, height] = [self.rows, self.k, self.height];
        TileWriter { values: SharedSlice::new(&mut self.values), rows, k, height }
    }
}

/// Writes tiles of [`PackedRows`] from several threads.
pub struct TileWriter<'p> {
    values: SharedSlice<'p, f32>,
    rows: usize,
    k: usize,
    height: usize,
}

impl TileWriter<'_> {
    /// Packs a tile of the rows `x`.
    ///
    /// # Safety
    /// The processor has AVX-512, and no other thread packs this tile.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn pack(&self, tile: usize, x: &[f32]) {
        let TileWriter { rows, k, height, .. } = *self;
        assert!(x.len() == rows * k && height <= ROWS, "rows like those that room was made for");
        // SAFETY: the caller promises that no other thread has the tile.
        let to = unsafe { self.values.slice_mut(tile * k * height..(tile + 1) * k * height) };
        let mut from: [&[f32]; 16] = [&[]; 16];
        for (at, from) in from.iter_mut().enumerate() {
            let row = (tile * height + at).min(rows - 1);
            *from = &x[row * k..][..k];
        }
        let tail_start = k / 16 * 16;
        for at in (0..tail_start).step_by(16) {
            let mut here = [std::ptr::null(); 16];
            for (here, from) in here.iter_mut().zip(&from) {
                *here = from[at..].as_ptr().cast();
            }
            for quarter in 0..4 {
                // SAFETY: each row has sixteen numbers at `at`; the mask keeps the stores within the tile's rows.
                unsafe {
                    for (word, values) in transpose_rows(&here, quarter).into_iter().enumerate() {
                        let to = to.as_mut_ptr().add((at + quarter * 4 + word) * height);
                        _mm512_mask_storeu_epi32(to.cast(), first_lanes(height), values);
                    }
                }
            }
        }
        for at in tail_start..k {
            for (to, from) in to[at * height..][..height].iter_mut().zip(&from) {
                *to = from[at];
            }
        }
    }
}

/// Weights of 32 columns, `[weights, columns]`.
#[repr(align(64))]
struct Panel([f32; WIDTH * DEPTH]);

/// Computes these rows, which are whole tiles, of these columns.
///
/// # Safety
/// The processor has AVX-512, and no other thread reads or writes the results meanwhile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn multiply(operands: &Operands, packed: &PackedRows, rows: Range<usize>, columns: Range<usize>) {
    let Shape { rows: all_rows, n, k } = operands.shape;
    let fits = (packed.rows, packed.k) == (all_rows, k) && rows.start.is_multiple_of(packed.height);
    assert!(fits && rows.end <= all_rows && columns.end <= n, "tiles of a matrix multiplication");
    let mut panel = Panel([0.0; WIDTH * DEPTH]);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..k).step_by(DEPTH) {
            let depth = from..k.min(from + DEPTH);
            panel.pack(operands, columns.clone(), depth.clone());
            for row in rows.clone().step_by(packed.height) {
                let rows = row..rows.end.min(row + packed.height);
                let tile = Tile { rows, columns: columns.clone(), depth: depth.clone() };
                match packed.height {
                    ..=6 => multiply_tile::<6>(operands, packed, &panel, tile),
                    7 => multiply_tile::<7>(operands, packed, &panel, tile),
                    8 => multiply_tile::<8>(operands, packed, &panel, tile),
                    9 => multiply_tile::<9>(operands, packed, &panel, tile),
                    10 => multiply_tile::<10>(operands, packed, &panel, tile),
                    11 => multiply_tile::<11>(operands, packed, &panel, tile),
                    _ => multiply_tile::<ROWS>(operands, packed, &panel, tile),
                };
            }
        }
    }
}

impl Panel {
    /// Packs the weights `depth` of the columns. Columns beyond the last repeat it, and are not read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn pack(&mut self, operands: &Operands, columns: Range<usize>, depth: Range<usize>) {
        let Operands { w, shape: Shape { k, .. }, .. } = *operands;
        let tail_start = depth.len() / 16 * 16;
        for half in (0..WIDTH).step_by(16) {
            let mut from: [&[f32]; 16] = [&[]; 16];
            for (at, from) in from.iter_mut().enumerate() {
                let column = (columns.start + half + at).min(columns.end - 1);
                *from = &w[column * k..][depth.clone()];
            }
            for at in (0..tail_start).step_by(16) {
                // SAFETY: each column has sixteen weights at `at`, for which the panel has room: `depth` is no longer
                // than `DEPTH`.
                unsafe {
                    let to = self.0.as_mut_ptr().add(at * WIDTH + half);
                    let mut here = [std::ptr::null(); 16];
                    for (here, from) in here.iter_mut().zip(&from) {
                        *here = from.as_ptr().add(at).cast();
                    }
                    for quarter in 0..4 {
                        for (word, weights) in transpose_rows(&here, quarter).into_iter().enumerate() {
                            _mm512_store_si512(to.add((quarter * 4 + word) * WIDTH).cast(), weights);
                        }
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

/// Computes a tile of `R` packed rows from a panel, or adds to it if the panel is not the first of its columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn multiply_tile<const R: usize>(
    operands: &Operands,
    packed: &PackedRows,
    panel: &Panel,
    Tile { rows, columns, depth }: Tile,
) {
    let Operands { ref y, shape: Shape { rows: all_rows, n, k }, .. } = *operands;
    assert!(packed.height == R, "a tile of {R} rows");
    assert!(depth.len() <= DEPTH && depth.end <= k && columns.end <= n && rows.end <= all_rows && rows.len() <= R);
    let mut x = packed.values[(rows.start * k + depth.start * R)..][..depth.len() * R].as_ptr();
    let mut w = panel.0.as_ptr();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for _ in 0..depth.len() {
        // SAFETY: both operands have as many numbers as `depth`, by the assertion and the slice above.
        unsafe {
            // The panel lies in the L2 cache.
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH_DISTANCE).cast());
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH_DISTANCE + 16).cast());
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
        // SAFETY: the assertion above keeps row and columns within the output; the caller of `multiply` promises that
        // no other thread has them.
        unsafe {
            let to = y.at(row, columns.start);
            if depth.start > 0 {
                let before = load_up_to_32(to, columns.len());
                sums = [_mm512_add_ps(before[0], sums[0]), _mm512_add_ps(before[1], sums[1])];
            }
            store_up_to_32(sums, to, columns.len());
        }
    }
}
