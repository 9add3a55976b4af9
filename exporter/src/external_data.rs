//! One file of weights under all graphs: the order and offsets of the tensors, and the stream of their bytes. Memory in use
//! is a few chunks, whatever the model's size.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FileRecord, SAMPLE_BLOCK, TensorRecord, WeightsRecord, sample_offsets};

use crate::convert::{convert, round};
use crate::dummy::Numbers;
use crate::weights::{Weight, found};
use crate::{Source, Watch};

/// Every tensor starts at a multiple of this, so that it can be mapped by itself.
const ALIGNMENT: u64 = 4096;
/// Numbers converted at a time.
const CHUNK: usize = 2 << 20;

/// Where each weight will lie, in the order given.
pub fn layout(weights: &[Weight]) -> Vec<TensorRecord> {
    let mut end = 0_u64;
    weights
        .iter()
        .map(|weight| {
            let (offset, bytes) = (end.next_multiple_of(ALIGNMENT), weight.bytes());
            end = offset + bytes;
            TensorRecord { name: weight.name.clone(), dtype: weight.dtype, shape: weight.shape.clone(), offset, bytes }
        })
        .collect()
}

/// Writes the file of weights as [`layout`] has it.
///
/// # Errors
/// A full disk or other failure of the file, a number that does not fit its type, or an interruption by `watch`.
pub fn write(path: &Path, weights: &[Weight], source: &Source, watch: &dyn Watch) -> Result<WeightsRecord> {
    let tensors = layout(weights);
    let total = tensors.last().map_or(0, |last| last.offset + last.bytes);
    watch.started(total);
    let failed = || format!("{}: cannot be written ({total} bytes are needed in all)", path.display());
    let file = File::options().create_new(true).read(true).write(true).open(path).with_context(failed)?;
    let mut out = Output { file, hashing: Hashing::start(), written: 0 };
    let mut scratch = Vec::new();
    for (weight, record) in weights.iter().zip(&tensors) {
        let mut padding = out.hashing.buffer();
        padding.clear();
        padding.resize((record.offset - out.written) as usize, 0);
        out.put(padding).with_context(failed)?;
        let mut chunks = Chunks::of(weight, source)?;
        for first in (0..weight.len()).step_by(CHUNK) {
            watch.check()?;
            let mut bytes = out.hashing.buffer();
            bytes.resize(CHUNK.min(weight.len() - first) * weight.dtype.size(), 0);
            chunks.next(&mut scratch, &mut bytes).with_context(|| source.place(&weight.tensor))?;
            watch.advanced(bytes.len() as u64);
            out.put(bytes).with_context(failed)?;
        }
    }
    let sha256 = out.hashing.finish();
    let sample_sha256 = sample(&mut out.file, total).with_context(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(WeightsRecord { file: name, record: FileRecord { bytes: total, sha256 }, sample_sha256, tensors })
}

/// The numbers of one weight, chunk by chunk.
enum Chunks<'s> {
    Stored { weight: &'s Weight, dtype: t5gemma_graphs::onnx::DType, left: &'s [u8] },
    Random { weight: &'s Weight, numbers: Numbers },
}

impl<'s> Chunks<'s> {
    fn of(weight: &'s Weight, source: &'s Source) -> Result<Chunks<'s>> {
        Ok(match source {
            Source::Checkpoint(checkpoint) => {
                let tensor = found(checkpoint, weight)?;
                Chunks::Stored { weight, dtype: tensor.dtype, left: tensor.bytes }
            }
            Source::Dummy { seed, .. } => Chunks::Random { weight, numbers: Numbers::of(weight, *seed) },
        })
    }

    /// Writes the next numbers to `out`, as many as there is room for.
    fn next(&mut self, scratch: &mut Vec<f32>, out: &mut [u8]) -> Result<()> {
        match self {
            Chunks::Stored { weight, dtype, left } => {
                let (chunk, rest) = left.split_at(out.len() / weight.dtype.size() * dtype.size());
                *left = rest;
                convert(chunk, (*dtype, weight.dtype), weight.adjust, scratch, out)
            }
            Chunks::Random { weight, numbers } => {
                scratch.resize(out.len() / weight.dtype.size(), 0.0);
                numbers.fill(scratch);
                round(scratch, weight.dtype, out)
            }
        }
    }
}

struct Output {
    file: File,
    hashing: Hashing,
    written: u64,
}

impl Output {
    fn put(&mut self, bytes: Vec<u8>) -> std::io::Result<()> {
        self.file.write_all(&bytes)?;
        self.written += bytes.len() as u64;
        self.hashing.update(bytes);
        Ok(())
    }
}

/// SHA-256 on a thread of its own, so that it overlaps with converting and writing what follows. Buffers go back and forth:
/// fresh ones would cost the system more than the conversion.
struct Hashing {
    chunks: SyncSender<Vec<u8>>,
    used: Receiver<Vec<u8>>,
    thread: JoinHandle<String>,
}

impl Hashing {
    fn start() -> Hashing {
        // The bound on memory: two chunks in the channel, one in each thread.
        let (chunks, received) = sync_channel::<Vec<u8>>(2);
        let (back, used) = channel();
        let thread = thread::spawn(move || {
            let mut hash = Sha256::new();
            for chunk in received {
                hash.update(&chunk);
                // Nobody waits for the last buffers.
                let _ = back.send(chunk);
            }
            hex::encode(hash.finalize())
        });
        Hashing { chunks, used, thread }
    }

    /// A buffer with anything in it: one that has been hashed, or else a new one. All that is sent must come from here, so
    /// that there are never more of them than can be under way at once.
    fn buffer(&self) -> Vec<u8> {
        self.used.try_recv().unwrap_or_default()
    }

    fn update(&self, chunk: Vec<u8>) {
        self.chunks.send(chunk).expect("the hashing thread lives until the channel closes");
    }

    fn finish(self) -> String {
        drop(self.chunks);
        self.thread.join().expect("hashing does not panic")
    }
}

/// [`WeightsRecord::sample_sha256`] of a file of `bytes` bytes.
fn sample(file: &mut File, bytes: u64) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut block = Vec::new();
    for offset in sample_offsets(bytes) {
        file.seek(SeekFrom::Start(offset))?;
        block.clear();
        (&*file).take(SAMPLE_BLOCK).read_to_end(&mut block)?;
        hash.update(&block);
    }
    Ok(hex::encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use t5gemma_graphs::onnx::{Adjust, DType};

    #[test]
    fn tensors_are_aligned_and_do_not_overlap() {
        let weight = |name: &str, shape: &[usize]| Weight {
            name: name.into(),
            dtype: DType::BFloat16,
            shape: shape.to_vec(),
            tensor: name.into(),
            adjust: Adjust::AsIs,
        };
        let records = layout(&[weight("a", &[3, 5]), weight("b", &[4096]), weight("c", &[1])]);
        let places: Vec<(u64, u64)> = records.iter().map(|record| (record.offset, record.bytes)).collect();
        assert_eq!(places, [(0, 30), (4096, 8192), (12288, 2)]);
    }
}
