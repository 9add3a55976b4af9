//! `Model`: the three graphs of a generating model as sessions, with the caches and the tokenizer that its calls share.
//! It runs the graphs; which tokens to feed them is decided in `generate`.

mod decode;
mod encode;
mod graphs;

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use t5gemma_graphs::facts::Facts;
use t5gemma_graphs::images::ImageSettings;
use t5gemma_graphs::interface::{self, BATCH, CacheLayout, DType, Dim, Logits, Ports, REORDER};
use t5gemma_graphs::manifest::Manifest;

use crate::adapter::{Adapter, Adapters};
use crate::batch::Batch;
use crate::constraint::Compiler;
use crate::device::{Device, Provider, cuda_graphs_require};
use crate::encoder_cache::EncoderCache;
use crate::error::Error;
use crate::folder::{Folder, other_task};
use crate::fork::{InCall, Origin};
use crate::limits::Limits;
use crate::log;
use crate::options::{GenerationConfig, OptionError};
use crate::profiles::Profiles;
use crate::provider::Fallback;
use crate::session::{GraphSession, OpenOptions, Opener};
use crate::state::{BufferPool, DeviceCacheConfig};
use crate::tokenizer::{LazyTokenizer, Tokenizer};
use crate::vision::VisionTower;
use crate::vocabulary_subset::VocabularySubset;
use crate::weights::UploadedWeights;
pub(crate) use graphs::Lane;
use graphs::{FirstGraphs, Graphs, LazyOpener};

/// An opened model, for use from any number of threads. Each graph runs one call at a time.
pub struct Model {
    // The sessions read the weights that `folder` maps or `_uploaded` owns, so they come first: fields are dropped in
    // order.
    base: Graphs,
    /// The graphs that take adapters, opened when the first adapter is loaded.
    lora: OnceLock<Graphs>,
    /// The graph that reads images, opened for the first image.
    vision: VisionTower,
    /// The graphs of [`Lane::Aside`], opened when they are first needed.
    aside: OnceLock<FirstGraphs>,
    /// The state of opening these.
    lazy_opener: Mutex<LazyOpener>,
    adapters: Adapters,
    /// For each cached tensor, in the order of the graphs, whether it is of cross-attention.
    is_cross: Vec<bool>,
    on_cpu: bool,
    limits: Limits,
    /// How the cache is kept on the device, if the model was exported for one.
    device_cache: Option<DeviceCacheConfig>,
    _uploaded: Option<UploadedWeights>,
    fallbacks: Vec<Fallback>,
    encoder_cache: Option<EncoderCache>,
    options: GenerationConfig,
    tokenizer: Arc<LazyTokenizer>,
    constraint_compiler: Compiler,
    folder: Folder,
    origin: Origin,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("path", &self.folder.path).finish_non_exhaustive()
    }
}

/// The greatest length of a target, and what limits it.
pub(crate) struct TargetLimit {
    pub tokens: usize,
    pub reason: &'static str,
}

impl Model {
    /// Opens the model folder `path` with the default [`OpenOptions`].
    ///
    /// # Errors
    /// See [`Model::open_with`].
    pub fn open(path: impl AsRef<Path>) -> Result<Model, Error> {
        Model::open_with(path, &OpenOptions::default())
    }

    /// Opens the model folder `path`.
    ///
    /// # Errors
    /// No usable ONNX Runtime; a folder that is incomplete, altered, of another format version or of an unsupported
    /// configuration; graphs whose inputs and outputs do not match the configuration; a dtype that this machine does
    /// not support.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Model, Error> {
        options.check()?;
        let folder = Folder::open(path.as_ref(), options.weights_access())?;
        for warning in &folder.warnings {
            log::write(log::Severity::Warning, &format!("{}: {warning}", folder.path.display()));
        }
        if !folder.manifest.task.is_generation() {
            return Err(other_task(
                &folder.path,
                &folder.manifest.task,
                "text2text-generation, to generate with this model",
            ));
        }
        let defaults =
            GenerationConfig::of_model(folder.generation_config.as_deref(), &folder.manifest.facts.tokens)
                .map_err(|error| Error::GenerationConfig { path: folder.path.join("generation_config.json"), error })?;
        let mut defaults = defaults;
        if !folder.manifest.facts.custom.has_text_targets() {
            // Padding is that of sources, whose tokens are not those of targets.
            defaults.pad_token_id = folder.manifest.facts.tokens.pad.unwrap_or(0);
        }
        check_fixed_buffers(&folder.manifest, options)?;
        let parts = folder.manifest.graph_specs();
        let ports = |name: &str| {
            let part = parts.iter().find(|part| part.name == name);
            &part.expect("a model that generates has these graphs").ports
        };
        let is_cross = is_cross(ports("decoder_with_past"));
        let mut opener = Opener::new(&folder, options)?;
        let uploaded = opener.upload()?;
        let device_cache = if folder.manifest.files.contains_key(REORDER) {
            let reorder = opener.open_reorder(&interface::reorder(&folder.manifest.facts, folder.manifest.dtype))?;
            Some(device_cache(&folder, options, is_cross.clone(), reorder))
        } else {
            None
        };
        let base = Graphs {
            encoder: opener.open("encoder", ports("encoder"))?,
            decoder: opener.open("decoder", ports("decoder"))?,
            decoder_with_past: opener.open("decoder_with_past", ports("decoder_with_past"))?,
        };
        let fallbacks = std::mem::take(&mut opener.fallbacks);
        let lazy_opener = LazyOpener { options: options.clone(), prepacked: opener.prepacked() };
        drop(opener);
        let on_cpu = options.provider.kind == Provider::Cpu;
        let tokenizer = Arc::new(LazyTokenizer::in_folder(&folder.path));
        Ok(Model {
            base,
            lora: OnceLock::new(),
            vision: VisionTower::default(),
            aside: OnceLock::new(),
            lazy_opener: Mutex::new(lazy_opener),
            adapters: Adapters::default(),
            is_cross,
            on_cpu,
            limits: folder.limits(options.limits.resolved(on_cpu)),
            device_cache,
            _uploaded: uploaded,
            fallbacks,
            encoder_cache: Some(options.encoder_cache_bytes).filter(|&bytes| bytes > 0).map(EncoderCache::new),
            options: defaults,
            constraint_compiler: Compiler::new(tokenizer.clone(), folder.manifest.facts.decoder.vocab_size),
            tokenizer,
            folder,
            origin: Origin::now(),
        })
    }

    /// Begins a call; [`Error::ForkedInCall`] if that cannot be in this process.
    pub(crate) fn enter(&self) -> Result<InCall, Error> {
        self.origin.enter()
    }

    /// The model's generation options: those of its `generation_config.json`, with Hugging Face's defaults.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.options
    }

    /// The sizes, special tokens and labels of the model.
    pub fn facts(&self) -> &Facts {
        &self.folder.manifest.facts
    }

    /// The exporter's description of the model.
    pub fn manifest(&self) -> &Manifest {
        &self.folder.manifest
    }

    /// How images become pixel values and tokens.
    ///
    /// # Errors
    /// A model that reads no images.
    pub fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.folder.image_settings()
    }

    /// The model's tokenizer, loaded by the first call.
    ///
    /// # Errors
    /// The folder has no `tokenizer.json`, or an unusable one.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer.get()
    }

    /// The tokenizer of targets, which is that of sources.
    ///
    /// # Errors
    /// As [`Model::tokenizer`], and if targets are not text.
    pub fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        if self.facts().custom.has_text_targets() {
            return self.tokenizer();
        }
        Err(Error::Tokenizer {
            path: self.folder.path.clone(),
            problem: "the model's targets are not text: use token ids, in JSON lines or from a library".into(),
        })
    }

    /// The operators that fall back to another provider than the requested one. Shapes and the like always fall back to
    /// the CPU.
    pub fn fallbacks(&self) -> &[Fallback] {
        &self.fallbacks
    }

    /// Accepted differences between the folder and its export, as sentences: an edited `generation_config.json`. They
    /// are logged too, see [`log`](crate::log).
    pub fn warnings(&self) -> &[String] {
        &self.folder.warnings
    }

    /// Checks that the model returns cross-attentions.
    ///
    /// # Errors
    /// It was exported without alignment.
    pub fn check_cross_attentions(&self) -> Result<(), Error> {
        if self.has_cross_attentions() { Ok(()) } else { Err(no_cross_attentions("output_attentions").into()) }
    }

    /// The number of unused sets of step buffers that are kept, see [`OpenOptions::fixed_step_buffers`].
    pub fn fixed_buffer_sets(&self) -> usize {
        self.buffer_pool().map_or(0, |pool| pool.unused_sets())
    }

    /// Loads the PEFT LoRA adapter in `folder` (`adapter_config.json` and `adapter_model.safetensors`) as `name`, which the
    /// option `adapter` of further calls can then have. The model has to be exported for it, with
    /// `t5gemma-export --lora-inputs RANK`. The first adapter takes longer: the graphs that take adapters are opened for it.
    ///
    /// Copies of a model that an [`Engine`](crate::Engine) runs share the adapters of the first copy.
    ///
    /// # Errors
    /// A model that takes no adapters, a name that a loaded adapter has, a folder that cannot be read, an adapter for
    /// another base model or of a greater rank, or one that changes more than linear layers.
    pub fn load_adapter(&self, name: &str, folder: impl AsRef<Path>) -> Result<(), Error> {
        let _in_call = self.enter()?;
        let unsupported = |what: &str, remedy: &str| Error::Unsupported {
            what: format!("{}: {what}", self.folder.path.display()),
            remedy: remedy.into(),
        };
        if self.folder.manifest.lora_inputs.is_none() {
            return Err(unsupported("the model takes no adapters", "export it with lora_inputs"));
        }
        if self.buffer_pool().is_some() {
            let remedy = "open it without CUDA graphs and fixed_step_buffers";
            return Err(unsupported("steps with fixed buffers take no adapters", remedy));
        }
        self.adapters.load(name, folder.as_ref(), &self.folder.manifest)?;
        if let Err(error) = self.graphs(true) {
            self.adapters.unload(name)?;
            return Err(error);
        }
        Ok(())
    }

    /// Removes the adapter `name`. Calls and rows in flight that use it are not disturbed.
    ///
    /// # Errors
    /// No loaded adapter of that name.
    pub fn unload_adapter(&self, name: &str) -> Result<(), Error> {
        let _in_call = self.enter()?;
        self.adapters.unload(name)
    }

    /// The names of the loaded adapters, in alphabetical order.
    pub fn adapters(&self) -> Vec<String> {
        self.adapters.names()
    }

    /// The loaded adapter `name`, for [`Batch::with_adapter`].
    ///
    /// # Errors
    /// No loaded adapter of that name.
    pub fn adapter(&self, name: &str) -> Result<Adapter, Error> {
        Ok(self.adapters.get(name)?)
    }

    /// Whether the decoder returns cross-attentions.
    pub(crate) fn has_cross_attentions(&self) -> bool {
        self.folder.manifest.decoder_outputs().cross_attentions
    }

    /// Whether steps are captured as CUDA graphs.
    pub(crate) fn captures_cuda_graphs(&self) -> bool {
        self.buffer_pool().is_some_and(|pool| pool.captures())
    }

    fn buffer_pool(&self) -> Option<&BufferPool> {
        self.device_cache.as_ref().and_then(|cache| cache.buffers.as_deref())
    }

    /// Whether the cache stays in the memory of the device that computes.
    pub(crate) fn is_on_device(&self) -> bool {
        self.device_cache.is_some()
    }

    /// The layout of a cache in the process's memory. A cache on a device counts as growing: its rows cannot be ragged.
    pub(crate) fn layout(&self) -> CacheLayout {
        if self.is_on_device() { CacheLayout::Growing } else { self.folder.manifest.cache }
    }

    /// How much of one call runs at a time.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The greatest length of a target in tokens, decoder prompt included.
    pub fn max_target_length(&self) -> usize {
        self.target_limit().tokens
    }

    /// The greatest length of a target.
    pub(crate) fn target_limit(&self) -> TargetLimit {
        let planned = self.profiles().and_then(|profiles| profiles.decoder.as_ref()).and_then(|decoder| decoder.target);
        let positions = self.folder.manifest.facts.decoder.max_position_embeddings;
        let (tokens, reason) = match (self.folder.manifest.cache, planned) {
            (CacheLayout::Static(capacity), _) if capacity < positions => (capacity, "the capacity of the cache"),
            (_, Some(planned)) if planned < positions => (planned, "the target of its serving plan"),
            _ => (positions, "decoder.max_position_embeddings"),
        };
        TargetLimit { tokens, reason }
    }

    /// The sizes of the model's serving plan, if it has one.
    pub(crate) fn profiles(&self) -> Option<&Profiles> {
        self.folder.profiles.as_ref()
    }

    /// See [`Folder::check`] and [`Limits::check_source`]. Adapters must have been loaded for this model.
    pub(crate) fn check(&self, batch: &Batch) -> Result<(), Error> {
        batch.adapters().iter().flatten().try_for_each(|adapter| adapter.check(&self.folder.manifest))?;
        self.folder.check(batch)?;
        match batch.encoder_outputs() {
            Some(_) => Ok(()),
            None => self.limits.check_source(&self.folder.manifest, batch.length()),
        }
    }

    /// See [`Folder::check_targets`].
    pub(crate) fn check_targets(&self, batch: &Batch, prompt: usize) -> Result<(), Error> {
        self.folder.check_targets(batch, prompt)
    }

    /// See [`Folder::fit`].
    pub(crate) fn fit<'b>(&self, batch: &'b Batch) -> Cow<'b, Batch> {
        self.folder.fit(batch)
    }

    /// The subset of the vocabulary that has logits; `None` for the whole vocabulary.
    pub(crate) fn vocabulary_subset(&self) -> Option<&Arc<VocabularySubset>> {
        self.folder.vocabulary_subset.as_ref()
    }

    /// The model's folder.
    pub(crate) fn path(&self) -> &Path {
        &self.folder.path
    }

    /// The compiler of constraints for this model.
    pub(crate) fn constraint_compiler(&self) -> &Compiler {
        &self.constraint_compiler
    }
}

/// The error of an option that requires cross-attentions, of a model without them.
pub(crate) fn no_cross_attentions(option: &str) -> OptionError {
    OptionError::requires(option, "a model exported with alignment", "one without")
}

/// Rejects fixed step buffers and CUDA graphs for models that do not support them.
fn check_fixed_buffers(manifest: &Manifest, options: &OpenOptions) -> Result<(), Error> {
    let is_in_place = manifest.files.contains_key(REORDER) && manifest.cache == CacheLayout::InPlace;
    let is_float32 = manifest.dtype == DType::Float32;
    if let Some(option) = options.provider.cuda_graph_option() {
        if !is_in_place {
            return Err(cuda_graphs_require(
                "a cache in place (a model exported for the target cuda, without float positions)",
                option,
            ));
        }
        if is_float32 {
            return Err(cuda_graphs_require("float16 or bfloat16 (the CPU computes float32 self-attention)", option));
        }
    }
    if options.fixed_step_buffers {
        let refused = |requirement: &str| Err(Error::requires("fixed_step_buffers", "true", requirement));
        if !is_in_place {
            return refused(
                "a cache in place on the device (a model exported for the target cuda, without float positions)",
            );
        }
        if is_float32 && options.provider.target_device() != Device::Cpu {
            return refused("float16 or bfloat16 on a GPU (the CPU computes float32 self-attention)");
        }
    }
    Ok(())
}

/// How the cache of a model that was exported for a device is kept there.
fn device_cache(
    folder: &Folder,
    options: &OpenOptions,
    is_cross: Vec<bool>,
    reorder: GraphSession,
) -> DeviceCacheConfig {
    let (manifest, decoder) = (&folder.manifest, &folder.manifest.facts.decoder);
    let captures = options.provider.cuda_graph_option().is_some();
    let has_buffers = captures || options.fixed_step_buffers;
    DeviceCacheConfig {
        layout: manifest.cache,
        device: options.provider.target_device(),
        dtype: manifest.dtype,
        is_cross,
        kv_heads: decoder.num_key_value_heads,
        head_dim: decoder.head_dim,
        max_positions: decoder.max_position_embeddings,
        reorder: Arc::new(reorder),
        top_logits: match manifest.logits {
            Logits::Candidates(count) => Some(count),
            _ => None,
        },
        buffers: has_buffers.then(|| Arc::new(BufferPool::new(captures))),
    }
}

/// For each cached tensor, in the order of the graphs, whether it is of cross-attention, with source items on its first
/// axis.
fn is_cross(decoder_with_past: &Ports) -> Vec<bool> {
    // Only keys and values have four axes.
    let cached = decoder_with_past.inputs.iter().filter(|port| port.shape.len() == 4);
    cached.map(|port| port.shape[0] == Dim::symbol(BATCH)).collect()
}

#[cfg(test)]
mod tests {
    use t5gemma_graphs::interface::{Interface, Port};

    use super::*;

    #[test]
    fn cached_tensors_keep_their_order_from_graph_to_graph() {
        let config =
            r#"{"model_type": "t5gemma", "encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 3}}"#;
        let config = t5gemma_graphs::config::Config::parse(config).expect("a minimal config");
        let interface = Interface::of(&config.facts(), DType::Float32, Logits::Last, CacheLayout::Growing);
        let after_prefix = |port: &Port| port.name.split_once('.').map(|(_, rest)| rest.to_string());
        let names = |ports: &[Port]| ports.iter().map(after_prefix).collect::<Option<Vec<_>>>();
        let made = names(&interface.decoder.outputs[1..]).expect("all cached");
        assert_eq!(names(&interface.decoder_with_past.inputs[2..]).expect("all cached"), made);

        let grown: Vec<String> = made
            .iter()
            .zip(is_cross(&interface.decoder_with_past))
            .filter(|(_, is_cross)| !is_cross)
            .map(|(name, _)| name.clone())
            .collect();
        assert_eq!(names(&interface.decoder_with_past.outputs[1..]).expect("all cached"), grown);
        assert_eq!(grown.len(), 2 * 3);
    }
}
