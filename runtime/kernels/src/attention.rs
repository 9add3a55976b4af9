//! Attention over given keys and values, `softmax(softcap(q·kᵀ·scale) where visible) · v`; with a key-value cache, see
//! [`cached`].
//!
//! ONNX Runtime's kernels make several passes over the full score matrix, most of which a sliding-window layer throws
//! away, and wake threads for the few numbers of a decoder step.

mod blocks;
pub mod cached;
mod mask;
pub mod merged;
pub mod single_head;
#[cfg(target_arch = "x86_64")]
mod split_bf16;

use std::ops::Range;

use crate::aligned::AlignedVec;
use crate::error::Error;
use crate::parallel::{ParallelFor, SharedSlice, part};
use mask::{DenseMask, SourceWindows, VisibleKeys};
use single_head::{Head, PANEL, Scratch, TILES, pack_keys, packed_length, packing_pays};

/// Fewer multiplications than this are not worth waking another thread for.
const SHARED_FROM: usize = 250_000;
/// Multiplications that take as long as reading one number from memory.
const READING: usize = 6;
/// Queries in a task, and in one that reads keys in blocks.
const TASK_QUERIES: usize = 4 * TILES;
const TASK_QUERIES_OF_BLOCKS: usize = 8 * TILES;

/// The memory layout of heads `[batch, heads, rows, dim]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadLayout {
    pub batch: usize,
    pub heads: usize,
    pub rows: usize,
    pub dim: usize,
    /// Whether the heads of a row are adjacent, `[batch, rows, heads · dim]`, rather than the rows of a head.
    pub is_interleaved: bool,
}

impl HeadLayout {
    /// The layout of a tensor of this shape: of rank 4, or of rank 3 if the number of heads is given, which is 0
    /// otherwise.
    pub fn of(shape: &[i64], heads: usize) -> Option<HeadLayout> {
        match *shape {
            [batch, rows, width] if heads > 0 && (width as usize).is_multiple_of(heads) => {
                let dim = width as usize / heads;
                Some(HeadLayout { batch: batch as usize, heads, rows: rows as usize, dim, is_interleaved: true })
            }
            [batch, heads, rows, dim] => {
                let [batch, heads, rows, dim] = [batch, heads, rows, dim].map(|size| size as usize);
                Some(HeadLayout { batch, heads, rows, dim, is_interleaved: false })
            }
            _ => None,
        }
    }

    /// Where a row begins.
    fn row_start(&self, item: usize, head: usize, row: usize) -> usize {
        if self.is_interleaved {
            ((item * self.rows + row) * self.heads + head) * self.dim
        } else {
            ((item * self.heads + head) * self.rows + row) * self.dim
        }
    }

    /// From a row of a head to the next.
    fn pitch(&self) -> usize {
        if self.is_interleaved { self.heads * self.dim } else { self.dim }
    }

    /// The rows of a head, at least one, and everything between them.
    fn rows<'x>(&self, all: &'x [f32], item: usize, head: usize, rows: Range<usize>) -> &'x [f32] {
        &all[self.row_start(item, head, rows.start)..self.row_start(item, head, rows.end - 1) + self.dim]
    }
}

/// The parameters of attention, and its scratch buffers.
pub struct Attention {
    scale: f32,
    cap: Option<f32>,
    /// Packs keys for few queries too, so that a source's results do not depend on the rest of the batch.
    packs_always: bool,
    #[cfg(target_arch = "x86_64")]
    split: split_bf16::SplitKeysValues,
    scratch: HeadScratch,
    packed: Packed,
}

/// A mask `[batch, rows, keys]`: whether a query sees a key. One item may be for the whole batch, and one row for all
/// queries.
#[derive(Clone, Copy)]
pub struct Mask<'x> {
    pub mask: &'x [bool],
    pub batch: usize,
    pub rows: usize,
}

/// Sources in which the queries see the keys within a window: see [`SourceWindows::new`].
#[derive(Clone, Copy)]
pub struct Windows<'x> {
    /// `[batch, rows]`
    pub numbers: &'x [i64],
    pub back: usize,
    pub ahead: usize,
}

/// The operands of attention. Batches are equal; heads of queries are a multiple of those of keys.
#[derive(Clone, Copy)]
pub struct Inputs<'x> {
    pub queries: &'x [f32],
    pub query_layout: HeadLayout,
    pub keys: &'x [f32],
    pub values: &'x [f32],
    /// Of keys and values; as the queries' but for heads and rows.
    pub key_layout: HeadLayout,
    /// Whether the session's weights are quantized, whose error makes that of bfloat16 pairs negligible.
    pub is_quantized: bool,
}

/// Operands in another order, kept for their allocations: packed keys, and where heads are interleaved, values and
/// queries by heads.
#[derive(Default)]
struct Packed {
    keys: AlignedVec<f32>,
    values: AlignedVec<f32>,
    queries: AlignedVec<f32>,
}

/// The scratch buffers of a head.
#[derive(Default)]
struct HeadScratch {
    scratch: Scratch,
    context: AlignedVec<f32>,
    /// What a block of keys gives.
    part: AlignedVec<f32>,
}

impl Attention {
    /// Attention of an encoder packs keys for few queries too.
    pub fn of_encoder(scale: f32, cap: Option<f32>) -> Attention {
        Attention { packs_always: true, ..Attention::of_decoder(scale, cap) }
    }

    pub fn of_decoder(scale: f32, cap: Option<f32>) -> Attention {
        Attention {
            scale,
            cap,
            packs_always: false,
            #[cfg(target_arch = "x86_64")]
            split: split_bf16::SplitKeysValues::default(),
            scratch: HeadScratch::default(),
            packed: Packed::default(),
        }
    }

    /// Writes the attended values to `to`, in the layout of the queries.
    pub fn run(&mut self, inputs: Inputs, mask: Mask, to: &mut [f32], parallel_for: ParallelFor) -> Result<(), Error> {
        let Inputs { query_layout, key_layout, .. } = inputs;
        let Mask { mask, batch: mask_batch, rows: mask_rows } = mask;
        let length = key_layout.rows;
        if to.is_empty() {
            return Ok(());
        }
        if length == 0 {
            to.fill(0.0);
            return Ok(());
        }
        let visible_keys: Vec<VisibleKeys> = mask.chunks_exact(length).map(VisibleKeys::of).collect();
        let masks: Vec<DenseMask> = (mask.chunks_exact(mask_rows * length).zip(visible_keys.chunks_exact(mask_rows)))
            .take(mask_batch)
            .map(|(mask, rows)| DenseMask { mask, keys: length, rows, of_rows: None, queries: query_layout.rows })
            .collect();
        self.run_masked(inputs, &masks, to, parallel_for)
    }

    /// [`Attention::run`] where queries and keys are the tokens of sources, `[batch, rows]`: see [`SourceWindows::new`].
    pub fn run_in_windows(
        &mut self,
        inputs: Inputs,
        Windows { numbers, back, ahead }: Windows,
        to: &mut [f32],
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let length = inputs.key_layout.rows;
        if to.is_empty() || length == 0 {
            return Ok(());
        }
        let windows: Vec<SourceWindows> =
            numbers.chunks_exact(length).map(|numbers| SourceWindows::new(numbers, back, ahead)).collect();
        let masks: Vec<DenseMask> = windows.iter().map(SourceWindows::mask).collect();
        self.run_masked(inputs, &masks, to, parallel_for)
    }

    /// [`Attention::run`] with a mask for each item of the batch, or one for all.
    fn run_masked(
        &mut self,
        inputs: Inputs,
        masks: &[DenseMask],
        to: &mut [f32],
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let Inputs { query_layout, key_layout, .. } = inputs;
        let (length, mask_batch) = (key_layout.rows, masks.len());
        #[cfg(target_arch = "x86_64")]
        if self.packs_always
            && inputs.is_quantized
            && let Some(token) = split_bf16::token_for(query_layout.dim)
            && let Some(plans) = masks.iter().map(split_bf16::QueryPlan::of).collect::<Option<Vec<_>>>()
        {
            let heads = split_bf16::Heads { scale: self.scale, cap: self.cap, masks, plans: &plans };
            return self.split.attend(token, heads, inputs, to, parallel_for);
        }
        let packs = self.packs_always || packing_pays(query_layout.rows) || key_layout.is_interleaved;
        if packs {
            self.packed.fill(inputs, parallel_for)?;
        }
        let Inputs { mut queries, keys, mut values, .. } = inputs;
        let is_interleaved = query_layout.is_interleaved;
        if is_interleaved {
            (queries, values) = (&self.packed.queries, &self.packed.values);
        }
        let HeadLayout { batch, heads, rows: count, dim, .. } = query_layout;
        let kv_heads = key_layout.heads;
        let (pairs, group) = (batch * kv_heads, heads / kv_heads);
        let (head_length, packed_length) = (length * dim, packed_length(length, dim));
        // The heads of a group are treated as more queries of one head.
        let together = group * count;
        let to = SharedSlice::new(to);
        let (packed_keys, scale, cap) = (&self.packed.keys, self.scale, self.cap);
        let compute = |pair: usize, range: Range<usize>, scratch: &mut HeadScratch| {
            let first = pair * together;
            let mask = &masks[if mask_batch == 1 { 0 } else { pair / kv_heads }];
            let head = Head {
                queries: &queries[(first + range.start) * dim..(first + range.end) * dim],
                // Interleaved keys are taken from their packed copy.
                keys: if is_interleaved { &[] } else { &keys[pair * head_length..][..head_length] },
                values: &values[pair * head_length..][..head_length],
                packed_keys: packs.then(|| &packed_keys[pair * packed_length..][..packed_length]),
                dim,
                scale,
                cap,
            };
            if !is_interleaved {
                // SAFETY: every query of a pair is computed by one task.
                let to = unsafe { to.slice_mut((first + range.start) * dim..(first + range.end) * dim) };
                return blocks::attend(head, mask, range, scratch, to);
            }
            let mut context = std::mem::take(&mut scratch.context);
            context.resize(range.len() * dim, 0.0);
            blocks::attend(head, mask, range.clone(), scratch, &mut context);
            for (query, from) in range.zip(context.chunks_exact(dim)) {
                let (head, row) = (pair % kv_heads * group + query / count, query % count);
                let start = query_layout.row_start(pair / kv_heads, head, row);
                // SAFETY: every query of a pair is computed by one task.
                unsafe { to.slice_mut(start..start + dim) }.copy_from_slice(from);
            }
            scratch.context = context;
        };
        if pairs * together.max(READING) * head_length < SHARED_FROM {
            (0..pairs).for_each(|pair| compute(pair, 0..together, &mut self.scratch));
            return Ok(());
        }
        let queries = if length > blocks::MANY { TASK_QUERIES_OF_BLOCKS } else { TASK_QUERIES };
        let tasks = together.div_ceil(queries);
        parallel_for(pairs * tasks, &|task| {
            compute(task / tasks, part(task % tasks, queries, together), &mut HeadScratch::default());
        })
    }
}

impl Packed {
    /// Packs the keys; where heads are interleaved, copies values and queries by heads.
    fn fill(&mut self, inputs: Inputs, parallel_for: ParallelFor) -> Result<(), Error> {
        let Inputs { queries, query_layout, keys, values, key_layout, .. } = inputs;
        let HeadLayout { batch, dim, is_interleaved, .. } = query_layout;
        let (pairs, length) = (batch * key_layout.heads, key_layout.rows);
        let packed_length = packed_length(length, dim);
        self.keys.resize(pairs * packed_length, 0.0);
        self.values.resize(if is_interleaved { pairs * length * dim } else { 0 }, 0.0);
        self.queries.resize(if is_interleaved { queries.len() } else { 0 }, 0.0);
        let to_keys = SharedSlice::new(&mut self.keys);
        let to_values = SharedSlice::new(&mut self.values);
        let to_queries = SharedSlice::new(&mut self.queries);
        let panels = length.div_ceil(PANEL);
        let query_parts = if is_interleaved { query_layout.rows.div_ceil(PANEL) } else { 0 };
        // A task has all heads of a few tokens: so they are read in the order in which they lie.
        parallel_for(batch * (panels + query_parts), &|task| {
            let (item, panel) = (task / (panels + query_parts), task % (panels + query_parts));
            let is_key = panel < panels;
            let (from, panel) = if is_key { (key_layout, panel) } else { (query_layout, panel - panels) };
            let range = part(panel, PANEL, from.rows);
            for head in 0..from.heads {
                let start = ((item * from.heads + head) * from.rows + range.start) * dim;
                let place = start..start + range.len() * dim;
                if is_key {
                    let start = (item * from.heads + head) * packed_length + range.start * dim;
                    // SAFETY: every panel is packed by one task.
                    let to = unsafe { to_keys.slice_mut(start..start + PANEL * dim) };
                    pack_keys(from.rows(keys, item, head, range.clone()), from.pitch(), dim, to);
                }
                if is_interleaved {
                    let (x, to) = if is_key { (values, to_values) } else { (queries, to_queries) };
                    let rows = from.rows(x, item, head, range.clone()).chunks(from.pitch());
                    // SAFETY: every row is copied by one task.
                    let to = unsafe { to.slice_mut(place) }.chunks_exact_mut(dim);
                    to.zip(rows).for_each(|(to, row)| to.copy_from_slice(&row[..dim]));
                }
            }
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
    fn shapes_of_rank_3_need_the_number_of_heads() {
        let interleaved = HeadLayout { batch: 2, heads: 4, rows: 5, dim: 8, is_interleaved: true };
        // shape, number of heads, layout
        let cases: [(&[i64], usize, Option<HeadLayout>); 5] = [
            (&[2, 5, 32], 4, Some(interleaved)),
            (&[2, 4, 5, 8], 0, Some(HeadLayout { is_interleaved: false, ..interleaved })),
            (&[2, 5, 32], 0, None),
            (&[2, 5, 32], 5, None),
            (&[5, 32], 4, None),
        ];
        for (shape, heads, expected) in cases {
            assert_eq!(HeadLayout::of(shape, heads), expected, "{shape:?} of {heads} heads");
        }
    }

    /// By definition, in float64, `[batch, heads, queries, dim]`.
    fn reference(scale: f32, inputs: Inputs, mask: Mask) -> Vec<f64> {
        let Inputs { queries, query_layout, keys, values, key_layout, .. } = inputs;
        let Mask { mask, batch: mask_batch, rows: mask_rows } = mask;
        let dim = query_layout.dim;
        let mut all = Vec::new();
        for (item, head, query) in (0..query_layout.batch)
            .flat_map(|item| (0..query_layout.heads).map(move |head| (item, head)))
            .flat_map(|(item, head)| (0..query_layout.rows).map(move |query| (item, head, query)))
        {
            let row = |x: &[f32], layout: HeadLayout, head: usize, row: usize| -> Vec<f64> {
                let start = layout.row_start(item, head, row);
                x[start..start + dim].iter().map(|&x| x.into()).collect()
            };
            let kv_head = head * key_layout.heads / query_layout.heads;
            let mask_row = item % mask_batch * mask_rows + query % mask_rows;
            let seen = &mask[mask_row * key_layout.rows..][..key_layout.rows];
            let q = row(queries, query_layout, head, query);
            let weights: Vec<f64> = (0..key_layout.rows)
                .map(|key| {
                    let k = row(keys, key_layout, kv_head, key);
                    let score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale);
                    if seen[key] { score.exp() } else { 0.0 }
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            let mut attended = vec![0.0; dim];
            for (key, weight) in weights.iter().enumerate() {
                let v = row(values, key_layout, kv_head, key);
                attended.iter_mut().zip(v).for_each(|(to, v)| *to += weight / sum * v);
            }
            all.extend(attended);
        }
        all
    }

    #[test]
    fn every_layout_of_heads_gives_the_attention_of_float64() {
        at_each_level(Level::Generic, |level| {
            let (batch, heads, kv_heads, dim) = (2, 4, 2, 16);
            for (rows, length, is_interleaved, mask_batch) in
                [(1, 5, false, 1), (1, 40, true, 2), (30, 30, false, 2), (70, 70, true, 1)]
            {
                let query_layout = HeadLayout { batch, heads, rows, dim, is_interleaved };
                let key_layout = HeadLayout { heads: kv_heads, rows: length, ..query_layout };
                let queries = noise(batch * heads * rows * dim, 3);
                let [keys, values] = [5, 7].map(|seed| noise(batch * kv_heads * length * dim, seed));
                let mask_rows = if rows == 30 { 1 } else { rows };
                let mask: Vec<bool> = (0..mask_batch * mask_rows * length).map(|at| at % 7 != 3).collect();
                let (queries, keys, values, mask) = (&queries[..], &keys[..], &values[..], &mask[..]);
                let is_quantized = false;
                let inputs = Inputs { queries, query_layout, keys, values, key_layout, is_quantized };
                let mask = Mask { mask, batch: mask_batch, rows: mask_rows };
                let expected = reference(0.3, inputs, mask);
                for mut attention in [Attention::of_encoder(0.3, None), Attention::of_decoder(0.3, None)] {
                    let mut found = vec![f32::NAN; queries.len()];
                    attention.run(inputs, mask, &mut found, &sequential).expect("it runs");
                    for (at, expected) in expected.chunks(dim).enumerate() {
                        let (item, head, row) = (at / rows / heads, at / rows % heads, at % rows);
                        let start = query_layout.row_start(item, head, row);
                        let apart = expected.iter().zip(&found[start..]).map(|(a, &b)| (a - f64::from(b)).abs());
                        let apart = apart.fold(0.0, f64::max);
                        assert!(apart < 5e-6, "{level:?}, {query_layout:?}: {item}, {head}, {row}: {apart}");
                    }
                }
            }
        });
    }
}
