//! Tensors of ONNX Runtime from numbers, and numbers from tensors.

use half::{bf16, f16};
use ort::value::{DynValue, Tensor, TensorElementType};
use t5gemma_graphs::interface::DType;

use crate::error::Error;

/// `[rows, values.len() / rows]`.
pub(crate) fn int64_tensor(rows: usize, values: Vec<i64>) -> Result<DynValue, Error> {
    let shape = [rows, values.len() / rows];
    let tensor = Tensor::from_array((shape, values)).map_err(Error::onnxruntime("preparing a run"))?;
    Ok(tensor.into_dyn())
}

/// `[rows, values.len() / rows]`.
pub(crate) fn float32_tensor(rows: usize, values: Vec<f32>) -> Result<DynValue, Error> {
    let shape = [rows, values.len() / rows];
    float_tensor(DType::Float32, shape, values).map_err(Error::onnxruntime("preparing a run"))
}

/// Numbers in float32, float16 or bfloat16.
pub(crate) fn float_tensor<const N: usize>(dtype: DType, shape: [usize; N], values: Vec<f32>) -> ort::Result<DynValue> {
    Ok(match dtype {
        DType::Float16 => {
            Tensor::from_array((shape, values.into_iter().map(f16::from_f32).collect::<Vec<_>>()))?.into_dyn()
        }
        DType::BFloat16 => {
            Tensor::from_array((shape, values.into_iter().map(bf16::from_f32).collect::<Vec<_>>()))?.into_dyn()
        }
        _ => Tensor::from_array((shape, values))?.into_dyn(),
    })
}

/// The numbers of a float32, float16 or bfloat16 tensor.
pub(crate) fn float32_values(value: &DynValue) -> ort::Result<Vec<f32>> {
    Ok(match value.data_type() {
        TensorElementType::Float16 => value.try_extract_tensor::<f16>()?.1.iter().map(|x| x.to_f32()).collect(),
        TensorElementType::Bfloat16 => value.try_extract_tensor::<bf16>()?.1.iter().map(|x| x.to_f32()).collect(),
        _ => value.try_extract_tensor::<f32>()?.1.to_vec(),
    })
}
