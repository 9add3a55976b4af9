//! `F32x16`: sixteen float32 lanes as one AVX-512 register, two AVX2 registers, or an array.
//!
//! # Design
//! Whether the compiler keeps a loop over an array in vector registers changes from build to build, and with it the
//! speed, by a factor of ten. Functions written with `F32x16` are inlined into a caller that is compiled for the
//! instruction level, see [`dispatch`](crate::isa::dispatch), and leave nothing to chance.

/// 1.5 · 2²³: adding it to a small float32 rounds to the nearest integer, ties to even, and leaves that integer in the
/// low bits of the sum.
pub const ROUND_TO_INTEGER: f32 = 12_582_912.0;

/// Sixteen float32 lanes.
///
/// # Safety
/// Every method requires that the processor has the type's instructions.
pub trait F32x16: Copy {
    /// Whether the type's instructions include AVX2 and FMA.
    const HAS_AVX2: bool;
    /// How many values of the type fit into the processor's registers.
    const REGISTERS: usize;

    /// # Safety
    /// See the trait; sixteen numbers can be read from `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// See the trait; sixteen numbers can be written to `to`.
    unsafe fn store(self, to: *mut f32);
    /// # Safety
    /// See the trait.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// See the trait.
    unsafe fn add(self, other: Self) -> Self;
    /// # Safety
    /// See the trait.
    unsafe fn mul(self, other: Self) -> Self;
    /// # Safety
    /// See the trait.
    unsafe fn div(self, other: Self) -> Self;
    /// `self · factor + addend`, rounded once where the processor has FMA.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The greater of both; `other` where either is NaN.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn max(self, other: Self) -> Self;
    /// The lesser of both; `other` where either is NaN.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn min(self, other: Self) -> Self;
    /// 2ⁿ, where n is the integer that adding [`ROUND_TO_INTEGER`] left in the low bits.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn exp2_of_low_bits(self) -> Self;
    /// `self`, but 0 in the lanes where `x < limit`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn zero_where_below(self, x: Self, limit: f32) -> Self;
}

/// For any processor.
#[derive(Clone, Copy)]
pub struct Portable([f32; 16]);

impl Portable {
    #[inline(always)]
    fn each(mut self, other: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
        for at in 0..16 {
            self.0[at] = f(self.0[at], other.0[at]);
        }
        self
    }
}

impl F32x16 for Portable {
    const HAS_AVX2: bool = false;
    const REGISTERS: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Portable {
        // SAFETY: the caller promises sixteen readable numbers.
        Portable(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises sixteen writable numbers.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Portable {
        Portable([x; 16])
    }

    #[inline(always)]
    unsafe fn add(self, other: Portable) -> Portable {
        self.each(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Portable) -> Portable {
        self.each(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Portable) -> Portable {
        self.each(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Portable, addend: Portable) -> Portable {
        self.each(factor, |a, b| a * b).each(addend, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Portable) -> Portable {
        self.each(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Portable) -> Portable {
        self.each(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn exp2_of_low_bits(self) -> Portable {
        self.each(self, |a, _| f32::from_bits((a.to_bits() << 23).wrapping_add(127 << 23)))
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, x: Portable, limit: f32) -> Portable {
        self.each(x, |a, x| if x < limit { 0.0 } else { a })
    }
}

#[cfg(target_arch = "x86_64")]
pub use registers::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::*;

    use super::F32x16;

    /// For AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    /// For AVX-512.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    macro_rules! both {
        ($intrinsic:ident: $($operand:expr),*) => {
            // SAFETY: the caller promises AVX2 and FMA.
            unsafe { Avx2($intrinsic($($operand.0),*), $intrinsic($($operand.1),*)) }
        };
    }

    impl F32x16 for Avx2 {
        const HAS_AVX2: bool = true;
        const REGISTERS: usize = 8;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Avx2 {
            // SAFETY: the caller promises AVX2 and FMA and sixteen readable numbers.
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller promises AVX2 and FMA and sixteen writable numbers.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx2 {
            // SAFETY: the caller promises AVX2 and FMA.
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
        unsafe fn mul_add(self, factor: Avx2, addend: Avx2) -> Avx2 {
            both!(_mm256_fmadd_ps: self, factor, addend)
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
        unsafe fn exp2_of_low_bits(self) -> Avx2 {
            // SAFETY: the caller promises AVX2 and FMA.
            unsafe {
                let one = _mm256_set1_epi32(127 << 23);
                let [low, high] = [_mm256_castps_si256(self.0), _mm256_castps_si256(self.1)];
                let [low, high] = [_mm256_slli_epi32::<23>(low), _mm256_slli_epi32::<23>(high)];
                let [low, high] = [_mm256_add_epi32(low, one), _mm256_add_epi32(high, one)];
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }

        #[inline(always)]
        unsafe fn zero_where_below(self, x: Avx2, limit: f32) -> Avx2 {
            // SAFETY: the caller promises AVX2 and FMA.
            unsafe {
                let limit = _mm256_set1_ps(limit);
                Avx2(
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit), self.0),
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit), self.1),
                )
            }
        }
    }

    impl F32x16 for Avx512 {
        const HAS_AVX2: bool = true;
        const REGISTERS: usize = 32;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Avx512 {
            // SAFETY: the caller promises AVX-512 and sixteen readable numbers.
            unsafe { Avx512(_mm512_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller promises AVX-512 and sixteen writable numbers.
            unsafe { _mm512_storeu_ps(to, self.0) };
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn div(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_div_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Avx512, addend: Avx512) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn min(self, other: Avx512) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe { Avx512(_mm512_min_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn exp2_of_low_bits(self) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe {
                let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Avx512(_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(127 << 23))))
            }
        }

        #[inline(always)]
        unsafe fn zero_where_below(self, x: Avx512, limit: f32) -> Avx512 {
            // SAFETY: the caller promises AVX-512.
            unsafe {
                let mask = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(limit));
                Avx512(_mm512_maskz_mov_ps(mask, self.0))
            }
        }
    }
}
