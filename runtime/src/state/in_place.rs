//! A cache of fixed capacity that every step writes into: bound once as past and present of the cached step, so that a step
//! allocates and copies nothing. It is moved only when its capacity is exhausted, which doubles it, or when items finish.
//!
//! # Design
//! When a beam continues another beam, the two have long been one: the histories of beams branch a few tokens back. How much
//! of the cache two rows have in common is kept, and only the rest is copied.

use ort::memory::Allocator;
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor};
use t5gemma_kernels::LogitsRequest;

use super::logits::LogitsPort;
use super::{Returned, attended_port, keep_rows};

/// Room for this many target tokens to begin with.
const FIRST_CAPACITY: usize = 64;

/// The memory of the cached decoder step.
pub(crate) struct InPlace {
    /// `[items, source]`.
    mask: DynValue,
    /// Keys and values of the sources, layer by layer: `[items, kv_heads, source, head_dim]`.
    sources: Vec<DynValue>,
    /// Keys and values of the targets, layer by layer: `[rows, kv_heads, capacity, head_dim]`.
    targets: Vec<Tensor<f32>>,
    /// Target tokens there are keys and values of.
    length: usize,
    /// For each pair of rows of one item, how many leading tokens they have in common: `[items, width, width]`.
    common: Vec<usize>,
    /// What the session is bound to; none after a change.
    bound: Option<Bound>,
    /// The moved parts of rows, kept for its allocation.
    moved: Vec<f32>,
}

struct Bound {
    binding: IoBinding,
    /// `[rows, tokens]`
    ids: Tensor<i64>,
    /// `[rows, tokens]`
    positions: Tensor<i64>,
    logits: LogitsPort,
    /// The name of what tells what the tokens attend to.
    attended: Option<String>,
}

impl InPlace {
    pub(super) fn new(mask: DynValue, cached: Vec<DynValue>, per_item: &[bool]) -> ort::Result<InPlace> {
        let items = mask.shape()[0] as usize;
        let (mut sources, mut first) = (Vec::new(), Vec::new());
        for (value, &per_item) in cached.into_iter().zip(per_item) {
            if per_item {
                sources.push(value)
            } else {
                first.push(value.downcast::<ort::value::TensorValueType<f32>>()?)
            }
        }
        let length = first.first().map_or(0, |value| value.shape()[2] as usize);
        let rows: Vec<usize> = (0..items).collect();
        let capacity = FIRST_CAPACITY.max((length + 1).next_power_of_two());
        let targets =
            first.iter().map(|value| moved_rows(value, &rows, length, capacity)).collect::<ort::Result<_>>()?;
        let (common, bound, moved) = (vec![length; items], None, Vec::new());
        Ok(InPlace { mask, sources, targets, length, common, bound, moved })
    }

    /// Runs the cached step for `tokens`, as many for each row, and returns what it says.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        wanted: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<Returned> {
        let rows = self.mask_rows();
        let count = tokens.len() / rows;
        if count > 1 && rows > 1 {
            // The attention over a cache takes several tokens of a single row only: one after the other, then.
            let mut last = None;
            for at in 0..count {
                let each: Vec<i64> = tokens.iter().skip(at).step_by(count).copied().collect();
                last = Some(self.step(session, &each, wanted, options)?);
            }
            return last.ok_or_else(|| ort::Error::new("a step without tokens"));
        }
        self.reserve(count)?;
        if self.bound.as_ref().is_none_or(|bound| bound.ids.shape()[1] as usize != count) {
            self.bound = Some(self.bind(session, rows, count)?);
        }
        let Some(Bound { binding, ids, positions, logits, attended }) = &mut self.bound else {
            unreachable!("bound just above")
        };
        ids.extract_tensor_mut().1.copy_from_slice(tokens);
        for (at, position) in positions.extract_tensor_mut().1.iter_mut().enumerate() {
            *position = (self.length + at % count) as i64;
        }
        logits.bind(binding, wanted)?;
        let mut outputs = session.run_binding_with_options(binding, options)?;
        let logits = outputs.remove(logits.name()).ok_or_else(|| ort::Error::new("no logits"))?;
        let attended = attended.as_ref().and_then(|name| outputs.remove(name.as_str()));
        self.length += count;
        // Rows that were equal so far may differ in the new tokens: what they have in common does not grow.
        Ok(Returned { logits, attended })
    }

    fn mask_rows(&self) -> usize {
        self.targets.first().map_or(0, |target| target.shape()[0] as usize)
    }

    fn bind(&mut self, session: &Session, rows: usize, count: usize) -> ort::Result<Bound> {
        let allocator = Allocator::default();
        let mut binding = session.create_binding()?;
        let mut inputs = session.inputs().iter().map(|port| port.name().to_string());
        let mut outputs = session.outputs().iter().map(|port| port.name().to_string());
        let next = |side: &str, names: &mut dyn Iterator<Item = String>| {
            names.next().ok_or_else(|| ort::Error::new(format!("too few {side}s")))
        };
        let ids = Tensor::<i64>::new(&allocator, [rows, count])?;
        let positions = Tensor::<i64>::new(&allocator, [rows, count])?;
        binding.bind_input(next("input", &mut inputs)?, &self.mask)?;
        binding.bind_input(next("input", &mut inputs)?, &ids)?;
        binding.bind_input(next("input", &mut inputs)?, &positions)?;
        let logits = LogitsPort::new(session, next("output", &mut outputs)?, rows, count);
        let attended = attended_port(session);
        if let Some(name) = &attended {
            let source = self.mask.shape()[1] as usize;
            binding.bind_output(name, &mut Tensor::<f32>::new(&allocator, [rows, count, source])?)?;
        }
        for (own, source) in self.targets.chunks_exact_mut(2).zip(self.sources.chunks_exact(2)) {
            for target in own {
                binding.bind_input(next("input", &mut inputs)?, target)?;
                binding.bind_output(next("output", &mut outputs)?, target)?;
            }
            for source in source {
                binding.bind_input(next("input", &mut inputs)?, source)?;
            }
        }
        Ok(Bound { binding, ids, positions, logits, attended })
    }

    /// Makes room for `count` more tokens.
    fn reserve(&mut self, count: usize) -> ort::Result<()> {
        let capacity = self.targets.first().map_or(usize::MAX, |target| target.shape()[2] as usize);
        let needed = self.length + count;
        if needed > capacity {
            let rows: Vec<usize> = (0..self.mask_rows()).collect();
            self.replace(&rows, needed.next_power_of_two())?;
        }
        Ok(())
    }

    /// Moves the given rows to new memory.
    fn replace(&mut self, rows: &[usize], capacity: usize) -> ort::Result<()> {
        self.bound = None;
        for target in &mut self.targets {
            *target = moved_rows(target, rows, self.length, capacity)?;
        }
        Ok(())
    }

    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        self.common.iter_mut().for_each(|common| *common = length.min(*common));
    }

    pub(super) fn select(
        &mut self,
        items: &[usize],
        parents: &[usize],
        (items_before, rows_before): (usize, usize),
    ) -> ort::Result<()> {
        if items.iter().any(|&item| item >= items_before) || parents.iter().any(|&row| row >= rows_before) {
            return Err(ort::Error::new(format!("items {items:?} and rows {parents:?} of a cache")));
        }
        if parents.iter().copied().eq(0..rows_before) {
            return Ok(());
        }
        let common = self.common_of(items, parents, (items_before, rows_before));
        if items.len() == items_before && parents.len() == rows_before {
            self.copy_rows(parents, rows_before / items_before);
        } else {
            self.bound = None;
            keep_rows(&mut self.mask, items, items_before)?;
            for source in &mut self.sources {
                keep_rows(source, items, items_before)?;
            }
            let capacity = self.targets.first().map_or(0, |target| target.shape()[2] as usize);
            self.replace(parents, capacity)?;
        }
        self.common = common;
        Ok(())
    }

    /// What the rows will have in common once row `r` has become the continuation of row `parents[r]`.
    fn common_of(&self, items: &[usize], parents: &[usize], (items_before, rows_before): (usize, usize)) -> Vec<usize> {
        let (before, width) = (rows_before / items_before, parents.len() / items.len().max(1));
        let mut common = Vec::with_capacity(parents.len() * width);
        for (item, beams) in items.iter().zip(parents.chunks_exact(width.max(1))) {
            let block = &self.common[item * before * before..][..before * before];
            for &a in beams {
                common.extend(beams.iter().map(|&b| match a == b {
                    true => self.length,
                    false => block[(a % before) * before + b % before],
                }));
            }
        }
        common
    }

    /// Makes row `r` what row `parents[r]` is, in place.
    fn copy_rows(&mut self, parents: &[usize], width: usize) {
        let block = |row: usize| row / width * width * width;
        // (row, parent, tokens they have in common)
        let moves: Vec<(usize, usize, usize)> = (parents.iter().enumerate())
            .filter(|&(row, &parent)| row != parent)
            .map(|(row, &parent)| (row, parent, self.common[block(row) + row % width * width + parent % width]))
            .filter(|&(_, _, common)| common < self.length)
            .collect();
        for target in &mut self.targets {
            let (shape, data) = target.extract_tensor_mut();
            let [heads, capacity, dim] = [1, 2, 3].map(|axis| shape[axis] as usize);
            let tail = |row: usize, head: usize, common: usize| {
                let first = (row * heads + head) * capacity;
                (first + common) * dim..(first + self.length) * dim
            };
            // All is read before any is written: rows may change places.
            self.moved.clear();
            for &(_, parent, common) in &moves {
                (0..heads).for_each(|head| self.moved.extend_from_slice(&data[tail(parent, head, common)]));
            }
            let mut moved = self.moved.as_slice();
            for &(row, _, common) in &moves {
                for head in 0..heads {
                    let (part, rest) = moved.split_at((self.length - common) * dim);
                    data[tail(row, head, common)].copy_from_slice(part);
                    moved = rest;
                }
            }
        }
    }
}

/// The given rows of keys or values `[rows, kv_heads, at least length, head_dim]` in new memory with room for `capacity`
/// tokens.
fn moved_rows(value: &Tensor<f32>, rows: &[usize], length: usize, capacity: usize) -> ort::Result<Tensor<f32>> {
    let (shape, from) = value.extract_tensor();
    let [heads, room, dim] = [1, 2, 3].map(|axis| shape[axis] as usize);
    let mut moved = Tensor::<f32>::new(&Allocator::default(), [rows.len(), heads, capacity, dim])?;
    let (_, to) = moved.extract_tensor_mut();
    let pairs = rows.iter().flat_map(|row| (0..heads).map(move |head| row * heads + head));
    for (to, head) in to.chunks_exact_mut(capacity * dim).zip(pairs) {
        // What lies behind is written before it is read: to touch it now would have the system find all the memory at once.
        to[..length * dim].copy_from_slice(&from[head * room * dim..][..length * dim]);
    }
    Ok(moved)
}
