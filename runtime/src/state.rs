//! `State`: the KV cache of the rows in flight, and how it follows a change of rows (beams that continue another beam,
//! items that have finished). Which row continues which is decided elsewhere. Two of the caches are in host memory, the
//! third is in device memory.

mod fixed_buffers;
mod growing;
mod in_place;
mod logits_output;
mod on_device;
mod ragged;
mod step_binding;
mod top_logits;

use half::{bf16, f16};
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor, TensorElementType};
use t5gemma_graphs::interface::CROSS_ATTENTIONS;
use t5gemma_kernels::LogitsRequest;

use crate::adapter::RowAdapters;
use crate::error::Error;
use crate::positions::TargetPositions;
pub(crate) use fixed_buffers::BufferPool;
use growing::GrowingCache;
use in_place::InPlaceCache;
use on_device::DeviceCache;
pub(crate) use on_device::{DeviceCacheConfig, PrefillInputs};
pub(crate) use ragged::{Continued, Joining, Prefilled, RaggedCache, capacity};

/// The keys and values of the rows in flight, with the mask of their sources.
///
/// Target rows are ordered by source item: the beams of one item are adjacent, and every item has the same number of
/// rows.
pub(crate) struct State {
    cache: Cache,
    items: usize,
    rows: usize,
    /// The float positions of models that take them.
    positions: Option<TargetPositions>,
    /// The LoRA adapters of the target rows, if any has one.
    adapters: Option<RowAdapters>,
}

/// The keys and values.
pub(crate) enum Cache {
    /// Every step returns new ones.
    Growing(GrowingCache),
    /// Every step writes into the existing ones.
    InPlace(Box<InPlaceCache>),
    /// They stay on the device that computes.
    Device(Box<DeviceCache>),
}

/// The outputs of a decoder run apart from the keys and values.
pub(crate) struct DecoderOutputs {
    /// `[rows, positions, vocab_size]`.
    pub logits: DynValue,
    /// `[rows, tokens, source]`, of models that were exported with them.
    pub cross_attentions: Option<DynValue>,
}

/// The name of the output with cross-attention probabilities, if a graph has it: it is the last.
fn cross_attentions_output(session: &Session) -> Option<String> {
    session.outputs().last().filter(|port| port.name() == CROSS_ATTENTIONS).map(|port| port.name().to_string())
}

/// A change of rows: keeps the source items `items`, and makes each target row `r` the continuation of row
/// `parents[r]`. Both are indices before the change; `parents` has the same number of rows for each kept item.
pub(crate) struct Selection<'a> {
    pub items: &'a [usize],
    pub parents: &'a [usize],
    pub items_before: usize,
    pub rows_before: usize,
}

impl Selection<'_> {
    /// Whether all indices are of existing items and rows.
    fn check(&self) -> ort::Result<()> {
        let Selection { items, parents, items_before, rows_before } = self;
        if items.iter().any(|item| item >= items_before) || parents.iter().any(|row| row >= rows_before) {
            return Err(ort::Error::new(format!("items {items:?} and rows {parents:?} of a cache")));
        }
        Ok(())
    }
}

/// Runs a step of `count` tokens a row as steps of one token, because the attention over a cache of fixed capacity
/// takes several tokens of a single row only. Returns the outputs of the last.
fn one_token_at_a_time(
    tokens: &[i64],
    count: usize,
    mut step: impl FnMut(&[i64]) -> ort::Result<DecoderOutputs>,
) -> ort::Result<DecoderOutputs> {
    let mut last = None;
    for at in 0..count {
        let one_each: Vec<i64> = tokens.iter().skip(at).step_by(count).copied().collect();
        last = Some(step(&one_each)?);
    }
    last.ok_or_else(|| ort::Error::new("a step without tokens"))
}

impl State {
    /// The state after the first decoder step, which runs one target row for each source item. `mask` has the shape
    /// `[items, source]`, and `cached` are the step's outputs after the logits. `is_cross` says of each whether it is
    /// of cross-attention, with source items on its first axis, or of self-attention, with target rows.
    pub fn growing(mask: DynValue, cached: Vec<DynValue>, is_cross: Vec<bool>) -> State {
        let items = mask.shape()[0] as usize;
        State {
            cache: Cache::Growing(GrowingCache::new(mask, cached, is_cross)),
            items,
            rows: items,
            positions: None,
            adapters: None,
        }
    }

    /// [`State::growing`] for a model whose steps write into the cache.
    pub fn in_place(mask: DynValue, cached: Vec<DynValue>, is_cross: &[bool]) -> ort::Result<State> {
        let items = mask.shape()[0] as usize;
        let cache = Cache::InPlace(Box::new(InPlaceCache::new(mask, cached, is_cross)?));
        Ok(State { cache, items, rows: items, positions: None, adapters: None })
    }

    /// Runs the first decoder graph and keeps its keys and values on the device. If that graph is a step, its outputs
    /// are returned too.
    pub fn on_device(
        config: &DeviceCacheConfig,
        session: &mut Session,
        inputs: PrefillInputs,
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<(State, Option<DecoderOutputs>)> {
        let items = inputs.mask.shape()[0] as usize;
        let (cache, outputs) = DeviceCache::prefill(config, session, inputs, request, options)?;
        Ok((
            State { cache: Cache::Device(Box::new(cache)), items, rows: items, positions: None, adapters: None },
            outputs,
        ))
    }

    /// The same state, whose rows use these adapters.
    pub fn with_adapters(self, adapters: Option<RowAdapters>) -> State {
        State { adapters, ..self }
    }

    /// The number of source items in flight.
    pub fn items(&self) -> usize {
        self.items
    }

    /// The number of target rows in flight.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The same rows with float positions; the first step has been counted.
    pub fn with_positions(self, positions: Option<TargetPositions>) -> State {
        State { positions, ..self }
    }

    /// The float positions of the next `count` tokens of each row, `[rows, count]`, and counts them; `None` for a model
    /// that takes none.
    pub fn next_positions(&mut self, count: usize) -> Option<Vec<f32>> {
        let positions = self.positions.as_mut()?;
        let next = positions.next(self.rows, count);
        positions.advance(count);
        Some(next)
    }

    /// The keys and values for a step, and the adapters of its rows.
    pub fn parts_mut(&mut self) -> (&mut Cache, Option<&RowAdapters>) {
        (&mut self.cache, self.adapters.as_ref())
    }

    /// Changes the rows: see [`Selection`].
    pub fn select(&mut self, items: &[usize], parents: &[usize]) -> Result<(), Error> {
        let selection = Selection { items, parents, items_before: self.items, rows_before: self.rows };
        match &mut self.cache {
            Cache::Growing(cache) => cache.select(&selection),
            Cache::InPlace(cache) => cache.select(&selection),
            Cache::Device(cache) => cache.select(&selection),
        }
        .and_then(|()| self.adapters.as_mut().map_or(Ok(()), |adapters| adapters.select(parents)))
        .map_err(Error::onnxruntime("reordering the cache"))?;
        self.positions.iter_mut().for_each(|positions| positions.select(items));
        (self.items, self.rows) = (items.len(), parents.len());
        Ok(())
    }

    /// Drops the target tokens after the first `length`. Only with one row.
    pub fn truncate(&mut self, length: usize) -> Result<(), Error> {
        self.positions.iter_mut().for_each(|positions| positions.truncate(length));
        match &mut self.cache {
            Cache::Growing(cache) => cache.truncate(length),
            Cache::InPlace(cache) => {
                cache.truncate(length);
                Ok(())
            }
            Cache::Device(cache) => cache.truncate(length),
        }
        .map_err(Error::onnxruntime("truncating the cache"))
    }
}

/// Cuts `value`, `[1, heads, tokens, size]`, to its first `length` tokens.
fn keep_tokens(value: &mut DynValue, length: usize) -> ort::Result<()> {
    if value.shape()[2] > length as i64 {
        *value = match value.data_type() {
            TensorElementType::Float32 => first_tokens::<f32>(value, length),
            TensorElementType::Float16 => first_tokens::<f16>(value, length),
            TensorElementType::Bfloat16 => first_tokens::<bf16>(value, length),
            other => Err(ort::Error::new(format!("a cache of {other}"))),
        }?;
    }
    Ok(())
}

fn first_tokens<T>(value: &DynValue, length: usize) -> ort::Result<DynValue>
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Copy + 'static,
{
    let (shape, data) = value.try_extract_tensor::<T>()?;
    let (tokens, size) = (shape[2] as usize, shape[3] as usize);
    let kept: Vec<T> = data.chunks_exact(tokens * size).flat_map(|head| &head[..length * size]).copied().collect();
    Ok(Tensor::from_array(([shape[0] as usize, shape[1] as usize, length, size], kept))?.into_dyn())
}

/// Gathers `rows` of the first axis of `value`, which has `before` rows.
fn keep_rows(value: &mut DynValue, rows: &[usize], before: usize) -> ort::Result<()> {
    if !rows.iter().copied().eq(0..before) {
        *value = match value.data_type() {
            TensorElementType::Float32 => gather_rows::<f32>(value, rows),
            TensorElementType::Float16 => gather_rows::<f16>(value, rows),
            TensorElementType::Bfloat16 => gather_rows::<bf16>(value, rows),
            TensorElementType::Int64 => gather_rows::<i64>(value, rows),
            other => Err(ort::Error::new(format!("a cache of {other}"))),
        }?;
    }
    Ok(())
}

fn gather_rows<T>(value: &DynValue, rows: &[usize]) -> ort::Result<DynValue>
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Copy + 'static,
{
    let (shape, data) = value.try_extract_tensor::<T>()?;
    if rows.iter().any(|&row| row as i64 >= shape[0]) {
        return Err(ort::Error::new(format!("rows {rows:?} of a cache of shape {shape}")));
    }
    let row = shape[1..].iter().map(|&dim| dim as usize).product::<usize>();
    let mut gathered = Vec::with_capacity(rows.len() * row);
    for &parent in rows {
        gathered.extend_from_slice(&data[parent * row..][..row]);
    }
    let mut shape = shape.to_vec();
    shape[0] = rows.len() as i64;
    Ok(Tensor::from_array((shape, gathered))?.into_dyn())
}
