//! `OpenOptions`: how a model folder is opened.

use std::path::{Path, PathBuf};

use crate::device::{Provider, ProviderConfig};
use crate::error::Error;
use crate::folder::WeightsAccess;
use crate::limits::Limits;

/// How a model is opened. Made from [`OpenOptions::default`] by its methods:
///
/// ```
/// use t5gemma_runtime::{OpenOptions, Provider, ProviderConfig};
///
/// let options = OpenOptions::default().provider(ProviderConfig::new(Provider::Cuda)).check_weights(true);
/// # assert!(options.check_weights);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenOptions {
    /// The ONNX Runtime library to load; by default it is searched for, see
    /// [`onnxruntime::report`](crate::onnxruntime::report).
    pub library: Option<PathBuf>,
    /// Number of threads; by default one per core. All models of a process share the threads of the first one; a model
    /// opened with another number has its own.
    pub threads: Option<usize>,
    /// Verifies the hash of the whole weights file, however large, instead of samples of it.
    pub check_weights: bool,
    /// Reads the weights file into memory instead of mapping it. A mapped file that is truncated while a model is open
    /// ends the process (`SIGBUS`); a file that was read may change. Opening takes longer, and processes no longer
    /// share the memory.
    pub read_weights: bool,
    /// Size in bytes of the cache of encoder outputs, so that repeated sources (regenerated, or with other options) are
    /// not encoded again; [`DEFAULT_ENCODER_CACHE_BYTES`] by default, 0 turns it off. A cached output is bit for bit
    /// what encoding again would give, because whole batches are cached. [`Model`](crate::Model) only.
    pub encoder_cache_bytes: usize,
    /// How much of one call of [`Model::generate_batch`](crate::Model::generate_batch),
    /// [`Model::score`](crate::Model::score) or an encoder runs at a time; the rows of a larger call run in pieces.
    pub limits: Limits,
    /// The provider that runs the model; the CPU by default.
    pub provider: ProviderConfig,
    /// Profiles each operator of each graph with ONNX Runtime, into files whose names begin with this prefix and the
    /// graph's name. They are written when the model is closed.
    pub profile: Option<PathBuf>,
    /// Whether one-token steps run in buffers at fixed addresses, which requests reuse; false by default. For models
    /// whose cache stays on the device and is written in place (exported for the target `cuda`), in generation without
    /// beams. CUDA graphs need it, so the provider option `enable_cuda_graph` implies it. The buffers come on top of
    /// [`EngineOptions::max_bytes`](crate::EngineOptions::max_bytes).
    pub fixed_step_buffers: bool,
    /// The folder with the engines of the model's serving plan, if they are not in the model's own: what
    /// `build_engines.sh --engines DIR` or [`build_engines`](crate::build_engines) has written. For providers that have
    /// engines.
    pub engines: Option<PathBuf>,
}

/// The default of [`OpenOptions::encoder_cache_bytes`]: 64 MiB, which is 7000 source tokens of the 2b model.
pub const DEFAULT_ENCODER_CACHE_BYTES: usize = 64 << 20;

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            library: None,
            threads: None,
            check_weights: false,
            read_weights: false,
            encoder_cache_bytes: DEFAULT_ENCODER_CACHE_BYTES,
            limits: Limits::default(),
            provider: ProviderConfig::default(),
            profile: None,
            fixed_step_buffers: false,
            engines: None,
        }
    }
}

/// An upper bound beyond what any machine has; ONNX Runtime starts as many threads as it is asked for.
const MOST_THREADS: usize = 1024;

impl OpenOptions {
    /// Sets [`OpenOptions::library`].
    pub fn library(self, library: impl Into<PathBuf>) -> OpenOptions {
        OpenOptions { library: Some(library.into()), ..self }
    }

    /// Sets [`OpenOptions::threads`].
    pub fn threads(self, threads: usize) -> OpenOptions {
        OpenOptions { threads: Some(threads), ..self }
    }

    /// Sets [`OpenOptions::check_weights`].
    pub fn check_weights(self, check_weights: bool) -> OpenOptions {
        OpenOptions { check_weights, ..self }
    }

    /// Sets [`OpenOptions::read_weights`].
    pub fn read_weights(self, read_weights: bool) -> OpenOptions {
        OpenOptions { read_weights, ..self }
    }

    /// Sets [`OpenOptions::encoder_cache_bytes`].
    pub fn encoder_cache_bytes(self, encoder_cache_bytes: usize) -> OpenOptions {
        OpenOptions { encoder_cache_bytes, ..self }
    }

    /// Sets [`OpenOptions::limits`].
    pub fn limits(self, limits: Limits) -> OpenOptions {
        OpenOptions { limits, ..self }
    }

    /// Sets [`OpenOptions::provider`].
    pub fn provider(self, provider: ProviderConfig) -> OpenOptions {
        OpenOptions { provider, ..self }
    }

    /// Sets [`OpenOptions::profile`].
    pub fn profile(self, prefix: impl Into<PathBuf>) -> OpenOptions {
        OpenOptions { profile: Some(prefix.into()), ..self }
    }

    /// Sets [`OpenOptions::fixed_step_buffers`].
    pub fn fixed_step_buffers(self, fixed_step_buffers: bool) -> OpenOptions {
        OpenOptions { fixed_step_buffers, ..self }
    }

    /// Sets [`OpenOptions::engines`].
    pub fn engines(self, folder: impl Into<PathBuf>) -> OpenOptions {
        OpenOptions { engines: Some(folder.into()), ..self }
    }

    /// Rejects options that no machine can satisfy.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.provider.check()?;
        let provider = self.provider.kind;
        if let (Some(engines), Provider::Cpu | Provider::Cuda) = (&self.engines, provider) {
            let requirement = format!("the provider tensorrt or nv-tensorrt-rtx (got {provider})");
            return Err(Error::requires("engines", engines.display().to_string(), requirement));
        }
        match self.threads.filter(|threads| !(1..=MOST_THREADS).contains(threads)) {
            Some(threads) => Err(Error::input("threads", format!("1 to {MOST_THREADS}"), threads.to_string())),
            None => Ok(()),
        }
    }

    /// How the weights file is read and checked.
    pub(crate) fn weights_access(&self) -> WeightsAccess {
        WeightsAccess { hash_all: self.check_weights, read: self.read_weights }
    }

    /// The folder in which the folder of engines is: the model's, unless another was named.
    pub(crate) fn engines_beside<'o>(&'o self, model: &'o Path) -> &'o Path {
        self.engines.as_deref().unwrap_or(model)
    }
}
