//! A cache that stays in the memory of the device that computes: what a run returns is bound to the next run where it lies,
//! and a change of rows is a graph of its own (`reorder_model.onnx`). Only token ids, positions and logits come and go, or of
//! the logits the greatest, where no more is wanted.
//!
//! # Design
//! The device is one value, [`Device`]: with the CPU for a device the same code runs on a machine without a GPU, and that is
//! how it is tested.

use std::sync::Arc;

use half::{bf16, f16};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor};
use t5gemma_graphs::interface::{CacheLayout, DType, LOG_SUM_EXP, TOP_IDS, TOP_SCORES};

use super::candidates::spread;
use super::{Returned, attended_port, keep_rows};
use crate::model::Graph;
use crate::scores::Wanted;

/// Room for this many target tokens to begin with, where it can be extended.
const FIRST_CAPACITY: usize = 64;

/// Where a session keeps what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The process's own memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(i32),
}

impl Device {
    fn memory(self) -> ort::Result<MemoryInfo<'static>> {
        let (device, id) = match self {
            Device::Cpu => (AllocationDevice::CPU, 0),
            Device::Cuda(id) => (AllocationDevice::CUDA, id),
        };
        MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
    }
}

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
    /// The graph that changes rows.
    pub reorder: Arc<Graph>,
    /// How many of the greatest logits the graphs return beside all of them.
    pub candidates: Option<usize>,
}

impl Plan {
    /// The outputs that hold what is wanted of the logits. What is not bound is not copied from the device.
    fn scores(&self, logits: String, wanted: Wanted) -> Vec<String> {
        match (wanted, self.candidates) {
            (Wanted::Best { count, .. }, Some(most)) if count <= most => {
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
}

impl Resident {
    /// Runs the first decoder graph, and returns what it says where it is a step: with a cache of fixed capacity the first
    /// tokens are for [`Resident::step`] as all others.
    pub(super) fn start(
        plan: &Plan,
        session: &mut Session,
        mask: DynValue,
        (ids, hidden): (&DynValue, &DynValue),
        wanted: Wanted,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<(Resident, Option<Returned>)> {
        let (items, prompt) = (mask.shape()[0] as usize, ids.shape()[1] as usize);
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
        let mut resident = Resident { plan, mask, sources, targets, rows: items, length, bound: None };
        if resident.plan.layout == CacheLayout::InPlace {
            let rows: Vec<usize> = (0..items).collect();
            resident.replace(&rows, FIRST_CAPACITY.max((length + 1).next_power_of_two()))?;
        }
        Ok((resident, returned))
    }

    /// Runs the cached step for `tokens`, as many for each row, and returns what it says.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        wanted: Wanted,
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
        let attended = attended_port(session);
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
        let attended = attended.map(|name| take(&name)).transpose()?;
        if !in_place {
            self.targets = presents.iter().map(|name| take(name)).collect::<ort::Result<_>>()?;
        }
        drop(outputs);
        self.bound = in_place.then_some((scores, binding));
        self.length += count;
        Ok(Returned { logits, attended })
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
                self.replace(&rows, needed.next_power_of_two())
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
        let mut session = self.plan.reorder.lock(Wanted::All);
        let mut binding = session.create_binding()?;
        let parents = Tensor::from_array(([rows.len()], rows.iter().map(|&row| row as i64).collect::<Vec<_>>()))?;
        let places = Tensor::from_array(([places.len()], places))?;
        let (parents, places) = (parents.into_dyn(), places.into_dyn());
        let inputs: Vec<&DynValue> = [&parents, &places].into_iter().chain(values).collect();
        bind_inputs(&mut binding, &session, &inputs)?;
        let memory = self.plan.device.memory()?;
        let names: Vec<String> = session.outputs().iter().map(|port| port.name().to_string()).collect();
        names.iter().try_for_each(|name| binding.bind_output_to_device(name, &memory))?;
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
