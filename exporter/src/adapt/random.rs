//! The numbers of a new matrix. Each follows from the seed, the tensor's name and its place alone, by integers and one multiplication,
//! so that another implementation, in any language and any order, has the same bits:
//!
//! ```text
//! s      = mix(seed ^ fnv1a(name))
//! word n = mix(s + n·STEP)                                       n = 1, 2, …
//! t      = sum of the 16-bit quarters of words 3e+1, 3e+2, 3e+3  of element e = 0, 1, …; exact
//! z      = (t − 393210) / 65536                                  mean 0, variance 1 − 2⁻³², |z| < 6
//! x      = float32(z · std)                                      the product in float64
//! ```

use crate::splitmix::{STEP, fnv1a, mix};

/// Words of an element.
const WORDS: u64 = 3;
/// The mean of `t`: twelve times that of a 16-bit integer, 65535 / 2.
const MEAN: i64 = 393_210;

/// The nearly normal numbers of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct NormalTensor {
    start: u64,
    std: f64,
}

impl NormalTensor {
    pub fn new(name: &str, seed: u64, std: f64) -> NormalTensor {
        NormalTensor { start: mix(seed ^ fnv1a(name)), std }
    }

    /// Fills `out` with the elements from index `first` on.
    pub fn fill(&self, first: usize, out: &mut [f32]) {
        for (element, number) in (first as u64..).zip(out) {
            *number = self.element(element);
        }
    }

    fn element(&self, e: u64) -> f32 {
        let word = |n: u64| mix(self.start.wrapping_add(n.wrapping_mul(STEP)));
        let quarters =
            |word: u64| [0, 16, 32, 48].map(|shift| (word >> shift & 0xffff) as i64).into_iter().sum::<i64>();
        let t: i64 = (1..=WORDS).map(|n| quarters(word(WORDS * e + n))).sum();
        let z = (t - MEAN) as f64 / 65536.0;
        (z * self.std) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &str = "model.decoder.layers.0.cross_attn.k_proj.weight";

    /// The values are those of the reference script, tests/fixtures/scripts/make_adapt_fixtures.py.
    #[test]
    fn elements_are_those_of_the_reference() {
        let cases: &[(&str, u64, f64, [f32; 4])] = &[
            (KEYS, 7, 0.25, [-0.143_955_23, -0.050_285_34, -0.065_811_16, -0.374_027_25]),
            (
                "model.decoder.layers.0.cross_attn.o_proj.weight",
                7,
                0.25,
                [0.337_200_16, 0.038_829_803, 0.054_401_398, 0.168_830_87],
            ),
            (KEYS, 5, 0.02, [0.018_908_082, 0.017_133_484, -0.030_937_806, -0.043_473_817]),
        ];
        for (name, seed, std, expected) in cases {
            let mut found = [0.0; 4];
            NormalTensor::new(name, *seed, *std).fill(0, &mut found);
            assert_eq!(found, *expected, "{name}, seed {seed}");
        }
    }

    #[test]
    fn elements_do_not_depend_on_chunks() {
        let tensor = NormalTensor::new(KEYS, u64::MAX, 1.0);
        let (mut whole, mut parts) = ([0.0; 100], [0.0; 100]);
        tensor.fill(0, &mut whole);
        let (first, second) = parts.split_at_mut(37);
        tensor.fill(37, second);
        tensor.fill(0, first);
        assert_eq!(whole, parts);
    }

    #[test]
    fn the_distribution_has_mean_0_and_the_given_deviation() {
        let mut numbers = vec![0.0; 1 << 20];
        NormalTensor::new(KEYS, 0, 2.0).fill(0, &mut numbers);
        let count = numbers.len() as f64;
        let mean = numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = numbers.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        // Five standard errors.
        assert!(mean.abs() < 0.01 && (variance.sqrt() - 2.0).abs() < 0.007, "{mean} {variance}");
    }
}
