//! Operators of ONNX Runtime's own domain that this runtime computes itself, on ONNX Runtime's threads. The graphs stay such
//! that ONNX Runtime alone can run them: a kernel given to a session stands before the built-in one of the same name.
//!
//! # Design
//! Two pay, the products with weights of few bits and those with weights in float32: both read the weights as they lie in the
//! mapped file, at the speed of the memory where rows are few.
//!
//! `MatMulNBits`: ONNX Runtime's packs the weights anew for each process, which costs the start and a
//! second copy, rounds activations to 8 bits, and is slower than float32 from some eight rows on. This one rounds activations
//! to 16 bits: an error that is lost beside that of the weights.
//!
//! `TransposeMatMul`: ONNX Runtime's either packs the weights once, which costs the start and a second copy, or at every product,
//! which costs several beams twice the time of one. Of the head of a vocabulary mostly the greatest results alone matter:
//! see [`best`]; and what the search needs to know of all logits comes of the pass that gives them their soft-cap: see [`tanh`].

mod aligned;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[doc(hidden)]
pub mod bench;
#[cfg(target_arch = "x86_64")]
mod best;
mod error;
#[cfg(target_arch = "x86_64")]
mod float;
mod functions;
mod gelu;
pub mod log_softmax;
mod logits;
mod processor;
mod product;
mod sixteen;
mod sources;
mod tanh;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

pub use error::Error;
pub use logits::{LogitsRequest, LogitsStats, LogitsStatsView};
pub use processor::{Level, instructions, level};
use product::{Activations, Columns, Purpose, Weights};
use sources::{ReadsSource, Sources};

/// What a session computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Hidden states of whole sources: products of very many rows, which wait for the processor rather than for the memory. Weights of
    /// few bits meet activations of 8 bits there, where those are faster than 16.
    Encoder,
    /// Scores.
    Decoder,
}

/// The kernels of a session: what they have in common with those of the model's other sessions, and what is wanted of them.
pub struct Kernels {
    wish: Arc<Wish>,
    told: Arc<tanh::Told>,
    sources: Arc<Sources>,
    reads_source: ReadsSource,
    #[cfg(target_arch = "x86_64")]
    copies: Arc<best::Copies>,
}

impl Kernels {
    /// Those for a model whose head has so many rows, and whose logits have this soft-cap. `reads_source` tells by the name of a decoder's
    /// weight whether it is multiplied with the hidden states of the source rather than with states of the target.
    pub fn new(
        vocab_size: usize,
        cap: Option<f64>,
        reads_source: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Kernels {
        Kernels {
            wish: Arc::default(),
            told: Arc::new(tanh::Told::new(vocab_size, cap)),
            sources: Arc::default(),
            reads_source: ReadsSource::new(reads_source),
            #[cfg(target_arch = "x86_64")]
            copies: Arc::new(best::Copies::new(vocab_size, cap.map_or(1.0, |cap| cap as f32))),
        }
    }

    /// Those for another session of the model.
    pub fn beside(&self) -> Kernels {
        Kernels {
            wish: Arc::default(),
            told: Arc::new(self.told.beside()),
            sources: Arc::default(),
            reads_source: self.reads_source.clone(),
            #[cfg(target_arch = "x86_64")]
            copies: self.copies.clone(),
        }
    }

    /// Says what is wanted of the results of the head, before a run, by who has the session to itself. Where a list of them will do, the
    /// run may return logits of any number, of which [`Kernels::summary`] has the tokens.
    pub fn want(&self, wanted: LogitsRequest) {
        let wanted = match wanted {
            // Their sum is that of logits, and what lists them knows of a soft-cap alone how logits come of results.
            LogitsRequest::TopK { log_sum_exp: true, .. } if !self.told.sums() => wanted.dense(),
            wanted => wanted,
        };
        self.wish.set(wanted);
        self.told.take();
    }

    /// Says which tokens of sources are padding, zeros of `mask`, before a run that reads their hidden states, by who has the session to
    /// itself: nothing is computed of those. Without it they are as others.
    pub fn read(&self, mask: &[i64]) {
        self.sources.set(mask);
    }

    /// What was found of the logits of the last run, row after row of whatever positions there are; nothing if no kernel here has made
    /// them.
    pub fn summary(&self) -> Option<LogitsStats> {
        self.told.take()
    }

    #[cfg(target_arch = "x86_64")]
    fn best(&self) -> Best {
        Best { wish: self.wish.clone(), told: self.told.clone(), copies: self.copies.clone() }
    }

    /// The operators to give to the session of this side.
    pub fn operators(&self, side: Side) -> ort::Result<Vec<OperatorDomain>> {
        let in_few_bits = Arc::new(AtomicBool::new(false));
        let mut domains = Vec::new();
        for &(domain, names) in registered() {
            let mut operators = OperatorDomain::new(domain)?;
            for &name in names {
                operators = match name {
                    "Attention" => operators.add(attention::Attention { side, in_few_bits: in_few_bits.clone() })?,
                    "Gelu" => operators.add(gelu::Gelu)?,
                    "Tanh" if side == Side::Decoder => operators.add(tanh::Tanh { told: self.told.clone() })?,
                    "MatMulNBits" => operators.add(MatMulNBits {
                        side,
                        in_few_bits: in_few_bits.clone(),
                        sources: self.sources.clone(),
                        reads_source: self.reads_source.clone(),
                        #[cfg(target_arch = "x86_64")]
                        best: self.best(),
                    })?,
                    "GroupQueryAttention" => operators.add(attention::GroupQueryAttention)?,
                    #[cfg(target_arch = "x86_64")]
                    "TransposeMatMul" => operators.add(TransposeMatMul {
                        best: self.best(),
                        sources: self.sources.clone(),
                        reads_source: self.reads_source.clone(),
                    })?,
                    _ => operators,
                };
            }
            domains.push(operators);
        }
        Ok(domains)
    }
}

/// The name of ONNX Runtime's own domain of operators.
const ONNXRUNTIME: &str = "com.microsoft";

/// Names of operators, by domain.
type Names = &'static [(&'static str, &'static [&'static str])];

/// The operators that kernels here compute on this machine.
fn registered() -> Names {
    faster(processor::level(), processor::has_vector_kernels())
}

/// The operators that kernels of this level compute faster than ONNX Runtime's own, which for the processor are of vector instructions or
/// portable ones.
///
/// Measured with size s-s: against vector kernels, portable products of few bits take 5 to 15 times as long, and the other operators up to
/// twice. Against portable ones (emulated, without AVX) those products take 0.3 to 0.8 times as long and attention 0.6, while `Gelu` takes
/// longer; there is no portable product in float32.
fn faster(level: processor::Level, against_vectors: bool) -> Names {
    match (level, against_vectors) {
        (processor::Level::Generic, true) => &[],
        (processor::Level::Generic, false) => &[("", &["Attention"]), (ONNXRUNTIME, &["MatMulNBits"])],
        _ => &[
            ("", &["Attention", "Gelu", "Tanh"]),
            (ONNXRUNTIME, &["MatMulNBits", "GroupQueryAttention", "TransposeMatMul"]),
        ],
    }
}

fn is_registered(name: &str) -> bool {
    registered().iter().any(|(_, names)| names.contains(&name))
}

/// Whether attention computes nothing for pairs of tokens from different sources, so that sources may share a row.
pub fn attention_skips_other_sources() -> bool {
    is_registered("Attention")
}

/// Whether products of few bits read the weights as they lie in the file. ONNX Runtime's own are only fast with a copy in another layout.
pub fn reads_packed_weights_in_place() -> bool {
    is_registered("MatMulNBits")
}

/// What is wanted of the run of a session that is under way.
#[derive(Debug, Default)]
struct Wish(AtomicU64);

impl Wish {
    fn set(&self, wanted: LogitsRequest) {
        let code = match wanted {
            LogitsRequest::All => 0,
            LogitsRequest::TopK { k, log_sum_exp, sparse } => {
                (k.clamp(1, u32::MAX as usize) as u64) << 2 | u64::from(sparse) << 1 | u64::from(log_sum_exp)
            }
        };
        self.0.store(code, Ordering::Release);
    }

    #[cfg(target_arch = "x86_64")]
    fn get(&self) -> LogitsRequest {
        match self.0.load(Ordering::Acquire) {
            0 => LogitsRequest::All,
            code => LogitsRequest::TopK { k: (code >> 2) as usize, log_sum_exp: code & 1 == 1, sparse: code & 2 == 2 },
        }
    }
}

/// The product with the head, of which only the greatest results may be wanted.
#[cfg(target_arch = "x86_64")]
#[derive(Clone)]
struct Best {
    wish: Arc<Wish>,
    told: Arc<tanh::Told>,
    copies: Arc<best::Copies>,
}

#[cfg(target_arch = "x86_64")]
impl Best {
    /// [`best::Copies::multiply`] by the threads of the session.
    ///
    /// # Safety
    /// As there, but for the processor's features.
    unsafe fn multiply(
        &self,
        context: &ComputeContext,
        room: &mut best::Room,
        operands: (&[f32], best::Table, &mut [f32]),
        sizes: [usize; 3],
    ) -> ort::Result<bool> {
        if !float::is_here() {
            return Ok(false);
        }
        let spread: Spread = &|parts, work| spread(context, parts, work);
        // SAFETY: the features are there; the rest is the caller's.
        unsafe { self.copies.multiply(self.wish.get(), room, operands, sizes, spread) }
    }

    /// Makes the product of `shape [.., k]` with a head `[n, k]` the output, of the wanted results alone, and tells of which tokens these
    /// are, if that will do and can be done; otherwise there is no output yet.
    ///
    /// # Safety
    /// As for [`Best::multiply`].
    unsafe fn list(
        &self,
        context: &ComputeContext,
        room: &mut best::Room,
        (x, table, shape): (&[f32], best::Table, &[i64]),
        sizes: [usize; 3],
    ) -> ort::Result<bool> {
        let wanted = self.wish.get();
        let LogitsRequest::TopK { sparse: true, .. } = wanted else { return Ok(false) };
        if !float::is_here() || !self.copies.may_list(wanted, table, sizes) {
            return Ok(false);
        }
        let spread: Spread = &|parts, work| spread(context, parts, work);
        // SAFETY: the features are there; the rest is the caller's.
        let list = unsafe { self.copies.list((wanted, &self.told), room, (x, table), sizes, spread)? };
        let Some(best::List { tokens, width, results, norms }) = list else {
            // So many may be among the best that another try would be in vain.
            self.wish.set(LogitsRequest::All);
            return Ok(false);
        };
        let mut to = shape.to_vec();
        *to.last_mut().expect("has the axis of k") = width as i64;
        let mut output = context.output(0, to)?.ok_or_else(|| ort::Error::new("the output is missing"))?;
        output.try_extract_tensor_mut::<f32>()?.1.copy_from_slice(&results);
        self.told.tell(LogitsStats::sparse(norms, tokens));
        Ok(true)
    }
}

/// `y = x · wᵀ (+ b)` with `w [n, k]` in blocks of few bits, see `t5gemma_graphs::onnx::Blocks`.
struct MatMulNBits {
    side: Side,
    /// Made true: that there is such a product in the session.
    in_few_bits: Arc<AtomicBool>,
    sources: Arc<Sources>,
    reads_source: ReadsSource,
    #[cfg(target_arch = "x86_64")]
    best: Best,
}

impl Operator for MatMulNBits {
    type Kernel<'attr> = Product;

    fn name(&self) -> &str {
        "MatMulNBits"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::optional(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Int32),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<Product> {
        let attribute = |name: &str| {
            let number = node.get::<i64>(name).and_then(|number| usize::try_from(number).ok());
            number.ok_or_else(|| ort::Error::new(format!("MatMulNBits: {name}: expected a whole number")))
        };
        let [n, k, bits, block_size] = [attribute("N")?, attribute("K")?, attribute("bits")?, attribute("block_size")?];
        if !matches!(bits, 4 | 8) || !matches!(block_size, 16 | 32 | 64 | 128) || n == 0 || k == 0 {
            let expected = "4 or 8 bits and blocks of 16, 32, 64 or 128";
            return Err(ort::Error::new(format!("MatMulNBits: expected {expected}, found {bits} and {block_size}")));
        }
        let sources = self.reads_source.of(node)?.then(|| self.sources.clone());
        self.in_few_bits.store(true, Ordering::Relaxed);
        Ok(Product {
            n,
            k,
            bits,
            block_size,
            // What is computed once of a source is worth no more bits in the decoder than in the encoder.
            purpose: if self.side == Side::Encoder || sources.is_some() { Purpose::Coarse } else { Purpose::Whole },
            sources,
            activations: Activations::default(),
            #[cfg(target_arch = "x86_64")]
            best: (self.best.clone(), best::Room::default()),
        })
    }
}

/// The kernel of one node.
struct Product {
    n: usize,
    k: usize,
    bits: usize,
    block_size: usize,
    purpose: Purpose,
    /// Of what reads sources, which of their tokens are there.
    sources: Option<Arc<Sources>>,
    /// Kept for their allocation.
    activations: Activations,
    #[cfg(target_arch = "x86_64")]
    best: (Best, best::Room),
}

/// Weights below this many bytes are not worth waking another thread for.
const SHARED_FROM: usize = 96 << 10;
/// Bytes of weights that one thread takes at a time: at least, and where there are many.
const SHARE: usize = 128 << 10;
const SHARE_OF_MANY: usize = 512 << 10;
/// So many rows of activations make the products themselves the work, of which each thread is to have as much as the others.
const MANY_ROWS: usize = 8;
/// Bytes of weights that one thread takes at a time, at least, where there are so many rows.
const SHARE_OF_ROWS: usize = 32 << 10;

impl Kernel for Product {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let missing = |what: &str| ort::Error::new(format!("MatMulNBits: {what} is missing"));
        let inputs = context.num_inputs()?;
        let input = |at: usize| if at < inputs { context.input(at) } else { Ok(None) };
        let (x, numbers, scales) = (input(0)?, input(1)?, input(2)?);
        let (x, numbers) = (x.ok_or_else(|| missing("A"))?, numbers.ok_or_else(|| missing("B"))?);
        let scales = scales.ok_or_else(|| missing("scales"))?;
        let (zero_points, bias) = (input(3)?, input(5)?);

        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let zero_points = zero_points.as_ref().map(|zeros| zeros.try_extract_tensor::<u8>()).transpose()?;
        let weights = Weights {
            numbers: numbers.try_extract_tensor::<u8>()?.1,
            scales: scales.try_extract_tensor::<f32>()?.1,
            zero_points: zero_points.map(|(_, zeros)| zeros),
            k: self.k,
            bits: self.bits,
            block_size: self.block_size,
        };
        let bias = bias.as_ref().map(|bias| bias.try_extract_tensor::<f32>()).transpose()?.map(|(_, bias)| bias);
        let rows = x.len() / self.k;
        let fits = rows * self.k == x.len() && weights.is_of(self.n) && bias.is_none_or(|bias| bias.len() == self.n);
        if !fits || shape.last() != Some(&(self.k as i64)) {
            return Err(ort::Error::new(format!("MatMulNBits of {shape} by [{}, {}]", self.n, self.k)));
        }

        #[cfg(target_arch = "x86_64")]
        if bias.is_none() {
            let (best, room) = &mut self.best;
            let operands = (x, best::Table::Packed(&weights), &shape[..]);
            // SAFETY: weights are the same as long as the model is open.
            if unsafe { best.list(context, room, operands, [rows, self.n, self.k])? } {
                return Ok(());
            }
        }
        let mut to: Vec<i64> = shape.to_vec();
        *to.last_mut().expect("has the axis that was looked at") = self.n as i64;
        let mut output = context.output(0, to)?.ok_or_else(|| missing("the output"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;

        #[cfg(target_arch = "x86_64")]
        if bias.is_none() {
            let (best, room) = &mut self.best;
            let operands = (x, best::Table::Packed(&weights), &mut *y);
            // SAFETY: weights are the same as long as the model is open.
            if unsafe { best.multiply(context, room, operands, [rows, self.n, self.k])? } {
                return Ok(());
            }
        }
        self.activations.prepare(rows, &weights, self.purpose);
        let target = self.activations.target();
        let together = self.activations.rounded_together();
        let spans = Sources::spans(self.sources.as_deref(), rows, together);
        sources::clear_between(&spans, y, self.n);
        let rounded = sources::steps(&spans, together);
        spread(context, rounded.len(), &|share| {
            let first = rounded[share] * together;
            for row in first..rows.min(first + together) {
                // SAFETY: every row is rounded by one call only, into room that was made for all of them.
                unsafe { target.round(row, &x[row * self.k..][..self.k], &weights) };
            }
        })?;

        let bytes = numbers_in_a_row(&weights) * self.n;
        let taken = match rows {
            0..MANY_ROWS => (bytes / 16).clamp(SHARE, SHARE_OF_MANY),
            _ => (bytes / 16).clamp(SHARE_OF_ROWS, SHARE),
        };
        let taken = taken / numbers_in_a_row(&weights);
        let share = if bytes < SHARED_FROM && rows < MANY_ROWS { self.n } else { taken.clamp(8, self.n.max(8)) };
        // Whole panels.
        let share = share.next_multiple_of(32);
        let y = product::Output::new(y, rows, self.n);
        let activations = &self.activations;
        spread(context, self.n.div_ceil(share), &|part| {
            let columns = part * share..self.n.min((part + 1) * share);
            for span in &spans {
                let of = (span.clone(), Columns::All(columns.clone()));
                // SAFETY: every column of a row is computed by one call only.
                unsafe { product::multiply(activations, &weights, bias, of, &y) };
            }
        })
    }
}

/// `y = x · wᵀ` with `w [n, k]` in float32.
#[cfg(target_arch = "x86_64")]
struct TransposeMatMul {
    best: Best,
    sources: Arc<Sources>,
    reads_source: ReadsSource,
}

#[cfg(target_arch = "x86_64")]
impl Operator for TransposeMatMul {
    type Kernel<'attr> = FloatProduct;

    fn name(&self) -> &str {
        "TransposeMatMul"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32), OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<FloatProduct> {
        let number = |name: &str, default: i64| node.get::<i64>(name).unwrap_or(default);
        if number("transA", 0) != 0
            || number("transB", 0) != 1
            || node.get::<f32>("alpha").is_some_and(|alpha| alpha != 1.0)
        {
            return Err(ort::Error::new("TransposeMatMul: expected transB alone"));
        }
        Ok(FloatProduct {
            best: self.best.clone(),
            room: best::Room::default(),
            sources: self.reads_source.of(node)?.then(|| self.sources.clone()),
            tiles: float::Tiles::default(),
        })
    }
}

/// The kernel of one node.
#[cfg(target_arch = "x86_64")]
struct FloatProduct {
    best: Best,
    room: best::Room,
    /// Of what reads sources, which of their tokens are there.
    sources: Option<Arc<Sources>>,
    /// Kept for their allocation.
    tiles: float::Tiles,
}

/// Bytes of float32 weights that one thread takes at a time: a part of its second cache, which all rows then find them in.
#[cfg(target_arch = "x86_64")]
const FLOAT_SHARE: usize = 192 << 10;
/// The most rows of activations that one thread takes at a time: larger caches keep them.
#[cfg(target_arch = "x86_64")]
const FLOAT_ROWS: usize = 512;
/// Bytes of float32 weights that one thread takes at a time where few rows read them once.
#[cfg(target_arch = "x86_64")]
const FLOAT_SHARE_OF_FEW: usize = 1 << 20;

#[cfg(target_arch = "x86_64")]
impl Kernel for FloatProduct {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let missing = |what: &str| ort::Error::new(format!("TransposeMatMul: {what} is missing"));
        let (x, w) = (context.input(0)?, context.input(1)?);
        let (x, w) = (x.ok_or_else(|| missing("A"))?, w.ok_or_else(|| missing("B"))?);
        let ((shape, x), (of_weights, w)) = (x.try_extract_tensor::<f32>()?, w.try_extract_tensor::<f32>()?);
        let ([n, k], Some(last)) = (of_weights.as_ref(), shape.last()) else {
            return Err(ort::Error::new(format!("TransposeMatMul of {shape} by {of_weights}")));
        };
        if last != k || *k == 0 {
            return Err(ort::Error::new(format!("TransposeMatMul of {shape} by {of_weights}")));
        }
        let mut to: Vec<i64> = shape.to_vec();
        *to.last_mut().expect("has the axis that was looked at") = *n;
        let [n, k] = [*n as usize, *k as usize];
        let rows = x.len() / k;
        let operands = (x, best::Table::Float(w), &shape[..]);
        // SAFETY: weights are the same as long as the model is open.
        if unsafe { self.best.list(context, &mut self.room, operands, [rows, n, k])? } {
            return Ok(());
        }
        let mut output = context.output(0, to)?.ok_or_else(|| missing("the output"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;

        let operands = (x, best::Table::Float(w), &mut *y);
        // SAFETY: weights are the same as long as the model is open.
        if unsafe { self.best.multiply(context, &mut self.room, operands, [rows, n, k])? } {
            return Ok(());
        }
        let mut step = 1;
        if float::takes_tiles(rows) {
            self.tiles.prepare(rows, k);
            step = self.tiles.height();
        }
        let spans = Sources::spans(self.sources.as_deref(), rows, step);
        sources::clear_between(&spans, y, n);
        let mut product = float::Product::new(x, w, y, [rows, n, k]);
        if float::takes_tiles(rows) {
            let target = self.tiles.target();
            let tiles = sources::steps(&spans, step);
            // SAFETY: the features are there where tiles are taken, and each is filled by one call only.
            spread(context, tiles.len(), &|tile| unsafe { target.fill(tiles[tile], x) })?;
            product = product.in_tiles(&self.tiles);
        }
        // As many rows at a time as others, but for the last ones of a span.
        let height = evenly(rows, FLOAT_ROWS).next_multiple_of(step);
        let parts_of = |span: &Range<usize>| {
            let end = span.end;
            (span.start..end).step_by(height).map(move |first| first..end.min(first + height)).collect::<Vec<_>>()
        };
        let parts_of_rows: Vec<Range<usize>> = spans.iter().flat_map(parts_of).collect();
        // Spans of a few rows each take the same columns one after the other, whose weights the cache then has.
        let [outer, inner] = if spans.len() > 1 { [1, parts_of_rows.len()] } else { [parts_of_rows.len(), 1] };
        let all = n * k * 4;
        let bytes = match rows {
            0..8 if all < 2 * SHARED_FROM => all,
            // As many parts as keep every thread of a large machine busy.
            0..8 => (all / 16).clamp(FLOAT_SHARE, FLOAT_SHARE_OF_FEW),
            _ => (all / 16).clamp(FLOAT_SHARE / 4, FLOAT_SHARE),
        };
        let width = float::width(rows);
        let share = (bytes / 4 / k / width * width).clamp(width, n.max(width));
        let parts = n.div_ceil(share);
        spread(context, parts * outer, &|part| {
            let (first, part) = (part / parts * inner, part % parts);
            for rows in &parts_of_rows[first..first + inner] {
                let of = [rows.clone(), part * share..n.min((part + 1) * share)];
                // SAFETY: the operator is given to no session without the features, and every column of a row is computed by one call.
                unsafe { float::multiply(&product, of) };
            }
        })
    }
}

/// Does the parts `0..count` of some work, on several threads.
type Spread<'s> = &'s dyn Fn(usize, &(dyn Fn(usize) + Send + Sync)) -> ort::Result<()>;

/// A [`Spread`] of one thread.
#[cfg(test)]
fn alone(parts: usize, work: &(dyn Fn(usize) + Send + Sync)) -> ort::Result<()> {
    (0..parts).for_each(work);
    Ok(())
}

/// How many of `count` are taken at a time where that is at most `most`: as many each time, but for the last.
#[cfg(target_arch = "x86_64")]
fn evenly(count: usize, most: usize) -> usize {
    count.div_ceil(count.div_ceil(most).max(1)).max(1)
}

/// Has the session's threads do the parts of some work, each taking the next when it is done with one: parts that are dealt out
/// beforehand wait for the thread that the system holds up.
fn spread(context: &ComputeContext, parts: usize, work: &(dyn Fn(usize) + Send + Sync)) -> ort::Result<()> {
    match parts {
        0 => Ok(()),
        1 => {
            work(0);
            Ok(())
        }
        // ONNX Runtime deals `parts` out to as many batches, and its threads take batches as they come.
        _ => context.par_for(parts, parts, work),
    }
}

/// Memory that several threads write different parts of.
struct Parts<T> {
    start: *mut T,
    length: usize,
}

// SAFETY: plain memory; who writes where is what `Parts::of` asks its callers to see to.
unsafe impl<T: Send> Send for Parts<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// Of `all`, which must outlive it.
    fn new(all: &mut [T]) -> Parts<T> {
        Parts { start: all.as_mut_ptr(), length: all.len() }
    }

    fn start(&self) -> *const T {
        self.start
    }

    /// # Safety
    /// The memory that this was made of lives, and no one else reads or writes this part of it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn of(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "a part of {}", self.length);
        // SAFETY: within the memory; the rest is the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

fn numbers_in_a_row(weights: &Weights) -> usize {
    weights.k.div_ceil(weights.block_size) * weights.block_size * weights.bits / 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use processor::Level;

    #[test]
    fn no_kernel_is_registered_that_is_slower_than_what_it_replaces() {
        let names = |level, against_vectors| -> Vec<&str> {
            faster(level, against_vectors).iter().flat_map(|(_, names)| names.iter().copied()).collect()
        };
        let all = ["Attention", "Gelu", "Tanh", "MatMulNBits", "GroupQueryAttention", "TransposeMatMul"];
        for level in [Level::Avx2, Level::Vnni, Level::Amx] {
            assert_eq!(names(level, true), all, "{level:?}");
        }
        assert_eq!(names(Level::Generic, true), [""; 0], "aarch64, or x86-64 that leaves AVX2 alone");
        assert_eq!(names(Level::Generic, false), ["Attention", "MatMulNBits"], "x86-64 without AVX2");
        // A processor with AVX2 has it used by ONNX Runtime, whatever level the kernels here are held to.
        assert!(processor::found() < Level::Avx2 || processor::has_vector_kernels());
    }
}
