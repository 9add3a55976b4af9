//! `FixedBuffers`: inputs and outputs of one-token steps at addresses that stay the same from step to step and from
//! request to request. What a step is given is copied in and what it returns is copied out. CUDA graphs need this: a
//! replay reads and writes where the captured run did.
//!
//! # Design
//! A captured graph cannot be released before its session is closed, so there are few sizes: sources are padded to
//! multiples of [`SOURCE_MULTIPLE`] tokens, the capacity for targets doubles, and the buffers of a finished request
//! serve the next one of their size.
//!
//! ONNX Runtime keeps a captured graph for the thread that ran it, after two ordinary runs: another thread captures its
//! own. While it captures, no thread of the process may allocate memory of a GPU, or the run fails.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ort::memory::Allocator;
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynTensor, DynValue, Tensor, ValueType};

use crate::device::Device;

/// Sources are padded to a multiple of this number of tokens.
pub(super) const SOURCE_MULTIPLE: usize = 64;

/// Upper bound on the unused buffers that are kept; the least recently used go first.
const MOST_UNUSED: usize = 8;

/// The run option with the number of a captured graph.
const GRAPH_ID: &str = "gpu_graph_id";

/// The size of a step's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BufferSize {
    pub rows: usize,
    /// Capacity in target tokens.
    pub capacity: usize,
    /// Source tokens, padding included.
    pub source: usize,
}

/// A model's step buffers that no request is using.
pub(crate) struct BufferPool {
    /// The most recently used last.
    unused: Mutex<Vec<FixedBuffers>>,
    captures: bool,
    next_graph: AtomicU64,
}

impl BufferPool {
    /// An empty pool. `captures` says whether runs are captured as CUDA graphs.
    pub fn new(captures: bool) -> BufferPool {
        // 0 is the number of a run without the option.
        BufferPool { unused: Mutex::default(), captures, next_graph: AtomicU64::new(1) }
    }

    /// Whether runs are captured as CUDA graphs.
    pub fn captures(&self) -> bool {
        self.captures
    }

    /// The number of unused sets of buffers.
    pub fn unused_sets(&self) -> usize {
        self.unused().len()
    }

    /// Takes buffers of that size, if there are any.
    pub(super) fn take(&self, size: BufferSize) -> Option<FixedBuffers> {
        let mut unused = self.unused();
        let at = unused.iter().position(|buffers| buffers.size == size)?;
        Some(unused.remove(at))
    }

    /// Keeps buffers for another request.
    pub(super) fn put(&self, buffers: FixedBuffers) {
        let mut unused = self.unused();
        if unused.len() == MOST_UNUSED {
            unused.remove(0);
        }
        unused.push(buffers);
    }

    fn unused(&self) -> MutexGuard<'_, Vec<FixedBuffers>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The options of a run that must not be captured; `None` where nothing is captured.
    pub(super) fn uncaptured(&self) -> ort::Result<Option<RunOptions>> {
        self.captures.then(|| with_graph_id("-1")).transpose()
    }

    /// The options of a run that is captured, and of its replays.
    fn captured(&self) -> ort::Result<RunOptions> {
        if self.captures {
            with_graph_id(&self.next_graph.fetch_add(1, Ordering::Relaxed).to_string())
        } else {
            RunOptions::new()
        }
    }
}

fn with_graph_id(id: &str) -> ort::Result<RunOptions> {
    let mut options = RunOptions::new()?;
    options.set(GRAPH_ID, id)?;
    Ok(options)
}

/// The inputs and outputs of a step, always at the same addresses of the device.
pub(super) struct FixedBuffers {
    pub size: BufferSize,
    /// `[rows, 1]` each.
    ids: Tensor<i64>,
    positions: Tensor<i64>,
    /// `[rows, source]`.
    mask: Tensor<i64>,
    /// Keys and values, layer by layer; empty while a request owns them.
    pub sources: Vec<DynValue>,
    pub targets: Vec<DynValue>,
    /// One for each set of outputs that steps have returned.
    bound: Vec<BoundStep>,
}

/// The cached step bound to its buffers.
struct BoundStep {
    /// The names of the outputs that are returned.
    names: Vec<String>,
    outputs: Vec<DynTensor>,
    binding: IoBinding,
    options: RunOptions<NoSelectedOutputs>,
}

/// A step in fixed buffers.
pub(super) struct FixedStep<'a> {
    pub session: &'a mut Session,
    pub device: Device,
    /// Keys and values, which are at the addresses of the buffers.
    pub sources: &'a [DynValue],
    pub targets: &'a mut [DynValue],
    /// One for each row, all at `position`.
    pub tokens: &'a [i64],
    pub position: usize,
    /// The names of the outputs to return.
    pub names: &'a [String],
}

impl FixedBuffers {
    /// New buffers, without keys and values.
    pub fn new(session: &Session, device: Device, size: BufferSize) -> ort::Result<FixedBuffers> {
        let allocator = Allocator::new(session, device.memory()?)?;
        let one_each = || Tensor::<i64>::new(&allocator, [size.rows, 1]);
        let (ids, positions) = (one_each()?, one_each()?);
        let mask = Tensor::<i64>::new(&allocator, [size.rows, size.source])?;
        Ok(FixedBuffers { size, ids, positions, mask, sources: Vec::new(), targets: Vec::new(), bound: Vec::new() })
    }

    /// Sets the mask of the sources for the next steps.
    pub fn set_mask(&mut self, mask: &Tensor<i64>) -> ort::Result<()> {
        mask.copy_into(&mut self.mask)
    }

    /// Runs the step and returns its outputs in the process's memory.
    pub fn step(&mut self, pool: &BufferPool, mut step: FixedStep) -> ort::Result<Vec<DynValue>> {
        let rows = self.size.rows;
        Tensor::from_array(([rows, 1], step.tokens.to_vec()))?.copy_into(&mut self.ids)?;
        Tensor::from_array(([rows, 1], vec![step.position as i64; rows]))?.copy_into(&mut self.positions)?;
        let at = match self.bound.iter().position(|bound| bound.names == step.names) {
            Some(at) => at,
            None => {
                let bound = self.bind(pool, &mut step)?;
                self.bound.push(bound);
                self.bound.len() - 1
            }
        };
        let bound = &self.bound[at];
        step.session.run_binding_with_options(&bound.binding, &bound.options)?;
        bound.outputs.iter().map(to_host).collect()
    }

    fn bind(&self, pool: &BufferPool, step: &mut FixedStep) -> ort::Result<BoundStep> {
        let FixedStep { session, device, sources, targets, names, .. } = step;
        let mut binding = session.create_binding()?;
        for (port, value) in session.inputs().iter().zip([&self.mask, &self.ids, &self.positions]) {
            binding.bind_input(port.name(), value)?;
        }
        let cached = targets.chunks_exact(2).zip(sources.chunks_exact(2));
        let cached = cached.flat_map(|(targets, sources)| targets.iter().chain(sources));
        for (port, value) in session.inputs()[3..].iter().zip(cached) {
            binding.bind_input(port.name(), value)?;
        }
        for (port, target) in session.outputs()[1..].iter().zip(targets.iter_mut()) {
            binding.bind_output(port.name(), target)?;
        }
        let allocator = Allocator::new(session, device.memory()?)?;
        let mut outputs = Vec::with_capacity(names.len());
        for name in names.iter() {
            let port = session.outputs().iter().find(|port| port.name() == name);
            let Some(ValueType::Tensor { ty, shape, .. }) = port.map(|port| port.dtype()) else {
                return Err(ort::Error::new(format!("no output {name}")));
            };
            // The first axis is rows of one token each; cross-attentions have the source on their last axis.
            let last = shape.len() - 1;
            let size = |(axis, &size): (usize, &i64)| match (size, axis) {
                (0.., _) => size,
                (_, 0) => self.size.rows as i64,
                (_, axis) if axis == last => self.size.source as i64,
                _ => 1,
            };
            let mut value = DynTensor::new(&allocator, *ty, shape.iter().enumerate().map(size).collect::<Vec<_>>())?;
            binding.bind_output(name, &mut value)?;
            outputs.push(value);
        }
        Ok(BoundStep { names: names.to_vec(), outputs, binding, options: pool.captured()? })
    }
}

/// A copy of a tensor in the process's memory.
fn to_host(value: &DynTensor) -> ort::Result<DynValue> {
    let shape = value.shape().to_vec();
    let mut host = DynTensor::new(&Allocator::default(), *value.data_type(), shape)?;
    value.copy_into(&mut host)?;
    Ok(host.into_dyn())
}

/// Pads `mask`, `[items, source]`, to `length` tokens that are masked out.
pub(super) fn pad_mask(mask: &DynValue, length: usize) -> ort::Result<Tensor<i64>> {
    let (shape, mask) = mask.try_extract_tensor::<i64>()?;
    let (items, source) = (shape[0] as usize, shape[1] as usize);
    let mut padded = vec![0; items * length];
    for (row, mask) in padded.chunks_exact_mut(length).zip(mask.chunks_exact(source)) {
        row[..source].copy_from_slice(mask);
    }
    Tensor::from_array(([items, length], padded))
}

/// Cuts cross-attentions to the first `length` source tokens.
pub(super) fn cut_source(cross_attentions: DynValue, length: usize) -> ort::Result<DynValue> {
    let (shape, numbers) = cross_attentions.try_extract_tensor::<f32>()?;
    let (rows, tokens, padded) = (shape[0] as usize, shape[1] as usize, shape[2] as usize);
    if padded == length {
        return Ok(cross_attentions);
    }
    let kept: Vec<f32> = numbers.chunks_exact(padded).flat_map(|row| &row[..length]).copied().collect();
    Ok(Tensor::from_array(([rows, tokens, length], kept))?.into_dyn())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_shared_between_threads() {
        fn check<T: Send + Sync>() {}
        check::<BufferPool>();
    }
}
