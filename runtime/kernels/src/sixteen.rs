//! Sixteen numbers that are computed together: one register, two, or an array where there are none.
//!
//! # Design
//! Loops over arrays are brought into registers or not as the compiler likes, which differs from one build to the next by a
//! factor of ten. What is written with these is not left to it.

/// Methods are for functions that are compiled for the processor level of the type.
pub trait Sixteen: Copy {
    /// Whether the processor has AVX2 and FMA.
    const HAS_AVX2: bool;
    /// How many sixteens there are registers for.
    const REGISTERS: usize;

    /// # Safety
    /// There are sixteen numbers, and the processor is of the level.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// There is room for sixteen numbers, and the processor is of the level.
    unsafe fn store(self, to: *mut f32);
    /// # Safety
    /// As for all that follow: the processor is of the level.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// As above.
    unsafe fn add(self, other: Self) -> Self;
    /// # Safety
    /// As above.
    unsafe fn mul(self, other: Self) -> Self;
    /// # Safety
    /// As above.
    unsafe fn div(self, other: Self) -> Self;
    /// `self · factor + sum`, rounded once where the processor can.
    ///
    /// # Safety
    /// As above.
    unsafe fn fused(self, factor: Self, sum: Self) -> Self;
    /// The greater one, and `other` where one is not a number.
    ///
    /// # Safety
    /// As above.
    unsafe fn max(self, other: Self) -> Self;
    /// The lesser one, and `other` where one is not a number.
    ///
    /// # Safety
    /// As above.
    unsafe fn min(self, other: Self) -> Self;
    /// 2 to the power of the whole number that is in the low bits of these.
    ///
    /// # Safety
    /// As above.
    unsafe fn power_of_two(self) -> Self;
    /// These, but 0 where `x` is below `limit`.
    ///
    /// # Safety
    /// As above.
    unsafe fn zero_below(self, x: Self, limit: f32) -> Self;
}

/// For any processor.
#[derive(Clone, Copy)]
pub struct Plain([f32; 16]);

impl Plain {
    #[inline(always)]
    fn each(mut self, other: Plain, f: impl Fn(f32, f32) -> f32) -> Plain {
        for at in 0..16 {
            self.0[at] = f(self.0[at], other.0[at]);
        }
        self
    }
}

impl Sixteen for Plain {
    const HAS_AVX2: bool = false;
    const REGISTERS: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Plain {
        // SAFETY: the caller's.
        Plain(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Plain {
        Plain([x; 16])
    }

    #[inline(always)]
    unsafe fn add(self, other: Plain) -> Plain {
        self.each(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Plain) -> Plain {
        self.each(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Plain) -> Plain {
        self.each(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn fused(self, factor: Plain, sum: Plain) -> Plain {
        self.each(factor, |a, b| a * b).each(sum, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Plain) -> Plain {
        self.each(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Plain) -> Plain {
        self.each(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Plain {
        self.each(self, |a, _| f32::from_bits((a.to_bits() << 23).wrapping_add(127 << 23)))
    }

    #[inline(always)]
    unsafe fn zero_below(self, x: Plain, limit: f32) -> Plain {
        self.each(x, |a, x| if x < limit { 0.0 } else { a })
    }
}

#[cfg(target_arch = "x86_64")]
pub use registers::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::*;

    use super::Sixteen;

    /// For AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    /// For AVX-512.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    macro_rules! both {
        ($intrinsic:ident: $($operand:expr),*) => {
            // SAFETY: the caller's.
            unsafe { Avx2($intrinsic($($operand.0),*), $intrinsic($($operand.1),*)) }
        };
    }

    impl Sixteen for Avx2 {
        const HAS_AVX2: bool = true;
        const REGISTERS: usize = 8;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Avx2 {
            // SAFETY: the caller's.
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller's.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx2 {
            // SAFETY: the caller's.
            let x = unsafe { _mm256_set1_ps(x) };
            Avx2(x, x)
        }

        #[inline(always)]
        unsafe fn add(self, other: Avx2) -> Avx2 {
            both!(_mm256_add_ps: self, other)
        }

        #[inline(always)]
        unsafe fn mul(self, other: Avx2) -> Avx2 {
            both!(_mm256_mul_ps: self, other)
        }

        #[inline(always)]
        unsafe fn div(self, other: Avx2) -> Avx2 {
            both!(_mm256_div_ps: self, other)
        }

        #[inline(always)]
        unsafe fn fused(self, factor: Avx2, sum: Avx2) -> Avx2 {
            both!(_mm256_fmadd_ps: self, factor, sum)
        }

        #[inline(always)]
        unsafe fn max(self, other: Avx2) -> Avx2 {
            both!(_mm256_max_ps: self, other)
        }

        #[inline(always)]
        unsafe fn min(self, other: Avx2) -> Avx2 {
            both!(_mm256_min_ps: self, other)
        }

        #[inline(always)]
        unsafe fn power_of_two(self) -> Avx2 {
            // SAFETY: the caller's.
            unsafe {
                let one = _mm256_set1_epi32(127 << 23);
                let [low, high] = [_mm256_castps_si256(self.0), _mm256_castps_si256(self.1)];
                let [low, high] = [_mm256_slli_epi32::<23>(low), _mm256_slli_epi32::<23>(high)];
                let [low, high] = [_mm256_add_epi32(low, one), _mm256_add_epi32(high, one)];
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }

        #[inline(always)]
        unsafe fn zero_below(self, x: Avx2, limit: f32) -> Avx2 {
            // SAFETY: the caller's.
            unsafe {
                let limit = _mm256_set1_ps(limit);
                Avx2(
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit), self.0),
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit), self.1),
                )
            }
        }
    }

    impl Sixteen for Avx512 {
        const HAS_AVX2: bool = true;
        const REGISTERS: usize = 32;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller's.
            unsafe { _mm512_storeu_ps(to, self.0) };
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn div(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_div_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn fused(self, factor: Avx512, sum: Avx512) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_fmadd_ps(self.0, factor.0, sum.0)) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn min(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller's.
            unsafe { Avx512(_mm512_min_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn power_of_two(self) -> Avx512 {
            // SAFETY: the caller's.
            unsafe {
                let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Avx512(_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(127 << 23))))
            }
        }

        #[inline(always)]
        unsafe fn zero_below(self, x: Avx512, limit: f32) -> Avx512 {
            // SAFETY: the caller's.
            unsafe {
                let there = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(limit));
                Avx512(_mm512_maskz_mov_ps(there, self.0))
            }
        }
    }
}
