//! AVX2 building blocks: horizontal sums and prefetching.

use std::arch::x86_64::*;

/// Registers whose lanes [`horizontal_sums`] adds up together.
pub const SUMS: usize = 8;

/// The sum of the eight lanes of each register.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub fn horizontal_sums(x: [__m256; SUMS]) -> [f32; SUMS] {
    let a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    let b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let mut sums = [0.0; SUMS];
    // SAFETY: `sums` has room for eight numbers.
    unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(low, high)) };
    sums
}

/// Prefetches `bytes` bytes, `first` bytes behind `later`: the hardware prefetcher does not cross a page.
#[inline(always)]
pub fn prefetch(later: *const u8, first: usize, bytes: usize) {
    if bytes < 64 && !first.is_multiple_of(64) {
        return;
    }
    for line in (0..bytes).step_by(64) {
        // SAFETY: prefetching is a hint, for which any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(later.wrapping_add(first + line).cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;

    #[test]
    fn horizontal_sums_keep_the_order_of_registers() {
        at_each_level(Level::Avx2, |_| {
            let lanes: [[f32; 8]; SUMS] = std::array::from_fn(|at| std::array::from_fn(|lane| (at * 10 + lane) as f32));
            // SAFETY: the processor has AVX2; both arrays are 64 float32.
            let sums = unsafe { horizontal_sums(std::mem::transmute::<[[f32; 8]; SUMS], [__m256; SUMS]>(lanes)) };
            assert_eq!(sums, lanes.map(|lanes| lanes.iter().sum()));
        });
    }
}
