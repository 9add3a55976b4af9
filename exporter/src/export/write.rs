//! Writes a prepared export into its folder: the weights first, since the graphs refer to their places, the manifest last, since
//! it has the hashes of all other files.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use t5gemma_graphs::interface::{self, CacheLayout, Part};
use t5gemma_graphs::manifest::{
    self, FORMAT, FORMAT_VERSION, FileRecord, GraphRecord, KEPT_TOKENS, MANIFEST, Manifest, WeightsRecord,
};
use t5gemma_graphs::reorder;

use super::prepare::Prepared;
use crate::external_data::{self, Written};
use crate::progress::Watch;
use crate::proto;
use crate::staging::StagingDir;
use crate::tensorrt;
use crate::weights;

/// Tensors with numbers that are NaN or infinite, and how many.
pub(super) type NotFinite = Vec<(String, u64)>;

/// The graphs that were written, by name.
struct WrittenGraphs {
    records: BTreeMap<String, GraphRecord>,
    /// For graphs that report activation ranges, the matrices that these are for.
    observed: BTreeMap<String, Vec<String>>,
}

impl Prepared<'_> {
    /// Writes all files. Returns the manifest and the tensors that are not finite.
    pub fn write(&self, folder: &StagingDir, watch: &dyn Watch) -> Result<(Manifest, NotFinite)> {
        let (written, source) = self.write_weights(folder, watch)?;
        let Written { record: weights, not_finite } = written;
        let is_generation = self.options.task.is_generation();
        let cache = if is_generation { self.options.cache(&self.config) } else { CacheLayout::default() };
        let WrittenGraphs { records: graphs, observed } = self.write_graphs(folder, &weights, cache)?;
        let export = self.export;
        let mut manifest = Manifest {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            exporter: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
            task: self.options.task.clone(),
            target: export.target.name().into(),
            dtype: export.dtype,
            opset: export.target.capabilities().opset,
            encoder_window: export.encoder_window,
            side_by_side: self.options.reads_side_by_side(),
            logits: export.logits,
            kept_tokens: export.kept_tokens.as_ref().map(Vec::len),
            alignment_layers: self.options.alignment_layers.clone(),
            cache,
            plan: export.plan.as_ref().map(ToString::to_string),
            quantization: export.quantization.clone(),
            observed,
            parameters: weights::numbers(&self.weights),
            source,
            graphs,
            weights,
            files: self.write_files(folder)?,
        };
        if let (Some(plan), Some(memory)) = (&export.plan, &self.memory) {
            for (name, bytes) in tensorrt::files(plan, &self.config, &manifest, memory)? {
                let record = folder.write(&name, &bytes)?;
                manifest.files.insert(name, record);
            }
        }
        let text = serde_json::to_string_pretty(&manifest).context("the manifest cannot be written as JSON")? + "\n";
        folder.write(MANIFEST, text.as_bytes())?;
        Ok((manifest, not_finite))
    }

    /// Writes the file of weights while the checkpoint's files are hashed on another thread.
    fn write_weights(&self, folder: &StagingDir, watch: &dyn Watch) -> Result<(Written, manifest::Source)> {
        let failed = AtomicBool::new(false);
        let (written, source) = thread::scope(|scope| {
            let hashed =
                scope.spawn(|| self.source.record(&|| failed.load(Ordering::Relaxed) || watch.check().is_err()));
            let written = external_data::write(&folder.path(interface::WEIGHTS), &self.weights, self.source, watch);
            // Nobody needs the hashes of an export that failed.
            failed.store(written.is_err(), Ordering::Relaxed);
            (written, hashed.join().expect("hashing does not panic"))
        });
        Ok((written?, source))
    }

    /// Writes the graphs of the task.
    fn write_graphs(&self, folder: &StagingDir, weights: &WeightsRecord, cache: CacheLayout) -> Result<WrittenGraphs> {
        let (mut records, mut observed) = (BTreeMap::new(), BTreeMap::new());
        let Prepared { export, config, options, .. } = self;
        let parts = interface::parts(config, export.dtype, options.returned(), cache, &options.task);
        for (Part { name, file, mut ports }, graph) in parts.into_iter().zip(&self.graphs) {
            if !graph.observed.is_empty() {
                ports.outputs.push(interface::activation_ranges(graph.observed.len()));
                observed.insert(name.to_string(), graph.observed.clone());
            }
            let bytes = proto::encode(graph, export.target.capabilities().opset, |name| {
                let at = weights.tensors.iter().find(|tensor| tensor.name == name);
                let at = at.expect("every weight of every graph has been written");
                proto::Location { file: interface::WEIGHTS.into(), offset: at.offset, bytes: at.bytes }
            });
            let weights = graph.parameters.iter().map(|p| graph.value(p.value).name.clone()).collect();
            let record = folder.write(file, &bytes)?;
            records.insert(name.to_string(), GraphRecord { file: file.to_string(), record, ports, weights });
        }
        Ok(WrittenGraphs { records, observed })
    }

    /// Writes what is neither weights nor a graph of the task: settings, tokenizer, the graph that moves cache rows on a device.
    fn write_files(&self, folder: &StagingDir) -> Result<BTreeMap<String, FileRecord>> {
        let mut files = BTreeMap::new();
        let mut write = |name: &str, bytes: &[u8]| -> Result<()> {
            files.insert(name.to_string(), folder.write(name, bytes)?);
            Ok(())
        };
        let export = self.export;
        write("config.json", self.config_text.as_bytes())?;
        if self.options.task.is_generation() && export.target.capabilities().has_device_memory {
            let graph = reorder(&self.config, export.dtype);
            let no_weights = |name: &str| unreachable!("{name}: the graph has no weights");
            write(interface::REORDER, &proto::encode(&graph, export.target.capabilities().opset, no_weights))?;
        }
        if let Some(tokens) = &export.kept_tokens {
            let text = serde_json::to_string(tokens).context("tokens cannot be written as JSON")? + "\n";
            write(KEPT_TOKENS, text.as_bytes())?;
        }
        for (name, bytes) in &self.companions {
            write(name, bytes)?;
        }
        Ok(files)
    }
}
