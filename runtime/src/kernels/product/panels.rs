//! The product for many rows of activations, with AVX2: sixteen columns of weights at a time are brought into 16 bits and
//! into an order in which no sum has to be taken across a register.

use std::arch::x86_64::*;
use std::array::from_fn;
use std::ops::Range;

use super::{Product, Weights};

/// Columns of a panel.
const WIDTH: usize = 16;
/// Numbers of each column in a panel: it stays in the first cache, beside some rows of activations.
const DEPTH: usize = 512;
/// The most rows that are computed at a time: what the processor has registers for.
const ROWS: usize = 6;

/// A part of sixteen columns.
#[repr(align(32))]
struct Panel {
    /// `[pairs, columns, 2]`, less their zero points.
    numbers: [i16; WIDTH * DEPTH],
    /// `[blocks, columns]`
    scales: [[f32; WIDTH]; DEPTH / 16],
    /// Numbers of each column that it has.
    depth: usize,
}

/// Activations are in [`Order::Plain`](super::Order::Plain).
///
/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply<const BITS: usize>(product: &Product) {
    let Product { x, w, columns, .. } = product;
    let length = w.blocks() * w.block_size;
    assert!(
        x.numbers.len() == x.rows * length && DEPTH.is_multiple_of(w.block_size) && w.block_size.is_multiple_of(16)
    );
    let mut panel = Panel { numbers: [0; WIDTH * DEPTH], scales: [[0.0; WIDTH]; DEPTH / 16], depth: 0 };
    let tiles = x.rows.div_ceil(ROWS);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..length).step_by(DEPTH) {
            panel.fill::<BITS>(w, columns.clone(), from..length.min(from + DEPTH));
            let mut row = 0;
            for left in (1..=tiles).rev() {
                // As many rows in each tile as in the others, but for one.
                let rows = (x.rows - row).div_ceil(left);
                match rows {
                    1 => tile::<1>(product, &panel, row, columns.clone(), from),
                    2 => tile::<2>(product, &panel, row, columns.clone(), from),
                    3 => tile::<3>(product, &panel, row, columns.clone(), from),
                    4 => tile::<4>(product, &panel, row, columns.clone(), from),
                    5 => tile::<5>(product, &panel, row, columns.clone(), from),
                    _ => tile::<ROWS>(product, &panel, row, columns.clone(), from),
                }
                row += rows;
            }
        }
    }
}

impl Panel {
    /// Takes these numbers of the columns.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn fill<const BITS: usize>(&mut self, w: &Weights, columns: Range<usize>, depth: Range<usize>) {
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.blocks() * w.block_bytes());
        self.depth = depth.len();
        assert!(columns.end * bytes <= w.numbers.len() && depth.end <= blocks * size && depth.len() <= DEPTH);
        let of_panel = depth.start / size..depth.end / size;
        for (at, column) in columns.clone().enumerate() {
            let scales = &w.scales[column * blocks..][..blocks][of_panel.clone()];
            self.scales.iter_mut().zip(scales).for_each(|(to, &scale)| to[at] = scale);
        }
        for half in [0, 8] {
            // Columns that are not there are as the last; no one reads them.
            let columns: [usize; 8] = from_fn(|at| (columns.start + half + at).min(columns.end - 1));
            let packed = columns.map(|column| w.numbers[column * bytes..].as_ptr());
            let mut zeros = [_mm256_set1_epi16(w.same_zero_point().unwrap_or(0) as i16); 8];
            for block in of_panel.clone() {
                if w.zero_points.is_some() {
                    zeros = columns.map(|column| _mm256_set1_epi16(w.zero_point(column, block) as i16));
                }
                for from in (block * size..(block + 1) * size).step_by(16) {
                    // SAFETY: within the columns and the panel.
                    unsafe {
                        let rows: [__m256; 8] = from_fn(|at| {
                            let packed = packed[at].add(from * BITS / 8);
                            let numbers = match BITS {
                                8 => _mm256_cvtepu8_epi16(_mm_loadu_si128(packed.cast())),
                                _ => {
                                    let pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(packed.cast()));
                                    let apart = _mm256_or_si256(pairs, _mm256_slli_epi32::<12>(pairs));
                                    _mm256_and_si256(apart, _mm256_set1_epi32(0x000f_000f))
                                }
                            };
                            _mm256_castsi256_ps(_mm256_sub_epi16(numbers, zeros[at]))
                        });
                        let to = self.numbers.as_mut_ptr().add((from - depth.start) * WIDTH + 2 * half);
                        for (at, pairs) in transposed(rows).into_iter().enumerate() {
                            _mm256_store_ps(to.add(at * 2 * WIDTH).cast(), pairs);
                        }
                    }
                }
            }
        }
    }
}

/// Computes `R` rows of the panel's columns, or adds to them what its depth, which begins at `from`, brings.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tile<const R: usize>(product: &Product, panel: &Panel, row: usize, columns: Range<usize>, from: usize) {
    let Product { x, w, bias, y, .. } = product;
    let (length, size) = (w.blocks() * w.block_size, w.block_size);
    assert!((row + R) * length <= x.numbers.len() && from + panel.depth <= length && columns.end <= y.n);
    let numbers: [*const i16; R] = from_fn(|at| x.numbers[(row + at) * length + from..].as_ptr());
    let mut totals = [[_mm256_setzero_ps(); 2]; R];
    for (block, scales) in panel.scales[..panel.depth / size].iter().enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for at in (block * size..(block + 1) * size).step_by(2) {
            // SAFETY: within the panel and the rows.
            unsafe {
                let w = panel.numbers.as_ptr().add(at * WIDTH);
                let w = [_mm256_load_si256(w.cast()), _mm256_load_si256(w.add(WIDTH).cast())];
                for row in 0..R {
                    let x = _mm256_set1_epi32(numbers[row].add(at).cast::<i32>().read_unaligned());
                    sums[row][0] = _mm256_add_epi32(sums[row][0], _mm256_madd_epi16(w[0], x));
                    sums[row][1] = _mm256_add_epi32(sums[row][1], _mm256_madd_epi16(w[1], x));
                }
            }
        }
        // SAFETY: two times eight scales.
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
        let mut found = [0.0; WIDTH];
        // SAFETY: two times eight numbers.
        unsafe {
            _mm256_storeu_ps(found.as_mut_ptr(), _mm256_mul_ps(totals[0], scale));
            _mm256_storeu_ps(found[8..].as_mut_ptr(), _mm256_mul_ps(totals[1], scale));
        }
        // SAFETY: within the output, and no one else has these columns.
        let to = unsafe { std::slice::from_raw_parts_mut(y.values.add(row * y.n + columns.start), columns.len()) };
        match (from, bias) {
            (0, None) => to.copy_from_slice(&found[..to.len()]),
            (0, Some(bias)) => {
                let sums = found.iter().zip(&bias[columns.clone()]);
                to.iter_mut().zip(sums).for_each(|(to, (found, bias))| *to = found + bias);
            }
            _ => to.iter_mut().zip(found).for_each(|(to, found)| *to += found),
        }
    }
}

/// Eight rows of eight words, by columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(rows: [__m256; 8]) -> [__m256; 8] {
    let doubles = |x: [__m256; 2]| x.map(|x| _mm256_castps_pd(x));
    let twos: [__m256; 8] = from_fn(|at| match (at % 2, [rows[at / 2 * 2], rows[at / 2 * 2 + 1]]) {
        (0, [a, b]) => _mm256_unpacklo_ps(a, b),
        (_, [a, b]) => _mm256_unpackhi_ps(a, b),
    });
    let fours: [__m256; 8] = from_fn(|at| {
        let first = at / 4 * 4 + at % 4 / 2;
        let [a, b] = doubles([twos[first], twos[first + 2]]);
        _mm256_castpd_ps(if at % 2 == 0 { _mm256_unpacklo_pd(a, b) } else { _mm256_unpackhi_pd(a, b) })
    });
    from_fn(|at| match at {
        0..4 => _mm256_permute2f128_ps::<0x20>(fours[at], fours[at + 4]),
        _ => _mm256_permute2f128_ps::<0x31>(fours[at - 4], fours[at]),
    })
}
