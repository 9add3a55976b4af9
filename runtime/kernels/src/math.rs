//! Vectorized functions for attention, activations and logits: dot products, softmax, soft-capping, tanh and
//! GELU.

use crate::exp::{exp_x16, polynomial};
use crate::simd::F32x16;

const LANES: usize = 16;

/// The dot products of `a` with the rows of `b [up to 8, a.len()]`.
#[inline(always)]
pub fn dot_products<S: F32x16>(a: &[f32], b: &[f32], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if S::HAS_AVX2 && to.len() == 8 && a.len().is_multiple_of(8) {
        assert!(b.len() == 8 * a.len(), "rows as long as the other operand");
        // SAFETY: the instructions of `S`, with which the caller is compiled, include AVX2 and FMA; the lengths were
        // checked.
        return to.copy_from_slice(&unsafe { eight_dot_products(a, b) });
    }
    for (to, b) in to.iter_mut().zip(b.chunks_exact(a.len())) {
        *to = 0.0;
        for (a, b) in a.iter().zip(b) {
            *to += a * b;
        }
    }
}

/// # Safety
/// The processor has AVX2 and FMA, the length of `a` is a multiple of 8, and `b` is eight times as long.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn eight_dot_products(a: &[f32], b: &[f32]) -> [f32; 8] {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_ps(); 8];
    for at in (0..a.len()).step_by(8) {
        // SAFETY: the caller promises that `a` and the eight rows of `b` have eight numbers at `at`.
        unsafe {
            let x = _mm256_loadu_ps(a.as_ptr().add(at));
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_fmadd_ps(x, _mm256_loadu_ps(b.as_ptr().add(row * a.len() + at)), *sum);
            }
        }
    }
    crate::avx2::horizontal_sums(sums)
}

/// The last numbers of a slice, padded.
#[inline(always)]
fn padded(rest: &[f32], padding: f32) -> [f32; LANES] {
    let mut padded = [padding; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

/// The maximum of `least` and `map(x)` of all `x`, NaN ignored.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn maximum<S: F32x16>(x: &[f32], least: f32, map: impl Fn(S) -> S) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let rest = padded(rest, least);
    let mut lanes = [0.0; LANES];
    // SAFETY: chunks have sixteen numbers; the caller promises the instructions of `S`.
    unsafe {
        let mut maximum = map(S::load(rest.as_ptr())).max(S::splat(least));
        for chunk in chunks {
            maximum = map(S::load(chunk.as_ptr())).max(maximum);
        }
        maximum.store(lanes.as_mut_ptr());
    }
    lanes.into_iter().fold(least, f32::max)
}

/// The greatest absolute value, NaN ignored.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn absolute_maximum<S: F32x16>(x: &[f32]) -> f32 {
    // SAFETY: the caller promises the instructions of `S`.
    unsafe { maximum::<S>(x, 0.0, |x| x.max(x.mul(S::splat(-1.0)))) }
}

/// Beyond this, tanh is ±1 in float32.
const SATURATED: f32 = 9.02;
/// Below this the Taylor series is exact, and needs no division.
const NEAR_ZERO: f32 = 0.3;
/// tanh(y) / y = 1 − y²/3 + 2y⁴/15 − …, in powers of y² from the sixth down.
const SERIES: [f32; 7] =
    [21_844.0 / 6_081_075.0, -1_382.0 / 155_925.0, 62.0 / 2_835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0];
/// Eigen's rational approximation of tanh: odd powers from the thirteenth down, over even ones from the sixth down.
const NUMERATOR: [f32; 7] =
    [-2.760_768_4e-16, 2.000_188e-13, -8.604_672e-11, 5.122_297_3e-8, 1.485_722_35e-5, 6.372_619_5e-4, 4.893_524_6e-3];
const DENOMINATOR: [f32; 4] = [1.198_258_4e-6, 1.185_347_1e-4, 2.268_434_7e-3, 4.893_525e-3];

/// Replaces every `x` by `cap · tanh(x / cap)`.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn softcap<S: F32x16>(x: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    // SAFETY: chunks have sixteen numbers; the caller promises the instructions of `S`.
    unsafe {
        let is_small = absolute_maximum::<S>(x) * inverse < NEAR_ZERO;
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            softcap_x16::<S>(S::load(chunk.as_ptr()), cap, inverse, is_small).store(chunk.as_mut_ptr());
        }
        let mut last = padded(rest, 0.0);
        softcap_x16::<S>(S::load(last.as_ptr()), cap, inverse, is_small).store(last.as_mut_ptr());
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn softcap_x16<S: F32x16>(x: S, cap: f32, inverse: f32, is_small: bool) -> S {
    // SAFETY: the caller promises the instructions of `S`.
    unsafe {
        let y = x.mul(S::splat(inverse));
        if is_small {
            return x.mul(polynomial(SERIES, y.mul(y)));
        }
        // The operands are in this order so that NaN stays NaN.
        let y = S::splat(-SATURATED).max(S::splat(SATURATED).min(y));
        let square = y.mul(y);
        S::splat(cap).mul(y.mul(polynomial(NUMERATOR, square)).div(polynomial(DENOMINATOR, square)))
    }
}

/// The statistics from [`tanh_with_stats`].
pub struct TanhStats {
    /// The greatest tanh, NaN ignored.
    pub max: f32,
    /// The sum of `exp(cap · tanh(x) − cap)`; NaN if one of the numbers is.
    pub exp_sum: f32,
}

/// `tanh(x)` of all numbers, written to `to` if there is one, and statistics of `cap` times these; `cap` is positive.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn tanh_with_stats<S: F32x16>(x: &[f32], mut to: Option<&mut [f32]>, cap: f32) -> TanhStats {
    assert!(to.as_ref().is_none_or(|to| to.len() == x.len()), "as many results as numbers");
    // SAFETY: chunks have sixteen numbers, and so does `to` at each; the caller promises the instructions of `S`.
    unsafe {
        // A result that is kept must not depend on its neighbours.
        let is_small = to.is_none() && absolute_maximum::<S>(x) < NEAR_ZERO;
        let mut max = S::splat(f32::NEG_INFINITY);
        let mut sums = S::splat(0.0);
        let (chunks, rest) = x.as_chunks::<LANES>();
        for (at, chunk) in chunks.iter().enumerate() {
            let tanh = softcap_x16::<S>(S::load(chunk.as_ptr()), 1.0, 1.0, is_small);
            if let Some(to) = &mut to {
                tanh.store(to.as_mut_ptr().add(at * LANES));
            }
            max = tanh.max(max);
            sums = sums.add(exp_x16(tanh.mul_add(S::splat(cap), S::splat(-cap))));
        }
        if !rest.is_empty() {
            let mut last = padded(rest, 0.0);
            softcap_x16::<S>(S::load(last.as_ptr()), 1.0, 1.0, is_small).store(last.as_mut_ptr());
            if let Some(to) = &mut to {
                to[chunks.len() * LANES..].copy_from_slice(&last[..rest.len()]);
            }
            // −∞ adds nothing to the sum.
            let last = padded(&last[..rest.len()], f32::NEG_INFINITY);
            let tanh = S::load(last.as_ptr());
            max = tanh.max(max);
            sums = sums.add(exp_x16(tanh.mul_add(S::splat(cap), S::splat(-cap))));
        }
        let mut lanes = [0.0; LANES];
        max.store(lanes.as_mut_ptr());
        let max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        sums.store(lanes.as_mut_ptr());
        TanhStats { max, exp_sum: lanes.into_iter().sum() }
    }
}

/// What the numerators of a softmax are relative to, and what they are divided by.
#[derive(Clone, Copy)]
pub struct Denominator {
    pub max: f32,
    pub sum: f32,
}

/// Replaces every `x` by `exp(x − max(x))` and returns the maximum and their sum; zeros if all are −∞.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn softmax_numerators<S: F32x16>(x: &mut [f32]) -> Denominator {
    // SAFETY: chunks have sixteen numbers; the caller promises the instructions of `S`.
    unsafe {
        let max = maximum::<S>(x, f32::NEG_INFINITY, |x| x);
        if max == f32::NEG_INFINITY {
            let sum = x.iter().sum::<f32>();
            x.fill(0.0);
            return Denominator { max, sum: if sum.is_nan() { sum } else { 0.0 } };
        }
        let shift = S::splat(-max);
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        let mut last = padded(rest, f32::NEG_INFINITY);
        let end = exp_x16(S::load(last.as_ptr()).add(shift));
        end.store(last.as_mut_ptr());
        rest.copy_from_slice(&last[..rest.len()]);
        let mut sums = end;
        for chunk in chunks {
            let numerators = exp_x16(S::load(chunk.as_ptr()).add(shift));
            numerators.store(chunk.as_mut_ptr());
            sums = sums.add(numerators);
        }
        sums.store(last.as_mut_ptr());
        Denominator { max, sum: last.iter().sum() }
    }
}

/// `y = x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))` of all numbers.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn gelu<S: F32x16>(x: &[f32], y: &mut [f32]) {
    assert!(x.len() == y.len(), "as many results as numbers");
    let (chunks, rest) = x.as_chunks::<LANES>();
    // SAFETY: chunks have sixteen numbers, and so does `y` at each; the caller promises the instructions of `S`.
    unsafe {
        for (at, chunk) in chunks.iter().enumerate() {
            gelu_x16(S::load(chunk.as_ptr())).store(y.as_mut_ptr().add(at * LANES));
        }
        let mut last = padded(rest, 0.0);
        gelu_x16(S::load(last.as_ptr())).store(last.as_mut_ptr());
        y[chunks.len() * LANES..].copy_from_slice(&last[..rest.len()]);
    }
}

/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn gelu_x16<S: F32x16>(x: S) -> S {
    /// √(2/π), and its product with the coefficient of x³.
    const COEFFICIENTS: [f32; 2] = [0.797_884_6, 0.044_715 * 0.797_884_6];
    // SAFETY: the caller promises the instructions of `S`.
    unsafe {
        let inner = x.mul(x.mul(x).mul_add(S::splat(COEFFICIENTS[1]), S::splat(COEFFICIENTS[0])));
        let half = x.mul(S::splat(0.5));
        softcap_x16::<S>(inner, 1.0, 1.0, false).mul_add(half, half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::dispatch;
    use crate::isa::testing::at_each_level;

    dispatch! {
        fn softcap_of(x: &mut [f32], cap: f32) = softcap
    }
    dispatch! {
        fn softmax_numerators_of(x: &mut [f32]) -> Denominator = softmax_numerators
    }
    dispatch! {
        fn gelu_of(x: &[f32], y: &mut [f32]) = gelu
    }

    #[test]
    fn softcap_and_softmax_are_those_of_float64() {
        at_each_level(Level::Generic, |level| {
            let xs: Vec<f32> = (-40_000..=40_000).map(|at| at as f32 / 300.0).collect();
            let mut capped = xs.clone();
            softcap_of(&mut capped, 7.0);
            for (&x, &found) in xs.iter().zip(&capped) {
                let expected = 7.0 * (f64::from(x) / 7.0).tanh();
                let apart = (f64::from(found) - expected).abs();
                assert!(apart <= 4e-7 * expected.abs(), "{level:?}: {x}: {found}, {expected}");
            }
            // Around the end of the series.
            for (cap, y) in [(2.0_f32, 0.3_f32), (2.0, 0.29), (1.0, 0.1)] {
                let mut found = [cap * y];
                softcap_of(&mut found, cap);
                let expected = f64::from(cap) * (f64::from(cap * y) / f64::from(cap)).tanh();
                let apart = (f64::from(found[0]) / expected - 1.0).abs();
                assert!(apart < 2e-7, "{level:?}: {cap}, {y}: {}, {expected}", found[0]);
            }
            let mut small = [1e-30, -1e-5, 0.0, f32::NAN];
            softcap_of(&mut small, 50.0);
            assert!((small[0] / 1e-30 - 1.0).abs() < 1e-6 && (small[1] / -1e-5 - 1.0).abs() < 1e-6);
            assert!(small[2] == 0.0 && small[3].is_nan());

            let mut numerators: Vec<f32> = xs.iter().map(|x| x - xs[xs.len() - 1]).collect();
            let expected: Vec<f64> = numerators.iter().map(|&x| f64::from(x).exp()).collect();
            let sum = softmax_numerators_of(&mut numerators).sum;
            for (&found, expected) in numerators.iter().zip(&expected) {
                let apart = (f64::from(found) - expected).abs();
                let is_tiny = *expected < 1.1 * (-87.0_f64).exp();
                assert!(apart <= 3e-7 * expected || is_tiny, "{level:?}: {found}, {expected}");
            }
            assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-5);
        });
    }

    #[test]
    fn gelu_is_that_of_float64() {
        at_each_level(Level::Generic, |level| {
            let x: Vec<f32> = (-4_003..=4_003).map(|at| at as f32 / 400.0).collect();
            let mut y = vec![f32::NAN; x.len()];
            gelu_of(&x, &mut y);
            for (&x, &y) in x.iter().zip(&y) {
                let x = f64::from(x);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                assert!((f64::from(y) - x / 2.0 * (1.0 + inner.tanh())).abs() < 1e-6, "{level:?}: {x}: {y}");
            }
            let (mut y, x) = ([1.0; 3], [f32::NAN, 0.0, 1e30]);
            gelu_of(&x, &mut y);
            assert!(y[0].is_nan() && y[1] == 0.0 && (y[2] / 1e30 - 1.0).abs() < 1e-6, "{level:?}: {y:?}");
        });
    }

    #[test]
    fn nan_and_infinity_are_not_hidden() {
        at_each_level(Level::Generic, |level| {
            for mut x in [[f32::NAN; 3], [0.0, f32::NAN, 1.0], [f32::NEG_INFINITY, f32::NAN, f32::NEG_INFINITY]] {
                assert!(softmax_numerators_of(&mut x).sum.is_nan(), "{level:?}");
            }
            let mut none = [f32::NEG_INFINITY; 9];
            assert!(softmax_numerators_of(&mut none).sum == 0.0 && none == [0.0; 9], "{level:?}");
            let mut one = [f32::NEG_INFINITY, 3.0];
            assert!(softmax_numerators_of(&mut one).sum == 1.0 && one == [0.0, 1.0], "{level:?}");
        });
    }
}
