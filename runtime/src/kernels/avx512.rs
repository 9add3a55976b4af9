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
    // Four rows, and in each lane the next four of them.
    let mut fours = [_mm512_setzero_si512(); 4];
    for (at, four) in fours.iter_mut().enumerate() {
        // SAFETY: sixteen bytes of each row.
        unsafe {
            let first = _mm512_castsi128_si512(_mm_loadu_si128(rows[at].add(quarter * 16).cast()));
            let next = _mm_loadu_si128(rows[4 + at].add(quarter * 16).cast());
            let first = _mm512_mask_broadcast_i32x4(first, 0x00f0, next);
            let next = _mm_loadu_si128(rows[8 + at].add(quarter * 16).cast());
            let first = _mm512_mask_broadcast_i32x4(first, 0x0f00, next);
            let next = _mm_loadu_si128(rows[12 + at].add(quarter * 16).cast());
            *four = _mm512_mask_broadcast_i32x4(first, 0xf000, next);
        }
    }
    let [a, b, c, d] = fours;
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

/// Writes the sums of the first `count` of 32 columns, added to what there is `before`.
///
/// # Safety
/// There is room for as many, and as many are there before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn write(sums: [__m512; 2], before: Option<*const f32>, to: *mut f32, count: usize) {
    for (half, sum) in sums.into_iter().enumerate() {
        let there = mask(count.saturating_sub(half * 16));
        // SAFETY: the caller's; lanes that are not there are left alone.
        unsafe {
            let sum = match before {
                None => sum,
                Some(before) => _mm512_add_ps(_mm512_maskz_loadu_ps(there, before.wrapping_add(half * 16)), sum),
            };
            _mm512_mask_storeu_ps(to.wrapping_add(half * 16), there, sum);
        }
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
