//! The functions that attention and logits are made of, over many numbers at a time.

use super::sixteen::Sixteen;

/// Numbers that are taken together.
const LANES: usize = 16;

/// The products of `a` with the rows `b [up to 8, the length of a]`.
#[inline(always)]
pub fn dots<S: Sixteen>(a: &[f32], b: &[f32], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if S::HAS_AVX2 && to.len() == 8 && a.len().is_multiple_of(8) {
        assert!(b.len() == 8 * a.len(), "rows as long as the other operand");
        // SAFETY: the processor has AVX2 and FMA, and all is within the operands.
        return to.copy_from_slice(&unsafe { eight_dots(a, b) });
    }
    for (to, b) in to.iter_mut().zip(b.chunks_exact(a.len())) {
        *to = 0.0;
        for (a, b) in a.iter().zip(b) {
            *to += a * b;
        }
    }
}

/// # Safety
/// The processor has AVX2 and FMA, `a` is of whole eights, and `b` is eight times as long.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn eight_dots(a: &[f32], b: &[f32]) -> [f32; 8] {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_ps(); 8];
    for at in (0..a.len()).step_by(8) {
        // SAFETY: the caller's.
        unsafe {
            let x = _mm256_loadu_ps(a.as_ptr().add(at));
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_fmadd_ps(x, _mm256_loadu_ps(b.as_ptr().add(row * a.len() + at)), *sum);
            }
        }
    }
    crate::product::across(sums)
}

/// The last numbers of a slice, followed by others.
#[inline(always)]
fn filled(rest: &[f32], with: f32) -> [f32; LANES] {
    let mut filled = [with; LANES];
    filled[..rest.len()].copy_from_slice(rest);
    filled
}

/// The greatest of all, and of `least`, numbers that are none apart.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn greatest<S: Sixteen>(x: &[f32], least: f32, of: impl Fn(S) -> S) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let rest = filled(rest, least);
    let mut lanes = [0.0; LANES];
    // SAFETY: sixteen numbers each; the rest is the caller's.
    unsafe {
        let mut greatest = of(S::load(rest.as_ptr())).max(S::splat(least));
        for chunk in chunks {
            greatest = of(S::load(chunk.as_ptr())).max(greatest);
        }
        greatest.store(lanes.as_mut_ptr());
    }
    lanes.into_iter().fold(least, f32::max)
}

/// The greatest without their signs, numbers that are none apart.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn largest<S: Sixteen>(x: &[f32]) -> f32 {
    // The greater one of a number and its opposite.
    // SAFETY: the caller's.
    unsafe { greatest::<S>(x, 0.0, |x| x.max(x.mul(S::splat(-1.0)))) }
}

/// A polynomial with these factors, from the highest power down.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn polynomial<S: Sixteen, const N: usize>(factors: [f32; N], x: S) -> S {
    // SAFETY: the caller's.
    unsafe {
        let mut sum = S::splat(factors[0]);
        for factor in &factors[1..] {
            sum = sum.fused(x, S::splat(*factor));
        }
        sum
    }
}

/// Beyond this, tanh is ±1 in float32.
const SATURATED: f32 = 9.02;
/// tanh y = y − y³/3 + 2y⁵/15 − …, in powers of y² from the sixth down: exact below, and without a division.
const NEAR_ZERO: f32 = 0.3;
const SERIES: [f32; 7] =
    [21_844.0 / 6_081_075.0, -1_382.0 / 155_925.0, 62.0 / 2_835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0];
/// Odd powers from the thirteenth down, over even ones from the sixth down: the rational function that Eigen has.
const ABOVE: [f32; 7] =
    [-2.760_768_4e-16, 2.000_188e-13, -8.604_672e-11, 5.122_297_3e-8, 1.485_722_35e-5, 6.372_619_5e-4, 4.893_524_6e-3];
const BELOW: [f32; 4] = [1.198_258_4e-6, 1.185_347_1e-4, 2.268_434_7e-3, 4.893_525e-3];

/// `cap · tanh(x / cap)`, by the quotient of two polynomials.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
pub unsafe fn softcap<S: Sixteen>(x: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    // SAFETY: the caller's.
    unsafe {
        let is_small = largest::<S>(x) * inverse < NEAR_ZERO;
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            capped::<S>(S::load(chunk.as_ptr()), cap, inverse, is_small).store(chunk.as_mut_ptr());
        }
        let mut last = filled(rest, 0.0);
        capped::<S>(S::load(last.as_ptr()), cap, inverse, is_small).store(last.as_mut_ptr());
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn capped<S: Sixteen>(x: S, cap: f32, inverse: f32, is_small: bool) -> S {
    // SAFETY: the caller's.
    unsafe {
        let y = x.mul(S::splat(inverse));
        if is_small {
            return x.mul(polynomial(SERIES, y.mul(y)));
        }
        // What is not a number stays so.
        let y = S::splat(-SATURATED).max(S::splat(SATURATED).min(y));
        let square = y.mul(y);
        S::splat(cap).mul(y.mul(polynomial(ABOVE, square)).div(polynomial(BELOW, square)))
    }
}

/// What [`tanhs`] finds.
pub struct Tanhs {
    /// The greatest, numbers that are none apart.
    pub greatest: f32,
    /// The sum of the exponentials.
    pub sum: f32,
}

/// `tanh(x)` of all, into `to` if there is such, and what there is to say of `cap` times these: the sum is of
/// `exp(cap · tanh(x) − cap)`, NaN if a number is. `cap` is positive.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
pub unsafe fn tanhs<S: Sixteen>(x: &[f32], mut to: Option<&mut [f32]>, cap: f32) -> Tanhs {
    assert!(to.as_ref().is_none_or(|to| to.len() == x.len()), "as many as there are");
    // SAFETY: sixteen numbers each; the rest is the caller's.
    unsafe {
        // Of results that are kept none is to depend on those beside it.
        let is_small = to.is_none() && largest::<S>(x) < NEAR_ZERO;
        let mut greatest = S::splat(f32::NEG_INFINITY);
        let mut sums = S::splat(0.0);
        let (chunks, rest) = x.as_chunks::<LANES>();
        for (at, chunk) in chunks.iter().enumerate() {
            let tanh = capped::<S>(S::load(chunk.as_ptr()), 1.0, 1.0, is_small);
            if let Some(to) = &mut to {
                tanh.store(to.as_mut_ptr().add(at * LANES));
            }
            greatest = tanh.max(greatest);
            sums = sums.add(exponential(tanh.fused(S::splat(cap), S::splat(-cap))));
        }
        if !rest.is_empty() {
            let mut last = filled(rest, 0.0);
            capped::<S>(S::load(last.as_ptr()), 1.0, 1.0, is_small).store(last.as_mut_ptr());
            if let Some(to) = &mut to {
                to[chunks.len() * LANES..].copy_from_slice(&last[..rest.len()]);
            }
            let last = filled(&last[..rest.len()], f32::NEG_INFINITY);
            let tanh = S::load(last.as_ptr());
            greatest = tanh.max(greatest);
            // Nothing of what is not there.
            sums = sums.add(exponential(tanh.fused(S::splat(cap), S::splat(-cap))));
        }
        let mut lanes = [0.0; LANES];
        greatest.store(lanes.as_mut_ptr());
        let greatest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        sums.store(lanes.as_mut_ptr());
        Tanhs { greatest, sum: lanes.into_iter().sum() }
    }
}

/// Makes `exp(x − max(x))` of all, and returns their sum; zeros if all are −∞.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
pub unsafe fn exponentials<S: Sixteen>(x: &mut [f32]) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let greatest = greatest::<S>(x, f32::NEG_INFINITY, |x| x);
        if greatest == f32::NEG_INFINITY {
            let sum = x.iter().sum::<f32>();
            x.fill(0.0);
            return if sum.is_nan() { sum } else { 0.0 };
        }
        let less = S::splat(-greatest);
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        let mut last = filled(rest, f32::NEG_INFINITY);
        let end = exponential(S::load(last.as_ptr()).add(less));
        end.store(last.as_mut_ptr());
        rest.copy_from_slice(&last[..rest.len()]);
        let mut sums = end;
        for chunk in chunks {
            let found = exponential(S::load(chunk.as_ptr()).add(less));
            found.store(chunk.as_mut_ptr());
            sums = sums.add(found);
        }
        sums.store(last.as_mut_ptr());
        last.iter().sum()
    }
}

/// eˣ for x ≤ 0, within 2 units in the last place; 0 below −87.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn exponential<S: Sixteen>(x: S) -> S {
    /// 1.5 · 2²³: added to a small number it leaves the nearest whole one in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    /// ln 2, of which the first part times a small whole number is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // The Taylor series is as good as any here: |r| ≤ ln 2 / 2.
    const FACTORS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    const LEAST: f32 = -87.0;
    // SAFETY: the caller's.
    unsafe {
        let clamped = S::splat(LEAST).max(x);
        let shifted = clamped.fused(S::splat(std::f32::consts::LOG2_E), S::splat(SHIFT));
        let whole = shifted.add(S::splat(-SHIFT));
        let rest = whole.fused(S::splat(-LN_2[0]), clamped);
        let rest = whole.fused(S::splat(-LN_2[1]), rest);
        polynomial(FACTORS, rest).mul(shifted.power_of_two()).zero_below(x, LEAST)
    }
}

/// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))` of all, into `y`.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
pub unsafe fn gelus<S: Sixteen>(x: &[f32], y: &mut [f32]) {
    assert!(x.len() == y.len(), "as many as there are");
    let (chunks, rest) = x.as_chunks::<LANES>();
    // SAFETY: sixteen numbers each; the rest is the caller's.
    unsafe {
        for (at, chunk) in chunks.iter().enumerate() {
            gelu(S::load(chunk.as_ptr())).store(y.as_mut_ptr().add(at * LANES));
        }
        let mut last = filled(rest, 0.0);
        gelu(S::load(last.as_ptr())).store(last.as_mut_ptr());
        y[chunks.len() * LANES..].copy_from_slice(&last[..rest.len()]);
    }
}

/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn gelu<S: Sixteen>(x: S) -> S {
    /// √(2/π), and with it the factor of x³.
    const FACTORS: [f32; 2] = [0.797_884_6, 0.044_715 * 0.797_884_6];
    // SAFETY: the caller's.
    unsafe {
        let inner = x.mul(x.mul(x).fused(S::splat(FACTORS[1]), S::splat(FACTORS[0])));
        let half = x.mul(S::splat(0.5));
        capped::<S>(inner, 1.0, 1.0, false).fused(half, half)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sixteen::Plain;
    use super::*;

    #[test]
    fn functions_are_those_of_float64() {
        let xs: Vec<f32> = (-40_000..=40_000).map(|at| at as f32 / 300.0).collect();
        let mut capped = xs.clone();
        // SAFETY: for any processor, here and below.
        unsafe { softcap::<Plain>(&mut capped, 7.0) };
        for (&x, &found) in xs.iter().zip(&capped) {
            let expected = 7.0 * (f64::from(x) / 7.0).tanh();
            assert!((f64::from(found) - expected).abs() <= 4e-7 * expected.abs(), "{x}: {found}, {expected}");
        }
        for (x, expected) in [(2.0, 0.3_f64), (2.0, 0.29), (1.0, 0.1)].map(|(cap, y)| (cap * y, cap * y.tanh())) {
            let (mut found, cap) = ([x as f32], if x > 0.5 { 2.0 } else { 1.0 });
            // SAFETY: see above.
            unsafe { softcap::<Plain>(&mut found, cap) };
            assert!((f64::from(found[0]) / expected - 1.0).abs() < 2e-7, "{x}: {}, {expected}", found[0]);
        }
        let mut small = [1e-30, -1e-5, 0.0, f32::NAN];
        // SAFETY: see above.
        unsafe { softcap::<Plain>(&mut small, 50.0) };
        assert!((small[0] / 1e-30 - 1.0).abs() < 1e-6 && (small[1] / -1e-5 - 1.0).abs() < 1e-6);
        assert!(small[2] == 0.0 && small[3].is_nan());

        let mut powers: Vec<f32> = xs.iter().map(|x| x - xs[xs.len() - 1]).collect();
        let expected: Vec<f64> = powers.iter().map(|&x| f64::from(x).exp()).collect();
        // SAFETY: see above.
        let sum = unsafe { exponentials::<Plain>(&mut powers) };
        for (&found, expected) in powers.iter().zip(&expected) {
            let apart = (f64::from(found) - expected).abs();
            assert!(apart <= 3e-7 * expected || *expected < 1.1 * (-87.0_f64).exp(), "{found}, {expected}");
        }
        assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn gelus_are_those_of_float64() {
        let x: Vec<f32> = (-4_003..=4_003).map(|at| at as f32 / 400.0).collect();
        let mut y = vec![f32::NAN; x.len()];
        // SAFETY: for any processor, here and below.
        unsafe { gelus::<Plain>(&x, &mut y) };
        for (&x, &y) in x.iter().zip(&y) {
            let x = f64::from(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            assert!((f64::from(y) - x / 2.0 * (1.0 + inner.tanh())).abs() < 1e-6, "{x}: {y}");
        }
        let (mut y, x) = ([1.0; 3], [f32::NAN, 0.0, 1e30]);
        // SAFETY: see above.
        unsafe { gelus::<Plain>(&x, &mut y) };
        assert!(y[0].is_nan() && y[1] == 0.0 && (y[2] / 1e30 - 1.0).abs() < 1e-6, "{y:?}");
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        // SAFETY: for any processor.
        let exponentials = |x: &mut [f32]| unsafe { exponentials::<Plain>(x) };
        for x in [[f32::NAN; 3], [0.0, f32::NAN, 1.0], [f32::NEG_INFINITY, f32::NAN, f32::NEG_INFINITY]] {
            assert!(exponentials(&mut x.clone()).is_nan());
        }
        let mut none = [f32::NEG_INFINITY; 9];
        assert!(exponentials(&mut none) == 0.0 && none == [0.0; 9]);
        let mut one = [f32::NEG_INFINITY, 3.0];
        assert!(exponentials(&mut one) == 1.0 && one == [0.0, 1.0]);
    }
}
