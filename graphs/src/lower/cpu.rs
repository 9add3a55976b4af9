//! For ONNX Runtime on a CPU, where a decoder step is bound by reading the weights and then by the number of operators:
//! one operator for a norm and the sum before it, one for self-attention with rotary positions and a cache that is
//! written in place, one for cross-attention.

use super::{Attention, Capabilities, Lowering, Matrix, Packing, Rotation, mask_by_query, rotated};
use crate::onnx::{DType, Dim, Value};

pub struct Cpu;

impl Lowering for Cpu {
    fn capabilities(&self) -> &'static Capabilities {
        &Capabilities {
            name: "cpu",
            // The first with Attention.
            opset: 23,
            // Halves are computed there by casts to float32, one for each use of a weight.
            dtypes: &[DType::Float32],
            default_dtype: DType::Float32,
            packing: Some(Packing::Blocks),
            float8: false,
            quantizes_activations: false,
            observes_activations: false,
            has_device_memory: false,
            // `GroupQueryAttention` rotates heads of multiples of this width only.
            in_place_head_dim: Some(16),
            merges_in_place: true,
            static_cache: false,
            side_by_side: true,
            attends_in_rows: true,
            attends_in_windows: true,
            lora_inputs: true,
            serving_plans: false,
        }
    }

    fn linear<'g>(&self, x: Value<'g>, weight: Matrix<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        match (weight, bias) {
            (Matrix::Packed(weight), bias) => x.matmul_nbits(weight, bias),
            (Matrix::Plain(weight), None) => x.transpose_matmul(weight),
            (Matrix::Plain(weight), Some(bias)) => x.transpose_matmul(weight) + bias,
        }
    }

    /// The division by the cap is applied to the few numbers of x instead of to the many scores.
    fn logits<'g>(&self, x: Value<'g>, table: Matrix<'g>, cap: Option<f64>, [rows, positions]: [Dim; 2]) -> Value<'g> {
        let x = x.reshape(&[rows, positions, x.dim(-1)]);
        match cap {
            None => self.linear(x, table, None).cast(DType::Float32),
            Some(cap) => self.linear(x * (1.0 / cap), table, None).cast(DType::Float32).tanh() * cap,
        }
    }

    fn rms_norm<'g>(&self, x: Value<'g>, factor: Value<'g>, eps: f64) -> Value<'g> {
        x.simplified_layer_norm(factor, eps)
    }

    /// The operator looks cosines up by integer positions.
    fn rotary<'g>(&self, x: Value<'g>, Rotation { cos, sin }: Rotation<'g>) -> Value<'g> {
        if cos.shape().len() == 4 {
            return rotated(x, Rotation { cos, sin });
        }
        let [rows, length, heads, head_dim] = [0, 1, 2, 3].map(|axis| x.dim(axis));
        let flat = x.reshape(&[rows, length, heads.times(&head_dim)]);
        flat.rotary_embedding(None, [cos, sin].map(|table| table.squeeze(1))).reshape(&x.shape())
    }

    fn attention<'g>(&self, a: Attention<'g>) -> Value<'g> {
        let query = a.query.transpose(&[0, 2, 1, 3]); // [batch, heads, queries, head_dim]
        let visible = mask_by_query(a.visible, &query.dim(2));
        query.attention_4d([a.key, a.value], visible, a.scale, a.cap).transpose(&[0, 2, 1, 3])
    }
}
