//! Writes a Hugging Face T5Gemma checkpoint as a model folder: three ONNX graphs over one file of weights, with the
//! checkpoint's settings and tokenizer and a manifest that says what is what.
//!
//! ```no_run
//! use t5gemma_exporter::{Checkpoint, Export, Silent, Source};
//!
//! let source = Source::Checkpoint(Checkpoint::open("t5gemma-2b-2b-ul2-it".as_ref())?);
//! Export::default().run(&source, "t5gemma-2b-2b-ul2-it-onnx".as_ref(), &Silent)?;
//! # anyhow::Ok(())
//! ```
//!
//! Read this file first, then `checkpoint.rs` (what is read), `weights.rs` (which tensor goes where), `external_data.rs`
//! and `proto.rs` (what is written). The graphs themselves come from `t5gemma_graphs`; no ONNX Runtime is needed here.

mod check;
mod checkpoint;
mod convert;
mod dummy;
mod external_data;
mod float8;
mod folder;
mod found;
mod inspect;
mod names;
mod notes;
mod plan;
mod presets;
mod proto;
mod quantize;
mod reseal;
mod settings;
mod signed;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::config::{Config, Side, cut};
use t5gemma_graphs::interface::{self, CacheLayout, DType, Logits};
use t5gemma_graphs::json;
use t5gemma_graphs::manifest::{self, EncoderWindow, FORMAT, FORMAT_VERSION, FileRecord, GraphRecord, Manifest};
use t5gemma_graphs::onnx::{Blocks, Code};
use t5gemma_graphs::quantization::{self, Activations, Quantization};
use t5gemma_graphs::task::{Features, Task};
use t5gemma_graphs::{Options, Target, Vocabulary, decoder_init, definitions, encoder, reorder};

pub use check::{Checked, Finding, TensorRt, check};
pub use checkpoint::{Checkpoint, Tensor};
pub use folder::Existing;
pub use inspect::{Report, inspect};
pub use plan::{Bytes, Plan};
pub use presets::{PRESETS, preset};
pub use reseal::reseal;
pub use settings::{Setting, SettingError};

use checkpoint::{CHAT_TEMPLATE, COMPANIONS, DEFAULT_CHAT_TEMPLATE, GENERATION_CONFIG};
use folder::Aside;
use found::read_text;
use plan::Memory;
use weights::NOT_DESCRIBED;

/// Graphs of so many layers take no time to speak of.
const LAYERS_OF_REAL_MODELS: usize = 256;

/// What to export as.
#[derive(Clone, Debug)]
pub struct Export {
    /// What the model is for; by default what the checkpoint was made for.
    pub task: Option<Task>,
    /// The runtime that the graphs are written for.
    pub target: Target,
    /// Type of weights, activations and caches: float32, float16 or bfloat16.
    pub dtype: DType,
    /// Positions whose logits the decoder graphs return.
    pub logits: Logits,
    /// The tokens that the model can generate, ascending; all without. The others have no logits, and the head is as much
    /// smaller.
    pub kept_tokens: Option<Vec<usize>>,
    /// Decoder layers whose cross-attention the decoder graphs return the mean of, all if empty; without it they return none.
    pub alignment: Option<Vec<usize>>,
    /// Whether positions exactly one window apart see each other in the encoder.
    pub encoder_window: EncoderWindow,
    /// Which matrices to hold in few bits; for targets that read them.
    pub quantization: Quantization,
    /// What is known of the numbers that matrices are multiplied with, or that it is to be observed. 8 bits for TensorRT need
    /// ranges.
    pub activations: Activations,
    /// Target tokens to give the cache room for, once and for all; for TensorRT. Otherwise it is as the target has it.
    pub capacity: Option<usize>,
    /// What is going to be served, for TensorRT.
    pub plan: Option<Plan>,
    /// The GPU memory that the plan has to fit into.
    pub fits: Option<Bytes>,
    /// What to do when the output folder exists.
    pub existing: Existing,
}

impl Default for Export {
    fn default() -> Export {
        Export {
            task: None,
            target: Target::Portable,
            dtype: DType::Float32,
            logits: Logits::default(),
            kept_tokens: None,
            alignment: None,
            encoder_window: EncoderWindow::default(),
            quantization: Quantization::default(),
            activations: Activations::default(),
            capacity: None,
            plan: None,
            fits: None,
            existing: Existing::Refuse,
        }
    }
}

/// Where the model comes from.
pub enum Source {
    /// A checkpoint folder.
    Checkpoint(Checkpoint),
    /// Random weights for a configuration.
    Dummy {
        /// The text of a `config.json`.
        config: String,
        /// What the text was read from, for messages.
        origin: String,
        /// Seed of the weights.
        seed: u64,
    },
}

/// Follows an export and may stop it.
pub trait Watch: Sync {
    /// `bytes` of weights are going to be written.
    fn started(&self, bytes: u64);
    /// `bytes` more of them have been.
    fn advanced(&self, bytes: u64);
    /// Returns an error when the export should stop.
    ///
    /// # Errors
    /// Whatever the export should end with.
    fn check(&self) -> Result<()>;
}

/// Follows nothing.
pub struct Silent;

impl Watch for Silent {
    fn started(&self, _: u64) {}
    fn advanced(&self, _: u64) {}
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// What an export did.
#[derive(Debug)]
pub struct Exported {
    /// The manifest as written.
    pub manifest: Manifest,
    /// Tensors of the checkpoint that no graph uses.
    pub unused: Vec<String>,
    /// What else is to be known of the model, in sentences: what of the checkpoint has no effect, what the model lacks.
    pub notes: Vec<String>,
    /// What is probably a mistake, in sentences.
    pub warnings: Vec<String>,
}

impl Export {
    /// Writes the model folder `out`. It is written aside and renamed when complete, so an export that fails or is stopped
    /// leaves nothing behind.
    ///
    /// # Errors
    /// What is wrong with the checkpoint, or with writing, by file and field.
    pub fn run(&self, source: &Source, out: &Path, watch: &dyn Watch) -> Result<Exported> {
        self.check()?;
        let (text, origin) = source.config()?;
        let config = Config::parse(&text).with_context(|| origin.clone())?;
        let task = task(self.task.clone(), &config)?;
        let of_decoder = [
            (Setting::AllLogits, self.logits == Logits::All),
            (Setting::Candidates, matches!(self.logits, Logits::Candidates(_))),
            (Setting::KeptTokens, self.kept_tokens.is_some()),
            (Setting::Alignment, self.alignment.is_some()),
            (Setting::Capacity, self.capacity.is_some()),
        ];
        for (setting, given) in of_decoder {
            if given && !task.is_generation() {
                let by = if self.task.is_some() { "" } else { ", by the checkpoint" };
                let found = format!("{}{by}", task.name());
                bail!(requires(setting, "", Setting::Task, Task::Text2TextGeneration.name(), found));
            }
        }
        check_sizes(&config, self)?;
        if let Source::Checkpoint(checkpoint) = source {
            // Before graphs of so many layers are made.
            let of_decoder = if task.is_generation() { config.decoder.layers.len() } else { 0 };
            let (layers, tensors) = (config.encoder.layers.len() + of_decoder, checkpoint.names().count());
            if layers > tensors.max(LAYERS_OF_REAL_MODELS) {
                let folder = checkpoint.folder().display();
                bail!("{folder}: {NOT_DESCRIBED}: expected those of {layers} layers, found {tensors} tensors");
            }
        }
        let companions = source.companions()?;
        let defaults = source.defaults()?;
        check_kept_tokens(self.kept_tokens.as_deref(), &config, defaults.as_ref())?;
        let options = Options {
            task: task.clone(),
            target: self.target,
            dtype: self.dtype,
            logits: self.logits,
            alignment_layers: alignment_layers(self.alignment.as_deref(), &config)?,
            encoder_window: self.encoder_window,
            quantization: self.quantization.clone(),
            activations: self.activations.clone(),
            capacity: self.capacity,
            vocabulary: Vocabulary {
                kept: self.kept_tokens.clone().map(Arc::from),
                ..match source {
                    Source::Checkpoint(checkpoint) if task.is_generation() => weights::vocabulary(&config, checkpoint)?,
                    _ => weights::default_vocabulary(&config),
                }
            },
        };
        if let Activations::Ranges(ranges) = &self.activations {
            check_ranges(&config, &options, ranges)?;
        }
        let graphs = definitions(&config, &options);
        if let Some(plan) = &self.plan {
            plan.check(&config, &options, &graphs).map_err(|error| SettingError::Unfit {
                setting: Setting::Plan,
                why: error.to_string().trim_start_matches("--plan: ").to_string(),
            })?;
        }
        let memory = self.plan.as_ref().map(|plan| Memory::of(plan, &config, &options, &graphs));
        if let (Some(Bytes(room)), Some(memory)) = (self.fits, &memory) {
            let needed = memory.bytes();
            if needed > room {
                let expected = format!("at least the {needed} bytes that the plan takes");
                bail!(SettingError::value(Setting::Fits, expected, format!("{room} bytes:\n\n{memory}")));
            }
        }
        let weights = weights::collect(&graphs.iter().collect::<Vec<_>>());
        for pattern in &self.quantization.exclude {
            let mut names = weights.iter().flat_map(|weight| &weight.parts).map(|part| &part.tensor);
            if !names.any(|name| quantization::matches(pattern, name)) {
                let expected = "the name of a weight, in which * may stand for any text";
                bail!(SettingError::value(Setting::Exclude, expected, format!("{pattern:?}, which no weight has")));
            }
        }
        let unused = match source {
            Source::Checkpoint(checkpoint) => weights::check(&weights, checkpoint, &task)?,
            Source::Dummy { .. } => Vec::new(),
        };
        weights::check_size(&weights).with_context(|| origin.clone())?;

        let aside = Aside::create(out, self.existing)?;
        let failed = AtomicBool::new(false);
        let (written, source_record) = thread::scope(|scope| {
            let hashed = scope.spawn(|| source.record(&|| failed.load(Ordering::Relaxed) || watch.check().is_err()));
            let written = external_data::write(&aside.path(interface::WEIGHTS), &weights, source, watch);
            // The hash of a source whose export has failed is of no use to anyone.
            failed.store(written.is_err(), Ordering::Relaxed);
            (written, hashed.join().expect("hashing does not panic"))
        });
        let external_data::Written { record: weights_record, not_finite } = written?;

        let (mut graph_records, mut observed) = (BTreeMap::new(), BTreeMap::new());
        let cache = if task.is_generation() { options.cache(&config) } else { CacheLayout::default() };
        let parts = interface::parts(&config, self.dtype, options.returned(), cache, &task);
        for (interface::Part { name, file, mut ports }, graph) in parts.into_iter().zip(&graphs) {
            if !graph.observed.is_empty() {
                ports.outputs.push(interface::activation_ranges(graph.observed.len()));
                observed.insert(name.to_string(), graph.observed.clone());
            }
            let bytes = proto::encode(graph, self.target.opset(), |name| {
                let at = weights_record.tensors.iter().find(|tensor| tensor.name == name);
                let at = at.expect("every weight of every graph has been written");
                proto::Location { file: interface::WEIGHTS.into(), offset: at.offset, bytes: at.bytes }
            });
            let weights = graph.parameters.iter().map(|p| graph.value(p.value).name.clone()).collect();
            let record = aside.write(file, &bytes)?;
            graph_records.insert(name.to_string(), GraphRecord { file: file.to_string(), record, ports, weights });
        }

        let mut files = BTreeMap::from([("config.json".to_string(), aside.write("config.json", text.as_bytes())?)]);
        if task.is_generation() && self.target.is_device() {
            let graph = reorder(&config, self.dtype);
            let bytes =
                proto::encode(&graph, self.target.opset(), |name| unreachable!("{name}: a graph without weights"));
            files.insert(interface::REORDER.to_string(), aside.write(interface::REORDER, &bytes)?);
        }
        if let Some(tokens) = &self.kept_tokens {
            let text = serde_json::to_string(tokens).context("tokens cannot be written as JSON")? + "\n";
            files.insert(manifest::KEPT_TOKENS.to_string(), aside.write(manifest::KEPT_TOKENS, text.as_bytes())?);
        }
        for (name, bytes) in companions {
            files.insert(name.to_string(), aside.write(name, &bytes)?);
        }
        let mut manifest = Manifest {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            exporter: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
            task,
            target: self.target.name().into(),
            dtype: self.dtype,
            opset: self.target.opset(),
            encoder_window: self.encoder_window,
            side_by_side: options.reads_side_by_side(),
            logits: self.logits,
            kept_tokens: self.kept_tokens.as_ref().map(Vec::len),
            alignment_layers: options.alignment_layers.clone(),
            cache,
            plan: self.plan.as_ref().map(ToString::to_string),
            quantization: self.quantization.clone(),
            observed,
            parameters: weights::numbers(&weights),
            source: source_record,
            graphs: graph_records,
            weights: weights_record,
            files,
        };
        if let (Some(plan), Some(memory)) = (&self.plan, &memory) {
            for (name, bytes) in plan.files(&config, &manifest, memory)? {
                let record = aside.write(&name, &bytes)?;
                manifest.files.insert(name, record);
            }
        }
        let text = serde_json::to_string_pretty(&manifest).context("the manifest cannot be written as JSON")? + "\n";
        aside.write(manifest::MANIFEST, text.as_bytes())?;
        watch.check()?;
        aside.publish()?;
        let mut notes = notes::of_settings(&config, defaults.as_ref());
        if let Source::Checkpoint(checkpoint) = source {
            notes.extend(checkpoint.notes());
            notes.extend(notes::of_tokenizer(checkpoint.folder()));
        }
        notes.extend(notes::of_blocks(&weights));
        let warnings = notes::of_capacity(self.capacity, defaults.as_ref()).into_iter();
        let warnings = warnings.chain(notes::of_numbers(&not_finite)).collect();
        Ok(Exported { manifest, unused, notes, warnings })
    }

    /// Refuses what does not go together, whatever the checkpoint.
    fn check(&self) -> Result<(), SettingError> {
        let target = self.target;
        let those = |suits: &dyn Fn(Target) -> bool| {
            Target::ALL.into_iter().filter(|&target| suits(target)).map(Target::name).collect::<Vec<_>>().join(" or ")
        };
        let requires_target = |setting, value: &str, suits: &dyn Fn(Target) -> bool| match suits(target) {
            true => Ok(()),
            false => Err(requires(setting, value, Setting::Target, those(suits), target.name())),
        };
        let dtype = self.dtype;
        requires_target(Setting::Dtype, &dtype.to_string(), &|target| target.dtypes().contains(&dtype))?;
        for blocks in self.quantization.parts() {
            let Blocks { bits, size, .. } = blocks;
            if !matches!(bits, 4 | 8) {
                return Err(SettingError::value(Setting::Quantization, "4 or 8 bits", bits));
            }
            if !matches!(size, 16 | 32 | 64 | 128) {
                return Err(SettingError::value(Setting::BlockSize, "16, 32, 64 or 128", size));
            }
            let is_float8 = blocks.code == Code::Float8E4M3FN;
            requires_target(Setting::Quantization, blocks.name(), &|target| match is_float8 {
                true => target == Target::TensorRt,
                false => target.reads_packed(),
            })?;
        }
        if self.plan.is_some() {
            requires_target(Setting::Plan, "", &|target| target == Target::TensorRt)?;
        }
        if self.fits.is_some() && self.plan.is_none() {
            return Err(requires(Setting::Fits, "", Setting::Plan, "", ""));
        }
        if self.capacity.is_some() {
            requires_target(Setting::Capacity, "", &Target::has_static_cache)?;
        }
        if self.activations == Activations::Observed {
            requires_target(Setting::Observed, "", &|target| target == Target::Portable)?;
            if dtype != DType::Float32 {
                return Err(requires(Setting::Observed, "", Setting::Dtype, "float32", dtype.to_string()));
            }
            if self.alignment.is_some() {
                return Err(requires(Setting::Observed, "", Setting::Alignment, "to be left out", ""));
            }
        }
        if matches!(self.activations, Activations::Ranges(_)) {
            requires_target(Setting::Ranges, "", &|target| target == Target::TensorRt)?;
            let names: Vec<&str> = self.quantization.parts().map(|blocks| blocks.name()).collect();
            if !self.quantization.parts().any(|blocks| blocks.bits == 8) {
                return Err(requires(Setting::Ranges, "", Setting::Quantization, "int8 or fp8", names.join(", ")));
            }
        }
        for blocks in self.quantization.parts().filter(|_| target.signs_packed()) {
            if blocks.bits == 8 && !matches!(self.activations, Activations::Ranges(_)) {
                let value = format!("{} with target {}", blocks.name(), target.name());
                return Err(requires(Setting::Quantization, &value, Setting::Ranges, "", ""));
            }
            if !blocks.symmetric {
                requires_target(Setting::Asymmetric, "", &|target| target.reads_packed() && !target.signs_packed())?;
            }
        }
        Ok(())
    }
}

fn requires(
    setting: Setting,
    value: &str,
    other: Setting,
    needed: impl Into<String>,
    found: impl Into<String>,
) -> SettingError {
    SettingError::Requires { setting, value: value.into(), other, needed: needed.into(), found: found.into() }
}

/// Refuses sizes that do not fit the model.
fn check_sizes(config: &Config, export: &Export) -> Result<(), SettingError> {
    let Quantization { encoder, decoder, head, .. } = &export.quantization;
    let widths = |side: &Side| [side.hidden_size, side.num_attention_heads * side.head_dim, side.intermediate_size];
    let (of_encoder, of_decoder) = (widths(&config.encoder), widths(&config.decoder));
    let across = [config.encoder.hidden_size];
    for (blocks, widths) in
        [(encoder, &of_encoder[..]), (decoder, &of_decoder), (decoder, &across), (head, &of_decoder[..1])]
    {
        // Of 8 bits a row is a block.
        let is_blocked = |blocks: &Blocks| export.target.signs_packed() && blocks.bits == 4;
        let Some(Blocks { size, .. }) = blocks.filter(is_blocked) else { continue };
        if let Some(width) = widths.iter().find(|width| !width.is_multiple_of(size)) {
            let expected = format!("a divisor of the matrices' widths for target {}", export.target.name());
            return Err(SettingError::value(Setting::BlockSize, expected, format!("{size} for {width}")));
        }
    }
    if let Some(capacity) = export.capacity {
        let most = config.decoder.max_position_embeddings;
        if !(1..=most).contains(&capacity) {
            return Err(SettingError::value(
                Setting::Capacity,
                format!("1 to {most} (decoder.max_position_embeddings)"),
                capacity,
            ));
        }
    }
    if let Logits::Candidates(count) = export.logits {
        // The limit of TensorRT's TopK.
        let tokens = export.kept_tokens.as_ref().map_or(config.decoder.vocab_size, Vec::len);
        let most = tokens.min(3839);
        if !(1..=most).contains(&count) {
            return Err(SettingError::value(Setting::Candidates, format!("1 to {most}"), count));
        }
    }
    Ok(())
}

/// Refuses tokens that the model does not have, and a choice of which no text would ever end.
fn check_kept_tokens(tokens: Option<&[usize]>, config: &Config, defaults: Option<&Value>) -> Result<(), SettingError> {
    let Some(tokens) = tokens else { return Ok(()) };
    let refused = |expected: String, found: String| Err(SettingError::value(Setting::KeptTokens, expected, found));
    let vocab_size = config.decoder.vocab_size;
    if tokens.is_empty() {
        return refused("ids of tokens".into(), "none".into());
    }
    if let Some(token) = tokens.iter().find(|&&token| token >= vocab_size) {
        return refused(format!("token ids below {vocab_size}, the size of the vocabulary"), token.to_string());
    }
    if let Some(pair) = tokens.windows(2).find(|pair| pair[0] >= pair[1]) {
        return refused("ascending token ids, each once".into(), format!("{} before {}", pair[0], pair[1]));
    }
    let ends: Vec<u64> = match defaults.and_then(|defaults| defaults.get("eos_token_id")) {
        Some(Value::Array(tokens)) => tokens.iter().filter_map(Value::as_u64).collect(),
        Some(token) => token.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let is_kept = |token: &u64| tokens.binary_search(&(*token as usize)).is_ok();
    if !ends.is_empty() && !ends.iter().any(is_kept) {
        let expected =
            format!("one of those that end a text, eos_token_id {ends:?} of {GENERATION_CONFIG}, among them");
        return refused(expected, "none".into());
    }
    Ok(())
}

/// The layers of an alignment, ascending.
fn alignment_layers(wanted: Option<&[usize]>, config: &Config) -> Result<Vec<usize>, SettingError> {
    let all = config.decoder.layers.len();
    let mut layers = match wanted {
        None => return Ok(Vec::new()),
        Some([]) => return Ok((0..all).collect()),
        Some(layers) => layers.to_vec(),
    };
    if let Some(layer) = layers.iter().find(|&&layer| layer >= all) {
        let expected = format!("decoder layers from 0 to {}", all - 1);
        return Err(SettingError::value(Setting::AlignmentLayers, expected, layer));
    }
    layers.sort_unstable();
    if let Some(twice) = layers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(SettingError::value(Setting::AlignmentLayers, "each layer once", format!("{} twice", twice[0])));
    }
    Ok(layers)
}

/// Holds ranges to the matrices of the model.
fn check_ranges(config: &Config, options: &Options, ranges: &BTreeMap<String, f32>) -> Result<(), SettingError> {
    let refused = |expected: String, found: String| Err(SettingError::value(Setting::Ranges, expected, found));
    let observed = definitions(config, &Options { activations: Activations::Observed, ..options.clone() });
    let known: BTreeSet<&str> = observed.iter().flat_map(|graph| &graph.observed).map(String::as_str).collect();
    let is_rounded = |name: &str| options.quantization.of(name).is_some_and(|blocks| blocks.bits == 8);
    for &name in known.iter().filter(|name| is_rounded(name)) {
        match ranges.get(name) {
            Some(range) if range.is_finite() && *range >= 0.0 => {}
            Some(range) => return refused(format!("ranges of 0 or more for {name}"), range.to_string()),
            None => return refused(format!("a range for {name}"), "none".into()),
        }
    }
    match ranges.keys().find(|name| !known.contains(name.as_str())) {
        Some(name) => refused("names of this model's matrices".into(), cut(name)),
        None => Ok(()),
    }
}

/// The task to export for, which must suit the checkpoint.
fn task(wanted: Option<Task>, config: &Config) -> Result<Task, SettingError> {
    let task = wanted.unwrap_or_else(|| Task::of(config));
    if !task.suits(config) {
        let mut suited = vec![Task::of(config).name(), Task::FeatureExtraction(Features::default()).name()];
        suited.dedup();
        let expected = format!("{} for a checkpoint of {}", suited.join(" or "), config.architecture.name());
        return Err(SettingError::value(Setting::Task, expected, task.name()));
    }
    let Task::FeatureExtraction(mut features) = task else { return Ok(task) };
    let all = config.encoder.layers.len();
    let Some(layers) = features.layers(config) else {
        let expected = format!("0 to {all}, or -1 to -{} from the end", all + 1);
        return Err(SettingError::value(Setting::HiddenLayer, expected, features.hidden_layer));
    };
    features.hidden_layer = layers as i64;
    Ok(Task::FeatureExtraction(features))
}

/// The numbers in a model of this configuration, each counted once.
pub fn parameters(config: &Config) -> u64 {
    let options = plain_options(weights::default_vocabulary(config));
    let graphs = [encoder(config, &options), decoder_init(config, &options)];
    weights::numbers(&weights::collect(&graphs.each_ref()))
}

/// What has graphs made of every number as the checkpoint has it.
fn plain_options(vocabulary: Vocabulary) -> Options {
    Options {
        task: Task::Text2TextGeneration,
        target: Target::Portable,
        dtype: DType::Float32,
        logits: Logits::Last,
        alignment_layers: Vec::new(),
        encoder_window: EncoderWindow::Inclusive,
        quantization: Quantization::default(),
        activations: Activations::Unknown,
        capacity: None,
        vocabulary,
    }
}

impl Source {
    /// The text of the configuration and where it stands.
    fn config(&self) -> Result<(String, String)> {
        match self {
            Source::Checkpoint(checkpoint) => {
                let path = checkpoint.folder().join("config.json");
                Ok((json::without_mark(&read_text(&path)?).to_string(), path.display().to_string()))
            }
            Source::Dummy { config, origin, .. } => Ok((config.clone(), origin.clone())),
        }
    }

    /// What the manifest says of this source; hashes are cut short once `stopped`.
    fn record(&self, stopped: &dyn Fn() -> bool) -> manifest::Source {
        let checkpoint = match self {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Dummy { seed, .. } => return manifest::Source::Dummy { seed: *seed },
        };
        let mut files = BTreeMap::new();
        for (name, bytes) in checkpoint.files() {
            let mut hash = Sha256::new();
            bytes.chunks(8 << 20).take_while(|_| !stopped()).for_each(|chunk| hash.update(chunk));
            let record = FileRecord { bytes: bytes.len() as u64, sha256: hex::encode(hash.finalize()) };
            files.insert(name.to_string(), record);
        }
        manifest::Source::Checkpoint(files)
    }

    /// Where a tensor is, for messages.
    fn place(&self, tensor: &str) -> String {
        match self {
            Source::Checkpoint(checkpoint) => match checkpoint.file_of(tensor) {
                Some(file) => format!("{}: {tensor}", file.display()),
                None => tensor.to_string(),
            },
            Source::Dummy { .. } => tensor.to_string(),
        }
    }

    /// The files that are carried along, with their content. What none of the tools that read them could use is refused.
    fn companions(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let Source::Checkpoint(checkpoint) = self else { return Ok(Vec::new()) };
        let folder = checkpoint.folder();
        let is_there = |name: &str| found::is_there(&folder.join(name));
        let there = COMPANIONS.iter().filter(|name| is_there(name));
        let read = |name: &&'static str| Ok((*name, checkpoint::companion(folder, name)?));
        let mut companions: Vec<_> = there.map(read).collect::<Result<_>>()?;
        // The template for conversations may stand beside templates for other uses, which are not carried along.
        if !is_there(CHAT_TEMPLATE) && is_there(DEFAULT_CHAT_TEMPLATE) {
            companions.push((CHAT_TEMPLATE, checkpoint::companion(folder, DEFAULT_CHAT_TEMPLATE)?));
        }
        Ok(companions)
    }

    /// The model's own options for generation, if it has any.
    fn defaults(&self) -> Result<Option<Value>> {
        let Source::Checkpoint(checkpoint) = self else { return Ok(None) };
        let path = checkpoint.folder().join(GENERATION_CONFIG);
        if path.exists() { Ok(Some(found::read_object(&path)?.1)) } else { Ok(None) }
    }
}
