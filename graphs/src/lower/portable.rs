//! For any runtime that reads ONNX: standard operators only, in the forms that the trait provides.

use super::{Capabilities, Lowering};
use crate::onnx::DType;

pub struct Portable;

impl Lowering for Portable {
    fn capabilities(&self) -> &'static Capabilities {
        &Capabilities {
            name: "portable",
            // The newest that has all the operators used and that TensorRT reads.
            opset: 20,
            dtypes: &[DType::Float32, DType::Float16, DType::BFloat16],
            default_dtype: DType::Float32,
            packing: None,
            float8: false,
            quantizes_activations: false,
            observes_activations: true,
            has_device_memory: false,
            in_place_head_dim: None,
            merges_in_place: false,
            static_cache: false,
            side_by_side: false,
            attends_in_rows: false,
            attends_in_windows: false,
            lora_inputs: true,
            serving_plans: false,
        }
    }
}
