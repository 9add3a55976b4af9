//! Sessions on a provider of ONNX Runtime. A provider that is not available is an error that names the missing library and the
//! package that has it; nothing falls back to the CPU without being reported.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;

use ort::AsPointer;
use ort::environment::Environment;
use ort::ep::ExecutionProviderDispatch;
#[cfg(feature = "cuda")]
use ort::ep::{ArbitrarilyConfigurableExecutionProvider, CUDA};
use ort::memory::DeviceType;
use ort::session::Session;
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};
use t5gemma_graphs::interface::PROVIDER_OPTIONS;

use crate::device::{CAPTURES, Provider, ProviderConfig};
use crate::error::Error;
use crate::folder::Folder;
use crate::onnxruntime::{self, Loaded};

/// Operators of a graph that fall back to another provider than the one asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The graph.
    pub graph: String,
    /// ONNX Runtime's name of the provider.
    pub provider: String,
    /// How many operators of each kind.
    pub operators: BTreeMap<String, usize>,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: usize = self.operators.values().sum();
        write!(f, "{}: {all} operators are computed by {}:", self.graph, self.provider)?;
        self.operators.iter().try_for_each(|(operator, count)| write!(f, " {operator} {count}"))
    }
}

/// The folder's options for each graph, by provider.
type Planned = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

impl ProviderConfig {
    /// The options for a graph: those of the folder's serving plan, and over them the caller's.
    pub(crate) fn options_of(
        &self,
        (folder, engines): (&Folder, &Path),
        graph: &str,
    ) -> Result<BTreeMap<String, String>, Error> {
        let mut options = BTreeMap::new();
        if folder.manifest.files.contains_key(PROVIDER_OPTIONS) {
            let path = folder.path.join(PROVIDER_OPTIONS);
            let bytes = fs::read(&path).map_err(Error::file(&path))?;
            let planned: Planned = serde_json::from_slice(&bytes)
                .map_err(|error| Error::File { path: path.clone(), problem: error.to_string() })?;
            let planned = planned.get(self.kind.name()).and_then(|graphs| graphs.get(graph));
            options.extend(planned.into_iter().flatten().map(|(name, value)| {
                // What the plan calls a path lies where the engines do.
                let value = match name.ends_with("_path") {
                    true => engines.join(value).display().to_string(),
                    false => value.clone(),
                };
                (name.clone(), value)
            }));
        }
        options.extend(self.options.iter().cloned());
        // The other graphs are given and return what lies elsewhere each time.
        if graph != "decoder_with_past" {
            options.remove(CAPTURES);
        }
        Ok(options)
    }

    /// A session to be, on the provider.
    pub(crate) fn builder(
        &self,
        environment: &Environment,
        options: &BTreeMap<String, String>,
    ) -> Result<SessionBuilder, Error> {
        self.builder_with(self.kind, environment, options)
    }

    /// A session to be, on the provider or on one that computes a part for it; what is wrong is told of the one asked for.
    pub(crate) fn builder_with(
        &self,
        computing: Provider,
        environment: &Environment,
        options: &BTreeMap<String, String>,
    ) -> Result<SessionBuilder, Error> {
        let builder = Session::builder(environment).map_err(Error::onnxruntime("preparing a session"))?;
        if computing == Provider::Cpu {
            let placed = builder.with_auto_device(AutoDevicePolicy::PreferCPU);
            return placed.map_err(|error| self.unusable(&error.into()));
        }
        if computing == Provider::NvTensorRtRtx {
            return self.with_plugin(environment, builder, options);
        }
        let mut options = options.clone();
        options.remove("library");
        let providers = match computing {
            Provider::TensorRt => vec![self.tensorrt(&options)?, self.cuda(&BTreeMap::new())?],
            _ => vec![self.cuda(&options)?],
        };
        let providers = providers.into_iter().map(ExecutionProviderDispatch::error_on_failure).collect::<Vec<_>>();
        builder.with_execution_providers(providers).map_err(|error| self.unusable(&error.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, options: &BTreeMap<String, String>) -> Result<ExecutionProviderDispatch, Error> {
        // TF32 rounds float32 products to 19 bits, so it is off unless an option turns it on.
        let cuda = CUDA::default().with_device_id(self.device as i32).with_tf32(false);
        Ok(options.iter().fold(cuda, |cuda, (name, value)| cuda.with_arbitrary_config(name, value)).build())
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(&self, _: &BTreeMap<String, String>) -> Result<ExecutionProviderDispatch, Error> {
        Err(self.not_built("cuda"))
    }

    #[cfg(feature = "tensorrt")]
    fn tensorrt(&self, options: &BTreeMap<String, String>) -> Result<ExecutionProviderDispatch, Error> {
        let tensorrt = ort::ep::TensorRT::default().with_device_id(self.device as i32);
        Ok(options.iter().fold(tensorrt, |tensorrt, (name, value)| tensorrt.with_arbitrary_config(name, value)).build())
    }

    #[cfg(not(feature = "tensorrt"))]
    fn tensorrt(&self, _: &BTreeMap<String, String>) -> Result<ExecutionProviderDispatch, Error> {
        Err(self.not_built("tensorrt"))
    }

    #[cfg(not(feature = "tensorrt"))]
    fn not_built(&self, feature: &str) -> Error {
        Error::Unsupported {
            what: format!(
                "the provider {} requires the feature `{feature}`, which this build of t5gemma-runtime lacks",
                self.kind
            ),
            remedy: "enable it".into(),
        }
    }

    fn with_plugin(
        &self,
        environment: &Environment,
        builder: SessionBuilder,
        options: &BTreeMap<String, String>,
    ) -> Result<SessionBuilder, Error> {
        let name = self.kind.long_name();
        let missing = |problem: String| Error::Library { problem, remedy: remedy(self.kind, None) };
        let mut devices = environment.devices().filter(|device| device.ep().is_ok_and(|ep| ep == name)).peekable();
        if devices.peek().is_none() {
            let library = plugin(options).map_err(missing)?;
            environment.register_ep_library(name, &library).map_err(|error| self.unusable(&error))?;
        }
        let is_gpu = |device: &ort::device::Device| device.hardware_device().ty() == DeviceType::GPU;
        let of_name = environment.devices().filter(|device| device.ep().is_ok_and(|ep| ep == name)).filter(is_gpu);
        let Some(device) = of_name.into_iter().nth(self.device as usize) else {
            let found = environment.devices().filter(|device| device.ep().is_ok_and(|ep| ep == name)).count();
            return Err(Error::Unsupported {
                what: format!(
                    "the provider {} cannot be used: {name} has no GPU of number {} here; it found {found}",
                    self.kind, self.device
                ),
                remedy: "use a machine with an NVIDIA RTX GPU and its driver, or --provider cpu".into(),
            });
        };
        let given: Vec<(String, String)> = (options.iter())
            .filter(|(name, _)| *name != "library")
            .map(|(option, value)| (format!("{name}.{option}"), value.clone()))
            .collect();
        builder.with_devices([device], Some(&given)).map_err(|error| self.unusable(&error.into()))
    }

    /// Why the provider cannot be had, with the missing library and its package where that is why.
    fn unusable(&self, error: &ort::Error) -> Error {
        let message = error.to_string();
        let problem = |what: &str| format!("the provider {} cannot be used: {what}", self.kind);
        if let Some(library) = missing_library(&message) {
            let problem = problem(&format!("{library} cannot be loaded"));
            return Error::Library { problem, remedy: remedy(self.kind, Some(library)) };
        }
        if message.contains("not enabled in this build") || message.contains("not supported in this build") {
            let what = "this ONNX Runtime was built without it";
            return Error::Library { problem: problem(what), remedy: remedy(self.kind, None) };
        }
        Error::onnxruntime(format!("preparing the provider {}", self.kind))(ort::Error::new(message))
    }
}

/// The first library that a loader's message says is missing.
fn missing_library(message: &str) -> Option<&str> {
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
const TENSORRT: &str = "TensorRT 10 from NVIDIA (version 11 does not serve: ONNX Runtime 1.31 is built for 10)";

/// Libraries by how their names begin, and where they come from.
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

fn remedy(provider: Provider, library: Option<&str>) -> String {
    let package = library.and_then(|library| PACKAGES.iter().find(|(begin, _)| library.starts_with(begin)));
    match (library, package) {
        (Some(library), Some((_, package))) => {
            let path = if package.starts_with("pip") || package.starts_with("TensorRT") {
                " and put its folder into LD_LIBRARY_PATH"
            } else {
                ""
            };
            format!("install what has {library}: {package}{path}")
        }
        (Some(library), None) => format!("install what has {library}, or put its folder into LD_LIBRARY_PATH"),
        (None, _) => match provider {
            Provider::NvTensorRtRtx => {
                format!(
                    "`pip download --no-deps --only-binary=:all: {}`, unzip it and give {PLUGIN} with \
                     --provider-option library=FILE",
                    provider.package()
                )
            }
            // Told at once, not as the next error.
            Provider::TensorRt => format!("{}; it also needs {TENSORRT}", onnxruntime::remedy_for(provider.package())),
            _ => onnxruntime::remedy_for(provider.package()),
        },
    }
}

/// The plugin's file name.
const PLUGIN: &str = "libonnxruntime_providers_nv_tensorrt_rtx.so";

/// The plugin's file: named by an option, or beside ONNX Runtime.
fn plugin(options: &BTreeMap<String, String>) -> Result<PathBuf, String> {
    let path = match options.get("library") {
        Some(path) => PathBuf::from(path),
        None => onnxruntime::folder().join(PLUGIN),
    };
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("the provider nv-tensorrt-rtx cannot be used: expected {}, found none", path.display())),
    }
}

/// Whether a provider works on this machine.
#[derive(Clone, Debug)]
pub struct ProviderProbe {
    /// The provider.
    pub provider: Provider,
    /// Why it cannot be used, if it cannot.
    pub result: Result<(), Error>,
}

/// Tries each provider with a graph of one operator.
///
/// # Errors
/// No usable ONNX Runtime library.
pub fn probe_providers(library: Option<&Path>, providers: &[ProviderConfig]) -> Result<Vec<ProviderProbe>, Error> {
    let Loaded { environment, .. } = onnxruntime::initialise(library, None)?;
    let probe = |config: &ProviderConfig| ProviderProbe { provider: config.kind, result: probe(&environment, config) };
    Ok(providers.iter().map(probe).collect())
}

fn probe(environment: &Environment, provider: &ProviderConfig) -> Result<(), Error> {
    /// y = Identity(x), float32 \[1\], of opset 20.
    const IDENTITY: &[u8] =
        b"\x08\t:7\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\
        \x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14";
    let options = provider.options.iter().cloned().collect();
    let builder = provider.builder(environment, &options)?;
    let session = recording(builder).and_then(|mut builder| builder.commit_from_memory(IDENTITY));
    let session = session.map_err(|error| provider.unusable(&error))?;
    let fallbacks = fallbacks(&session, provider.kind, "a graph of one operator");
    match fallbacks.map_err(|error| provider.unusable(&error))?.first() {
        None => Ok(()),
        Some(fallback) => Err(provider.unusable(&ort::Error::new(fallback.to_string()))),
    }
}

/// Has a session remember which provider computes what, for [`fallbacks`].
pub(crate) fn recording(builder: SessionBuilder) -> ort::Result<SessionBuilder> {
    Ok(builder.with_config_entry("session.record_ep_graph_assignment_info", "1")?)
}

/// What of a graph other providers compute than the one asked for.
pub(crate) fn fallbacks(session: &Session, provider: Provider, graph: &str) -> ort::Result<Vec<Fallback>> {
    let api = ort::api();
    let (mut subgraphs, mut count) = (ptr::null(), 0);
    // SAFETY: the session lives, and all pointers are to this frame. What is returned belongs to the session.
    let status = unsafe { (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &mut subgraphs, &mut count) };
    // SAFETY: each status is the one just returned, and is given away once.
    unsafe { ort::Error::result_from_status(status) }?;
    let mut found: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for at in 0..count {
        // SAFETY: there are `count` subgraphs, which live as long as the session; so do names and nodes of each, of which
        // there are as many as is said.
        unsafe {
            let subgraph = *subgraphs.add(at);
            let mut name = ptr::null();
            ort::Error::result_from_status((api.EpAssignedSubgraph_GetEpName)(subgraph, &mut name))?;
            let name = CStr::from_ptr(name).to_string_lossy().into_owned();
            let (mut nodes, mut nodes_count) = (ptr::null(), 0);
            ort::Error::result_from_status((api.EpAssignedSubgraph_GetNodes)(subgraph, &mut nodes, &mut nodes_count))?;
            for at in 0..nodes_count {
                let mut operator = ptr::null();
                ort::Error::result_from_status((api.EpAssignedNode_GetOperatorType)(*nodes.add(at), &mut operator))?;
                let operator = CStr::from_ptr(operator).to_string_lossy().into_owned();
                *found.entry(name.clone()).or_default().entry(operator).or_default() += 1;
            }
        }
    }
    let others = found.into_iter().filter(|(name, _)| name != provider.long_name());
    Ok(others.map(|(provider, operators)| Fallback { graph: graph.to_string(), provider, operators }).collect())
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
                "version 11 does not serve",
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
    fn what_tensorrt_needs_is_told_at_once() {
        let told = remedy(Provider::TensorRt, None);
        assert!(told.contains("onnxruntime-gpu") && told.contains("TensorRT 10"), "{told}");
    }
}
