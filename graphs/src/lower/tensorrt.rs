//! For TensorRT, by its own parser or as a provider of ONNX Runtime. The portable forms are what it fuses best: its
//! attention operator takes no soft-cap, its parser knows no operator of ONNX Runtime's own domain and would take one that
//! is called like a standard one for that, and it computes in the types that the graph says. What is added is a cache of
//! fixed capacity (`attention::fixed`), with which a step is one engine of one profile.

use super::{Lowering, Matrix};
use crate::onnx::Value;

pub struct TensorRt;

impl Lowering for TensorRt {
    fn linear<'g>(&self, x: Value<'g>, weight: Matrix<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        let weight = match weight {
            Matrix::Plain(weight) => weight,
            // The builder keeps the numbers as they are, and multiplies as it unpacks them.
            Matrix::Packed(weight) => weight.numbers.dequantized(weight.scales, weight.blocks),
        };
        x.gemm(weight, bias)
    }
}
