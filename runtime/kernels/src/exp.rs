//! Two exponential functions: [`exp`] gives the same bits at every instruction level, because candidates are chosen by
//! its results; [`exp_x16`] uses FMA if the processor has it, for sums that only have to be accurate.

use crate::simd::{F32x16, ROUND_TO_INTEGER};

/// ln 2 in two parts; the first has so few bits that its product with a small integer is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Below this, e^x is hardly a normal float32.
const LEAST: f32 = -87.0;

/// e^x for x ≤ 0, to 2 units in the last place; NaN for NaN, and e^−87 (below 2e-38) for anything under −87.
///
/// `f32::exp` is a call per element, which keeps a loop over the vocabulary from being vectorized.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = if x < LEAST { LEAST } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND_TO_INTEGER;
    let n = shifted - ROUND_TO_INTEGER;
    // Cephes' polynomial for e^r on |r| ≤ ln 2 / 2.
    let r = x - n * LN_2[0] - n * LN_2[1];
    let series = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1];
    let p = series.into_iter().fold(1.987_569_1e-4, |p, c| p * r + c);
    let two_to_n = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND_TO_INTEGER.to_bits()).wrapping_add(127) << 23);
    (p * r * r + r + 1.0) * two_to_n
}

/// e^x for x ≤ 0, to 2 units in the last place; NaN for NaN, and 0 below −87.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn exp_x16<S: F32x16>(x: S) -> S {
    // With FMA the Taylor series is as good as any: |r| ≤ ln 2 / 2.
    const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    // SAFETY: the caller promises the instructions of `S`.
    unsafe {
        let clamped = S::splat(LEAST).max(x);
        let shifted = clamped.mul_add(S::splat(std::f32::consts::LOG2_E), S::splat(ROUND_TO_INTEGER));
        let n = shifted.add(S::splat(-ROUND_TO_INTEGER));
        let r = n.mul_add(S::splat(-LN_2[0]), clamped);
        let r = n.mul_add(S::splat(-LN_2[1]), r);
        polynomial(TAYLOR, r).mul(shifted.exp2_of_low_bits()).zero_where_below(x, LEAST)
    }
}

/// The polynomial with these coefficients, highest power first.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn polynomial<S: F32x16, const N: usize>(coefficients: [f32; N], x: S) -> S {
    // SAFETY: the caller promises the instructions of `S`.
    unsafe {
        let mut sum = S::splat(coefficients[0]);
        for coefficient in &coefficients[1..] {
            sum = sum.mul_add(x, S::splat(*coefficient));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;

    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn exp_of_chunks<S: F32x16>(x: &mut [f32]) {
        for chunk in x.as_chunks_mut::<16>().0 {
            // SAFETY: a chunk has sixteen numbers; the caller promises the instructions of `S`.
            unsafe { exp_x16(S::load(chunk.as_ptr())).store(chunk.as_mut_ptr()) };
        }
    }

    crate::isa::dispatch! {
        fn exp_of_slice(x: &mut [f32]) = exp_of_chunks
    }

    #[test]
    fn both_exponentials_are_good_to_two_units_in_the_last_place() {
        for step in 0..=870_000 {
            let x = -(step as f32) / 10_000.0;
            let (exact, fast) = (f64::from(x).exp(), f64::from(exp(x)));
            assert!((fast / exact - 1.0).abs() < 2.4e-7, "e^{x} is {exact:e}, not {fast:e}");
        }
        at_each_level(Level::Generic, |level| {
            let x: Vec<f32> = (0..87_008).map(|step| -(step as f32) / 1_000.0).collect();
            let mut found = x.clone();
            exp_of_slice(&mut found);
            for (x, found) in x.into_iter().zip(found).filter(|(x, _)| *x >= LEAST) {
                let (exact, found) = (f64::from(x).exp(), f64::from(found));
                assert!((found / exact - 1.0).abs() < 2.4e-7, "{level:?}: e^{x} is {exact:e}, not {found:e}");
            }
            let mut special = [f32::NEG_INFINITY; 16];
            (special[0], special[1]) = (f32::NAN, 0.0);
            exp_of_slice(&mut special);
            assert!(special[0].is_nan() && special[1] == 1.0 && special[2..] == [0.0; 14], "{level:?}: {special:?}");
        });
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) > 0.0 && exp(f32::NEG_INFINITY) < 2e-38);
        assert!(exp(f32::NAN).is_nan());
    }
}
