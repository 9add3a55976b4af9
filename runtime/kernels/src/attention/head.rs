//! `softmax(softcap(q·kᵀ·scale) where visible) · v` for one head, without the square of all scores, and without those of keys
//! that a whole tile of queries does not see.
//!
//! # Design
//! A head is computed for a few queries at a time: their scores stay in the first cache. Many queries find the keys turned
//! round beforehand, so that scores of neighbouring keys are neighbouring lanes; few queries take them as they lie.
//!
//! Written once for [`Sixteen`] numbers at a time, and compiled for any processor, for x86-64 with AVX2, and with AVX-512.

use std::ops::Range;

use crate::aligned::Aligned;
use crate::functions::{dots, exponentials, softcap};
#[cfg(target_arch = "x86_64")]
use crate::processor::{Level, level};
#[cfg(target_arch = "x86_64")]
use crate::sixteen::{Avx2, Avx512};
use crate::sixteen::{Plain, Sixteen};

/// Queries that are computed at a time: as many as there are registers for sums of theirs, with AVX-512 twice as many.
const TILE: usize = 6;
const WIDE_TILE: usize = 12;
/// Queries that are whole tiles on any processor.
pub const TILES: usize = WIDE_TILE;
/// Keys, and numbers of values, whose sums are under way at a time: the keys of a panel of turned ones.
pub const WIDE: usize = 16;
/// Fewer queries are not worth turning the keys round for.
const MANY: usize = 8;

/// What one head attends with: those of its queries that are computed, `[queries, dim]`, keys and values `[keys, dim]`.
#[derive(Clone, Copy)]
pub struct Head<'h> {
    pub queries: &'h [f32],
    pub keys: &'h [f32],
    pub values: &'h [f32],
    /// The keys as [`turned`] makes them, if it has.
    pub turned: Option<&'h [f32]>,
    pub dim: usize,
    pub scale: f32,
    pub cap: Option<f32>,
}

/// What the queries of a tile see: keys in a range, and of those the ones that are not hidden from all or some.
pub trait Visible {
    /// All keys that the query may see are within it.
    fn range(&self, query: usize) -> Range<usize>;
    /// For each key of a range whether the query sees it; nothing if it sees all.
    fn seen(&self, query: usize, range: Range<usize>) -> Option<&[bool]>;
}

/// Kept for its allocations.
#[derive(Default)]
pub struct Room {
    /// `[queries of a tile, keys]`
    scores: Aligned<f32>,
    /// `[queries of a tile, dim]`
    queries: Aligned<f32>,
}

/// Whether keys are worth turning round for so many queries.
pub fn are_many(queries: usize) -> bool {
    queries >= MANY
}

/// Numbers of the keys `[keys, dim]` when they are turned round.
pub fn length_of_turned(keys: usize, dim: usize) -> usize {
    keys.next_multiple_of(WIDE) * dim
}

/// Keys of `dim` numbers, one every `pitch`, as `[panels, dim, WIDE]`, filled up with zeros.
pub fn turned(keys: &[f32], [pitch, dim]: [usize; 2], to: &mut [f32]) {
    for (keys, panel) in keys.chunks(WIDE * pitch).zip(to.chunks_exact_mut(WIDE * dim)) {
        if keys.len().div_ceil(pitch) < WIDE {
            panel.fill(0.0);
        }
        for (key, numbers) in keys.chunks(pitch).enumerate() {
            for (panel, number) in panel.chunks_exact_mut(WIDE).zip(&numbers[..dim]) {
                panel[key] = *number;
            }
        }
    }
}

/// Computes the queries `queries` of a head, which are those that it has, into `to`, `[queries, dim]`. A query that sees nothing
/// sees all keys alike: what is hidden has the least finite score, not none, in the reference.
pub fn attend(head: Head, visible: &impl Visible, queries: Range<usize>, room: &mut Room, to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: the level is no higher than the processor's.
        Level::Amx | Level::Vnni => return unsafe { with_avx512(head, visible, queries, room, to) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { with_avx2(head, visible, queries, room, to) },
        Level::Generic => {}
    }
    // SAFETY: for any processor.
    unsafe { in_tiles::<Plain, TILE>(head, visible, queries, room, to) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2(head: Head, visible: &impl Visible, queries: Range<usize>, room: &mut Room, to: &mut [f32]) {
    // SAFETY: the features are there.
    unsafe { in_tiles::<Avx2, TILE>(head, visible, queries, room, to) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn with_avx512(head: Head, visible: &impl Visible, queries: Range<usize>, room: &mut Room, to: &mut [f32]) {
    // SAFETY: the features are there.
    unsafe { in_tiles::<Avx512, WIDE_TILE>(head, visible, queries, room, to) };
}

/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn in_tiles<S: Sixteen, const MOST: usize>(
    head: Head,
    visible: &impl Visible,
    queries: Range<usize>,
    room: &mut Room,
    to: &mut [f32],
) {
    let (dim, mut first) = (head.dim, queries.start);
    while first < queries.end {
        let place = (first - queries.start) * dim;
        let (head, to) = (Head { queries: &head.queries[place..], ..head }, &mut to[place..]);
        // SAFETY: the caller's.
        first += unsafe {
            // Each number is one more variant of all that is compiled for it: any processor has two.
            match queries.end - first {
                WIDE_TILE.. if MOST == WIDE_TILE => tile::<S, WIDE_TILE>(head, visible, first, room, to),
                TILE.. => tile::<S, TILE>(head, visible, first, room, to),
                4.. if S::HAS_AVX2 => tile::<S, 4>(head, visible, first, room, to),
                2.. if S::HAS_AVX2 => tile::<S, 2>(head, visible, first, room, to),
                _ => tile::<S, 1>(head, visible, first, room, to),
            }
        };
    }
}

/// The first `R` queries, as many as are returned: that at `first` and the next ones.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
unsafe fn tile<S: Sixteen, const R: usize>(
    head: Head,
    visible: &impl Visible,
    first: usize,
    room: &mut Room,
    to: &mut [f32],
) -> usize {
    let dim = head.dim;
    let to = &mut to[..R * dim];
    let ranges: [Range<usize>; R] = std::array::from_fn(|at| visible.range(first + at));
    let there = ranges.iter().filter(|range| !range.is_empty());
    let mut start = there.clone().map(|range| range.start).min().unwrap_or(0);
    let end = there.map(|range| range.end).max().unwrap_or(0);
    if start == end {
        to.chunks_exact_mut(dim).for_each(|to| mean(head.values.chunks_exact(dim), to));
        return R;
    }
    let Room { scores, queries } = room;
    queries.resize(R * dim, 0.0);
    for (to, x) in queries.iter_mut().zip(&head.queries[..R * dim]) {
        *to = x * head.scale;
    }
    let count = match head.turned {
        Some(turned) => {
            // Whole panels; what they have besides is hidden below.
            start = start / WIDE * WIDE;
            let panels = start / WIDE..end.div_ceil(WIDE);
            scores.resize(R * pitch(panels.len() * WIDE), 0.0);
            let panels = &turned[panels.start * WIDE * dim..panels.end * WIDE * dim];
            // SAFETY: the caller's.
            unsafe {
                let done = match S::REGISTERS {
                    WIDE.. => scores_of_panels::<S, R, 2>(queries, panels, dim, 0, scores),
                    _ => 0,
                };
                scores_of_panels::<S, R, 1>(queries, panels, dim, done, scores);
            }
            panels.len() / dim
        }
        None => {
            let count = end - start;
            scores.resize(R * pitch(count), 0.0);
            for (at, keys) in head.keys[start * dim..end * dim].chunks(8 * dim).enumerate() {
                for (query, scores) in queries.chunks_exact(dim).zip(scores.chunks_exact_mut(pitch(count))) {
                    dots::<S>(query, keys, &mut scores[8 * at..count.min(8 * at + 8)]);
                }
            }
            count
        }
    };
    let mut sums = [0.0_f32; R];
    for (at, scores) in scores.chunks_exact_mut(pitch(count)).enumerate() {
        let range = &ranges[at];
        let own = range.start.max(start) - start..range.end.max(start) - start;
        // SAFETY: the caller's.
        sums[at] =
            unsafe { weights_of::<S>(&mut scores[..count], own, head.cap, visible.seen(first + at, range.clone())) };
    }

    let values = &head.values[start * dim..end * dim];
    // As many numbers of a value at a time as there are registers for.
    let mut of_rows: [&[f32]; R] = [&[]; R];
    for (row, of_row) in of_rows.iter_mut().enumerate() {
        *of_row = &scores[row * pitch(count)..][..end - start];
    }
    let scores = of_rows;
    // SAFETY: the caller's.
    let from = unsafe {
        let from = match (R, S::REGISTERS) {
            (1, _) => sums_of_values::<S, R, 4>(scores, values, dim, 0, to),
            (2 | 3, _) | (_, WIDE..) => sums_of_values::<S, R, 2>(scores, values, dim, 0, to),
            _ => 0,
        };
        sums_of_values::<S, R, 1>(scores, values, dim, from, to)
    };
    for (scores, to) in scores.iter().zip(to.chunks_exact_mut(dim)) {
        for (at, to) in to.iter_mut().enumerate().skip(from) {
            *to = values.chunks_exact(dim).zip(*scores).map(|(value, p)| value[at] * p).sum();
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

/// Makes what values are weighted with of a query's scores, of which it sees its own, or those `seen` of them, and returns their sum.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
pub unsafe fn weights_of<S: Sixteen>(
    scores: &mut [f32],
    own: Range<usize>,
    cap: Option<f32>,
    seen: Option<&[bool]>,
) -> f32 {
    if let Some(cap) = cap {
        // Of what the query sees alone: others may not have a say in how it is computed.
        // SAFETY: the caller's.
        unsafe { softcap::<S>(&mut scores[own.clone()], cap) };
    }
    scores[..own.start].fill(0.0);
    scores[own.end..].fill(0.0);
    if let Some(seen) = seen {
        for (score, &seen) in scores[own.clone()].iter_mut().zip(seen) {
            *score = if seen { *score } else { f32::NEG_INFINITY };
        }
    }
    // From the first that it sees on, so that they are added up alike wherever that lies.
    // SAFETY: the caller's.
    unsafe { exponentials::<S>(&mut scores[own]) }
}

/// Numbers from a query's scores to the next one's: so many more than there are scores that queries side by side do not meet in the same
/// lines of the first cache, as they would where scores are a power of two.
fn pitch(count: usize) -> usize {
    count + WIDE
}

/// The mean of values, of which there may be more numbers than there is room for.
pub fn mean<'v>(values: impl ExactSizeIterator<Item = &'v [f32]>, to: &mut [f32]) {
    to.fill(0.0);
    let factor = 1.0 / values.len() as f32;
    for value in values {
        to.iter_mut().zip(value).for_each(|(to, x)| *to += x);
    }
    to.iter_mut().for_each(|x| *x *= factor);
}

/// The sums of the values `[keys, dim]`, times the probabilities, `keys` of each query: `V` times sixteen numbers of them at a time from
/// `from` on. Returns where fewer are left.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "several arrays are walked at a time, which adapters would hide from the compiler"
)]
unsafe fn sums_of_values<S: Sixteen, const R: usize, const V: usize>(
    probabilities: [&[f32]; R],
    values: &[f32],
    dim: usize,
    mut from: usize,
    to: &mut [f32],
) -> usize {
    let keys = values.len() / dim;
    assert!(probabilities.iter().all(|row| row.len() == keys) && to.len() == R * dim, "a probability for each value");
    while from + V * WIDE <= dim {
        // SAFETY: within the values, of which there are as many as probabilities, and the output.
        unsafe {
            let mut totals = [[S::splat(0.0); V]; R];
            let mut value = values.as_ptr().add(from);
            for key in 0..keys {
                let mut here = [S::splat(0.0); V];
                for (at, here) in here.iter_mut().enumerate() {
                    *here = S::load(value.add(at * WIDE));
                }
                for row in 0..R {
                    let probability = S::splat(*probabilities[row].get_unchecked(key));
                    for at in 0..V {
                        totals[row][at] = probability.fused(here[at], totals[row][at]);
                    }
                }
                value = value.wrapping_add(dim);
            }
            for row in 0..R {
                for at in 0..V {
                    totals[row][at].store(to.as_mut_ptr().add(row * dim + from + at * WIDE));
                }
            }
        }
        from += V * WIDE;
    }
    from
}

/// The scores of the queries `[R, dim]` with `panels [panels, dim, WIDE]` of keys, [`pitch`] apart: those with `P` panels at a time from
/// the panel `first` on. Returns where fewer are left.
///
/// # Safety
/// The processor is of the level of `S`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "as above")]
unsafe fn scores_of_panels<S: Sixteen, const R: usize, const P: usize>(
    queries: &[f32],
    panels: &[f32],
    dim: usize,
    mut first: usize,
    scores: &mut [f32],
) -> usize {
    let (count, all) = (panels.len() / dim, panels.len() / dim / WIDE);
    let pitch = pitch(count);
    assert!(queries.len() == R * dim && scores.len() == R * pitch && count.is_multiple_of(WIDE), "sizes of scores");
    while first + P <= all {
        // SAFETY: within the queries, the panels and the scores.
        unsafe {
            let mut totals = [[S::splat(0.0); P]; R];
            let keys = panels.as_ptr().add(first * dim * WIDE);
            for at in 0..dim {
                let mut here = [S::splat(0.0); P];
                for panel in 0..P {
                    here[panel] = S::load(keys.add((panel * dim + at) * WIDE));
                }
                for row in 0..R {
                    let query = S::splat(*queries.as_ptr().add(row * dim + at));
                    for panel in 0..P {
                        totals[row][panel] = query.fused(here[panel], totals[row][panel]);
                    }
                }
            }
            for row in 0..R {
                for panel in 0..P {
                    totals[row][panel].store(scores.as_mut_ptr().add(row * pitch + (first + panel) * WIDE));
                }
            }
        }
        first += P;
    }
    first
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers between -2 and 2.
    pub fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next() * 2.0).collect()
    }

    struct Seen(Vec<Vec<bool>>);

    impl Visible for Seen {
        fn range(&self, query: usize) -> Range<usize> {
            let row = &self.0[query];
            let first = row.iter().position(|&seen| seen).unwrap_or(0);
            first..row.iter().rposition(|&seen| seen).map_or(first, |at| at + 1)
        }

        fn seen(&self, query: usize, range: Range<usize>) -> Option<&[bool]> {
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
    fn heads_are_those_of_float64() {
        for (queries, keys, dim, cap) in [
            (1, 1, 16, None),
            (1, 37, 64, Some(50.0)),
            (2, 16, 48, Some(2.0)),
            (3, 40, 8, None),
            (7, 100, 24, Some(50.0)),
            (20, 33, 256, None),
            (64, 64, 64, Some(50.0)),
            (13, 7, 20, None),
        ] {
            let [q, k, v] = [(queries, 3), (keys, 5), (keys, 7)].map(|(count, seed)| noise(count * dim, seed));
            // A window with holes; the second query sees nothing.
            let sees =
                |query: usize, key: usize| query != 1 && key.abs_diff(query * keys / queries) < 9 && key % 5 != 2;
            let seen = Seen((0..queries).map(|query| (0..keys).map(|key| sees(query, key)).collect()).collect());
            let mut of_keys = vec![f32::NAN; length_of_turned(keys, dim)];
            turned(&k, [dim; 2], &mut of_keys);
            let apart: Vec<f32> = k.chunks(dim).flat_map(|key| [key, &[9.0; 3]].concat()).collect();
            let mut of_those = vec![f32::NAN; of_keys.len()];
            turned(&apart[..apart.len() - 3], [dim + 3, dim], &mut of_those);
            assert_eq!(of_those, of_keys, "{keys} keys of {dim}");
            for is_turned in [false, true] {
                let turned = is_turned.then_some(&of_keys[..]);
                let head = Head { queries: &q, keys: &k, values: &v, turned, dim, scale: 0.3, cap };
                let mut to = vec![f32::NAN; queries * dim];
                let (mut room, half) = (Room::default(), queries / 2);
                let (first, second) = to.split_at_mut(half * dim);
                attend(head, &seen, 0..half, &mut room, first);
                attend(Head { queries: &q[half * dim..], ..head }, &seen, half..queries, &mut room, second);
                let mut plain = vec![f32::NAN; queries * dim];
                // SAFETY: for any processor.
                unsafe { in_tiles::<Plain, TILE>(head, &seen, 0..queries, &mut room, &mut plain) };
                let mut avx2 = plain.clone();
                #[cfg(target_arch = "x86_64")]
                if level() >= Level::Avx2 {
                    // SAFETY: the features are there.
                    unsafe { with_avx2(head, &seen, 0..queries, &mut room, &mut avx2) };
                }
                for query in 0..queries {
                    let expected = reference(&head, &seen.0[query], query);
                    for found in [&to, &plain, &avx2] {
                        let found = &found[query * dim..][..dim];
                        let apart = expected.iter().zip(found).map(|(a, &b)| (a - f64::from(b)).abs());
                        let apart = apart.fold(0.0, f64::max);
                        assert!(apart < 5e-6, "{queries}, {keys}, {dim}, {is_turned}: query {query}: {apart}");
                    }
                }
            }
        }
    }
}
