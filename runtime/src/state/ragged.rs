//! `RaggedCache`: a cache of fixed capacity for rows of different lengths, which join and leave between steps.
//! [`Engine`] keeps some if the model's cache layout allows it. Each row is a target with its own copy of its source's
//! keys and values, so that sources with different numbers of beams lie side by side; a member is the rows of one
//! source.
//!
//! # Design
//! A row that leaves becomes a hole, which costs nothing: a step computes it with the others, its outputs are ignored,
//! and the next member takes its place. Everything is moved, tensor by tensor, only when there is no hole for a new
//! member, when there are too many, or when the capacity for tokens is exhausted. Between such moments a step is bound
//! once and allocates nothing. As in `InPlaceCache`, beams that continue other beams copy only the tokens after their
//! common prefix.
//!
//! [`Engine`]: crate::Engine

use std::ops::Range;

use ort::memory::Allocator;
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor, TensorValueType};
use t5gemma_kernels::LogitsRequest;

use super::DecoderOutputs;
use super::step_binding::{StepBinding, TailCopy, copy_tails};
use crate::adapter::{Adapter, RowAdapters};

/// The least capacity, in target tokens.
const LEAST_CAPACITY: usize = 64;

/// The capacity for source tokens is a multiple of this, so that one longer source does not move everything.
const SOURCE_BLOCK: usize = 32;

/// The capacity for rows of at most `length` target tokens.
pub(crate) fn capacity(length: usize) -> usize {
    LEAST_CAPACITY.max(length.next_power_of_two())
}

/// The memory of the cached decoder steps. Tensors have a row for each row of a member and for each hole.
#[derive(Default)]
pub(crate) struct RaggedCache {
    /// `[rows, source]`; `None` without rows.
    mask: Option<Tensor<i64>>,
    /// Cross-attention keys and values, layer by layer: `[rows, kv_heads, source, head_dim]`.
    sources: Vec<Tensor<f32>>,
    /// Self-attention keys and values, layer by layer: `[rows, kv_heads, capacity, head_dim]`.
    targets: Vec<Tensor<f32>>,
    members: Vec<Member>,
    /// The inputs of the rows' adapters; `None` if no member has one, or after a change of the rows.
    adapters: Option<RowAdapters>,
    /// The bound session; `None` after a change of the tensors.
    binding: Option<StepBinding>,
    /// Scratch memory of [`copy_tails`].
    scratch: Vec<f32>,
}

/// The rows of one source.
#[derive(Clone, Debug, PartialEq)]
struct Member {
    adapter: Option<Adapter>,
    /// Its first row in the tensors.
    first: usize,
    rows: usize,
    /// Target tokens in the cache.
    length: usize,
    /// Tokens of the source.
    source: usize,
    /// For each pair of rows, how many leading tokens they have in common: `[rows, rows]`.
    common: Vec<usize>,
}

/// What the first decoder step of some sources puts into the cache.
pub(crate) struct Prefilled {
    mask: Tensor<i64>,
    sources: Vec<Tensor<f32>>,
    targets: Vec<Tensor<f32>>,
    /// How many target tokens of each item, the first ones.
    length: usize,
    /// Of each item.
    adapters: Vec<Option<Adapter>>,
}

impl Prefilled {
    /// `mask` is `[items, source]`; `is_cross` says of each of `cached` whether it is of cross-attention.
    pub fn new(
        mask: DynValue,
        cached: Vec<DynValue>,
        is_cross: &[bool],
        adapters: Vec<Option<Adapter>>,
    ) -> ort::Result<Prefilled> {
        let (mut sources, mut targets) = (Vec::new(), Vec::new());
        for (value, &is_cross) in cached.into_iter().zip(is_cross) {
            let value = value.downcast::<TensorValueType<f32>>()?;
            if is_cross { sources.push(value) } else { targets.push(value) }
        }
        let length = targets.first().map_or(0, |target: &Tensor<f32>| target.shape()[2] as usize);
        Ok(Prefilled { mask: mask.downcast::<TensorValueType<i64>>()?, sources, targets, length, adapters })
    }

    /// The same without the last target token.
    pub fn without_last_token(self) -> Prefilled {
        Prefilled { length: self.length.saturating_sub(1), ..self }
    }
}

/// Where a row's memory comes from.
#[derive(Clone, Copy)]
enum Origin {
    /// A row of the cache.
    Row(usize),
    /// An item of a first step.
    Item(usize),
}

/// A member that goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Continued<'a> {
    /// Its index among the members before.
    pub member: usize,
    /// For each of its next rows, which of its rows that one continues.
    pub parents: &'a [usize],
}

/// A member that joins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joining {
    /// Its item in the first step.
    pub item: usize,
    /// Tokens of its source.
    pub source: usize,
    /// The number of its rows.
    pub rows: usize,
}

impl RaggedCache {
    /// The number of rows of the tensors, holes included.
    pub fn rows(&self) -> usize {
        self.mask.as_ref().map_or(0, |mask| mask.shape()[0] as usize)
    }

    /// The first row of each member in the outputs of a step.
    pub fn firsts(&self) -> impl Iterator<Item = usize> {
        self.members.iter().map(|member| member.first)
    }

    /// Adds members for items of a first step, after the others.
    pub fn join(&mut self, prefilled: &Prefilled, joining: &[Joining]) -> ort::Result<()> {
        let length = prefilled.length;
        let before = self.members.len();
        let mut members = self.members.clone();
        for &Joining { item, source, rows } in joining {
            let adapter = prefilled.adapters[item].clone();
            members.push(Member { adapter, first: 0, rows, length, source, common: vec![length; rows * rows] });
        }
        if members.iter().any(|member| member.adapter.is_some()) {
            (self.adapters, self.binding) = (None, None);
        }
        let room = self.targets.first().map_or(0, |target| target.shape()[2] as usize);
        let width = self.mask.as_ref().map_or(0, |mask| mask.shape()[1] as usize);
        let fits = joining.iter().all(|joining| joining.source <= width && length < room);
        if !fits || !place(&mut members, before, self.rows()) {
            let kept = self.members.iter().flat_map(|member| member.range().map(Origin::Row));
            let new = joining.iter().flat_map(|joining| std::iter::repeat_n(Origin::Item(joining.item), joining.rows));
            let from = kept.chain(new).collect();
            return self.rebuild(from, members, Some(prefilled));
        }
        let from: Vec<(usize, usize)> = members[before..]
            .iter()
            .zip(joining)
            .flat_map(|(member, joining)| member.range().map(|row| (row, joining.item)))
            .collect();
        for (to, new) in self.targets.iter_mut().zip(&prefilled.targets) {
            from.iter().for_each(|&(row, item)| copy_row(to, row, new, item, length));
        }
        let source = |row: usize| members.iter().find(|member| member.range().contains(&row)).map_or(0, |of| of.source);
        let sources: Vec<usize> = from.iter().map(|&(row, _)| source(row)).collect();
        for (to, new) in self.sources.iter_mut().zip(&prefilled.sources) {
            from.iter().zip(&sources).for_each(|(&(row, item), &source)| copy_row(to, row, new, item, source));
        }
        if let Some(mask) = &mut self.mask {
            from.iter().zip(&sources).for_each(|(&(row, item), &source)| {
                copy_mask(mask, row, &prefilled.mask, item, source);
            });
        }
        self.members = members;
        Ok(())
    }

    /// Keeps the given members, in this order.
    pub fn select(&mut self, continued: &[Continued]) -> ort::Result<()> {
        let before = self.members.as_slice();
        let exists = |&Continued { member, parents }: &Continued| {
            before.get(member).is_some_and(|member| parents.iter().all(|&parent| parent < member.rows))
        };
        if !continued.iter().all(exists) {
            return Err(ort::Error::new(format!("members {continued:?} of a cache of {}", before.len())));
        }
        let members: Vec<Member> =
            continued.iter().map(|&Continued { member, parents }| before[member].continued(parents)).collect();
        if before.len() != members.len() && before.iter().any(|member| member.adapter.is_some()) {
            (self.adapters, self.binding) = (None, None);
        }
        let keeps_rows = continued.iter().all(|&Continued { member, parents }| parents.len() == before[member].rows);
        let occupied: usize = members.iter().map(|member| member.rows).sum();
        let holes = self.rows() - occupied.min(self.rows());
        if keeps_rows && holes <= 1.max(self.rows() / 4) {
            self.continue_rows(continued);
            self.members = members;
            return Ok(());
        }
        let from = continued
            .iter()
            .flat_map(|&Continued { member, parents }| {
                let first = before[member].first;
                parents.iter().map(move |parent| Origin::Row(first + parent))
            })
            .collect();
        self.rebuild(from, members, None)
    }

    /// The adapter of each row if the inputs of these adapters are to be set before the next step.
    pub fn rows_without_inputs(&self) -> Option<Vec<Option<Adapter>>> {
        let is_missing = self.adapters.is_none() && self.members.iter().any(|member| member.adapter.is_some());
        is_missing.then(|| {
            let mut rows = vec![None; self.rows()];
            self.members.iter().for_each(|member| rows[member.range()].fill(member.adapter.clone()));
            rows
        })
    }

    /// Sets the inputs of the rows' adapters.
    pub fn set_adapters(&mut self, adapters: Option<RowAdapters>) {
        (self.adapters, self.binding) = (adapters, None);
    }

    /// Whether the next step takes adapters.
    pub fn has_adapters(&self) -> bool {
        self.adapters.is_some()
    }

    /// Runs the cached step for one token of each row of each member, and returns the outputs of all rows.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<DecoderOutputs> {
        let longest = self.members.iter().map(|member| member.length).max().unwrap_or(0);
        if self.targets.first().is_some_and(|target| longest as i64 >= target.shape()[2]) {
            let from = self.members.iter().flat_map(|member| member.range().map(Origin::Row)).collect();
            self.rebuild(from, self.members.clone(), None)?;
        }
        // Any token will do for a hole.
        let (mut of_rows, mut positions) = (vec![0; self.rows()], vec![0; self.rows()]);
        let mut given = tokens.iter();
        for member in &self.members {
            let own = of_rows[member.range()].iter_mut().zip(&mut given);
            own.for_each(|(to, &token)| *to = token);
            positions[member.range()].fill(member.length as i64);
        }
        if self.binding.is_none() {
            let mask = self.mask.as_ref().ok_or_else(|| ort::Error::new("a step without rows"))?;
            let (sources, adapters) = (&self.sources, self.adapters.as_ref());
            self.binding = Some(StepBinding::new(session, mask, sources, &mut self.targets, adapters, 1)?);
        }
        let Some(binding) = &mut self.binding else { unreachable!("bound just above") };
        let outputs = binding.run(session, &of_rows, positions.into_iter(), request, options)?;
        self.members.iter_mut().for_each(|member| member.length += 1);
        Ok(outputs)
    }

    /// Moves everything to new memory: row `r` of the members, counted in their order, comes from `from[r]`.
    fn rebuild(
        &mut self,
        from: Vec<Origin>,
        mut members: Vec<Member>,
        prefilled: Option<&Prefilled>,
    ) -> ort::Result<()> {
        (self.binding, self.adapters) = (None, None);
        if from.is_empty() {
            *self = RaggedCache::default();
            return Ok(());
        }
        let mut first = 0;
        for member in &mut members {
            (member.first, first) = (first, first + member.rows);
        }
        // Where one member joins, more may follow.
        let spare = if prefilled.is_some() && self.mask.is_some() { from.len() / 8 } else { 0 };
        let rows = from.len() + spare;
        let of_rows = |value: fn(&Member) -> usize| -> Vec<usize> {
            members.iter().flat_map(|member| std::iter::repeat_n(value(member), member.rows)).collect()
        };
        let (lengths, sources) = (of_rows(|member| member.length), of_rows(|member| member.source));
        // A step writes one token after the longest row.
        let room = capacity(lengths.iter().max().map_or(0, |longest| longest + 1));
        let width = sources.iter().max().map_or(1, |longest| longest.next_multiple_of(SOURCE_BLOCK));
        let new = |part: fn(&Prefilled) -> &Vec<Tensor<f32>>, at: usize| prefilled.map(|first| &part(first)[at]);
        let layers = prefilled.map_or(self.targets.len(), |first| first.targets.len());
        for at in 0..layers {
            let moved = moved(self.targets.get(at), new(|first| &first.targets, at), &from, &lengths, [rows, room])?;
            put(&mut self.targets, at, moved);
        }
        for at in 0..layers {
            let moved = moved(self.sources.get(at), new(|first| &first.sources, at), &from, &sources, [rows, width])?;
            put(&mut self.sources, at, moved);
        }
        let mut mask = Tensor::<i64>::new(&Allocator::default(), [rows, width])?;
        // A hole sees something too.
        mask.extract_tensor_mut().1.fill(1);
        for (to, (&from, &source)) in from.iter().zip(&sources).enumerate() {
            let (tensor, row) = pick(self.mask.as_ref(), prefilled.map(|first| &first.mask), from)?;
            copy_mask(&mut mask, to, tensor, row, source);
        }
        (self.mask, self.members) = (Some(mask), members);
        Ok(())
    }

    /// Makes each row the continuation of its parent, in place.
    fn continue_rows(&mut self, continued: &[Continued]) {
        let mut copies: Vec<TailCopy> = Vec::new();
        for &Continued { member, parents } in continued {
            let member = &self.members[member];
            for (row, &parent) in parents.iter().enumerate() {
                let common = member.common[row * member.rows + parent];
                if row != parent && common < member.length {
                    let (row, parent) = (member.first + row, member.first + parent);
                    copies.push(TailCopy { row, parent, common, length: member.length });
                }
            }
        }
        copy_tails(&mut self.targets, &copies, &mut self.scratch);
    }
}

impl Member {
    /// Its rows in the tensors.
    fn range(&self) -> Range<usize> {
        self.first..self.first + self.rows
    }

    /// The member once each row `r` has become the continuation of row `parents[r]`.
    fn continued(&self, parents: &[usize]) -> Member {
        let pair = |a: usize, b: usize| if a == b { self.length } else { self.common[a * self.rows + b] };
        let common = parents.iter().flat_map(|&a| parents.iter().map(move |&b| pair(a, b))).collect();
        Member { adapter: self.adapter.clone(), rows: parents.len(), common, ..*self }
    }
}

/// Places the members from `new` on in the holes that the others leave among `rows` rows. Returns whether there is room.
fn place(members: &mut [Member], new: usize, rows: usize) -> bool {
    let (kept, joining) = members.split_at_mut(new);
    let mut is_free = vec![true; rows];
    kept.iter().for_each(|member| is_free[member.range()].fill(false));
    for member in joining {
        let wanted = member.rows;
        let Some(first) =
            (0..(rows + 1).saturating_sub(wanted)).find(|&at| is_free[at..at + wanted].iter().all(|&free| free))
        else {
            return false;
        };
        member.first = first;
        is_free[member.range()].fill(false);
    }
    true
}

fn put(tensors: &mut Vec<Tensor<f32>>, at: usize, value: Tensor<f32>) {
    match tensors.get_mut(at) {
        Some(tensor) => *tensor = value,
        None => tensors.push(value),
    }
}

/// The tensor, and the row in it, that a row's memory comes from.
fn pick<'t, T>(old: Option<&'t T>, prefilled: Option<&'t T>, from: Origin) -> ort::Result<(&'t T, usize)> {
    let (tensor, row) = match from {
        Origin::Row(row) => (old, row),
        Origin::Item(item) => (prefilled, item),
    };
    tensor.map(|tensor| (tensor, row)).ok_or_else(|| ort::Error::new("rows of a cache that does not exist"))
}

/// Copies the first `length` tokens of a row of keys or values; both tensors are `[rows, kv_heads, tokens, head_dim]`.
fn copy_row(to: &mut Tensor<f32>, row: usize, from: &Tensor<f32>, from_row: usize, length: usize) {
    let (shape, data) = from.extract_tensor();
    let [heads, before, dim] = [1, 2, 3].map(|axis| shape[axis] as usize);
    let (shape, to) = to.extract_tensor_mut();
    let room = shape[2] as usize;
    for head in 0..heads {
        let to = &mut to[(row * heads + head) * room * dim..][..room * dim];
        to[..length * dim].copy_from_slice(&data[(from_row * heads + head) * before * dim..][..length * dim]);
        // Never read; zeroed so that nothing else is ever mistaken for keys and values of this row.
        to[length * dim..].fill(0.0);
    }
}

/// Copies the first `source` tokens of a row's mask; the others are padding.
fn copy_mask(to: &mut Tensor<i64>, row: usize, from: &Tensor<i64>, from_row: usize, source: usize) {
    let (shape, data) = from.extract_tensor();
    let before = shape[1] as usize;
    let (shape, to) = to.extract_tensor_mut();
    let width = shape[1] as usize;
    let to = &mut to[row * width..][..width];
    to[..source].copy_from_slice(&data[from_row * before..][..source]);
    to[source..].fill(0);
}

/// Keys or values `[rows, kv_heads, room, head_dim]` in new memory, with the first tokens of each row as `lengths`
/// counts them.
fn moved(
    old: Option<&Tensor<f32>>,
    prefilled: Option<&Tensor<f32>>,
    from: &[Origin],
    lengths: &[usize],
    [rows, room]: [usize; 2],
) -> ort::Result<Tensor<f32>> {
    let shape = old.or(prefilled).map(|tensor| tensor.shape().to_vec()).unwrap_or_default();
    let [heads, dim] = [1, 3].map(|axis| shape.get(axis).map_or(0, |&size| size as usize));
    let mut moved = Tensor::<f32>::new(&Allocator::default(), [rows, heads, room, dim])?;
    for (to, (&from, &length)) in from.iter().zip(lengths).enumerate() {
        let (tensor, row) = pick(old, prefilled, from)?;
        copy_row(&mut moved, to, tensor, row, length);
    }
    moved.extract_tensor_mut().1[from.len() * heads * room * dim..].fill(0.0);
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(first: usize, rows: usize) -> Member {
        Member { adapter: None, first, rows, length: 1, source: 1, common: vec![1; rows * rows] }
    }

    #[test]
    fn new_members_take_the_first_holes_that_are_large_enough() {
        // Name, the members and those that join (first row and rows), the number of rows, where the new ones come to lie.
        type Case = (&'static str, &'static [(usize, usize)], &'static [usize], usize, Option<&'static [usize]>);
        let cases: [Case; 5] = [
            ("an empty cache", &[], &[1], 0, None),
            ("holes in between", &[(1, 2), (5, 1)], &[2, 1], 7, Some(&[3, 0])),
            ("at the end", &[(0, 2)], &[1, 2], 5, Some(&[2, 3])),
            ("enough rows, but apart", &[(1, 1), (3, 1)], &[2], 5, None),
            ("room for one of two", &[(0, 1)], &[2, 2], 4, None),
        ];
        for (name, kept, joining, rows, expected) in cases {
            let kept = kept.iter().map(|&(first, rows)| member(first, rows));
            let mut members: Vec<Member> = kept.chain(joining.iter().map(|&rows| member(0, rows))).collect();
            let new = members.len() - joining.len();
            let fits = place(&mut members, new, rows);
            let found: Vec<usize> = members[new..].iter().map(|member| member.first).collect();
            assert_eq!(fits.then_some(found.as_slice()), expected, "{name}");
        }
    }
}
