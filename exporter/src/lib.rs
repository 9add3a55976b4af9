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
mod inspect;
mod plan;
mod presets;
mod proto;
mod quantize;
mod signed;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};
use t5gemma_graphs::config::{Config, Side};
use t5gemma_graphs::interface::{self, CacheLayout, DType, Logits};
use t5gemma_graphs::manifest::{self, EncoderWindow, FORMAT, FORMAT_VERSION, FileRecord, GraphRecord, Manifest};
use t5gemma_graphs::onnx::{Blocks, Code};
use t5gemma_graphs::quantization::{self, Activations, Quantization};
use t5gemma_graphs::task::Task;
use t5gemma_graphs::{Options, Target, Vocabulary, decoder_init, definitions, encoder, reorder};

pub use check::{Checked, Finding, TensorRt, check};
pub use checkpoint::{Checkpoint, Tensor};
pub use folder::Existing;
pub use inspect::{Report, inspect};
pub use plan::{Bytes, Plan};
pub use presets::{PRESETS, preset};

use checkpoint::{CHAT_TEMPLATE, COMPANIONS, DEFAULT_CHAT_TEMPLATE, read_text};
use folder::Aside;
use plan::Memory;

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
        let task = task(self.task.clone(), &config).with_context(|| origin.clone())?;
        let of_decoder = [
            ("all logits", self.logits == Logits::All),
            ("--candidates", matches!(self.logits, Logits::Candidates(_))),
            ("--keep-tokens", self.kept_tokens.is_some()),
            ("--alignment", self.alignment.is_some()),
            ("--cache", self.capacity.is_some()),
        ];
        for (what, given) in of_decoder {
            ensure!(
                !given || task.is_generation(),
                "{what}: expected the task {}, which has a decoder's, found {}",
                Task::Text2TextGeneration.name(),
                task.name()
            );
        }
        check_sizes(&config, self).with_context(|| origin.clone())?;
        let companions = source.companions()?;
        check_kept_tokens(self.kept_tokens.as_deref(), &config, &companions)?;
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
            plan.check(&config, &options, &graphs)?;
        }
        let memory = self.plan.as_ref().map(|plan| Memory::of(plan, &config, &options, &graphs));
        if let (Some(Bytes(room)), Some(memory)) = (self.fits, &memory) {
            let needed = memory.bytes();
            ensure!(
                needed <= room,
                "--fits: expected a plan of at most {room} bytes, found {needed} bytes:\n\n{memory}"
            );
        }
        let weights = weights::collect(&graphs.iter().collect::<Vec<_>>());
        for pattern in &self.quantization.exclude {
            let mut names = weights.iter().flat_map(|weight| &weight.parts).map(|part| &part.tensor);
            let expected = "--quantize-exclude: expected the name of a weight, in which * may stand for any text";
            ensure!(
                names.any(|name| quantization::matches(pattern, name)),
                "{expected}, found {pattern:?}, which no weight has"
            );
        }
        let unused = match source {
            Source::Checkpoint(checkpoint) => weights::check(&weights, checkpoint, &task)?,
            Source::Dummy { .. } => Vec::new(),
        };
        weights::check_size(&weights).with_context(|| origin.clone())?;

        let aside = Aside::create(out, self.existing)?;
        let failed = AtomicBool::new(false);
        let (weights_record, source_record) = thread::scope(|scope| {
            let hashed = scope.spawn(|| source.record(&|| failed.load(Ordering::Relaxed) || watch.check().is_err()));
            let written = external_data::write(&aside.path(interface::WEIGHTS), &weights, source, watch);
            // The hash of a source whose export has failed is of no use to anyone.
            failed.store(written.is_err(), Ordering::Relaxed);
            (written, hashed.join().expect("hashing does not panic"))
        });
        let weights_record = weights_record?;

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
        Ok(Exported { manifest, unused })
    }

    /// Refuses what does not go together, whatever the checkpoint.
    fn check(&self) -> Result<()> {
        let (target, dtypes) = (self.target.name(), self.target.dtypes());
        if !dtypes.contains(&self.dtype) {
            let all: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
            bail!("--dtype: expected {} for target {target}, found {}", all.join(", "), self.dtype);
        }
        let those = |suits: fn(Target) -> bool| {
            Target::ALL.into_iter().filter(|&target| suits(target)).map(Target::name).collect::<Vec<_>>().join(", ")
        };
        let of_float8 = |blocks: Blocks| blocks.code == Code::Float8E4M3FN;
        ensure!(
            !self.quantization.parts().any(of_float8) || self.target == Target::TensorRt,
            "--quantize fp8: expected target {}, found target {target}",
            Target::TensorRt.name()
        );
        if self.quantization.is_any() && !self.target.reads_packed() {
            let those = those(Target::reads_packed);
            bail!("--quantize: expected a target whose runtime reads packed weights ({those}), found target {target}");
        }
        ensure!(
            self.plan.is_none() || self.target == Target::TensorRt,
            "--plan: expected target {}, found target {target}",
            Target::TensorRt.name()
        );
        ensure!(self.fits.is_none() || self.plan.is_some(), "--fits requires --plan (got none)");
        if self.capacity.is_some() && !self.target.has_static_cache() {
            let those = those(Target::has_static_cache);
            bail!("--cache: expected a target with a cache of fixed capacity ({those}), found target {target}");
        }
        if self.activations == Activations::Observed {
            let suits = self.target == Target::Portable && self.dtype == DType::Float32 && !self.quantization.is_any();
            ensure!(
                suits && self.alignment.is_none(),
                "--observe: expected target {} in float32, not quantized and without --alignment",
                Target::Portable.name()
            );
        }
        if matches!(self.activations, Activations::Ranges(_)) {
            let eight = self.quantization.parts().any(|blocks| blocks.bits == 8);
            let expected = Target::TensorRt.name();
            ensure!(
                self.target == Target::TensorRt && eight,
                "--calibrate: expected --quantize int8 or fp8 for target {expected}, which computes in 8 bits"
            );
        }
        for blocks in self.quantization.parts() {
            let Blocks { bits, size, symmetric, .. } = blocks;
            ensure!(matches!(bits, 4 | 8), "--quantize: expected int8, fp8 or int4, found {bits} bits");
            ensure!(matches!(size, 16 | 32 | 64 | 128), "--block-size: expected 16, 32, 64 or 128, found {size}");
            if self.target.signs_packed() {
                let is_known = bits == 4 || matches!(self.activations, Activations::Ranges(_));
                let name = blocks.name();
                ensure!(is_known, "--quantize {name}: expected --calibrate for target {target}, found none");
                ensure!(symmetric, "--asymmetric: expected blocks without zero points for target {target}");
            }
        }
        Ok(())
    }
}

/// Refuses sizes that do not fit the model.
fn check_sizes(config: &Config, export: &Export) -> Result<()> {
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
            let target = export.target.name();
            bail!(
                "--block-size: expected a divisor of the matrices' widths for target {target}, found {size} for {width}"
            );
        }
    }
    if let Some(capacity) = export.capacity {
        let most = config.decoder.max_position_embeddings;
        ensure!((1..=most).contains(&capacity), "--cache: expected static=1 to static={most}, found static={capacity}");
    }
    if let Logits::Candidates(count) = export.logits {
        // The limit of TensorRT's TopK.
        let tokens = export.kept_tokens.as_ref().map_or(config.decoder.vocab_size, Vec::len);
        let most = tokens.min(3839);
        ensure!((1..=most).contains(&count), "--candidates: expected 1 to {most}, found {count}");
    }
    Ok(())
}

/// Refuses tokens that the model does not have, and a choice of which no text would ever end.
fn check_kept_tokens(tokens: Option<&[usize]>, config: &Config, companions: &[(&str, Vec<u8>)]) -> Result<()> {
    let Some(tokens) = tokens else { return Ok(()) };
    let vocab_size = config.decoder.vocab_size;
    ensure!(!tokens.is_empty(), "--keep-tokens: expected ids of tokens, found none");
    if let Some(token) = tokens.iter().find(|&&token| token >= vocab_size) {
        bail!("--keep-tokens: expected token ids below {vocab_size}, the size of the vocabulary, found {token}");
    }
    if let Some(pair) = tokens.windows(2).find(|pair| pair[0] >= pair[1]) {
        bail!("--keep-tokens: expected ascending token ids, each once, found {} before {}", pair[0], pair[1]);
    }
    let Some((name, text)) = companions.iter().find(|(name, _)| *name == "generation_config.json") else {
        return Ok(());
    };
    let settings: serde_json::Value = serde_json::from_slice(text).with_context(|| (*name).to_string())?;
    let ends: Vec<u64> = match settings.get("eos_token_id") {
        Some(serde_json::Value::Array(tokens)) => tokens.iter().filter_map(serde_json::Value::as_u64).collect(),
        Some(token) => token.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let is_kept = |token: &u64| tokens.binary_search(&(*token as usize)).is_ok();
    ensure!(
        ends.is_empty() || ends.iter().any(is_kept),
        "--keep-tokens: expected one of those that end a text among them, eos_token_id {ends:?} of {name}, found none"
    );
    Ok(())
}

/// The layers of an alignment, ascending.
fn alignment_layers(wanted: Option<&[usize]>, config: &Config) -> Result<Vec<usize>> {
    let all = config.decoder.layers.len();
    let mut layers = match wanted {
        None => return Ok(Vec::new()),
        Some([]) => return Ok((0..all).collect()),
        Some(layers) => layers.to_vec(),
    };
    if let Some(layer) = layers.iter().find(|&&layer| layer >= all) {
        bail!("--alignment-layers: expected decoder layers from 0 to {}, found {layer}", all - 1);
    }
    layers.sort_unstable();
    if let Some(twice) = layers.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("--alignment-layers: expected each layer once, found {} twice", twice[0]);
    }
    Ok(layers)
}

/// Holds ranges to the matrices of the model.
fn check_ranges(config: &Config, options: &Options, ranges: &BTreeMap<String, f32>) -> Result<()> {
    let observed = definitions(config, &Options { activations: Activations::Observed, ..options.clone() });
    let known: BTreeSet<&str> = observed.iter().flat_map(|graph| &graph.observed).map(String::as_str).collect();
    let is_rounded = |name: &str| options.quantization.of(name).is_some_and(|blocks| blocks.bits == 8);
    for &name in known.iter().filter(|name| is_rounded(name)) {
        match ranges.get(name) {
            Some(range) if range.is_finite() && *range >= 0.0 => {}
            Some(range) => bail!("--calibrate: ranges: {name}: expected a number of 0 or more, found {range}"),
            None => bail!("--calibrate: ranges: expected one for {name}, found none"),
        }
    }
    match ranges.keys().find(|name| !known.contains(name.as_str())) {
        Some(name) => bail!("--calibrate: ranges: expected names of this model's matrices, found {name}"),
        None => Ok(()),
    }
}

/// The task to export for, which must suit the checkpoint.
fn task(wanted: Option<Task>, config: &Config) -> Result<Task> {
    let task = wanted.unwrap_or_else(|| Task::of(config));
    ensure!(
        task.suits(config),
        "architectures: expected a checkpoint for the task {}, found {}, which is for {}",
        task.name(),
        config.architecture.name(),
        Task::of(config).name()
    );
    let Task::FeatureExtraction(mut features) = task else { return Ok(task) };
    let all = config.encoder.layers.len();
    let layers = features.layers(config).with_context(|| {
        format!(
            "hidden_layer: expected 0 to {all}, or -1 to -{} from the end, found {}",
            all + 1,
            features.hidden_layer
        )
    })?;
    features.hidden_layer = layers as i64;
    Ok(Task::FeatureExtraction(features))
}

/// The numbers in a model of this configuration, each counted once.
pub fn parameters(config: &Config) -> u64 {
    let vocabulary = weights::default_vocabulary(config);
    let (target, dtype) = (Target::Portable, DType::Float32);
    let options = Options {
        task: Task::Text2TextGeneration,
        target,
        dtype,
        logits: Logits::Last,
        alignment_layers: Vec::new(),
        encoder_window: EncoderWindow::Inclusive,
        quantization: Quantization::default(),
        activations: Activations::Unknown,
        capacity: None,
        vocabulary,
    };
    let graphs = [encoder(config, &options), decoder_init(config, &options)];
    weights::numbers(&weights::collect(&graphs.each_ref()))
}

impl Source {
    /// The text of the configuration and where it stands.
    fn config(&self) -> Result<(String, String)> {
        match self {
            Source::Checkpoint(checkpoint) => {
                let path = checkpoint.folder().join("config.json");
                Ok((read_text(&path)?, path.display().to_string()))
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
        let there = |name: &&str| checkpoint.folder().join(name).exists();
        let read = |name: &&'static str| {
            let path: PathBuf = checkpoint.folder().join(name);
            let bytes = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
            if path.extension().is_some_and(|extension| extension == "json") {
                serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(&bytes)
                    .with_context(|| format!("{}: expected a JSON object", path.display()))?;
            }
            Ok((*name, bytes))
        };
        let mut companions: Vec<_> = COMPANIONS.iter().filter(|name| there(name)).map(read).collect::<Result<_>>()?;
        // The template for conversations may stand beside templates for other uses, which are not carried along.
        if !there(&CHAT_TEMPLATE) && there(&DEFAULT_CHAT_TEMPLATE) {
            let (_, bytes) = read(&DEFAULT_CHAT_TEMPLATE)?;
            companions.push((CHAT_TEMPLATE, bytes));
        }
        Ok(companions)
    }
}
