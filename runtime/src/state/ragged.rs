//! A cache of fixed capacity for rows of different lengths, that rows join and leave between steps: what [`Engine`] keeps
//! where the model's layout allows it. A row is a target with its own copy of its source's keys and values, so that
//! sources with different numbers of beams lie side by side; members are the rows of one source.
//!
//! # Design
//! Memory is moved when rows join or leave, or capacity is exhausted, and then all of it, tensor by tensor. Between such
//! moments a step is bound once and allocates nothing. As in the cache beside this one, beams that continue other beams
//! copy only what they do not have in common.
//!
//! [`Engine`]: crate::Engine

use ort::memory::Allocator;
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor, TensorValueType};
use t5gemma_kernels::LogitsRequest;

use super::logits::LogitsPort;
use super::{Returned, attended_port};

/// Room for this many target tokens at least.
const LEAST_CAPACITY: usize = 64;

/// How many target tokens rows of at most `length` get room for.
pub(crate) fn capacity(length: usize) -> usize {
    LEAST_CAPACITY.max(length.next_power_of_two())
}

/// The memory of the cached decoder steps.
#[derive(Default)]
pub(crate) struct Ragged {
    /// `[rows, source]`; none as long as there is no row.
    mask: Option<Tensor<i64>>,
    /// Keys and values of the sources, layer by layer: `[rows, kv_heads, source, head_dim]`.
    sources: Vec<Tensor<f32>>,
    /// Keys and values of the targets, layer by layer: `[rows, kv_heads, capacity, head_dim]`.
    targets: Vec<Tensor<f32>>,
    members: Vec<Member>,
    /// What the session is bound to; none after a change.
    bound: Option<Bound>,
    /// The moved parts of rows, kept for its allocation.
    moved: Vec<f32>,
}

/// The rows of one source.
#[derive(Clone, Debug, PartialEq)]
struct Member {
    rows: usize,
    /// Target tokens there are keys and values of.
    length: usize,
    source: usize,
    /// For each pair of rows, how many leading tokens they have in common: `[rows, rows]`.
    common: Vec<usize>,
}

struct Bound {
    binding: IoBinding,
    /// `[rows, 1]`
    ids: Tensor<i64>,
    /// `[rows, 1]`
    positions: Tensor<i64>,
    logits: LogitsPort,
    /// The name of what tells what the tokens attend to.
    attended: Option<String>,
}

/// What the first decoder step returned of some sources.
pub(crate) struct First {
    mask: Tensor<i64>,
    sources: Vec<Tensor<f32>>,
    targets: Vec<Tensor<f32>>,
}

impl First {
    /// `mask` is `[items, source]`; `per_item` tells of each of `cached` whether it is of the sources.
    pub fn new(mask: DynValue, cached: Vec<DynValue>, per_item: &[bool]) -> ort::Result<First> {
        let (mut sources, mut targets) = (Vec::new(), Vec::new());
        for (value, &per_item) in cached.into_iter().zip(per_item) {
            let value = value.downcast::<TensorValueType<f32>>()?;
            if per_item { sources.push(value) } else { targets.push(value) }
        }
        Ok(First { mask: mask.downcast::<TensorValueType<i64>>()?, sources, targets })
    }
}

/// Where a row's memory is taken from.
#[derive(Clone, Copy)]
enum From {
    /// A row from before.
    Row(usize),
    /// An item of a first step.
    Item(usize),
}

/// A member that goes on: which it was, and which of its rows each of its rows continues.
pub(crate) type Continued<'a> = (usize, &'a [usize]);

/// A member that joins: its item in the first step, its source's tokens, and its rows.
pub(crate) type Joining = (usize, usize, usize);

impl Ragged {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.members.iter().map(|member| member.rows).sum()
    }

    /// Adds rows for items of a first step, behind those that are there.
    pub fn join(&mut self, first: &First, joining: &[Joining]) -> ort::Result<()> {
        let length = first.targets.first().map_or(0, |target| target.shape()[2] as usize);
        let mut from: Vec<From> = (0..self.rows()).map(From::Row).collect();
        let mut members = self.members.clone();
        for &(item, source, rows) in joining {
            from.extend(std::iter::repeat_n(From::Item(item), rows));
            members.push(Member { rows, length, source, common: vec![length; rows * rows] });
        }
        self.rebuild(&from, members, Some(first))
    }

    /// Keeps the given members, in this order, with the rows that are given.
    pub fn select(&mut self, going_on: &[Continued]) -> ort::Result<()> {
        let before = self.members.as_slice();
        let is_whole = |&(member, parents): &Continued| {
            before.get(member).is_some_and(|member| parents.iter().all(|&parent| parent < member.rows))
        };
        if !going_on.iter().all(is_whole) {
            return Err(ort::Error::new(format!("members {going_on:?} of a cache of {}", before.len())));
        }
        let members: Vec<Member> =
            going_on.iter().map(|&(member, parents)| self.members[member].continued(parents)).collect();
        let firsts: Vec<usize> =
            before.iter().scan(0, |row, member| Some(std::mem::replace(row, *row + member.rows))).collect();
        let parents: Vec<usize> = going_on
            .iter()
            .flat_map(|&(member, parents)| {
                let first = firsts[member];
                parents.iter().map(move |parent| first + parent)
            })
            .collect();
        let is_in_place = going_on.len() == before.len()
            && going_on
                .iter()
                .enumerate()
                .all(|(at, &(member, parents))| at == member && parents.len() == before[member].rows);
        if is_in_place {
            self.copy_rows(&parents, &firsts);
            self.members = members;
            return Ok(());
        }
        let from: Vec<From> = parents.into_iter().map(From::Row).collect();
        self.rebuild(&from, members, None)
    }

    /// Runs the cached step for one token of each row, and returns what it says.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        wanted: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<Returned> {
        let longest = self.members.iter().map(|member| member.length).max().unwrap_or(0);
        if self.targets.first().is_some_and(|target| longest as i64 >= target.shape()[2]) {
            let from: Vec<From> = (0..self.rows()).map(From::Row).collect();
            self.rebuild(&from, self.members.clone(), None)?;
        }
        if self.bound.is_none() {
            self.bound = Some(self.bind(session)?);
        }
        let Some(Bound { binding, ids, positions, logits, attended }) = &mut self.bound else {
            unreachable!("bound just above")
        };
        ids.extract_tensor_mut().1.copy_from_slice(tokens);
        let lengths = self.members.iter().flat_map(|member| std::iter::repeat_n(member.length as i64, member.rows));
        positions.extract_tensor_mut().1.iter_mut().zip(lengths).for_each(|(position, length)| *position = length);
        logits.bind(binding, wanted)?;
        let mut outputs = session.run_binding_with_options(binding, options)?;
        let logits = outputs.remove(logits.name()).ok_or_else(|| ort::Error::new("no logits"))?;
        let attended = attended.as_ref().and_then(|name| outputs.remove(name.as_str()));
        self.members.iter_mut().for_each(|member| member.length += 1);
        Ok(Returned { logits, attended })
    }

    fn bind(&mut self, session: &Session) -> ort::Result<Bound> {
        let (allocator, rows) = (Allocator::default(), self.rows());
        let mut binding = session.create_binding()?;
        let mut inputs = session.inputs().iter().map(|port| port.name().to_string());
        let mut outputs = session.outputs().iter().map(|port| port.name().to_string());
        let next = |side: &str, names: &mut dyn Iterator<Item = String>| {
            names.next().ok_or_else(|| ort::Error::new(format!("too few {side}s")))
        };
        let ids = Tensor::<i64>::new(&allocator, [rows, 1])?;
        let positions = Tensor::<i64>::new(&allocator, [rows, 1])?;
        let mask = self.mask.as_ref().ok_or_else(|| ort::Error::new("a step without rows"))?;
        binding.bind_input(next("input", &mut inputs)?, mask)?;
        binding.bind_input(next("input", &mut inputs)?, &ids)?;
        binding.bind_input(next("input", &mut inputs)?, &positions)?;
        let logits = LogitsPort::new(session, next("output", &mut outputs)?, rows, 1);
        let attended = attended_port(session);
        if let Some(name) = &attended {
            let source = mask.shape()[1] as usize;
            binding.bind_output(name, &mut Tensor::<f32>::new(&allocator, [rows, 1, source])?)?;
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

    /// Moves everything: row `r` is taken from `from[r]`.
    fn rebuild(&mut self, from: &[From], members: Vec<Member>, first: Option<&First>) -> ort::Result<()> {
        self.bound = None;
        let of_rows = |value: fn(&Member) -> usize| -> Vec<usize> {
            members.iter().flat_map(|member| std::iter::repeat_n(value(member), member.rows)).collect()
        };
        let (lengths, sources) = (of_rows(|member| member.length), of_rows(|member| member.source));
        // A step writes one token behind the longest.
        let room = capacity(lengths.iter().max().map_or(0, |longest| longest + 1));
        let width = sources.iter().copied().max().unwrap_or(0);
        if from.is_empty() {
            *self = Ragged::default();
            return Ok(());
        }
        let new = |part: fn(&First) -> &Vec<Tensor<f32>>, at: usize| first.map(|first| &part(first)[at]);
        let layers = first.map_or(self.targets.len(), |first| first.targets.len());
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
            let (tensor, row) = pick(self.mask.as_ref(), first.map(|first| &first.mask), *from)?;
            let (shape, data) = tensor.extract_tensor();
            to[..source].copy_from_slice(&data[row * shape[1] as usize..][..source]);
            to[source..].fill(0);
        }
        (self.mask, self.members) = (Some(mask), members);
        Ok(())
    }

    /// Makes row `r` what row `parents[r]` of its member is, in place; `firsts` are the members' first rows.
    fn copy_rows(&mut self, parents: &[usize], firsts: &[usize]) {
        // (row, parent, tokens they have in common, tokens)
        let mut moves: Vec<(usize, usize, usize, usize)> = Vec::new();
        for (member, &first) in self.members.iter().zip(firsts) {
            for row in 0..member.rows {
                let parent = parents[first + row] - first;
                let common = member.common[row * member.rows + parent];
                if row != parent && common < member.length {
                    moves.push((first + row, first + parent, common, member.length));
                }
            }
        }
        if moves.is_empty() {
            return;
        }
        for target in &mut self.targets {
            let (shape, data) = target.extract_tensor_mut();
            let [heads, room, dim] = [1, 2, 3].map(|axis| shape[axis] as usize);
            let tail = |row: usize, head: usize, common: usize, length: usize| {
                let first = (row * heads + head) * room;
                (first + common) * dim..(first + length) * dim
            };
            // All is read before any is written: rows may change places.
            self.moved.clear();
            for &(_, parent, common, length) in &moves {
                (0..heads).for_each(|head| self.moved.extend_from_slice(&data[tail(parent, head, common, length)]));
            }
            let mut moved = self.moved.as_slice();
            for &(row, _, common, length) in &moves {
                for head in 0..heads {
                    let (part, rest) = moved.split_at((length - common) * dim);
                    data[tail(row, head, common, length)].copy_from_slice(part);
                    moved = rest;
                }
            }
        }
    }
}

impl Member {
    /// What the member is once row `r` has become the continuation of row `parents[r]`.
    fn continued(&self, parents: &[usize]) -> Member {
        let pair = |a: usize, b: usize| if a == b { self.length } else { self.common[a * self.rows + b] };
        let common = parents.iter().flat_map(|&a| parents.iter().map(move |&b| pair(a, b))).collect();
        Member { rows: parents.len(), common, ..*self }
    }
}

fn put(tensors: &mut Vec<Tensor<f32>>, at: usize, value: Tensor<f32>) {
    match tensors.get_mut(at) {
        Some(tensor) => *tensor = value,
        None => tensors.push(value),
    }
}

/// The tensor and the row in it that memory is taken from.
fn pick<'t, T>(old: Option<&'t T>, first: Option<&'t T>, from: From) -> ort::Result<(&'t T, usize)> {
    let (tensor, row) = match from {
        From::Row(row) => (old, row),
        From::Item(item) => (first, item),
    };
    tensor.map(|tensor| (tensor, row)).ok_or_else(|| ort::Error::new("rows of a cache that there is not"))
}

/// Keys or values `[rows, kv_heads, room, head_dim]` in new memory, of each row the first tokens that `lengths` counts.
fn moved(
    old: Option<&Tensor<f32>>,
    first: Option<&Tensor<f32>>,
    from: &[From],
    lengths: &[usize],
    room: usize,
) -> ort::Result<Tensor<f32>> {
    let shape = old.or(first).map(|tensor| tensor.shape().to_vec()).unwrap_or_default();
    let [heads, dim] = [1, 3].map(|axis| shape.get(axis).map_or(0, |&size| size as usize));
    let mut moved = Tensor::<f32>::new(&Allocator::default(), [from.len(), heads, room, dim])?;
    let rows = moved.extract_tensor_mut().1.chunks_exact_mut(heads * room * dim);
    for ((to, &from), &length) in rows.zip(from).zip(lengths) {
        let (tensor, row) = pick(old, first, from)?;
        let (shape, data) = tensor.extract_tensor();
        let before = shape[2] as usize;
        for (head, to) in to.chunks_exact_mut(room * dim).enumerate() {
            to[..length * dim].copy_from_slice(&data[(row * heads + head) * before * dim..][..length * dim]);
            // Never read, but never anything that could be taken for a number either.
            to[length * dim..].fill(0.0);
        }
    }
    Ok(moved)
}
