//! Attention of encoders in few bits where the processor has AMX: products of pairs of bfloat16.
//!
//! # Design
//! A float32 is the sum of two bfloat16, but for its last bits: `a = a₁ + a₂`, and `a·b` about `a₁·b₁ + a₁·b₂ + a₂·b₁`, off by less than
//! 2⁻¹² of it. That is lost beside what rounding activations to 8 bits loses in the products before and after; encoders in float32 have
//! attention in float32.
//!
//! The products of a tile add up 32 keys in an order of their own. So that a source's numbers do not depend on what is beside it, keys
//! are counted from where it begins; queries of one source are computed together, and those that see nothing as they ever are.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::super::aligned::Aligned;
use super::super::amx::{SIDE, Tiles, WIDTH};
use super::super::avx512::turned;
use super::super::processor::{Level, level};
use super::super::sixteen::Avx512;
use super::super::{Parts, Spread};
use super::head::{Visible, mean, weights_of};
use super::{Layout, Mask};

/// Keys, or numbers of queries and keys, that a tile has in a row.
const GROUP: usize = WIDTH / 2;
/// Bytes of a tile.
const TILE: usize = SIDE * WIDTH;
/// Tiles of queries that one thread takes at a time.
const TOGETHER: usize = 4;

/// Every odd one of the words of two registers.
const ODD: [u16; GROUP] = {
    let (mut odd, mut at) = ([0; GROUP], 0);
    while at < GROUP {
        odd[at] = 2 * at as u16 + 1;
        at += 1;
    }
    odd
};

/// Whether heads of so many numbers are computed here.
pub fn takes(dim: usize) -> bool {
    level() >= Level::Amx && dim > 0 && dim.is_multiple_of(GROUP)
}

/// Which queries are computed together, over which keys.
pub struct Plan {
    /// The keys of each source, and how many groups those before it have.
    sources: Vec<(Range<usize>, usize)>,
    /// The keys of each group: those of a source, [`GROUP`] by [`GROUP`].
    groups: Vec<Range<usize>>,
    /// At most as many queries as a tile has rows, of one source; of none if they see nothing.
    tiles: Vec<(Range<usize>, Option<usize>)>,
}

impl Plan {
    /// Of what each of `count` queries sees, or all of them alike; nothing if that is not as in an encoder, where a source's first token
    /// is the first that it sees itself.
    pub fn of(rows: &[(Range<usize>, bool)], count: usize) -> Option<Plan> {
        let mut plan = Plan { sources: Vec::new(), groups: Vec::new(), tiles: Vec::new() };
        let mut first = 0;
        for query in 0..count {
            let sees = &rows[query % rows.len()].0;
            let begins = plan.sources.is_empty() || rows.len() > 1 && sees.start == query;
            let source = match (sees.is_empty(), begins) {
                (true, _) => None,
                (false, true) => {
                    plan.sources.push((sees.clone(), 0));
                    Some(plan.sources.len() - 1)
                }
                (false, false) => {
                    let (keys, _) = plan.sources.last_mut()?;
                    if sees.start < keys.start {
                        return None;
                    }
                    keys.end = keys.end.max(sees.end);
                    Some(plan.sources.len() - 1)
                }
            };
            match plan.tiles.last_mut() {
                Some((queries, of)) if *of == source && query - first < SIDE => queries.end = query + 1,
                _ => {
                    first = query;
                    plan.tiles.push((query..query + 1, source));
                }
            }
        }
        for (keys, before) in &mut plan.sources {
            *before = plan.groups.len();
            plan.groups.extend(keys.clone().step_by(GROUP).map(|first| first..keys.end.min(first + GROUP)));
        }
        Some(plan)
    }
}

/// What heads have in common.
#[derive(Clone, Copy)]
pub struct Heads {
    pub scale: f32,
    pub cap: Option<f32>,
    /// Of queries, and of keys and values.
    pub layouts: [Layout; 2],
}

/// Keys and values in two parts, kept for their allocations.
#[derive(Default)]
pub struct Halves {
    /// `[items, heads, groups, 2 · SIDE keys, dim / GROUP, parts, pairs of numbers, keys, 2]`
    keys: Aligned<u16>,
    /// `[items, heads, groups, dim / SIDE, parts, pairs of keys, numbers, 2]`
    values: Aligned<u16>,
}

/// What a tile of queries is computed in.
#[derive(Default)]
struct Room {
    scores: Aligned<f32>,
    context: Aligned<f32>,
    /// The parts of the queries, and of what their scores become.
    queries: [Aligned<u16>; 2],
    probabilities: [Aligned<u16>; 2],
}

impl Halves {
    /// Attends, with what is seen of each item of the batch, or of all of them.
    ///
    /// # Safety
    /// [`takes`] says so of the heads, and what is seen is within the keys.
    pub unsafe fn attend(
        &mut self,
        heads: Heads,
        seen: &[(Mask, Plan)],
        [queries, keys, values]: [&[f32]; 3],
        to: &mut [f32],
        spread: Spread,
    ) -> ort::Result<()> {
        let [given, source] = heads.layouts;
        let dim = given.dim;
        let groups = seen.iter().map(|(_, plan)| plan.groups.len()).max().unwrap_or(0);
        let of_group = 2 * GROUP * dim;
        for all in [&mut self.keys, &mut self.values] {
            // What there is more of from another run does no harm, and to write it anew would take as long as what follows.
            let length = source.batch * source.heads * groups * of_group;
            if all.len() < length {
                all.resize(length, 0);
            }
        }
        let [of_keys, of_values] = [Parts::new(&mut self.keys), Parts::new(&mut self.values)];
        spread(source.batch * groups, &|part| {
            let (item, group) = (part / groups, part % groups);
            let Some(tokens) = seen[item % seen.len()].1.groups.get(group) else { return };
            let mut room = Aligned::default();
            room.resize(2 * GROUP * dim, 0);
            for head in 0..source.heads {
                let first = ((item * source.heads + head) * groups + group) * of_group;
                let rows = |x| source.part(x, [item, head], tokens.clone());
                // SAFETY: every group is taken by one call only; the features are the caller's.
                unsafe {
                    let (keys_to, values_to) =
                        (of_keys.of(first..first + of_group), of_values.of(first..first + of_group));
                    keys_of_group(rows(keys), source.pitch(), dim, &mut room, keys_to);
                    values_of_group(rows(values), source.pitch(), dim, values_to);
                }
            }
        })?;
        let (of_keys, of_values) = (&self.keys[..], &self.values[..]);
        let to = Parts::new(to);
        let shares = seen.iter().map(|(_, plan)| plan.tiles.len().div_ceil(TOGETHER)).max().unwrap_or(0);
        let of_heads = given.heads / source.heads;
        spread(given.batch * given.heads * shares, &|part| {
            let ([item, head], share) = ([part / shares / given.heads, part / shares % given.heads], part % shares);
            let (visible, plan) = &seen[item % seen.len()];
            let mut room = Room::default();
            let first = (item * source.heads + head / of_heads) * groups * of_group;
            let length = plan.groups.len() * of_group;
            let halves = [&of_keys[first..first + length], &of_values[first..first + length]];
            // SAFETY: the features are the caller's.
            let _tiles = unsafe { Tiles::configured() };
            for (of_tile, source_of) in plan.tiles.iter().skip(share * TOGETHER).take(TOGETHER) {
                let Some(source_of) = source_of else {
                    let values = source.part(values, [item, head / of_heads], 0..source.rows).chunks(source.pitch());
                    for query in of_tile.clone() {
                        let place = given.place(item, head, query);
                        // SAFETY: every query of a head is taken by one call only.
                        mean(values.clone(), unsafe { to.of(place..place + dim) });
                    }
                    continue;
                };
                let x = given.part(queries, [item, head], of_tile.clone());
                // SAFETY: the features are the caller's; the groups are those of the plan.
                unsafe { tile(heads, (plan, *source_of), (visible, of_tile.clone()), (x, halves), &mut room) };
                for (context, query) in room.context.chunks_exact(dim).zip(of_tile.clone()) {
                    let place = given.place(item, head, query);
                    // SAFETY: as above.
                    unsafe { to.of(place..place + dim) }.copy_from_slice(context);
                }
            }
        })
    }
}

/// Computes a tile of queries, of which there are some, into the room's context `[SIDE, dim]`.
///
/// # Safety
/// The processor has AMX, whose tiles are configured; keys and values are the groups of the plan.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn tile(
    Heads { scale, cap, layouts }: Heads,
    (plan, source): (&Plan, usize),
    (visible, queries): (&Mask, Range<usize>),
    (x, [keys, values]): (&[f32], [&[u16]; 2]),
    Room { scores, context, queries: of_queries, probabilities }: &mut Room,
) {
    let (dim, pitch) = (layouts[0].dim, layouts[0].pitch());
    let (all, before) = &plan.sources[source];
    let ranges = queries.clone().map(|query| visible.range(query));
    let start = ranges.clone().map(|range| range.start).min().unwrap_or(all.start);
    let end = ranges.map(|range| range.end).max().unwrap_or(all.start);
    let groups = (start - all.start) / GROUP..(end - all.start).div_ceil(GROUP);
    let (first, count) = (all.start + groups.start * GROUP, groups.len() * GROUP);
    let of_group = 2 * GROUP * dim;
    let (keys, values) = (&keys[(before + groups.start) * of_group..], &values[(before + groups.start) * of_group..]);
    assert!(
        keys.len().min(values.len()) >= groups.len() * of_group && queries.len() <= SIDE && dim.is_multiple_of(GROUP)
    );

    // Rows of queries that are not there are any.
    scores.resize(SIDE * dim.max(count + SIDE), 0.0);
    for (to, x) in scores.chunks_exact_mut(dim).zip(x.chunks(pitch)).take(queries.len()) {
        to.iter_mut().zip(x).for_each(|(to, x)| *to = x * scale);
    }
    of_queries.iter_mut().for_each(|part| part.resize(SIDE * dim, 0));
    let [high, low] = of_queries;
    split(&scores[..queries.len() * dim], high, low);
    // Scores of queries side by side are not to meet in the same lines of the first cache.
    let apart = count + SIDE;
    for group in 0..groups.len() {
        let of_keys = keys[group * of_group..].as_ptr().cast::<u8>();
        // SAFETY: two times sixteen keys; the rest is the caller's.
        unsafe {
            let queries = Left { parts: [high.as_ptr().cast(), low.as_ptr().cast()], pitch: 2 * dim };
            let keys = Right { first: of_keys, apart: dim / GROUP * 2 * TILE, step: 2 * TILE };
            products(queries, keys, dim / GROUP, scores.as_mut_ptr().add(group * GROUP), 4 * apart);
        }
    }
    let mut sums = [0.0_f32; SIDE];
    for (at, query) in queries.clone().enumerate() {
        let (scores, range) = (&mut scores[at * apart..][..count], visible.range(query));
        let own = range.start - first..range.end - first;
        // SAFETY: the features are there.
        sums[at] = unsafe { weights_of::<Avx512>(scores, own, cap, visible.seen(query, range)) };
    }
    let apart_in_parts = count + GROUP;
    probabilities.iter_mut().for_each(|part| part.resize(SIDE * apart_in_parts, 0));
    let [high, low] = probabilities;
    for at in 0..queries.len() {
        let place = at * apart_in_parts..at * apart_in_parts + count;
        split(&scores[at * apart..][..count], &mut high[place.clone()], &mut low[place]);
    }
    context.resize(SIDE * dim, 0.0);
    for number in (0..dim).step_by(GROUP) {
        let of_values = values[number / SIDE * TILE..].as_ptr().cast::<u8>();
        // SAFETY: two times sixteen numbers of so many values; the rest is the caller's.
        unsafe {
            let probabilities = Left { parts: [high.as_ptr().cast(), low.as_ptr().cast()], pitch: 2 * apart_in_parts };
            let values = Right { first: of_values, apart: 2 * TILE, step: dim / SIDE * 2 * TILE };
            products(probabilities, values, groups.len(), context.as_mut_ptr().add(number), 4 * dim);
        }
    }
    for (context, sum) in context.chunks_exact_mut(dim).zip(sums).take(queries.len()) {
        let factor = 1.0 / sum;
        context.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Sixteen rows of numbers in two parts, and how many bytes rows are apart.
struct Left {
    parts: [*const u8; 2],
    pitch: usize,
}

/// Two times sixteen columns: the two parts of a tile one behind the other, so far apart those of the next columns, and those of the next
/// numbers.
struct Right {
    first: *const u8,
    apart: usize,
    step: usize,
}

/// The products `[SIDE, 2 · SIDE]`, of `steps` times [`GROUP`] numbers, rows so many bytes apart.
///
/// # Safety
/// The processor has AMX, whose tiles are configured; there are as many numbers, and room for the products.
#[target_feature(enable = "avx512f")]
unsafe fn products(left: Left, right: Right, steps: usize, to: *mut f32, pitch: usize) {
    if steps == 0 {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm2, [{high} + {pitch}]",
            "tileloadd tmm4, [{first} + {line}]",
            "tdpbf16ps tmm0, tmm2, tmm4",
            "tileloadd tmm6, [{second} + {line}]",
            "tdpbf16ps tmm1, tmm2, tmm6",
            "tileloadd tmm5, [{first} + {line} + 1024]",
            "tdpbf16ps tmm0, tmm2, tmm5",
            "tileloadd tmm7, [{second} + {line} + 1024]",
            "tdpbf16ps tmm1, tmm2, tmm7",
            "tileloadd tmm3, [{low} + {pitch}]",
            "tdpbf16ps tmm0, tmm3, tmm4",
            "tdpbf16ps tmm1, tmm3, tmm6",
            "add {high}, 64",
            "add {low}, 64",
            "add {first}, {step}",
            "add {second}, {step}",
            "dec {left}",
            "jnz 2b",
            "tilestored [{to} + {to_pitch}], tmm0",
            "tilestored [{to} + {to_pitch} + 64], tmm1",
            high = inout(reg) left.parts[0] => _, low = inout(reg) left.parts[1] => _,
            first = inout(reg) right.first => _, second = inout(reg) right.first.add(right.apart) => _,
            left = inout(reg) steps => _, pitch = in(reg) left.pitch, line = in(reg) WIDTH, step = in(reg) right.step,
            to = in(reg) to, to_pitch = in(reg) pitch,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            out("tmm7") _, options(nostack),
        );
    }
}

/// The parts of numbers, in their order: the upper halves of them, and those of what is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn split(x: &[f32], high: &mut [u16], low: &mut [u16]) {
    assert!(x.len().is_multiple_of(GROUP) && high.len() >= x.len() && low.len() >= x.len(), "room for {}", x.len());
    // SAFETY: as many as a register holds.
    let odd = unsafe { _mm512_loadu_si512(ODD.as_ptr().cast()) };
    for at in (0..x.len()).step_by(GROUP) {
        // SAFETY: two times sixteen numbers, and room for their parts.
        unsafe {
            let (a, b) = (_mm512_loadu_ps(x.as_ptr().add(at)), _mm512_loadu_ps(x.as_ptr().add(at + SIDE)));
            let (of_a, of_b) = (upper(a), upper(b));
            let whole = _mm512_permutex2var_epi16(_mm512_castps_si512(of_a), odd, _mm512_castps_si512(of_b));
            _mm512_storeu_si512(high.as_mut_ptr().add(at).cast(), whole);
            let (of_a, of_b) = (_mm512_sub_ps(a, of_a), _mm512_sub_ps(b, of_b));
            let rest = _mm512_permutex2var_epi16(_mm512_castps_si512(of_a), odd, _mm512_castps_si512(of_b));
            _mm512_storeu_si512(low.as_mut_ptr().add(at).cast(), rest);
        }
    }
}

/// Numbers with the upper halves of their bits alone.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn upper(x: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff_0000_u32 as i32)))
}

/// Brings at most [`GROUP`] keys, one every `pitch`, into the order of [`Halves::keys`], with zeros for those that are not there. `room`
/// is for the parts of `GROUP` keys.
#[expect(clippy::needless_range_loop, reason = "iterators are inlined or not as the compiler likes")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn keys_of_group(keys: &[f32], pitch: usize, dim: usize, room: &mut [u16], to: &mut [u16]) {
    assert!(room.len() == 2 * GROUP * dim && to.len() == room.len() && dim.is_multiple_of(GROUP), "room for a group");
    let (high, low) = room.split_at_mut(GROUP * dim);
    let there = keys.len().div_ceil(pitch);
    high[there * dim..].fill(0);
    low[there * dim..].fill(0);
    for (at, key) in keys.chunks(pitch).enumerate() {
        let place = at * dim..(at + 1) * dim;
        split(&key[..dim], &mut high[place.clone()], &mut low[place]);
    }
    let tiles = to.chunks_exact_mut(TILE / 2);
    for (tile, to) in tiles.enumerate() {
        let (half, step, part) = (tile / (dim / GROUP * 2), tile / 2 % (dim / GROUP), tile % 2);
        let part = if part == 0 { &*high } else { &*low };
        // Pairs of numbers of sixteen keys, from this one on.
        let first = part[half * SIDE * dim + step * GROUP..].as_ptr();
        for four in 0..SIDE / 4 {
            // SAFETY: eight numbers of each of sixteen keys, and the room.
            unsafe {
                let words = turned(first.add(four * 8).cast(), 2 * dim);
                for at in 0..4 {
                    _mm512_storeu_si512(to.as_mut_ptr().add((four * 4 + at) * GROUP).cast(), words[at]);
                }
            }
        }
    }
}

/// Brings at most [`GROUP`] values, one every `pitch`, into the order of [`Halves::values`], with zeros for those that are not there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn values_of_group(values: &[f32], pitch: usize, dim: usize, to: &mut [u16]) {
    let there = values.len().div_ceil(pitch);
    assert!(there <= GROUP && to.len() >= 2 * GROUP * dim && values.len() >= (there - 1) * pitch + dim);
    for pair in 0..GROUP / 2 {
        for block in 0..dim / SIDE {
            let (mut a, mut b) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            // SAFETY: sixteen numbers of values that are there, and room for two parts of two times sixteen.
            unsafe {
                let from = values.as_ptr().wrapping_add(2 * pair * pitch + block * SIDE);
                if 2 * pair < there {
                    a = _mm512_loadu_ps(from);
                }
                if 2 * pair + 1 < there {
                    b = _mm512_loadu_ps(from.add(pitch));
                }
                let to = to.as_mut_ptr().add(block * TILE + pair * GROUP);
                let (of_a, of_b) = (upper(a), upper(b));
                _mm512_storeu_si512(to.cast(), pairs(of_a, of_b));
                let (rest_of_a, rest_of_b) = (upper(_mm512_sub_ps(a, of_a)), upper(_mm512_sub_ps(b, of_b)));
                _mm512_storeu_si512(to.add(TILE / 2).cast(), pairs(rest_of_a, rest_of_b));
            }
        }
    }
}

/// The upper halves of numbers, each of the first ones before that of the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pairs(a: __m512, b: __m512) -> __m512i {
    _mm512_or_si512(_mm512_srli_epi32::<16>(_mm512_castps_si512(a)), _mm512_castps_si512(b))
}

#[cfg(test)]
mod tests {
    use super::super::super::alone;
    use super::super::extent;
    use super::super::head::tests::noise;
    use super::*;

    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;

    /// Queries, keys and values `[tokens, heads · dim]`, and of which source each token is: none where it is padding.
    struct Packed {
        x: [Vec<f32>; 3],
        of: Vec<Option<usize>>,
        dim: usize,
    }

    impl Packed {
        fn new(of: Vec<Option<usize>>, dim: usize) -> Packed {
            let count = of.len();
            let x = [(HEADS, 3), (KV_HEADS, 5), (KV_HEADS, 7)].map(|(heads, seed)| noise(count * heads * dim, seed));
            Packed { x, of, dim }
        }

        /// One of the sources by itself.
        fn source(&self, source: usize) -> Packed {
            let here: Vec<usize> = (0..self.of.len()).filter(|&token| self.of[token] == Some(source)).collect();
            let rows = |x: &Vec<f32>| {
                let width = x.len() / self.of.len();
                here.iter().flat_map(|&token| &x[token * width..][..width]).copied().collect()
            };
            Packed { x: self.x.each_ref().map(rows), of: vec![Some(source); here.len()], dim: self.dim }
        }

        fn sees(&self, window: usize, query: usize, key: usize) -> bool {
            self.of[query].is_some() && self.of[query] == self.of[key] && query.abs_diff(key) < window
        }

        fn attended(&self, window: usize, cap: Option<f32>) -> Vec<f32> {
            let (count, dim) = (self.of.len(), self.dim);
            let mask: Vec<bool> = (0..count * count).map(|at| self.sees(window, at / count, at % count)).collect();
            let rows: Vec<(Range<usize>, bool)> = mask.chunks_exact(count).map(extent).collect();
            let plan = Plan::of(&rows, count).expect("an encoder's mask");
            let layout = |heads| Layout { batch: 1, heads, rows: count, dim, is_side_by_side: true };
            let heads = Heads { scale: 0.2, cap, layouts: [layout(HEADS), layout(KV_HEADS)] };
            let seen = [(Mask { mask: &mask, keys: count, rows: &rows, queries: count }, plan)];
            let mut to = vec![f32::NAN; count * HEADS * dim];
            let x = self.x.each_ref().map(|x| &x[..]);
            // SAFETY: they are taken, as is looked at before.
            unsafe { Halves::default().attend(heads, &seen, x, &mut to, &alone) }.expect("it is done");
            to
        }

        /// By definition, in float64.
        fn reference(&self, window: usize, cap: Option<f32>, query: usize, head: usize) -> Vec<f64> {
            let dim = self.dim;
            let row = |x: &'_ [f32], heads: usize, token: usize, head: usize| -> Vec<f64> {
                x[(token * heads + head) * dim..][..dim].iter().map(|&x| x.into()).collect()
            };
            let [q, k, v] = &self.x;
            let of_kv = head * KV_HEADS / HEADS;
            let none = self.of[query].is_none();
            let weights: Vec<f64> = (0..self.of.len())
                .map(|key| {
                    let (q, k) = (row(q, HEADS, query, head), row(k, KV_HEADS, key, of_kv));
                    let score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(0.2_f32);
                    let score = cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                    if none { 1.0 } else { f64::from(self.sees(window, query, key)) * score.exp() }
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            let mut to = vec![0.0; dim];
            for (key, weight) in weights.iter().enumerate() {
                let v = row(v, KV_HEADS, key, of_kv);
                to.iter_mut().zip(v).for_each(|(to, v)| *to += weight / sum * v);
            }
            to
        }
    }

    #[test]
    fn packed_sources_are_those_of_float64_and_the_same_alone() {
        for dim in [32, 64] {
            if !takes(dim) {
                return;
            }
            let of =
                [(0, 41), (1, 7), (2, 90), (3, 1)].into_iter().flat_map(|(source, count)| vec![Some(source); count]);
            let packed = Packed::new(of.chain([None; 3]).collect(), dim);
            for (window, cap) in [(1000, Some(50.0)), (20, Some(3.0)), (33, None)] {
                let found = packed.attended(window, cap);
                for (token, found) in found.chunks(HEADS * dim).enumerate() {
                    for (head, found) in found.chunks(dim).enumerate() {
                        let expected = packed.reference(window, cap, token, head);
                        let apart =
                            expected.iter().zip(found).map(|(a, &b)| (a - f64::from(b)).abs()).fold(0.0, f64::max);
                        assert!(apart < 1e-4, "{dim}, window {window}, {cap:?}: token {token}, head {head}: {apart}");
                    }
                }
                for source in 0..4 {
                    let alone = packed.source(source).attended(window, cap);
                    let here = packed.of.iter().zip(found.chunks(HEADS * dim)).filter(|(of, _)| **of == Some(source));
                    let here: Vec<f32> = here.flat_map(|(_, x)| x).copied().collect();
                    let is_same = here.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(is_same && here.len() == alone.len(), "{dim}, window {window}: source {source}");
                }
            }
        }
    }

    #[test]
    fn queries_are_computed_with_others_of_their_source() {
        let rows = |ranges: &[Range<usize>]| -> Vec<(Range<usize>, bool)> {
            ranges.iter().map(|range| (range.clone(), true)).collect()
        };
        let plan = Plan::of(&rows(&[0..2, 0..2, 2..5, 2..5, 2..5, 0..0]), 6).expect("two sources");
        assert_eq!(plan.tiles, [(0..2, Some(0)), (2..5, Some(1)), (5..6, None)]);
        assert_eq!(plan.groups, [0..2, 2..5]);
        // All alike, from the third key on.
        let plan = Plan::of(&[(2..50, true)], 50).expect("one source");
        assert_eq!(plan.groups, [2..34, 34..50]);
        assert_eq!(plan.tiles.iter().map(|(queries, _)| queries.len()).collect::<Vec<_>>(), [16, 16, 16, 2]);
        // One that sees what lies before its source.
        assert!(Plan::of(&rows(&[0..2, 0..2, 2..4, 1..4]), 4).is_none());
    }
}
