//! `Opener`: opens the graphs of a model folder over one copy of the weights and verifies the ports of each.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use ort::logging::LogLevel;
use ort::session::Session;
use ort::session::builder::{PrepackedWeights, SessionBuilder};
use t5gemma_graphs::Target;
use t5gemma_graphs::config::Head;
use t5gemma_graphs::interface::{DType, IMAGE_FEATURES, POSITION_IDS, Ports, REORDER, VISION_ENCODER};
use t5gemma_graphs::manifest::{Manifest, WeightsRecord};
use t5gemma_graphs::tensors::Role;
use t5gemma_kernels::{self as kernels, GraphKind, Kernels};

use super::ports::{Difference, first_difference};
use super::{GraphSession, ImageInput, OpenOptions};
use crate::device::Provider;
use crate::engine_files::EngineFiles;
use crate::error::Error;
use crate::folder::Folder;
use crate::log;
use crate::onnxruntime;
use crate::provider::{self, Fallback};
use crate::weights::{self, Initializers, UploadedWeights};

/// The state that the sessions of a model are opened from.
pub(crate) struct Opener<'f> {
    library: onnxruntime::Loaded,
    folder: &'f Folder,
    weights: Initializers<'f>,
    options: &'f OpenOptions,
    kernels: Kernels,
    /// Copies of weights in ONNX Runtime's own layout, which the graphs share if it computes their quantized matmuls.
    prepacked: PrepackedWeights,
    /// Operators that do not run on the requested provider, in the graphs opened so far.
    pub fallbacks: Vec<Fallback>,
}

/// A graph to open.
struct GraphFile<'a> {
    /// `encoder`, `decoder_with_past`, ….
    name: &'a str,
    path: Cow<'a, Path>,
    ports: &'a Ports,
    /// The names of the weights that it reads.
    weights: &'a [String],
    provider_options: BTreeMap<String, String>,
}

impl<'f> Opener<'f> {
    /// Loads ONNX Runtime and makes the weights available.
    pub fn new(folder: &'f Folder, options: &'f OpenOptions) -> Result<Opener<'f>, Error> {
        kernels::instructions()?;
        let library = onnxruntime::initialise(options.library.as_deref(), options.threads)?;
        let weights = weights::in_place(folder).map_err(Error::onnxruntime("sharing the weights"))?;
        EngineFiles::new(folder, options.engines_beside(&folder.path)).check_cache(options.provider.kind)?;
        let Manifest { facts, kept_tokens, weights: WeightsRecord { tensors, .. }, .. } = &folder.manifest;
        let vocab_size = match facts.custom.head {
            Head::Stock | Head::Linear { bias: None, .. } => kept_tokens.unwrap_or(facts.decoder.vocab_size),
            // Something lies between the product and the logits, so that no product is that of a head.
            _ => 0,
        };
        let cross_key_values = tensors.iter().filter(|tensor| tensor.role == Role::CrossKeyValue);
        let cross_key_values: HashSet<String> = cross_key_values.map(|tensor| tensor.name.clone()).collect();
        let reads_source = move |weight: &str| cross_key_values.contains(weight);
        let kernels = Kernels::new(vocab_size, facts.final_logit_softcapping, reads_source);
        let prepacked = PrepackedWeights::new();
        Ok(Opener { library, folder, weights, options, kernels, prepacked, fallbacks: Vec::new() })
    }

    /// [`Opener::new`] for further graphs of a model that was opened before, over the same copies of its weights.
    pub fn with_weights(
        folder: &'f Folder,
        options: &'f OpenOptions,
        prepacked: PrepackedWeights,
        uploaded: Option<&UploadedWeights>,
    ) -> Result<Opener<'f>, Error> {
        let mut opener = Opener { prepacked, ..Opener::new(folder, options)? };
        if let Some(uploaded) = uploaded {
            opener.weights = uploaded.initializers(folder).map_err(Error::onnxruntime("sharing the weights"))?;
        }
        Ok(opener)
    }

    /// The copies of weights that graphs opened later can share.
    pub fn prepacked(&self) -> PrepackedWeights {
        self.prepacked.clone()
    }

    /// Copies the weights to the device, if the provider can use them there, for all graphs opened from here on. The
    /// returned copy has to outlive them.
    pub fn upload(&mut self) -> Result<Option<UploadedWeights>, Error> {
        let provider = &self.options.provider;
        // TensorRT's engines contain their weights, and models exported for a CPU read them where the file is mapped.
        let reads_in_place = matches!(provider.kind, Provider::Cpu | Provider::Cuda);
        if !reads_in_place || !self.folder.manifest.files.contains_key(REORDER) {
            return Ok(None);
        }
        let uploaded = UploadedWeights::new(&self.library.environment, provider, self.folder)?;
        self.weights = uploaded.initializers(self.folder).map_err(Error::onnxruntime("sharing the weights"))?;
        Ok(Some(uploaded))
    }

    /// Opens one graph and verifies its ports.
    pub fn open(&mut self, name: &str, ports: &Ports) -> Result<GraphSession, Error> {
        let (folder, provider) = (self.folder, &self.options.provider);
        let files = EngineFiles::new(folder, self.options.engines_beside(&folder.path));
        let provider_options = provider.options_of(&files, name)?;
        if let Some(wrapper) = files.built(name, provider.kind)? {
            return self.open_file(GraphFile { name, path: wrapper.into(), ports, weights: &[], provider_options });
        }
        let record = folder.graph(name);
        let path = folder.path.join(&record.file).into();
        self.open_file(GraphFile { name, path, ports, weights: &record.weights, provider_options })
    }

    /// Opens the graph that reads images.
    ///
    /// # Panics
    /// If the model has none.
    pub fn open_vision(&mut self) -> Result<GraphSession, Error> {
        let specs = self.folder.manifest.graph_specs();
        let spec =
            specs.iter().find(|spec| spec.file == VISION_ENCODER).expect("a model that reads images has this graph");
        self.open(spec.name, &spec.ports)
    }

    /// Opens the graph that changes rows, to which the provider's options do not apply.
    pub fn open_reorder(&mut self, ports: &Ports) -> Result<GraphSession, Error> {
        let path = self.folder.path.join(REORDER).into();
        self.open_file(GraphFile { name: "reorder", path, ports, weights: &[], provider_options: BTreeMap::new() })
    }

    fn open_file(&mut self, file: GraphFile) -> Result<GraphSession, Error> {
        let config = &self.options.provider;
        let provider = config.kind;
        // The few operators that move a cache are not worth an engine.
        let computing = match (file.name, provider) {
            ("reorder", Provider::TensorRt) => Provider::Cuda,
            _ => provider,
        };
        let builder = config.builder_with(computing, &self.library.environment, &file.provider_options)?;
        let kernels = self.kernels.for_another_session();
        let session = self.build(builder, &kernels, &file).map_err(|error| {
            let is_missing = error.code() == ort::ErrorCode::NotImplemented;
            if is_missing && self.folder.manifest.dtype == DType::BFloat16 && provider == Provider::Cpu {
                return Error::Unsupported {
                    what: format!("{}: ONNX Runtime does not compute in bfloat16 on the CPU", file.path.display()),
                    remedy: "export the model with dtype float32, or use a GPU provider".into(),
                };
            }
            Error::onnxruntime(format!("opening {}", file.path.display()))(error)
        })?;
        if let Some(Difference { port, expected, found }) = first_difference(file.ports, &session) {
            return Err(Error::Interface { path: file.path.to_path_buf(), port, expected, found });
        }
        if provider != Provider::Cpu {
            let fallbacks = provider::fallbacks(&session, computing, file.name);
            self.fallbacks.extend(fallbacks.map_err(Error::onnxruntime("listing the operators of each provider"))?);
        }
        let takes_positions = file.ports.inputs.iter().any(|port| port.name == POSITION_IDS);
        let source_scale = self.folder.manifest.facts.custom.source_scale().filter(|_| takes_positions);
        let port = file.ports.inputs.iter().find(|port| port.name == IMAGE_FEATURES).cloned();
        let takes_empty = matches!(provider, Provider::Cpu | Provider::Cuda);
        let vision = self.folder.manifest.facts.vision.as_ref().filter(|_| !takes_empty);
        let placeholder_token = vision.map(|vision| vision.image_token);
        let image_features = port.map(|port| ImageInput { port, placeholder_token });
        Ok(GraphSession::new(session, kernels, source_scale, image_features))
    }

    fn build(&self, builder: SessionBuilder, kernels: &Kernels, file: &GraphFile) -> ort::Result<Session> {
        let provider = self.options.provider.kind;
        let builder = if provider == Provider::Cpu { builder } else { provider::recording(builder)? };
        let is_cpu = self.folder.manifest.target == Target::Cpu.name() && provider == Provider::Cpu;
        let prepacks =
            is_cpu && self.folder.manifest.quantization.is_any() && !kernels::reads_packed_weights_in_place();
        let builder = if prepacks { builder.with_prepacked_weights(&self.prepacked)? } else { builder };
        let mut builder = builder
            .with_prepacking(prepacks)?
            // The decoder's shapes grow with every step: an allocation plan for one of them would never be used again.
            .with_memory_pattern(false)?;
        if let Some(prefix) = &self.options.profile {
            let mut path = prefix.clone().into_os_string();
            path.push(format!("-{}", file.name));
            builder = builder.with_profiling(path)?;
        }
        let is_pool_here = self.library.origin.is_this_process();
        if !is_pool_here || (self.options.threads.is_some() && self.options.threads != self.library.threads) {
            builder = builder
                .with_independent_thread_pool()?
                .with_intra_threads(self.options.threads.or(self.library.threads).unwrap_or(0))?
                // Spinning between calls would keep the threads of the other graphs from their cores.
                .with_config_entry("session.force_spinning_stop", "1")?;
        }
        // Our operators take precedence over ONNX Runtime's. They take float32 only, which is what graphs for a CPU are
        // in.
        if is_cpu {
            // Sparse logits are fewer than the graph declares, and ONNX Runtime would warn about that in every step.
            if file.name.starts_with("decoder_with_past") && !log::wants_more_than_warnings() {
                builder = builder.with_log_level(LogLevel::Error)?;
            }
            let kind = if file.name.starts_with("decoder") { GraphKind::Decoder } else { GraphKind::Encoder };
            for domain in kernels.operators(kind)? {
                builder = builder.with_operators(domain)?;
            }
        }
        for name in file.weights {
            builder = builder.with_initializer(name, self.weights[name.as_str()].clone())?;
        }
        builder.commit_from_file(&file.path)
    }
}
