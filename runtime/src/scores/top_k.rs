//! `TopK`: the best candidates of a step, or draws of as many, chosen in one pass over the rows; and the draw from one
//! row.

use t5gemma_kernels::{Level, LogitsStats, exp};

use crate::draws::Draws;
use crate::search::Candidate;

/// The best candidates of the rows seen so far. Rows come in the order of beams.
pub(super) struct TopK {
    count: usize,
    /// Best first; few enough that an insertion may move them all.
    pub candidates: Vec<Candidate>,
    /// What each candidate is compared by: its score, with Gumbel noise where candidates are drawn.
    keys: Vec<f32>,
}

impl TopK {
    /// An empty list for `count` candidates.
    pub fn new(count: usize) -> TopK {
        TopK { count, candidates: Vec::with_capacity(count + 1), keys: Vec::with_capacity(count + 1) }
    }

    /// Offers every token of a row. `score` must be monotonic. With the maximum of each [`LogitsStats::BLOCK`] logits,
    /// blocks that cannot hold a better candidate are skipped; `maxima` may be empty.
    pub fn take_row(&mut self, beam: usize, row: &[f32], maxima: &[f32], score: impl Fn(f32) -> f32) {
        if maxima.is_empty() {
            return self.take_part(beam, 0, row, score);
        }
        for (index, (block, &max)) in row.chunks(LogitsStats::BLOCK).zip(maxima).enumerate() {
            let best = score(max);
            if self.worst().is_none_or(|worst| best > worst || best.is_nan()) {
                self.take_part(beam, index * LogitsStats::BLOCK, block, &score);
            }
        }
    }

    /// Offers the tokens from `first` on.
    fn take_part(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        #[cfg(target_arch = "x86_64")]
        match t5gemma_kernels::level() {
            // SAFETY: `level` returns what the processor supports.
            Level::Amx | Level::Vnni => return unsafe { self.take_part_with_avx512(beam, first, part, score) },
            // SAFETY: `level` returns what the processor supports.
            Level::Avx2 => return unsafe { self.take_part_with_avx2(beam, first, part, score) },
            Level::Generic => {}
        }
        self.take_part_portable(beam, first, part, score);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn take_part_with_avx512(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        self.take_part_portable(beam, first, part, score);
    }

    /// Takes half of the portable version's time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn take_part_with_avx2(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        self.take_part_portable(beam, first, part, score);
    }

    #[inline(always)]
    fn take_part_portable(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        const BLOCK: usize = 64;
        for (block, xs) in part.chunks(BLOCK).enumerate() {
            // Without branches, so that a whole block is compared at once: few hold a score that is good enough.
            if let Some(worst) = self.worst() {
                let mut any = false;
                for &x in xs {
                    let score = score(x);
                    any |= (score > worst) | score.is_nan();
                }
                if !any {
                    continue;
                }
            }
            for (place, &x) in xs.iter().enumerate() {
                let token = (first + block * BLOCK + place) as i64;
                let score = score(x);
                self.offer(score, Candidate { parent: beam, token, score });
            }
        }
    }

    /// Offers every token of a row at its score with Gumbel noise: the best of all rows are draws without replacement
    /// from the softmax of their scores, in the order drawn.
    pub fn draw_row(&mut self, beam: usize, row: &[f32], score: impl Fn(f32) -> f32, draws: &Draws, step: u32) {
        const BLOCK: usize = 4;
        for (block, xs) in row.chunks(BLOCK).enumerate() {
            if self.worst().is_some() && xs.iter().all(|&x| x == f32::NEG_INFINITY) {
                continue;
            }
            let noise = draws.open_uniforms(step, (beam as u32) << 24 | block as u32);
            for (place, (&x, u)) in xs.iter().zip(noise).enumerate() {
                let token = (block * BLOCK + place) as i64;
                let score = score(x);
                self.offer(score - (-u.ln()).ln() as f32, Candidate { parent: beam, token, score });
            }
        }
    }

    /// The key that another candidate has to beat, once the list is full.
    fn worst(&self) -> Option<f32> {
        self.keys.get(self.count - 1).copied()
    }

    fn offer(&mut self, key: f32, candidate: Candidate) {
        let rank = rank(key);
        // Beams and tokens ascend, so that a new candidate comes behind those with an equal key.
        let index = match self.worst() {
            Some(worst) if self::rank(worst) >= rank => return,
            _ => self.keys.partition_point(|&other| self::rank(other) >= rank),
        };
        self.candidates.truncate(self.count - 1);
        self.candidates.insert(index, candidate);
        self.keys.truncate(self.count - 1);
        self.keys.insert(index, key);
    }
}

/// A key that orders scores as integers: −0 equals 0, and NaN is above all.
#[inline]
pub(super) fn rank(score: f32) -> i32 {
    if score.is_nan() {
        return i32::MAX;
    }
    let bits = (score + 0.0).to_bits() as i32;
    if bits < 0 { bits ^ i32::MAX } else { bits }
}

/// Samples a token from the softmax of a row: the first at which the cumulative probability exceeds `u`. Where all
/// scores are −∞, token 0.
pub(super) fn draw(row: &[f32], u: f64) -> usize {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: f32| if x == f32::NEG_INFINITY { 0.0 } else { f64::from(exp(x - max)) };
    let limit = row.iter().map(|&x| weight(x)).sum::<f64>() * u;
    let (mut sum, mut last) = (0.0, 0);
    for (token, &x) in row.iter().enumerate().filter(|(_, x)| **x != f32::NEG_INFINITY) {
        sum += weight(x);
        last = token;
        if sum > limit {
            break;
        }
    }
    last
}
