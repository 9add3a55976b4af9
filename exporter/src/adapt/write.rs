//! Streams the planned tensors into weights files, a block at a time. Memory use is that of two blocks, whatever the size of the model.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::thread;

use t5gemma_graphs::interface::DType;

use super::tensors::{Origin, Planned};
use crate::checkpoint::Layout;
use crate::convert::{round_to_infinity, to_float32};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::staging::StagingDir;

/// Elements in a block.
const BLOCK: usize = 4 << 20;
/// Fewest elements worth a thread.
const SHARE: usize = 64 << 10;

/// What was written.
pub struct Written {
    /// Bytes of tensors.
    pub bytes: u64,
    /// Tensors with finite numbers that the type does not have, and how many.
    pub overflows: Vec<(String, u64)>,
}

/// Writes all tensors, in their order.
///
/// # Errors
/// A full disk or another failure of a file, or a cancellation by `progress`.
pub fn write(
    folder: &StagingDir,
    planned: &[Planned<'_>],
    dtype: DType,
    max_shard_size: u64,
    progress: &dyn Progress,
) -> Result<Written> {
    let shapes: Vec<(&str, &[usize])> = planned.iter().map(|tensor| (&*tensor.name, &*tensor.shape)).collect();
    let layout = Layout::new(&shapes, dtype, max_shard_size);
    let total = layout.total;
    progress.started(total);
    let (mut overflows, mut block) = (Vec::new(), Vec::new());
    for shard in &layout.files {
        let path = folder.path(&shard.name);
        let failed = |error| Error::io(&path, format!("cannot be written ({total} bytes are needed in all)"))(error);
        let file = File::options().create_new(true).write(true).open(&path).map_err(failed)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&shard.header).map_err(failed)?;
        for tensor in &planned[shard.tensors.clone()] {
            let mut infinite = 0;
            for first in (0..tensor.elements()).step_by(BLOCK) {
                if progress.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                let elements = first..tensor.elements().min(first + BLOCK);
                let bytes = match tensor.origin {
                    Origin::Stored { dtype: stored, tensor, .. } if stored == dtype => {
                        &tensor.bytes[elements.start * dtype.size()..elements.end * dtype.size()]
                    }
                    origin => {
                        block.resize(elements.len() * dtype.size(), 0);
                        infinite += fill_in_parallel(origin, elements.start, dtype, &mut block);
                        &block
                    }
                };
                file.write_all(bytes).map_err(failed)?;
                progress.advanced(bytes.len() as u64);
                if let Origin::Stored { checkpoint, dtype, tensor } = tensor.origin {
                    let read = elements.start * dtype.size()..elements.end * dtype.size();
                    checkpoint.release(&tensor.bytes[read]);
                }
            }
            if infinite > 0 {
                overflows.push((tensor.name.clone(), infinite));
            }
        }
        file.into_inner().map_err(|error| failed(error.into_error()))?;
    }
    if let Some((name, index)) = layout.index(&shapes) {
        folder.write(name, super::text_of(&index).as_bytes())?;
    }
    Ok(Written { bytes: total, overflows })
}

/// Writes the elements from index `first` on to `out`, as many as it has room for, on all cores. Returns the number of finite ones that
/// became infinite.
fn fill_in_parallel(origin: Origin<'_>, first: usize, dtype: DType, out: &mut [u8]) -> u64 {
    let threads = thread::available_parallelism().map_or(1, Into::into);
    let share = (out.len() / dtype.size()).div_ceil(threads).max(SHARE);
    let shares = (first..).step_by(share).zip(out.chunks_mut(share * dtype.size()));
    thread::scope(|scope| {
        let shares: Vec<_> = shares.map(|(first, out)| scope.spawn(move || fill(origin, first, dtype, out))).collect();
        shares.into_iter().map(|share| share.join().expect("filling does not panic")).sum()
    })
}

fn fill(origin: Origin<'_>, first: usize, dtype: DType, out: &mut [u8]) -> u64 {
    let mut numbers = vec![0.0; out.len() / dtype.size()];
    match origin {
        Origin::Stored { dtype, tensor, .. } => {
            let (start, end) = (first * dtype.size(), (first + numbers.len()) * dtype.size());
            to_float32(&tensor.bytes[start..end], dtype, &mut numbers);
        }
        Origin::Scaled { dtype, tensor, factor } => {
            let (start, end) = (first * dtype.size(), (first + numbers.len()) * dtype.size());
            to_float32(&tensor.bytes[start..end], dtype, &mut numbers);
            numbers.iter_mut().for_each(|number| *number *= factor);
        }
        Origin::Random(random) => random.fill(first, &mut numbers),
        Origin::Constant(constant) => numbers.fill(constant),
    }
    round_to_infinity(&numbers, dtype, out)
}
