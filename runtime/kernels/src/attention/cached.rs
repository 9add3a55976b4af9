//! ONNX Runtime's `GroupQueryAttention`: causal attention with rotary positions over a KV cache, into which it writes
//! the new tokens.

use std::ops::Range;

use super::single_head::{Head, KeyMask, attend, pack_keys, packed_length, packing_pays};
use super::{HeadScratch, READING, SHARED_FROM};
use crate::aligned::AlignedVec;
use crate::error::Error;
use crate::parallel::{ParallelFor, SharedSlice, part};

/// At most as many tasks: rows and heads are divided among these.
const TASKS: usize = 64;

/// The parameters of attention, and its scratch buffers.
pub struct CachedAttention {
    pub heads: usize,
    pub kv_heads: usize,
    pub scale: f32,
    pub cap: Option<f32>,
    /// Positions that a query sees, itself included.
    pub window: Option<usize>,
    scratch: CachedScratch,
}

#[derive(Default)]
struct CachedScratch {
    scratch: HeadScratch,
    queries: AlignedVec<f32>,
    packed_keys: AlignedVec<f32>,
}

/// The operands of attention.
#[derive(Clone, Copy)]
pub struct CachedInputs<'x> {
    /// `[rows, new, (heads + 2 · kv_heads) · dim]`: queries, keys and values of the new tokens.
    pub packed: &'x [f32],
    pub new: usize,
    pub dim: usize,
    /// `[rows]`: positions of a row, the new tokens included.
    pub ends: &'x [usize],
    /// `[positions, dim / 2]`
    pub cos: &'x [f32],
    pub sin: &'x [f32],
    /// The cache before the step, with `ends - new` positions filled.
    pub past: Option<Past>,
}

/// The addresses of a cache `[rows, kv_heads, capacity, dim]`, which may be the memory of the cache that is written.
#[derive(Clone, Copy)]
pub struct Past {
    pub keys: *const f32,
    pub values: *const f32,
    pub capacity: usize,
}

// SAFETY: the addresses are only read from, under the contract of `CachedAttention::run`.
unsafe impl Sync for Past {}
// SAFETY: as for `Sync`.
unsafe impl Send for Past {}

/// Where results go.
pub struct CachedOutputs<'y> {
    /// `[rows, new, heads · dim]`
    pub attended: &'y mut [f32],
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
    window: Option<usize>,
}

impl KeyMask for CausalMask {
    fn range(&self, query: usize) -> Range<usize> {
        let end = self.past + query % self.new + 1;
        end - self.window.unwrap_or(end).clamp(1, end)..end
    }

    fn mask(&self, _: usize, _: Range<usize>) -> Option<&[bool]> {
        None
    }
}

impl CachedAttention {
    pub fn new(heads: usize, kv_heads: usize, scale: f32, cap: Option<f32>, window: Option<usize>) -> CachedAttention {
        CachedAttention { heads, kv_heads, scale, cap, window, scratch: CachedScratch::default() }
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
        inputs: CachedInputs,
        outputs: CachedOutputs,
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let &mut CachedAttention { heads, kv_heads, scale, cap, window, .. } = self;
        let CachedInputs { packed, new, dim, ends, cos, sin, past } = inputs;
        let CachedOutputs { attended, keys, values, capacity } = outputs;
        let (rows, width) = (ends.len(), heads + 2 * kv_heads);
        let cache_length = rows * kv_heads * capacity * dim;
        assert!(packed.len() == rows * new * width * dim && attended.len() == rows * new * heads * dim, "new tokens");
        assert!(keys.len() == cache_length && values.len() == cache_length, "elements of a cache");
        let past_capacity = past.map_or(0, |past| past.capacity);
        assert!(ends.iter().all(|&end| end >= new && end <= capacity && end - new <= past_capacity), "positions");
        let (attended, keys, values) = (SharedSlice::new(attended), SharedSlice::new(keys), SharedSlice::new(values));

        let (group, half) = (heads / kv_heads, dim / 2);
        let rotate = |x: &[f32], position: usize, to: &mut [f32]| {
            let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
            for at in 0..half {
                let [a, b] = [x[at], x[at + half]];
                to[at] = a * cos[at] - b * sin[at];
                to[at + half] = b * cos[at] + a * sin[at];
            }
        };
        let compute = |pair: usize, scratch: &mut CachedScratch| {
            let (row, kv_head) = (pair / kv_heads, pair % kv_heads);
            let (end, start) = (ends[row], pair * capacity * dim);
            let before = end - new;
            let token = |at: usize, head: usize| &packed[((row * new + at) * width + head) * dim..][..dim];
            for (past, cache) in [(past.map(|past| past.keys), keys), (past.map(|past| past.values), values)] {
                if let Some(past) = past
                    && past != cache.as_mut_ptr().cast_const()
                {
                    // SAFETY: the caller promises a past of this shape; it is not the cache, of which every row and
                    // head is written by one task.
                    unsafe {
                        let from = past.add(pair * past_capacity * dim);
                        let to = cache.slice_mut(start..start + before * dim);
                        std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), before * dim);
                    }
                }
            }
            // SAFETY: every row and head is written by one task.
            let (keys, values) = unsafe {
                let range = start..start + capacity * dim;
                (keys.slice_mut(range.clone()), values.slice_mut(range))
            };
            for at in 0..new {
                rotate(token(at, heads + kv_head), before + at, &mut keys[(before + at) * dim..][..dim]);
                values[(before + at) * dim..][..dim].copy_from_slice(token(at, heads + kv_heads + kv_head));
            }
            // The heads of a group are treated as more queries of one head.
            let CachedScratch { scratch: HeadScratch { scratch, context, .. }, queries, packed_keys } = scratch;
            queries.resize(group * new * dim, 0.0);
            context.resize(group * new * dim, 0.0);
            for (at, to) in queries.chunks_exact_mut(dim).enumerate() {
                rotate(token(at % new, kv_head * group + at / new), before + at % new, to);
            }
            let packs = packing_pays(new);
            if packs {
                packed_keys.resize(packed_length(end, dim), 0.0);
                pack_keys(&keys[..end * dim], dim, dim, packed_keys);
            }
            let head = Head {
                queries,
                keys: &keys[..end * dim],
                values: &values[..end * dim],
                packed_keys: packs.then_some(&packed_keys[..]),
                dim,
                scale,
                cap,
            };
            attend(head, &CausalMask { past: before, new, window }, 0..group * new, scratch, context);
            for (at, from) in context.chunks_exact(dim).enumerate() {
                let start = ((row * new + at % new) * heads + kv_head * group + at / new) * dim;
                // SAFETY: every query of a row and head is computed by one task.
                unsafe { attended.slice_mut(start..start + dim) }.copy_from_slice(from);
            }
        };
        let pairs = rows * kv_heads;
        let longest = ends.iter().copied().max().unwrap_or(0);
        if pairs * (group * new).max(READING) * longest * dim < SHARED_FROM {
            (0..pairs).for_each(|pair| compute(pair, &mut self.scratch));
            return Ok(());
        }
        // Several pairs in a row find the memory that the hardware prefetched.
        let size = pairs.div_ceil(TASKS);
        parallel_for(pairs.div_ceil(size), &|task| {
            let mut scratch = CachedScratch::default();
            part(task, size, pairs).for_each(|pair| compute(pair, &mut scratch));
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;
    use crate::parallel::sequential;

    #[test]
    fn causal_masks_end_at_the_query() {
        // past, new, window, query, range
        let cases = [
            (0, 1, None, 0, 0..1),
            (5, 3, None, 1, 0..7),
            (5, 3, Some(4), 1, 3..7),
            (5, 3, Some(100), 2, 0..8),
            (5, 3, Some(0), 0, 5..6),
            (5, 3, Some(4), 4, 3..7),
        ];
        for (past, new, window, query, expected) in cases {
            assert_eq!(CausalMask { past, new, window }.range(query), expected, "{past}, {new}, {window:?}, {query}");
        }
    }

    /// Attends with `step` new tokens at a time, with the cache in other memory at each step or always in the same.
    fn attended_in_steps(tokens: &[f32], count: usize, step: usize, in_place: bool) -> Vec<f32> {
        const HEADS: usize = 4;
        const KV_HEADS: usize = 2;
        const DIM: usize = 16;
        const CAPACITY: usize = 40;
        let width = (HEADS + 2 * KV_HEADS) * DIM;
        let angles: Vec<f32> = noise(CAPACITY * DIM / 2, 9);
        let [cos, sin] = [f32::cos, f32::sin].map(|of| angles.iter().map(|&angle| of(angle)).collect::<Vec<_>>());
        let mut attention = CachedAttention::new(HEADS, KV_HEADS, 0.3, Some(30.0), Some(20));
        let mut caches = [(); 4].map(|()| vec![f32::NAN; KV_HEADS * CAPACITY * DIM]);
        let mut all = Vec::new();
        for start in (0..count).step_by(step) {
            let new = step.min(count - start);
            let mut attended = vec![f32::NAN; new * HEADS * DIM];
            let [keys, values, other_keys, other_values] = &mut caches;
            let past = Past { keys: keys.as_ptr(), values: values.as_ptr(), capacity: CAPACITY };
            let inputs = CachedInputs {
                packed: &tokens[start * width..(start + new) * width],
                new,
                dim: DIM,
                ends: &[start + new],
                cos: &cos,
                sin: &sin,
                past: (start > 0).then_some(past),
            };
            let (keys, values) = if in_place { (keys, values) } else { (other_keys, other_values) };
            let outputs = CachedOutputs { attended: &mut attended, keys, values, capacity: CAPACITY };
            // SAFETY: the past has this shape, and there is one thread.
            unsafe { attention.run(inputs, outputs, &sequential) }.expect("it runs");
            if !in_place {
                caches.rotate_left(2);
            }
            all.extend(attended);
        }
        all
    }

    #[test]
    fn tokens_attend_alike_whether_they_come_at_once_or_one_by_one() {
        at_each_level(Level::Generic, |level| {
            let count = 33;
            let tokens = noise(count * 8 * 16, 3);
            let at_once = attended_in_steps(&tokens, count, count, false);
            for (step, in_place) in [(1, false), (1, true), (5, true), (9, false)] {
                let in_steps = attended_in_steps(&tokens, count, step, in_place);
                let apart = at_once.iter().zip(&in_steps).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-5 && at_once.len() == in_steps.len(), "{level:?}, {step}, {in_place}: {apart}");
            }
        });
    }
}
