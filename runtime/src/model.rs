//! `Model`: the three graphs of a model folder as ONNX Runtime sessions over one copy of the weights, held to the interface
//! that the configuration implies. It runs them and knows what goes in and out; which tokens to feed it leaves to `generate`.
//!
//! # Design
//! The weights are mapped once, and for a device copied there once, and given to every session as initializers, with ONNX
//! Runtime's prepacking off: each session would otherwise read or pack a copy of its own. Tensors pass between graphs by position, because opening has
//! verified that ports stand in the order of [`Interface`].

mod decode;
mod encode;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{self, BATCH, CacheLayout, DType, Dim, Interface, REORDER};
use t5gemma_graphs::manifest::Manifest;

use crate::batch::Batch;
use crate::constraint::Compiler;
use crate::device::{Device, Provider, no_graphs};
use crate::encoder_cache::EncoderCache;
use crate::error::Error;
use crate::folder::{Folder, other_task};
use crate::limits::Limits;
use crate::log;
use crate::options::{GenerationConfig, OptionError};
use crate::profiles::Profiles;
use crate::provider::Fallback;
use crate::session::{Graph, OpenOptions, Opener, check_options};
use crate::state::{Plan, Pool};
use crate::tokenizer::{LazyTokenizer, Tokenizer};
use crate::vocabulary_subset::VocabularySubset;
use crate::weights::Uploaded;

/// An opened model, to be used from any number of threads. Each graph runs one call at a time.
pub struct Model {
    // The sessions read the weights that `folder` maps or `_uploaded` has, so they stand before these: fields are dropped in
    // this order.
    encoder: Graph,
    decoder: Graph,
    decoder_with_past: Graph,
    /// For each cached tensor, in the order of the graphs, whether its first axis is source items.
    per_item: Vec<bool>,
    /// Whether the processor computes it.
    on_cpu: bool,
    limits: Limits,
    /// Of a model that is made for a device, how its cache is kept there.
    resident: Option<Plan>,
    _uploaded: Option<Uploaded>,
    fallbacks: Vec<Fallback>,
    encoder_cache: Option<EncoderCache>,
    options: GenerationConfig,
    tokenizer: Arc<LazyTokenizer>,
    constraint_compiler: Compiler,
    folder: Folder,
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
    /// No usable ONNX Runtime; a folder that is incomplete, altered, of another format version or of a configuration that
    /// is not implemented; graphs whose inputs and outputs are not those of the configuration; an element type that this
    /// machine cannot compute with.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Model, Error> {
        check_options(options)?;
        let folder = Folder::open(path.as_ref(), options.check_weights)?;
        for warning in &folder.warnings {
            log::tell(log::Severity::Warning, &format!("{}: {warning}", folder.path.display()));
        }
        if !folder.manifest.task.is_generation() {
            return Err(other_task(&folder.path, &folder.manifest.task, "text2text-generation, to be generated with"));
        }
        let defaults = GenerationConfig::of_model(folder.generation_config.as_deref(), &folder.config.tokens)
            .map_err(|error| Error::GenerationConfig { path: folder.path.join("generation_config.json"), error })?;
        let is_steady = folder.manifest.files.contains_key(REORDER) && folder.manifest.cache == CacheLayout::InPlace;
        if let Some(option) = options.provider.captures().filter(|_| !is_steady) {
            return Err(no_graphs("a cache in place (--target cuda)", option));
        }
        if let Some(option) = options.provider.captures().filter(|_| folder.manifest.dtype == DType::Float32) {
            return Err(no_graphs("float16 or bfloat16 (in float32 the CPU computes self-attention)", option));
        }
        if options.fixed_step_buffers && !is_steady {
            let expected = "false for a model without a cache in place on its device (--target cuda)";
            return Err(Error::input("fixed_step_buffers", expected, "true"));
        }
        let is_mixed = folder.manifest.dtype == DType::Float32 && options.provider.device() != Device::Cpu;
        if options.fixed_step_buffers && is_mixed {
            let expected = "false in float32 on a GPU, where the CPU computes self-attention";
            return Err(Error::input("fixed_step_buffers", expected, "true"));
        }
        let mut opener = Opener::new(&folder, options)?;
        let uploaded = opener.upload()?;
        let Manifest { dtype, cache, .. } = folder.manifest;
        let mut interface = Interface::of(&folder.config, dtype, folder.manifest.returned(), cache);
        for (graph, names) in &folder.manifest.observed {
            let ports = match graph.as_str() {
                "encoder" => &mut interface.encoder,
                "decoder" => &mut interface.decoder,
                _ => &mut interface.decoder_with_past,
            };
            ports.outputs.push(interface::activation_ranges(names.len()));
        }
        let resident = match folder.manifest.files.contains_key(REORDER) {
            false => None,
            true => {
                let reorder = Arc::new(opener.open_reorder(&interface::reorder(&folder.config, dtype))?);
                let heads = [folder.config.decoder.num_key_value_heads, folder.config.decoder.head_dim];
                let (device, per_item) = (options.provider.device(), per_item(&interface));
                let candidates = match folder.manifest.logits {
                    interface::Logits::Candidates(count) => Some(count),
                    _ => None,
                };
                let longest = folder.config.decoder.max_position_embeddings;
                let captures = options.provider.captures();
                let steady = captures.is_some() || options.fixed_step_buffers;
                let steady = steady.then(|| Arc::new(Pool::new(captures.is_some())));
                Some(Plan { layout: cache, device, dtype, per_item, heads, longest, reorder, candidates, steady })
            }
        };
        let [encoder, decoder, decoder_with_past] = [
            ("encoder", &interface.encoder),
            ("decoder", &interface.decoder),
            ("decoder_with_past", &interface.decoder_with_past),
        ]
        .map(|(graph, ports)| opener.open(graph, ports));
        let fallbacks = std::mem::take(&mut opener.fallbacks);
        drop(opener);
        let tokenizer = Arc::new(LazyTokenizer::in_folder(&folder.path));
        Ok(Model {
            encoder: encoder?,
            decoder: decoder?,
            decoder_with_past: decoder_with_past?,
            per_item: per_item(&interface),
            on_cpu: options.provider.kind == Provider::Cpu,
            limits: folder.limits(options.limits),
            resident,
            _uploaded: uploaded,
            fallbacks,
            encoder_cache: Some(options.encoder_cache_bytes).filter(|&bytes| bytes > 0).map(EncoderCache::new),
            options: defaults,
            constraint_compiler: Compiler::new(tokenizer.clone(), folder.config.decoder.vocab_size),
            tokenizer,
            folder,
        })
    }

    /// The model's generation options: those of its `generation_config.json`, with Hugging Face's defaults.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.options
    }

    /// Whether steps are captured as CUDA graphs.
    pub(crate) fn captures(&self) -> bool {
        self.resident.as_ref().and_then(|plan| plan.steady.as_ref()).is_some_and(|pool| pool.captures())
    }

    /// Sizes of steps that memory is kept for, as [`OpenOptions::fixed_step_buffers`] has it, not counting those in use.
    pub fn fixed_buffer_sets(&self) -> usize {
        self.resident.as_ref().and_then(|plan| plan.steady.as_ref()).map_or(0, |pool| pool.sizes())
    }

    /// Whether the cache stays in the memory of the device that computes.
    pub(crate) fn is_resident(&self) -> bool {
        self.resident.is_some()
    }

    /// How rows in flight are kept in the process's own memory, as far as callers of [`Model::start_ragged`] are concerned.
    pub(crate) fn layout(&self) -> CacheLayout {
        if self.resident.is_some() { CacheLayout::Growing } else { self.folder.manifest.cache }
    }

    /// What is wrong with an option of a model that does not tell what its targets attend to.
    pub(crate) fn tells_no_attentions(&self, option: &str, neutral: &str, found: &str) -> OptionError {
        let why = "it does not tell what its targets attend to: export it with --alignment";
        OptionError::new(option, format!("{neutral} for this model ({why})"), found)
    }

    /// That the model tells what its targets attend to.
    ///
    /// # Errors
    /// It was exported without `--alignment`.
    pub fn check_cross_attentions(&self) -> Result<(), Error> {
        match self.attends() {
            true => Ok(()),
            false => Err(self.tells_no_attentions("output_attentions", "false", "true").into()),
        }
    }

    /// Whether the model tells what its targets attend to.
    pub(crate) fn attends(&self) -> bool {
        self.folder.manifest.returned().alignment
    }

    /// What runs side by side in one call.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether the processor computes it.
    pub(crate) fn is_on_cpu(&self) -> bool {
        self.on_cpu
    }

    /// The target tokens that the model can continue, and what limits them.
    pub(crate) fn longest_target(&self) -> (usize, &'static str) {
        let planned = self.profiles().and_then(|profiles| profiles.decoder.as_ref()).and_then(|decoder| decoder.target);
        match (self.folder.config.decoder.max_position_embeddings, self.folder.manifest.cache, planned) {
            (longest, CacheLayout::Static(capacity), _) if capacity < longest => {
                (capacity, "the capacity of the cache")
            }
            (longest, _, Some(planned)) if planned < longest => {
                (planned, "the target of the --plan it was exported with")
            }
            (longest, ..) => (longest, "decoder.max_position_embeddings"),
        }
    }

    /// The sizes that the model was planned for, if it was.
    pub(crate) fn profiles(&self) -> Option<&Profiles> {
        self.folder.profiles.as_ref()
    }

    /// See [`Folder::check`].
    pub(crate) fn check(&self, batch: &Batch) -> Result<(), Error> {
        self.folder.check(batch)
    }

    /// See [`Folder::fit`].
    pub(crate) fn fit<'b>(&self, batch: &'b Batch) -> Cow<'b, Batch> {
        self.folder.fit(batch)
    }

    /// What other providers compute than the one that was asked for: shapes and the like are always the CPU's.
    pub fn fallbacks(&self) -> &[Fallback] {
        &self.fallbacks
    }

    /// What of the folder is not as it was exported and yet accepted, in sentences: an edited `generation_config.json`. The log,
    /// where there is one, has them too.
    pub fn warnings(&self) -> &[String] {
        &self.folder.warnings
    }

    /// The model's configuration.
    pub fn config(&self) -> &Config {
        &self.folder.config
    }

    /// What the exporter says of the model.
    pub fn manifest(&self) -> &Manifest {
        &self.folder.manifest
    }

    /// The tokens that it has logits of, if not of all.
    pub(crate) fn vocabulary_subset(&self) -> Option<&Arc<VocabularySubset>> {
        self.folder.vocabulary_subset.as_ref()
    }

    /// The model's folder.
    pub(crate) fn path(&self) -> &Path {
        &self.folder.path
    }

    /// The model's tokenizer, loaded when first asked for.
    ///
    /// # Errors
    /// The folder has no `tokenizer.json`, or one that cannot be used.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer.get()
    }

    /// What compiles constraints for this model.
    pub(crate) fn constraint_compiler(&self) -> &Compiler {
        &self.constraint_compiler
    }
}

/// For each cached tensor, in order, whether its first axis is source items.
fn per_item(interface: &Interface) -> Vec<bool> {
    // Nothing but what is cached has four axes.
    let cached = interface.decoder_with_past.inputs.iter().filter(|port| port.shape.len() == 4);
    cached.map(|port| port.shape[0] == Dim::symbol(BATCH)).collect()
}

#[cfg(test)]
mod tests {
    use t5gemma_graphs::interface::{Logits, Port};

    use super::*;

    fn interface() -> Interface {
        let config =
            r#"{"model_type": "t5gemma", "encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 3}}"#;
        let config = Config::parse(config).expect("a minimal config");
        Interface::of(&config, DType::Float32, Logits::Last, CacheLayout::Growing)
    }

    #[test]
    fn a_model_is_shared_between_threads() {
        fn check<T: Send + Sync>() {}
        check::<Model>();
    }

    #[test]
    fn cached_tensors_keep_their_order_from_graph_to_graph() {
        let interface = interface();
        let after_prefix = |port: &Port| port.name.split_once('.').map(|(_, rest)| rest.to_string());
        let names = |ports: &[Port]| ports.iter().map(after_prefix).collect::<Option<Vec<_>>>();
        let made = names(&interface.decoder.outputs[1..]).expect("all cached");
        assert_eq!(names(&interface.decoder_with_past.inputs[2..]).expect("all cached"), made);

        let grown: Vec<String> = made
            .iter()
            .zip(per_item(&interface))
            .filter(|(_, per_item)| !per_item)
            .map(|(name, _)| name.clone())
            .collect();
        assert_eq!(names(&interface.decoder_with_past.outputs[1..]).expect("all cached"), grown);
        assert_eq!(grown.len(), 2 * 3);
    }
}
