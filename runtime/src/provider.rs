//! What computes the graphs: a provider of ONNX Runtime, its device and its options. A provider that cannot be had is an error
//! that names the missing library and the package that has it; nothing falls back to the CPU unsaid.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;

use ort::AsPointer;
use ort::environment::Environment;
use ort::ep::{ArbitrarilyConfigurableExecutionProvider, CUDA, ExecutionProviderDispatch, TensorRT};
use ort::memory::DeviceType;
use ort::session::Session;
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};
use t5gemma_graphs::interface::{ENGINES, PROVIDER_OPTIONS};

use crate::error::Error;
use crate::folder::Folder;
use crate::onnxruntime;
use crate::state::Device;

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

    /// The name on the command line and in [`PROVIDER_OPTIONS`].
    pub fn name(self) -> &'static str {
        match self {
            Provider::Cpu => "cpu",
            Provider::Cuda => "cuda",
            Provider::TensorRt => "tensorrt",
            Provider::NvTensorRtRtx => "nv-tensorrt-rtx",
        }
    }

    /// ONNX Runtime's name for it.
    fn long_name(self) -> &'static str {
        match self {
            Provider::Cpu => "CPUExecutionProvider",
            Provider::Cuda => "CUDAExecutionProvider",
            Provider::TensorRt => "TensorrtExecutionProvider",
            Provider::NvTensorRtRtx => "NvTensorRTRTXExecutionProvider",
        }
    }

    /// The package with ONNX Runtime's side of it.
    fn package(self) -> &'static str {
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

/// Where a model is computed.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// By what.
    pub provider: Provider,
    /// The number of the GPU.
    pub device: u32,
    /// Options of the provider by the names that ONNX Runtime gives them, over those that the model folder has. `library` is
    /// ours: the file of a provider that is a plugin.
    pub options: Vec<(String, String)>,
}

/// Operators that another provider computes than the one asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// The graph.
    pub graph: String,
    /// ONNX Runtime's name of the provider.
    pub provider: String,
    /// How many operators of each kind.
    pub operators: BTreeMap<String, usize>,
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: usize = self.operators.values().sum();
        write!(f, "{}: {all} operators are computed by {}:", self.graph, self.provider)?;
        self.operators.iter().try_for_each(|(operator, count)| write!(f, " {operator} {count}"))
    }
}

/// The CUDA provider's option for CUDA graphs.
const CAPTURES: &str = "enable_cuda_graph";

/// An option for CUDA graphs, where what a step is given and returns lies elsewhere each time: a graph that was captured writes
/// where its first run did, and reads what was there.
pub(crate) fn no_graphs(needed: &str, (name, value): &(String, String)) -> Error {
    let expected = format!("no CUDA graphs, which need {needed}");
    Error::input("provider option", expected, format!("{name}={value}"))
}

/// The folder's options for each graph, by provider.
type Planned = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

impl Placement {
    /// Where sessions keep what they compute.
    pub(crate) fn device(&self) -> Device {
        match self.provider {
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
        if self.provider == Provider::Cpu && (self.device != 0 || !self.options.is_empty()) {
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
            let captures = self.provider == Provider::Cuda && name == CAPTURES;
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
            let planned = planned.get(self.provider.name()).and_then(|graphs| graphs.get(graph));
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
        self.builder_with(self.provider, environment, options)
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
        // Float32 is float32: the faster multiplication of 19 bits has to be asked for.
        let cuda = CUDA::default().with_device_id(self.device as i32).with_tf32(false);
        let given = || options.iter().filter(|(name, _)| *name != "library");
        let providers: Vec<ExecutionProviderDispatch> = match computing {
            Provider::TensorRt => {
                let tensorrt = TensorRT::default().with_device_id(self.device as i32);
                let tensorrt = given().fold(tensorrt, |ep, (name, value)| ep.with_arbitrary_config(name, value));
                vec![tensorrt.build().error_on_failure(), cuda.build().error_on_failure()]
            }
            _ => {
                let cuda = given().fold(cuda, |ep, (name, value)| ep.with_arbitrary_config(name, value));
                vec![cuda.build().error_on_failure()]
            }
        };
        builder.with_execution_providers(providers).map_err(|error| self.unusable(&error.into()))
    }

    fn with_plugin(
        &self,
        environment: &Environment,
        builder: SessionBuilder,
        options: &BTreeMap<String, String>,
    ) -> Result<SessionBuilder, Error> {
        let name = self.provider.long_name();
        let missing = |problem: String| Error::Library { problem, remedy: remedy(self.provider, None) };
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
                    self.provider, self.device
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
        let problem = |what: &str| format!("the provider {} cannot be used: {what}", self.provider);
        if let Some(library) = missing_library(&message) {
            let problem = problem(&format!("{library} cannot be loaded"));
            return Error::Library { problem, remedy: remedy(self.provider, Some(library)) };
        }
        if message.contains("not enabled in this build") || message.contains("not supported in this build") {
            let what = "this ONNX Runtime was built without it";
            return Error::Library { problem: problem(what), remedy: remedy(self.provider, None) };
        }
        Error::onnxruntime(format!("preparing the provider {}", self.provider))(ort::Error::new(message))
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

/// Tries a provider with a graph of one operator.
pub(crate) fn attempt(environment: &Environment, placement: &Placement) -> Result<(), Error> {
    /// y = Identity(x), float32 \[1\], of opset 20.
    const IDENTITY: &[u8] =
        b"\x08\t:7\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\
        \x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14";
    let options = placement.options.iter().cloned().collect();
    let builder = placement.builder(environment, &options)?;
    let session = recording(builder).and_then(|mut builder| builder.commit_from_memory(IDENTITY));
    let session = session.map_err(|error| placement.unusable(&error))?;
    let elsewhere = elsewhere(&session, placement.provider, "a graph of one operator");
    match elsewhere.map_err(|error| placement.unusable(&error))?.first() {
        None => Ok(()),
        Some(elsewhere) => Err(placement.unusable(&ort::Error::new(elsewhere.to_string()))),
    }
}

/// Has a session remember which provider computes what, for [`elsewhere`].
pub(crate) fn recording(builder: SessionBuilder) -> ort::Result<SessionBuilder> {
    Ok(builder.with_config_entry("session.record_ep_graph_assignment_info", "1")?)
}

/// What of a graph other providers compute than the one asked for.
pub(crate) fn elsewhere(session: &Session, provider: Provider, graph: &str) -> ort::Result<Vec<Elsewhere>> {
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
    Ok(others.map(|(provider, operators)| Elsewhere { graph: graph.to_string(), provider, operators }).collect())
}

/// The graph file to open in place of `graph` where an engine was built of it ahead of time, by the folder's script.
///
/// # Errors
/// An engine that was built of another graph, or by a TensorRT whose engines ONNX Runtime does not run.
pub(crate) fn built(
    (folder, engines): (&Folder, &Path),
    graph: &str,
    provider: Provider,
) -> Result<Option<PathBuf>, Error> {
    let record = folder.graph(graph);
    let stem = record.file.strip_suffix(".onnx").unwrap_or(&record.file);
    let plan = engines.join(ENGINES).join(format!("{stem}.plan"));
    if provider != Provider::TensorRt || !plan.is_file() {
        return Ok(None);
    }
    let stamp = plan.with_extension("plan.stamp");
    let found = fs::read_to_string(&stamp).map_err(Error::file(&stamp))?;
    let expected = format!("graph {}, weights {}", record.record.sha256, folder.manifest.weights.record.sha256);
    let refused = |expected: String, found: &str| {
        let expected = format!("{expected} (build it with build_engines.sh --force, or remove it)");
        let found = found.trim().to_string();
        Error::Folder { path: plan.clone(), field: "stamp".into(), expected, found }
    };
    if !found.starts_with(&expected) {
        return Err(refused(format!("an engine of {expected}"), &found));
    }
    if major_version(&found).is_some_and(|major| major > 10) {
        return Err(refused("an engine of TensorRT 10, which ONNX Runtime 1.31 is built for".into(), &found));
    }
    // Of a wrapper only a copy that was made for these engines may lie elsewhere.
    let (name, wrapper) = (format!("{stem}_ctx.onnx"), engines.join(format!("{stem}_ctx.onnx")));
    if engines != folder.path {
        let [own, copy] =
            [folder.path.join(&name), wrapper.clone()].map(|path| fs::read(&path).map_err(Error::file(&path)));
        if own? != copy? {
            return Err(refused(format!("a copy of the model's {name} beside it"), "another file"));
        }
    }
    Ok(Some(wrapper))
}

/// The major version in a stamp's `TensorRT 101600` or `TensorRT 10.16.0`, if it tells it.
fn major_version(stamp: &str) -> Option<u32> {
    let (_, version) = stamp.split_once("TensorRT ")?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    let number: u32 = digits.parse().ok()?;
    Some(if number >= 1000 { number / 10_000 } else { number })
}

/// The stamp of the engines that a provider has cached in the folder.
const STAMP: &str = "cache.stamp";

/// Refuses engines that were cached for other graphs.
pub(crate) fn check_cache((folder, engines): (&Folder, &Path), provider: Provider) -> Result<(), Error> {
    let stamp = engines.join(ENGINES).join(STAMP);
    let Ok(found) = fs::read_to_string(&stamp) else { return Ok(()) };
    let expected = stamp_of(folder, provider);
    match found == expected {
        true => Ok(()),
        false => Err(Error::Folder {
            path: stamp,
            field: "graphs".into(),
            expected: format!(
                "{} (remove the folder {ENGINES}, or run `t5gemma build-engines --force`)",
                expected.trim()
            ),
            found: found.trim().to_string(),
        }),
    }
}

/// Says of the engines in the folder what they were built of.
pub(crate) fn stamp_cache(folder: &Path, text: &str) -> Result<(), Error> {
    let engines = folder.join(ENGINES);
    fs::create_dir_all(&engines).map_err(Error::file(&engines))?;
    let stamp = engines.join(STAMP);
    fs::write(&stamp, text).map_err(Error::file(&stamp))
}

/// What the engines of a folder are built of and by.
pub(crate) fn stamp_of(folder: &Folder, provider: Provider) -> String {
    let graphs = folder.manifest.graphs.values().map(|graph| graph.record.sha256.as_str()).collect::<Vec<_>>();
    let weights = &folder.manifest.weights.record.sha256;
    format!("provider {provider}, {}, graphs {}, weights {weights}\n", onnxruntime::version(), graphs.join(" "))
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
    fn versions_in_stamps_are_read() {
        for (stamp, expected) in [
            ("graph a, weights b, TensorRT 101600, NVIDIA H100, 9.0", Some(10)),
            ("graph a, weights b, TensorRT 110100, NVIDIA H100, 9.0", Some(11)),
            ("graph a, weights b, TensorRT 8601, NVIDIA A10, 8.6", Some(0)),
            ("graph a, weights b, TensorRT 10.16.1.11, NVIDIA H100, 9.0", Some(10)),
            ("graph a, weights b, TensorRT 11.1, NVIDIA H100, 9.0", Some(11)),
            ("graph a, weights b, TensorRT unknown, NVIDIA H100, 9.0", None),
            ("", None),
        ] {
            assert_eq!(major_version(stamp), expected, "{stamp}");
        }
    }

    #[test]
    fn what_tensorrt_needs_is_told_at_once() {
        let told = remedy(Provider::TensorRt, None);
        assert!(told.contains("onnxruntime-gpu") && told.contains("TensorRT 10"), "{told}");
    }

    #[test]
    fn options_that_cannot_be_right_are_refused() {
        let placement = Placement { device: 1, ..Placement::default() };
        assert!(placement.check().is_err());
        let options = vec![("device_id".to_string(), "0".to_string())];
        assert!(Placement { options: options.clone(), ..Placement::default() }.check().is_err());
        assert!(Placement { provider: Provider::Cuda, device: 1, options }.check().is_ok());
        for (value, is_taken) in [("0", true), ("1", false)] {
            for name in ["enable_cuda_graph", "trt_cuda_graph_enable"] {
                let options = vec![(name.to_string(), value.to_string())];
                let placement = |provider| Placement { provider, device: 0, options: options.clone() };
                assert_eq!(placement(Provider::TensorRt).check().is_ok(), is_taken, "{name}={value}");
                // Which model may have it is seen when it is opened.
                let cuda = placement(Provider::Cuda);
                assert_eq!(cuda.check().is_ok(), is_taken || name == CAPTURES, "{name}={value}");
                assert_eq!(cuda.captures().is_some(), !is_taken && name == CAPTURES, "{name}={value}");
            }
        }
        let options = vec![("a\0b".to_string(), String::new())];
        assert!(Placement { provider: Provider::Cuda, device: 0, options }.check().is_err());
    }
}
