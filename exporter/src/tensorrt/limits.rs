//! Limits of TensorRT that both [`check`](super::check) and [`plan`](super::plan) enforce.

/// The GPUs that compute in fp8, for messages. Ampere (8.0 to 8.7) does not.
pub const FLOAT8_GPUS: &str = "a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell)";

/// The maximum number of elements of a tensor: "The volume of the tensor must be less than 2^31 elements", NVIDIA's
/// documentation of `nvinfer1::ITensor` in TensorRT 10.
pub const MAX_VOLUME: u128 = (1 << 31) - 1;
