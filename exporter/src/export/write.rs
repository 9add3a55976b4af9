//! Writes a prepared export into its folder: the weights first, since the graphs refer to their offsets, the manifest
//! last, since it has the hashes of all other files.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use t5gemma_graphs::interface::{self, CacheLayout, GraphSpec, LoraModule, LoraModules};
use t5gemma_graphs::manifest::{
    self, FORMAT, FORMAT_VERSION, FileRecord, GraphRecord, KEPT_TOKENS, LoraInputs, MANIFEST, Manifest, WeightsRecord,
};
use t5gemma_graphs::reorder;

use super::prepare::Prepared;
use crate::error::Result;
use crate::external_data::{self, WrittenWeights};
use crate::model_card;
use crate::progress::Progress;
use crate::proto;
use crate::staging::StagingDir;
use crate::tensorrt;
use crate::weights;

/// A model folder that was written.
pub(super) struct WrittenModel {
    pub manifest: Manifest,
    /// The tensors that have NaNs or infinities, and how many.
    pub not_finite: Vec<(String, u64)>,
}

/// The graphs that were written, by name.
struct WrittenGraphs {
    records: BTreeMap<String, GraphRecord>,
    /// For graphs that report activation ranges, the names of the matrices.
    observed: BTreeMap<String, Vec<String>>,
    /// For graphs that take adapters, the modules that these can change.
    lora_modules: LoraModules,
}

impl Prepared<'_> {
    /// Writes all files.
    pub fn write(&self, folder: &StagingDir, progress: &dyn Progress) -> Result<WrittenModel> {
        let (written, source) = self.write_weights(folder, progress)?;
        let WrittenWeights { record: weights, not_finite } = written;
        let is_generation = self.options.task.is_generation();
        let cache = if is_generation { self.options.cache(&self.config) } else { CacheLayout::default() };
        let WrittenGraphs { records: graphs, observed, lora_modules } = self.write_graphs(folder, &weights, cache)?;
        let export = self.export;
        let mut manifest = Manifest {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            exporter: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
            family: self.config.family,
            task: self.options.task.clone(),
            target: export.target.name().into(),
            dtype: export.dtype,
            opset: export.target.capabilities().opset,
            encoder_window: self.options.encoder_window,
            side_by_side: self.options.reads_side_by_side(&self.config),
            logits: export.logits,
            kept_tokens: export.kept_tokens.as_ref().map(Vec::len),
            alignment_layers: self.options.alignment_layers.clone(),
            cache,
            plan: export.plan.as_ref().map(ToString::to_string),
            quantization: export.quantization.clone(),
            observed,
            parameters: weights::parameters(&self.weights),
            facts: self.config.facts(),
            images: self.images.clone(),
            source,
            adapters: self.source.adapters(),
            lora_inputs: export.lora_inputs.map(|rank| LoraInputs { rank, modules: lora_modules }),
            graphs,
            weights,
            files: self.write_files(folder)?,
        };
        if let (Some(plan), Some(memory)) = (&export.plan, &self.memory) {
            for (name, bytes) in tensorrt::files(plan, &manifest, memory) {
                let record = folder.write(&name, &bytes)?;
                manifest.files.insert(name, record);
            }
        }
        if export.model_card {
            let base = model_card::base_model(self.source, &self.config_text);
            for (name, text) in model_card::files(&manifest, base.as_ref()) {
                let record = folder.write(name, text.as_bytes())?;
                manifest.files.insert(name.to_string(), record);
            }
        }
        let text = serde_json::to_string_pretty(&manifest).expect("a manifest has string keys only") + "\n";
        folder.write(MANIFEST, text.as_bytes())?;
        Ok(WrittenModel { manifest, not_finite })
    }

    /// Writes the weights file while the checkpoint's files are hashed on another thread.
    fn write_weights(
        &self,
        folder: &StagingDir,
        progress: &dyn Progress,
    ) -> Result<(WrittenWeights, manifest::Source)> {
        let failed = AtomicBool::new(false);
        let (written, source) = thread::scope(|scope| {
            let is_stopped = || failed.load(Ordering::Relaxed) || progress.is_cancelled();
            let parts = self.weights.iter().flat_map(|weight| &weight.parts);
            let used: BTreeSet<&str> = parts.map(|part| part.tensor.as_str()).collect();
            let hashed = scope.spawn(move || self.source.record(|tensor| used.contains(tensor), is_stopped));
            let written = external_data::write(&folder.path(interface::WEIGHTS), &self.weights, self.source, progress);
            // The hashes are of no use to an export that failed.
            failed.store(written.is_err(), Ordering::Relaxed);
            (written, hashed.join().expect("hashing does not panic"))
        });
        Ok((written?, source))
    }

    /// Writes the graphs of the task.
    fn write_graphs(&self, folder: &StagingDir, weights: &WeightsRecord, cache: CacheLayout) -> Result<WrittenGraphs> {
        let (mut records, mut observed, mut lora_modules) = (BTreeMap::new(), BTreeMap::new(), LoraModules::new());
        let Prepared { export, config, options, .. } = self;
        let mut parts =
            interface::graphs(&config.facts(), export.dtype, options.decoder_outputs(), cache, &options.task);
        let bases = parts.clone();
        let with_adapters = bases.iter().filter_map(|base| Some((base, interface::lora_graph(base.name)?.0)));
        for ((base, name), graph) in with_adapters.zip(&self.graphs[bases.len()..]) {
            lora_modules.insert(name.to_string(), LoraModule::of_graph(graph));
            parts.extend(interface::lora(base, export.dtype, &lora_modules));
        }
        for (GraphSpec { name, file, mut ports }, graph) in parts.into_iter().zip(&self.graphs) {
            if !graph.observed.is_empty() {
                ports.outputs.push(interface::activation_ranges(graph.observed.len()));
                observed.insert(name.to_string(), graph.observed.clone());
            }
            let bytes = proto::encode(graph, export.target.capabilities().opset, |name| {
                let at = weights.tensors.iter().find(|tensor| tensor.name == name);
                let at = at.expect("all weights of the graphs were written");
                proto::Location { file: interface::WEIGHTS.into(), offset: at.offset, bytes: at.bytes }
            });
            let weights = graph.parameters.iter().map(|p| graph.value(p.value).name.clone()).collect();
            let record = folder.write(file, &bytes)?;
            records.insert(name.to_string(), GraphRecord { file: file.to_string(), record, ports, weights });
        }
        Ok(WrittenGraphs { records, observed, lora_modules })
    }

    /// Writes the other files: settings, tokenizer, and for GPUs the graph that reorders cache rows.
    fn write_files(&self, folder: &StagingDir) -> Result<BTreeMap<String, FileRecord>> {
        let mut files = BTreeMap::new();
        let mut write = |name: &str, bytes: &[u8]| -> Result<()> {
            files.insert(name.to_string(), folder.write(name, bytes)?);
            Ok(())
        };
        let export = self.export;
        write("config.json", self.config_text.as_bytes())?;
        if self.options.task.is_generation() && export.target.capabilities().has_device_memory {
            let graph = reorder(&self.config.facts(), export.dtype);
            let no_weights = |name: &str| unreachable!("{name}: the graph has no weights");
            write(interface::REORDER, &proto::encode(&graph, export.target.capabilities().opset, no_weights))?;
        }
        if let Some(tokens) = &export.kept_tokens {
            let text = serde_json::to_string(tokens).expect("integers can be written as JSON") + "\n";
            write(KEPT_TOKENS, text.as_bytes())?;
        }
        for (name, bytes) in &self.companions {
            write(name, bytes)?;
        }
        Ok(files)
    }
}
