//! `Model`: the three graphs of a model folder as ONNX Runtime sessions over one copy of the weights, held to the interface
//! that the configuration implies. It runs them and knows what goes in and out; which tokens to feed it leaves to `generate`.
//!
//! # Design
//! The weights are mapped once, and for a device copied there once, and given to every session as initializers, with ONNX
//! Runtime's prepacking off: each session would otherwise read or pack a copy of its own. Tensors pass between graphs by position, because opening has
//! verified that ports stand in the order of [`Interface`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use ndarray::{Array3, s};
use ort::logging::LogLevel;
use ort::session::builder::PrepackedWeights;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Outlet, Tensor, TensorElementType, ValueType};
use t5gemma_graphs::Target;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{self, BATCH, CacheLayout, DType, Dim, Interface, Port, Ports, REORDER, reads_source};
use t5gemma_graphs::manifest::Manifest;

use crate::apart;
use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::constraint::Compiler;
use crate::encoder::other_task;
use crate::encoder_cache::EncoderCache;
use crate::error::Error;
use crate::folder::Folder;
use crate::log;
use crate::needs::{Limits, pieces_to_encode};
use crate::onnxruntime;
use crate::options::{GenerationOptions, OptionError};
use crate::profiles::Profiles;
use crate::provider::{self, Elsewhere, Placement, Provider, no_graphs};
use crate::scores::Kept;
use crate::state::{Cache, Device, First, Plan, Pool, Ragged, Returned, State};
use crate::tokenizer::{LazyTokenizer, Tokenizer};
use crate::weights::{self, Initializers, Uploaded, element_type};
use t5gemma_kernels::{self as kernels, Kernels, LogitsRequest, LogitsStats, LogitsStatsView, Side};

/// How a model is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The ONNX Runtime library to load; by default it is searched for, see [`onnxruntime::report`].
    pub library: Option<PathBuf>,
    /// Threads to compute with; by default as many as the machine has cores. All models of a process share the threads that
    /// the first was opened with; one that asks for another number has its own.
    pub threads: Option<usize>,
    /// Compare the hash of the whole weights file, however large, instead of samples of it.
    pub check_weights: bool,
    /// How many bytes of encoder results are kept, so that sources that come again (regenerated, or with other options) are
    /// not encoded again; [`DEFAULT_ENCODER_CACHE_BYTES`] by default, 0 for none. What is found is what encoding again would
    /// give, to the last digit: sources are the same only with the same rows beside them. [`Model`] only.
    pub encoder_cache_bytes: usize,
    /// What runs side by side in one call of [`Model::generate`], [`Model::score`] or an encoder; the rows of a larger one run in
    /// pieces.
    pub limits: Limits,
    /// What computes the model; the processor by default.
    pub placement: Placement,
    /// Have ONNX Runtime write down how long each operator of each graph takes: into files that begin with this and the
    /// graph's name, when the model is closed.
    pub profile: Option<PathBuf>,
    /// Whether the steps of a model whose cache stays on its device and is written in place (`--target cuda`) have memory that
    /// stays where it is from request to request, where rows are generated one by one (greedily, or drawn). CUDA graphs need it,
    /// so the provider's option `enable_cuda_graph` has it be so. What is kept comes on top of
    /// [`EngineOptions::max_bytes`](crate::EngineOptions::max_bytes). Not by default.
    pub steady_steps: bool,
    /// The folder with the engines of the model's serving plan, where they do not lie in the model's own: what has been written
    /// by `build_engines.sh --engines DIR` or [`build_engines`](crate::build_engines). For providers that have engines.
    pub engines: Option<PathBuf>,
}

/// What [`OpenOptions::encoder_cache_bytes`] is by default: 64 MiB, which are 7000 source tokens of the 2b model's width.
pub const DEFAULT_ENCODER_CACHE_BYTES: usize = 64 << 20;

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        let encoder_cache_bytes = DEFAULT_ENCODER_CACHE_BYTES;
        let placement = Placement::default();
        OpenOptions {
            library: None,
            threads: None,
            check_weights: false,
            encoder_cache_bytes,
            limits: Limits::default(),
            placement,
            profile: None,
            steady_steps: false,
            engines: None,
        }
    }
}

/// More than any machine computes with; ONNX Runtime starts as many as it is told to, whatever that takes.
const MOST_THREADS: usize = 1024;

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
    elsewhere: Vec<Elsewhere>,
    encoder_cache: Option<EncoderCache>,
    options: GenerationOptions,
    tokenizer: Arc<LazyTokenizer>,
    constraint_compiler: Compiler,
    folder: Folder,
}

/// An opened graph, which runs one call at a time.
pub(crate) struct Graph {
    session: Mutex<Session>,
    kernels: Kernels,
}

impl Graph {
    /// The session, for runs of which so much is wanted, in whole rows.
    pub fn lock(&self, wanted: LogitsRequest) -> MutexGuard<'_, Session> {
        self.lock_to_list(wanted.dense())
    }

    /// The session, for a run that may list what is wanted if that will do.
    fn lock_to_list(&self, wanted: LogitsRequest) -> MutexGuard<'_, Session> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        self.kernels.want(wanted);
        session
    }
}

/// What the encoder makes of the sources.
pub(crate) struct Encoded {
    /// `[items, source, hidden_size]`.
    pub hidden: DynValue,
    /// `[items, source]`.
    mask: DynValue,
}

/// What a failure of [`Model::step`] says was being done.
const DECODER_STEP: &str = "running a decoder step";
const FIRST_STEP: &str = "running the first decoder step";
const PREPARING_CACHE: &str = "preparing the cache";
const READING_LOGITS: &str = "reading the logits";

/// What a step says of the last target position of each row, or of each position of a row: the scores before any processing,
/// and what it attends to.
pub(crate) struct Logits {
    /// `[rows, 1, tokens]`: of the vocabulary, or those that are kept of it; or of those that the summary lists.
    value: DynValue,
    /// `[rows, 1, source]`, of models that tell it.
    attended: Option<DynValue>,
    /// What is known of the scores.
    summary: Option<LogitsStats>,
}

/// What a step says of some rows.
pub(crate) struct Said<'a> {
    /// Their scores, row after row.
    pub scores: &'a mut [f32],
    /// What is known of these.
    pub known: Option<LogitsStatsView<'a>>,
    /// What they attend to, row after row; empty of models that do not tell it.
    pub attended: &'a [f32],
    /// Scores in a row.
    pub tokens: usize,
    source: usize,
}

impl Said<'_> {
    /// `count` of the rows, from `first` on.
    pub fn rows(&mut self, first: usize, count: usize) -> Said<'_> {
        let Said { tokens, source, .. } = *self;
        Said {
            scores: &mut self.scores[first * tokens..][..count * tokens],
            known: self.known.map(|known| known.rows(first, count)),
            attended: &self.attended[first * source..][..count * source],
            tokens,
            source,
        }
    }
}

impl Logits {
    /// The scores, row after row.
    pub fn rows_mut(&mut self) -> Result<&mut [f32], Error> {
        let (_, scores) = self.value.try_extract_tensor_mut().map_err(Error::onnxruntime(READING_LOGITS))?;
        Ok(scores)
    }

    /// All of it.
    pub fn said(&mut self) -> Result<Said<'_>, Error> {
        let (tokens, mut source) = (self.value.shape()[2] as usize, 0);
        let (_, scores) = self.value.try_extract_tensor_mut().map_err(Error::onnxruntime(READING_LOGITS))?;
        let mut attended: &[f32] = &[];
        if let Some(value) = &self.attended {
            source = value.shape()[2] as usize;
            attended = value.try_extract_tensor().map_err(Error::onnxruntime(READING_LOGITS))?.1;
        }
        let known = self.summary.as_ref().map(LogitsStats::view);
        Ok(Said { scores, known, attended, tokens, source })
    }

    /// The last position of each of `rows` rows.
    fn last(returned: Returned, rows: usize, summary: Option<LogitsStats>) -> ort::Result<Logits> {
        let attended = returned.attended.map(|attended| last_position(attended, rows)).transpose()?;
        let value = last_position(returned.logits, rows)?;
        let summary = match summary {
            Some(summary) if summary.is_sparse() => {
                let (shape, listed) = value.try_extract_tensor::<f32>()?;
                Some(
                    summary
                        .checked_against(listed, rows)
                        .ok_or_else(|| ort::Error::new(format!("a list of logits {shape}")))?,
                )
            }
            // A summary of more rows is of all positions.
            summary => summary.filter(|summary| summary.rows() == rows),
        };
        Ok(Logits { value, attended, summary })
    }
}

/// Of `[rows, positions, width]` the last position of each row. What opening could not verify, the number of rows, is checked
/// here.
fn last_position(value: DynValue, rows: usize) -> ort::Result<DynValue> {
    let (shape, numbers) = value.try_extract_tensor::<f32>()?;
    if shape[0] != rows as i64 || shape[1] < 1 {
        return Err(ort::Error::new(format!("{rows} rows gave an output of shape {shape}")));
    }
    let (positions, width) = (shape[1] as usize, shape[2] as usize);
    if positions == 1 {
        return Ok(value);
    }
    let rows_of_all = numbers.chunks_exact(positions * width);
    let last: Vec<f32> = rows_of_all.flat_map(|row| &row[(positions - 1) * width..]).copied().collect();
    Ok(Tensor::from_array(([rows, 1, width], last))?.into_dyn())
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
        let defaults = GenerationOptions::of_model(folder.generation_config.as_deref(), &folder.config.tokens)
            .map_err(|error| Error::GenerationConfig { path: folder.path.join("generation_config.json"), error })?;
        let is_steady = folder.manifest.files.contains_key(REORDER) && folder.manifest.cache == CacheLayout::InPlace;
        if let Some(option) = options.placement.captures().filter(|_| !is_steady) {
            return Err(no_graphs("a cache in place (--target cuda)", option));
        }
        if let Some(option) = options.placement.captures().filter(|_| folder.manifest.dtype == DType::Float32) {
            return Err(no_graphs("float16 or bfloat16 (in float32 the CPU computes self-attention)", option));
        }
        if options.steady_steps && !is_steady {
            let expected = "false for a model without a cache in place on its device (--target cuda)";
            return Err(Error::input("steady_steps", expected, "true"));
        }
        let is_mixed = folder.manifest.dtype == DType::Float32 && options.placement.device() != Device::Cpu;
        if options.steady_steps && is_mixed {
            let expected = "false in float32 on a GPU, where the CPU computes self-attention";
            return Err(Error::input("steady_steps", expected, "true"));
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
                let (device, per_item) = (options.placement.device(), per_item(&interface));
                let candidates = match folder.manifest.logits {
                    interface::Logits::Candidates(count) => Some(count),
                    _ => None,
                };
                let longest = folder.config.decoder.max_position_embeddings;
                let captures = options.placement.captures();
                let steady = captures.is_some() || options.steady_steps;
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
        let elsewhere = std::mem::take(&mut opener.elsewhere);
        drop(opener);
        let tokenizer = Arc::new(LazyTokenizer::in_folder(&folder.path));
        Ok(Model {
            encoder: encoder?,
            decoder: decoder?,
            decoder_with_past: decoder_with_past?,
            per_item: per_item(&interface),
            on_cpu: options.placement.provider == Provider::Cpu,
            limits: folder.limits(options.limits),
            resident,
            _uploaded: uploaded,
            elsewhere,
            encoder_cache: Some(options.encoder_cache_bytes).filter(|&bytes| bytes > 0).map(EncoderCache::new),
            options: defaults,
            constraint_compiler: Compiler::new(tokenizer.clone(), folder.config.decoder.vocab_size),
            tokenizer,
            folder,
        })
    }

    /// The model's own generation options, which a request's are laid over.
    pub fn options(&self) -> &GenerationOptions {
        &self.options
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
    pub fn check_attentions(&self) -> Result<(), Error> {
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
    pub fn elsewhere(&self) -> &[Elsewhere] {
        &self.elsewhere
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
    pub(crate) fn kept(&self) -> Option<&Arc<Kept>> {
        self.folder.kept.as_ref()
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

    /// The encoder's last hidden states, `[rows, length, hidden_size]`; those of padding mean nothing.
    ///
    /// # Errors
    /// Tokens outside the vocabulary, too many of them, or a cancellation.
    pub fn encode(&self, batch: &Batch, cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        const READING: &str = "reading the hidden states";
        self.check(batch)?;
        cancel.check()?;
        let side = (&self.folder.config.encoder, self.folder.manifest.dtype);
        let mut states = Array3::zeros([batch.rows(), batch.length(), side.0.hidden_size]);
        for rows in pieces_to_encode(batch, side, &self.limits, self.on_cpu) {
            let piece = batch.piece(rows.clone());
            let run = self.fit(&piece);
            let hidden = self.run_encoder(&run, cancel)?.hidden;
            let values = float32_values(&hidden).map_err(Error::onnxruntime(READING))?;
            let found = Array3::from_shape_vec([run.rows(), run.length(), side.0.hidden_size], values)
                .map_err(|error| Error::onnxruntime(READING)(ort::Error::wrap(error)))?;
            let found = found.slice(s![..piece.rows(), ..piece.length(), ..]);
            states.slice_mut(s![rows, ..piece.length(), ..]).assign(&found);
        }
        cancel.check()?;
        Ok(states)
    }

    /// What the encoder makes of a batch that was checked: given with it, remembered, or computed.
    pub(crate) fn run_encoder(&self, batch: &Batch, cancel: &Cancellation) -> Result<Encoded, Error> {
        if let Some(states) = batch.encoder_outputs() {
            return self.encoded(batch, states.iter().copied().collect());
        }
        let Some(cache) = &self.encoder_cache else { return self.compute_encoder(batch, cancel) };
        if let Some(states) = cache.get(batch.rows(), batch.ids(), batch.mask()) {
            return self.encoded(batch, states.to_vec());
        }
        let computed = self.compute_encoder(batch, cancel)?;
        let states = float32_values(&computed.hidden).map_err(Error::onnxruntime("reading the hidden states"))?;
        cache.put(batch.rows(), batch.ids(), batch.mask(), &states);
        Ok(computed)
    }

    /// Hidden states as the decoder takes them.
    fn encoded(&self, batch: &Batch, states: Vec<f32>) -> Result<Encoded, Error> {
        let shape = [batch.rows(), batch.length(), self.folder.config.encoder.hidden_size];
        let hidden = match self.folder.manifest.dtype {
            DType::Float16 => Tensor::from_array((shape, states.into_iter().map(f16::from_f32).collect::<Vec<_>>()))
                .map(Tensor::into_dyn),
            DType::BFloat16 => Tensor::from_array((shape, states.into_iter().map(bf16::from_f32).collect::<Vec<_>>()))
                .map(Tensor::into_dyn),
            _ => Tensor::from_array((shape, states)).map(Tensor::into_dyn),
        };
        let hidden = hidden.map_err(Error::onnxruntime("preparing a run"))?;
        Ok(Encoded { hidden, mask: int64_tensor(batch.rows(), batch.mask().to_vec())? })
    }

    /// What the encoder computes of a batch that was checked, whatever is remembered.
    pub(crate) fn compute_encoder(&self, batch: &Batch, cancel: &Cancellation) -> Result<Encoded, Error> {
        if self.on_cpu
            && let Some(groups) = apart::groups(batch.mask(), batch.length(), shares_rows(&self.folder.manifest))
        {
            let (_, states) = apart::run_apart(&self.encoder, batch, &groups, true, cancel)?;
            return self.encoded(batch, states);
        }
        let mask = int64_tensor(batch.rows(), batch.mask().to_vec())?;
        let outputs = run_on_batch(&self.encoder, "running the encoder", batch, cancel)?;
        let hidden = outputs.into_iter().next().expect("opening has verified that the encoder has one output");
        Ok(Encoded { hidden, mask })
    }

    /// Runs the first decoder step: one target row for each source item, of whose logits so much is wanted.
    pub(crate) fn start(
        &self,
        encoded: Encoded,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(State, Logits), Error> {
        if let Some(plan) = &self.resident {
            return self.start_resident(plan, (encoded, prompts), wanted, cancel);
        }
        let (mask, cached, logits) = self.first_step(encoded, prompts, wanted, cancel)?;
        let state = match self.folder.manifest.cache {
            CacheLayout::Growing => Ok(State::growing(mask, cached, self.per_item.clone())),
            CacheLayout::Static(_) => Err(ort::Error::new(format!("a cache of fixed capacity without {REORDER}"))),
            CacheLayout::InPlace => State::in_place(mask, cached, &self.per_item),
        };
        Ok((state.map_err(Error::onnxruntime(PREPARING_CACHE))?, logits))
    }

    /// [`Model::start`] of a model whose cache stays on its device.
    fn start_resident(
        &self,
        plan: &Plan,
        (Encoded { hidden, mask }, prompts): (Encoded, Prompts),
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(State, Logits), Error> {
        let rows = prompts.ids.len() / prompts.length;
        let ids = int64_tensor(rows, prompts.ids.clone())?;
        let started = {
            let mut session = self.decoder.lock(LogitsRequest::All);
            State::resident(plan, &mut session, mask, (&ids, &hidden), wanted, cancel.run_options()?)
        };
        let (mut state, returned) = started.map_err(cancel.failed(FIRST_STEP))?;
        let returned = match returned {
            Some(returned) => returned,
            None => self.run_step(&mut state, prompts.ids, wanted, cancel)?.0,
        };
        Ok((state, Logits::last(returned, rows, None).map_err(Error::onnxruntime(READING_LOGITS))?))
    }

    /// What the graphs observe of a source that was checked and of a whole target: of each matrix the greatest absolute number
    /// that it is multiplied with.
    pub(crate) fn observe(
        &self,
        batch: &Batch,
        target: Prompts,
        cancel: &Cancellation,
    ) -> Result<BTreeMap<String, f32>, Error> {
        const DURING: &str = "observing the activations";
        let rectangle = |values: &[i64]| int64_tensor(batch.rows(), values.to_vec());
        let (ids, mask, target) = (rectangle(batch.ids())?, rectangle(batch.mask())?, rectangle(&target.ids)?);
        let encoded = run((&self.encoder, LogitsRequest::All), DURING, &[(&ids).into(), (&mask).into()], cancel)?;
        let hidden = &encoded[0];
        let decoded = run(
            (&self.decoder, LogitsRequest::All),
            DURING,
            &[(&mask).into(), (&target).into(), hidden.into()],
            cancel,
        )?;
        let mut ranges = BTreeMap::new();
        for (graph, outputs) in [("encoder", &encoded), ("decoder", &decoded)] {
            let (Some(names), Some(last)) = (self.folder.manifest.observed.get(graph), outputs.last()) else {
                return Err(Error::Unsupported {
                    what: format!("{}: its graphs observe nothing", self.folder.path.display()),
                    remedy: "export the model with --observe".into(),
                });
            };
            let (_, found) = last.try_extract_tensor::<f32>().map_err(Error::onnxruntime(DURING))?;
            ranges.extend(names.iter().cloned().zip(found.iter().copied()));
        }
        Ok(ranges)
    }

    /// Whether steps are captured as CUDA graphs.
    pub(crate) fn captures(&self) -> bool {
        self.resident.as_ref().and_then(|plan| plan.steady.as_ref()).is_some_and(|pool| pool.captures())
    }

    /// Sizes of steps that memory is kept for, as [`OpenOptions::steady_steps`] has it, not counting those in use.
    pub fn steady_sizes(&self) -> usize {
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

    /// [`Model::start`], to be continued among rows of other lengths; only with [`CacheLayout::InPlace`].
    pub(crate) fn start_ragged(
        &self,
        encoded: Encoded,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(First, Logits), Error> {
        let (mask, cached, logits) = self.first_step(encoded, prompts, wanted, cancel)?;
        let first = First::new(mask, cached, &self.per_item).map_err(Error::onnxruntime(PREPARING_CACHE))?;
        Ok((first, logits))
    }

    /// The sources' mask, what is cached of sources and targets, and the logits.
    fn first_step(
        &self,
        encoded: Encoded,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(DynValue, Vec<DynValue>, Logits), Error> {
        let Encoded { hidden, mask } = encoded;
        let rows = prompts.ids.len() / prompts.length;
        let ids = int64_tensor(rows, prompts.ids)?;
        let inputs = [(&mask).into(), (&ids).into(), (&hidden).into()];
        let (_, seen) = mask.try_extract_tensor::<i64>().map_err(Error::onnxruntime("reading the mask"))?;
        let session = self.decoder.lock(wanted);
        self.decoder.kernels.read(seen);
        let mut outputs = run_locked(session, FIRST_STEP, &inputs, cancel)?;
        let attended = if self.attends() { outputs.pop() } else { None };
        let mut outputs = outputs.into_iter();
        let logits = outputs.next().expect("opening has verified that the logits come first");
        let returned = Returned { logits, attended };
        let logits = Logits::last(returned, rows, None).map_err(Error::onnxruntime(READING_LOGITS))?;
        Ok((mask, outputs.take(self.per_item.len()).collect(), logits))
    }

    /// Runs a further decoder step of rows of different lengths: a token for each.
    pub(crate) fn step_ragged(
        &self,
        state: &mut Ragged,
        tokens: &[i64],
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        let mut session = self.decoder_with_past.lock_to_list(wanted);
        let options = cancel.run_options()?;
        let returned = state.step(&mut session, tokens, wanted, options).map_err(cancel.failed(DECODER_STEP))?;
        Logits::last(returned, tokens.len(), self.decoder_with_past.kernels.summary())
            .map_err(Error::onnxruntime(READING_LOGITS))
    }

    /// Runs a further decoder step: new tokens for each target row, as many for one as for another.
    pub(crate) fn step(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        let wanted = if tokens.len() == state.rows() { wanted } else { wanted.dense() };
        let (returned, summary) = self.run_step(state, tokens, wanted, cancel)?;
        Logits::last(returned, state.rows(), summary).map_err(Error::onnxruntime(READING_LOGITS))
    }

    /// [`Model::step`] of one target row, with the scores of each of its new tokens one after the other; the model has to
    /// be one that gives all.
    pub(crate) fn step_all(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        let expected = [1, tokens.len() as i64];
        let wanted = wanted.dense();
        let (Returned { logits: value, attended }, _) = self.run_step(state, tokens, wanted, cancel)?;
        if let Some(other) =
            [Some(&value), attended.as_ref()].into_iter().flatten().find(|v| v.shape()[..2] != expected)
        {
            let problem = ort::Error::new(format!("{expected:?} tokens gave an output of shape {}", other.shape()));
            return Err(Error::onnxruntime(READING_LOGITS)(problem));
        }
        Ok(Logits { value, attended, summary: None })
    }

    fn run_step(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(Returned, Option<LogitsStats>), Error> {
        let rows = state.rows();
        Ok(match state.cache_mut() {
            Cache::Growing(cache) => {
                let ids = int64_tensor(rows, tokens)?;
                let mut inputs: Vec<SessionInputValue> = vec![cache.mask().into(), (&ids).into()];
                inputs.extend(cache.past().iter().map(SessionInputValue::from));
                let mut outputs = run((&self.decoder_with_past, wanted), DECODER_STEP, &inputs, cancel)?;
                drop(inputs);
                let attended = if self.attends() { outputs.pop() } else { None };
                let mut outputs = outputs.into_iter();
                let logits = outputs.next().expect("opening has verified that the logits come first");
                cache.grow(outputs);
                (Returned { logits, attended }, None)
            }
            cache => {
                let mut session = self.decoder_with_past.lock_to_list(wanted);
                let options = cancel.run_options()?;
                let stepped = match cache {
                    Cache::InPlace(cache) => cache.step(&mut session, &tokens, wanted, options),
                    Cache::Resident(cache) => cache.step(&mut session, &tokens, wanted, options),
                    Cache::Growing(_) => unreachable!("matched above"),
                };
                (stepped.map_err(cancel.failed(DECODER_STEP))?, self.decoder_with_past.kernels.summary())
            }
        })
    }
}

/// Refuses options that no machine can have.
pub(crate) fn check_options(options: &OpenOptions) -> Result<(), Error> {
    options.placement.check()?;
    let provider = options.placement.provider;
    if let (Some(engines), Provider::Cpu | Provider::Cuda) = (&options.engines, provider) {
        let found = format!("{} for {provider}", engines.display());
        return Err(Error::input("engines", "none but for tensorrt and nv-tensorrt-rtx, which have engines", found));
    }
    match options.threads.filter(|threads| !(1..=MOST_THREADS).contains(threads)) {
        Some(threads) => Err(Error::input("threads", format!("1 to {MOST_THREADS}"), threads.to_string())),
        None => Ok(()),
    }
}

/// Whether several sources may share a row of the encoder: its graph keeps them apart, and attention computes nothing between them.
pub(crate) fn shares_rows(manifest: &Manifest) -> bool {
    manifest.side_by_side && kernels::attention_skips_other_sources()
}

/// The folder in which the engines' folder is: the model's, unless another was named.
pub(crate) fn engines_of<'o>(folder: &'o Folder, options: &'o OpenOptions) -> &'o Path {
    options.engines.as_deref().unwrap_or(&folder.path)
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

fn run_locked(
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

/// For each cached tensor, in order, whether its first axis is source items.
fn per_item(interface: &Interface) -> Vec<bool> {
    // Nothing but what is cached has four axes.
    let cached = interface.decoder_with_past.inputs.iter().filter(|port| port.shape.len() == 4);
    cached.map(|port| port.shape[0] == Dim::symbol(BATCH)).collect()
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
    pub elsewhere: Vec<Elsewhere>,
}

impl<'f> Opener<'f> {
    /// Loads ONNX Runtime, and has the weights ready.
    pub fn new(folder: &'f Folder, options: &'f OpenOptions) -> Result<Opener<'f>, Error> {
        kernels::instructions()?;
        let library = onnxruntime::initialise(options.library.as_deref(), options.threads)?;
        let weights = weights::mapped(folder).map_err(Error::onnxruntime("sharing the weights"))?;
        provider::check_cache((folder, engines_of(folder, options)), options.placement.provider)?;
        let decoder = &folder.config.decoder;
        let scored = folder.manifest.kept_tokens.unwrap_or(decoder.vocab_size);
        let kernels = Kernels::new(scored, decoder.final_logit_softcapping, reads_source);
        let prepacked = PrepackedWeights::new();
        Ok(Opener { library, folder, weights, options, kernels, prepacked, elsewhere: Vec::new() })
    }

    /// Has the graphs opened from here on read the weights from one copy on the device, where that is how the provider reads them.
    /// What is returned has to outlive them.
    fn upload(&mut self) -> Result<Option<Uploaded>, Error> {
        let placement = &self.options.placement;
        // An engine of TensorRT has its weights in itself; of the others, models for the CPU read the file where it is mapped.
        let reads_in_place = matches!(placement.provider, Provider::Cpu | Provider::Cuda);
        if !reads_in_place || !self.folder.manifest.files.contains_key(REORDER) {
            return Ok(None);
        }
        let uploaded = Uploaded::new(&self.library.environment, placement, self.folder)?;
        self.weights = uploaded.initializers(self.folder).map_err(Error::onnxruntime("sharing the weights"))?;
        Ok(Some(uploaded))
    }

    /// Opens one graph over the shared weights and holds it to its ports.
    pub fn open(&mut self, graph: &str, ports: &Ports) -> Result<Graph, Error> {
        let (folder, placement) = (self.folder, &self.options.placement);
        let engines = engines_of(folder, self.options);
        let given = placement.options_of((folder, engines), graph)?;
        if let Some(wrapper) = provider::built((folder, engines), graph, placement.provider)? {
            return self.open_file(&wrapper, (graph, ports, &[]), &given);
        }
        let record = folder.graph(graph);
        self.open_file(&folder.path.join(&record.file), (graph, ports, &record.weights), &given)
    }

    /// Opens the graph that changes rows, for which TensorRT's options are not.
    fn open_reorder(&mut self, ports: &Ports) -> Result<Graph, Error> {
        let path = self.folder.path.join(REORDER);
        self.open_file(&path, ("reorder", ports, &[]), &BTreeMap::new())
    }

    fn open_file(
        &mut self,
        path: &Path,
        (graph, ports, used): (&str, &Ports, &[String]),
        given: &BTreeMap<String, String>,
    ) -> Result<Graph, Error> {
        let placement = &self.options.placement;
        let provider = placement.provider;
        // The few operators that move a cache are not worth an engine.
        let computing = match (graph, provider) {
            ("reorder", Provider::TensorRt) => Provider::Cuda,
            _ => provider,
        };
        let builder = placement.builder_with(computing, &self.library.environment, given)?;
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
            let elsewhere = provider::elsewhere(&session, computing, graph);
            self.elsewhere.extend(elsewhere.map_err(Error::onnxruntime("asking what computes the operators"))?);
        }
        Ok(Graph { session: Mutex::new(session), kernels })
    }
}

/// The first port that is not as expected: its place, what was expected there, what is there.
fn first_difference(side: &str, expected: &[Port], found: &[Outlet]) -> Option<(String, String, String)> {
    (0..expected.len().max(found.len())).find_map(|index| {
        let (expected, found) = (expected.get(index), found.get(index));
        if let (Some(expected), Some(found)) = (expected, found)
            && same_port(expected, found)
        {
            return None;
        }
        let none = || "none".to_string();
        let expected = expected.map_or_else(none, |port| described(&port.name, &port.dtype, &port.shape));
        Some((format!("{side} {index}"), expected, found.map_or_else(none, described_outlet)))
    })
}

/// Whether name, element type, rank and the sizes known in advance agree.
fn same_port(expected: &Port, found: &Outlet) -> bool {
    let ValueType::Tensor { ty, shape, .. } = found.dtype() else { return false };
    let same_dim = |(expected, &found): (&Dim, &i64)| match expected.as_fixed() {
        Some(size) => found == size as i64,
        None => found < 0,
    };
    found.name() == expected.name
        && *ty == element_type(expected.dtype)
        && shape.len() == expected.shape.len()
        && expected.shape.iter().zip(shape.iter()).all(same_dim)
}

fn described_outlet(outlet: &Outlet) -> String {
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
        return format!("{} of {}", outlet.name(), outlet.dtype());
    };
    let dims: Vec<String> = shape
        .iter()
        .zip(dimension_symbols.iter())
        .map(|(&dim, symbol)| match dim {
            ..0 if symbol.is_empty() => "?".into(),
            ..0 => symbol.clone(),
            _ => dim.to_string(),
        })
        .collect();
    let known = DType::ALL.into_iter().find(|&dtype| element_type(dtype) == *ty);
    match known {
        Some(dtype) => described(outlet.name(), &dtype, &dims),
        None => described(outlet.name(), ty, &dims),
    }
}

fn described(name: &str, dtype: &impl std::fmt::Display, shape: &[impl std::fmt::Display]) -> String {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("{name} {dtype} [{}]", dims.join(", "))
}

#[cfg(test)]
mod tests {
    use ort::value::{Shape, SymbolicDimensions};
    use t5gemma_graphs::interface::{CacheLayout, Logits};

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

    #[test]
    fn the_first_differing_port_is_described() {
        let expected = &interface().encoder.inputs;
        let outlet = |name: &str, ty, dims: &[i64]| {
            let symbols = dims.iter().map(|_| "rows".to_string());
            let dimension_symbols = SymbolicDimensions::new(symbols);
            Outlet::new(name, ValueType::Tensor { ty, shape: Shape::new(dims.iter().copied()), dimension_symbols })
        };
        let ids = || outlet("input_ids", TensorElementType::Int64, &[-1, -1]);
        let mask = || outlet("attention_mask", TensorElementType::Int64, &[-1, -1]);
        assert_eq!(first_difference("input", expected, &[ids(), mask()]), None);

        let cases = [
            (vec![ids()], "input 1", "none"),
            (vec![mask(), ids()], "input 0", "attention_mask int64 [rows, rows]"),
            (vec![outlet("input_ids", TensorElementType::Int32, &[-1, -1])], "input 0", "input_ids int32 [rows, rows]"),
            (vec![outlet("input_ids", TensorElementType::Int64, &[-1])], "input 0", "input_ids int64 [rows]"),
            (vec![outlet("input_ids", TensorElementType::Int64, &[4, -1])], "input 0", "input_ids int64 [4, rows]"),
            (vec![ids(), mask(), ids()], "input 2", "input_ids int64 [rows, rows]"),
        ];
        for (found, port, shown) in cases {
            let (at, _, found) = first_difference("input", expected, &found).expect(port);
            assert_eq!((at.as_str(), found.as_str()), (port, shown));
        }
    }
}
