//! Attention of one head, `softmax(softcap(q·kᵀ·scale) where visible) · v`, without materializing the score matrix, and
//! without the scores of keys that no query of a tile sees.
//!
//! # Design
//! A head is computed for a few queries at a time, whose scores stay in the L1 cache. Many queries use packed keys, so
//! that the scores of adjacent keys are adjacent lanes; few queries read keys in place.
//!
//! Written for any [`F32x16`], and compiled for any processor, for AVX2, and for AVX-512.

use std::ops::Range;

use crate::aligned::AlignedVec;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Level, level};
use crate::math::{Denominator, dot_products, softcap, softmax_numerators};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{F32x16, Portable};

/// Queries that are computed at a time: as many as there are registers for their sums, which are twice as many with
/// AVX-512.
const TILE: usize = 6;
const AVX512_TILE: usize = 12;
/// A multiple of it is whole tiles on any processor.
pub const TILES: usize = AVX512_TILE;
/// Keys of a panel of packed keys, and numbers of a value that are summed up in one [`F32x16`].
pub const PANEL: usize = 16;
/// Minimum number of queries for which packing the keys pays.
const MANY: usize = 8;

/// A head's operands.
#[derive(Clone, Copy)]
pub struct Head<'h> {
    /// `[queries, dim]`: those that are computed.
    pub queries: &'h [f32],
    /// `[keys, dim]`; not read if there are packed keys.
    pub keys: &'h [f32],
    /// `[keys, dim]`
    pub values: &'h [f32],
    /// The keys as [`pack_keys`] writes them.
    pub packed_keys: Option<&'h [f32]>,
    pub dim: usize,
    pub scale: f32,
    pub cap: Option<f32>,
}

/// Which keys the queries see.
pub trait KeyMask {
    /// A range that contains every key that the query sees.
    fn range(&self, query: usize) -> Range<usize>;
    /// For each key of a range whether the query sees it; `None` if it sees all.
    fn mask(&self, query: usize, range: Range<usize>) -> Option<&[bool]>;
}

/// The scratch buffers of a tile.
#[derive(Default)]
pub struct Scratch {
    /// `[queries of a tile, keys]`
    scores: AlignedVec<f32>,
    /// `[queries of a tile, dim]`: scaled.
    queries: AlignedVec<f32>,
    /// `[queries]`: the log-sum-exp of the scores that each query sees, after a call of [`attend`]; −∞ if it sees none.
    pub log_sums: Vec<f32>,
}

/// Whether packing the keys pays for this many queries.
pub fn packing_pays(queries: usize) -> bool {
    queries >= MANY
}

/// The length of packed keys.
pub fn packed_length(keys: usize, dim: usize) -> usize {
    keys.next_multiple_of(PANEL) * dim
}

/// Packs keys of `dim` numbers, one every `pitch`, as `[panels, dim, PANEL]`, padded with zeros.
pub fn pack_keys(keys: &[f32], pitch: usize, dim: usize, to: &mut [f32]) {
    for (keys, panel) in keys.chunks(PANEL * pitch).zip(to.chunks_exact_mut(PANEL * dim)) {
        if keys.len().div_ceil(pitch) < PANEL {
            panel.fill(0.0);
        }
        for (key, numbers) in keys.chunks(pitch).enumerate() {
            for (panel, number) in panel.chunks_exact_mut(PANEL).zip(&numbers[..dim]) {
                panel[key] = *number;
            }
        }
    }
}

/// Attends with the queries `queries`, which are those that `head` has, and writes `to [queries, dim]`. A query that
/// sees no key attends to all keys equally: the reference gives hidden keys the lowest finite score, not −∞.
pub fn attend(head: Head, mask: &impl KeyMask, queries: Range<usize>, scratch: &mut Scratch, to: &mut [f32]) {
    scratch.log_sums.clear();
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: the processor supports the level in use.
        Level::Amx | Level::Vnni => return unsafe { attend_with_avx512(head, mask, queries, scratch, to) },
        // SAFETY: the processor supports the level in use.
        Level::Avx2 => return unsafe { attend_with_avx2(head, mask, queries, scratch, to) },
        Level::Generic => {}
    }
    // SAFETY: `Portable` runs on any processor.
    unsafe { attend_in_tiles::<Portable, TILE>(head, mask, queries, scratch, to) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn attend_with_avx2(head: Head, mask: &impl KeyMask, queries: Range<usize>, scratch: &mut Scratch, to: &mut [f32]) {
    // SAFETY: this function is compiled for AVX2 and FMA.
    unsafe { attend_in_tiles::<Avx2, TILE>(head, mask, queries, scratch, to) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn attend_with_avx512(head: Head, mask: &impl KeyMask, queries: Range<usize>, scratch: &mut Scratch, to: &mut [f32]) {
    // SAFETY: this function is compiled for AVX-512.
    unsafe { attend_in_tiles::<Avx512, AVX512_TILE>(head, mask, queries, scratch, to) };
}

/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn attend_in_tiles<S: F32x16, const MOST: usize>(
    head: Head,
    mask: &impl KeyMask,
    queries: Range<usize>,
    scratch: &mut Scratch,
    to: &mut [f32],
) {
    let (dim, mut first) = (head.dim, queries.start);
    while first < queries.end {
        let start = (first - queries.start) * dim;
        let (head, to) = (Head { queries: &head.queries[start..], ..head }, &mut to[start..]);
        // SAFETY: the caller promises the instructions of `S`.
        first += unsafe {
            // Each height instantiates all that follows once more: without vector instructions there are two.
            match queries.end - first {
                AVX512_TILE.. if MOST == AVX512_TILE => attend_tile::<S, AVX512_TILE>(head, mask, first, scratch, to),
                TILE.. => attend_tile::<S, TILE>(head, mask, first, scratch, to),
                4.. if S::HAS_AVX2 => attend_tile::<S, 4>(head, mask, first, scratch, to),
                2.. if S::HAS_AVX2 => attend_tile::<S, 2>(head, mask, first, scratch, to),
                _ => attend_tile::<S, 1>(head, mask, first, scratch, to),
            }
        };
    }
}

/// Attends with `R` queries from `first` on, and returns `R`.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn attend_tile<S: F32x16, const R: usize>(
    head: Head,
    mask: &impl KeyMask,
    first: usize,
    scratch: &mut Scratch,
    to: &mut [f32],
) -> usize {
    let dim = head.dim;
    let to = &mut to[..R * dim];
    let ranges: [Range<usize>; R] = std::array::from_fn(|at| mask.range(first + at));
    let seeing = ranges.iter().filter(|range| !range.is_empty());
    let mut start = seeing.clone().map(|range| range.start).min().unwrap_or(0);
    let end = seeing.map(|range| range.end).max().unwrap_or(0);
    if start == end {
        to.chunks_exact_mut(dim).for_each(|to| mean(head.values.chunks_exact(dim), to));
        scratch.log_sums.extend([f32::NEG_INFINITY; R]);
        return R;
    }
    let Scratch { scores, queries, log_sums } = scratch;
    queries.resize(R * dim, 0.0);
    for (to, x) in queries.iter_mut().zip(&head.queries[..R * dim]) {
        *to = x * head.scale;
    }
    let count = match head.packed_keys {
        Some(packed) => {
            // Whole panels; the keys that they have besides are hidden below.
            start = start / PANEL * PANEL;
            let panels = start / PANEL..end.div_ceil(PANEL);
            scores.resize(R * score_pitch(panels.len() * PANEL), 0.0);
            let panels = &packed[panels.start * PANEL * dim..panels.end * PANEL * dim];
            // SAFETY: the caller promises the instructions of `S`.
            unsafe {
                let done = match S::REGISTERS {
                    PANEL.. => scores_of_panels::<S, R, 2>(queries, panels, dim, 0, scores),
                    _ => 0,
                };
                scores_of_panels::<S, R, 1>(queries, panels, dim, done, scores);
            }
            panels.len() / dim
        }
        None => {
            let count = end - start;
            scores.resize(R * score_pitch(count), 0.0);
            for (at, keys) in head.keys[start * dim..end * dim].chunks(8 * dim).enumerate() {
                for (query, scores) in queries.chunks_exact(dim).zip(scores.chunks_exact_mut(score_pitch(count))) {
                    dot_products::<S>(query, keys, &mut scores[8 * at..count.min(8 * at + 8)]);
                }
            }
            count
        }
    };
    let mut sums = [0.0_f32; R];
    for (at, scores) in scores.chunks_exact_mut(score_pitch(count)).enumerate() {
        let range = &ranges[at];
        let own = range.start.max(start) - start..range.end.max(start) - start;
        let mask = mask.mask(first + at, range.clone());
        // SAFETY: the caller promises the instructions of `S`.
        let Denominator { max, sum } = unsafe { scores_to_numerators::<S>(&mut scores[..count], own, head.cap, mask) };
        sums[at] = sum;
        log_sums.push(if range.is_empty() { f32::NEG_INFINITY } else { max + sum.ln() });
    }

    let values = &head.values[start * dim..end * dim];
    let mut numerators: [&[f32]; R] = [&[]; R];
    for (row, numerators) in numerators.iter_mut().enumerate() {
        *numerators = &scores[row * score_pitch(count)..][..end - start];
    }
    // As many numbers of a value at a time as there are registers for.
    // SAFETY: the caller promises the instructions of `S`.
    let from = unsafe {
        let from = match (R, S::REGISTERS) {
            (1, _) => weighted_sums::<S, R, 4>(numerators, values, dim, 0, to),
            (2 | 3, _) | (_, PANEL..) => weighted_sums::<S, R, 2>(numerators, values, dim, 0, to),
            _ => 0,
        };
        let from = weighted_sums::<S, R, 1>(numerators, values, dim, from, to);
        // The last numbers of a value, if they are fewer: with some of those before them once more.
        if (PANEL..dim).contains(&from) {
            weighted_sums::<S, R, 1>(numerators, values, dim, dim - PANEL, to)
        } else {
            from
        }
    };
    for (numerators, to) in numerators.iter().zip(to.chunks_exact_mut(dim)) {
        for (at, to) in to.iter_mut().enumerate().skip(from) {
            *to = values.chunks_exact(dim).zip(*numerators).map(|(value, p)| value[at] * p).sum();
        }
    }
    for ((to, sum), range) in to.chunks_exact_mut(dim).zip(sums).zip(ranges) {
        if range.is_empty() {
            mean(head.values.chunks_exact(dim), to);
            continue;
        }
        let factor = 1.0 / sum;
        for x in to {
            *x *= factor;
        }
    }
    R
}

/// Turns the scores of a query into the numerators of its softmax, and returns what belongs to them; it sees its `own` keys, or
/// those that `mask` shows of them.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn scores_to_numerators<S: F32x16>(
    scores: &mut [f32],
    own: Range<usize>,
    cap: Option<f32>,
    mask: Option<&[bool]>,
) -> Denominator {
    if let Some(cap) = cap {
        // Of its own keys alone: how these are computed must not depend on others.
        // SAFETY: the caller promises the instructions of `S`.
        unsafe { softcap::<S>(&mut scores[own.clone()], cap) };
    }
    scores[..own.start].fill(0.0);
    scores[own.end..].fill(0.0);
    if let Some(mask) = mask {
        for (score, &seen) in scores[own.clone()].iter_mut().zip(mask) {
            *score = if seen { *score } else { f32::NEG_INFINITY };
        }
    }
    // From its first own key on, so that the order of the sum does not depend on where that lies.
    // SAFETY: the caller promises the instructions of `S`.
    unsafe { softmax_numerators::<S>(&mut scores[own]) }
}

/// From a query's scores to the next one's: a little more than there are, so that queries do not compete for the same
/// sets of the L1 cache, as they would where scores are a power of two.
fn score_pitch(count: usize) -> usize {
    count + PANEL
}

/// The mean of values, of which there may be more numbers than fit into `to`.
pub fn mean<'v>(values: impl ExactSizeIterator<Item = &'v [f32]>, to: &mut [f32]) {
    to.fill(0.0);
    let factor = 1.0 / values.len() as f32;
    for value in values {
        to.iter_mut().zip(value).for_each(|(to, x)| *to += x);
    }
    to.iter_mut().for_each(|x| *x *= factor);
}

/// The sums of the values `[keys, dim]`, weighted by the numerators of each query: of the numbers from `from` on, `V ·
/// 16` at a time. Returns where fewer are left.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "several arrays are indexed at a time, which adapters would hide from the compiler"
)]
unsafe fn weighted_sums<S: F32x16, const R: usize, const V: usize>(
    numerators: [&[f32]; R],
    values: &[f32],
    dim: usize,
    mut from: usize,
    to: &mut [f32],
) -> usize {
    let keys = values.len() / dim;
    assert!(numerators.iter().all(|row| row.len() == keys) && to.len() == R * dim, "a numerator for each value");
    while from + V * PANEL <= dim {
        // SAFETY: `from` is `V · 16` numbers before the end of a value, of which there are as many as numerators, and
        // of `to`, by the assertion above; the caller promises the instructions of `S`.
        unsafe {
            let mut totals = [[S::splat(0.0); V]; R];
            let mut value = values.as_ptr().add(from);
            for key in 0..keys {
                let mut here = [S::splat(0.0); V];
                for (at, here) in here.iter_mut().enumerate() {
                    *here = S::load(value.add(at * PANEL));
                }
                for row in 0..R {
                    let numerator = S::splat(*numerators[row].get_unchecked(key));
                    for at in 0..V {
                        totals[row][at] = numerator.mul_add(here[at], totals[row][at]);
                    }
                }
                value = value.wrapping_add(dim);
            }
            for row in 0..R {
                for at in 0..V {
                    totals[row][at].store(to.as_mut_ptr().add(row * dim + from + at * PANEL));
                }
            }
        }
        from += V * PANEL;
    }
    from
}

/// The scores of the queries `[R, dim]` with packed keys `panels [panels, dim, PANEL]`, [`score_pitch`] apart: those
/// with the panels from `first` on, `P` at a time. Returns where fewer are left.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "several arrays are indexed at a time, which adapters would hide from the compiler"
)]
unsafe fn scores_of_panels<S: F32x16, const R: usize, const P: usize>(
    queries: &[f32],
    panels: &[f32],
    dim: usize,
    mut first: usize,
    scores: &mut [f32],
) -> usize {
    let (count, all) = (panels.len() / dim, panels.len() / dim / PANEL);
    let pitch = score_pitch(count);
    assert!(queries.len() == R * dim && scores.len() == R * pitch && count.is_multiple_of(PANEL), "sizes of scores");
    while first + P <= all {
        // SAFETY: `first` is `P` panels before their end; queries and scores have the sizes asserted above; the caller
        // promises the instructions of `S`.
        unsafe {
            let mut totals = [[S::splat(0.0); P]; R];
            let keys = panels.as_ptr().add(first * dim * PANEL);
            for at in 0..dim {
                let mut here = [S::splat(0.0); P];
                for panel in 0..P {
                    here[panel] = S::load(keys.add((panel * dim + at) * PANEL));
                }
                for row in 0..R {
                    let query = S::splat(*queries.as_ptr().add(row * dim + at));
                    for panel in 0..P {
                        totals[row][panel] = query.mul_add(here[panel], totals[row][panel]);
                    }
                }
            }
            for row in 0..R {
                for panel in 0..P {
                    totals[row][panel].store(scores.as_mut_ptr().add(row * pitch + (first + panel) * PANEL));
                }
            }
        }
        first += P;
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;

    /// `count` numbers between −2 and 2.
    fn wide_noise(count: usize, seed: u32) -> Vec<f32> {
        noise(count, seed).into_iter().map(|x| x * 2.0).collect()
    }

    struct Rows(Vec<Vec<bool>>);

    impl KeyMask for Rows {
        fn range(&self, query: usize) -> Range<usize> {
            let row = &self.0[query];
            let first = row.iter().position(|&seen| seen).unwrap_or(0);
            first..row.iter().rposition(|&seen| seen).map_or(first, |at| at + 1)
        }

        fn mask(&self, query: usize, range: Range<usize>) -> Option<&[bool]> {
            let row = &self.0[query][range];
            row.contains(&false).then_some(row)
        }
    }

    fn reference(head: &Head, seen: &[bool], query: usize) -> Vec<f64> {
        let (dim, none) = (head.dim, !seen.contains(&true));
        let scores = head.keys.chunks(dim).zip(seen).map(|(key, &seen)| {
            let products = key.iter().zip(&head.queries[query * dim..]).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let score = products.sum::<f64>() * f64::from(head.scale);
            let score = head.cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
            match (seen, none) {
                (_, true) => 1.0,
                (true, _) => score.exp(),
                (false, _) => 0.0,
            }
        });
        let scores: Vec<f64> = scores.collect();
        let sum: f64 = scores.iter().sum();
        let products = |at: usize| scores.iter().zip(head.values.chunks(dim)).map(move |(p, v)| p * f64::from(v[at]));
        (0..dim).map(|at| products(at).sum::<f64>() / sum).collect()
    }

    #[test]
    fn keys_are_packed_from_any_pitch() {
        let (keys, dim, pitch) = (37, 24, 27);
        let dense = noise(keys * dim, 3);
        let pitched: Vec<f32> = dense.chunks(dim).flat_map(|key| [key, &[9.0; 3]].concat()).collect();
        let [mut from_dense, mut from_pitched] = [(); 2].map(|()| vec![f32::NAN; packed_length(keys, dim)]);
        pack_keys(&dense, dim, dim, &mut from_dense);
        pack_keys(&pitched[..pitched.len() - 3], pitch, dim, &mut from_pitched);
        assert_eq!(from_dense, from_pitched);
        for (key, row) in dense.chunks(dim).enumerate() {
            for (at, &number) in row.iter().enumerate() {
                assert_eq!(from_dense[(key / PANEL * dim + at) * PANEL + key % PANEL], number);
            }
        }
        assert!(from_dense[2 * PANEL * dim..].chunks(PANEL).all(|numbers| numbers[5..] == [0.0; 11]));
    }

    #[test]
    fn heads_are_those_of_float64() {
        at_each_level(Level::Generic, |level| {
            for (queries, keys, dim, cap) in [
                (1, 1, 16, None),
                (1, 37, 64, Some(50.0)),
                (2, 16, 48, Some(2.0)),
                (3, 40, 8, None),
                (7, 100, 24, Some(50.0)),
                (20, 33, 256, None),
                (64, 64, 64, Some(50.0)),
                (13, 7, 20, None),
                (14, 50, 72, None),
            ] {
                let [q, k, v] = [(queries, 3), (keys, 5), (keys, 7)].map(|(count, seed)| wide_noise(count * dim, seed));
                // A window with holes; the second query sees nothing.
                let sees =
                    |query: usize, key: usize| query != 1 && key.abs_diff(query * keys / queries) < 9 && key % 5 != 2;
                let mask = (0..queries).map(|query| (0..keys).map(|key| sees(query, key)).collect());
                let mask = Rows(mask.collect());
                let mut packed = vec![f32::NAN; packed_length(keys, dim)];
                pack_keys(&k, dim, dim, &mut packed);
                for packed_keys in [None, Some(&packed[..])] {
                    let head = Head { queries: &q, keys: &k, values: &v, packed_keys, dim, scale: 0.3, cap };
                    let mut to = vec![f32::NAN; queries * dim];
                    let (mut scratch, half) = (Scratch::default(), queries / 2);
                    let (first, second) = to.split_at_mut(half * dim);
                    attend(head, &mask, 0..half, &mut scratch, first);
                    attend(Head { queries: &q[half * dim..], ..head }, &mask, half..queries, &mut scratch, second);
                    for (query, found) in to.chunks(dim).enumerate() {
                        let expected = reference(&head, &mask.0[query], query);
                        let apart = expected.iter().zip(found).map(|(a, &b)| (a - f64::from(b)).abs());
                        let (apart, packed) = (apart.fold(0.0, f64::max), packed_keys.is_some());
                        assert!(apart < 5e-6, "{level:?}, {queries}, {keys}, {dim}, {packed}: query {query}: {apart}");
                    }
                }
            }
        });
    }
}
