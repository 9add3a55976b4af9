//! For TensorRT, by its own parser or as a provider of ONNX Runtime. The portable forms are what it fuses best: its
//! attention operator takes no soft-cap, its parser knows no operator of ONNX Runtime's own domain and would take one that
//! is called like a standard one for that, and it computes in the types that the graph says. What is added is a cache of
//! fixed capacity (`attention::fixed`), with which a step is one engine of one profile.

use super::Lowering;

pub struct TensorRt;

impl Lowering for TensorRt {}
