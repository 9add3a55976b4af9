//! `RaggedCache`: a cache of fixed capacity for rows of different lengths, which join and leave between steps.
//! [`Engine`] keeps one if the model's cache layout allows it. Each row is a target with its own copy of its source's
//! keys and values, so that sources with different numbers of beams lie side by side; a member is the rows of one
//! source.
//!
//! # Design
//! When rows join or leave, or capacity is exhausted, everything is moved, tensor by tensor. Between such moments a
//! step is bound once and allocates nothing. As in `InPlaceCache`, beams that continue other beams copy only the tokens
//! after their common prefix.
//!
//! [`Engine`]: crate::Engine

use ort::memory::Allocator;
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor, TensorValueType};
use t5gemma_kernels::LogitsRequest;

use super::DecoderOutputs;
use super::step_binding::{StepBinding, TailCopy, copy_tails};
use crate::adapter::{Adapter, RowAdapters};

/// The least capacity, in target tokens.
const LEAST_CAPACITY: usize = 64;

/// The capacity for rows of at most `length` target tokens.
pub(crate) fn capacity(length: usize) -> usize {
    LEAST_CAPACITY.max(length.next_power_of_two())
}

/// The memory of the cached decoder steps.
#[derive(Default)]
pub(crate) struct RaggedCache {
    /// `[rows, source]`; `None` without rows.
    mask: Option<Tensor<i64>>,
    /// Cross-attention keys and values, layer by layer: `[rows, kv_heads, source, head_dim]`.
    sources: Vec<Tensor<f32>>,
    /// Self-attention keys and values, layer by layer: `[rows, kv_heads, capacity, head_dim]`.
    targets: Vec<Tensor<f32>>,
    members: Vec<Member>,
    /// The inputs of the members' adapters; `None` if no member has one, or after a change of the rows.
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
    rows: usize,
    /// Target tokens in the cache.
    length: usize,
    /// Tokens of the source.
    source: usize,
    /// For each pair of rows, how many leading tokens they have in common: `[rows, rows]`.
    common: Vec<usize>,
}

/// What the first decoder step of some sources has put into the cache.
pub(crate) struct Prefilled {
    mask: Tensor<i64>,
    sources: Vec<Tensor<f32>>,
    targets: Vec<Tensor<f32>>,
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
        Ok(Prefilled { mask: mask.downcast::<TensorValueType<i64>>()?, sources, targets, adapters })
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
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.members.iter().map(|member| member.rows).sum()
    }

    /// Appends rows for items of a first step.
    pub fn join(&mut self, prefilled: &Prefilled, joining: &[Joining]) -> ort::Result<()> {
        let length = prefilled.targets.first().map_or(0, |target| target.shape()[2] as usize);
        let mut from: Vec<Origin> = (0..self.rows()).map(Origin::Row).collect();
        let mut members = self.members.clone();
        for &Joining { item, source, rows } in joining {
            from.extend(std::iter::repeat_n(Origin::Item(item), rows));
            let adapter = prefilled.adapters[item].clone();
            members.push(Member { adapter, rows, length, source, common: vec![length; rows * rows] });
        }
        self.rebuild(&from, members, Some(prefilled))
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
        let firsts: Vec<usize> =
            before.iter().scan(0, |row, member| Some(std::mem::replace(row, *row + member.rows))).collect();
        let parents: Vec<usize> = continued
            .iter()
            .flat_map(|&Continued { member, parents }| {
                let first = firsts[member];
                parents.iter().map(move |parent| first + parent)
            })
            .collect();
        let is_in_place = continued.len() == before.len()
            && continued
                .iter()
                .enumerate()
                .all(|(at, &Continued { member, parents })| at == member && parents.len() == before[member].rows);
        if is_in_place {
            self.continue_rows(&parents, &firsts);
            self.members = members;
            return Ok(());
        }
        let from: Vec<Origin> = parents.into_iter().map(Origin::Row).collect();
        self.rebuild(&from, members, None)
    }

    /// The adapter of each row if the inputs of these adapters are to be set before the next step.
    pub fn rows_without_inputs(&self) -> Option<Vec<Option<Adapter>>> {
        let is_missing = self.adapters.is_none() && self.members.iter().any(|member| member.adapter.is_some());
        let of_member = |member: &Member| std::iter::repeat_n(member.adapter.clone(), member.rows);
        is_missing.then(|| self.members.iter().flat_map(of_member).collect())
    }

    /// Sets the inputs of the rows' adapters.
    pub fn set_adapters(&mut self, adapters: Option<RowAdapters>) {
        (self.adapters, self.binding) = (adapters, None);
    }

    /// Whether the next step takes adapters.
    pub fn has_adapters(&self) -> bool {
        self.adapters.is_some()
    }

    /// Runs the cached step for one token of each row and returns its outputs.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<DecoderOutputs> {
        let longest = self.members.iter().map(|member| member.length).max().unwrap_or(0);
        if self.targets.first().is_some_and(|target| longest as i64 >= target.shape()[2]) {
            let from: Vec<Origin> = (0..self.rows()).map(Origin::Row).collect();
            self.rebuild(&from, self.members.clone(), None)?;
        }
        if self.binding.is_none() {
            let mask = self.mask.as_ref().ok_or_else(|| ort::Error::new("a step without rows"))?;
            let (sources, adapters) = (&self.sources, self.adapters.as_ref());
            self.binding = Some(StepBinding::new(session, mask, sources, &mut self.targets, adapters, 1)?);
        }
        let Some(binding) = &mut self.binding else { unreachable!("bound just above") };
        let positions = self.members.iter().flat_map(|member| std::iter::repeat_n(member.length as i64, member.rows));
        let outputs = binding.run(session, tokens, positions, request, options)?;
        self.members.iter_mut().for_each(|member| member.length += 1);
        Ok(outputs)
    }

    /// Moves everything to new memory: row `r` comes from `from[r]`.
    fn rebuild(&mut self, from: &[Origin], members: Vec<Member>, prefilled: Option<&Prefilled>) -> ort::Result<()> {
        self.binding = None;
        let of_rows = |value: fn(&Member) -> usize| -> Vec<usize> {
            members.iter().flat_map(|member| std::iter::repeat_n(value(member), member.rows)).collect()
        };
        let (lengths, sources) = (of_rows(|member| member.length), of_rows(|member| member.source));
        // A step writes one token after the longest row.
        let room = capacity(lengths.iter().max().map_or(0, |longest| longest + 1));
        let width = sources.iter().copied().max().unwrap_or(0);
        if from.is_empty() {
            *self = RaggedCache::default();
            return Ok(());
        }
        let new = |part: fn(&Prefilled) -> &Vec<Tensor<f32>>, at: usize| prefilled.map(|first| &part(first)[at]);
        let layers = prefilled.map_or(self.targets.len(), |first| first.targets.len());
        for at in 0..layers {
            let moved = moved(self.targets.get(at), new(|first| &first.targets, at), from, &lengths, room)?;
            put(&mut self.targets, at, moved);
        }
        for at in 0..layers {
            let moved = moved(self.sources.get(at), new(|first| &first.sources, at), from, &sources, width)?;
            put(&mut self.sources, at, moved);
        }
        let mut mask = Tensor::<i64>::new(&Allocator::default(), [from.len(), width])?;
        let rows = mask.extract_tensor_mut().1.chunks_exact_mut(width);
        for ((to, from), &source) in rows.zip(from).zip(&sources) {
            let (tensor, row) = pick(self.mask.as_ref(), prefilled.map(|first| &first.mask), *from)?;
            let (shape, data) = tensor.extract_tensor();
            to[..source].copy_from_slice(&data[row * shape[1] as usize..][..source]);
            to[source..].fill(0);
        }
        if self.members.iter().map(Member::of_adapter).ne(members.iter().map(Member::of_adapter)) {
            self.adapters = None;
        }
        (self.mask, self.members) = (Some(mask), members);
        Ok(())
    }

    /// Makes each row `r` the continuation of row `parents[r]` of its member, in place; `firsts` are the members' first
    /// rows.
    fn continue_rows(&mut self, parents: &[usize], firsts: &[usize]) {
        let mut copies: Vec<TailCopy> = Vec::new();
        for (member, &first) in self.members.iter().zip(firsts) {
            for row in 0..member.rows {
                let parent = parents[first + row] - first;
                let common = member.common[row * member.rows + parent];
                if row != parent && common < member.length {
                    copies.push(TailCopy { row: first + row, parent: first + parent, common, length: member.length });
                }
            }
        }
        copy_tails(&mut self.targets, &copies, &mut self.scratch);
    }
}

impl Member {
    /// The member once each row `r` has become the continuation of row `parents[r]`.
    fn continued(&self, parents: &[usize]) -> Member {
        let pair = |a: usize, b: usize| if a == b { self.length } else { self.common[a * self.rows + b] };
        let common = parents.iter().flat_map(|&a| parents.iter().map(move |&b| pair(a, b))).collect();
        Member { adapter: self.adapter.clone(), rows: parents.len(), common, ..*self }
    }

    /// What the inputs of adapters depend on.
    fn of_adapter(&self) -> (Option<&Adapter>, usize) {
        (self.adapter.as_ref(), self.rows)
    }
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

/// Keys or values `[rows, kv_heads, room, head_dim]` in new memory, with the first tokens of each row as `lengths`
/// counts them.
fn moved(
    old: Option<&Tensor<f32>>,
    prefilled: Option<&Tensor<f32>>,
    from: &[Origin],
    lengths: &[usize],
    room: usize,
) -> ort::Result<Tensor<f32>> {
    let shape = old.or(prefilled).map(|tensor| tensor.shape().to_vec()).unwrap_or_default();
    let [heads, dim] = [1, 3].map(|axis| shape.get(axis).map_or(0, |&size| size as usize));
    let mut moved = Tensor::<f32>::new(&Allocator::default(), [from.len(), heads, room, dim])?;
    let rows = moved.extract_tensor_mut().1.chunks_exact_mut(heads * room * dim);
    for ((to, &from), &length) in rows.zip(from).zip(lengths) {
        let (tensor, row) = pick(old, prefilled, from)?;
        let (shape, data) = tensor.extract_tensor();
        let before = shape[2] as usize;
        for (head, to) in to.chunks_exact_mut(room * dim).enumerate() {
            to[..length * dim].copy_from_slice(&data[(row * heads + head) * before * dim..][..length * dim]);
            // Never read; zeroed so that nothing else is ever mistaken for keys and values of this row.
            to[length * dim..].fill(0.0);
        }
    }
    Ok(moved)
}
