//! Creates sessions on an execution provider of ONNX Runtime. A missing provider is an error that names the missing
//! library and the package that contains it; nothing falls back to the CPU unreported.

mod remedy;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::path::Path;
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

use crate::device::{CUDA_GRAPH_OPTION, Provider, ProviderConfig};
use crate::engine_files::EngineFiles;
use crate::error::Error;
use crate::identity_model;
use crate::onnxruntime::{self, Loaded};
use remedy::{missing_library, plugin, remedy};

/// Operators of a graph that fall back from the requested provider to another one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fallback {
    /// The graph.
    pub graph: String,
    /// ONNX Runtime's name of the other provider.
    pub provider: String,
    /// The number of operators of each kind.
    pub operators: BTreeMap<String, usize>,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: usize = self.operators.values().sum();
        write!(f, "{}: {} runs {all} operators:", self.graph, self.provider)?;
        self.operators.iter().try_for_each(|(operator, count)| write!(f, " {operator} {count}"))
    }
}

/// The contents of `provider_options.json`: for each provider and graph, options and their values.
type PlannedOptions = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

impl ProviderConfig {
    /// The options for a graph: those of the model's serving plan, overridden by the caller's.
    pub(crate) fn options_of(&self, files: &EngineFiles, graph: &str) -> Result<BTreeMap<String, String>, Error> {
        let model = files.model;
        let mut options = BTreeMap::new();
        if model.manifest.files.contains_key(PROVIDER_OPTIONS) {
            let path = model.path.join(PROVIDER_OPTIONS);
            let bytes = fs::read(&path).map_err(Error::reading(&path))?;
            let planned: PlannedOptions = serde_json::from_slice(&bytes)
                .map_err(|error| Error::File { path: path.clone(), problem: error.to_string() })?;
            let planned = planned.get(self.kind.name()).and_then(|graphs| graphs.get(graph));
            options.extend(planned.into_iter().flatten().map(|(name, value)| {
                // Paths are relative to the folder of the engines.
                let is_path = name.ends_with("_path");
                let value = if is_path { files.folder.join(value).display().to_string() } else { value.clone() };
                (name.clone(), value)
            }));
        }
        options.extend(self.options.iter().cloned());
        // Only the step has its inputs and outputs at fixed addresses.
        if graph != "decoder_with_past" {
            options.remove(CUDA_GRAPH_OPTION);
        }
        Ok(options)
    }

    /// A builder of a session on the provider.
    pub(crate) fn builder(
        &self,
        environment: &Environment,
        options: &BTreeMap<String, String>,
    ) -> Result<SessionBuilder, Error> {
        self.builder_with(self.kind, environment, options)
    }

    /// A session builder on `computing`: the provider itself, or one that runs some operators for it. Errors name the
    /// provider.
    pub(crate) fn builder_with(
        &self,
        computing: Provider,
        environment: &Environment,
        options: &BTreeMap<String, String>,
    ) -> Result<SessionBuilder, Error> {
        let builder = Session::builder(environment).map_err(Error::onnxruntime("preparing a session"))?;
        if computing == Provider::Cpu {
            let builder = builder.with_auto_device(AutoDevicePolicy::PreferCPU);
            return builder.map_err(|error| self.unusable(&error.into()));
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
        let name = self.kind.ort_name();
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
                    "the provider {} cannot be used: {name} has no GPU {} on this machine, where it found {found}",
                    self.kind, self.device
                ),
                remedy: "use a machine with an NVIDIA RTX GPU and its driver, or the provider cpu".into(),
            });
        };
        let options: Vec<(String, String)> = (options.iter())
            .filter(|(option, _)| *option != "library")
            .map(|(option, value)| (format!("{name}.{option}"), value.clone()))
            .collect();
        builder.with_devices([device], Some(&options)).map_err(|error| self.unusable(&error.into()))
    }

    /// The error of a provider that ONNX Runtime refuses. A missing library is named with the package that has it.
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

/// Whether a provider works on this machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
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
    let options = provider.options.iter().cloned().collect();
    let builder = provider.builder(environment, &options)?;
    let session = recording(builder).and_then(|mut builder| builder.commit_from_memory(identity_model::FLOAT32));
    let session = session.map_err(|error| provider.unusable(&error))?;
    let fallbacks = fallbacks(&session, provider.kind, "a graph of one operator");
    match fallbacks.map_err(|error| provider.unusable(&error))?.first() {
        None => Ok(()),
        Some(fallback) => Err(provider.unusable(&ort::Error::new(fallback.to_string()))),
    }
}

/// Makes a session record which provider runs which operator, for [`fallbacks`].
pub(crate) fn recording(builder: SessionBuilder) -> ort::Result<SessionBuilder> {
    Ok(builder.with_config_entry("session.record_ep_graph_assignment_info", "1")?)
}

/// The operators of a graph that do not run on `provider`.
pub(crate) fn fallbacks(session: &Session, provider: Provider, graph: &str) -> ort::Result<Vec<Fallback>> {
    let api = ort::api();
    let (mut subgraphs, mut count) = (ptr::null(), 0);
    // SAFETY: the session is alive, and the output pointers are to this frame. The returned array belongs to the
    // session.
    let status = unsafe { (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &mut subgraphs, &mut count) };
    // SAFETY: the status was just returned, and is passed on once.
    unsafe { ort::Error::result_from_status(status) }?;
    let mut found: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for at in 0..count {
        // SAFETY: there are `count` subgraphs, which live as long as the session, as do their names and their nodes, of
        // which there are `nodes_count`.
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
    let others = found.into_iter().filter(|(name, _)| name != provider.ort_name());
    Ok(others.map(|(provider, operators)| Fallback { graph: graph.to_string(), provider, operators }).collect())
}
