//! What panels of columns have in common where the processor has AVX-512: how they are filled, and how their sums are written.

use std::arch::x86_64::*;

/// Of sixteen rows the four words that begin `quarter · 16` bytes after these places: each word of all rows, in their order.
///
/// # Design
/// Without closures, as all that is called for every few numbers: what stands between them and vector instructions is inlined or not
/// as the compiler likes, and costs ten times the time if not.
///
/// # Safety
/// There are so many bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn turn(rows: &[*const u8; 16], quarter: usize) -> [__m512i; 4] {
    let mut fours = [_mm512_setzero_si512(); 4];
    for (at, four) in fours.iter_mut().enumerate() {
        // SAFETY: sixteen bytes of each row.
        unsafe { *four = lanes([rows[at], rows[4 + at], rows[8 + at], rows[12 + at]], quarter * 16) };
    }
    words(fours)
}

/// The same of sixteen rows that begin `pitch` bytes one after the other, and the first of their words.
///
/// # Safety
/// There are so many bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn turned(first: *const u8, pitch: usize) -> [__m512i; 4] {
    let mut fours = [_mm512_setzero_si512(); 4];
    for (at, four) in fours.iter_mut().enumerate() {
        // SAFETY: sixteen bytes of each row.
        unsafe {
            let row = first.add(at * pitch);
            *four = lanes([row, row.add(4 * pitch), row.add(8 * pitch), row.add(12 * pitch)], 0);
        }
    }
    words(fours)
}

/// Four words of each of four rows, a row a lane.
///
/// # Safety
/// There are sixteen bytes from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn lanes(rows: [*const u8; 4], at: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let [a, b, c, d] = [rows[0].add(at), rows[1].add(at), rows[2].add(at), rows[3].add(at)];
        let first = _mm512_castsi128_si512(_mm_loadu_si128(a.cast()));
        let first = _mm512_mask_broadcast_i32x4(first, 0x00f0, _mm_loadu_si128(b.cast()));
        let first = _mm512_mask_broadcast_i32x4(first, 0x0f00, _mm_loadu_si128(c.cast()));
        _mm512_mask_broadcast_i32x4(first, 0xf000, _mm_loadu_si128(d.cast()))
    }
}

/// The words of sixteen rows, of which each of these has every fourth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn words([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let [low, high] = [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)];
    let [lower, higher] = [_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)];
    [
        _mm512_unpacklo_epi64(low, lower),
        _mm512_unpackhi_epi64(low, lower),
        _mm512_unpacklo_epi64(high, higher),
        _mm512_unpackhi_epi64(high, higher),
    ]
}

/// The first of sixteen lanes, as many as there are.
#[inline(always)]
pub fn mask(count: usize) -> __mmask16 {
    ((1_u32 << count.min(16)) - 1) as __mmask16
}

/// The first `count` of 32 numbers, and zeros.
///
/// # Safety
/// There are as many.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn read(from: *const f32, count: usize) -> [__m512; 2] {
    // SAFETY: the caller's; lanes that are not there are left alone.
    unsafe {
        [
            _mm512_maskz_loadu_ps(mask(count), from),
            _mm512_maskz_loadu_ps(mask(count.saturating_sub(16)), from.wrapping_add(16)),
        ]
    }
}

/// Writes the sums of the first `count` of 32 columns.
///
/// # Safety
/// There is room for as many.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn write(sums: [__m512; 2], to: *mut f32, count: usize) {
    for (half, sum) in sums.into_iter().enumerate() {
        let there = mask(count.saturating_sub(half * 16));
        // SAFETY: the caller's; lanes that are not there are left alone.
        unsafe { _mm512_mask_storeu_ps(to.wrapping_add(half * 16), there, sum) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::processor::{Level, found};
    use super::*;
    use std::array::from_fn;

    #[test]
    fn words_come_side_by_side() {
        if found() < Level::Vnni {
            return;
        }
        let rows: [[u32; 16]; 16] = from_fn(|row| from_fn(|word| (row * 100 + word) as u32));
        let mut turned = [[0_u32; 16]; 16];
        let places = from_fn(|row| rows[row].as_ptr().cast());
        for quarter in 0..4 {
            // SAFETY: the features are there, and rows are of 64 bytes.
            unsafe {
                for (at, word) in turn(&places, quarter).into_iter().enumerate() {
                    _mm512_storeu_si512(turned[quarter * 4 + at].as_mut_ptr().cast(), word);
                }
            }
        }
        assert_eq!(turned, from_fn(|word| from_fn(|row| rows[row][word])));
    }
}
