//! Attention of quantized encoders on processors with AMX: float32 products, split into pairs of bfloat16.
//!
//! # Design
//! A float32 is the sum of two bfloat16, but for its last bits: `a = a₁ + a₂`, and `a·b` about `a₁·b₁ + a₁·b₂ + a₂·b₁`,
//! off by less than 2⁻¹² of it. That is negligible next to the error of int8 activations in the surrounding matrix
//! multiplications; float32 encoders use float32 attention.
//!
//! A tile sums the products of 32 keys in its own order. So that a source's results do not depend on its neighbours,
//! keys are counted from where the source begins; queries of one source are computed together, and those that see
//! nothing as everywhere else.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::mask::{DenseMask, VisibleKeys};
use super::single_head::{KeyMask, mean, scores_to_numerators};
use super::{HeadLayout, Inputs};
use crate::aligned::AlignedVec;
use crate::amx::{SIDE, TileConfig, WIDTH};
use crate::avx512::transpose_pitched;
use crate::error::Error;
use crate::isa::AmxToken;
use crate::parallel::{ParallelFor, SharedSlice};
use crate::simd::Avx512;

/// Keys, or numbers of queries and keys, in a row of a tile.
const GROUP: usize = WIDTH / 2;
/// Bytes of a tile.
const TILE: usize = SIDE * WIDTH;
/// Tiles of queries in a task.
const TASK_TILES: usize = 4;

/// The indices of the odd words of two registers.
const ODD_WORDS: [u16; GROUP] = {
    let (mut odd, mut at) = ([0; GROUP], 0);
    while at < GROUP {
        odd[at] = 2 * at as u16 + 1;
        at += 1;
    }
    odd
};

/// The token for AMX, if the processor has it and heads have a supported number of dimensions.
pub fn token_for(dim: usize) -> Option<AmxToken> {
    AmxToken::new().filter(|_| dim > 0 && dim.is_multiple_of(GROUP))
}

/// The keys of a source.
#[derive(PartialEq, Debug)]
struct Source {
    keys: Range<usize>,
    /// The index of its first group.
    first_group: usize,
}

/// A tile of queries that are computed together.
#[derive(PartialEq, Debug)]
struct QueryTile {
    /// At most as many as a tile has rows.
    queries: Range<usize>,
    /// The index of their source; `None` if they see nothing.
    source: Option<usize>,
}

/// Which queries are computed together, over which keys.
pub struct QueryPlan {
    sources: Vec<Source>,
    /// The keys of each group: those of a source, [`GROUP`] by [`GROUP`].
    groups: Vec<Range<usize>>,
    tiles: Vec<QueryTile>,
}

impl QueryPlan {
    /// The plan for the queries of a mask. `None` if the mask is not an encoder's, where the first token of a source is
    /// the first that it sees itself.
    pub fn of(mask: &DenseMask) -> Option<QueryPlan> {
        QueryPlan::of_rows(mask.rows, mask.queries)
    }

    /// The plan for `count` queries, whose rows may be fewer, which then repeat.
    fn of_rows(rows: &[VisibleKeys], count: usize) -> Option<QueryPlan> {
        let mut plan = QueryPlan { sources: Vec::new(), groups: Vec::new(), tiles: Vec::new() };
        let mut first = 0;
        for query in 0..count {
            let sees = &rows[query % rows.len()].range;
            let begins = plan.sources.is_empty() || rows.len() > 1 && sees.start == query;
            let source = match (sees.is_empty(), begins) {
                (true, _) => None,
                (false, true) => {
                    plan.sources.push(Source { keys: sees.clone(), first_group: 0 });
                    Some(plan.sources.len() - 1)
                }
                (false, false) => {
                    let Source { keys, .. } = plan.sources.last_mut()?;
                    if sees.start < keys.start {
                        return None;
                    }
                    keys.end = keys.end.max(sees.end);
                    Some(plan.sources.len() - 1)
                }
            };
            match plan.tiles.last_mut() {
                Some(tile) if tile.source == source && query - first < SIDE => tile.queries.end = query + 1,
                _ => {
                    first = query;
                    plan.tiles.push(QueryTile { queries: query..query + 1, source });
                }
            }
        }
        for Source { keys, first_group } in &mut plan.sources {
            *first_group = plan.groups.len();
            plan.groups.extend(keys.clone().step_by(GROUP).map(|first| first..keys.end.min(first + GROUP)));
        }
        Some(plan)
    }
}

/// The parameters shared by all heads.
#[derive(Clone, Copy)]
pub struct Heads<'h> {
    pub scale: f32,
    pub cap: Option<f32>,
    /// Of each item of the batch, or one for all.
    pub masks: &'h [DenseMask<'h>],
    /// Of each mask.
    pub plans: &'h [QueryPlan],
}

/// Keys and values, split, kept for their allocations.
#[derive(Default)]
pub struct SplitKeysValues {
    /// `[items, heads, groups, 2 · SIDE keys, dim / GROUP, parts, pairs of numbers, keys, 2]`
    keys: AlignedVec<u16>,
    /// `[items, heads, groups, dim / SIDE, parts, pairs of keys, numbers, 2]`
    values: AlignedVec<u16>,
}

/// The scratch buffers of a tile of queries.
#[derive(Default)]
struct Scratch {
    scores: AlignedVec<f32>,
    context: AlignedVec<f32>,
    /// The parts of the queries, and of the numerators.
    queries: [AlignedVec<u16>; 2],
    numerators: [AlignedVec<u16>; 2],
}

impl SplitKeysValues {
    /// Writes the attended values to `to`, in the layout of the queries.
    pub fn attend(
        &mut self,
        token: AmxToken,
        heads: Heads,
        inputs: Inputs,
        to: &mut [f32],
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let Inputs { queries, query_layout, keys, values, key_layout, .. } = inputs;
        let Heads { masks, plans, .. } = heads;
        let dim = query_layout.dim;
        let groups = plans.iter().map(|plan| plan.groups.len()).max().unwrap_or(0);
        let group_length = 2 * GROUP * dim;
        for all in [&mut self.keys, &mut self.values] {
            // More from an earlier run does no harm; writing it anew would take as long as what follows.
            let length = key_layout.batch * key_layout.heads * groups * group_length;
            if all.len() < length {
                all.resize(length, 0);
            }
        }
        let [to_keys, to_values] = [SharedSlice::new(&mut self.keys), SharedSlice::new(&mut self.values)];
        parallel_for(key_layout.batch * groups, &|task| {
            let (item, group) = (task / groups, task % groups);
            let Some(tokens) = plans[item % plans.len()].groups.get(group) else { return };
            let mut scratch = AlignedVec::default();
            scratch.resize(group_length, 0);
            for head in 0..key_layout.heads {
                let first = ((item * key_layout.heads + head) * groups + group) * group_length;
                let rows = |x| key_layout.rows(x, item, head, tokens.clone());
                // SAFETY: the token proves AVX-512; every group is split by one task.
                unsafe {
                    let to = to_keys.slice_mut(first..first + group_length);
                    split_keys(rows(keys), key_layout.pitch(), dim, &mut scratch, to);
                    let to = to_values.slice_mut(first..first + group_length);
                    split_values(rows(values), key_layout.pitch(), dim, to);
                }
            }
        })?;
        let (split_keys, split_values) = (&self.keys[..], &self.values[..]);
        let to = SharedSlice::new(to);
        let tasks = plans.iter().map(|plan| plan.tiles.len().div_ceil(TASK_TILES)).max().unwrap_or(0);
        let heads_per_key = query_layout.heads / key_layout.heads;
        parallel_for(query_layout.batch * query_layout.heads * tasks, &|task| {
            let (pair, task) = (task / tasks, task % tasks);
            let (item, head) = (pair / query_layout.heads, pair % query_layout.heads);
            let (mask, plan) = (&masks[item % masks.len()], &plans[item % plans.len()]);
            let mut scratch = Scratch::default();
            let first = (item * key_layout.heads + head / heads_per_key) * groups * group_length;
            let length = plan.groups.len() * group_length;
            let config = TileConfig::load(token);
            for tile in plan.tiles.iter().skip(task * TASK_TILES).take(TASK_TILES) {
                let Some(source) = tile.source else {
                    let values = key_layout.rows(values, item, head / heads_per_key, 0..key_layout.rows);
                    for query in tile.queries.clone() {
                        let start = query_layout.row_start(item, head, query);
                        // SAFETY: every query of a head is computed by one task.
                        mean(values.chunks(key_layout.pitch()), unsafe { to.slice_mut(start..start + dim) });
                    }
                    continue;
                };
                let operands = TileOperands {
                    queries: query_layout.rows(queries, item, head, tile.queries.clone()),
                    query_layout,
                    keys: &split_keys[first..first + length],
                    values: &split_values[first..first + length],
                    mask,
                    rows: tile.queries.clone(),
                    source: &plan.sources[source],
                };
                // SAFETY: the token proves AVX-512 and AMX.
                unsafe { attend_tile(heads, operands, &mut scratch, &config) };
                for (context, query) in scratch.context.chunks_exact(dim).zip(tile.queries.clone()) {
                    let start = query_layout.row_start(item, head, query);
                    // SAFETY: every query of a head is computed by one task.
                    unsafe { to.slice_mut(start..start + dim) }.copy_from_slice(context);
                }
            }
        })
    }
}

/// The operands of a tile of queries.
struct TileOperands<'t> {
    /// The rows of the queries, and their stride.
    queries: &'t [f32],
    query_layout: HeadLayout,
    /// The groups of the head, of all sources.
    keys: &'t [u16],
    values: &'t [u16],
    mask: &'t DenseMask<'t>,
    /// The queries' rows of the mask, at least one.
    rows: Range<usize>,
    source: &'t Source,
}

/// Computes a tile of queries into the context `[SIDE, dim]` of `scratch`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn attend_tile(
    Heads { scale, cap, .. }: Heads,
    TileOperands { queries: x, query_layout, keys, values, mask, rows, source }: TileOperands,
    Scratch { scores, context, queries, numerators }: &mut Scratch,
    config: &TileConfig,
) {
    let (dim, pitch) = (query_layout.dim, query_layout.pitch());
    let Source { keys: all, first_group } = source;
    let ranges = rows.clone().map(|query| mask.range(query));
    let start = ranges.clone().map(|range| range.start).min().unwrap_or(all.start);
    let end = ranges.map(|range| range.end).max().unwrap_or(all.start);
    let groups = (start - all.start) / GROUP..(end - all.start).div_ceil(GROUP);
    let (first, count) = (all.start + groups.start * GROUP, groups.len() * GROUP);
    let group_length = 2 * GROUP * dim;
    let (keys, values) =
        (&keys[(first_group + groups.start) * group_length..], &values[(first_group + groups.start) * group_length..]);
    // All unchecked accesses below stay within these bounds.
    assert!(keys.len().min(values.len()) >= groups.len() * group_length);
    assert!(rows.len() <= SIDE && dim.is_multiple_of(GROUP));

    // Rows beyond the queries hold arbitrary values.
    scores.resize(SIDE * dim.max(count + SIDE), 0.0);
    for (to, x) in scores.chunks_exact_mut(dim).zip(x.chunks(pitch)).take(rows.len()) {
        to.iter_mut().zip(x).for_each(|(to, x)| *to = x * scale);
    }
    queries.iter_mut().for_each(|part| part.resize(SIDE * dim, 0));
    let [high, low] = queries;
    split(&scores[..rows.len() * dim], high, low);
    // Scores of adjacent queries must not compete for the same sets of the L1 cache.
    let score_pitch = count + SIDE;
    for group in 0..groups.len() {
        let group_keys = keys[group * group_length..].as_ptr().cast::<u8>();
        // SAFETY: the group has two times sixteen keys of `dim` numbers, and `scores` room for their products with
        // sixteen queries.
        unsafe {
            let queries = RowOperand { parts: [high.as_ptr().cast(), low.as_ptr().cast()], pitch: 2 * dim };
            let keys = ColumnOperand { first: group_keys, apart: dim / GROUP * 2 * TILE, step: 2 * TILE };
            let to = scores.as_mut_ptr().add(group * GROUP);
            multiply(queries, keys, dim / GROUP, to, 4 * score_pitch, config);
        }
    }
    let mut sums = [0.0_f32; SIDE];
    for (at, query) in rows.clone().enumerate() {
        let (scores, range) = (&mut scores[at * score_pitch..][..count], mask.range(query));
        let own = range.start - first..range.end - first;
        // SAFETY: this function is compiled for AVX-512.
        sums[at] = unsafe { scores_to_numerators::<Avx512>(scores, own, cap, mask.mask(query, range)).sum };
    }
    let numerator_pitch = count + GROUP;
    numerators.iter_mut().for_each(|part| part.resize(SIDE * numerator_pitch, 0));
    let [high, low] = numerators;
    for at in 0..rows.len() {
        let place = at * numerator_pitch..at * numerator_pitch + count;
        split(&scores[at * score_pitch..][..count], &mut high[place.clone()], &mut low[place]);
    }
    context.resize(SIDE * dim, 0.0);
    for number in (0..dim).step_by(GROUP) {
        let group_values = values[number / SIDE * TILE..].as_ptr().cast::<u8>();
        // SAFETY: the groups have two times sixteen numbers of `count` values, and `context` room for their products
        // with sixteen rows of numerators.
        unsafe {
            let numerators =
                RowOperand { parts: [high.as_ptr().cast(), low.as_ptr().cast()], pitch: 2 * numerator_pitch };
            let values = ColumnOperand { first: group_values, apart: 2 * TILE, step: dim / SIDE * 2 * TILE };
            multiply(numerators, values, groups.len(), context.as_mut_ptr().add(number), 4 * dim, config);
        }
    }
    for (context, sum) in context.chunks_exact_mut(dim).zip(sums).take(rows.len()) {
        let factor = 1.0 / sum;
        context.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Sixteen rows in two parts, `pitch` bytes apart.
struct RowOperand {
    parts: [*const u8; 2],
    pitch: usize,
}

/// Two times sixteen columns. The two parts of a tile follow each other; those of the second sixteen columns are
/// `apart` bytes behind them, those of the next numbers `step` bytes.
struct ColumnOperand {
    first: *const u8,
    apart: usize,
    step: usize,
}

/// The products `[SIDE, 2 · SIDE]` over `steps · GROUP` numbers, in rows `to_pitch` bytes apart.
///
/// # Safety
/// The operands have as many numbers, and `to` has room for the products.
#[target_feature(enable = "avx512f")]
unsafe fn multiply(
    rows: RowOperand,
    columns: ColumnOperand,
    steps: usize,
    to: *mut f32,
    to_pitch: usize,
    _config: &TileConfig,
) {
    if steps == 0 {
        return;
    }
    // SAFETY: tiles are configured as long as there is a `TileConfig`; the loop advances both operands by `GROUP`
    // numbers a step; the caller promises these, and room for the products.
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
            high = inout(reg) rows.parts[0] => _, low = inout(reg) rows.parts[1] => _,
            first = inout(reg) columns.first => _, second = inout(reg) columns.first.add(columns.apart) => _,
            left = inout(reg) steps => _, pitch = in(reg) rows.pitch, line = in(reg) WIDTH, step = in(reg) columns.step,
            to = in(reg) to, to_pitch = in(reg) to_pitch,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            out("tmm7") _, options(nostack),
        );
    }
}

/// Splits numbers into two bfloat16 each: their upper halves, and those of the rest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn split(x: &[f32], high: &mut [u16], low: &mut [u16]) {
    assert!(x.len().is_multiple_of(GROUP) && high.len() >= x.len() && low.len() >= x.len(), "room for {}", x.len());
    // SAFETY: the indices fill a register.
    let odd = unsafe { _mm512_loadu_si512(ODD_WORDS.as_ptr().cast()) };
    for at in (0..x.len()).step_by(GROUP) {
        // SAFETY: two times sixteen numbers follow `at`, and room for their parts, by the assertion above.
        unsafe {
            let (a, b) = (_mm512_loadu_ps(x.as_ptr().add(at)), _mm512_loadu_ps(x.as_ptr().add(at + SIDE)));
            let (high_a, high_b) = (truncate_to_bf16(a), truncate_to_bf16(b));
            let words = _mm512_permutex2var_epi16(_mm512_castps_si512(high_a), odd, _mm512_castps_si512(high_b));
            _mm512_storeu_si512(high.as_mut_ptr().add(at).cast(), words);
            let (low_a, low_b) = (_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b));
            let words = _mm512_permutex2var_epi16(_mm512_castps_si512(low_a), odd, _mm512_castps_si512(low_b));
            _mm512_storeu_si512(low.as_mut_ptr().add(at).cast(), words);
        }
    }
}

/// Clears the lower halves of the numbers' bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn truncate_to_bf16(x: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff_0000_u32 as i32)))
}

/// Splits at most [`GROUP`] keys, one every `pitch`, into the order of [`SplitKeysValues::keys`], padded with zeros.
/// `scratch` is for the parts of `GROUP` keys.
#[expect(clippy::needless_range_loop, reason = "whether iterators are inlined is up to the compiler")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn split_keys(keys: &[f32], pitch: usize, dim: usize, scratch: &mut [u16], to: &mut [u16]) {
    assert!(scratch.len() == 2 * GROUP * dim && to.len() == scratch.len() && dim.is_multiple_of(GROUP), "a group");
    let (high, low) = scratch.split_at_mut(GROUP * dim);
    let count = keys.len().div_ceil(pitch);
    high[count * dim..].fill(0);
    low[count * dim..].fill(0);
    for (at, key) in keys.chunks(pitch).enumerate() {
        let place = at * dim..(at + 1) * dim;
        split(&key[..dim], &mut high[place.clone()], &mut low[place]);
    }
    let tiles = to.chunks_exact_mut(TILE / 2);
    for (tile, to) in tiles.enumerate() {
        let (half, step, part) = (tile / (dim / GROUP * 2), tile / 2 % (dim / GROUP), tile % 2);
        let part = if part == 0 { &*high } else { &*low };
        // Pairs of numbers of sixteen keys.
        let first = part[half * SIDE * dim + step * GROUP..].as_ptr();
        for four in 0..SIDE / 4 {
            // SAFETY: each of the sixteen keys has eight numbers there, for which a tile has room, by the assertion
            // above.
            unsafe {
                let words = transpose_pitched(first.add(four * 8).cast(), 2 * dim);
                for at in 0..4 {
                    _mm512_storeu_si512(to.as_mut_ptr().add((four * 4 + at) * GROUP).cast(), words[at]);
                }
            }
        }
    }
}

/// Splits at most [`GROUP`] values, one every `pitch`, into the order of [`SplitKeysValues::values`], padded with
/// zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn split_values(values: &[f32], pitch: usize, dim: usize, to: &mut [u16]) {
    let count = values.len().div_ceil(pitch);
    assert!(count <= GROUP && to.len() >= 2 * GROUP * dim && values.len() >= (count - 1) * pitch + dim);
    for pair in 0..GROUP / 2 {
        for block in 0..dim / SIDE {
            let (mut a, mut b) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            // SAFETY: sixteen numbers of values that exist are read, and `to` has room for two parts of two times
            // sixteen, by the assertion above.
            unsafe {
                let from = values.as_ptr().wrapping_add(2 * pair * pitch + block * SIDE);
                if 2 * pair < count {
                    a = _mm512_loadu_ps(from);
                }
                if 2 * pair + 1 < count {
                    b = _mm512_loadu_ps(from.add(pitch));
                }
                let to = to.as_mut_ptr().add(block * TILE + pair * GROUP);
                let (high_a, high_b) = (truncate_to_bf16(a), truncate_to_bf16(b));
                _mm512_storeu_si512(to.cast(), interleave_upper(high_a, high_b));
                let low_a = truncate_to_bf16(_mm512_sub_ps(a, high_a));
                let low_b = truncate_to_bf16(_mm512_sub_ps(b, high_b));
                _mm512_storeu_si512(to.add(TILE / 2).cast(), interleave_upper(low_a, low_b));
            }
        }
    }
}

/// The upper halves of truncated numbers, each of `a` before that of `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn interleave_upper(a: __m512, b: __m512) -> __m512i {
    _mm512_or_si512(_mm512_srli_epi32::<16>(_mm512_castps_si512(a)), _mm512_castps_si512(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;
    use crate::parallel::sequential;

    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;

    /// Queries, keys and values `[tokens, heads · dim]`, and the source of each token; `None` for padding.
    struct PackedSources {
        x: [Vec<f32>; 3],
        source_of: Vec<Option<usize>>,
        dim: usize,
    }

    impl PackedSources {
        fn new(source_of: Vec<Option<usize>>, dim: usize) -> PackedSources {
            let x = [(HEADS, 3), (KV_HEADS, 5), (KV_HEADS, 7)];
            let x = x.map(|(heads, seed)| noise(source_of.len() * heads * dim, seed).iter().map(|x| x * 2.0).collect());
            PackedSources { x, source_of, dim }
        }

        /// One of the sources by itself.
        fn source(&self, source: usize) -> PackedSources {
            let tokens = 0..self.source_of.len();
            let here: Vec<usize> = tokens.filter(|&token| self.source_of[token] == Some(source)).collect();
            let rows = |x: &Vec<f32>| {
                let width = x.len() / self.source_of.len();
                here.iter().flat_map(|&token| &x[token * width..][..width]).copied().collect()
            };
            PackedSources { x: self.x.each_ref().map(rows), source_of: vec![Some(source); here.len()], dim: self.dim }
        }

        fn sees(&self, window: usize, query: usize, key: usize) -> bool {
            let source_of = &self.source_of;
            source_of[query].is_some() && source_of[query] == source_of[key] && query.abs_diff(key) < window
        }

        fn attended(&self, window: usize, cap: Option<f32>) -> Vec<f32> {
            let (count, dim) = (self.source_of.len(), self.dim);
            let mask: Vec<bool> = (0..count * count).map(|at| self.sees(window, at / count, at % count)).collect();
            let rows: Vec<VisibleKeys> = mask.chunks_exact(count).map(VisibleKeys::of).collect();
            let masks = [DenseMask { mask: &mask, keys: count, rows: &rows, of_rows: None, queries: count }];
            let plans = [QueryPlan::of(&masks[0]).expect("an encoder's mask")];
            let layout = |heads| HeadLayout { batch: 1, heads, rows: count, dim, is_interleaved: true };
            let [queries, keys, values] = self.x.each_ref().map(|x| &x[..]);
            let inputs = Inputs {
                queries,
                query_layout: layout(HEADS),
                keys,
                values,
                key_layout: layout(KV_HEADS),
                is_quantized: true,
            };
            let mut to = vec![f32::NAN; count * HEADS * dim];
            let heads = Heads { scale: 0.2, cap, masks: &masks, plans: &plans };
            let token = token_for(dim).expect("the level has AMX");
            SplitKeysValues::default().attend(token, heads, inputs, &mut to, &sequential).expect("it runs");
            to
        }

        /// By definition, in float64.
        fn reference(&self, window: usize, cap: Option<f32>, query: usize, head: usize) -> Vec<f64> {
            let dim = self.dim;
            let row = |x: &'_ [f32], heads: usize, token: usize, head: usize| -> Vec<f64> {
                x[(token * heads + head) * dim..][..dim].iter().map(|&x| x.into()).collect()
            };
            let [q, k, v] = &self.x;
            let kv_head = head * KV_HEADS / HEADS;
            let none = self.source_of[query].is_none();
            let weights: Vec<f64> = (0..self.source_of.len())
                .map(|key| {
                    let (q, k) = (row(q, HEADS, query, head), row(k, KV_HEADS, key, kv_head));
                    let score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(0.2_f32);
                    let score = cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                    if none { 1.0 } else { f64::from(self.sees(window, query, key)) * score.exp() }
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            let mut to = vec![0.0; dim];
            for (key, weight) in weights.iter().enumerate() {
                let v = row(v, KV_HEADS, key, kv_head);
                to.iter_mut().zip(v).for_each(|(to, v)| *to += weight / sum * v);
            }
            to
        }
    }

    #[test]
    fn packed_sources_are_those_of_float64_and_the_same_alone() {
        at_each_level(Level::Amx, |_| {
            for dim in [32, 64] {
                let sources = [(0, 41), (1, 7), (2, 90), (3, 1)];
                let tokens = sources.into_iter().flat_map(|(source, count)| vec![Some(source); count]);
                let packed = PackedSources::new(tokens.chain([None; 3]).collect(), dim);
                for (window, cap) in [(1000, Some(50.0)), (20, Some(3.0)), (33, None)] {
                    let found = packed.attended(window, cap);
                    for (token, found) in found.chunks(HEADS * dim).enumerate() {
                        for (head, found) in found.chunks(dim).enumerate() {
                            let expected = packed.reference(window, cap, token, head);
                            let apart = expected.iter().zip(found).map(|(a, &b)| (a - f64::from(b)).abs());
                            let apart = apart.fold(0.0, f64::max);
                            assert!(
                                apart < 1e-4,
                                "{dim}, window {window}, {cap:?}: token {token}, head {head}: {apart}"
                            );
                        }
                    }
                    for source in 0..4 {
                        let alone = packed.source(source).attended(window, cap);
                        let here = packed.source_of.iter().zip(found.chunks(HEADS * dim));
                        let here: Vec<f32> =
                            here.filter(|(of, _)| **of == Some(source)).flat_map(|(_, x)| x).copied().collect();
                        let is_same = here.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(is_same && here.len() == alone.len(), "{dim}, window {window}: source {source}");
                    }
                }
            }
        });
    }

    #[test]
    fn queries_are_computed_with_others_of_their_source() {
        let rows = |ranges: &[Range<usize>]| -> Vec<VisibleKeys> {
            ranges.iter().map(|range| VisibleKeys { range: range.clone(), is_full: true }).collect()
        };
        let tiles = |plan: &QueryPlan| -> Vec<(Range<usize>, Option<usize>)> {
            plan.tiles.iter().map(|tile| (tile.queries.clone(), tile.source)).collect()
        };
        let plan = QueryPlan::of_rows(&rows(&[0..2, 0..2, 2..5, 2..5, 2..5, 0..0]), 6).expect("two sources");
        assert_eq!(tiles(&plan), [(0..2, Some(0)), (2..5, Some(1)), (5..6, None)]);
        assert_eq!(plan.groups, [0..2, 2..5]);
        // All queries see the same, from the third key on.
        let plan = QueryPlan::of_rows(&rows(&[2..50; 1]), 50).expect("one source");
        assert_eq!(plan.groups, [2..34, 34..50]);
        assert_eq!(tiles(&plan).iter().map(|(queries, _)| queries.len()).collect::<Vec<_>>(), [16, 16, 16, 2]);
        // A query that sees what lies before its source.
        assert!(QueryPlan::of_rows(&rows(&[0..2, 0..2, 2..4, 1..4]), 4).is_none());
    }
}
