//! The product for many rows of activations, with AVX2: sixteen columns of weights at a time are brought into 16 bits and
//! into an order in which no sum has to be taken across a register.

use std::arch::x86_64::*;
use std::array::from_fn;
use std::ops::Range;

use super::{Columns, Product, Weights};

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
    let Product { x, w, rows, columns: Columns::All(columns), .. } = product else {
        unreachable!("activations of panels are for all columns")
    };
    let length = w.blocks() * w.block_size;
    assert!(
        x.numbers.len() == x.rows * length && DEPTH.is_multiple_of(w.block_size) && w.block_size.is_multiple_of(16)
    );
    let mut panel = Panel { numbers: [0; WIDTH * DEPTH], scales: [[0.0; WIDTH]; DEPTH / 16], depth: 0 };
    let tiles = rows.len().div_ceil(ROWS);
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..length).step_by(DEPTH) {
            panel.fill::<BITS>(w, columns.clone(), from..length.min(from + DEPTH));
            let next = if from + DEPTH < length { (first, from + DEPTH) } else { (first + WIDTH, 0) };
            let mut row = rows.start;
            for left in (1..=tiles).rev() {
                fetch::<BITS>(w, next, tiles - left..tiles - left + 1, tiles);
                // As many rows in each tile as in the others, but for one.
                let taken = (rows.end - row).div_ceil(left);
                match taken {
                    1 => tile::<1>(product, &panel, row, columns.clone(), from),
                    2 => tile::<2>(product, &panel, row, columns.clone(), from),
                    3 => tile::<3>(product, &panel, row, columns.clone(), from),
                    4 => tile::<4>(product, &panel, row, columns.clone(), from),
                    5 => tile::<5>(product, &panel, row, columns.clone(), from),
                    _ => tile::<ROWS>(product, &panel, row, columns.clone(), from),
                }
                row += taken;
            }
        }
    }
}

/// Has the memory send these of `parts` parts of what the next panel, of columns from `column` and numbers from `from` on, will
/// be filled with: the processor alone would not look so far ahead.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn fetch<const BITS: usize>(w: &Weights, (column, from): (usize, usize), of: Range<usize>, parts: usize) {
    const LINE: usize = 64;
    let (bytes, lines) = (w.blocks() * w.block_bytes(), const { DEPTH * BITS / 8 / LINE });
    let all = WIDTH * lines;
    for line in all * of.start / parts..all * of.end / parts {
        let at = (column + line / lines) * bytes + from * BITS / 8 + line % lines * LINE;
        // A hint, which may name any address.
        _mm_prefetch::<_MM_HINT_T0>(w.numbers.as_ptr().wrapping_add(at).cast());
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
        // In the order in which what is read 16 bits at a time of the lower and the upper lanes comes out as eight columns beside
        // the next eight. Columns that are not there are as the last; no one reads them.
        let [lower, upper] = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]].map(|lanes| {
            let column = |at: usize| (columns.start + at).min(columns.end - 1);
            lanes.map(|at| w.numbers[column(at) * bytes..].as_ptr())
        });
        let mut zeros = [_mm256_set1_epi16(w.same_zero_point().unwrap_or(0) as i16); 2];
        // What lies in 16 bytes of each column, or less in short blocks.
        let step = size.min(128 / BITS);
        for block in of_panel {
            if w.zero_points.is_some() {
                let of_eight = |half: usize| {
                    let zero = |at: usize| w.zero_point((columns.start + 8 * half + at).min(columns.end - 1), block);
                    let [a, b, c, d, e, f, g, h] = from_fn(|at| zero(at) * 0x0001_0001);
                    _mm256_setr_epi32(a, b, c, d, e, f, g, h)
                };
                zeros = [of_eight(0), of_eight(1)];
            }
            for from in (block * size..(block + 1) * size).step_by(step) {
                // SAFETY: within the columns and the panel.
                unsafe {
                    let read = |column: *const u8| {
                        let packed = column.add(from * BITS / 8).cast();
                        if step * BITS == 128 { _mm_loadu_si128(packed) } else { _mm_loadl_epi64(packed) }
                    };
                    let rows = from_fn(|at| _mm256_set_m128i(read(upper[at]), read(lower[at])));
                    let words = transposed(rows);
                    let to = self.numbers.as_mut_ptr().add((from - depth.start) * WIDTH);
                    let write = |pair: usize, halves: [__m256i; 2]| {
                        for (half, (numbers, zeros)) in halves.into_iter().zip(zeros).enumerate() {
                            let to = to.add((2 * pair + half) * WIDTH);
                            _mm256_store_si256(to.cast(), _mm256_sub_epi16(numbers, zeros));
                        }
                    };
                    for (at, word) in words.into_iter().enumerate().take(step * BITS / 16) {
                        if BITS == 8 {
                            let none = _mm256_setzero_si256();
                            write(at, [_mm256_unpacklo_epi8(word, none), _mm256_unpackhi_epi8(word, none)]);
                        } else {
                            let low = _mm256_set1_epi16(15);
                            let first = [word, _mm256_srli_epi16::<4>(word)].map(|word| _mm256_and_si256(word, low));
                            let second =
                                [_mm256_and_si256(_mm256_srli_epi16::<8>(word), low), _mm256_srli_epi16::<12>(word)];
                            for (pair, [a, b]) in [first, second].into_iter().enumerate() {
                                write(2 * at + pair, [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)]);
                            }
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
        let found = totals.map(|total| _mm256_mul_ps(total, scale));
        // SAFETY: within the output, and no one else has these columns.
        let to = unsafe { std::slice::from_raw_parts_mut(y.values.add(row * y.n + columns.start), columns.len()) };
        let bias = bias.map(|bias| &bias[columns.clone()]);
        if let (0, None, WIDTH) = (from, bias, to.len()) {
            // SAFETY: two times eight numbers.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), found[0]);
                _mm256_storeu_ps(to[8..].as_mut_ptr(), found[1]);
            }
            continue;
        }
        // SAFETY: sixteen numbers are two times eight.
        let found = unsafe { std::mem::transmute::<[__m256; 2], [f32; WIDTH]>(found) };
        match (from, bias) {
            (0, None) => to.iter_mut().zip(found).for_each(|(to, found)| *to = found),
            (0, Some(bias)) => to.iter_mut().zip(found).zip(bias).for_each(|((to, found), bias)| *to = found + bias),
            _ => to.iter_mut().zip(found).for_each(|(to, found)| *to += found),
        }
    }
}

/// Eight rows of eight words of 16 bits, by columns, in either lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(rows: [__m256i; 8]) -> [__m256i; 8] {
    let twos: [__m256i; 8] = from_fn(|at| match (at % 2, [rows[at / 2 * 2], rows[at / 2 * 2 + 1]]) {
        (0, [a, b]) => _mm256_unpacklo_epi16(a, b),
        (_, [a, b]) => _mm256_unpackhi_epi16(a, b),
    });
    // The first four are of words 0 to 3, of four rows and then of the others; the last four of words 4 to 7.
    let fours: [__m256i; 8] = from_fn(|at| {
        let first = at / 4 + at % 4 / 2 * 4;
        let [a, b] = [twos[first], twos[first + 2]];
        if at % 2 == 0 { _mm256_unpacklo_epi32(a, b) } else { _mm256_unpackhi_epi32(a, b) }
    });
    from_fn(|at| {
        let first = at / 4 * 4 + at / 2 % 2;
        let [a, b] = [fours[first], fours[first + 2]];
        if at % 2 == 0 { _mm256_unpacklo_epi64(a, b) } else { _mm256_unpackhi_epi64(a, b) }
    })
}
