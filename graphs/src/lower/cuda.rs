//! For ONNX Runtime's CUDA provider, where a step is bound by the bytes it reads and by how many kernels it launches: the
//! operators of the CPU's lowering, which CUDA has too, and one operator for the encoder's attention as well.

use super::cpu::Cpu;
use super::{Attention, Lowering};
use crate::attention::KeyValue;
use crate::decoder::Context;
use crate::nn::Weights;
use crate::onnx::{DType, Value};

pub struct Cuda;

impl Lowering for Cuda {
    fn rms_norm<'g>(&self, x: Value<'g>, factor: Value<'g>, eps: f64) -> Value<'g> {
        Cpu.rms_norm(x, factor, eps)
    }

    fn causal<'g>(
        &self,
        x: Value<'g>,
        context: &Context<'g>,
        past: Option<KeyValue<'g>>,
        w: &Weights<'g>,
    ) -> (Value<'g>, KeyValue<'g>) {
        Cpu.causal(x, context, past, w)
    }

    /// What is not visible gets a number of its own to add instead of a bool: the operator's own for `false` may be −∞, with
    /// which a padded query that sees nothing would become NaN.
    fn attention<'g>(&self, a: Attention<'g>) -> Value<'g> {
        let query = a.query.transpose(&[0, 2, 1, 3]); // [batch, heads, queries, head_dim]
        let visible = if a.visible.shape().len() == 5 { a.visible.squeeze(1) } else { a.visible };
        // Added to a score in the same type, the sum must not pass the type's least number.
        let hidden = if query.dtype() == DType::Float16 { -60_000.0 } else { -1e38 };
        let bias = visible.choose(query.dtype(), 0.0, hidden);
        let mut shape = bias.shape();
        shape[bias.shape().len() - 2] = query.dim(2);
        let bias = bias.expand(&shape);
        query.attention([a.key_value.key, a.key_value.value], bias, a.scale, a.cap).transpose(&[0, 2, 1, 3])
    }
}
