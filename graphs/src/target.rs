//! The runtimes that graphs are written for. What each can do is in its [`Capabilities`]; how operators are written for
//! it, in [`lower`](crate::lower).

use crate::lower::{self, Capabilities, Lowering};

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

    pub(crate) fn lowering(self) -> &'static dyn Lowering {
        match self {
            Target::Portable => &lower::Portable,
            Target::Cpu => &lower::Cpu,
            Target::Cuda => &lower::Cuda,
            Target::TensorRt => &lower::TensorRt,
        }
    }
}
