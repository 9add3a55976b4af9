//! Log-softmax over a row of scores, and the exponential it is made of. The results are the same, bit for bit, at every instruction level:
//! no operation is fused, and the order of the sums is fixed.

#[cfg(target_arch = "x86_64")]
use crate::processor::{Level, level};

/// The log-sum-exp of a row in two parts, which log-softmax subtracts one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogSumExp {
    /// The greatest score.
    pub max: f32,
    /// The logarithm of the sum of `exp(x − max)`.
    pub log_sum: f32,
}

/// Independent accumulators, so that the compiler can keep them in vector registers.
const LANES: usize = 16;

impl LogSumExp {
    /// Subtracts nothing.
    pub const ZERO: LogSumExp = LogSumExp { max: 0.0, log_sum: 0.0 };
    /// Scores that are summed in float32 before the sum goes on in float64.
    pub const BLOCK: usize = 64 * LANES;

    /// The log-sum-exp of a row; NaN if it holds a NaN or +∞, or −∞ alone.
    pub fn of(row: &[f32]) -> LogSumExp {
        LogSumExp::with_block_maxima(row, &mut Vec::new())
    }

    /// [`LogSumExp::of`], which also replaces `block_maxima` by the maximum of each [`LogSumExp::BLOCK`] scores, NaN ignored: both in one
    /// pass, since the row comes from memory.
    pub fn with_block_maxima(row: &[f32], block_maxima: &mut Vec<f32>) -> LogSumExp {
        block_maxima.clear();
        #[cfg(target_arch = "x86_64")]
        match level() {
            // SAFETY: `level` returns what the processor supports.
            Level::Amx | Level::Vnni => return unsafe { LogSumExp::with_avx512(row, block_maxima) },
            // SAFETY: `level` returns what the processor supports.
            Level::Avx2 => return unsafe { LogSumExp::with_avx2(row, block_maxima) },
            Level::Generic => {}
        }
        LogSumExp::portable(row, block_maxima)
    }

    /// Takes a quarter of the portable version's time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn with_avx512(row: &[f32], block_maxima: &mut Vec<f32>) -> LogSumExp {
        LogSumExp::portable(row, block_maxima)
    }

    /// Takes half of the portable version's time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn with_avx2(row: &[f32], block_maxima: &mut Vec<f32>) -> LogSumExp {
        LogSumExp::portable(row, block_maxima)
    }

    #[inline(always)]
    fn portable(row: &[f32], block_maxima: &mut Vec<f32>) -> LogSumExp {
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        // Blocks keep the float32 sums short; NaN and infinities reach the sum.
        // Loops, not iterator adapters: a callee that is not inlined is compiled without the caller's target features.
        for block in row.chunks(LogSumExp::BLOCK) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for_lanes(block, |lane, x| lanes[lane] = if x > lanes[lane] { x } else { lanes[lane] });
            let of_block = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
            block_maxima.push(of_block);
            if of_block > max {
                sum *= (f64::from(max) - f64::from(of_block)).exp();
                max = of_block;
            }
            // As long as all scores are −∞, none may count.
            let shift = if max == f32::NEG_INFINITY { f32::MAX } else { max };
            let mut lanes = [0.0f32; LANES];
            for_lanes(block, |lane, x| lanes[lane] += exp(x - shift));
            let mut of_block = 0.0;
            for lane in lanes {
                of_block += f64::from(lane);
            }
            sum += of_block;
        }
        if max == f32::NEG_INFINITY {
            sum = f64::NAN;
        }
        LogSumExp { max, log_sum: sum.ln() as f32 }
    }

    /// Turns the row's scores into log-probabilities.
    #[inline]
    pub fn apply(self, row: &mut [f32]) {
        for x in row {
            *x = self.log_probability(*x);
        }
    }

    /// The log-probability of a score of the row.
    #[inline(always)]
    pub fn log_probability(self, x: f32) -> f32 {
        x - self.max - self.log_sum
    }
}

#[inline(always)]
fn for_lanes(row: &[f32], mut visit: impl FnMut(usize, f32)) {
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in chunk.iter().enumerate() {
            visit(lane, x);
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        visit(lane, x);
    }
}

/// e^x for x ≤ 0, to 2 units in the last place; NaN for NaN, and e^−87 (below 2e-38) for anything under −87.
///
/// `f32::exp` is a call per element, which keeps a loop over the vocabulary from being vectorised.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves an integer in the low bits of the mantissa
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that n · ln 2 is subtracted exactly; then Cephes' polynomial for e^r on |r| ≤ ln 2 / 2.
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let series = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1];
    let p = series.into_iter().fold(1.987_569_1e-4, |p, c| p * r + c);
    let two_to_n = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    (p * r * r + r + 1.0) * two_to_n
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;

    /// `len` numbers between −`scale` and `scale`.
    fn noise(seed: u64, len: usize, scale: f32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        (0..len).map(|_| ((next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale).collect()
    }

    #[test]
    fn the_exponential_is_good_to_two_units_in_the_last_place() {
        for step in 0..=870_000 {
            let x = -(step as f32) / 10_000.0;
            let (exact, fast) = (f64::from(x).exp(), f64::from(exp(x)));
            assert!((fast / exact - 1.0).abs() < 2.4e-7, "e^{x} is {exact:e}, not {fast:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-INF) > 0.0 && exp(-INF) < 2e-38);
        assert!(exp(NAN).is_nan());
    }

    #[test]
    fn log_softmax_agrees_with_the_definition() {
        for len in [1, 2, 15, 16, 17, 1000, 1024, 5000] {
            for scale in [0.01, 3.0, 30.0, 1000.0] {
                let mut row = noise(len as u64, len, scale);
                let max = row.iter().copied().map(f64::from).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
                let expected: Vec<f64> = row.iter().map(|&x| f64::from(x) - max - sum.ln()).collect();
                LogSumExp::of(&row).apply(&mut row);
                for (found, expected) in row.iter().zip(expected) {
                    let tolerance = 2e-7 * (expected.abs() + sum.ln() + 1.0);
                    assert!((f64::from(*found) - expected).abs() <= tolerance, "{len}, {scale}: {found}, {expected}");
                }
            }
        }
        let cases: &[(&str, &[f32], &[f32])] = &[
            ("a forbidden token", &[0.0, -INF, -INF], &[0.0, -INF, -INF]),
            ("NaN", &[0.0, NAN], &[NAN, NAN]),
            ("infinity", &[0.0, INF], &[NAN, NAN]),
            ("nothing allowed", &[-INF, -INF], &[NAN, NAN]),
        ];
        for (name, row, expected) in cases {
            let mut row = row.to_vec();
            LogSumExp::of(&row).apply(&mut row);
            let is_same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
            assert!(row.len() == expected.len() && row.iter().zip(*expected).all(is_same), "{name}: {row:?}");
        }
    }

    #[test]
    fn every_instruction_level_gives_the_same_bits() {
        for len in [1, 17, 1024, 5000] {
            let row = noise(3, len, 20.0);
            let (mut maxima, mut expected) = (Vec::new(), Vec::new());
            let found = LogSumExp::with_block_maxima(&row, &mut maxima);
            assert_eq!((found, &maxima), (LogSumExp::portable(&row, &mut expected), &expected), "{len}");
        }
    }
}
