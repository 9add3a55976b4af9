//! A cache that stays in the memory of the device that computes: what a run returns is bound to the next run where it lies,
//! and a change of rows is a graph of its own (`reorder_model.onnx`). Only token ids, positions and logits come and go, or of
//! the logits the greatest, where no more is wanted.
//!
//! # Design
//! The device is one value, [`Device`]: with the CPU for a device the same code runs on a machine without a GPU, and that is
//! how it is tested.

use std::sync::Arc;

use half::{bf16, f16};
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor};
use t5gemma_graphs::interface::{CacheLayout, DType, LOG_SUM_EXP, TOP_IDS, TOP_SCORES};
use t5gemma_kernels::LogitsRequest;

use super::candidates::spread;
use super::steady::{Pool, SOURCES, Size, Steady, cut, padded};
use super::{Returned, attended_port, keep_rows};
use crate::device::Device;
use crate::session::Graph;

/// Room for this many target tokens to begin with, where it can be extended.
const FIRST_CAPACITY: usize = 64;

/// What is known of a model's cache before anything has run.
#[derive(Clone)]
pub(crate) struct Plan {
    /// How it passes from step to step.
    pub layout: CacheLayout,
    /// Where it is kept.
    pub device: Device,
    /// Its type.
    pub dtype: DType,
    /// For each cached tensor, in the order of the graphs, whether its first axis is source items.
    pub per_item: Vec<bool>,
    /// Heads, and the width of each.
    pub heads: [usize; 2],
    /// Target tokens that the model knows positions of.
    pub longest: usize,
    /// The graph that changes rows.
    pub reorder: Arc<Graph>,
    /// How many of the greatest logits the graphs return beside all of them.
    pub candidates: Option<usize>,
    /// Memory for steps that stays where it is, where there is to be such; of a cache in place only.
    pub steady: Option<Arc<Pool>>,
}

impl Plan {
    /// The tokens to have room for where so many are needed.
    fn room(&self, needed: usize) -> usize {
        // An operator that is told of more than there are positions refuses them.
        needed.next_power_of_two().max(FIRST_CAPACITY).min(self.longest).max(needed)
    }

    /// The outputs that hold what is wanted of the logits. What is not bound is not copied from the device.
    fn scores(&self, logits: String, wanted: LogitsRequest) -> Vec<String> {
        match (wanted, self.candidates) {
            (LogitsRequest::TopK { k, .. }, Some(most)) if k <= most => {
                [TOP_SCORES, TOP_IDS, LOG_SUM_EXP].map(String::from).to_vec()
            }
            _ => vec![logits],
        }
    }
}

/// Logits of what a run returned of them.
fn whole(mut scores: Vec<DynValue>, vocab_size: usize) -> ort::Result<DynValue> {
    let [best, ids, sums] = &scores[..] else { return Ok(scores.swap_remove(0)) };
    let (shape, best) = best.try_extract_tensor::<f32>()?;
    let (ids, sums) = (ids.try_extract_tensor::<i64>()?.1, sums.try_extract_tensor::<f32>()?.1);
    let (rows, count) = (shape[0] as usize, shape[1] as usize);
    let mut logits = vec![0.0_f32; rows * vocab_size];
    let given = best.chunks_exact(count).zip(ids.chunks_exact(count)).zip(sums);
    given.zip(logits.chunks_exact_mut(vocab_size)).for_each(|((given, &sum), row)| spread(given, sum, row));
    Ok(Tensor::from_array(([rows, 1, vocab_size], logits))?.into_dyn())
}

/// Tokens that a graph has logits of.
fn vocab_size(session: &Session) -> usize {
    let shape = session.outputs().first().and_then(|port| port.dtype().tensor_shape());
    shape.and_then(|shape| shape.last().copied()).map_or(0, |size| size.max(0) as usize)
}

/// The memory of the cached decoder step.
pub(crate) struct Resident {
    plan: Plan,
    /// `[items, source]`.
    mask: DynValue,
    /// Keys and values of the sources, layer by layer: `[items, kv_heads, source, head_dim]`.
    sources: Vec<DynValue>,
    /// Keys and values of the targets, layer by layer: `[rows, kv_heads, length or capacity, head_dim]`.
    targets: Vec<DynValue>,
    rows: usize,
    /// Target tokens there are keys and values of.
    length: usize,
    /// What the cached step is bound to, where that stays from step to step, with the outputs that hold its scores; none
    /// after a change.
    bound: Option<(Vec<String>, IoBinding)>,
    /// Tokens of a source, without those that it was padded with for `steady`.
    source: usize,
    /// Whether a step has run since the rows changed last.
    is_settled: bool,
    /// The memory that the keys and values lie in, if it is such as stays.
    steady: Option<Steady>,
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.give_back(Vec::new(), Vec::new());
    }
}

impl Resident {
    /// Runs the first decoder graph, and returns what it says where it is a step: with a cache of fixed capacity the first
    /// tokens are for [`Resident::step`] as all others.
    pub(super) fn start(
        plan: &Plan,
        session: &mut Session,
        mask: DynValue,
        (ids, hidden): (&DynValue, &DynValue),
        wanted: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<(Resident, Option<Returned>)> {
        let (items, prompt) = (mask.shape()[0] as usize, ids.shape()[1] as usize);
        let source = mask.shape()[1] as usize;
        let mut binding = session.create_binding()?;
        let is_static = matches!(plan.layout, CacheLayout::Static(_));
        let inputs: Vec<&DynValue> = if is_static { vec![hidden] } else { vec![&mask, ids, hidden] };
        bind_inputs(&mut binding, session, &inputs)?;
        let mut names = session.outputs().iter().map(|port| port.name().to_string()).collect::<Vec<_>>();
        let scores = (!is_static).then(|| plan.scores(names.remove(0), wanted));
        let host = Device::Cpu.memory()?;
        scores.iter().flatten().try_for_each(|name| binding.bind_output_to_device(name, &host))?;
        let size = vocab_size(session);
        let attended = attended_port(session);
        if let Some(attended) = &attended {
            binding.bind_output_to_device(attended, &host)?;
        }
        let cached = plan.per_item.iter().filter(|&&per_item| per_item || !is_static).count();
        names.truncate(cached);
        let memory = plan.device.memory()?;
        names.iter().try_for_each(|name| binding.bind_output_to_device(name, &memory))?;
        let mut outputs = session.run_binding_with_options(&binding, options)?;
        let mut take = |name: &str| outputs.remove(name).ok_or_else(|| ort::Error::new(format!("no {name}")));
        let attended = attended.map(|name| take(&name)).transpose()?;
        let scores = scores.map(|names| names.iter().map(|name| take(name)).collect::<ort::Result<Vec<_>>>());
        let logits = scores.transpose()?.map(|scores| whole(scores, size)).transpose()?;
        let returned = logits.map(|logits| Returned { logits, attended });
        let values = names.iter().map(|name| take(name)).collect::<ort::Result<Vec<_>>>()?;
        let (mut sources, mut targets) = (Vec::new(), Vec::new());
        match plan.layout {
            CacheLayout::Static(capacity) => {
                sources = values;
                let shape = [items, plan.heads[0], capacity, plan.heads[1]];
                let count = plan.per_item.iter().filter(|&&per_item| !per_item).count();
                targets = (0..count).map(|_| zeros(plan.dtype, shape)).collect::<ort::Result<_>>()?;
            }
            _ => {
                for (value, &per_item) in values.into_iter().zip(&plan.per_item) {
                    if per_item { sources.push(value) } else { targets.push(value) }
                }
            }
        }
        let length = if is_static { 0 } else { prompt };
        let plan = plan.clone();
        let mut resident = Resident {
            plan,
            mask,
            sources,
            targets,
            rows: items,
            length,
            bound: None,
            source,
            is_settled: false,
            steady: None,
        };
        if resident.plan.layout == CacheLayout::InPlace {
            let rows: Vec<usize> = (0..items).collect();
            let room = resident.plan.room(length + 1);
            resident.replace(&rows, room)?;
        }
        Ok((resident, returned))
    }

    /// Runs the cached step for `tokens`, as many for each row, and returns what it says.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        wanted: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<Returned> {
        let count = tokens.len() / self.rows;
        let in_place = self.plan.layout == CacheLayout::InPlace;
        if in_place && count > 1 && self.rows > 1 {
            // The attention over a cache takes several tokens of a single row only: one after the other, then.
            let mut last = None;
            for at in 0..count {
                let each: Vec<i64> = tokens.iter().skip(at).step_by(count).copied().collect();
                last = Some(self.step(session, &each, wanted, options)?);
            }
            return last.ok_or_else(|| ort::Error::new("a step without tokens"));
        }
        self.reserve(count)?;
        let size = vocab_size(session);
        let outputs = session.outputs().iter().map(|port| port.name().to_string());
        let mut names = outputs.collect::<Vec<_>>().into_iter();
        let mut name = || names.next().ok_or_else(|| ort::Error::new("too few outputs"));
        let scores = self.plan.scores(name()?, wanted);
        let attended = attended_port(session);
        if count == 1 && self.settle(session)? {
            return self.steady_step(session, tokens, (scores, attended));
        }
        let uncaptured = self.plan.steady.as_ref().map(|pool| pool.uncaptured()).transpose()?.flatten();
        let options = uncaptured.as_ref().unwrap_or(options);
        let mut binding = match self.bound.take() {
            Some((same, binding)) if same == scores => binding,
            _ => self.bind(session)?,
        };
        // Bound anew for each run: what was given to a device was copied there, and what was returned is someone else's.
        let ids = Tensor::from_array(([self.rows, count], tokens.to_vec()))?;
        binding.bind_input(session.inputs()[1].name(), &ids)?;
        if self.plan.layout != CacheLayout::Growing {
            // Of each row its own, or of all the same.
            let shape = if in_place { vec![self.rows, count] } else { vec![count] };
            let positions = (0..shape.iter().product()).map(|at: usize| (self.length + at % count) as i64);
            let positions = positions.collect::<Vec<_>>();
            binding.bind_input(session.inputs()[2].name(), &Tensor::from_array((shape, positions))?)?;
        }
        let host = Device::Cpu.memory()?;
        scores.iter().try_for_each(|name| binding.bind_output_to_device(name, &host))?;
        if let Some(attended) = &attended {
            binding.bind_output_to_device(attended, &host)?;
        }
        let presents = self.targets.iter().map(|_| name()).collect::<ort::Result<Vec<_>>>()?;
        if !in_place {
            let memory = self.plan.device.memory()?;
            presents.iter().try_for_each(|name| binding.bind_output_to_device(name, &memory))?;
        }
        let mut outputs = session.run_binding_with_options(&binding, options)?;
        let mut take = |name: &str| outputs.remove(name).ok_or_else(|| ort::Error::new(format!("no {name}")));
        let logits = whole(scores.iter().map(|name| take(name)).collect::<ort::Result<Vec<_>>>()?, size)?;
        let attended = attended.map(|name| cut(take(&name)?, self.source)).transpose()?;
        if !in_place {
            self.targets = presents.iter().map(|name| take(name)).collect::<ort::Result<_>>()?;
        }
        drop(outputs);
        // In float32 a GPU leaves self-attention to the CPU, whose inputs are copied when they are bound.
        let stays = in_place && (self.plan.dtype != DType::Float32 || self.plan.device == Device::Cpu);
        self.bound = stays.then_some((scores, binding));
        self.length += count;
        self.is_settled = true;
        Ok(Returned { logits, attended })
    }

    /// Moves the keys and values into memory that stays where it is, and tells whether they are there. They are moved only when a
    /// step has run since the rows changed: those of beams may change in every step.
    fn settle(&mut self, session: &Session) -> ort::Result<bool> {
        let Some(pool) = self.plan.steady.clone() else { return Ok(false) };
        let items = self.mask.shape()[0] as usize;
        if self.steady.is_some() || !self.is_settled || items != self.rows {
            return Ok(self.steady.is_some());
        }
        let size = Size { rows: self.rows, room: self.capacity(), source: self.source.next_multiple_of(SOURCES) };
        let rows: Vec<usize> = (0..self.rows).collect();
        let room = (0..size.room as i64).collect();
        let last = self.sources.first().map_or(0, |source| source.shape()[2] - 1);
        // What is behind a source is not seen, but must be numbers.
        let source = (0..size.source as i64).map(|place| place.min(last)).collect();
        let mut steady = match pool.take(size) {
            Some(mut steady) => {
                self.take_into(&self.targets, (&rows, room), &mut steady.targets)?;
                self.take_into(&self.sources, (&rows, source), &mut steady.sources)?;
                steady
            }
            None => {
                let mut steady = Steady::new(session, self.plan.device, size)?;
                steady.targets = self.taken(&self.targets, &rows, room)?;
                steady.sources = self.taken(&self.sources, &rows, source)?;
                steady
            }
        };
        let mask = padded(&self.mask, size.source)?;
        steady.set_mask(&mask)?;
        self.bound = None;
        self.mask = mask.into_dyn();
        self.targets = std::mem::take(&mut steady.targets);
        self.sources = std::mem::take(&mut steady.sources);
        self.steady = Some(steady);
        Ok(true)
    }

    /// [`Resident::step`] of one token a row in memory that stays.
    fn steady_step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        (scores, attended): (Vec<String>, Option<String>),
    ) -> ort::Result<Returned> {
        let size = vocab_size(session);
        let (Some(pool), Some(steady)) = (&self.plan.steady, &mut self.steady) else {
            return Err(ort::Error::new("a step in memory that there is none of"));
        };
        let wanted: Vec<String> = scores.iter().chain(&attended).cloned().collect();
        let cached = (&self.sources[..], &mut self.targets[..]);
        let given = (tokens, self.length);
        let mut returned = steady.step(pool, (session, self.plan.device), cached, given, &wanted)?;
        let attended = match attended {
            Some(_) => returned.pop().map(|attended| cut(attended, self.source)).transpose()?,
            None => None,
        };
        self.length += 1;
        Ok(Returned { logits: whole(returned, size)?, attended })
    }

    /// Takes the keys and values out of memory that stays, before they change.
    fn unsettle(&mut self) -> ort::Result<()> {
        self.is_settled = false;
        if self.steady.is_some() {
            let rows: Vec<usize> = (0..self.rows).collect();
            let places = |values: &[DynValue]| (0..values.first().map_or(0, |value| value.shape()[2])).collect();
            let targets = self.taken(&self.targets, &rows, places(&self.targets))?;
            let sources = self.taken(&self.sources, &rows, places(&self.sources))?;
            self.bound = None;
            self.give_back(sources, targets);
        }
        Ok(())
    }

    /// Gives memory that stays to whoever wants it next, and keeps these keys and values instead.
    fn give_back(&mut self, sources: Vec<DynValue>, targets: Vec<DynValue>) {
        if let (Some(pool), Some(mut steady)) = (&self.plan.steady, self.steady.take()) {
            self.bound = None;
            steady.sources = std::mem::replace(&mut self.sources, sources);
            steady.targets = std::mem::replace(&mut self.targets, targets);
            pool.put(steady);
        }
    }

    /// All that stays from step to step: in place that is everything but the tokens.
    fn bind(&mut self, session: &Session) -> ort::Result<IoBinding> {
        let mut binding = session.create_binding()?;
        let positions = usize::from(self.plan.layout != CacheLayout::Growing);
        binding.bind_input(session.inputs()[0].name(), &self.mask)?;
        let cached = self.targets.chunks_exact(2).zip(self.sources.chunks_exact(2));
        let cached = cached.flat_map(|(targets, sources)| targets.iter().chain(sources));
        for (port, value) in session.inputs()[2 + positions..].iter().zip(cached) {
            binding.bind_input(port.name(), value)?;
        }
        if self.plan.layout == CacheLayout::InPlace {
            for (port, target) in session.outputs()[1..].iter().zip(&mut self.targets) {
                binding.bind_output(port.name(), target)?;
            }
        }
        Ok(binding)
    }

    /// Makes room for `count` more tokens.
    fn reserve(&mut self, count: usize) -> ort::Result<()> {
        let (needed, capacity) = (self.length + count, self.capacity());
        match self.plan.layout {
            CacheLayout::Growing => Ok(()),
            CacheLayout::InPlace if needed > capacity => {
                let rows: Vec<usize> = (0..self.rows).collect();
                self.replace(&rows, self.plan.room(needed))
            }
            CacheLayout::Static(_) if needed > capacity => {
                Err(ort::Error::new(format!("{needed} target tokens for a cache of {capacity}")))
            }
            CacheLayout::InPlace | CacheLayout::Static(_) => Ok(()),
        }
    }

    fn capacity(&self) -> usize {
        self.targets.first().map_or(usize::MAX, |target| target.shape()[2] as usize)
    }

    /// Makes the targets' cache that of the given rows, with `room` tokens each.
    fn replace(&mut self, rows: &[usize], room: usize) -> ort::Result<()> {
        self.unsettle()?;
        self.bound = None;
        let last = self.length.min(self.capacity()).saturating_sub(1);
        // What is in the room behind the tokens is never seen, but must be numbers: the last token's are.
        let places: Vec<i64> = (0..room).map(|place| place.min(last) as i64).collect();
        self.targets = self.taken(&self.targets, rows, places)?;
        self.rows = rows.len();
        Ok(())
    }

    /// The given rows and places of keys and values, by the graph for it.
    fn taken(&self, values: &[DynValue], rows: &[usize], places: Vec<i64>) -> ort::Result<Vec<DynValue>> {
        let memory = self.plan.device.memory()?;
        let outputs = |binding: &mut IoBinding, name: &str, _: usize| binding.bind_output_to_device(name, &memory);
        self.reorder(values, (rows, places), outputs)
    }

    /// The same, put where there are some already.
    fn take_into(
        &self,
        values: &[DynValue],
        (rows, places): (&[usize], Vec<i64>),
        into: &mut [DynValue],
    ) -> ort::Result<()> {
        let outputs = |binding: &mut IoBinding, name: &str, at: usize| match into.get_mut(at) {
            Some(value) => binding.bind_output(name, value),
            None => Err(ort::Error::new(format!("no room for {name}"))),
        };
        self.reorder(values, (rows, places), outputs).map(drop)
    }

    /// Runs the graph that changes rows, with its outputs bound by a function of binding, name and place.
    fn reorder(
        &self,
        values: &[DynValue],
        (rows, places): (&[usize], Vec<i64>),
        mut bind: impl FnMut(&mut IoBinding, &str, usize) -> ort::Result<()>,
    ) -> ort::Result<Vec<DynValue>> {
        let mut session = self.plan.reorder.lock(LogitsRequest::All);
        let mut binding = session.create_binding()?;
        let parents = Tensor::from_array(([rows.len()], rows.iter().map(|&row| row as i64).collect::<Vec<_>>()))?;
        let places = Tensor::from_array(([places.len()], places))?;
        let (parents, places) = (parents.into_dyn(), places.into_dyn());
        let inputs: Vec<&DynValue> = [&parents, &places].into_iter().chain(values).collect();
        bind_inputs(&mut binding, &session, &inputs)?;
        let names: Vec<String> = session.outputs().iter().map(|port| port.name().to_string()).collect();
        names.iter().enumerate().try_for_each(|(at, name)| bind(&mut binding, name, at))?;
        let mut outputs = session.run_binding(&binding)?;
        let mut take = |name: &String| outputs.remove(name).ok_or_else(|| ort::Error::new(format!("no {name}")));
        names.iter().map(&mut take).collect()
    }

    pub(super) fn truncate(&mut self, length: usize) -> ort::Result<()> {
        if length >= self.length {
            return Ok(());
        }
        self.length = length;
        if self.plan.layout == CacheLayout::Growing {
            let rows: Vec<usize> = (0..self.rows).collect();
            return self.replace(&rows, length);
        }
        Ok(())
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
        if !items.iter().copied().eq(0..items_before) {
            self.unsettle()?;
            self.bound = None;
            keep_rows(&mut self.mask, items, items_before)?;
            let length = self.sources.first().map_or(0, |source| source.shape()[2]);
            self.sources = self.taken(&self.sources, items, (0..length).collect())?;
        }
        match parents.iter().copied().eq(0..rows_before) {
            true => Ok(()),
            false => self.replace(parents, self.capacity()),
        }
    }
}

fn bind_inputs(binding: &mut IoBinding, session: &Session, values: &[&DynValue]) -> ort::Result<()> {
    session.inputs().iter().zip(values).try_for_each(|(port, value)| binding.bind_input(port.name(), value))
}

fn zeros(dtype: DType, shape: [usize; 4]) -> ort::Result<DynValue> {
    let count = shape.iter().product();
    Ok(match dtype {
        DType::Float16 => Tensor::from_array((shape, vec![f16::ZERO; count]))?.into_dyn(),
        DType::BFloat16 => Tensor::from_array((shape, vec![bf16::ZERO; count]))?.into_dyn(),
        _ => Tensor::from_array((shape, vec![0.0_f32; count]))?.into_dyn(),
    })
}
