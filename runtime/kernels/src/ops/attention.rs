//! `Attention`, over given keys and values, and `GroupQueryAttention`, over a key-value cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::{Shape, TensorElementType};

use super::shared::{OfNode, Shared};
use super::{GraphKind, missing, parallel_for, required_usize_attribute, usize_attribute};
use crate::attention::cached::{CachedAttention, CachedInputs, CachedOutputs, Past};
use crate::attention::{self, HeadLayout, Inputs, Mask, Windows};

fn soft_cap(node: &KernelContext) -> Option<f32> {
    node.get::<f32>("softcap").filter(|&cap| cap > 0.0)
}

/// `softmax(softcap(q·kᵀ·scale) where visible) · v`: queries `[batch, heads, queries, dim]`, keys and values `[batch,
/// kv_heads, keys, dim]`, visible bool, broadcast against `[batch, heads, queries, keys]`. If their numbers are given,
/// heads may be interleaved, `[batch, queries, heads · dim]` and `[batch, keys, kv_heads · dim]`.
pub struct Attention {
    pub kind: GraphKind,
    /// Whether the session has quantized multiplications, once all of its kernels have been created.
    pub is_quantized: Arc<AtomicBool>,
    pub shared: SharedAttention,
}

/// Attention that the nodes of a session share, by the bits of its scale and its soft-cap.
pub type SharedAttention = Shared<(u32, Option<u32>), attention::Attention>;

/// What a node shares that has these parameters.
fn shared(all: &SharedAttention, kind: GraphKind, scale: f32, cap: Option<f32>) -> OfNode<attention::Attention> {
    all.of((scale.to_bits(), cap.map(f32::to_bits)), || match kind {
        GraphKind::Encoder => attention::Attention::of_encoder(scale, cap),
        GraphKind::Decoder => attention::Attention::of_decoder(scale, cap),
    })
}

impl Operator for Attention {
    type Kernel<'attr> = AttentionKernel;

    fn name(&self) -> &str {
        "Attention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let float = || OperatorInput::required(TensorElementType::Float32);
        [float(), float(), float(), OperatorInput::required(TensorElementType::Bool)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<AttentionKernel> {
        let attribute = |name: &str| Ok::<_, ort::Error>(usize_attribute(node, "Attention", name)?.unwrap_or(0));
        let scale = node.get::<f32>("scale").ok_or_else(|| missing("Attention", "attribute scale"))?;
        if attribute("is_causal")? != 0 {
            return Err(ort::Error::new("Attention: is_causal is not supported; use a mask"));
        }
        let cap = soft_cap(node);
        Ok(AttentionKernel {
            heads: attribute("q_num_heads")?,
            kv_heads: attribute("kv_num_heads")?,
            is_quantized: self.is_quantized.clone(),
            attention: shared(&self.shared, self.kind, scale, cap),
        })
    }
}

/// The kernel of a node.
pub struct AttentionKernel {
    /// Numbers of heads, and of those of keys and values, where they are interleaved; 0 otherwise.
    heads: usize,
    kv_heads: usize,
    is_quantized: Arc<AtomicBool>,
    attention: OfNode<attention::Attention>,
}

impl Kernel for AttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let input = |at: usize, name: &str| context.input(at)?.ok_or_else(|| missing("Attention", name));
        let (query, key, value) = (input(0, "Q")?, input(1, "K")?, input(2, "V")?);
        let visible = input(3, "attn_mask")?;
        let (query_shape, queries) = query.try_extract_tensor::<f32>()?;
        let (key_shape, keys) = key.try_extract_tensor::<f32>()?;
        let (value_shape, values) = value.try_extract_tensor::<f32>()?;
        let (visible_shape, mask) = visible.try_extract_tensor::<bool>()?;
        let misshapen = || {
            ort::Error::new(format!(
                "Attention of {query_shape} over {key_shape} and {value_shape} where {visible_shape}"
            ))
        };
        let query_layout = HeadLayout::of(query_shape, self.heads).ok_or_else(misshapen)?;
        let key_layout = HeadLayout::of(key_shape, self.kv_heads).ok_or_else(misshapen)?;
        // Missing axes count as axes of size 1.
        let mut mask_shape = [1; 4];
        for (to, &from) in mask_shape.iter_mut().rev().zip(visible_shape.iter().rev()) {
            *to = from as usize;
        }
        let [mask_batch, mask_heads, mask_rows, mask_keys] = mask_shape;
        let fits = key_shape == value_shape
            && visible_shape.len() <= 4
            && (key_layout.batch, key_layout.dim) == (query_layout.batch, query_layout.dim)
            && mask_keys == key_layout.rows
            && key_layout.is_interleaved == query_layout.is_interleaved
            && key_layout.heads > 0
            && query_layout.heads.is_multiple_of(key_layout.heads)
            && (mask_batch == query_layout.batch || mask_batch == 1)
            && mask_heads == 1
            && (mask_rows == query_layout.rows || mask_rows == 1);
        if !fits {
            return Err(misshapen());
        }
        let mut output = context.output(0, query_shape.to_vec())?.ok_or_else(|| missing("Attention", "Y"))?;
        let (_, to) = output.try_extract_tensor_mut::<f32>()?;
        let is_quantized = self.is_quantized.load(Ordering::Relaxed);
        let inputs = Inputs { queries, query_layout, keys, values, key_layout, is_quantized };
        let mask = Mask { mask, batch: mask_batch, rows: mask_rows };
        self.attention.lock().run(inputs, mask, to, &|count, task| parallel_for(context, count, task))?;
        Ok(())
    }
}

/// `ai.t5gemma.WindowAttention`: attention within sources and a window, `[batch, tokens, heads · dim]`, of queries, keys
/// and values with the number of each token's source, int64 `[batch, tokens]`. It needs no memory for pairs of tokens.
/// Graphs have it as a function of standard operators.
pub struct WindowAttention {
    /// As for [`Attention`].
    pub is_quantized: Arc<AtomicBool>,
    pub shared: SharedAttention,
}

/// The name of [`WindowAttention`].
pub const WINDOW: &str = "WindowAttention";

impl Operator for WindowAttention {
    type Kernel<'attr> = WindowAttentionKernel;

    fn name(&self) -> &str {
        WINDOW
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let float = || OperatorInput::required(TensorElementType::Float32);
        [float(), float(), float(), OperatorInput::required(TensorElementType::Int64)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<WindowAttentionKernel> {
        let number = |name| required_usize_attribute(node, WINDOW, name);
        let scale = node.get::<f32>("scale").ok_or_else(|| missing(WINDOW, "attribute scale"))?;
        Ok(WindowAttentionKernel {
            heads: number("q_num_heads")?,
            kv_heads: number("kv_num_heads")?,
            back: number("back")?,
            ahead: number("ahead")?,
            is_quantized: self.is_quantized.clone(),
            attention: shared(&self.shared, GraphKind::Encoder, scale, None),
        })
    }
}

/// The kernel of a node.
pub struct WindowAttentionKernel {
    heads: usize,
    kv_heads: usize,
    back: usize,
    ahead: usize,
    is_quantized: Arc<AtomicBool>,
    attention: OfNode<attention::Attention>,
}

impl Kernel for WindowAttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let input = |at: usize| context.input(at)?.ok_or_else(|| missing(WINDOW, "an input"));
        let (query, key, value, sources) = (input(0)?, input(1)?, input(2)?, input(3)?);
        let (query_shape, queries) = query.try_extract_tensor::<f32>()?;
        let (key_shape, keys) = key.try_extract_tensor::<f32>()?;
        let (value_shape, values) = value.try_extract_tensor::<f32>()?;
        let (_, numbers) = sources.try_extract_tensor::<i64>()?;
        let misshapen = || ort::Error::new(format!("{WINDOW} of {query_shape} over {key_shape} and {value_shape}"));
        let query_layout = HeadLayout::of(query_shape, self.heads).ok_or_else(misshapen)?;
        let key_layout = HeadLayout::of(key_shape, self.kv_heads).ok_or_else(misshapen)?;
        let fits = key_shape == value_shape
            && query_layout.is_interleaved
            && key_layout.is_interleaved
            && (key_layout.batch, key_layout.rows, key_layout.dim)
                == (query_layout.batch, query_layout.rows, query_layout.dim)
            && key_layout.heads > 0
            && query_layout.heads.is_multiple_of(key_layout.heads)
            && numbers.len() == query_layout.batch * query_layout.rows;
        if !fits {
            return Err(misshapen());
        }
        let mut output = context.output(0, query_shape.to_vec())?.ok_or_else(|| missing(WINDOW, "the output"))?;
        let (_, to) = output.try_extract_tensor_mut::<f32>()?;
        let is_quantized = self.is_quantized.load(Ordering::Relaxed);
        let inputs = Inputs { queries, query_layout, keys, values, key_layout, is_quantized };
        let windows = Windows { numbers, back: self.back, ahead: self.ahead };
        let parallel_for = &|count, task: &(dyn Fn(usize) + Send + Sync)| parallel_for(context, count, task);
        self.attention.lock().run_in_windows(inputs, windows, to, parallel_for)?;
        Ok(())
    }
}

/// Causal attention with rotary positions over a cache that has room for the new tokens.
pub struct GroupQueryAttention;

/// The name of [`GroupQueryAttention`].
const GROUP_QUERY: &str = "GroupQueryAttention";

impl Operator for GroupQueryAttention {
    type Kernel<'attr> = GroupQueryAttentionKernel;

    fn name(&self) -> &str {
        GROUP_QUERY
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let (float, int) = (TensorElementType::Float32, TensorElementType::Int32);
        [
            OperatorInput::required(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
            OperatorInput::required(int),
            OperatorInput::required(int),
            OperatorInput::required(float),
            OperatorInput::required(float),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [(); 3].map(|()| OperatorOutput::required(TensorElementType::Float32))
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<GroupQueryAttentionKernel> {
        let heads = required_usize_attribute(node, GROUP_QUERY, "num_heads")?;
        let kv_heads = required_usize_attribute(node, GROUP_QUERY, "kv_num_heads")?;
        let scale = node.get::<f32>("scale").ok_or_else(|| missing(GROUP_QUERY, "attribute scale"))?;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message =
                format!("{GROUP_QUERY}: num_heads must be a multiple of kv_num_heads (got {heads}, {kv_heads})");
            return Err(ort::Error::new(message));
        }
        let is_rotary = usize_attribute(node, GROUP_QUERY, "do_rotary")?.unwrap_or(0) == 1;
        if !is_rotary || usize_attribute(node, GROUP_QUERY, "rotary_interleaved")?.unwrap_or(0) != 0 {
            return Err(ort::Error::new(format!("{GROUP_QUERY}: expected do_rotary = 1 and rotary_interleaved = 0")));
        }
        let window = node.get::<i64>("local_window_size").and_then(|window| usize::try_from(window).ok());
        let attention = CachedAttention::new(heads, kv_heads, scale, soft_cap(node), window);
        Ok(GroupQueryAttentionKernel { attention })
    }
}

/// The kernel of a node.
pub struct GroupQueryAttentionKernel {
    attention: CachedAttention,
}

/// The sizes of a cache `[rows, kv_heads, capacity, dim]`.
fn cache_sizes(shape: &Shape) -> Option<[usize; 4]> {
    let sizes: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
    sizes.try_into().ok()
}

impl Kernel for GroupQueryAttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let wrong = |what: &str| ort::Error::new(format!("{GROUP_QUERY}: {what}"));
        let inputs = context.num_inputs()?;
        if inputs != 9 {
            return Err(wrong(&format!("expected nine inputs, found {inputs}")));
        }
        let input = |at: usize| context.input(at)?.ok_or_else(|| wrong(&format!("input {at} is missing")));
        let [packed, last, total, cos, sin] = [input(0)?, input(5)?, input(6)?, input(7)?, input(8)?];
        let past = [context.input(3)?, context.input(4)?];
        let (packed_shape, packed) = packed.try_extract_tensor::<f32>()?;
        let (_, last) = last.try_extract_tensor::<i32>()?;
        let (_, total) = total.try_extract_tensor::<i32>()?;
        let ((angles_shape, cos), (_, sin)) = (cos.try_extract_tensor::<f32>()?, sin.try_extract_tensor::<f32>()?);
        let past = match &past {
            [Some(key), Some(value)] => Some([key.try_extract_tensor::<f32>()?, value.try_extract_tensor::<f32>()?]),
            _ => None,
        };
        let &CachedAttention { heads, kv_heads, .. } = &self.attention;
        let width = heads + 2 * kv_heads;
        let &[rows, new, packed_width] = packed_shape.as_ref() else {
            return Err(wrong(&format!("of {packed_shape}")));
        };
        let [rows, new, dim] = [rows as usize, new as usize, packed_width as usize / width];
        let past_capacity = match &past {
            None => 0,
            Some([(key_shape, _), (value_shape, _)]) => match cache_sizes(key_shape) {
                Some([key_rows, key_heads, capacity, key_dim])
                    if key_shape == value_shape && (key_rows, key_heads, key_dim) == (rows, kv_heads, dim) =>
                {
                    capacity
                }
                _ => return Err(wrong(&format!("{packed_shape} over a past of {key_shape} and {value_shape}"))),
            },
        };
        let total = total.first().map_or(0, |&total| total.max(0) as usize);
        let capacity = past_capacity.max(total);
        let ends: Vec<usize> = last.iter().map(|&last| (i64::from(last).max(-1) + 1) as usize).collect();
        let positions = angles_shape.first().map_or(0, |&positions| positions as usize);
        let fits = ends.len() == rows
            && dim > 0
            && dim * width == packed_width as usize
            && dim % 2 == 0
            && cos.len() == positions * (dim / 2)
            && sin.len() == cos.len()
            && ends.iter().all(|&end| end >= new && end <= capacity.min(positions) && end - new <= past_capacity);
        if !fits {
            return Err(wrong(&format!(
                "{packed_shape} up to {ends:?} of {capacity} positions with {angles_shape} angles"
            )));
        }
        let output = |at: usize, shape| context.output(at, shape)?.ok_or_else(|| missing(GROUP_QUERY, "an output"));
        let cache_shape = vec![rows as i64, kv_heads as i64, capacity as i64, dim as i64];
        let mut attended = output(0, vec![rows as i64, new as i64, (heads * dim) as i64])?;
        let (mut key, mut value) = (output(1, cache_shape.clone())?, output(2, cache_shape)?);
        let inputs = CachedInputs {
            packed,
            new,
            dim,
            ends: &ends,
            cos,
            sin,
            // Addresses alone: it may be the memory of the outputs.
            past: past.map(|[(_, keys), (_, values)]| Past {
                keys: keys.as_ptr(),
                values: values.as_ptr(),
                capacity: past_capacity,
            }),
        };
        let outputs = CachedOutputs {
            attended: attended.try_extract_tensor_mut::<f32>()?.1,
            keys: key.try_extract_tensor_mut::<f32>()?.1,
            values: value.try_extract_tensor_mut::<f32>()?.1,
            capacity,
        };
        // SAFETY: the past is an input of this run with the shape that was checked; if it is the memory of the outputs,
        // nobody else has it.
        unsafe { self.attention.run(inputs, outputs, &|count, task| parallel_for(context, count, task))? };
        Ok(())
    }
}
