//! `State`: what the decoder remembers of the rows in flight between two steps, and how it follows a change of rows (beams
//! that continue another beam, items that have finished). Which row continues which is decided elsewhere. Two ways of
//! keeping it are for the process's own memory, and the third for the memory of a device.

mod candidates;
mod growing;
mod in_place;
mod logits;
mod ragged;
mod resident;
mod steady;

use half::{bf16, f16};
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor, TensorElementType};
use t5gemma_kernels::LogitsRequest;

use crate::error::Error;
use growing::Growing;
use in_place::InPlace;
pub(crate) use ragged::{First, Ragged, capacity};
pub(crate) use resident::{Plan, Resident};
pub(crate) use steady::Pool;
use t5gemma_graphs::interface::CROSS_ATTENTIONS;

/// The keys and values of the rows in flight, with the mask of their sources.
///
/// Target rows are ordered by source item: the beams of one item are adjacent, and every item has as many.
pub(crate) struct State {
    cache: Cache,
    items: usize,
    rows: usize,
}

/// The keys and values.
pub(crate) enum Cache {
    /// Every step makes new ones.
    Growing(Growing),
    /// Every step writes into what there is.
    InPlace(Box<InPlace>),
    /// It stays where the sessions compute.
    Resident(Box<Resident>),
}

/// What a run returns besides what is cached.
pub(crate) struct Returned {
    /// `[rows, positions, vocab_size]`.
    pub logits: DynValue,
    /// `[rows, tokens, source]`, of models that tell what their targets attend to.
    pub attended: Option<DynValue>,
}

/// The name of the output that tells what targets attend to, if a graph has it: it is the last.
fn attended_port(session: &Session) -> Option<String> {
    session.outputs().last().filter(|port| port.name() == CROSS_ATTENTIONS).map(|port| port.name().to_string())
}

impl State {
    /// The state after the first decoder step, which runs one target row for each source item: `mask` is `[items, source]`,
    /// `cached` are the step's outputs after the logits, and `per_item` tells of each whether its first axis is source
    /// items (cross-attention) or target rows (self-attention).
    pub fn growing(mask: DynValue, cached: Vec<DynValue>, per_item: Vec<bool>) -> State {
        let items = mask.shape()[0] as usize;
        State { cache: Cache::Growing(Growing::new(mask, cached, per_item)), items, rows: items }
    }

    /// The same, to be continued in place.
    pub fn in_place(mask: DynValue, cached: Vec<DynValue>, per_item: &[bool]) -> ort::Result<State> {
        let items = mask.shape()[0] as usize;
        Ok(State { cache: Cache::InPlace(Box::new(InPlace::new(mask, cached, per_item)?)), items, rows: items })
    }

    /// The state after the first decoder graph has run on `ids` and `hidden`, with what it returns if it is a step; to be kept as
    /// the plan says.
    pub fn resident(
        plan: &Plan,
        session: &mut Session,
        mask: DynValue,
        given: (&DynValue, &DynValue),
        wanted: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<(State, Option<Returned>)> {
        let items = mask.shape()[0] as usize;
        let (resident, returned) = Resident::start(plan, session, mask, given, wanted, options)?;
        Ok((State { cache: Cache::Resident(Box::new(resident)), items, rows: items }, returned))
    }

    /// The number of source items in flight.
    pub fn items(&self) -> usize {
        self.items
    }

    /// The number of target rows in flight.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The keys and values, for a step.
    pub fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// Keeps the source items `items`, and makes target row `r` the continuation of row `parents[r]`. Both count in the
    /// items and rows of before the call; `parents` holds as many rows for each kept item.
    pub fn select(&mut self, items: &[usize], parents: &[usize]) -> Result<(), Error> {
        let before = (self.items, self.rows);
        match &mut self.cache {
            Cache::Growing(cache) => cache.select(items, parents, before),
            Cache::InPlace(cache) => cache.select(items, parents, before),
            Cache::Resident(cache) => cache.select(items, parents, before),
        }
        .map_err(Error::onnxruntime("reordering the cache"))?;
        (self.items, self.rows) = (items.len(), parents.len());
        Ok(())
    }
}

impl State {
    /// Forgets the target tokens behind the first `length`; there is one row.
    pub fn truncate(&mut self, length: usize) -> Result<(), Error> {
        match &mut self.cache {
            Cache::Growing(cache) => cache.truncate(length).map_err(Error::onnxruntime("shortening the cache")),
            Cache::InPlace(cache) => {
                cache.truncate(length);
                Ok(())
            }
            Cache::Resident(cache) => cache.truncate(length).map_err(Error::onnxruntime("shortening the cache")),
        }
    }
}

/// Makes `value`, `[1, heads, tokens, size]`, what it is of the first `length` tokens.
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

/// Makes `value` the tensor of the given rows (entries of the first axis) of itself, which has `before` rows.
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
