//! Finds the library that a provider lacks, and the package that contains it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::device::Provider;
use crate::onnxruntime;

/// The first library that is missing according to a loader's message.
pub(super) fn missing_library(message: &str) -> Option<&str> {
    let words = |text| str::split(text, |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | '(' | ')'));
    let before = message.find(": cannot open shared object file").map(|end| &message[..end]);
    let library = match before {
        Some(before) => words(before).next_back(),
        None => words(message).find(|word| word.contains("onnxruntime_providers_")),
    };
    let library = library.filter(|library| library.contains(".so") || library.contains("onnxruntime_providers_"))?;
    Some(library.rsplit('/').next().unwrap_or(library).trim_end_matches([':', '.']))
}

/// The TensorRT that ONNX Runtime's provider needs.
const TENSORRT: &str = "TensorRT 10 from NVIDIA (version 11 does not work: ONNX Runtime 1.31 is built for 10)";

/// Prefixes of library names, and what has these libraries.
const PACKAGES: [(&str, &str); 13] = [
    ("libcublas", "pip package nvidia-cublas"),
    ("libcudart", "pip package nvidia-cuda-runtime"),
    ("libcurand", "pip package nvidia-curand"),
    ("libcufft", "pip package nvidia-cufft"),
    ("libnvrtc", "pip package nvidia-cuda-nvrtc"),
    ("libcudnn", "pip package nvidia-cudnn-cu13"),
    ("libnvinfer", TENSORRT),
    ("libnvonnxparser", TENSORRT),
    ("libtensorrt_rtx", "pip package onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    ("libtensorrt_onnxparser_rtx", "pip package onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    ("libcuda.", "NVIDIA driver"),
    ("libonnxruntime_providers_nv", "pip package onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    ("libonnxruntime_providers_", "pip package onnxruntime-gpu"),
];

/// How to install what a provider lacks: `library`, or everything if the library is unknown.
pub(super) fn remedy(provider: Provider, library: Option<&str>) -> String {
    let package = library.and_then(|library| PACKAGES.iter().find(|(prefix, _)| library.starts_with(prefix)));
    match (library, package) {
        (Some(library), Some((_, package))) => {
            let path = if package.starts_with("pip") || package.starts_with("TensorRT") {
                " and add its folder to LD_LIBRARY_PATH"
            } else {
                ""
            };
            format!("install the package with {library}: {package}{path}")
        }
        (Some(library), None) => format!("install the package with {library}, or add its folder to LD_LIBRARY_PATH"),
        (None, _) => match provider {
            Provider::NvTensorRtRtx => {
                format!(
                    "`pip download --no-deps --only-binary=:all: {}`, unzip it and pass the path of {PLUGIN} as the \
                     provider option library",
                    provider.package()
                )
            }
            // Otherwise this would be the next error.
            Provider::TensorRt => format!("{}; it also needs {TENSORRT}", onnxruntime::remedy_for(provider.package())),
            _ => onnxruntime::remedy_for(provider.package()),
        },
    }
}

/// The plugin library's file name.
const PLUGIN: &str = "libonnxruntime_providers_nv_tensorrt_rtx.so";

/// The plugin library: the one that the option names, or the one beside ONNX Runtime.
pub(super) fn plugin(options: &BTreeMap<String, String>) -> Result<PathBuf, String> {
    let path = match options.get("library") {
        Some(path) => PathBuf::from(path),
        None => onnxruntime::folder().join(PLUGIN),
    };
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("the provider nv-tensorrt-rtx cannot be used: {} does not exist", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_library_is_named_with_its_package() {
        let cases = [
            (
                "Failed to load library /x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open \
                 shared object file: No such file or directory",
                "libcublasLt.so.13",
                "nvidia-cublas",
            ),
            (
                "error: libnvinfer.so.10: cannot open shared object file: x",
                "libnvinfer.so.10",
                "version 11 does not work",
            ),
            ("libcuda.so.1: cannot open shared object file", "libcuda.so.1", "NVIDIA driver"),
            ("/a/libcudnn.so.9: cannot open shared object file", "libcudnn.so.9", "nvidia-cudnn-cu13"),
            (
                "/c/libonnxruntime_providers_cuda.so: cannot open shared object file",
                "libonnxruntime_providers_cuda.so",
                "onnxruntime-gpu",
            ),
        ];
        for (message, library, package) in cases {
            assert_eq!(missing_library(message), Some(library), "{message}");
            assert!(remedy(Provider::Cuda, Some(library)).contains(package), "{library}");
        }
        assert_eq!(missing_library("CUDA failure 100: no CUDA-capable device is detected"), None);
    }

    #[test]
    fn the_remedy_for_tensorrt_names_all_that_it_needs() {
        let remedy = remedy(Provider::TensorRt, None);
        assert!(remedy.contains("onnxruntime-gpu") && remedy.contains("TensorRT 10"), "{remedy}");
    }
}
