//! Log-softmax over a row of scores. The results are the same, bit for bit, at every instruction level: multiplications
//! and additions are not fused, and sums are taken in a fixed order.

use crate::exp::exp;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Level, level};

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

    /// [`LogSumExp::of`], which also replaces `block_maxima` by the maximum of each [`LogSumExp::BLOCK`] scores, NaN
    /// ignored: both in one pass, since the row comes from memory.
    pub fn with_block_maxima(row: &[f32], block_maxima: &mut Vec<f32>) -> LogSumExp {
        block_maxima.clear();
        #[cfg(target_arch = "x86_64")]
        match level() {
            // SAFETY: the processor supports the level in use.
            Level::Amx | Level::Vnni => return unsafe { LogSumExp::with_avx512(row, block_maxima) },
            // SAFETY: the processor supports the level in use.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;

    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;

    /// `len` numbers between −`scale` and `scale`.
    fn scaled_noise(seed: u32, len: usize, scale: f32) -> Vec<f32> {
        noise(len, seed).into_iter().map(|x| x * scale).collect()
    }

    #[test]
    fn log_softmax_agrees_with_the_definition() {
        for len in [1, 2, 15, 16, 17, 1000, 1024, 5000] {
            for scale in [0.01, 3.0, 30.0, 1000.0] {
                let mut row = scaled_noise(len as u32, len, scale);
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
        at_each_level(crate::isa::Level::Generic, |level| {
            for len in [1, 17, 1024, 5000] {
                let row = scaled_noise(3, len, 20.0);
                let (mut maxima, mut expected) = (Vec::new(), Vec::new());
                let found = LogSumExp::with_block_maxima(&row, &mut maxima);
                assert_eq!((found, &maxima), (LogSumExp::portable(&row, &mut expected), &expected), "{level:?}, {len}");
            }
        });
    }
}
