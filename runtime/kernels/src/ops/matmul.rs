//! `MatMulNBits` and `TransposeMatMul`. Both read the weights in place from the mapped file, at memory bandwidth if
//! rows are few.
//!
//! # Design
//! ONNX Runtime's `MatMulNBits` packs the weights anew in each process, which slows the start and takes a second copy,
//! quantizes activations to 8 bits, and is slower than float32 from about eight rows on. This one quantizes activations
//! to 16 bits, an error that is negligible next to that of the weights.
//!
//! ONNX Runtime's `TransposeMatMul` packs the weights once, which slows the start and takes a second copy, or at every
//! call, which makes several beams take twice the time of one. Of the output head, mostly the top k matter: see
//! [`head`](crate::head).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use super::shared::{OfNode, Shared};
use super::{GraphKind, ReadsSource, missing, parallel_for, required_usize_attribute};
#[cfg(target_arch = "x86_64")]
use crate::head::{self, HeadCall, HeadWeights, SparseRows, TopKHead};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx2Token;
#[cfg(target_arch = "x86_64")]
use crate::logits::{AtomicRequest, LogitsRequest, LogitsStats};
#[cfg(target_arch = "x86_64")]
use crate::matmul::Shape;
#[cfg(target_arch = "x86_64")]
use crate::matmul::float::FloatMatMul;
use crate::matmul::quantized::{Format, QuantizedMatMul, Weights};
use crate::source_mask::SourceMask;
#[cfg(target_arch = "x86_64")]
use crate::stats::{Softcap, StatsCell};

/// The multiplication with the head, of which only the top k may be requested.
#[cfg(target_arch = "x86_64")]
#[derive(Clone)]
pub struct HeadMatMul {
    head: Arc<TopKHead>,
    request: Arc<AtomicRequest>,
    stats: Arc<StatsCell>,
    softcap: Softcap,
}

#[cfg(target_arch = "x86_64")]
impl HeadMatMul {
    pub fn new(
        head: Arc<TopKHead>,
        request: Arc<AtomicRequest>,
        stats: Arc<StatsCell>,
        softcap: Softcap,
    ) -> HeadMatMul {
        HeadMatMul { head, request, stats, softcap }
    }

    /// Makes sparse rows the output if they are requested and can be computed, and leaves their statistics, or rows of
    /// no logits if none are requested; returns false if there is no output yet. `to_shape` is that of the output in full.
    fn write_sparse_rows(
        &self,
        context: &ComputeContext,
        scratch: &mut head::Scratch,
        operands: HeadOperands,
        to_shape: &[i64],
    ) -> ort::Result<bool> {
        let request = self.request.get();
        let parallel_for = &|count, task: &(dyn Fn(usize) + Send + Sync)| parallel_for(context, count, task);
        let call = operands.call(request, parallel_for);
        if request == LogitsRequest::Nothing && self.head.is_head(call.shape) {
            let mut shape = to_shape.to_vec();
            *shape.last_mut().expect("the output has the axis of columns") = 0;
            return Ok(context.output(0, shape)?.is_some());
        }
        if !matches!(request, LogitsRequest::TopK { sparse: true, .. }) || !self.head.may_be_sparse(call) {
            return Ok(false);
        }
        let Some(rows) = self.head.sparse_rows(call, &self.softcap, scratch)? else {
            // Too many results may be among the top k: another try would be in vain.
            self.request.set(LogitsRequest::All);
            return Ok(false);
        };
        let SparseRows { tokens, width, results, log_sum_exps } = rows;
        let mut shape = to_shape.to_vec();
        *shape.last_mut().expect("the output has the axis of columns") = width as i64;
        let mut output = context.output(0, shape)?.ok_or_else(|| missing("MatMul", "Y"))?;
        output.try_extract_tensor_mut::<f32>()?.1.copy_from_slice(&results);
        self.stats.set(LogitsStats::sparse(log_sum_exps, tokens));
        Ok(true)
    }

    /// Computes `y` as far as is requested; returns false if all of it has to be computed.
    fn multiply(
        &self,
        context: &ComputeContext,
        scratch: &mut head::Scratch,
        operands: HeadOperands,
        y: &mut [f32],
    ) -> ort::Result<bool> {
        let parallel_for = &|count, task: &(dyn Fn(usize) + Send + Sync)| parallel_for(context, count, task);
        Ok(self.head.multiply(operands.call(self.request.get(), parallel_for), scratch, y)?)
    }
}

/// The operands of a multiplication that may be that with the head.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct HeadOperands<'x> {
    x: &'x [f32],
    w: HeadWeights<'x>,
    shape: Shape,
}

#[cfg(target_arch = "x86_64")]
impl<'x> HeadOperands<'x> {
    fn call(self, request: LogitsRequest, parallel_for: crate::parallel::ParallelFor<'x>) -> HeadCall<'x> {
        let HeadOperands { x, w, shape } = self;
        HeadCall { request, x, w, shape, parallel_for }
    }
}

/// `y = x · wᵀ (+ b)` with block-quantized weights `w [n, k]`, see [`Weights`].
pub struct MatMulNBits {
    pub kind: GraphKind,
    /// Becomes true if the session has such an operator.
    pub is_quantized: Arc<AtomicBool>,
    pub shared: Shared<Format, QuantizedMatMul>,
    pub source_mask: Arc<SourceMask>,
    pub reads_source: ReadsSource,
    #[cfg(target_arch = "x86_64")]
    pub head: Option<HeadMatMul>,
}

impl Operator for MatMulNBits {
    type Kernel<'attr> = MatMulNBitsKernel;

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

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<MatMulNBitsKernel> {
        let attribute = |name: &str| required_usize_attribute(node, "MatMulNBits", name);
        let [n, k, bits, block_size] = [attribute("N")?, attribute("K")?, attribute("bits")?, attribute("block_size")?];
        if !matches!(bits, 4 | 8) || !matches!(block_size, 16 | 32 | 64 | 128) || n == 0 || k == 0 {
            return Err(ort::Error::new(format!(
                "MatMulNBits: expected 4 or 8 bits and blocks of 16, 32, 64 or 128, \
                 found {bits} bits, blocks of {block_size}, N = {n} and K = {k}"
            )));
        }
        let source_mask = self.reads_source.is_true_of(node)?.then(|| self.source_mask.clone());
        self.is_quantized.store(true, Ordering::Relaxed);
        // What is computed once of a source is worth no more bits in the decoder than in the encoder.
        let is_of_source = self.kind == GraphKind::Encoder || source_mask.is_some();
        let format = if is_of_source { Format::Int8 } else { Format::Int16 };
        Ok(MatMulNBitsKernel {
            n,
            k,
            bits,
            block_size,
            source_mask,
            matmul: self.shared.of(format, || QuantizedMatMul::new(format)),
            #[cfg(target_arch = "x86_64")]
            head: self.head.clone(),
            #[cfg(target_arch = "x86_64")]
            scratch: head::Scratch::default(),
        })
    }
}

/// The kernel of a node.
pub struct MatMulNBitsKernel {
    n: usize,
    k: usize,
    bits: usize,
    block_size: usize,
    /// For multiplications with hidden states of sources.
    source_mask: Option<Arc<SourceMask>>,
    matmul: OfNode<QuantizedMatMul>,
    #[cfg(target_arch = "x86_64")]
    head: Option<HeadMatMul>,
    #[cfg(target_arch = "x86_64")]
    scratch: head::Scratch,
}

impl Kernel for MatMulNBitsKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let missing = |port: &str| missing("MatMulNBits", port);
        let inputs = context.num_inputs()?;
        let input = |at: usize| if at < inputs { context.input(at) } else { Ok(None) };
        let (x, codes, scales) = (input(0)?, input(1)?, input(2)?);
        let (x, codes) = (x.ok_or_else(|| missing("A"))?, codes.ok_or_else(|| missing("B"))?);
        let scales = scales.ok_or_else(|| missing("scales"))?;
        let (zero_points, bias) = (input(3)?, input(5)?);

        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let zero_points = zero_points.as_ref().map(|zeros| zeros.try_extract_tensor::<u8>()).transpose()?;
        let weights = Weights {
            codes: codes.try_extract_tensor::<u8>()?.1,
            scales: scales.try_extract_tensor::<f32>()?.1,
            zero_points: zero_points.map(|(_, zeros)| zeros),
            k: self.k,
            bits: self.bits,
            block_size: self.block_size,
        };
        let bias = bias.as_ref().map(|bias| bias.try_extract_tensor::<f32>()).transpose()?.map(|(_, bias)| bias);
        let rows = x.len() / self.k;
        let fits = rows * self.k == x.len() && weights.has_rows(self.n) && bias.is_none_or(|bias| bias.len() == self.n);
        if !fits || shape.last() != Some(&(self.k as i64)) {
            return Err(ort::Error::new(format!("MatMulNBits of {shape} by [{}, {}]", self.n, self.k)));
        }
        let mut to_shape: Vec<i64> = shape.to_vec();
        *to_shape.last_mut().expect("the input has the axis that was checked") = self.n as i64;

        #[cfg(target_arch = "x86_64")]
        let head = self.head.as_ref().filter(|_| bias.is_none());
        #[cfg(target_arch = "x86_64")]
        let operands =
            HeadOperands { x, w: HeadWeights::Quantized(&weights), shape: Shape { rows, n: self.n, k: self.k } };
        #[cfg(target_arch = "x86_64")]
        if let Some(head) = head
            && head.write_sparse_rows(context, &mut self.scratch, operands, &to_shape)?
        {
            return Ok(());
        }
        let mut output = context.output(0, to_shape)?.ok_or_else(|| missing("Y"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;
        #[cfg(target_arch = "x86_64")]
        if let Some(head) = head
            && head.multiply(context, &mut self.scratch, operands, y)?
        {
            return Ok(());
        }
        let parallel_for = &|count, task: &(dyn Fn(usize) + Send + Sync)| parallel_for(context, count, task);
        self.matmul.lock().run(x, &weights, bias, self.source_mask.as_deref(), y, parallel_for)?;
        Ok(())
    }
}

/// `y = x · wᵀ` with `w [n, k]` in float32.
#[cfg(target_arch = "x86_64")]
pub struct TransposeMatMul {
    pub shared: Shared<(), FloatMatMul>,
    pub source_mask: Arc<SourceMask>,
    pub reads_source: ReadsSource,
    pub head: Option<HeadMatMul>,
}

#[cfg(target_arch = "x86_64")]
impl Operator for TransposeMatMul {
    type Kernel<'attr> = TransposeMatMulKernel;

    fn name(&self) -> &str {
        "TransposeMatMul"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32), OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<TransposeMatMulKernel> {
        let attribute = |name: &str| node.get::<i64>(name).unwrap_or(0);
        if attribute("transA") != 0
            || attribute("transB") != 1
            || node.get::<f32>("alpha").is_some_and(|alpha| alpha != 1.0)
        {
            return Err(ort::Error::new("TransposeMatMul: expected transB = 1, transA = 0 and alpha = 1"));
        }
        let (Some(token), Some(head)) = (Avx2Token::new(), self.head.clone()) else {
            return Err(ort::Error::new("TransposeMatMul requires AVX2 and FMA"));
        };
        Ok(TransposeMatMulKernel {
            head,
            scratch: head::Scratch::default(),
            source_mask: self.reads_source.is_true_of(node)?.then(|| self.source_mask.clone()),
            matmul: self.shared.of((), || FloatMatMul::new(token)),
        })
    }
}

/// The kernel of a node.
#[cfg(target_arch = "x86_64")]
pub struct TransposeMatMulKernel {
    head: HeadMatMul,
    scratch: head::Scratch,
    /// For multiplications with hidden states of sources.
    source_mask: Option<Arc<SourceMask>>,
    matmul: OfNode<FloatMatMul>,
}

#[cfg(target_arch = "x86_64")]
impl Kernel for TransposeMatMulKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let missing = |port: &str| missing("TransposeMatMul", port);
        let (x, w) = (context.input(0)?, context.input(1)?);
        let (x, w) = (x.ok_or_else(|| missing("A"))?, w.ok_or_else(|| missing("B"))?);
        let ((x_shape, x), (w_shape, w)) = (x.try_extract_tensor::<f32>()?, w.try_extract_tensor::<f32>()?);
        let (&[n, k], Some(&last)) = (w_shape.as_ref(), x_shape.last()) else {
            return Err(ort::Error::new(format!("TransposeMatMul of {x_shape} by {w_shape}")));
        };
        if last != k || k == 0 {
            return Err(ort::Error::new(format!("TransposeMatMul of {x_shape} by {w_shape}")));
        }
        let mut to_shape: Vec<i64> = x_shape.to_vec();
        *to_shape.last_mut().expect("the input has the axis that was checked") = n;
        let [n, k] = [n as usize, k as usize];
        let shape = Shape { rows: x.len() / k, n, k };
        let operands = HeadOperands { x, w: HeadWeights::Float(w), shape };
        if self.head.write_sparse_rows(context, &mut self.scratch, operands, &to_shape)? {
            return Ok(());
        }
        let mut output = context.output(0, to_shape)?.ok_or_else(|| missing("Y"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;
        if self.head.multiply(context, &mut self.scratch, operands, y)? {
            return Ok(());
        }
        let parallel_for = &|count, task: &(dyn Fn(usize) + Send + Sync)| parallel_for(context, count, task);
        self.matmul.lock().run(x, w, self.source_mask.as_deref(), y, shape, parallel_for)?;
        Ok(())
    }
}
