//! The weights file that all graphs share: the layout of its tensors, and streaming their bytes into it. Memory use is
//! a few chunks, whatever the model's size, plus the scales of one quantized matrix.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use sha2::{Digest, Sha256};
use t5gemma_graphs::manifest::{FileRecord, SAMPLE_BLOCK, TensorRecord, WeightsRecord, sample_offsets};
use t5gemma_graphs::onnx::{Adjust, Blocks, Code, DType, Part};

use crate::adapter::MergedTensor;
use crate::convert::{Conversion, Overflow, count_not_finite, round, to_float32};
use crate::dummy::RandomTensor;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::quantize::{QuantizedRows, float8_scale, quantize, quantize_float8, quantize_signed};
use crate::source::Source;
use crate::weights::Weight;

/// Alignment of every tensor, so that each can be memory-mapped by itself.
const ALIGNMENT: u64 = 4096;
/// Elements converted at a time.
const CHUNK: usize = 2 << 20;

/// Where each weight will be, in the order given.
pub fn layout(weights: &[Weight]) -> Vec<TensorRecord> {
    let mut end = 0_u64;
    let mut records: Vec<TensorRecord> = Vec::with_capacity(weights.len());
    for weight in weights {
        let same = weight.alias.map(|earlier| &records[earlier]);
        let offset = same.map_or(end.next_multiple_of(ALIGNMENT), |same| same.offset);
        let record = TensorRecord {
            name: weight.name.clone(),
            role: weight.role,
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

/// A weights file that was written.
pub struct WrittenWeights {
    /// For the manifest.
    pub record: WeightsRecord,
    /// The tensors that have NaNs or infinities, and how many.
    pub not_finite: Vec<(String, u64)>,
}

/// Writes the weights file with the [`layout`] of `weights`.
///
/// # Errors
/// A full disk or another failure of the file, a number that does not fit its type, or a cancellation by `progress`.
pub fn write(path: &Path, weights: &[Weight], source: &Source, progress: &dyn Progress) -> Result<WrittenWeights> {
    let tensors = layout(weights);
    let total = tensors.iter().map(|tensor| tensor.offset + tensor.bytes).max().unwrap_or(0);
    progress.started(total);
    let failed = |error| Error::io(path, format!("cannot be written ({total} bytes are needed in all)"))(error);
    let file = File::options().create_new(true).read(true).write(true).open(path).map_err(failed)?;
    let mut writer = Writer {
        output: Output { file, hashing: Hashing::start(), written: 0 },
        source,
        progress,
        scratch: Vec::new(),
        quantized: QuantizedRows::default(),
        not_finite: BTreeMap::new(),
        failed: &failed,
    };
    for (weight, record) in weights.iter().zip(&tensors).filter(|(weight, _)| weight.alias.is_none()) {
        writer.pad_to(record.offset)?;
        writer.write(weight)?;
    }
    let Writer { output: Output { mut file, hashing, .. }, not_finite, .. } = writer;
    let sha256 = hashing.finish();
    let sample_sha256 = sample(&mut file, total).map_err(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let record = WeightsRecord { file: name, record: FileRecord { bytes: total, sha256 }, sample_sha256, tensors };
    Ok(WrittenWeights { record, not_finite: not_finite.into_iter().collect() })
}

/// The weights file while it is being written, weight after weight.
struct Writer<'w> {
    output: Output,
    source: &'w Source,
    progress: &'w dyn Progress,
    /// Elements in float32.
    scratch: Vec<f32>,
    /// Scales and zero points of the last quantized matrix, which are weights of their own and follow it.
    quantized: QuantizedRows,
    /// NaNs and infinities by tensor.
    not_finite: BTreeMap<String, u64>,
    /// Converts an I/O error of the file.
    failed: &'w dyn Fn(std::io::Error) -> Error,
}

/// Quantizes some rows.
type Quantizer = Box<dyn Fn(&[f32]) -> QuantizedRows + Sync>;

impl Writer<'_> {
    fn pad_to(&mut self, offset: u64) -> Result<()> {
        let mut padding = self.output.hashing.buffer();
        padding.clear();
        padding.resize((offset - self.output.written) as usize, 0);
        self.output.put(padding).map_err(self.failed)
    }

    fn write(&mut self, weight: &Weight) -> Result<()> {
        match weight.adjust {
            Adjust::Scales(_) => {
                let mut scales = vec![0; self.quantized.scales.len() * weight.dtype.size()];
                let rounded = round(&self.quantized.scales, weight.dtype, &mut scales);
                rounded.map_err(|overflow| does_not_fit(&weight.name, overflow))?;
                self.write_bytes(&scales)
            }
            Adjust::ZeroPoints(_) => {
                let zero_points = std::mem::take(&mut self.quantized.zero_points);
                self.write_bytes(&zero_points)
            }
            Adjust::Packed(_) | Adjust::Signed(_) => {
                self.quantized = QuantizedRows::default();
                if let Adjust::Signed(Blocks { code: Code::Float8E4M3FN, .. }) = weight.adjust {
                    let scale = float8_scale(self.largest(weight)?);
                    self.quantized.scales.push(scale);
                }
                weight.parts.iter().try_for_each(|part| self.write_part(weight, part))
            }
            Adjust::AsIs | Adjust::OnePlus => weight.parts.iter().try_for_each(|part| self.write_part(weight, part)),
        }
    }

    fn write_bytes(&mut self, all: &[u8]) -> Result<()> {
        for chunk in all.chunks(CHUNK) {
            let mut bytes = self.output.hashing.buffer();
            bytes.clear();
            bytes.extend_from_slice(chunk);
            self.progress.advanced(bytes.len() as u64);
            self.output.put(bytes).map_err(self.failed)?;
        }
        Ok(())
    }

    fn write_part(&mut self, weight: &Weight, part: &Part) -> Result<()> {
        let mut elements = Elements::new(part, weight.adjust, self.source)?;
        let (count, row) = (part.numbers(), part.shape.last().copied().unwrap_or(1));
        let quantizer: Option<Quantizer> = match (weight.adjust, self.quantized.scales.first()) {
            (Adjust::Packed(blocks), _) => Some(Box::new(move |rows| quantize(rows, row, blocks))),
            (Adjust::Signed(Blocks { code: Code::Float8E4M3FN, .. }), Some(&scale)) => {
                Some(Box::new(move |rows| quantize_float8(rows, scale)))
            }
            (Adjust::Signed(blocks), _) => Some(Box::new(move |rows| quantize_signed(rows, row, blocks))),
            _ => None,
        };
        let chunk = if quantizer.is_some() { (CHUNK / row).max(1) * row } else { CHUNK };
        for first in (0..count).step_by(chunk) {
            self.check_cancelled()?;
            let mut bytes = self.output.hashing.buffer();
            let chunk = chunk.min(count - first);
            if let Some(quantizer) = &quantizer {
                self.scratch.resize(chunk, 0.0);
                elements.next_float32(&mut self.scratch);
                bytes.clear();
                quantize_in_parallel(&self.scratch, row, quantizer, &mut bytes, &mut self.quantized);
            } else {
                bytes.resize(chunk * weight.dtype.size(), 0);
                let converted = elements.next(weight, &mut self.scratch, &mut bytes);
                converted.map_err(|overflow| does_not_fit(&self.source.place(&part.tensor), overflow))?;
            }
            self.progress.advanced(bytes.len() as u64);
            self.output.put(bytes).map_err(self.failed)?;
        }
        if elements.not_finite > 0 {
            let found = self.not_finite.entry(part.tensor.clone()).or_default();
            // A tensor may be in the file more than once.
            *found = elements.not_finite.max(*found);
        }
        Ok(())
    }

    /// The largest magnitude in a weight, which must be finite.
    fn largest(&mut self, weight: &Weight) -> Result<f32> {
        let mut largest = 0.0_f32;
        for part in &weight.parts {
            let mut elements = Elements::new(part, weight.adjust, self.source)?;
            let count = part.numbers();
            for first in (0..count).step_by(CHUNK) {
                self.check_cancelled()?;
                self.scratch.resize(CHUNK.min(count - first), 0.0);
                elements.next_float32(&mut self.scratch);
                for &x in &self.scratch {
                    if !x.is_finite() {
                        let place = self.source.place(&part.tensor);
                        return Err(Error::invalid(place, "finite numbers for fp8", x.to_string()));
                    }
                    largest = largest.max(x.abs());
                }
            }
        }
        Ok(largest)
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// The error for a number beyond float16's range.
fn does_not_fit(place: &str, Overflow(number): Overflow) -> Error {
    let found = format!("{number} (export as float32, or for a GPU as bfloat16)");
    Error::invalid(place, "numbers up to 65504 for float16", found)
}

/// Quantizes rows of `k` elements on all cores: appends their codes to `bytes`, their scales and zero points to
/// `quantized`.
fn quantize_in_parallel(
    rows: &[f32],
    k: usize,
    quantizer: &Quantizer,
    bytes: &mut Vec<u8>,
    quantized: &mut QuantizedRows,
) {
    let threads = thread::available_parallelism().map_or(1, Into::into);
    let share = (rows.len() / k).div_ceil(threads).max(1) * k;
    thread::scope(|scope| {
        let shares: Vec<_> = rows.chunks(share).map(|rows| scope.spawn(move || quantizer(rows))).collect();
        for share in shares {
            quantized.append(share.join().expect("quantizing does not panic"));
        }
    });
    bytes.append(&mut quantized.codes);
}

/// The elements of one tensor, or of the rows that are kept of it, read chunk by chunk.
struct Elements<'s> {
    origin: Origin<'s>,
    kept: Option<Arc<[usize]>>,
    /// Elements in a row.
    width: usize,
    /// Elements read so far.
    read: usize,
    /// NaNs and infinities among them.
    not_finite: u64,
}

enum Origin<'s> {
    Stored { dtype: DType, bytes: &'s [u8] },
    Merged(MergedTensor<'s>),
    Random(RandomTensor),
}

impl<'s> Elements<'s> {
    fn new(part: &Part, adjust: Adjust, source: &'s Source) -> Result<Elements<'s>> {
        let origin = match source {
            Source::Checkpoint(checkpoint) => {
                let missing = || Error::invalid(checkpoint.folder().display(), "a tensor", "none").of(&part.tensor);
                let tensor = checkpoint.tensor(&part.tensor).ok_or_else(missing)?;
                let dtype = tensor.float().ok_or_else(missing)?;
                match checkpoint.merged(&part.tensor) {
                    Some(merged) => Origin::Merged(merged),
                    None => Origin::Stored { dtype, bytes: tensor.bytes },
                }
            }
            Source::Dummy { seed, .. } => Origin::Random(RandomTensor::new(part, adjust, *seed)),
        };
        let width = part.shape[1..].iter().product();
        Ok(Elements { origin, kept: part.kept.clone(), width, read: 0, not_finite: 0 })
    }

    /// Where the next `count` elements are in the tensor, as contiguous ranges.
    fn ranges(&mut self, count: usize) -> Vec<Range<usize>> {
        let (mut ranges, mut left) = (Vec::new(), self.read..self.read + count);
        self.read = left.end;
        let Some(kept) = &self.kept else { return vec![left] };
        while !left.is_empty() {
            let (row, first) = (left.start / self.width, left.start % self.width);
            let taken = left.len().min(self.width - first);
            let start = kept[row] * self.width + first;
            ranges.push(start..start + taken);
            left.start += taken;
        }
        ranges
    }

    /// The next elements as they are stored.
    fn stored(&mut self, count: usize, dtype: DType, bytes: &'s [u8]) -> Cow<'s, [u8]> {
        let ranges = self.ranges(count);
        let slice = |range: &Range<usize>| &bytes[range.start * dtype.size()..range.end * dtype.size()];
        let stored: Cow<[u8]> = match &ranges[..] {
            [range] => slice(range).into(),
            ranges => ranges.iter().flat_map(slice).copied().collect(),
        };
        self.not_finite += count_not_finite(&stored, dtype);
        stored
    }

    /// Fills `out` with the next elements, converted as `weight` has them.
    fn next(&mut self, weight: &Weight, scratch: &mut Vec<f32>, out: &mut [u8]) -> Result<(), Overflow> {
        let count = out.len() / weight.dtype.size();
        if let Origin::Stored { dtype, bytes } = self.origin {
            let conversion = Conversion { from: dtype, to: weight.dtype, adjust: weight.adjust };
            return conversion.apply(&self.stored(count, dtype, bytes), scratch, out);
        }
        scratch.resize(count, 0.0);
        self.next_float32(scratch);
        round(scratch, weight.dtype, out)
    }

    /// Fills `out` with the next elements.
    fn next_float32(&mut self, out: &mut [f32]) {
        if let Origin::Stored { dtype, bytes } = self.origin {
            return to_float32(&self.stored(out.len(), dtype, bytes), dtype, out);
        }
        let (ranges, mut out) = (self.ranges(out.len()), out);
        for range in ranges {
            let (here, rest) = out.split_at_mut(range.len());
            match &self.origin {
                Origin::Random(random) => random.fill(range.start, here),
                Origin::Merged(merged) => {
                    merged.fill(range.start, here);
                    self.not_finite += here.iter().filter(|x| !x.is_finite()).count() as u64;
                }
                Origin::Stored { .. } => unreachable!("stored elements were read above"),
            }
            out = rest;
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

/// SHA-256 on its own thread, so that hashing overlaps with converting and writing the next chunks. Buffers are reused:
/// page faults of new ones would cost more than the conversion.
struct Hashing {
    chunks: SyncSender<Vec<u8>>,
    used: Receiver<Vec<u8>>,
    thread: JoinHandle<String>,
}

impl Hashing {
    fn start() -> Hashing {
        // Bounds the memory: two chunks in the channel, one in each thread.
        let (chunks, received) = sync_channel::<Vec<u8>>(2);
        let (back, used) = channel();
        let thread = thread::spawn(move || {
            let mut hash = Sha256::new();
            for chunk in received {
                hash.update(&chunk);
                // The last buffers have no receiver.
                let _ = back.send(chunk);
            }
            hex::encode(hash.finalize())
        });
        Hashing { chunks, used, thread }
    }

    /// A buffer with arbitrary content: one that has been hashed, or else a new one. Every chunk must come from here,
    /// so that there are never more buffers than can be in flight at once.
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
    use t5gemma_graphs::tensors::Role;

    #[test]
    fn tensors_are_aligned_and_do_not_overlap() {
        let weight = |name: &str, shape: &[usize]| Weight {
            name: name.into(),
            dtype: DType::BFloat16,
            shape: shape.to_vec(),
            parts: vec![Part { tensor: name.into(), shape: shape.to_vec(), kept: None }],
            adjust: Adjust::AsIs,
            role: Role::Decoder,
            alias: None,
        };
        let records = layout(&[weight("a", &[3, 5]), weight("b", &[4096]), weight("c", &[1])]);
        let places: Vec<(u64, u64)> = records.iter().map(|record| (record.offset, record.bytes)).collect();
        assert_eq!(places, [(0, 30), (4096, 8192), (12288, 2)]);
    }
}
