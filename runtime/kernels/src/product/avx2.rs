//! The product with AVX2, for few rows: the weights are read in the order in which they lie in memory, and each is brought into
//! 16 bits for all rows of a tile at once.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Columns, Product, Weights};

/// Bytes from what is read to what will be.
pub(super) const AHEAD: usize = 2048;
/// Columns that all rows are computed of before the next ones: they stay in the first cache.
const NEAR: usize = 32;
/// Sums that are taken across their registers together.
pub const SUMS: usize = 8;

/// Weights of 4 bits meet activations in the order of [`Order::Fours`](super::Order::Fours).
///
/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply<const BITS: usize>(product: &Product) {
    match product.w.span() {
        128 => of_span::<BITS, 128>(product),
        64 => of_span::<BITS, 64>(product),
        32 => of_span::<BITS, 32>(product),
        _ => of_span::<BITS, 16>(product),
    }
}

/// With the length of a span known beforehand, no more than the sums is left to do in it.
#[target_feature(enable = "avx2,fma")]
fn of_span<const BITS: usize, const SPAN: usize>(product: &Product) {
    let (to, places, near) = To::of(&product.columns, product.w);
    for first in places.clone().step_by(near) {
        of_some::<BITS, SPAN>(product, product.rows.clone(), first..places.end.min(first + near), &to);
    }
}

/// Which columns are computed one after the other: those of a list, or all.
pub(super) struct To<'c> {
    listed: Option<&'c [usize]>,
    /// Of the first column.
    start: *const u8,
    /// Of a column.
    bytes: usize,
}

impl<'c> To<'c> {
    /// The columns, their places, and how many of these all rows are computed of before the next ones.
    pub fn of(columns: &Columns<'c>, w: &Weights) -> (To<'c>, Range<usize>, usize) {
        let (start, bytes) = (w.numbers.as_ptr(), w.blocks() * w.block_bytes());
        match *columns {
            Columns::All(ref columns) => (To { listed: None, start, bytes }, columns.clone(), NEAR),
            Columns::Listed(listed) => {
                (To { listed: Some(listed), start, bytes }, 0..listed.len(), listed.len().max(1))
            }
        }
    }

    /// The column at a place.
    #[inline(always)]
    pub fn column(&self, place: usize) -> usize {
        self.listed.map_or(place, |columns| columns[place])
    }

    /// What the memory is to send while that is computed.
    #[inline(always)]
    pub fn later(&self, place: usize) -> *const u8 {
        match self.listed {
            None => self.start.wrapping_add(place * self.bytes + AHEAD),
            Some(columns) => self.start.wrapping_add(columns.get(place + SUMS).map_or(0, |column| column * self.bytes)),
        }
    }
}

/// How many rows are computed together where so many are left: each number is one more variant of all that is compiled for it.
#[inline(always)]
pub fn at_a_time(rows: usize) -> usize {
    match rows {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// The columns at some places.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn of_some<const BITS: usize, const SPAN: usize>(product: &Product, rows: Range<usize>, places: Range<usize>, to: &To) {
    let mut row = rows.start;
    while row < rows.end {
        let together = at_a_time(rows.end - row);
        match together {
            1 => of_rows::<BITS, SPAN, 1, 8>(product, row, places.clone(), to),
            2 => of_rows::<BITS, SPAN, 2, 4>(product, row, places.clone(), to),
            _ => of_rows::<BITS, SPAN, 4, 2>(product, row, places.clone(), to),
        }
        row += together;
    }
}

/// `R` rows, `C` columns at a time.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn of_rows<const BITS: usize, const SPAN: usize, const R: usize, const C: usize>(
    product: &Product,
    row: usize,
    places: Range<usize>,
    to: &To,
) {
    let whole = places.start + places.len() / C * C;
    for place in (places.start..whole).step_by(C) {
        let (mut columns, mut later) = ([0; C], [std::ptr::null(); C]);
        for at in 0..C {
            (columns[at], later[at]) = (to.column(place + at), to.later(place + at));
        }
        let sums = tile::<BITS, SPAN, R, C>(product, row, columns, later);
        write::<R, C>(product, row, columns, sums);
    }
    for place in whole..places.end {
        let columns = [to.column(place)];
        write::<R, 1>(product, row, columns, tile::<BITS, SPAN, R, 1>(product, row, columns, [to.later(place)]));
    }
}

/// Gives a tile's sums `[rows, columns]` their scales and biases, and writes them.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn write<const R: usize, const C: usize>(product: &Product, row: usize, columns: [usize; C], sums: [f32; SUMS]) {
    let Product { x, bias, y, .. } = product;
    for (row, sums) in (row..row + R).zip(sums.chunks_exact(C)) {
        let scale = x.scales[row];
        for (column, sum) in columns.into_iter().zip(sums) {
            let bias = bias.map_or(0.0, |bias| bias[column]);
            // SAFETY: within the output, and no one else writes the column.
            unsafe { *y.values.add(row * y.n + column) = sum * scale + bias };
        }
    }
}

/// The sums `[rows, columns]` of a tile; the memory is to send `later`, a column's bytes each.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tile<const BITS: usize, const SPAN: usize, const R: usize, const C: usize>(
    Product { x, w, rows, .. }: &Product,
    row: usize,
    columns: [usize; C],
    later: [*const u8; C],
) -> [f32; SUMS] {
    const { assert!(R * C <= SUMS) };
    let (blocks, size, span) = (w.blocks(), w.block_size, SPAN);
    let (length, bytes, spans) = (blocks * size, blocks * w.block_bytes(), blocks * size / span);
    // Everything below stays within these; spans are whole ones in the order that 4 bits are in.
    assert!((row + R) * length <= x.numbers.len() && (row + R) * spans <= x.starts.len());
    let last = columns.into_iter().fold(0, usize::max);
    assert!((last + 1) * bytes <= w.numbers.len() && (last + 1) * blocks <= w.scales.len());
    assert!(spans * span == length && span == w.span() && span.is_multiple_of(if BITS == 4 { 64 } else { 16 }));
    let mut numbers: [*const i16; R] = [std::ptr::null(); R];
    for (at, numbers) in numbers.iter_mut().enumerate() {
        *numbers = x.numbers[(row + at) * length..].as_ptr();
    }
    let mut starts: [*const [i32; 8]; R] = [std::ptr::null(); R];
    for (at, starts) in starts.iter_mut().enumerate() {
        *starts = x.starts[(row + at) * spans..].as_ptr();
    }

    let mut totals = [_mm256_setzero_ps(); SUMS];
    for (at_column, (column, later)) in columns.into_iter().zip(later).enumerate() {
        let packed = w.numbers[column * bytes..].as_ptr();
        let scales = w.scales[column * blocks..].as_ptr();
        let mut totals_here = [_mm256_setzero_ps(); R];
        for of_span in 0..spans {
            // SAFETY: within the tile.
            unsafe {
                // What zero is off, before anything is added.
                let mut sums = [_mm256_setzero_si256(); R];
                for (sum, starts) in sums.iter_mut().zip(starts) {
                    *sum = _mm256_loadu_si256(starts.add(of_span).cast());
                }
                // Further rows find it in the cache.
                if row == rows.start {
                    fetch(later, of_span * span * BITS / 8, span * BITS / 8);
                }
                if BITS == 8 {
                    for at in (of_span * span..(of_span + 1) * span).step_by(16) {
                        let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(packed.add(at).cast()));
                        for row in 0..R {
                            let x = _mm256_loadu_si256(numbers[row].add(at).cast());
                            sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(codes, x));
                        }
                    }
                } else {
                    for at in (of_span * span..(of_span + 1) * span).step_by(64) {
                        let fours = fours(_mm256_loadu_si256(packed.add(at / 2).cast()));
                        for row in 0..R {
                            for (i, &four) in fours.iter().enumerate() {
                                let x = _mm256_loadu_si256(numbers[row].add(at + 16 * i).cast());
                                sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(four, x));
                            }
                        }
                    }
                }
                let scale = match span == size {
                    true => _mm256_broadcast_ss(&*scales.add(of_span)),
                    false => two_scales(scales.add(2 * of_span)),
                };
                for row in 0..R {
                    totals_here[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[row]), scale, totals_here[row]);
                }
            }
        }
        if w.zero_points.is_some() {
            for (row, total) in (row..).zip(&mut totals_here) {
                let zeros = w.taken_off(column, &x.sums[row * blocks..][..blocks]);
                *total = _mm256_sub_ps(*total, _mm256_setr_ps(zeros, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0));
            }
        }
        for (at_row, total) in totals_here.into_iter().enumerate() {
            totals[at_row * C + at_column] = total;
        }
    }
    across(totals)
}

/// The sums of the eight lanes of each.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub fn across(x: [__m256; SUMS]) -> [f32; SUMS] {
    let a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    let b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let mut sums = [0.0; SUMS];
    // SAFETY: eight numbers.
    unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(low, high)) };
    sums
}

/// Has the memory send `bytes` bytes from `first` on of what will be read a little later: the processor alone would not look
/// beyond a page.
#[inline(always)]
pub(super) fn fetch(later: *const u8, first: usize, bytes: usize) {
    if bytes < 64 && !first.is_multiple_of(64) {
        return;
    }
    for line in (0..bytes).step_by(64) {
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(later.wrapping_add(first + line).cast()) };
    }
}

/// The 64 numbers of 4 bits in 32 bytes, in the order of [`Order::Fours`](super::Order::Fours).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn fours(words: __m256i) -> [__m256i; 4] {
    let low = _mm256_set1_epi16(15);
    [
        _mm256_and_si256(words, low),
        _mm256_and_si256(_mm256_srli_epi16::<4>(words), low),
        _mm256_and_si256(_mm256_srli_epi16::<8>(words), low),
        _mm256_srli_epi16::<12>(words),
    ]
}

/// Two scales, each for four of eight sums.
///
/// # Safety
/// There are two.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn two_scales(scales: *const f32) -> __m256 {
    // SAFETY: the caller's.
    let two = _mm256_castpd_ps(unsafe { _mm256_broadcast_sd(&*scales.cast()) });
    _mm256_permutevar_ps(two, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))
}
