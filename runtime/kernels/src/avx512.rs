//! AVX-512 building blocks: 16 × 16 transposes, masked loads and masked stores.

use std::arch::x86_64::*;

/// Transposes four 32-bit words of sixteen rows: of each row the words at byte `quarter · 16` of its pointer. Returns,
/// for each word, that of all rows in order.
///
/// # Design
/// Plain functions, no closures: the compiler may or may not inline a closure into a function with other target
/// features, and a call for every few numbers takes ten times as long.
///
/// # Safety
/// 16 bytes can be read from `quarter · 16` on in every row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn transpose_rows(rows: &[*const u8; 16], quarter: usize) -> [__m512i; 4] {
    let mut interleaved = [_mm512_setzero_si512(); 4];
    for (at, lanes) in interleaved.iter_mut().enumerate() {
        // SAFETY: the caller promises 16 bytes of each row.
        unsafe { *lanes = load_lanes([rows[at], rows[4 + at], rows[8 + at], rows[12 + at]], quarter * 16) };
    }
    transpose_lanes(interleaved)
}

/// [`transpose_rows`] of the first four words of sixteen rows that begin `pitch` bytes apart.
///
/// # Safety
/// 16 bytes can be read at the beginning of every row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn transpose_pitched(first: *const u8, pitch: usize) -> [__m512i; 4] {
    let mut interleaved = [_mm512_setzero_si512(); 4];
    for (at, lanes) in interleaved.iter_mut().enumerate() {
        // SAFETY: the caller promises 16 bytes of each row.
        unsafe {
            let row = first.add(at * pitch);
            *lanes = load_lanes([row, row.add(4 * pitch), row.add(8 * pitch), row.add(12 * pitch)], 0);
        }
    }
    transpose_lanes(interleaved)
}

/// Loads 16 bytes of each of four rows, one row per 128-bit lane.
///
/// # Safety
/// 16 bytes can be read from `at` on in every row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load_lanes(rows: [*const u8; 4], at: usize) -> __m512i {
    // SAFETY: the caller promises 16 bytes of each row.
    unsafe {
        let [a, b, c, d] = [rows[0].add(at), rows[1].add(at), rows[2].add(at), rows[3].add(at)];
        let lanes = _mm512_castsi128_si512(_mm_loadu_si128(a.cast()));
        let lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00f0, _mm_loadu_si128(b.cast()));
        let lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0f00, _mm_loadu_si128(c.cast()));
        _mm512_mask_broadcast_i32x4(lanes, 0xf000, _mm_loadu_si128(d.cast()))
    }
}

/// Transposes 4 × 4 words within each lane; the lanes of the operands hold the rows 0, 4, 8, 12, then 1, 5, 9, 13, and
/// so on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_lanes([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let [ab_low, ab_high] = [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)];
    let [cd_low, cd_high] = [_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)];
    [
        _mm512_unpacklo_epi64(ab_low, cd_low),
        _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// The mask of the first `count` of sixteen lanes.
#[inline(always)]
pub fn first_lanes(count: usize) -> __mmask16 {
    ((1_u32 << count.min(16)) - 1) as __mmask16
}

/// Loads the first `count` of 32 numbers; the others are zero.
///
/// # Safety
/// `count` numbers can be read from `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn load_up_to_32(from: *const f32, count: usize) -> [__m512; 2] {
    // SAFETY: the caller promises `count` numbers; masked lanes are not accessed.
    unsafe {
        [
            _mm512_maskz_loadu_ps(first_lanes(count), from),
            _mm512_maskz_loadu_ps(first_lanes(count.saturating_sub(16)), from.wrapping_add(16)),
        ]
    }
}

/// Stores the first `count` of 32 numbers.
///
/// # Safety
/// `count` numbers can be written to `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn store_up_to_32(values: [__m512; 2], to: *mut f32, count: usize) {
    for (half, values) in values.into_iter().enumerate() {
        let mask = first_lanes(count.saturating_sub(half * 16));
        // SAFETY: the caller promises room for `count` numbers; masked lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(to.wrapping_add(half * 16), mask, values) };
    }
}

#[cfg(test)]
mod tests {
    use std::array::from_fn;

    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;

    #[test]
    fn words_of_rows_are_transposed() {
        at_each_level(Level::Vnni, |_| {
            let rows: [[u32; 16]; 16] = from_fn(|row| from_fn(|word| (row * 100 + word) as u32));
            let expected: [[u32; 16]; 16] = from_fn(|word| from_fn(|row| rows[row][word]));
            let pointers = from_fn(|row| rows[row].as_ptr().cast());
            for quarter in 0..4 {
                // SAFETY: the processor has AVX-512, and every row has 64 bytes.
                let words = unsafe { transpose_rows(&pointers, quarter) };
                // SAFETY: as above; rows are 64 bytes apart.
                let pitched = unsafe { transpose_pitched(pointers[0].wrapping_add(quarter * 16), 64) };
                for (word, found) in words.into_iter().chain(pitched).enumerate() {
                    let mut stored = [0_u32; 16];
                    // SAFETY: sixteen words of 32 bits.
                    unsafe { _mm512_storeu_si512(stored.as_mut_ptr().cast(), found) };
                    assert_eq!(stored, expected[quarter * 4 + word % 4], "quarter {quarter}, word {word}");
                }
            }
        });
    }
}
