//! Sessions: the graphs of a model folder as ONNX Runtime opens them, over one copy of the weights, each held to the inputs and
//! outputs that the configuration implies. What runs them, and with which tensors, is `Model`'s and `Encoder`'s.
//!
//! # Design
//! The weights are mapped once, and for a device copied there once, and given to every session as initializers, with ONNX
//! Runtime's prepacking off: each session would otherwise read or pack a copy of its own.

mod options;
mod ports;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use ort::logging::LogLevel;
use ort::session::builder::PrepackedWeights;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Tensor, TensorElementType};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Ports, REORDER, reads_source};
use t5gemma_graphs::manifest::Manifest;
use t5gemma_kernels::{self as kernels, Kernels, LogitsRequest, Side};

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::device::Provider;
use crate::engine_files;
use crate::error::Error;
use crate::folder::Folder;
use crate::log;
use crate::onnxruntime;
use crate::provider::{self, Fallback};
use crate::weights::{self, Initializers, Uploaded};
pub use options::{DEFAULT_ENCODER_CACHE_BYTES, OpenOptions};
pub(crate) use options::{check_options, engines_of};
use ports::first_difference;

/// An opened graph, which runs one call at a time.
pub(crate) struct Graph {
    session: Mutex<Session>,
    pub kernels: Kernels,
}

impl Graph {
    /// The session, for runs of which so much is wanted, in whole rows.
    pub fn lock(&self, wanted: LogitsRequest) -> MutexGuard<'_, Session> {
        self.lock_to_list(wanted.dense())
    }

    /// The session, for a run that may list what is wanted if that will do.
    pub fn lock_to_list(&self, wanted: LogitsRequest) -> MutexGuard<'_, Session> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        self.kernels.want(wanted);
        session
    }
}

/// What sessions are opened from.
pub(crate) struct Opener<'f> {
    library: onnxruntime::Loaded,
    folder: &'f Folder,
    weights: Initializers<'f>,
    options: &'f OpenOptions,
    kernels: Kernels,
    /// Copies of weights in ONNX Runtime's own layout, which the graphs share where it computes products of few bits.
    prepacked: PrepackedWeights,
    /// What other providers compute than the one asked for, in the graphs opened so far.
    pub fallbacks: Vec<Fallback>,
}

impl<'f> Opener<'f> {
    /// Loads ONNX Runtime, and has the weights ready.
    pub fn new(folder: &'f Folder, options: &'f OpenOptions) -> Result<Opener<'f>, Error> {
        kernels::instructions()?;
        let library = onnxruntime::initialise(options.library.as_deref(), options.threads)?;
        let weights = weights::mapped(folder).map_err(Error::onnxruntime("sharing the weights"))?;
        engine_files::check_cache((folder, engines_of(folder, options)), options.provider.kind)?;
        let decoder = &folder.config.decoder;
        let scored = folder.manifest.kept_tokens.unwrap_or(decoder.vocab_size);
        let kernels = Kernels::new(scored, decoder.final_logit_softcapping, reads_source);
        let prepacked = PrepackedWeights::new();
        Ok(Opener { library, folder, weights, options, kernels, prepacked, fallbacks: Vec::new() })
    }

    /// Has the graphs opened from here on read the weights from one copy on the device, where that is how the provider reads them.
    /// What is returned has to outlive them.
    pub fn upload(&mut self) -> Result<Option<Uploaded>, Error> {
        let provider = &self.options.provider;
        // An engine of TensorRT has its weights in itself; of the others, models for the CPU read the file where it is mapped.
        let reads_in_place = matches!(provider.kind, Provider::Cpu | Provider::Cuda);
        if !reads_in_place || !self.folder.manifest.files.contains_key(REORDER) {
            return Ok(None);
        }
        let uploaded = Uploaded::new(&self.library.environment, provider, self.folder)?;
        self.weights = uploaded.initializers(self.folder).map_err(Error::onnxruntime("sharing the weights"))?;
        Ok(Some(uploaded))
    }

    /// Opens one graph over the shared weights and holds it to its ports.
    pub fn open(&mut self, graph: &str, ports: &Ports) -> Result<Graph, Error> {
        let (folder, provider) = (self.folder, &self.options.provider);
        let engines = engines_of(folder, self.options);
        let given = provider.options_of((folder, engines), graph)?;
        if let Some(wrapper) = engine_files::built((folder, engines), graph, provider.kind)? {
            return self.open_file(&wrapper, (graph, ports, &[]), &given);
        }
        let record = folder.graph(graph);
        self.open_file(&folder.path.join(&record.file), (graph, ports, &record.weights), &given)
    }

    /// Opens the graph that changes rows, for which TensorRT's options are not.
    pub fn open_reorder(&mut self, ports: &Ports) -> Result<Graph, Error> {
        let path = self.folder.path.join(REORDER);
        self.open_file(&path, ("reorder", ports, &[]), &BTreeMap::new())
    }

    fn open_file(
        &mut self,
        path: &Path,
        (graph, ports, used): (&str, &Ports, &[String]),
        given: &BTreeMap<String, String>,
    ) -> Result<Graph, Error> {
        let config = &self.options.provider;
        let provider = config.kind;
        // The few operators that move a cache are not worth an engine.
        let computing = match (graph, provider) {
            ("reorder", Provider::TensorRt) => Provider::Cuda,
            _ => provider,
        };
        let builder = config.builder_with(computing, &self.library.environment, given)?;
        let kernels = self.kernels.beside();
        let build = || {
            let builder = if provider == Provider::Cpu { builder } else { provider::recording(builder)? };
            let is_cpu = self.folder.manifest.target == Target::Cpu.name() && provider == Provider::Cpu;
            let prepacks =
                is_cpu && self.folder.manifest.quantization.is_any() && !kernels::reads_packed_weights_in_place();
            let builder = if prepacks { builder.with_prepacked_weights(&self.prepacked)? } else { builder };
            let mut builder = builder
                .with_prepacking(prepacks)?
                // The decoder's shapes grow with every step: a plan remembered for each would never be used again.
                .with_memory_pattern(false)?;
            if let Some(prefix) = &self.options.profile {
                let mut file = prefix.clone().into_os_string();
                file.push(format!("-{graph}"));
                builder = builder.with_profiling(file)?;
            }
            if let Some(threads) = self.options.threads.filter(|_| self.options.threads != self.library.threads) {
                builder = builder
                    .with_independent_thread_pool()?
                    .with_intra_threads(threads)?
                    // Between calls they would keep the threads of the other graphs from their cores.
                    .with_config_entry("session.force_spinning_stop", "1")?;
            }
            // Ours stand before ONNX Runtime's own, and take float32 only, as graphs for a CPU are.
            if is_cpu {
                // Logits that are listed are fewer than the graph says, of which ONNX Runtime would warn at every step.
                if graph == "decoder_with_past" && !log::wants_more_than_warnings() {
                    builder = builder.with_log_level(LogLevel::Error)?;
                }
                let side = if graph.starts_with("decoder") { Side::Decoder } else { Side::Encoder };
                for domain in kernels.operators(side)? {
                    builder = builder.with_operators(domain)?;
                }
            }
            for name in used {
                builder = builder.with_initializer(name, self.weights[name.as_str()].clone())?;
            }
            builder.commit_from_file(path)
        };
        let session = build().map_err(|error: ort::Error| match (self.folder.manifest.dtype, provider) {
            (DType::BFloat16, Provider::Cpu) if error.code() == ort::ErrorCode::NotImplemented => Error::Unsupported {
                what: format!("{}: ONNX Runtime does not compute in bfloat16 on the CPU", path.display()),
                remedy: "export the model with --dtype float32, or use a GPU (--provider)".into(),
            },
            _ => Error::onnxruntime(format!("opening {}", path.display()))(error),
        })?;
        for (side, expected, found) in
            [("input", &ports.inputs, session.inputs()), ("output", &ports.outputs, session.outputs())]
        {
            if let Some((port, expected, found)) = first_difference(side, expected, found) {
                return Err(Error::Interface { path: path.to_path_buf(), port, expected, found });
            }
        }
        if provider != Provider::Cpu {
            let fallbacks = provider::fallbacks(&session, computing, graph);
            self.fallbacks.extend(fallbacks.map_err(Error::onnxruntime("asking what computes the operators"))?);
        }
        Ok(Graph { session: Mutex::new(session), kernels })
    }
}

/// Whether several sources may share a row of the encoder: its graph keeps them apart, and attention computes nothing between them.
pub(crate) fn shares_rows(manifest: &Manifest) -> bool {
    manifest.side_by_side && kernels::attention_skips_other_sources()
}

/// Runs a graph and returns its outputs in order.
pub(crate) fn run(
    (graph, wanted): (&Graph, LogitsRequest),
    during: &'static str,
    inputs: &[SessionInputValue],
    cancel: &Cancellation,
) -> Result<Vec<DynValue>, Error> {
    run_locked(graph.lock(wanted), during, inputs, cancel)
}

/// Runs a graph that takes sources with their mask.
pub(crate) fn run_on_batch(
    graph: &Graph,
    during: &'static str,
    batch: &Batch,
    cancel: &Cancellation,
) -> Result<Vec<DynValue>, Error> {
    let rectangle = |values: &[i64]| int64_tensor(batch.rows(), values.to_vec());
    let (ids, mask) = (rectangle(batch.ids())?, rectangle(batch.mask())?);
    run((graph, LogitsRequest::All), during, &[(&ids).into(), (&mask).into()], cancel)
}

pub(crate) fn run_locked(
    mut session: MutexGuard<'_, Session>,
    during: &'static str,
    inputs: &[SessionInputValue],
    cancel: &Cancellation,
) -> Result<Vec<DynValue>, Error> {
    let options = cancel.run_options()?;
    let outputs = session.run_with_options(inputs, options).map_err(cancel.failed(during))?;
    Ok(outputs.into_iter().map(|(_, value)| value).collect())
}

pub(crate) fn int64_tensor(rows: usize, values: Vec<i64>) -> Result<DynValue, Error> {
    let shape = [rows, values.len() / rows];
    let tensor = Tensor::from_array((shape, values)).map_err(Error::onnxruntime("preparing a run"))?;
    Ok(tensor.into_dyn())
}

pub(crate) fn float32_values(value: &DynValue) -> ort::Result<Vec<f32>> {
    Ok(match value.data_type() {
        TensorElementType::Float16 => value.try_extract_tensor::<f16>()?.1.iter().map(|x| x.to_f32()).collect(),
        TensorElementType::Bfloat16 => value.try_extract_tensor::<bf16>()?.1.iter().map(|x| x.to_f32()).collect(),
        _ => value.try_extract_tensor::<f32>()?.1.to_vec(),
    })
}
