//! The execution provider that runs a model, with its options and device. Plain values and their checks; `provider`
//! creates sessions on a provider.

use std::fmt;

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};

use crate::error::Error;

/// An execution provider of ONNX Runtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Provider {
    /// ONNX Runtime's own kernels, on the CPU.
    #[default]
    Cpu,
    /// ONNX Runtime's kernels for NVIDIA GPUs.
    Cuda,
    /// TensorRT, with CUDA for operators that it does not support.
    TensorRt,
    /// TensorRT for RTX, a plugin library.
    NvTensorRtRtx,
}

impl Provider {
    /// Every provider.
    pub const ALL: [Provider; 4] = [Provider::Cpu, Provider::Cuda, Provider::TensorRt, Provider::NvTensorRtRtx];

    /// The short name: on the command line and in `provider_options.json`.
    pub fn name(self) -> &'static str {
        match self {
            Provider::Cpu => "cpu",
            Provider::Cuda => "cuda",
            Provider::TensorRt => "tensorrt",
            Provider::NvTensorRtRtx => "nv-tensorrt-rtx",
        }
    }

    /// ONNX Runtime's name.
    pub(crate) fn ort_name(self) -> &'static str {
        match self {
            Provider::Cpu => "CPUExecutionProvider",
            Provider::Cuda => "CUDAExecutionProvider",
            Provider::TensorRt => "TensorrtExecutionProvider",
            Provider::NvTensorRtRtx => "NvTensorRTRTXExecutionProvider",
        }
    }

    /// The Python package with ONNX Runtime's library for it.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Provider::Cpu => "onnxruntime",
            Provider::Cuda | Provider::TensorRt => "onnxruntime-gpu",
            Provider::NvTensorRtRtx => "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An execution provider with its device and its options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProviderConfig {
    /// The provider.
    pub kind: Provider,
    /// The GPU index.
    pub device: u32,
    /// Options of the provider under ONNX Runtime's names; they override those of the model folder. `library` is an
    /// extra option: the path of a plugin library.
    pub options: Vec<(String, String)>,
}

/// The memory in which sessions keep their results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The process's own memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(i32),
}

impl Device {
    pub fn memory(self) -> ort::Result<MemoryInfo<'static>> {
        let (device, id) = match self {
            Device::Cpu => (AllocationDevice::CPU, 0),
            Device::Cuda(id) => (AllocationDevice::CUDA, id),
        };
        MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
    }
}

/// The CUDA provider's option for CUDA graphs.
pub(crate) const CUDA_GRAPH_OPTION: &str = "enable_cuda_graph";

/// The field that errors name.
const PROVIDER_OPTION: &str = "provider option";

/// The error of an option for CUDA graphs if they cannot be captured. A replay reads and writes the addresses of the
/// captured run, so all inputs and outputs of a step must stay at their addresses.
pub(crate) fn cuda_graphs_require(requirement: &str, (name, value): &(String, String)) -> Error {
    Error::requires(PROVIDER_OPTION, format!("{name}={value}"), requirement)
}

impl From<Provider> for ProviderConfig {
    fn from(provider: Provider) -> ProviderConfig {
        ProviderConfig::new(provider)
    }
}

impl ProviderConfig {
    /// The provider on its first device, without options.
    pub fn new(kind: Provider) -> ProviderConfig {
        ProviderConfig { kind, ..ProviderConfig::default() }
    }

    /// Sets [`ProviderConfig::device`].
    pub fn device(self, device: u32) -> ProviderConfig {
        ProviderConfig { device, ..self }
    }

    /// Adds to [`ProviderConfig::options`].
    pub fn option(mut self, name: impl Into<String>, value: impl Into<String>) -> ProviderConfig {
        self.options.push((name.into(), value.into()));
        self
    }

    /// The memory in which sessions keep their results.
    pub(crate) fn target_device(&self) -> Device {
        match self.kind {
            Provider::Cpu => Device::Cpu,
            _ => Device::Cuda(self.device as i32),
        }
    }

    /// The option that makes the CUDA provider capture steps as CUDA graphs, if it is set.
    pub(crate) fn cuda_graph_option(&self) -> Option<&(String, String)> {
        let last = self.options.iter().rfind(|(name, _)| name == CUDA_GRAPH_OPTION);
        last.filter(|(_, value)| value != "0")
    }

    /// Rejects meaningless combinations.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.kind == Provider::Cpu && (self.device != 0 || !self.options.is_empty()) {
            let (field, value) = match self.options.first() {
                Some((name, value)) => (PROVIDER_OPTION, format!("{name}={value}")),
                None => ("device", self.device.to_string()),
            };
            return Err(Error::requires(field, value, "a provider with devices and options, such as cuda (got cpu)"));
        }
        let replays = |(name, value): &&(String, String)| {
            let captures = self.kind == Provider::Cuda && name == CUDA_GRAPH_OPTION;
            (name.ends_with("cuda_graph") || name.ends_with("cuda_graph_enable")) && value != "0" && !captures
        };
        if let Some(option) = self.options.iter().find(replays) {
            return Err(cuda_graphs_require("the provider cuda", option));
        }
        match self.options.iter().find(|(name, value)| name.is_empty() || name.contains('\0') || value.contains('\0')) {
            Some((name, value)) => Err(Error::input(PROVIDER_OPTION, "NAME=VALUE", format!("{name:?}={value:?}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_cannot_be_right_are_refused() {
        let provider = ProviderConfig { device: 1, ..ProviderConfig::default() };
        assert!(provider.check().is_err());
        let options = vec![("device_id".to_string(), "0".to_string())];
        assert!(ProviderConfig { options: options.clone(), ..ProviderConfig::default() }.check().is_err());
        assert!(ProviderConfig { kind: Provider::Cuda, device: 1, options }.check().is_ok());
        for (value, is_taken) in [("0", true), ("1", false)] {
            for name in ["enable_cuda_graph", "trt_cuda_graph_enable"] {
                let options = vec![(name.to_string(), value.to_string())];
                let config = |kind| ProviderConfig { kind, device: 0, options: options.clone() };
                assert_eq!(config(Provider::TensorRt).check().is_ok(), is_taken, "{name}={value}");
                // Whether a model can have it is checked when it is opened.
                let cuda = config(Provider::Cuda);
                assert_eq!(cuda.check().is_ok(), is_taken || name == CUDA_GRAPH_OPTION, "{name}={value}");
                assert_eq!(
                    cuda.cuda_graph_option().is_some(),
                    !is_taken && name == CUDA_GRAPH_OPTION,
                    "{name}={value}"
                );
            }
        }
        let options = vec![("a\0b".to_string(), String::new())];
        assert!(ProviderConfig { kind: Provider::Cuda, device: 0, options }.check().is_err());
    }
}
