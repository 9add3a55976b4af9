//! SplitMix64 (Steele, Lea, Flood 2014) with random access, and FNV-1a. The name of a tensor selects a stream of words and the place
//! of an element a word of it, so that random tensors do not depend on order, chunks or threads.

/// The distance between two states.
pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The word of a state.
pub fn mix(state: u64) -> u64 {
    let z = state;
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits, of a name in UTF-8.
pub fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_hashes_are_the_published_ones() {
        // The first words of SplitMix64 with seed 1234567, as in the reference code, splitmix64.c.
        let words = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        for (n, word) in (1..).zip(words) {
            assert_eq!(mix(1_234_567_u64.wrapping_add(STEP.wrapping_mul(n))), word, "word {n}");
        }
        for (name, hash) in
            [("", 0xcbf2_9ce4_8422_2325), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
        {
            assert_eq!(fnv1a(name), hash, "{name:?}");
        }
    }
}
