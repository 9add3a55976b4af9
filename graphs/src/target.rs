//! The runtimes that graphs are written for. What each can do is in its [`Capabilities`]; how operators are written for it, in
//! [`lower`](crate::lower).

use crate::lower::{self, Capabilities, Lowering, Packing};
use crate::onnx::DType;

/// A runtime that graphs are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard operators only, for any runtime that reads ONNX.
    Portable,
    /// ONNX Runtime on a CPU.
    Cpu,
    /// ONNX Runtime on an NVIDIA GPU, through its CUDA provider.
    Cuda,
    /// TensorRT, alone or as a provider of ONNX Runtime.
    TensorRt,
}

impl Target {
    /// Every target.
    pub const ALL: [Target; 4] = [Target::Portable, Target::Cpu, Target::Cuda, Target::TensorRt];

    /// The name on the command line and in a manifest.
    pub fn name(self) -> &'static str {
        self.capabilities().name
    }

    /// What the runtime can do.
    pub fn capabilities(self) -> &'static Capabilities {
        self.lowering().capabilities()
    }

    /// See [`Capabilities::opset`].
    pub fn opset(self) -> u32 {
        self.capabilities().opset
    }

    /// See [`Capabilities::dtypes`].
    pub fn dtypes(self) -> &'static [DType] {
        self.capabilities().dtypes
    }

    /// See [`Capabilities::default_dtype`].
    pub fn default_dtype(self) -> DType {
        self.capabilities().default_dtype
    }

    /// See [`Capabilities::packing`].
    pub fn reads_packed(self) -> bool {
        self.capabilities().packing.is_some()
    }

    /// See [`Capabilities::packing`].
    pub fn signs_packed(self) -> bool {
        self.capabilities().packing == Some(Packing::Signed)
    }

    /// See [`Capabilities::has_device_memory`].
    pub fn is_device(self) -> bool {
        self.capabilities().has_device_memory
    }

    /// See [`Capabilities::static_cache`].
    pub fn has_static_cache(self) -> bool {
        self.capabilities().static_cache
    }

    pub(crate) fn lowering(self) -> &'static dyn Lowering {
        match self {
            Target::Portable => &lower::Portable,
            Target::Cpu => &lower::Cpu,
            Target::Cuda => &lower::Cuda,
            Target::TensorRt => &lower::TensorRt,
        }
    }
}
