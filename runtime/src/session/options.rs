//! `OpenOptions`: how a model folder is opened.

use std::path::{Path, PathBuf};

use crate::device::{Provider, ProviderConfig};
use crate::error::Error;
use crate::folder::Folder;
use crate::limits::Limits;

/// How a model is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The ONNX Runtime library to load; by default it is searched for, see [`onnxruntime::report`](crate::onnxruntime::report).
    pub library: Option<PathBuf>,
    /// Threads to compute with; by default as many as the machine has cores. All models of a process share the threads that
    /// the first was opened with; one that asks for another number has its own.
    pub threads: Option<usize>,
    /// Compare the hash of the whole weights file, however large, instead of samples of it.
    pub check_weights: bool,
    /// How many bytes of encoder results are kept, so that sources that come again (regenerated, or with other options) are
    /// not encoded again; [`DEFAULT_ENCODER_CACHE_BYTES`] by default, 0 for none. What is found is what encoding again would
    /// give, to the last digit: sources are the same only with the same rows beside them. [`Model`](crate::Model) only.
    pub encoder_cache_bytes: usize,
    /// What runs side by side in one call of [`Model::generate_batch`](crate::Model::generate_batch), [`Model::score`](crate::Model::score) or an encoder; the rows of a larger one run in
    /// pieces.
    pub limits: Limits,
    /// What computes the model; the processor by default.
    pub provider: ProviderConfig,
    /// Have ONNX Runtime write down how long each operator of each graph takes: into files that begin with this and the
    /// graph's name, when the model is closed.
    pub profile: Option<PathBuf>,
    /// Whether the steps of a model whose cache stays on its device and is written in place (`--target cuda`) have memory that
    /// stays where it is from request to request, where rows are generated one by one (greedily, or drawn). CUDA graphs need it,
    /// so the provider's option `enable_cuda_graph` has it be so. What is kept comes on top of
    /// [`EngineOptions::max_bytes`](crate::EngineOptions::max_bytes). Not by default.
    pub fixed_step_buffers: bool,
    /// The folder with the engines of the model's serving plan, where they do not lie in the model's own: what has been written
    /// by `build_engines.sh --engines DIR` or [`build_engines`](crate::build_engines). For providers that have engines.
    pub engines: Option<PathBuf>,
}

/// What [`OpenOptions::encoder_cache_bytes`] is by default: 64 MiB, which are 7000 source tokens of the 2b model's width.
pub const DEFAULT_ENCODER_CACHE_BYTES: usize = 64 << 20;

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        let encoder_cache_bytes = DEFAULT_ENCODER_CACHE_BYTES;
        let provider = ProviderConfig::default();
        OpenOptions {
            library: None,
            threads: None,
            check_weights: false,
            encoder_cache_bytes,
            limits: Limits::default(),
            provider,
            profile: None,
            fixed_step_buffers: false,
            engines: None,
        }
    }
}

/// More than any machine computes with; ONNX Runtime starts as many as it is told to, whatever that takes.
const MOST_THREADS: usize = 1024;

/// Refuses options that no machine can have.
pub(crate) fn check_options(options: &OpenOptions) -> Result<(), Error> {
    options.provider.check()?;
    let provider = options.provider.kind;
    if let (Some(engines), Provider::Cpu | Provider::Cuda) = (&options.engines, provider) {
        let found = format!("{} for {provider}", engines.display());
        return Err(Error::input("engines", "none but for tensorrt and nv-tensorrt-rtx, which have engines", found));
    }
    match options.threads.filter(|threads| !(1..=MOST_THREADS).contains(threads)) {
        Some(threads) => Err(Error::input("threads", format!("1 to {MOST_THREADS}"), threads.to_string())),
        None => Ok(()),
    }
}

/// The folder in which the engines' folder is: the model's, unless another was named.
pub(crate) fn engines_of<'o>(folder: &'o Folder, options: &'o OpenOptions) -> &'o Path {
    options.engines.as_deref().unwrap_or(&folder.path)
}
