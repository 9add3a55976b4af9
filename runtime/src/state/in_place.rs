//! `InPlaceCache`: a cache of fixed capacity that every step writes into. It is bound once as past and present of the
//! cached step, so that a step allocates and copies nothing, and is moved only when its capacity is exhausted, which
//! doubles it, or when items finish.
//!
//! # Design
//! Beams of one source share a prefix: their histories branch a few tokens back. The length of the prefix that each
//! pair of rows shares is kept, so that a beam that continues another beam copies only the tokens after it.

use ort::memory::Allocator;
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor, TensorValueType};
use t5gemma_kernels::LogitsRequest;

use super::step_binding::{StepBinding, TailCopy, copy_tails};
use super::{DecoderOutputs, Selection, keep_rows, one_token_at_a_time};
use crate::adapter::RowAdapters;

/// The initial capacity, in target tokens.
const INITIAL_CAPACITY: usize = 64;

/// The memory of the cached decoder step.
pub(crate) struct InPlaceCache {
    /// `[items, source]`.
    mask: DynValue,
    /// Cross-attention keys and values, layer by layer: `[items, kv_heads, source, head_dim]`.
    sources: Vec<DynValue>,
    /// Self-attention keys and values, layer by layer: `[rows, kv_heads, capacity, head_dim]`.
    targets: Vec<Tensor<f32>>,
    /// Target tokens in the cache.
    length: usize,
    /// For each pair of rows of one item, how many leading tokens they have in common: `[items, width, width]`.
    common: Vec<usize>,
    /// The bound session; `None` after a change of the tensors.
    binding: Option<StepBinding>,
    /// Scratch memory of [`copy_tails`].
    scratch: Vec<f32>,
}

impl InPlaceCache {
    pub(super) fn new(mask: DynValue, cached: Vec<DynValue>, is_cross: &[bool]) -> ort::Result<InPlaceCache> {
        let items = mask.shape()[0] as usize;
        let (mut sources, mut first) = (Vec::new(), Vec::new());
        for (value, &is_cross) in cached.into_iter().zip(is_cross) {
            if is_cross { sources.push(value) } else { first.push(value.downcast::<TensorValueType<f32>>()?) }
        }
        let length = first.first().map_or(0, |value| value.shape()[2] as usize);
        let rows: Vec<usize> = (0..items).collect();
        let capacity = INITIAL_CAPACITY.max((length + 1).next_power_of_two());
        let targets =
            first.iter().map(|value| moved_rows(value, &rows, length, capacity)).collect::<ort::Result<_>>()?;
        let common = vec![length; items];
        Ok(InPlaceCache { mask, sources, targets, length, common, binding: None, scratch: Vec::new() })
    }

    /// Runs the cached step for `tokens`, the same number for each row, and returns its outputs.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        adapters: Option<&RowAdapters>,
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<DecoderOutputs> {
        let rows = self.rows();
        let count = tokens.len() / rows;
        if count > 1 && rows > 1 {
            return one_token_at_a_time(tokens, count, |tokens| self.step(session, tokens, adapters, request, options));
        }
        self.reserve(count)?;
        if self.binding.as_ref().is_none_or(|binding| binding.tokens() != count) {
            let (mask, sources) = (&self.mask, &self.sources);
            self.binding = Some(StepBinding::new(session, mask, sources, &mut self.targets, adapters, count)?);
        }
        let Some(binding) = &mut self.binding else { unreachable!("bound just above") };
        let length = self.length;
        let positions = (0..tokens.len()).map(|at| (length + at % count) as i64);
        let outputs = binding.run(session, tokens, positions, request, options)?;
        self.length += count;
        // Equal rows may differ in the new tokens, so the prefixes that they have in common do not grow.
        Ok(outputs)
    }

    fn rows(&self) -> usize {
        self.targets.first().map_or(0, |target| target.shape()[0] as usize)
    }

    fn capacity(&self) -> Option<usize> {
        self.targets.first().map(|target| target.shape()[2] as usize)
    }

    /// Makes room for `count` more tokens.
    fn reserve(&mut self, count: usize) -> ort::Result<()> {
        let needed = self.length + count;
        if self.capacity().is_some_and(|capacity| needed > capacity) {
            let rows: Vec<usize> = (0..self.rows()).collect();
            self.move_rows(&rows, needed.next_power_of_two())?;
        }
        Ok(())
    }

    /// Moves the given rows to new memory.
    fn move_rows(&mut self, rows: &[usize], capacity: usize) -> ort::Result<()> {
        self.binding = None;
        for target in &mut self.targets {
            *target = moved_rows(target, rows, self.length, capacity)?;
        }
        Ok(())
    }

    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        self.common.iter_mut().for_each(|common| *common = length.min(*common));
    }

    pub(super) fn select(&mut self, selection: &Selection) -> ort::Result<()> {
        selection.check()?;
        let &Selection { items, parents, items_before, rows_before } = selection;
        if parents.iter().copied().eq(0..rows_before) {
            return Ok(());
        }
        let common = self.common_after(selection);
        if items.len() == items_before && parents.len() == rows_before {
            self.continue_rows(parents, rows_before / items_before);
        } else {
            self.binding = None;
            keep_rows(&mut self.mask, items, items_before)?;
            for source in &mut self.sources {
                keep_rows(source, items, items_before)?;
            }
            self.move_rows(parents, self.capacity().unwrap_or(0))?;
        }
        self.common = common;
        Ok(())
    }

    /// The common prefixes once each row `r` has become the continuation of row `parents[r]`.
    fn common_after(&self, selection: &Selection) -> Vec<usize> {
        let &Selection { items, parents, items_before, rows_before } = selection;
        let (before, width) = (rows_before / items_before, parents.len() / items.len().max(1));
        let mut common = Vec::with_capacity(parents.len() * width);
        for (item, beams) in items.iter().zip(parents.chunks_exact(width.max(1))) {
            let block = &self.common[item * before * before..][..before * before];
            let pair = |a: usize, b: usize| {
                if a == b { self.length } else { block[(a % before) * before + b % before] }
            };
            for &a in beams {
                common.extend(beams.iter().map(|&b| pair(a, b)));
            }
        }
        common
    }

    /// Makes each row `r` the continuation of row `parents[r]`, in place; items have `width` rows each.
    fn continue_rows(&mut self, parents: &[usize], width: usize) {
        let block = |row: usize| row / width * width * width;
        let length = self.length;
        let copies: Vec<TailCopy> = (parents.iter().enumerate())
            .filter(|&(row, &parent)| row != parent)
            .map(|(row, &parent)| {
                let common = self.common[block(row) + row % width * width + parent % width];
                TailCopy { row, parent, common, length }
            })
            .filter(|copy| copy.common < length)
            .collect();
        copy_tails(&mut self.targets, &copies, &mut self.scratch);
    }
}

/// The given rows of `value`, `[rows, kv_heads, at least length, head_dim]`, in new memory with room for `capacity`
/// tokens.
fn moved_rows(value: &Tensor<f32>, rows: &[usize], length: usize, capacity: usize) -> ort::Result<Tensor<f32>> {
    let (shape, from) = value.extract_tensor();
    let [heads, room, dim] = [1, 2, 3].map(|axis| shape[axis] as usize);
    let mut moved = Tensor::<f32>::new(&Allocator::default(), [rows.len(), heads, capacity, dim])?;
    let (_, to) = moved.extract_tensor_mut();
    let pairs = rows.iter().flat_map(|row| (0..heads).map(move |head| row * heads + head));
    for (to, head) in to.chunks_exact_mut(capacity * dim).zip(pairs) {
        // The rest is written before it is read. Writing it here would make the system back all of it with memory at
        // once.
        to[..length * dim].copy_from_slice(&from[head * room * dim..][..length * dim]);
    }
    Ok(moved)
}
