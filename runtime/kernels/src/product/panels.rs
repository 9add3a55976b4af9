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
    match product.w.block_size {
        128 => of_size::<BITS, 128>(product),
        64 => of_size::<BITS, 64>(product),
        32 => of_size::<BITS, 32>(product),
        _ => of_size::<BITS, 16>(product),
    }
}

/// With the length of a block known beforehand, no more than the sums is left to do in it.
#[target_feature(enable = "avx2,fma")]
fn of_size<const BITS: usize, const SIZE: usize>(product: &Product) {
    let Product { x, w, rows, columns: Columns::All(columns), .. } = product else {
        unreachable!("activations of panels are for all columns")
    };
    let length = w.blocks() * w.block_size;
    const { assert!(DEPTH.is_multiple_of(SIZE) && SIZE.is_multiple_of(16)) };
    assert!(w.block_size == SIZE && x.numbers.len() == x.rows * length);
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
                    1 => tile::<SIZE, 1>(product, &panel, row, columns.clone(), from..from + panel.depth),
                    2 => tile::<SIZE, 2>(product, &panel, row, columns.clone(), from..from + panel.depth),
                    3 => tile::<SIZE, 3>(product, &panel, row, columns.clone(), from..from + panel.depth),
                    4 => tile::<SIZE, 4>(product, &panel, row, columns.clone(), from..from + panel.depth),
                    5 => tile::<SIZE, 5>(product, &panel, row, columns.clone(), from..from + panel.depth),
                    _ => tile::<SIZE, ROWS>(product, &panel, row, columns.clone(), from..from + panel.depth),
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
                    let mut rows = [_mm256_setzero_si256(); 8];
                    for (row, (lower, upper)) in rows.iter_mut().zip(lower.iter().zip(upper)) {
                        let [lower, upper] = [lower.add(from * BITS / 8).cast(), upper.add(from * BITS / 8).cast()];
                        *row = match step * BITS {
                            128 => _mm256_set_m128i(_mm_loadu_si128(upper), _mm_loadu_si128(lower)),
                            _ => _mm256_set_m128i(_mm_loadl_epi64(upper), _mm_loadl_epi64(lower)),
                        };
                    }
                    let mut to = self.numbers.as_mut_ptr().add((from - depth.start) * WIDTH);
                    for word in transposed(rows).into_iter().take(step * BITS / 16) {
                        // Pairs of numbers of eight columns, and of the next eight.
                        let (pairs, count) = if BITS == 8 {
                            let none = _mm256_setzero_si256();
                            let pair = [_mm256_unpacklo_epi8(word, none), _mm256_unpackhi_epi8(word, none)];
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

/// Computes `R` rows of the panel's columns, or adds to them what its depth brings, the numbers `depth`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tile<const SIZE: usize, const R: usize>(
    Product { x, bias, y, .. }: &Product,
    panel: &Panel,
    row: usize,
    columns: Range<usize>,
    depth: Range<usize>,
) {
    // Pairs that are multiplied at a time.
    const PAIRS: usize = 2;
    let length = x.numbers.len() / x.rows;
    assert!(row + R <= x.rows && depth.end <= length && depth.len() <= DEPTH && columns.end <= y.n);
    let mut numbers: [*const i16; R] = [std::ptr::null(); R];
    for (at, numbers) in numbers.iter_mut().enumerate() {
        *numbers = x.numbers[(row + at) * length + depth.start..].as_ptr();
    }
    let mut totals = [[_mm256_setzero_ps(); 2]; R];
    for (block, scales) in panel.scales[..depth.len() / SIZE].iter().enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for first in (0..SIZE).step_by(2 * PAIRS) {
            for at in (block * SIZE + first..).step_by(2).take(PAIRS) {
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
        write(found, to, bias.map(|bias| &bias[columns.clone()]), depth.start == 0);
    }
}

/// Writes what the `first` part of the depth brings, or adds what another does.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn write(found: [__m256; 2], to: &mut [f32], bias: Option<&[f32]>, first: bool) {
    if let (None, [low, high]) = (bias, to.as_chunks_mut::<8>().0) {
        for (to, found) in [low, high].into_iter().zip(found) {
            // SAFETY: eight numbers.
            unsafe {
                let found = if first { found } else { _mm256_add_ps(_mm256_loadu_ps(to.as_ptr()), found) };
                _mm256_storeu_ps(to.as_mut_ptr(), found);
            }
        }
        return;
    }
    // SAFETY: sixteen numbers are two times eight.
    let found = unsafe { std::mem::transmute::<[__m256; 2], [f32; WIDTH]>(found) };
    match (first, bias) {
        (true, None) => to.iter_mut().zip(found).for_each(|(to, found)| *to = found),
        (true, Some(bias)) => to.iter_mut().zip(found).zip(bias).for_each(|((to, found), bias)| *to = found + bias),
        (false, _) => to.iter_mut().zip(found).for_each(|(to, found)| *to += found),
    }
}

/// Eight rows of eight words of 16 bits, by columns, in either lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(rows: [__m256i; 8]) -> [__m256i; 8] {
    // The first four are of words 0 to 3, of four rows and then of the others; the last four of words 4 to 7.
    let mut fours = [_mm256_setzero_si256(); 8];
    for (half, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
        let [low, high] = [_mm256_unpacklo_epi16(rows[0], rows[1]), _mm256_unpackhi_epi16(rows[0], rows[1])];
        let [lower, higher] = [_mm256_unpacklo_epi16(rows[2], rows[3]), _mm256_unpackhi_epi16(rows[2], rows[3])];
        fours[half * 2] = _mm256_unpacklo_epi32(low, lower);
        fours[half * 2 + 1] = _mm256_unpackhi_epi32(low, lower);
        fours[half * 2 + 4] = _mm256_unpacklo_epi32(high, higher);
        fours[half * 2 + 5] = _mm256_unpackhi_epi32(high, higher);
    }
    let mut columns = [_mm256_setzero_si256(); 8];
    for (at, pair) in columns.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let first = at / 2 * 4 + at % 2;
        *pair = [
            _mm256_unpacklo_epi64(fours[first], fours[first + 2]),
            _mm256_unpackhi_epi64(fours[first], fours[first + 2]),
        ];
    }
    columns
}
