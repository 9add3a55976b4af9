//! The functions that attention is made of, over many numbers at a time.

/// `a·b + c`, rounded once where the processor can.
#[inline(always)]
fn fused<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `to + factor · x`.
#[inline(always)]
pub fn multiply_add<const FUSED: bool, const N: usize>(to: &mut [f32; N], factor: f32, x: &[f32; N]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to = fused::<FUSED>(factor, *x, *to);
    }
}

/// The products of `a` with the rows `b [up to 8, the length of a]`.
#[inline(always)]
pub fn dots<const FUSED: bool>(a: &[f32], b: &[f32], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if FUSED && to.len() == 8 && a.len().is_multiple_of(8) {
        assert!(b.len() == 8 * a.len(), "rows as long as the other operand");
        // SAFETY: `FUSED` is for processors that have AVX2 and FMA, and all is within the operands.
        return to.copy_from_slice(&unsafe { eight_dots(a, b) });
    }
    for (to, b) in to.iter_mut().zip(b.chunks_exact(a.len())) {
        *to = a.iter().zip(b).fold(0.0, |sum, (a, b)| fused::<FUSED>(*a, *b, sum));
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
    crate::kernels::product::across(sums)
}

/// Beyond this, tanh is ±1 in float32.
const SATURATED: f32 = 9.02;

/// `cap · tanh(x / cap)`, by the quotient of two polynomials.
#[inline(always)]
pub fn softcap<const FUSED: bool>(x: &mut [f32], cap: f32) {
    // Odd powers from the thirteenth down, over even ones from the sixth down: the rational function that Eigen has.
    const ABOVE: [f32; 7] = [
        -2.760_768_4e-16,
        2.000_188e-13,
        -8.604_672e-11,
        5.122_297_3e-8,
        1.485_722_35e-5,
        6.372_619_5e-4,
        4.893_524_6e-3,
    ];
    const BELOW: [f32; 4] = [1.198_258_4e-6, 1.185_347_1e-4, 2.268_434_7e-3, 4.893_525e-3];
    // tanh y = y − y³/3 + 2y⁵/15 − …, in powers of y² from the sixth down: exact below, and without a division.
    const NEAR_ZERO: f32 = 0.3;
    const SERIES: [f32; 7] =
        [21_844.0 / 6_081_075.0, -1_382.0 / 155_925.0, 62.0 / 2_835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0];
    let inverse = 1.0 / cap;
    let mut lanes = [0.0_f32; 8];
    let (eights, rest) = x.as_chunks::<8>();
    for eight in eights {
        for (lane, x) in lanes.iter_mut().zip(eight) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    let largest = lanes.iter().chain(rest).fold(0.0, |largest: f32, x| largest.max(x.abs()));
    if largest * inverse < NEAR_ZERO {
        for x in x {
            let y = *x * inverse;
            let square = y * y;
            let series = SERIES[1..].iter().fold(SERIES[0], |sum, factor| fused::<FUSED>(sum, square, *factor));
            *x *= series;
        }
        return;
    }
    for x in x {
        // Comparisons keep a NaN.
        let y = *x * inverse;
        let y = if y > SATURATED { SATURATED } else { y };
        let y = if y < -SATURATED { -SATURATED } else { y };
        let square = y * y;
        let above = ABOVE[1..].iter().fold(ABOVE[0], |sum, factor| fused::<FUSED>(sum, square, *factor));
        let below = BELOW[1..].iter().fold(BELOW[0], |sum, factor| fused::<FUSED>(sum, square, *factor));
        *x = cap * (y * above / below);
    }
}

/// Makes `exp(x − max(x))` of all, and returns their sum; zeros if all are −∞.
#[inline(always)]
pub fn exponentials<const FUSED: bool>(x: &mut [f32]) -> f32 {
    let mut greatest = [f32::NEG_INFINITY; 8];
    let (eights, rest) = x.as_chunks::<8>();
    for eight in eights {
        for (greatest, x) in greatest.iter_mut().zip(eight) {
            *greatest = if *x > *greatest { *x } else { *greatest };
        }
    }
    let greatest = greatest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    if greatest == f32::NEG_INFINITY {
        let sum = x.iter().sum::<f32>();
        x.fill(0.0);
        return if sum.is_nan() { sum } else { 0.0 };
    }
    let mut sums = [0.0_f32; 8];
    let (eights, rest) = x.as_chunks_mut::<8>();
    for eight in eights {
        for (sum, x) in sums.iter_mut().zip(eight) {
            *x = exponential::<FUSED>(*x - greatest);
            *sum += *x;
        }
    }
    let mut sum = sums.iter().sum();
    for x in rest {
        *x = exponential::<FUSED>(*x - greatest);
        sum += *x;
    }
    sum
}

/// eˣ for x ≤ 0, within 2 units in the last place; 0 below −87.
#[inline(always)]
fn exponential<const FUSED: bool>(x: f32) -> f32 {
    /// 1.5 · 2²³: added to a small number it leaves the nearest whole one in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    /// ln 2, of which the first part times a small whole number is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // The Taylor series is as good as any here: |r| ≤ ln 2 / 2.
    const FACTORS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = fused::<FUSED>(clamped, std::f32::consts::LOG2_E, SHIFT);
    let whole = shifted - SHIFT;
    let rest = fused::<FUSED>(-whole, LN_2[1], fused::<FUSED>(-whole, LN_2[0], clamped));
    let power = FACTORS[1..].iter().fold(FACTORS[0], |sum, factor| fused::<FUSED>(sum, rest, *factor));
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let found = power * scale;
    if x < -87.0 { 0.0 } else { found }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_those_of_float64() {
        let xs: Vec<f32> = (-40_000..=40_000).map(|at| at as f32 / 300.0).collect();
        let mut capped = xs.clone();
        softcap::<false>(&mut capped, 7.0);
        for (&x, &found) in xs.iter().zip(&capped) {
            let expected = 7.0 * (f64::from(x) / 7.0).tanh();
            assert!((f64::from(found) - expected).abs() <= 4e-7 * expected.abs(), "{x}: {found}, {expected}");
        }
        for (x, expected) in [(2.0, 0.3_f64), (2.0, 0.29), (1.0, 0.1)].map(|(cap, y)| (cap * y, cap * y.tanh())) {
            let (mut found, cap) = ([x as f32], if x > 0.5 { 2.0 } else { 1.0 });
            softcap::<false>(&mut found, cap);
            assert!((f64::from(found[0]) / expected - 1.0).abs() < 2e-7, "{x}: {}, {expected}", found[0]);
        }
        let mut small = [1e-30, -1e-5, 0.0, f32::NAN];
        softcap::<false>(&mut small, 50.0);
        assert!((small[0] / 1e-30 - 1.0).abs() < 1e-6 && (small[1] / -1e-5 - 1.0).abs() < 1e-6);
        assert!(small[2] == 0.0 && small[3].is_nan());

        let mut powers: Vec<f32> = xs.iter().map(|x| x - xs[xs.len() - 1]).collect();
        let expected: Vec<f64> = powers.iter().map(|&x| f64::from(x).exp()).collect();
        let sum = exponentials::<false>(&mut powers);
        for (&found, expected) in powers.iter().zip(&expected) {
            let apart = (f64::from(found) - expected).abs();
            assert!(apart <= 3e-7 * expected || *expected < 1.1 * (-87.0_f64).exp(), "{found}, {expected}");
        }
        assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for x in [[f32::NAN; 3], [0.0, f32::NAN, 1.0], [f32::NEG_INFINITY, f32::NAN, f32::NEG_INFINITY]] {
            assert!(exponentials::<false>(&mut x.clone()).is_nan());
        }
        let mut none = [f32::NEG_INFINITY; 9];
        assert!(exponentials::<false>(&mut none) == 0.0 && none == [0.0; 9]);
        let mut one = [f32::NEG_INFINITY, 3.0];
        assert!(exponentials::<false>(&mut one) == 1.0 && one == [0.0, 1.0]);
    }
}
