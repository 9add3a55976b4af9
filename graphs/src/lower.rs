//! How a composite operator is written for a target. The model definition calls these methods and does not change when a
//! target is added: a target overrides what its runtime does better than the portable form given here.
//!
//! Which type each part computes in is part of the contract: what must stay float32 in half precision (norms, soft-caps,
//! softmax) is cast here, where it is done.

mod cpu;
mod cuda;
mod tensorrt;

use crate::attention::{self, KeyValue, Tokens};
use crate::config::Config;
use crate::decoder::Context;
use crate::interface::CacheLayout;
use crate::nn::{Weights, softcap};
use crate::onnx::{DType, Dim, Packed, Value};

/// A runtime that graphs are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard operators only, for any runtime that reads ONNX.
    Portable,
    /// ONNX Runtime on a CPU.
    Cpu,
    /// ONNX Runtime on an NVIDIA GPU by its CUDA provider.
    Cuda,
    /// TensorRT, by itself or as a provider of ONNX Runtime.
    TensorRt,
}

impl Target {
    /// Every target.
    pub const ALL: [Target; 4] = [Target::Portable, Target::Cpu, Target::Cuda, Target::TensorRt];

    /// The name on the command line and in a manifest.
    pub fn name(self) -> &'static str {
        match self {
            Target::Portable => "portable",
            Target::Cpu => "cpu",
            Target::Cuda => "cuda",
            Target::TensorRt => "tensorrt",
        }
    }

    /// Version of the standard operator set.
    pub fn opset(self) -> u32 {
        match self {
            // The newest that has everything used and that TensorRT reads.
            Target::Portable => 20,
            // The first with Attention.
            Target::Cpu | Target::Cuda => 23,
            // The first with packed matrices, and the last whose operators every TensorRT 10 reads.
            Target::TensorRt => 21,
        }
    }

    /// Types of weights and activations that the runtime computes in.
    pub fn dtypes(self) -> &'static [DType] {
        match self {
            Target::Portable | Target::Cuda | Target::TensorRt => &[DType::Float32, DType::Float16, DType::BFloat16],
            // Halves are computed there by casts to float32, one for each use of a weight.
            Target::Cpu => &[DType::Float32],
        }
    }

    /// The type to export in unless another is asked for.
    pub fn default_dtype(self) -> DType {
        match self {
            Target::Portable | Target::Cpu => DType::Float32,
            Target::Cuda | Target::TensorRt => DType::BFloat16,
        }
    }

    /// Whether matrices can be held in few bits.
    pub fn reads_packed(self) -> bool {
        self != Target::Portable
    }

    /// Whether these are signed numbers of 4 bits with positive scales, as standard operators have them.
    pub fn signs_packed(self) -> bool {
        self == Target::TensorRt
    }

    /// Whether the graphs are for a device with a memory of its own.
    pub fn is_device(self) -> bool {
        matches!(self, Target::Cuda | Target::TensorRt)
    }

    /// Whether several sources may lie side by side in a row of the encoder, which is worth it where what is computed for
    /// padding is lost.
    pub(crate) fn reads_side_by_side(self) -> bool {
        self == Target::Cpu
    }

    /// Whether the cache can be given a fixed capacity.
    pub fn has_static_cache(self) -> bool {
        self == Target::TensorRt
    }

    /// How the keys and values of the target pass from step to step, unless they are given a fixed capacity.
    pub(crate) fn cache(self, config: &Config) -> CacheLayout {
        match self {
            Target::Cpu | Target::Cuda if config.decoder.head_dim.is_multiple_of(cpu::HEAD_DIM) => CacheLayout::InPlace,
            _ => CacheLayout::Growing,
        }
    }

    pub(crate) fn lowering(self) -> &'static dyn Lowering {
        match self {
            Target::Portable => &Portable,
            Target::Cpu => &cpu::Cpu,
            Target::Cuda => &cuda::Cuda,
            Target::TensorRt => &tensorrt::TensorRt,
        }
    }
}

/// A weight matrix `[out, in]`, as it is held.
#[derive(Clone, Copy)]
pub enum Matrix<'g> {
    /// Its numbers.
    Plain(Value<'g>),
    /// In few bits.
    Packed(Packed<'g>),
}

/// Attention over given keys and values.
pub struct Attention<'g> {
    /// Queries, `[batch, queries, heads, head_dim]`.
    pub query: Value<'g>,
    /// Keys and values, `[batch, kv_heads, keys, head_dim]` each; a query head `i` uses `i / (heads / kv_heads)`.
    pub key_value: KeyValue<'g>,
    /// Which keys a query sees: bool, broadcast against `[batch, kv_heads, group, queries, keys]`.
    pub visible: Value<'g>,
    /// Factor of the scores.
    pub scale: f64,
    /// Soft-cap of the scaled scores.
    pub cap: Option<f64>,
}

pub trait Lowering {
    /// `x · wᵀ (+ b)`: x `[tokens, in]`, w `[out, in]`, b `[out]`, all of one type.
    fn linear<'g>(&self, x: Value<'g>, weight: Matrix<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        match weight {
            Matrix::Plain(weight) => x.gemm(weight, bias),
            Matrix::Packed(weight) => x.matmul_nbits(weight, bias),
        }
    }

    /// `softcap(x · tableᵀ)` in float32, `[rows, positions, vocab_size]`: x `[rows·positions, hidden]`, table
    /// `[vocab_size, hidden]`.
    fn logits<'g>(&self, x: Value<'g>, table: Matrix<'g>, cap: Option<f64>, [rows, positions]: [Dim; 2]) -> Value<'g> {
        let scores = softcap(self.linear(x, table, None).cast(DType::Float32), cap);
        let vocab_size = scores.dim(-1);
        scores.reshape(&[rows, positions, vocab_size])
    }

    /// `x / √(mean(x²) + ε) · factor`: x `[tokens, hidden]` and factor `[hidden]` in float32.
    fn rms_norm<'g>(&self, x: Value<'g>, factor: Value<'g>, eps: f64) -> Value<'g> {
        x / ((x * x).mean() + eps).sqrt() * factor
    }

    /// `x·cos + [−x₂, x₁]·sin` over the halves `x₁, x₂` of the last axis: x `[rows, length, heads, head_dim]`, cos and sin
    /// `[length, 1, head_dim / 2]`, or `[rows, length, 1, head_dim / 2]` where a cache of fixed capacity is written, in x's type.
    fn rotary<'g>(&self, x: Value<'g>, [cos, sin]: [Value<'g>; 2]) -> Value<'g> {
        let (x1, x2) = x.halves();
        x * Value::concat(&[cos, cos], -1) + Value::concat(&[x2, x1], -1) * Value::concat(&[-sin, sin], -1)
    }

    /// The encoder's self-attention, from the residual stream back to it: see [`attention::bidirectional`].
    fn bidirectional<'g>(&self, x: Value<'g>, tokens: &Tokens<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
        attention::over_source(x, tokens, visible, w)
    }

    /// The decoder's self-attention, from the residual stream back to it: see [`attention::causal`].
    fn causal<'g>(
        &self,
        x: Value<'g>,
        context: &Context<'g>,
        past: Option<KeyValue<'g>>,
        w: &Weights<'g>,
    ) -> (Value<'g>, KeyValue<'g>) {
        match context.cache {
            CacheLayout::Static(capacity) => attention::fixed(x, context, past, capacity, w),
            _ => attention::growing(x, context, past, w),
        }
    }

    /// `softmax(softcap(q·kᵀ·scale) + (visible ? 0 : min)) · v`, as `[batch, queries, heads, head_dim]`.
    fn attention<'g>(&self, a: Attention<'g>) -> Value<'g> {
        decomposed(a)
    }
}

/// The portable form of [`Lowering::attention`].
///
/// The least finite number stands for −∞: a padded query that sees nothing then averages its keys, where −∞ would give NaN,
/// which reaches real rows through `0 · NaN`.
fn decomposed(a: Attention<'_>) -> Value<'_> {
    with_weights(a).0
}

/// The portable form of [`Lowering::attention`], and the softmax in it: float32 `[batch, kv_heads, group, queries, keys]`.
pub fn with_weights<'g>(a: Attention<'g>) -> (Value<'g>, Value<'g>) {
    let [batch, queries, heads, head_dim] = [0, 1, 2, 3].map(|axis| a.query.dim(axis));
    let [kv_heads, keys] = [1, 2].map(|axis| a.key_value.key.dim(axis));
    let group = heads_in_group(&a);
    let dtype = a.query.dtype();

    // A group's heads share their keys: they lie along the query axis, so that keys and values are never repeated.
    let q = (a.query * a.scale)
        .reshape(&[batch.clone(), queries.clone(), kv_heads.clone(), group.into(), head_dim.clone()])
        .transpose(&[0, 2, 3, 1, 4])
        .reshape(&[batch.clone(), kv_heads.clone(), queries.times(&group.into()), head_dim.clone()]);
    let scores = q.matmul(a.key_value.key.transpose(&[0, 1, 3, 2])).cast(DType::Float32);
    let grouped = [batch.clone(), kv_heads.clone(), group.into(), queries.clone(), keys.clone()];
    let bias = a.visible.choose(DType::Float32, 0.0, f32::MIN.into());
    let weights = (softcap(scores, a.cap).reshape(&grouped) + bias).softmax();

    let read = weights
        .cast(dtype)
        .reshape(&[batch.clone(), kv_heads.clone(), queries.times(&group.into()), keys])
        .matmul(a.key_value.value)
        .reshape(&[batch.clone(), kv_heads, group.into(), queries.clone(), head_dim.clone()])
        .transpose(&[0, 3, 1, 2, 4])
        .reshape(&[batch, queries, heads, head_dim]);
    (read, weights)
}

fn heads_in_group(a: &Attention<'_>) -> usize {
    let [heads, kv_heads] = [a.query.dim(2), a.key_value.key.dim(1)].map(|dim| dim.as_fixed());
    let (heads, kv_heads) = heads.zip(kv_heads).expect("the numbers of heads come from the config");
    heads / kv_heads
}

struct Portable;

impl Lowering for Portable {}
