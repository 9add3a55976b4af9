//! How operators are written for a target: the portable form here, and in a file per target the operators that its
//! runtime has better forms of. A new target is another `impl Lowering` with its [`Capabilities`], and an arm in
//! [`Target::lowering`](crate::target::Target). Which operators make a layer is `attention.rs` and `nn.rs`: this module
//! knows operators only.
//!
//! The dtype of every step is part of the contract: what must stay float32 in half precision (norms, soft-caps,
//! softmax) is cast here, where it is computed.

mod cpu;
mod cuda;
mod portable;
mod tensorrt;

pub use cpu::Cpu;
pub use cuda::Cuda;
pub use portable::Portable;
pub use tensorrt::TensorRt;

use crate::interface::BEAMS;
use crate::onnx::{DType, Data, Dim, Packed, Value};
use crate::sequence::KeyValue;

/// What a target's runtime can do. The exporter and the blocks read these fields; none of them compares targets.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The target's name on the command line and in a manifest.
    pub name: &'static str,
    /// Version of the standard operator set that the graphs are written in.
    pub opset: u32,
    /// Dtypes of weights and activations that the runtime computes in.
    pub dtypes: &'static [DType],
    /// The dtype of an export unless another is asked for.
    pub default_dtype: DType,
    /// How quantized matrices are stored; none if the target reads no quantized weights.
    pub packing: Option<Packing>,
    /// Whether matrices can be quantized to fp8 (E4M3).
    pub float8: bool,
    /// Whether matrices of 8 bits are multiplied with activations of 8 bits, which needs calibrated activation ranges.
    pub quantizes_activations: bool,
    /// Whether the graphs can return activation ranges, to calibrate another target with.
    pub observes_activations: bool,
    /// Whether the graphs run on a device with memory of its own, where rows of the cache are moved by a graph.
    pub has_device_memory: bool,
    /// Self-attention over a cache that is written in place: the number that `head_dim` has to be a multiple of. None
    /// if the target has no such operator.
    pub in_place_head_dim: Option<usize>,
    /// Whether attention to target and source in one softmax is an operator over such a cache.
    pub merges_in_place: bool,
    /// Whether the cache can be given a fixed capacity.
    pub static_cache: bool,
    /// Whether several sources can lie side by side in a row of the encoder, which pays where padding is computed for
    /// nothing.
    pub side_by_side: bool,
    /// Whether the encoder's attention takes heads side by side in a row, as they come out of the projections, instead
    /// of on an axis of their own.
    pub attends_in_rows: bool,
    /// Whether the encoder's attention is an operator that takes sources and a window instead of a mask of pairs of
    /// tokens. It knows no soft-cap.
    pub attends_in_windows: bool,
    /// Whether graphs can take LoRA adapters as inputs.
    pub lora_inputs: bool,
    /// Whether an export can carry a serving plan: optimization profiles for the engines that are built from it.
    pub serving_plans: bool,
}

/// How quantized matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Unsigned numbers in blocks, with optional zero points, as ONNX Runtime's `MatMulNBits` reads them.
    Blocks,
    /// Signed numbers with positive scales, as the standard `DequantizeLinear` reads them.
    Signed,
}

/// A weight matrix `[out, in]`, as it is stored.
#[derive(Clone, Copy)]
pub enum Matrix<'g> {
    /// In a float type.
    Plain(Value<'g>),
    /// Quantized.
    Packed(Packed<'g>),
}

/// Attention over given keys and values.
pub struct Attention<'g> {
    /// `[batch, queries, heads, head_dim]`
    pub query: Value<'g>,
    /// `[batch, kv_heads, keys, head_dim]`; query head `i` reads key head `i / (heads / kv_heads)`.
    pub key: Value<'g>,
    /// As `key`.
    pub value: Value<'g>,
    /// Which keys a query sees: bool, broadcast against `[batch, kv_heads, group, queries, keys]`.
    pub visible: Value<'g>,
    /// Factor of the scores.
    pub scale: f64,
    /// Soft-cap of the scaled scores.
    pub cap: Option<f64>,
}

/// Attention to two sets of keys in one softmax.
pub struct MergedAttention<'g> {
    /// `[rows, length, heads, head_dim]`
    pub query: Value<'g>,
    /// Of each row by itself: `[rows, kv_heads, keys, head_dim]`.
    pub own: KeyValue<'g>,
    /// Which of its own keys a query sees: bool, broadcast against `[rows, kv_heads, group, length, keys]`.
    pub own_visible: Value<'g>,
    /// Of a source, which `rows / batch` beams share: `[batch, kv_heads, source, head_dim]`.
    pub source: KeyValue<'g>,
    /// Which keys of the source are seen: bool `[batch, 1, 1, 1, source]`.
    pub source_visible: Value<'g>,
    /// Factor of the scores.
    pub scale: f64,
}

/// Cosines and sines of rotary angles, float.
#[derive(Clone, Copy)]
pub struct Rotation<'g> {
    /// `cos(position · frequency)`
    pub cos: Value<'g>,
    /// `sin(position · frequency)`
    pub sin: Value<'g>,
}

/// A target: what its runtime can do, and its forms of the operators.
pub trait Lowering {
    /// What the target's runtime can do.
    fn capabilities(&self) -> &'static Capabilities;

    /// `x · wᵀ (+ b)`: x `[tokens, in]`, w `[out, in]`, b `[out]`, all of one dtype.
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

    /// `x·cos + [−x₂, x₁]·sin` over the halves `x₁, x₂` of the last axis: x `[rows, length, heads, head_dim]`, cos and
    /// sin in x's dtype, `[length, 1, head_dim / 2]` or, where every row has positions of its own, `[rows, length, 1,
    /// head_dim / 2]`.
    fn rotary<'g>(&self, x: Value<'g>, Rotation { cos, sin }: Rotation<'g>) -> Value<'g> {
        rotated(x, Rotation { cos, sin })
    }

    /// `softmax(softcap(q·kᵀ·scale) + (visible ? 0 : min)) · v`, as `[batch, queries, heads, head_dim]`.
    fn attention<'g>(&self, attention: Attention<'g>) -> Value<'g> {
        attention_with_weights(attention).0
    }

    /// `softmax([q·k_ownᵀ, q·k_sourceᵀ]·scale + mask) · [v_own, v_source]`, as `[rows, length, heads, head_dim]`.
    fn merged_attention<'g>(&self, attention: MergedAttention<'g>) -> Value<'g> {
        merged_attention_with_weights(attention).0
    }

    /// An upper bound of the target tokens in any row, int32 `[1]`, for attention over a cache that is written in
    /// place. `last` int32 `[rows]` is the position of each row's last token; `past` the keys so far, `[rows, kv_heads,
    /// capacity, head_dim]`.
    fn longest_row<'g>(&self, last: Value<'g>, _past: Option<Value<'g>>) -> Value<'g> {
        last.reduce_max(0) + last.graph().constant(DType::Int32, &[1], Data::Ints(vec![1]))
    }
}

/// The portable form of [`Lowering::rotary`].
pub fn rotated<'g>(x: Value<'g>, Rotation { cos, sin }: Rotation<'g>) -> Value<'g> {
    let (x1, x2) = x.split_halves();
    x * Value::concat(&[cos, cos], -1) + Value::concat(&[x2, x1], -1) * Value::concat(&[-sin, sin], -1)
}

/// `cap · tanh(x / cap)`, or `x` where there is no cap.
pub fn softcap(x: Value<'_>, cap: Option<f64>) -> Value<'_> {
    match cap {
        Some(cap) => (x * (1.0 / cap)).tanh() * cap,
        None => x,
    }
}

/// The portable form of [`Lowering::attention`], and the softmax in it: float32 `[batch, kv_heads, group, queries,
/// keys]`.
///
/// The least finite number stands for −∞: a padded query that sees nothing then averages its keys, where −∞ would give
/// NaN, which reaches real rows through `0 · NaN`.
pub fn attention_with_weights(a: Attention<'_>) -> (Value<'_>, Value<'_>) {
    let [batch, queries, heads, head_dim] = [0, 1, 2, 3].map(|axis| a.query.dim(axis));
    let [kv_heads, keys] = [1, 2].map(|axis| a.key.dim(axis));
    let group = match (heads.as_fixed(), kv_heads.as_fixed()) {
        (Some(heads), Some(kv_heads)) => heads / kv_heads,
        _ => unreachable!("the numbers of heads come from the config"),
    };
    let dtype = a.query.dtype();

    // The heads of a group share their keys: they lie along the query axis, so that keys and values are never repeated.
    let q = (a.query * a.scale)
        .reshape(&[batch.clone(), queries.clone(), kv_heads.clone(), group.into(), head_dim.clone()])
        .transpose(&[0, 2, 3, 1, 4])
        .reshape(&[batch.clone(), kv_heads.clone(), queries.times(&group.into()), head_dim.clone()]);
    let scores = q.matmul(a.key.transpose(&[0, 1, 3, 2])).cast(DType::Float32);
    let grouped = [batch.clone(), kv_heads.clone(), group.into(), queries.clone(), keys.clone()];
    let bias = a.visible.select(DType::Float32, 0.0, f32::MIN.into());
    let weights = (softcap(scores, a.cap).reshape(&grouped) + bias).softmax();

    let read = weights
        .cast(dtype)
        .reshape(&[batch.clone(), kv_heads.clone(), queries.times(&group.into()), keys])
        .matmul(a.value)
        .reshape(&[batch.clone(), kv_heads, group.into(), queries.clone(), head_dim.clone()])
        .transpose(&[0, 3, 1, 2, 4])
        .reshape(&[batch, queries, heads, head_dim]);
    (read, weights)
}

/// What [`read_both`] returns.
pub struct Read<'g> {
    /// `[rows, length, heads, head_dim]`
    pub read: Value<'g>,
    /// The softmax over the source: float32 `[batch, kv_heads, beams, group·length, source]`.
    pub source_weights: Value<'g>,
    /// The log-sum-exp of the scores: float32 `[rows, length, heads, 1]`.
    pub log_sum: Value<'g>,
}

/// The portable form of [`Lowering::merged_attention`], and the softmax over the source, as in [`Read`].
pub fn merged_attention_with_weights(attention: MergedAttention<'_>) -> (Value<'_>, Value<'_>) {
    let Read { read, source_weights, .. } = read_both(attention);
    (read, source_weights)
}

/// `[rows, length, heads, n]` with the beams of a source together: `[batch, kv_heads, beams, group·length, n]`.
pub fn by_source<'g>(x: Value<'g>, batch: &Dim, kv_heads: &Dim) -> Value<'g> {
    let [rows, length, heads, last] = [0, 1, 2, 3].map(|axis| x.dim(axis));
    let (beams, group) = (beams_of(&rows, batch), group_of(&heads, kv_heads));
    x.reshape(&[rows.clone(), length.clone(), kv_heads.clone(), group.clone(), last.clone()])
        .transpose(&[0, 2, 3, 1, 4]) // [rows, kv_heads, group, length, n]
        .reshape(&[rows, kv_heads.clone(), group.times(&length), last.clone()])
        .reshape(&[batch.clone(), beams, kv_heads.clone(), group.times(&length), last])
        .transpose(&[0, 2, 1, 3, 4])
}

fn beams_of(rows: &Dim, batch: &Dim) -> Dim {
    if rows == batch { Dim::fixed(1) } else { Dim::symbol(BEAMS) }
}

fn group_of(heads: &Dim, kv_heads: &Dim) -> Dim {
    match (heads.as_fixed(), kv_heads.as_fixed()) {
        (Some(heads), Some(kv_heads)) => Dim::fixed(heads / kv_heads),
        _ => unreachable!("the numbers of heads come from the config"),
    }
}

/// The portable form of [`Lowering::merged_attention`], with what belongs to it.
pub fn read_both<'g>(a: MergedAttention<'g>) -> Read<'g> {
    let [rows, length, heads, head_dim] = [0, 1, 2, 3].map(|axis| a.query.dim(axis));
    let [batch, kv_heads, source] = [0, 1, 2].map(|axis| a.source.key.dim(axis));
    let keys = a.own.key.dim(2);
    let (beams, group) = (beams_of(&rows, &batch), group_of(&heads, &kv_heads));
    let (graph, dtype, queries) = (a.query.graph(), a.query.dtype(), group.times(&length));
    let of_rows = |last: &Dim| [rows.clone(), kv_heads.clone(), queries.clone(), last.clone()];
    let by_beam = |last: &Dim| [batch.clone(), beams.clone(), kv_heads.clone(), queries.clone(), last.clone()];
    let by_head = |last: &Dim| [batch.clone(), kv_heads.clone(), beams.clone(), queries.clone(), last.clone()];
    let of_source = |last: &Dim| [batch.clone(), kv_heads.clone(), beams.times(&queries), last.clone()];
    /// Between the heads of the beams of a source, and the beams of each of its heads.
    fn swapped(x: Value<'_>) -> Value<'_> {
        x.transpose(&[0, 2, 1, 3, 4])
    }

    let q = by_source(a.query * a.scale, &batch, &kv_heads);
    let own = swapped(q).reshape(&of_rows(&head_dim)).matmul(a.own.key.transpose(&[0, 1, 3, 2])).cast(DType::Float32);
    let own_bias = a.own_visible.select(DType::Float32, 0.0, f32::MIN.into());
    let grouped = [rows.clone(), kv_heads.clone(), group.clone(), length.clone(), keys.clone()];
    let own = (own.reshape(&grouped) + own_bias).reshape(&of_rows(&keys));
    let own = swapped(own.reshape(&by_beam(&keys)));

    let read = q.reshape(&of_source(&head_dim)).matmul(a.source.key.transpose(&[0, 1, 3, 2])).cast(DType::Float32);
    let bias = a.source_visible.select(DType::Float32, 0.0, f32::MIN.into());
    let read = read.reshape(&by_head(&source)) + bias;

    let scores = Value::concat(&[own, read], -1);
    let weights = scores.softmax();
    let (none, middle) = (graph.size(&Dim::fixed(0)), graph.size(&keys));
    let end = middle + graph.size(&source);
    let own = weights.slice([none, middle], &keys, -1);
    let source_weights = weights.slice([middle, end], &source, -1);

    let own = swapped(own.cast(dtype)).reshape(&of_rows(&keys)).matmul(a.own.value);
    let read = source_weights.cast(dtype).reshape(&of_source(&source)).matmul(a.source.value);
    let read = swapped(read.reshape(&by_head(&head_dim))).reshape(&of_rows(&head_dim));
    let by_token = |x: Value<'g>| {
        let last = x.dim(-1);
        x.reshape(&[rows.clone(), kv_heads.clone(), group.clone(), length.clone(), last.clone()])
            .transpose(&[0, 3, 1, 2, 4])
            .reshape(&[rows.clone(), length.clone(), heads.clone(), last])
    };
    let log_sum = swapped(scores.log_sum_exp()).reshape(&of_rows(&Dim::fixed(1)));
    Read { read: by_token(own + read), source_weights, log_sum: by_token(log_sum) }
}

/// A mask of rank 4 at most, with an entry for each of `queries`: from bool that is broadcast along the head axes
/// (`[batch, 1, 1, queries or 1, keys]`).
pub fn mask_by_query<'g>(visible: Value<'g>, queries: &Dim) -> Value<'g> {
    let visible = if visible.shape().len() == 5 { visible.squeeze(1) } else { visible };
    let mut shape = visible.shape();
    let at = shape.len() - 2;
    shape[at] = queries.clone();
    visible.expand(&shape)
}
