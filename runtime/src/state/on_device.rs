//! `DeviceCache`: a cache that stays in the memory of the device that computes. What a run returns is bound to the next
//! run where it is, and a change of rows is a graph of its own (`reorder_model.onnx`). Only token ids, positions and
//! logits cross the bus, and of the logits only the greatest if no more is needed.
//!
//! # Design
//! The device is one value, [`Device`]: with the CPU as the device the same code runs, and is tested, on a machine
//! without a GPU.

mod config;

use half::{bf16, f16};
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, Tensor};
use t5gemma_graphs::interface::{CacheLayout, DECODER_POSITION_IDS, DType};
use t5gemma_kernels::LogitsRequest;

use super::fixed_buffers::{BufferSize, FixedBuffers, FixedStep, SOURCE_MULTIPLE, cut_source, pad_mask};
use super::{DecoderOutputs, Selection, cross_attentions_output, keep_rows, one_token_at_a_time};
use crate::adapter::RowAdapters;
use crate::device::Device;
pub(crate) use config::DeviceCacheConfig;
use config::{full_rows, vocab_size};

/// The inputs of the first decoder graph.
pub(crate) struct PrefillInputs<'a> {
    /// `[items, source]`.
    pub mask: DynValue,
    /// `[items, prompt]`.
    pub ids: &'a DynValue,
    /// `[items, source, hidden_size]`.
    pub hidden: &'a DynValue,
    /// Float positions of targets and sources, for models that take them.
    pub positions: &'a [DynValue],
    /// The adapters of the rows, for a graph that takes adapters.
    pub others: Vec<&'a DynValue>,
}

/// The memory of the cached decoder step.
pub(crate) struct DeviceCache {
    config: DeviceCacheConfig,
    /// `[items, source]`.
    mask: DynValue,
    /// Cross-attention keys and values, layer by layer: `[items, kv_heads, source, head_dim]`.
    sources: Vec<DynValue>,
    /// Self-attention keys and values, layer by layer: `[rows, kv_heads, length or capacity, head_dim]`.
    targets: Vec<DynValue>,
    rows: usize,
    /// Target tokens in the cache.
    length: usize,
    /// The bound step, where the binding survives a step; `None` after a change.
    bound: Option<BoundOutputs>,
    /// Source tokens, without the padding of fixed buffers.
    source: usize,
    /// Whether a step has run since the rows changed last.
    is_settled: bool,
    /// The fixed buffers that the keys and values are in, if they are.
    buffers: Option<FixedBuffers>,
}

/// A binding and the outputs that hold its logits.
struct BoundOutputs {
    logits: Vec<String>,
    binding: IoBinding,
}

impl Drop for DeviceCache {
    fn drop(&mut self) {
        self.return_buffers(Vec::new(), Vec::new());
    }
}

impl DeviceCache {
    /// Runs the first decoder graph. Its outputs are returned if it is a step; with a cache of fixed capacity the first
    /// tokens are for [`DeviceCache::step`] like all others.
    pub(super) fn prefill(
        config: &DeviceCacheConfig,
        session: &mut Session,
        PrefillInputs { mask, ids, hidden, positions, others }: PrefillInputs,
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<(DeviceCache, Option<DecoderOutputs>)> {
        let (items, prompt) = (mask.shape()[0] as usize, ids.shape()[1] as usize);
        let source = mask.shape()[1] as usize;
        let mut binding = session.create_binding()?;
        let is_static = matches!(config.layout, CacheLayout::Static(_));
        let mut inputs: Vec<&DynValue> = if is_static { vec![hidden] } else { vec![&mask, ids, hidden] };
        inputs.extend(positions);
        inputs.extend(others);
        bind_inputs(&mut binding, session, &inputs)?;
        let mut names = session.outputs().iter().map(|port| port.name().to_string()).collect::<Vec<_>>();
        let logits = (!is_static).then(|| config.logits_outputs(names.remove(0), request));
        let host = Device::Cpu.memory()?;
        logits.iter().flatten().try_for_each(|name| binding.bind_output_to_device(name, &host))?;
        let vocab_size = vocab_size(session);
        let cross_attentions = cross_attentions_output(session);
        if let Some(name) = &cross_attentions {
            binding.bind_output_to_device(name, &host)?;
        }
        let cached = config.is_cross.iter().filter(|&&is_cross| is_cross || !is_static).count();
        names.truncate(cached);
        let memory = config.device.memory()?;
        names.iter().try_for_each(|name| binding.bind_output_to_device(name, &memory))?;
        let mut outputs = session.run_binding_with_options(&binding, options)?;
        let mut take = |name: &str| outputs.remove(name).ok_or_else(|| ort::Error::new(format!("no {name}")));
        let cross_attentions = cross_attentions.map(|name| take(&name)).transpose()?;
        let logits = logits.map(|names| names.iter().map(|name| take(name)).collect::<ort::Result<Vec<_>>>());
        let logits = logits.transpose()?.map(|outputs| full_rows(outputs, vocab_size)).transpose()?;
        let outputs_of_step = logits.map(|logits| DecoderOutputs { logits, cross_attentions });
        let values = names.iter().map(|name| take(name)).collect::<ort::Result<Vec<_>>>()?;
        let (mut sources, mut targets) = (Vec::new(), Vec::new());
        match config.layout {
            CacheLayout::Static(capacity) => {
                sources = values;
                let shape = [items, config.kv_heads, capacity, config.head_dim];
                let count = config.is_cross.iter().filter(|&&is_cross| !is_cross).count();
                targets = (0..count).map(|_| zeros(config.dtype, shape)).collect::<ort::Result<_>>()?;
            }
            _ => {
                for (value, &is_cross) in values.into_iter().zip(&config.is_cross) {
                    if is_cross { sources.push(value) } else { targets.push(value) }
                }
            }
        }
        let mut cache = DeviceCache {
            config: config.clone(),
            mask,
            sources,
            targets,
            rows: items,
            length: if is_static { 0 } else { prompt },
            bound: None,
            source,
            is_settled: false,
            buffers: None,
        };
        if config.layout == CacheLayout::InPlace {
            let rows: Vec<usize> = (0..items).collect();
            cache.move_rows(&rows, config.capacity(cache.length + 1))?;
        }
        Ok((cache, outputs_of_step))
    }

    /// Runs the cached step for `tokens`, the same number for each row, and returns its outputs. `floats` are their float
    /// positions, for models that take them.
    pub fn step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        floats: Option<&DynValue>,
        adapters: Option<&RowAdapters>,
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<DecoderOutputs> {
        let count = tokens.len() / self.rows;
        let in_place = self.config.layout == CacheLayout::InPlace;
        if in_place && count > 1 && self.rows > 1 {
            return one_token_at_a_time(tokens, count, |tokens| {
                self.step(session, tokens, None, adapters, request, options)
            });
        }
        self.reserve(count)?;
        let vocab_size = vocab_size(session);
        let outputs = session.outputs().iter().map(|port| port.name().to_string());
        let mut names = outputs.collect::<Vec<_>>().into_iter();
        let mut name = || names.next().ok_or_else(|| ort::Error::new("too few outputs"));
        let logits = self.config.logits_outputs(name()?, request);
        let cross_attentions = cross_attentions_output(session);
        if count == 1 && self.settle(session)? {
            return self.fixed_step(session, tokens, logits, cross_attentions);
        }
        let uncaptured = self.config.buffers.as_ref().map(|pool| pool.uncaptured()).transpose()?.flatten();
        let options = uncaptured.as_ref().unwrap_or(options);
        let mut binding = match self.bound.take() {
            Some(bound) if bound.logits == logits => bound.binding,
            _ => self.bind(session, adapters)?,
        };
        // Bound anew for each run: inputs are copied to the device when they are bound, and the outputs now belong to
        // the caller.
        let ids = Tensor::from_array(([self.rows, count], tokens.to_vec()))?;
        binding.bind_input(session.inputs()[1].name(), &ids)?;
        if let Some(floats) = floats {
            binding.bind_input(DECODER_POSITION_IDS, floats)?;
        }
        if self.config.layout != CacheLayout::Growing {
            // In place, each row has positions of its own; with a static cache all rows share them.
            let shape = if in_place { vec![self.rows, count] } else { vec![count] };
            let positions = (0..shape.iter().product()).map(|at: usize| (self.length + at % count) as i64);
            let positions = positions.collect::<Vec<_>>();
            binding.bind_input(session.inputs()[2].name(), &Tensor::from_array((shape, positions))?)?;
        }
        let host = Device::Cpu.memory()?;
        logits.iter().try_for_each(|name| binding.bind_output_to_device(name, &host))?;
        if let Some(name) = &cross_attentions {
            binding.bind_output_to_device(name, &host)?;
        }
        let presents = self.targets.iter().map(|_| name()).collect::<ort::Result<Vec<_>>>()?;
        if !in_place {
            let memory = self.config.device.memory()?;
            presents.iter().try_for_each(|name| binding.bind_output_to_device(name, &memory))?;
        }
        let mut outputs = session.run_binding_with_options(&binding, options)?;
        let mut take = |name: &str| outputs.remove(name).ok_or_else(|| ort::Error::new(format!("no {name}")));
        let rows = logits.iter().map(|name| take(name)).collect::<ort::Result<Vec<_>>>()?;
        let rows = full_rows(rows, vocab_size)?;
        let cross_attentions = cross_attentions.map(|name| cut_source(take(&name)?, self.source)).transpose()?;
        if !in_place {
            self.targets = presents.iter().map(|name| take(name)).collect::<ort::Result<_>>()?;
        }
        drop(outputs);
        // In float32 a GPU leaves self-attention to the CPU, whose inputs are copied when they are bound.
        let stays = in_place && (self.config.dtype != DType::Float32 || self.config.device == Device::Cpu);
        self.bound = stays.then_some(BoundOutputs { logits, binding });
        self.length += count;
        self.is_settled = true;
        Ok(DecoderOutputs { logits: rows, cross_attentions })
    }

    /// Moves the keys and values into fixed buffers, and returns whether they are there. They are moved only if a step
    /// has run since the rows changed: those of beams may change in every step.
    fn settle(&mut self, session: &Session) -> ort::Result<bool> {
        let Some(pool) = self.config.buffers.clone() else { return Ok(false) };
        let items = self.mask.shape()[0] as usize;
        if self.buffers.is_some() || !self.is_settled || items != self.rows {
            return Ok(self.buffers.is_some());
        }
        let source = self.source.next_multiple_of(SOURCE_MULTIPLE);
        let size = BufferSize { rows: self.rows, capacity: self.capacity(), source };
        let rows: Vec<usize> = (0..self.rows).collect();
        let target_positions = (0..size.capacity as i64).collect();
        let last = self.sources.first().map_or(0, |source| source.shape()[2] - 1);
        // Positions after a source are masked out, but must hold finite numbers.
        let source_positions = (0..size.source as i64).map(|position| position.min(last)).collect();
        let (targets, sources) =
            (Gather { rows: &rows, positions: target_positions }, Gather { rows: &rows, positions: source_positions });
        let mut buffers = match pool.take(size) {
            Some(mut buffers) => {
                self.gather_into(&self.targets, targets, &mut buffers.targets)?;
                self.gather_into(&self.sources, sources, &mut buffers.sources)?;
                buffers
            }
            None => {
                let mut buffers = FixedBuffers::new(session, self.config.device, size)?;
                buffers.targets = self.gather(&self.targets, targets)?;
                buffers.sources = self.gather(&self.sources, sources)?;
                buffers
            }
        };
        let mask = pad_mask(&self.mask, size.source)?;
        buffers.set_mask(&mask)?;
        self.bound = None;
        self.mask = mask.into_dyn();
        self.targets = std::mem::take(&mut buffers.targets);
        self.sources = std::mem::take(&mut buffers.sources);
        self.buffers = Some(buffers);
        Ok(true)
    }

    /// [`DeviceCache::step`] of one token a row in fixed buffers.
    fn fixed_step(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        logits: Vec<String>,
        cross_attentions: Option<String>,
    ) -> ort::Result<DecoderOutputs> {
        let vocab_size = vocab_size(session);
        let (Some(pool), Some(buffers)) = (&self.config.buffers, &mut self.buffers) else {
            return Err(ort::Error::new("a step without its fixed buffers"));
        };
        let names: Vec<String> = logits.iter().chain(&cross_attentions).cloned().collect();
        let step = FixedStep {
            session,
            device: self.config.device,
            sources: &self.sources,
            targets: &mut self.targets,
            tokens,
            position: self.length,
            names: &names,
        };
        let mut outputs = buffers.step(pool, step)?;
        let cross_attentions = match cross_attentions {
            Some(_) => outputs.pop().map(|value| cut_source(value, self.source)).transpose()?,
            None => None,
        };
        self.length += 1;
        Ok(DecoderOutputs { logits: full_rows(outputs, vocab_size)?, cross_attentions })
    }

    /// Copies the keys and values out of fixed buffers, before they change.
    fn unsettle(&mut self) -> ort::Result<()> {
        self.is_settled = false;
        if self.buffers.is_some() {
            let rows: Vec<usize> = (0..self.rows).collect();
            let all = |values: &[DynValue]| {
                let positions = (0..values.first().map_or(0, |value| value.shape()[2])).collect();
                Gather { rows: &rows, positions }
            };
            let targets = self.gather(&self.targets, all(&self.targets))?;
            let sources = self.gather(&self.sources, all(&self.sources))?;
            self.bound = None;
            self.return_buffers(sources, targets);
        }
        Ok(())
    }

    /// Returns the fixed buffers to the pool, if the cache is in some, and keeps these keys and values instead.
    fn return_buffers(&mut self, sources: Vec<DynValue>, targets: Vec<DynValue>) {
        if let (Some(pool), Some(mut buffers)) = (&self.config.buffers, self.buffers.take()) {
            self.bound = None;
            buffers.sources = std::mem::replace(&mut self.sources, sources);
            buffers.targets = std::mem::replace(&mut self.targets, targets);
            pool.put(buffers);
        }
    }

    /// Binds what stays the same from step to step: in place, everything but the tokens.
    fn bind(&mut self, session: &Session, adapters: Option<&RowAdapters>) -> ort::Result<IoBinding> {
        let mut binding = session.create_binding()?;
        let has_four_axes =
            |port: &ort::value::Outlet| port.dtype().tensor_shape().is_some_and(|shape| shape.len() == 4);
        binding.bind_input(session.inputs()[0].name(), &self.mask)?;
        let cached = self.targets.chunks_exact(2).zip(self.sources.chunks_exact(2));
        let cached = cached.flat_map(|(targets, sources)| targets.iter().chain(sources));
        // Only keys and values have four axes.
        for (port, value) in session.inputs().iter().filter(|port| has_four_axes(port)).zip(cached) {
            binding.bind_input(port.name(), value)?;
        }
        let others: Vec<&DynValue> = adapters.into_iter().flat_map(RowAdapters::of_step).collect();
        let first = session.inputs().len().saturating_sub(others.len());
        for (port, value) in session.inputs()[first..].iter().zip(others) {
            binding.bind_input(port.name(), value)?;
        }
        if self.config.layout == CacheLayout::InPlace {
            for (port, target) in session.outputs()[1..].iter().zip(&mut self.targets) {
                binding.bind_output(port.name(), target)?;
            }
        }
        Ok(binding)
    }

    /// Makes room for `count` more tokens.
    fn reserve(&mut self, count: usize) -> ort::Result<()> {
        let (needed, capacity) = (self.length + count, self.capacity());
        match self.config.layout {
            CacheLayout::Growing => Ok(()),
            CacheLayout::InPlace if needed > capacity => {
                let rows: Vec<usize> = (0..self.rows).collect();
                self.move_rows(&rows, self.config.capacity(needed))
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

    /// Makes the targets' cache that of the given rows, with room for `capacity` tokens each.
    fn move_rows(&mut self, rows: &[usize], capacity: usize) -> ort::Result<()> {
        self.unsettle()?;
        self.bound = None;
        let last = self.length.min(self.capacity()).saturating_sub(1);
        // Positions after the tokens are masked out, but must hold finite numbers: those of the last token.
        let positions: Vec<i64> = (0..capacity).map(|position| position.min(last) as i64).collect();
        self.targets = self.gather(&self.targets, Gather { rows, positions })?;
        self.rows = rows.len();
        Ok(())
    }

    /// Gathers keys and values into new memory.
    fn gather(&self, values: &[DynValue], gather: Gather) -> ort::Result<Vec<DynValue>> {
        let memory = self.config.device.memory()?;
        let outputs = |binding: &mut IoBinding, name: &str, _: usize| binding.bind_output_to_device(name, &memory);
        self.reorder(values, gather, outputs)
    }

    /// Gathers keys and values into existing memory.
    fn gather_into(&self, values: &[DynValue], gather: Gather, into: &mut [DynValue]) -> ort::Result<()> {
        let outputs = |binding: &mut IoBinding, name: &str, at: usize| match into.get_mut(at) {
            Some(value) => binding.bind_output(name, value),
            None => Err(ort::Error::new(format!("no room for {name}"))),
        };
        self.reorder(values, gather, outputs).map(drop)
    }

    /// Runs the graph that changes rows; `bind` binds the output of a name and an index.
    fn reorder(
        &self,
        values: &[DynValue],
        Gather { rows, positions }: Gather,
        mut bind: impl FnMut(&mut IoBinding, &str, usize) -> ort::Result<()>,
    ) -> ort::Result<Vec<DynValue>> {
        let mut session = self.config.reorder.lock(LogitsRequest::All).map_err(ort::Error::wrap)?;
        let mut binding = session.create_binding()?;
        let parents = Tensor::from_array(([rows.len()], rows.iter().map(|&row| row as i64).collect::<Vec<_>>()))?;
        let positions = Tensor::from_array(([positions.len()], positions))?;
        let (parents, positions) = (parents.into_dyn(), positions.into_dyn());
        let inputs: Vec<&DynValue> = [&parents, &positions].into_iter().chain(values).collect();
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
        if self.config.layout == CacheLayout::Growing {
            let rows: Vec<usize> = (0..self.rows).collect();
            return self.move_rows(&rows, length);
        }
        Ok(())
    }

    pub(super) fn select(&mut self, selection: &Selection) -> ort::Result<()> {
        selection.check()?;
        let &Selection { items, parents, items_before, rows_before } = selection;
        if !items.iter().copied().eq(0..items_before) {
            self.unsettle()?;
            self.bound = None;
            keep_rows(&mut self.mask, items, items_before)?;
            let length = self.sources.first().map_or(0, |source| source.shape()[2]);
            self.sources = self.gather(&self.sources, Gather { rows: items, positions: (0..length).collect() })?;
        }
        if parents.iter().copied().eq(0..rows_before) { Ok(()) } else { self.move_rows(parents, self.capacity()) }
    }
}

/// The rows and positions that the graph for changes of rows takes from keys and values.
struct Gather<'a> {
    rows: &'a [usize],
    positions: Vec<i64>,
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
