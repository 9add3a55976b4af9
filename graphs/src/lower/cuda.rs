//! For ONNX Runtime's CUDA provider, where a step is bound by memory bandwidth and by the number of kernel launches:
//! the CPU's norm and self-attention operators, which CUDA has too, and one operator for the encoder's attention as
//! well.
//!
//! # Design
//! In a cached step, inputs that an operator reads in host memory are computed from shapes alone. A number computed on
//! the GPU would force a synchronization in every step, and a step with such a copy cannot be captured as a CUDA graph.
//! A test over the definition (in `t5gemma/decoder_step.rs`) holds the graph to that.

use super::{Attention, Capabilities, Cpu, Lowering, Packing};
use crate::onnx::{DType, Value};

pub struct Cuda;

impl Lowering for Cuda {
    fn capabilities(&self) -> &'static Capabilities {
        &Capabilities {
            name: "cuda",
            // The first with Attention.
            opset: 23,
            dtypes: &[DType::Float32, DType::Float16, DType::BFloat16],
            default_dtype: DType::BFloat16,
            packing: Some(Packing::Blocks),
            float8: false,
            quantizes_activations: false,
            observes_activations: false,
            has_device_memory: true,
            // As on the CPU.
            in_place_head_dim: Some(16),
            merges_in_place: false,
            static_cache: false,
            side_by_side: false,
            attends_in_rows: false,
            attends_in_windows: false,
            lora_inputs: true,
            serving_plans: false,
        }
    }

    fn rms_norm<'g>(&self, x: Value<'g>, factor: Value<'g>, eps: f64) -> Value<'g> {
        Cpu.rms_norm(x, factor, eps)
    }

    /// What is not visible gets a finite bias instead of `false`: the operator's own number for `false` may be −∞,
    /// which would make a padded query that sees nothing NaN.
    fn attention<'g>(&self, a: Attention<'g>) -> Value<'g> {
        let query = a.query.transpose(&[0, 2, 1, 3]); // [batch, heads, queries, head_dim]
        let visible = if a.visible.shape().len() == 5 { a.visible.squeeze(1) } else { a.visible };
        // The sum with a score, in the same dtype, must stay finite.
        let hidden = if query.dtype() == DType::Float16 { -60_000.0 } else { -1e38 };
        let bias = visible.select(query.dtype(), 0.0, hidden);
        let mut shape = bias.shape();
        shape[bias.shape().len() - 2] = query.dim(2);
        let bias = bias.expand(&shape);
        query.attention_4d([a.key, a.value], bias, a.scale, a.cap).transpose(&[0, 2, 1, 3])
    }

    /// The capacity of the past, which is known from its shape. The length of each row is given by `last`, on the GPU.
    fn longest_row<'g>(&self, last: Value<'g>, past: Option<Value<'g>>) -> Value<'g> {
        match past {
            None => Cpu.longest_row(last, past),
            Some(past) => past.graph().size(&past.dim(2)).cast(DType::Int32),
        }
    }
}
