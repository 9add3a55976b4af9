//! Counter-based random numbers: each depends only on a seed and on the position where it is used, never on earlier
//! draws. Batching, the number of threads and the order of work therefore cannot change the draws of a request.

use std::hash::{BuildHasher, Hasher, RandomState};

/// The random numbers of one source row.
///
/// # Design
/// Philox 4×32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the seed is the
/// key, the counter holds the step, the lane and the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    seed: u64,
    stream: u64,
}

impl Draws {
    /// A random seed, for a call that sets none.
    pub fn random_seed() -> u64 {
        RandomState::new().build_hasher().finish()
    }

    /// The numbers for row `row` of a request with the source `source`. They depend on the source too, so that
    /// different texts with the same seed do not draw alike.
    pub fn new(seed: u64, row: usize, source: impl IntoIterator<Item = i64>) -> Draws {
        let stream = source.into_iter().fold(mix(row as u64), |stream, token| mix(stream ^ token as u64));
        Draws { seed, stream }
    }

    /// A number from 0 to below 1 for `lane` at `step`, in multiples of 2^-53.
    pub fn uniform(&self, step: u32, lane: u32) -> f64 {
        let [a, b, ..] = self.block(step, lane);
        ((u64::from(a) << 32 | u64::from(b)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Four numbers above 0 and below 1 for `lane` at `step`.
    pub(crate) fn open_uniforms(&self, step: u32, lane: u32) -> [f64; 4] {
        self.block(step, lane).map(|bits| (f64::from(bits) + 0.5) / (1u64 << 32) as f64)
    }

    fn block(&self, step: u32, lane: u32) -> [u32; 4] {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let [low, high] = halves(self.stream);
        philox([step, lane, low, high], halves(self.seed))
    }
}

/// The finaliser of SplitMix64 behind its increment.
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, key), expected, "{counter:x?}");
        }
    }

    #[test]
    fn each_place_has_its_own_number() {
        let source = [5, 6, 7];
        let draws = Draws::new(1, 0, source);
        let same = Draws::new(1, 0, source);
        assert_eq!(draws.uniform(3, 2), same.uniform(3, 2));
        let others = [
            ("step", draws.uniform(4, 2)),
            ("lane", draws.uniform(3, 3)),
            ("seed", Draws::new(2, 0, source).uniform(3, 2)),
            ("row", Draws::new(1, 1, source).uniform(3, 2)),
            ("source", Draws::new(1, 0, [5, 6, 8]).uniform(3, 2)),
            ("order of the source", Draws::new(1, 0, [5, 7, 6]).uniform(3, 2)),
        ];
        for (name, other) in others {
            assert_ne!(draws.uniform(3, 2), other, "{name}");
        }
    }

    #[test]
    fn numbers_fill_the_interval_evenly() {
        const CELLS: usize = 64;
        const DRAWS: u32 = 64_000;
        // name, the number of a place
        type Case = (&'static str, fn(u32) -> f64);
        let cases: [Case; 5] = [
            ("by step", |i| Draws::new(11, 0, [4]).uniform(i, 0)),
            ("by lane", |i| Draws::new(11, 0, [4]).uniform(0, i)),
            ("by seed", |i| Draws::new(u64::from(i), 0, [4]).uniform(0, 0)),
            ("by row", |i| Draws::new(11, i as usize, [4]).uniform(0, 0)),
            ("in fours", |i| Draws::new(11, 0, [4]).open_uniforms(7, i / 4)[i as usize % 4]),
        ];
        for (name, number) in cases {
            let mut counts = [0u32; CELLS];
            for i in 0..DRAWS {
                let u = number(i);
                assert!((0.0..1.0).contains(&u), "{name}: {u}");
                counts[(u * CELLS as f64) as usize] += 1;
            }
            let expected = f64::from(DRAWS) / CELLS as f64;
            let chi_square: f64 = counts.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
            // 63 degrees of freedom: a fair generator exceeds 103.4 once in a thousand times.
            assert!(chi_square < 103.4, "{name}: {chi_square}");
        }
    }
}
