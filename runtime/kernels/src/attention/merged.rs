//! T5Gemma 2's attention of a decoder: to the target so far, in a KV cache into which the new tokens are written, and to
//! the source, in one softmax. The heads of queries and keys are normed and rotated here.
//!
//! # Design
//! A source's keys are read in pieces of a fixed size, by all beams of the source at once. What the pieces and the cache
//! give is added up by the log-sum-exp of the scores. So a single row keeps several threads busy, and the result does
//! not depend on how many there are.

use std::ops::Range;

use super::cached::Past;
use super::mask::{DenseMask, VisibleKeys};
use super::single_head::{Head, KeyMask, attend, pack_keys, packed_length, packing_pays};
use super::{HeadScratch, READING, SHARED_FROM};
use crate::aligned::AlignedVec;
use crate::error::Error;
use crate::parallel::{ParallelFor, SharedSlice, part};

/// Fewest keys of a source in a piece.
const PIECE: usize = 256;
/// Most pieces of a source.
const PIECES: usize = 32;

/// The parameters of attention, and its buffers.
pub struct MergedAttention {
    pub heads: usize,
    pub kv_heads: usize,
    pub scale: f32,
    /// Added to the mean square of a head in its norm.
    pub epsilon: f32,
    /// Target tokens that a query sees, itself included.
    pub window: usize,
    buffers: Buffers,
}

#[derive(Default)]
struct Buffers {
    /// `[batch, kv_heads, beams, group, new, dim]`: normed and rotated queries.
    queries: AlignedVec<f32>,
    /// `[1 + pieces]` times as the queries: what the cache and each piece of the source give.
    parts: AlignedVec<f32>,
    /// As `parts`, one number for each query: the log-sum-exp of the scores.
    log_sums: Vec<f32>,
}

/// The operands of attention. There are `rows / batch` rows for each source.
#[derive(Clone, Copy)]
pub struct MergedInputs<'x> {
    /// `[rows, new, heads · dim]`
    pub queries: &'x [f32],
    /// `[rows, new, 2 · kv_heads · dim]`: keys, then values.
    pub keys_values: &'x [f32],
    /// `[dim]`: factors of the norms of queries and keys.
    pub query_norm: &'x [f32],
    pub key_norm: &'x [f32],
    /// `[rows, new, dim / 2]`
    pub cos: &'x [f32],
    pub sin: &'x [f32],
    pub new: usize,
    pub dim: usize,
    /// `[rows]`: positions of a row, the new tokens included.
    pub ends: &'x [usize],
    /// `[batch, kv_heads, source, dim]`
    pub source_keys: &'x [f32],
    pub source_values: &'x [f32],
    /// `[batch, source]`: the tokens that are not padding.
    pub source_mask: &'x [bool],
    pub batch: usize,
    /// The cache before the step, with `ends - new` positions filled.
    pub past: Option<Past>,
}

/// Where results go.
pub struct MergedOutputs<'y> {
    /// `[rows, new, heads · dim]`
    pub attended: &'y mut [f32],
    /// `[rows, new, heads]`: the log-sum-exp of the scores.
    pub log_sums: &'y mut [f32],
    /// The cache with the new tokens, `[rows, kv_heads, capacity, dim]`.
    pub keys: &'y mut [f32],
    pub values: &'y mut [f32],
    pub capacity: usize,
}

/// New tokens after a past: each sees itself and what came before, within the window.
struct CausalMask {
    past: usize,
    /// New tokens; further queries are the same tokens again, of further heads.
    new: usize,
    window: usize,
}

impl KeyMask for CausalMask {
    fn range(&self, query: usize) -> Range<usize> {
        let end = self.past + query % self.new + 1;
        end - self.window.clamp(1, end)..end
    }

    fn mask(&self, _: usize, _: Range<usize>) -> Option<&[bool]> {
        None
    }
}

/// `x / √(mean(x²) + ε) · factor`, rotated: the halves of x by the angles of cos and sin.
fn norm_and_rotate(x: &[f32], factor: &[f32], epsilon: f32, [cos, sin]: [&[f32]; 2], to: &mut [f32]) {
    let half = x.len() / 2;
    let square = x.chunks(16).map(|x| x.iter().map(|x| x * x).sum::<f32>()).sum::<f32>();
    let scale = 1.0 / (square / x.len() as f32 + epsilon).sqrt();
    for at in 0..half {
        let [a, b] = [x[at] * scale * factor[at], x[at + half] * scale * factor[at + half]];
        to[at] = a * cos[at] - b * sin[at];
        to[at + half] = b * cos[at] + a * sin[at];
    }
}

impl MergedAttention {
    pub fn new(heads: usize, kv_heads: usize, scale: f32, epsilon: f32, window: usize) -> MergedAttention {
        MergedAttention { heads, kv_heads, scale, epsilon, window, buffers: Buffers::default() }
    }

    /// Attends, and writes the cache.
    ///
    /// # Panics
    /// If the sizes do not agree.
    ///
    /// # Safety
    /// A past of this shape can be read from its addresses, and nobody writes to it but this call, if it is the cache
    /// that is written.
    pub unsafe fn run(
        &mut self,
        inputs: MergedInputs,
        outputs: MergedOutputs,
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let MergedInputs { new, dim, ends, batch, source_mask, past, .. } = inputs;
        let (rows, kv_heads, group) = (ends.len(), self.kv_heads, self.heads / self.kv_heads);
        let cache_length = rows * kv_heads * outputs.capacity * dim;
        assert!(inputs.queries.len() == rows * new * self.heads * dim, "queries");
        assert!(inputs.keys_values.len() == rows * new * 2 * kv_heads * dim, "keys and values");
        assert!(outputs.attended.len() == inputs.queries.len(), "attended values");
        assert!(outputs.log_sums.len() == rows * new * self.heads, "log-sum-exps");
        assert!(outputs.keys.len() == cache_length && outputs.values.len() == cache_length, "elements of a cache");
        assert!(batch > 0 && rows.is_multiple_of(batch) && source_mask.len().is_multiple_of(batch), "sources");
        let (source, beams) = (source_mask.len() / batch, rows / batch);
        let source_length = batch * kv_heads * source * dim;
        assert!(inputs.source_keys.len() == source_length && inputs.source_values.len() == source_length, "source");
        assert!(inputs.cos.len() == rows * new * dim / 2 && inputs.sin.len() == inputs.cos.len(), "angles");
        assert!(inputs.query_norm.len() == dim && inputs.key_norm.len() == dim, "factors of norms");
        let past_capacity = past.map_or(0, |past| past.capacity);
        let capacity = outputs.capacity;
        assert!(ends.iter().all(|&end| end >= new && end <= capacity && end - new <= past_capacity), "positions");

        // SAFETY: the caller of this function promises the past that `write` reads.
        unsafe { self.write(inputs, outputs.keys, outputs.values, capacity) };
        let Buffers { queries, parts, log_sums } = &mut self.buffers;
        let piece = PIECE.max(source.div_ceil(PIECES).next_multiple_of(super::PANEL));
        let pieces = source.div_ceil(piece);
        let all = queries.len() / dim;
        parts.resize((1 + pieces) * all * dim, 0.0);
        log_sums.resize((1 + pieces) * all, 0.0);
        let (queries, scale, window) = (&queries[..], self.scale, self.window);
        let (to, to_log_sums) = (SharedSlice::new(parts), SharedSlice::new(log_sums));
        let (keys, values) = (&*outputs.keys, &*outputs.values);
        // The heads of a group are treated as more queries of one head.
        let of_row = group * new;
        let own = |pair: usize, scratch: &mut Scratch| {
            let (row, kv_head) = (pair / kv_heads, pair % kv_heads);
            let first = ((row / beams * kv_heads + kv_head) * beams + row % beams) * of_row;
            let (end, start) = (ends[row], pair * capacity * dim);
            let mask = CausalMask { past: end - new, new, window };
            let range = start..start + end * dim;
            scratch.attend(
                [&keys[range.clone()], &values[range]],
                &queries[first * dim..][..of_row * dim],
                dim,
                scale,
                &mask,
            );
            scratch.write(first, dim, to, to_log_sums);
        };
        let of_source = |task: usize, scratch: &mut Scratch| {
            let (pair, at) = (task / pieces, task % pieces);
            let (item, first) = (pair / kv_heads, pair * beams * of_row);
            let range = part(at, piece, source);
            let mask = &source_mask[item * source..][range.clone()];
            let visible = [VisibleKeys::of(mask)];
            let mask = DenseMask { mask, keys: range.len(), rows: &visible, of_rows: None, queries: 1 };
            let range = (pair * source + range.start) * dim..(pair * source + range.end) * dim;
            let [keys, values] = [inputs.source_keys, inputs.source_values].map(|x| &x[range.clone()]);
            scratch.attend([keys, values], &queries[first * dim..][..beams * of_row * dim], dim, scale, &mask);
            scratch.write((1 + at) * all + first, dim, to, to_log_sums);
        };
        let (of_rows, of_sources) = (rows * kv_heads, batch * kv_heads * pieces);
        let run = |task: usize, scratch: &mut Scratch| {
            // Those of sources take longer.
            if task < of_sources { of_source(task, scratch) } else { own(task - of_sources, scratch) }
        };
        let longest = ends.iter().copied().max().unwrap_or(0);
        if rows * kv_heads * of_row.max(READING) * (longest + source) * dim < SHARED_FROM {
            let mut scratch = Scratch::default();
            (0..of_rows + of_sources).for_each(|task| run(task, &mut scratch));
        } else {
            parallel_for(of_rows + of_sources, &|task| run(task, &mut Scratch::default()))?;
        }
        self.add_up(inputs, outputs.attended, outputs.log_sums, pieces);
        Ok(())
    }

    /// Norms and rotates queries and keys, and writes the new tokens to the cache.
    ///
    /// # Safety
    /// As for [`MergedAttention::run`].
    unsafe fn write(&mut self, inputs: MergedInputs, keys: &mut [f32], values: &mut [f32], capacity: usize) {
        let &mut MergedAttention { heads, kv_heads, epsilon, .. } = self;
        let MergedInputs { keys_values, query_norm, key_norm, cos, sin, new, dim, ends, batch, past, .. } = inputs;
        let (rows, group) = (ends.len(), heads / kv_heads);
        let beams = rows / batch;
        self.buffers.queries.resize(rows * heads * new * dim, 0.0);
        for (past, cache) in [(past.map(|past| past.keys), &mut *keys), (past.map(|past| past.values), &mut *values)] {
            let Some(past) = past.filter(|past| *past != cache.as_ptr()) else { continue };
            let past_capacity = inputs.past.map_or(0, |past| past.capacity);
            for (pair, to) in cache.chunks_exact_mut(capacity * dim).enumerate() {
                let before = ends[pair / kv_heads] - new;
                // SAFETY: the caller promises a past of this shape; it is not the cache.
                unsafe {
                    std::ptr::copy_nonoverlapping(past.add(pair * past_capacity * dim), to.as_mut_ptr(), before * dim);
                }
            }
        }
        for (row, at) in (0..rows).flat_map(|row| (0..new).map(move |at| (row, at))) {
            let (token, position) = (row * new + at, ends[row] - new + at);
            let angles = [cos, sin].map(|table| &table[token * dim / 2..][..dim / 2]);
            let source_row = row / beams * kv_heads;
            for (head, x) in inputs.queries[token * heads * dim..][..heads * dim].chunks_exact(dim).enumerate() {
                let place = (((source_row + head / group) * beams + row % beams) * group + head % group) * new + at;
                let to = &mut self.buffers.queries[place * dim..][..dim];
                norm_and_rotate(x, query_norm, epsilon, angles, to);
            }
            let new_keys_values = &keys_values[token * 2 * kv_heads * dim..][..2 * kv_heads * dim];
            for head in 0..kv_heads {
                let start = ((row * kv_heads + head) * capacity + position) * dim;
                norm_and_rotate(
                    &new_keys_values[head * dim..][..dim],
                    key_norm,
                    epsilon,
                    angles,
                    &mut keys[start..][..dim],
                );
                values[start..][..dim].copy_from_slice(&new_keys_values[(kv_heads + head) * dim..][..dim]);
            }
        }
    }

    /// Adds up what the cache and the pieces of the source give.
    fn add_up(&self, inputs: MergedInputs, attended: &mut [f32], to_log_sums: &mut [f32], pieces: usize) {
        let &MergedAttention { heads, kv_heads, .. } = self;
        let MergedInputs { new, dim, ends, batch, .. } = inputs;
        let Buffers { queries, parts, log_sums } = &self.buffers;
        let (group, beams, all) = (heads / kv_heads, ends.len() / batch, queries.len() / dim);
        for (at, (to, to_log_sum)) in attended.chunks_exact_mut(dim).zip(to_log_sums).enumerate() {
            let (token, head) = (at / heads, at % heads);
            let (row, at) = (token / new, token % new);
            let pair = (row / beams * kv_heads + head / group) * beams + row % beams;
            let query = (pair * group + head % group) * new + at;
            let log_sum = |part: usize| log_sums[part * all + query];
            let max = (0..=pieces).map(log_sum).fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = (0..=pieces).map(|part| (log_sum(part) - max).exp()).sum();
            *to_log_sum = max + total.ln();
            to.fill(0.0);
            for part in 0..=pieces {
                let weight = (log_sum(part) - max).exp() / total;
                if weight > 0.0 || weight.is_nan() {
                    let from = &parts[(part * all + query) * dim..][..dim];
                    to.iter_mut().zip(from).for_each(|(to, x)| *to += weight * x);
                }
            }
        }
    }
}

/// The buffers of a task.
#[derive(Default)]
struct Scratch {
    head: HeadScratch,
    packed_keys: AlignedVec<f32>,
}

impl Scratch {
    /// Attends with the queries `[queries, dim]` to keys and values, `[keys, dim]`.
    fn attend(&mut self, [keys, values]: [&[f32]; 2], queries: &[f32], dim: usize, scale: f32, mask: &impl KeyMask) {
        let count = queries.len() / dim;
        let packs = packing_pays(count);
        if packs {
            self.packed_keys.resize(packed_length(keys.len() / dim, dim), 0.0);
            pack_keys(keys, dim, dim, &mut self.packed_keys);
        }
        let packed_keys = packs.then_some(&self.packed_keys[..]);
        let head = Head { queries, keys, values, packed_keys, dim, scale, cap: None };
        self.head.context.resize(count * dim, 0.0);
        attend(head, mask, 0..count, &mut self.head.scratch, &mut self.head.context);
    }

    /// Writes what [`Scratch::attend`] gave for the queries from `first` on.
    fn write(&self, first: usize, dim: usize, to: SharedSlice<f32>, to_log_sums: SharedSlice<f32>) {
        let (context, log_sums) = (&self.head.context, &self.head.scratch.log_sums);
        // SAFETY: every query of the cache and of each piece is computed by one task.
        let (to, to_log_sums) = unsafe {
            let to = to.slice_mut(first * dim..first * dim + context.len());
            (to, to_log_sums.slice_mut(first..first + log_sums.len()))
        };
        to.copy_from_slice(context);
        to_log_sums.copy_from_slice(log_sums);
    }
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
    const DIM: usize = 16;
    const CAPACITY: usize = 40;
    const WINDOW: usize = 9;
    const SCALE: f32 = 0.3;
    const EPSILON: f32 = 1e-6;

    struct Case {
        batch: usize,
        beams: usize,
        source: usize,
    }

    fn normed_and_rotated(x: &[f32], factor: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f64> {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        let normed: Vec<f64> = (x.iter().zip(factor))
            .map(|(&x, &factor)| f64::from(x) / (mean + f64::from(EPSILON)).sqrt() * f64::from(factor))
            .collect();
        let half = DIM / 2;
        (0..DIM)
            .map(|at| {
                let (cos, sin) = (f64::from(cos[at % half]), f64::from(sin[at % half]));
                let other = if at < half { -normed[at + half] } else { normed[at - half] };
                normed[at] * cos + other * sin
            })
            .collect()
    }

    /// Attends with steps of the given sizes, and compares with the definition in float64.
    fn check(level: Level, &Case { batch, beams, source }: &Case, steps: &[usize], in_place: bool) {
        let (rows, count) = (batch * beams, steps.iter().sum::<usize>());
        let norms = [noise(DIM, 1), noise(DIM, 2)];
        let angles = noise(rows * count * DIM / 2, 9);
        let [cos, sin] = [f32::cos, f32::sin].map(|of| angles.iter().map(|&angle| of(angle)).collect::<Vec<_>>());
        let queries = noise(rows * count * HEADS * DIM, 3);
        let keys_values = noise(rows * count * 2 * KV_HEADS * DIM, 4);
        let [source_keys, source_values] = [5, 6].map(|seed| noise(batch * KV_HEADS * source * DIM, seed));
        let source_mask: Vec<bool> = (0..batch * source).map(|at| at % 11 != 4 && at % source < source - 2).collect();
        let take = |x: &[f32], width: usize, from: usize, new: usize| -> Vec<f32> {
            x.chunks_exact(count * width).flat_map(|row| &row[from * width..(from + new) * width]).copied().collect()
        };
        let mut attention = MergedAttention::new(HEADS, KV_HEADS, SCALE, EPSILON, WINDOW);
        let mut caches = [(); 4].map(|()| vec![f32::NAN; rows * KV_HEADS * CAPACITY * DIM]);
        let mut start = 0;
        for &new in steps {
            let mut attended = vec![f32::NAN; rows * new * HEADS * DIM];
            let mut log_sums = vec![f32::NAN; rows * new * HEADS];
            let [keys, values, other_keys, other_values] = &mut caches;
            let past = Past { keys: keys.as_ptr(), values: values.as_ptr(), capacity: CAPACITY };
            let inputs = MergedInputs {
                queries: &take(&queries, HEADS * DIM, start, new),
                keys_values: &take(&keys_values, 2 * KV_HEADS * DIM, start, new),
                query_norm: &norms[0],
                key_norm: &norms[1],
                cos: &take(&cos, DIM / 2, start, new),
                sin: &take(&sin, DIM / 2, start, new),
                new,
                dim: DIM,
                ends: &vec![start + new; rows],
                source_keys: &source_keys,
                source_values: &source_values,
                source_mask: &source_mask,
                batch,
                past: (start > 0).then_some(past),
            };
            let (keys, values) = if in_place { (keys, values) } else { (other_keys, other_values) };
            let (attended_to, log_sums_to) = (&mut attended[..], &mut log_sums[..]);
            let outputs =
                MergedOutputs { attended: attended_to, log_sums: log_sums_to, keys, values, capacity: CAPACITY };
            // SAFETY: the past has this shape, and there is one thread.
            unsafe { attention.run(inputs, outputs, &sequential) }.expect("it runs");
            if !in_place {
                caches.rotate_left(2);
            }
            for (at, (found, log_sum)) in attended.chunks_exact(DIM).zip(&log_sums).enumerate() {
                let (row, token, head) = (at / HEADS / new, start + at / HEADS % new, at % HEADS);
                let kv_head = head * KV_HEADS / HEADS;
                let turned = |x: &[f32], norm: usize, token: usize| {
                    let at = (row * count + token) * DIM / 2;
                    normed_and_rotated(x, &norms[norm], &cos[at..][..DIM / 2], &sin[at..][..DIM / 2])
                };
                let query = turned(&queries[((row * count + token) * HEADS + head) * DIM..][..DIM], 0, token);
                let mut seen: Vec<(Vec<f64>, &[f32])> = Vec::new();
                for other in (token + 1).saturating_sub(WINDOW)..=token {
                    let at = (row * count + other) * 2 * KV_HEADS + kv_head;
                    let key = turned(&keys_values[at * DIM..][..DIM], 1, other);
                    seen.push((key, &keys_values[(at + KV_HEADS) * DIM..][..DIM]));
                }
                let item = row / beams;
                for place in (0..source).filter(|place| source_mask[item * source + place]) {
                    let at = (item * KV_HEADS + kv_head) * source + place;
                    let key = source_keys[at * DIM..][..DIM].iter().map(|&x| f64::from(x)).collect();
                    seen.push((key, &source_values[at * DIM..][..DIM]));
                }
                let score =
                    |key: &[f64]| (key.iter().zip(&query).map(|(a, b)| a * b).sum::<f64>() * f64::from(SCALE)).exp();
                let total: f64 = seen.iter().map(|(key, _)| score(key)).sum();
                assert!((total.ln() - f64::from(*log_sum)).abs() < 1e-5, "{level:?}: {log_sum}, not {}", total.ln());
                for (place, &found) in found.iter().enumerate() {
                    let sum: f64 = seen.iter().map(|(key, value)| score(key) * f64::from(value[place])).sum();
                    let apart = (sum / total - f64::from(found)).abs();
                    assert!(apart < 5e-6, "{level:?}, {steps:?}, {in_place}: row {row}, {token}, {head}: {apart}");
                }
            }
            start += new;
        }
    }

    #[test]
    fn target_and_source_share_a_softmax() {
        at_each_level(Level::Generic, |level| {
            for case in [
                Case { batch: 1, beams: 1, source: 5 },
                Case { batch: 2, beams: 1, source: 40 },
                Case { batch: 2, beams: 3, source: 300 },
                Case { batch: 1, beams: 4, source: 700 },
            ] {
                check(level, &case, &[1, 1, 1], true);
                check(level, &case, &[12, 1, 5, 1], true);
                check(level, &case, &[3, 1, 20], false);
            }
        });
    }

    #[test]
    fn a_source_of_padding_alone_is_not_seen() {
        let (keys_values, mask) = (noise(2 * KV_HEADS * DIM, 4), [false; 3]);
        let mut attended = vec![f32::NAN; HEADS * DIM];
        let [mut keys, mut values] = [(); 2].map(|()| vec![f32::NAN; KV_HEADS * DIM]);
        let source = noise(KV_HEADS * 3 * DIM, 5);
        let inputs = MergedInputs {
            queries: &noise(HEADS * DIM, 3),
            keys_values: &keys_values,
            query_norm: &[1.0; DIM],
            key_norm: &[1.0; DIM],
            cos: &[1.0; DIM / 2],
            sin: &[0.0; DIM / 2],
            new: 1,
            dim: DIM,
            ends: &[1],
            source_keys: &source,
            source_values: &source,
            source_mask: &mask,
            batch: 1,
            past: None,
        };
        let log_sums = &mut [0.0; HEADS][..];
        let (keys, values) = (&mut keys[..], &mut values[..]);
        let outputs = MergedOutputs { attended: &mut attended, log_sums, keys, values, capacity: 1 };
        let mut attention = MergedAttention::new(HEADS, KV_HEADS, SCALE, EPSILON, WINDOW);
        // SAFETY: there is no past.
        unsafe { attention.run(inputs, outputs, &sequential) }.expect("it runs");
        for (head, found) in attended.chunks_exact(DIM).enumerate() {
            let own = &keys_values[(KV_HEADS + head * KV_HEADS / HEADS) * DIM..][..DIM];
            assert!(found.iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-6), "head {head}");
        }
    }
}
