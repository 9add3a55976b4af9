//! What computes a model: a provider of ONNX Runtime, its options, and the device whose memory it uses. Plain values and their
//! rules; sessions on a provider are made in `provider`.

use std::fmt;

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};

use crate::error::Error;

/// What computes the graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    /// ONNX Runtime's own kernels, on the processor.
    #[default]
    Cpu,
    /// ONNX Runtime's kernels for NVIDIA GPUs.
    Cuda,
    /// TensorRT, and CUDA for what it does not take.
    TensorRt,
    /// TensorRT for RTX, a plugin of its own.
    NvTensorRtRtx,
}

impl Provider {
    /// Every provider.
    pub const ALL: [Provider; 4] = [Provider::Cpu, Provider::Cuda, Provider::TensorRt, Provider::NvTensorRtRtx];

    /// The name on the command line and in `provider_options.json`.
    pub fn name(self) -> &'static str {
        match self {
            Provider::Cpu => "cpu",
            Provider::Cuda => "cuda",
            Provider::TensorRt => "tensorrt",
            Provider::NvTensorRtRtx => "nv-tensorrt-rtx",
        }
    }

    /// ONNX Runtime's name for it.
    pub(crate) fn long_name(self) -> &'static str {
        match self {
            Provider::Cpu => "CPUExecutionProvider",
            Provider::Cuda => "CUDAExecutionProvider",
            Provider::TensorRt => "TensorrtExecutionProvider",
            Provider::NvTensorRtRtx => "NvTensorRTRTXExecutionProvider",
        }
    }

    /// The package with ONNX Runtime's side of it.
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

/// An execution provider of ONNX Runtime, its device and its options.
#[derive(Clone, Debug, Default)]
pub struct ProviderConfig {
    /// The provider.
    pub kind: Provider,
    /// The number of the GPU.
    pub device: u32,
    /// Options of the provider by the names that ONNX Runtime gives them, over those that the model folder has. `library` is
    /// ours: the file of a provider that is a plugin.
    pub options: Vec<(String, String)>,
}

/// Where a session keeps what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The process's own memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(i32),
}

impl Device {
    pub(crate) fn memory(self) -> ort::Result<MemoryInfo<'static>> {
        let (device, id) = match self {
            Device::Cpu => (AllocationDevice::CPU, 0),
            Device::Cuda(id) => (AllocationDevice::CUDA, id),
        };
        MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
    }
}

/// The CUDA provider's option for CUDA graphs.
pub(crate) const CAPTURES: &str = "enable_cuda_graph";

/// An option for CUDA graphs, where what a step is given and returns lies elsewhere each time: a graph that was captured writes
/// where its first run did, and reads what was there.
pub(crate) fn no_graphs(needed: &str, (name, value): &(String, String)) -> Error {
    let expected = format!("no CUDA graphs, which need {needed}");
    Error::input("provider option", expected, format!("{name}={value}"))
}

impl ProviderConfig {
    /// Where sessions keep what they compute.
    pub(crate) fn device(&self) -> Device {
        match self.kind {
            Provider::Cpu => Device::Cpu,
            _ => Device::Cuda(self.device as i32),
        }
    }

    /// The option that has the provider capture steps as CUDA graphs, if it is given.
    pub(crate) fn captures(&self) -> Option<&(String, String)> {
        let captures = |(name, value): &&(String, String)| name == CAPTURES && value != "0";
        self.options.iter().rfind(|(name, _)| name == CAPTURES).filter(captures)
    }

    /// Refuses what means nothing.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.kind == Provider::Cpu && (self.device != 0 || !self.options.is_empty()) {
            let found = match self.options.first() {
                Some((name, value)) => format!("{name}={value}"),
                None => format!("device {}", self.device),
            };
            return Err(Error::input(
                "provider",
                "one with devices and options (cuda, …)",
                format!("cpu with {found}"),
            ));
        }
        let replays = |(name, value): &&(String, String)| {
            let captures = self.kind == Provider::Cuda && name == CAPTURES;
            (name.ends_with("cuda_graph") || name.ends_with("cuda_graph_enable")) && value != "0" && !captures
        };
        if let Some(option) = self.options.iter().find(replays) {
            return Err(no_graphs("the provider cuda", option));
        }
        match self.options.iter().find(|(name, value)| name.is_empty() || name.contains('\0') || value.contains('\0')) {
            Some((name, value)) => Err(Error::input("provider option", "NAME=VALUE", format!("{name:?}={value:?}"))),
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
                // Which model may have it is seen when it is opened.
                let cuda = config(Provider::Cuda);
                assert_eq!(cuda.check().is_ok(), is_taken || name == CAPTURES, "{name}={value}");
                assert_eq!(cuda.captures().is_some(), !is_taken && name == CAPTURES, "{name}={value}");
            }
        }
        let options = vec![("a\0b".to_string(), String::new())];
        assert!(ProviderConfig { kind: Provider::Cuda, device: 0, options }.check().is_err());
    }
}
