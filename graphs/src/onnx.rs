//! The ONNX graph builder: values with a dtype and a symbolic shape, operators that check both, and hash-consing so that
//! an equation may be written where it is used and still be computed once. It knows nothing of T5Gemma.

mod shape;

pub use shape::{DType, Dim};
