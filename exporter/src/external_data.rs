//! One file of weights under all graphs: the order and offsets of the tensors, and the stream of their bytes. Memory in use
//! is a few chunks, whatever the model's size, and the scales of one matrix where it is held in few bits.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FileRecord, SAMPLE_BLOCK, TensorRecord, WeightsRecord, sample_offsets};
use t5gemma_graphs::onnx::{Adjust, Blocks, Code, DType, Part};

use crate::convert::{convert, not_finite, read, round};
use crate::dummy;
use crate::float8::{self, pack_float8};
use crate::progress::Watch;
use crate::quantize::{PackedRows, pack};
use crate::signed::pack_signed;
use crate::source::Source;
use crate::weights::{Weight, found};

/// Every tensor starts at a multiple of this, so that it can be mapped by itself.
const ALIGNMENT: u64 = 4096;
/// Numbers converted at a time.
const CHUNK: usize = 2 << 20;

/// Where each weight will lie, in the order given.
pub fn layout(weights: &[Weight]) -> Vec<TensorRecord> {
    let mut end = 0_u64;
    let mut records: Vec<TensorRecord> = Vec::with_capacity(weights.len());
    for weight in weights {
        let same = weight.alias.map(|earlier| &records[earlier]);
        let offset = same.map_or(end.next_multiple_of(ALIGNMENT), |same| same.offset);
        let record = TensorRecord {
            name: weight.name.clone(),
            dtype: weight.dtype,
            shape: weight.shape.clone(),
            offset,
            bytes: weight.bytes(),
            same_bytes_as: same.map(|same| same.name.clone()),
        };
        end = end.max(record.offset + record.bytes);
        records.push(record);
    }
    records
}

/// What was written.
pub struct Written {
    /// For the manifest.
    pub record: WeightsRecord,
    /// How many numbers are NaN or infinite, of the tensors that have any.
    pub not_finite: Vec<(String, u64)>,
}

/// Writes the file of weights as [`layout`] has it.
///
/// # Errors
/// A full disk or other failure of the file, a number that does not fit its type, or an interruption by `watch`.
pub fn write(path: &Path, weights: &[Weight], source: &Source, watch: &dyn Watch) -> Result<Written> {
    let tensors = layout(weights);
    let total = tensors.iter().map(|tensor| tensor.offset + tensor.bytes).max().unwrap_or(0);
    watch.started(total);
    let failed = || format!("{}: cannot be written ({total} bytes are needed in all)", path.display());
    let file = File::options().create_new(true).read(true).write(true).open(path).with_context(failed)?;
    let mut out = Output { file, hashing: Hashing::start(), written: 0 };
    let mut scratch = Vec::new();
    let mut not_finite: BTreeMap<&str, u64> = BTreeMap::new();
    // Scales and zero points come with the packed numbers, and are written after them.
    let mut packed = PackedRows::default();
    for (weight, record) in weights.iter().zip(&tensors).filter(|(weight, _)| weight.alias.is_none()) {
        let mut padding = out.hashing.buffer();
        padding.clear();
        padding.resize((record.offset - out.written) as usize, 0);
        out.put(padding).with_context(failed)?;
        let ready = match weight.adjust {
            Adjust::Packed(_) | Adjust::Signed(_) => {
                packed = PackedRows::default();
                if let Adjust::Signed(Blocks { code: Code::Float8E4M3FN, .. }) = weight.adjust {
                    packed.scales.push(float8::scale(largest(weight, source, watch, &mut scratch)?));
                }
                None
            }
            Adjust::Scales(_) => {
                let mut scales = vec![0; packed.scales.len() * weight.dtype.size()];
                round(&packed.scales, weight.dtype, &mut scales).with_context(|| weight.name.clone())?;
                Some(scales)
            }
            Adjust::ZeroPoints(_) => Some(std::mem::take(&mut packed.zero_points)),
            Adjust::AsIs | Adjust::OnePlus => None,
        };
        if let Some(ready) = ready {
            for chunk in ready.chunks(CHUNK) {
                let mut bytes = out.hashing.buffer();
                bytes.clear();
                bytes.extend_from_slice(chunk);
                watch.advanced(bytes.len() as u64);
                out.put(bytes).with_context(failed)?;
            }
            continue;
        }
        for part in &weight.parts {
            let mut numbers = Numbers::of(part, weight.adjust, source)?;
            let (count, row) = (part.numbers(), part.shape.last().copied().unwrap_or(1));
            let chunk = match weight.adjust {
                Adjust::Packed(_) | Adjust::Signed(_) => (CHUNK / row).max(1) * row,
                _ => CHUNK,
            };
            let pack: Option<Pack> = match (weight.adjust, packed.scales.first()) {
                (Adjust::Packed(blocks), _) => Some(Box::new(move |rows| pack(rows, row, blocks))),
                (Adjust::Signed(Blocks { code: Code::Float8E4M3FN, .. }), Some(&scale)) => {
                    Some(Box::new(move |rows| pack_float8(rows, scale)))
                }
                (Adjust::Signed(blocks), _) => Some(Box::new(move |rows| pack_signed(rows, row, blocks))),
                _ => None,
            };
            for first in (0..count).step_by(chunk) {
                watch.check()?;
                let mut bytes = out.hashing.buffer();
                let chunk = chunk.min(count - first);
                if let Some(pack) = &pack {
                    scratch.resize(chunk, 0.0);
                    numbers.next_float32(&mut scratch).with_context(|| source.place(&part.tensor))?;
                    bytes.clear();
                    pack_rows(&scratch, row, pack, &mut bytes, &mut packed);
                } else {
                    bytes.resize(chunk * weight.dtype.size(), 0);
                    numbers.next(weight, &mut scratch, &mut bytes).with_context(|| source.place(&part.tensor))?;
                }
                watch.advanced(bytes.len() as u64);
                out.put(bytes).with_context(failed)?;
            }
            if numbers.not_finite > 0 {
                let found = not_finite.entry(&part.tensor).or_default();
                // A tensor may be in the file more than once.
                *found = numbers.not_finite.max(*found);
            }
        }
    }
    let not_finite = not_finite.into_iter().map(|(tensor, count)| (tensor.to_string(), count)).collect();
    let sha256 = out.hashing.finish();
    let sample_sha256 = sample(&mut out.file, total).with_context(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let record = WeightsRecord { file: name, record: FileRecord { bytes: total, sha256 }, sample_sha256, tensors };
    Ok(Written { record, not_finite })
}

/// The largest absolute number of a weight, which has to be finite.
fn largest(weight: &Weight, source: &Source, watch: &dyn Watch, scratch: &mut Vec<f32>) -> Result<f32> {
    let mut largest = 0.0_f32;
    for part in &weight.parts {
        let mut numbers = Numbers::of(part, weight.adjust, source)?;
        let count = part.numbers();
        for first in (0..count).step_by(CHUNK) {
            watch.check()?;
            scratch.resize(CHUNK.min(count - first), 0.0);
            let place = || source.place(&part.tensor);
            numbers.next_float32(scratch).with_context(place)?;
            for &x in &*scratch {
                ensure!(x.is_finite(), "{}: expected finite numbers to hold in fp8, found {x}", place());
                largest = largest.max(x.abs());
            }
        }
    }
    Ok(largest)
}

/// Packs some rows.
type Pack = Box<dyn Fn(&[f32]) -> PackedRows + Sync>;

/// Packs rows of `k` numbers on all cores: adds their bytes to `bytes`, and their scales and zero points to `packed`.
fn pack_rows(rows: &[f32], k: usize, pack: &Pack, bytes: &mut Vec<u8>, packed: &mut PackedRows) {
    let threads = thread::available_parallelism().map_or(1, Into::into);
    let share = (rows.len() / k).div_ceil(threads).max(1) * k;
    thread::scope(|scope| {
        let parts: Vec<_> = rows.chunks(share).map(|part| scope.spawn(move || pack(part))).collect();
        for part in parts {
            packed.append(part.join().expect("packing does not panic"));
        }
    });
    bytes.append(&mut packed.numbers);
}

/// The numbers of one tensor, or of the rows that are taken of it, chunk by chunk.
struct Numbers<'s> {
    from: Origin<'s>,
    kept: Option<Arc<[usize]>>,
    /// Numbers in a row.
    width: usize,
    /// Numbers that were read.
    read: usize,
    /// Of these, how many are NaN or infinite.
    not_finite: u64,
}

enum Origin<'s> {
    Stored { dtype: DType, bytes: &'s [u8] },
    Random(dummy::Numbers),
}

impl<'s> Numbers<'s> {
    fn of(part: &Part, adjust: Adjust, source: &'s Source) -> Result<Numbers<'s>> {
        let from = match source {
            Source::Checkpoint(checkpoint) => {
                let tensor = found(checkpoint, part)?;
                let dtype = tensor.float().with_context(|| format!("{}: of a type without fractions", part.tensor))?;
                Origin::Stored { dtype, bytes: tensor.bytes }
            }
            Source::Dummy { seed, .. } => Origin::Random(dummy::Numbers::of(part, adjust, *seed)),
        };
        Ok(Numbers { from, kept: part.kept.clone(), width: part.shape[1..].iter().product(), read: 0, not_finite: 0 })
    }

    /// Where the next `count` numbers lie in the tensor, in runs.
    fn places(&mut self, count: usize) -> Vec<Range<usize>> {
        let (mut runs, mut left) = (Vec::new(), self.read..self.read + count);
        self.read = left.end;
        let Some(kept) = &self.kept else { return vec![left] };
        while !left.is_empty() {
            let (row, first) = (left.start / self.width, left.start % self.width);
            let taken = left.len().min(self.width - first);
            let start = kept[row] * self.width + first;
            runs.push(start..start + taken);
            left.start += taken;
        }
        runs
    }

    /// The next numbers as they are stored.
    fn stored(&mut self, count: usize, dtype: DType, bytes: &'s [u8]) -> Cow<'s, [u8]> {
        let runs = self.places(count);
        let run = |run: &Range<usize>| &bytes[run.start * dtype.size()..run.end * dtype.size()];
        let stored: Cow<[u8]> = match &runs[..] {
            [one] => run(one).into(),
            runs => runs.iter().flat_map(run).copied().collect(),
        };
        self.not_finite += not_finite(&stored, dtype);
        stored
    }

    /// Writes the next numbers to `out` as `weight` has them, as many as there is room for.
    fn next(&mut self, weight: &Weight, scratch: &mut Vec<f32>, out: &mut [u8]) -> Result<()> {
        let count = out.len() / weight.dtype.size();
        if let Origin::Stored { dtype, bytes } = self.from {
            return convert(&self.stored(count, dtype, bytes), (dtype, weight.dtype), weight.adjust, scratch, out);
        }
        scratch.resize(count, 0.0);
        self.next_float32(scratch)?;
        round(scratch, weight.dtype, out)
    }

    /// The next numbers, as many as there is room for.
    fn next_float32(&mut self, out: &mut [f32]) -> Result<()> {
        if let Origin::Stored { dtype, bytes } = self.from {
            return read(&self.stored(out.len(), dtype, bytes), dtype, out);
        }
        let (runs, mut out) = (self.places(out.len()), out);
        let Origin::Random(numbers) = &self.from else { unreachable!("stored ones were read above") };
        for run in runs {
            let (here, rest) = out.split_at_mut(run.len());
            numbers.fill(run.start, here);
            out = rest;
        }
        Ok(())
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

    #[test]
    fn tensors_are_aligned_and_do_not_overlap() {
        let weight = |name: &str, shape: &[usize]| Weight {
            name: name.into(),
            dtype: DType::BFloat16,
            shape: shape.to_vec(),
            parts: vec![Part { tensor: name.into(), shape: shape.to_vec(), kept: None }],
            adjust: Adjust::AsIs,
            alias: None,
        };
        let records = layout(&[weight("a", &[3, 5]), weight("b", &[4096]), weight("c", &[1])]);
        let places: Vec<(u64, u64)> = records.iter().map(|record| (record.offset, record.bytes)).collect();
        assert_eq!(places, [(0, 30), (4096, 8192), (12288, 2)]);
    }
}
