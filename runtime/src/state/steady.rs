//! Memory for steps of one token a row that stays where it is, from step to step and from request to request: what a step is
//! given is copied into it, and what it returns is copied out. A CUDA graph needs that, for it reads and writes where the run
//! did that was captured.
//!
//! # Design
//! A graph that was captured cannot be given back before its session is closed, so there are few sizes: sources are padded to
//! multiples of [`SOURCES`] tokens, the targets' room doubles, and memory that a request is done with serves the next of its size.
//!
//! ONNX Runtime keeps a captured graph for the thread that ran it, after two runs as ever: another thread captures its own. While it
//! captures, no thread of the process may take memory of a GPU, or the run fails.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ort::memory::Allocator;
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{DynTensor, DynValue, Tensor, ValueType};

use crate::device::Device;

/// Source tokens are padded to a multiple of this.
pub(super) const SOURCES: usize = 64;

/// Sizes that memory is kept for at most; the one that was used least lately goes.
const MOST: usize = 8;

/// What ONNX Runtime calls the number that a captured graph has.
const GRAPH_ID: &str = "gpu_graph_id";

/// What the memory of a step has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub rows: usize,
    /// Target tokens.
    pub room: usize,
    /// Source tokens.
    pub source: usize,
}

/// The memory of a model's steps that no request is using.
pub(crate) struct Pool {
    /// The latest last.
    free: Mutex<Vec<Steady>>,
    captures: bool,
    next: AtomicU64,
}

impl Pool {
    /// An empty pool of memory for runs that are captured as CUDA graphs, or else run as ever.
    pub fn new(captures: bool) -> Pool {
        // 0 is what a run has that says nothing.
        Pool { free: Mutex::default(), captures, next: AtomicU64::new(1) }
    }

    /// Whether runs are captured.
    pub fn captures(&self) -> bool {
        self.captures
    }

    /// How many there are.
    pub fn sizes(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Memory of that size, if there is any.
    pub(super) fn take(&self, size: Size) -> Option<Steady> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = free.iter().position(|steady| steady.size == size)?;
        Some(free.remove(at))
    }

    /// Keeps memory for another request.
    pub(super) fn put(&self, steady: Steady) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() == MOST {
            free.remove(0);
        }
        free.push(steady);
    }

    /// How to run what is not to be captured; of sessions that capture nothing as ever.
    pub(super) fn uncaptured(&self) -> ort::Result<Option<RunOptions>> {
        self.captures.then(|| options("-1")).transpose()
    }

    /// How to run what is captured by the first run and repeated by the others.
    fn captured(&self) -> ort::Result<RunOptions> {
        match self.captures {
            true => options(&self.next.fetch_add(1, Ordering::Relaxed).to_string()),
            false => RunOptions::new(),
        }
    }
}

fn options(graph: &str) -> ort::Result<RunOptions> {
    let mut options = RunOptions::new()?;
    options.set(GRAPH_ID, graph)?;
    Ok(options)
}

/// What a step is given and returns, always at the same places of the device.
pub(super) struct Steady {
    pub size: Size,
    /// `[rows, 1]` each.
    ids: Tensor<i64>,
    positions: Tensor<i64>,
    /// `[rows, source]`.
    mask: Tensor<i64>,
    /// Keys and values, layer by layer, but while a request has them.
    pub sources: Vec<DynValue>,
    pub targets: Vec<DynValue>,
    /// By the outputs that are wanted.
    bound: Vec<Bound>,
}

/// A step bound to its places.
struct Bound {
    wanted: Vec<String>,
    returned: Vec<DynTensor>,
    binding: IoBinding,
    options: RunOptions<NoSelectedOutputs>,
}

impl Steady {
    /// New memory, of which the keys and values are to be put in.
    pub fn new(session: &Session, device: Device, size: Size) -> ort::Result<Steady> {
        let allocator = Allocator::new(session, device.memory()?)?;
        let one = || Tensor::<i64>::new(&allocator, [size.rows, 1]);
        let (ids, positions) = (one()?, one()?);
        let mask = Tensor::<i64>::new(&allocator, [size.rows, size.source])?;
        Ok(Steady { size, ids, positions, mask, sources: Vec::new(), targets: Vec::new(), bound: Vec::new() })
    }

    /// Has the next steps see these source tokens.
    pub fn set_mask(&mut self, mask: &Tensor<i64>) -> ort::Result<()> {
        mask.copy_into(&mut self.mask)
    }

    /// Runs the cached step for a token a row, all at one position, and returns the outputs of those names.
    pub fn step(
        &mut self,
        pool: &Pool,
        (session, device): (&mut Session, Device),
        (sources, targets): (&[DynValue], &mut [DynValue]),
        (tokens, position): (&[i64], usize),
        wanted: &[String],
    ) -> ort::Result<Vec<DynValue>> {
        let rows = self.size.rows;
        Tensor::from_array(([rows, 1], tokens.to_vec()))?.copy_into(&mut self.ids)?;
        Tensor::from_array(([rows, 1], vec![position as i64; rows]))?.copy_into(&mut self.positions)?;
        let at = match self.bound.iter().position(|bound| bound.wanted == wanted) {
            Some(at) => at,
            None => {
                let bound = self.bind(pool, (session, device), (sources, targets), wanted)?;
                self.bound.push(bound);
                self.bound.len() - 1
            }
        };
        let bound = &self.bound[at];
        session.run_binding_with_options(&bound.binding, &bound.options)?;
        bound.returned.iter().map(to_host).collect()
    }

    fn bind(
        &mut self,
        pool: &Pool,
        (session, device): (&mut Session, Device),
        (sources, targets): (&[DynValue], &mut [DynValue]),
        wanted: &[String],
    ) -> ort::Result<Bound> {
        let mut binding = session.create_binding()?;
        for (port, value) in session.inputs().iter().zip([&self.mask, &self.ids, &self.positions]) {
            binding.bind_input(port.name(), value)?;
        }
        let cached = targets.chunks_exact(2).zip(sources.chunks_exact(2));
        let cached = cached.flat_map(|(targets, sources)| targets.iter().chain(sources));
        for (port, value) in session.inputs()[3..].iter().zip(cached) {
            binding.bind_input(port.name(), value)?;
        }
        for (port, target) in session.outputs()[1..].iter().zip(targets) {
            binding.bind_output(port.name(), target)?;
        }
        let allocator = Allocator::new(session, device.memory()?)?;
        let mut returned = Vec::with_capacity(wanted.len());
        for name in wanted {
            let port = session.outputs().iter().find(|port| port.name() == name);
            let Some(ValueType::Tensor { ty, shape, .. }) = port.map(|port| port.dtype()) else {
                return Err(ort::Error::new(format!("no output {name}")));
            };
            // Rows first, one token each; what attends has a number for each source token in the end.
            let last = shape.len() - 1;
            let size = |(axis, &size): (usize, &i64)| match (size, axis) {
                (0.., _) => size,
                (_, 0) => self.size.rows as i64,
                (_, axis) if axis == last => self.size.source as i64,
                _ => 1,
            };
            let mut value = DynTensor::new(&allocator, *ty, shape.iter().enumerate().map(size).collect::<Vec<_>>())?;
            binding.bind_output(name, &mut value)?;
            returned.push(value);
        }
        Ok(Bound { wanted: wanted.to_vec(), returned, binding, options: pool.captured()? })
    }
}

/// A tensor in the process's memory.
fn to_host(value: &DynTensor) -> ort::Result<DynValue> {
    let shape = value.shape().to_vec();
    let mut host = DynTensor::new(&Allocator::default(), *value.data_type(), shape)?;
    value.copy_into(&mut host)?;
    Ok(host.into_dyn())
}

/// `mask`, `[items, source]`, with tokens that are not seen up to `length`.
pub(super) fn padded(mask: &DynValue, length: usize) -> ort::Result<Tensor<i64>> {
    let (shape, seen) = mask.try_extract_tensor::<i64>()?;
    let (items, source) = (shape[0] as usize, shape[1] as usize);
    let mut all = vec![0; items * length];
    for (row, seen) in all.chunks_exact_mut(length).zip(seen.chunks_exact(source)) {
        row[..source].copy_from_slice(seen);
    }
    Tensor::from_array(([items, length], all))
}

/// The first `length` numbers of each row of what targets attend to.
pub(super) fn cut(attended: DynValue, length: usize) -> ort::Result<DynValue> {
    let (shape, numbers) = attended.try_extract_tensor::<f32>()?;
    let (rows, tokens, padded) = (shape[0] as usize, shape[1] as usize, shape[2] as usize);
    if padded == length {
        return Ok(attended);
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
        check::<Pool>();
    }
}
