//! For TensorRT, by its own parser or as a provider of ONNX Runtime. It fuses the portable forms best: its attention
//! operator takes no soft-cap, its parser knows no operator of ONNX Runtime's own domain (and would take one with a
//! standard name for the standard one), and it computes in the dtypes that the graph states. What is added is a cache
//! of fixed capacity, with which a step is one engine with one profile.

use super::{Capabilities, Lowering, Matrix, Packing};
use crate::onnx::{DType, Value};

pub struct TensorRt;

impl Lowering for TensorRt {
    fn capabilities(&self) -> &'static Capabilities {
        &Capabilities {
            name: "tensorrt",
            // The first with packed matrices, and the last whose operators every TensorRT 10 reads.
            opset: 21,
            dtypes: &[DType::Float32, DType::Float16, DType::BFloat16],
            default_dtype: DType::BFloat16,
            packing: Some(Packing::Signed),
            float8: true,
            quantizes_activations: true,
            observes_activations: false,
            has_device_memory: true,
            in_place_head_dim: None,
            merges_in_place: false,
            static_cache: true,
            side_by_side: false,
            attends_in_rows: false,
            attends_in_windows: false,
            lora_inputs: false,
            serving_plans: true,
        }
    }

    fn linear<'g>(&self, x: Value<'g>, weight: Matrix<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        let weight = match weight {
            Matrix::Plain(weight) => weight,
            // The builder keeps the numbers packed, and multiplies as it unpacks them.
            Matrix::Packed(weight) => weight.numbers.dequantize(weight.scales, weight.blocks),
        };
        x.gemm(weight, bias)
    }
}
