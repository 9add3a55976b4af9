//! Upper bounds of chunks of coarse results, and the columns that may reach a limit.

use std::arch::x86_64::*;

use super::CHUNK;
use super::prepared::Prepared;

/// How far a coarse result may be from the exact one: `error` times the norm of the error of its weights, plus `norm`
/// times the norm of the weights.
#[derive(Clone, Copy)]
pub struct Slack {
    pub error: f32,
    pub norm: f32,
}

/// What coarse results are lowered by: `factor` times the squares of these norms.
#[derive(Clone, Copy)]
pub struct Shift<'s> {
    pub factor: f32,
    pub norms: &'s [f32],
}

impl Prepared {
    /// Writes for each [`CHUNK`] of the results from column `first` on a lower bound of the greatest, and an upper
    /// bound of all; NaN if one of the results is. Thereafter results are lowered by `shift`.
    #[target_feature(enable = "avx2,fma")]
    pub fn bound_chunks(
        &self,
        first: usize,
        results: &mut [f32],
        slack: Slack,
        shift: Option<Shift>,
        lower: &mut [f32],
        upper: &mut [f32],
    ) {
        for (at, results) in results.chunks_mut(CHUNK).enumerate() {
            let norms = self.chunk_norms[first / CHUNK + at];
            let off = slack.error * norms.error + slack.norm * norms.weights;
            let greatest = maximum_of_chunk(results);
            (lower[at], upper[at]) = (greatest - off, greatest + off);
            if let Some(Shift { factor, norms }) = shift {
                for (result, norm) in results.iter_mut().zip(&norms[at * CHUNK..]) {
                    *result -= factor * norm * norm;
                }
            }
        }
    }

    /// Appends the columns whose results, from column `first` on, may be `limit` or greater, or NaN; `upper` are the
    /// bounds of the chunks.
    #[target_feature(enable = "avx2,fma")]
    pub fn find_candidates(
        &self,
        first: usize,
        results: &[f32],
        upper: &[f32],
        slack: Slack,
        limit: f32,
        candidates: &mut Vec<usize>,
    ) {
        for (at, (results, upper)) in results.chunks(CHUNK).zip(upper).enumerate() {
            if *upper < limit {
                continue;
            }
            let (column, bounds) = (first + at * CHUNK, self.upper_bounds(first + at * CHUNK, results, slack));
            for (eight, bounds) in (0..).zip(bounds.as_chunks::<8>().0) {
                // SAFETY: a chunk has eight numbers.
                let bounds = unsafe { _mm256_loadu_ps(bounds.as_ptr()) };
                // Not less than: NaN is a candidate too.
                let mut mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(bounds, _mm256_set1_ps(limit)));
                while mask != 0 {
                    let lane = mask.trailing_zeros() as usize;
                    mask &= mask - 1;
                    if eight * 8 + lane < results.len() {
                        candidates.push(column + eight * 8 + lane);
                    }
                }
            }
        }
    }

    /// Upper bounds of a chunk's results, padded with −∞.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn upper_bounds(&self, first: usize, results: &[f32], slack: Slack) -> [f32; CHUNK] {
        let mut bounds = [f32::NEG_INFINITY; CHUNK];
        let norms = &self.norms[first..][..results.len()];
        // Quantized weights that are read as they are have no error: `slack.error` is 0.
        let errors = self.copy.as_ref().map_or(norms, |copy| &copy.errors[first..][..results.len()]);
        for (((bound, result), error), norm) in bounds.iter_mut().zip(results).zip(errors).zip(norms) {
            *bound = result + slack.error * error + slack.norm * norm;
        }
        bounds
    }
}

/// The maximum of at most [`CHUNK`] numbers, NaN if one of these is.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn maximum_of_chunk(results: &[f32]) -> f32 {
    let mut maximum = f32::NEG_INFINITY;
    if let Ok(results) = <&[f32; CHUNK]>::try_from(results) {
        // SAFETY: 32 numbers are four times eight.
        unsafe {
            let [a, b, c, d] = [0, 8, 16, 24].map(|at| _mm256_loadu_ps(results.as_ptr().add(at)));
            // The maximum of NaN and a number may be the number; their sum is NaN.
            let sums = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
            if _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(sums, sums)) == 0 {
                let max = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
                let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
                let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
                return _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
            }
        }
    }
    for &result in results {
        maximum = if result.is_nan() || maximum.is_nan() { f32::NAN } else { maximum.max(result) };
    }
    maximum
}

/// The greatest results of the `count` chunks with the greatest upper bounds, and their columns.
pub fn greatest_of_best_chunks(upper: &[f32], results: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut chunks: Vec<usize> = (0..upper.len()).collect();
    chunks.select_nth_unstable_by(count.min(upper.len()) - 1, |&a, &b| upper[b].total_cmp(&upper[a]));
    chunks.truncate(count);
    let columns = chunks.into_iter().map(|chunk| chunk * CHUNK..results.len().min((chunk + 1) * CHUNK));
    columns.filter_map(|columns| columns.map(|at| (at, results[at])).max_by(|a, b| a.1.total_cmp(&b.1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;

    #[test]
    fn the_maximum_of_a_chunk_is_nan_if_one_of_its_numbers_is() {
        at_each_level(Level::Avx2, |_| {
            for len in [1, 31, CHUNK] {
                let mut results = noise(len, len as u32);
                let expected = results.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                // SAFETY: the processor has AVX2.
                let maximum = |results: &[f32]| unsafe { maximum_of_chunk(results) };
                assert_eq!(maximum(&results), expected, "{len}");
                results[len / 2] = f32::NAN;
                assert!(maximum(&results).is_nan(), "{len}");
            }
        });
    }

    #[test]
    fn the_greatest_are_taken_from_the_chunks_with_the_greatest_bounds() {
        let mut results = vec![0.0; 3 * CHUNK + 5];
        for (column, result) in [(3, 1.0), (40, 5.0), (41, 4.0), (3 * CHUNK + 4, 3.0)] {
            results[column] = result;
        }
        let mut found = greatest_of_best_chunks(&[1.5, 5.5, 0.5, 3.5], &results, 2);
        found.sort_by_key(|&(column, _)| column);
        assert_eq!(found, [(40, 5.0), (3 * CHUNK + 4, 3.0)]);
    }
}
