//! Adapters that are merged into a checkpoint: their files, and which tensors they change.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::adapter::{
    AdapterConfig, AdapterTensors, CONFIG_FILE as CONFIG, ModuleKind, ModuleParts, PICKLE_FILE as PICKLE,
    WEIGHTS_FILE as WEIGHTS, check_modules, modules_of,
};
use t5gemma_graphs::config::{Config, Family};
use t5gemma_graphs::json::cut;
use t5gemma_graphs::manifest::{AdapterRecord, FileRecord};

use super::{Checkpoint, Location, Shard, map_file};
use crate::adapter::{Change, MergedTensor};
use crate::convert::to_float32;
use crate::error::{Error, Result};
use crate::files;

/// An adapter that was opened.
pub(super) struct OpenedAdapter {
    folder: PathBuf,
    scale: f32,
    rank: u64,
    alpha: f64,
    /// Its weights file.
    shard: usize,
    notes: Vec<String>,
}

/// A change of a tensor whose numbers are still in the adapter's file.
#[derive(Clone)]
pub(super) enum StoredChange {
    Matrix { a: Location, b: Location, magnitude: Option<Location>, scale: f32 },
    Embedding { a: Location, b: Location, magnitude: Option<Location>, scale: f32 },
    Bias { values: Location, scale: f32 },
    Rows { indices: Vec<usize>, values: Location },
}

impl Checkpoint {
    /// Merges the PEFT LoRA adapter in `folder`, after those that were merged before. Its products are multiplied with
    /// `scale`, besides the scale of its own; tensors that it replaces as a whole are not. The tensors are computed in
    /// float32 when they are exported.
    ///
    /// The result is what PEFT computes without merging: where only one of a tied embedding and output head is changed,
    /// the other stays as it was, and the model is exported with both.
    ///
    /// # Errors
    /// A file that is missing or malformed, an adapter of another kind or for another base model, or one that replaces
    /// a tensor which an earlier adapter has changed.
    pub fn with_adapter(mut self, folder: &Path, scale: f32) -> Result<Checkpoint> {
        if !folder.is_dir() {
            let found = if folder.exists() { "a file".to_string() } else { files::describe_missing(folder) };
            return Err(Error::invalid(folder.display(), "an adapter folder", found));
        }
        let path = folder.join(CONFIG);
        let (_, fields) = files::read_json_object(&path)?;
        let Value::Object(fields) = fields else { unreachable!("an object was read") };
        let config = AdapterConfig::parse(fields)
            .map_err(|error| Error::invalid(path.display(), error.expected, error.found).of(error.field))?;
        let weights = folder.join(WEIGHTS);
        if !files::entry_exists(&weights) && folder.join(PICKLE).exists() {
            let found = format!("{PICKLE} (a pickle: load the adapter and save it with safe_serialization=True)");
            return Err(Error::invalid(folder.display(), WEIGHTS, found));
        }
        let (bytes, tensors) = map_file(&weights)?;
        let shard = self.shards.len();
        self.shards.push(Shard { name: WEIGHTS.into(), path: weights.clone(), bytes, is_adapter: true });
        let tensors: BTreeMap<String, Location> =
            tensors.into_iter().map(|location| (location.stored.clone(), Location { shard, ..location })).collect();
        if let Some(location) = tensors.values().find(|location| location.float().is_none()) {
            let found = format!("{:?}", location.dtype);
            return Err(Error::invalid(weights.display(), "F32, F16 or BF16", found).of(cut(&location.stored)));
        }
        let model = self.config_path();
        let model_config =
            Config::parse(&self.config_text()?).map_err(|error| Error::config(model.display(), error))?;
        let family = model_config.family;
        let sorted = AdapterTensors::of(tensors.keys().map(String::as_str), family)
            .map_err(|(expected, found)| Error::invalid(weights.display(), expected, found))?;
        let config = config.spelled(&sorted.spelling);
        let notes = self.untie(&sorted, &model_config);
        let mut merging = Merging { checkpoint: &mut self, config: &config, family, weights: &weights, tensors, scale };
        merging.replace(&sorted.replacements)?;
        merging.replace_rows(&sorted.token_rows)?;
        merging.add_products(&sorted.modules)?;

        let (rank, alpha) = config.defaults();
        let mut adapter = OpenedAdapter { folder: folder.to_path_buf(), scale, rank, alpha, shard, notes };
        if !config.ignored.is_empty() {
            adapter.notes.push(format!("{}: ignored fields: {}", path.display(), config.ignored.join(", ")));
        }
        if scale != 1.0 && !(sorted.replacements.is_empty() && sorted.token_rows.is_empty()) {
            let count = sorted.replacements.len() + sorted.token_rows.len();
            adapter
                .notes
                .push(format!("{}: {count} tensors are replaced as a whole, whatever the scale", weights.display()));
        }
        self.adapters.push(adapter);
        Ok(self)
    }

    /// Stores tied embeddings and the output head as tensors of their own if the adapter changes one of them, and so the
    /// vectors of the token behind an image.
    fn untie(&mut self, adapter: &AdapterTensors, config: &Config) -> Vec<String> {
        let tensors = config.family.tensors();
        let touches = |name: &str| {
            let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
            adapter.replacements.contains_key(name)
                || adapter.modules.contains_key(module)
                || adapter.token_rows.contains_key(module)
        };
        let tables = [tensors.encoder_embedding, tensors.decoder_embedding, tensors.head];
        let shared: Vec<&[&str]> = tables.into_iter().filter(|names| names.len() > 1).collect();
        let vectors = tensors.end_of_image.map(|[source, target]| [[source, target], [target, source]]);
        let mut is_untied = false;
        if config.tie_word_embeddings && shared.iter().any(|names| touches(names[0])) {
            for names in shared.into_iter().chain(vectors.iter().flatten().map(|names| &names[..])) {
                let stored = names.iter().find_map(|name| self.tensors.get(*name)).cloned();
                if let Some(stored) = stored
                    && !self.tensors.contains_key(names[0])
                {
                    self.tensors.insert(names[0].to_string(), stored);
                    is_untied = true;
                }
            }
        }
        let mut notes = Vec::new();
        if is_untied {
            notes.push(
                "the adapter changes embeddings or the output head, which are tied in the base model: all are exported, as \
                 PEFT computes them without merging"
                    .to_string(),
            );
        }
        let changes_rows = |name: &&str| {
            let module = name.rsplit_once('.').map_or(*name, |(module, _)| module);
            adapter.modules.contains_key(module) || adapter.token_rows.contains_key(module)
        };
        if tensors.end_of_image.iter().flatten().any(changes_rows) {
            notes.push(
                "the adapter changes rows of an embedding; the vector of the token behind an image stays as it is"
                    .to_string(),
            );
        }
        notes
    }

    /// Whether two tensors are the same, changes included.
    pub(crate) fn is_same(&self, one: &str, other: &str) -> bool {
        let is_changed = |name: &str| self.changes.contains_key(name);
        match (self.tensor(one), self.tensor(other)) {
            (Some(a), Some(b)) => a.dtype == b.dtype && a.bytes == b.bytes && !is_changed(one) && !is_changed(other),
            _ => false,
        }
    }

    /// A tensor with its changes, if an adapter changes it.
    pub(crate) fn merged(&self, name: &str) -> Option<MergedTensor<'_>> {
        let (changes, tensor) = (self.changes.get(name)?, self.tensor(name)?);
        let numbers = |location: &Location| {
            let mut numbers = vec![0.0; location.shape.iter().product()];
            let dtype = location.float().expect("adapters have floats only");
            to_float32(self.bytes_of(location), dtype, &mut numbers);
            numbers
        };
        let changes = changes.iter().map(|change| match change {
            StoredChange::Matrix { a, b, magnitude, scale } => Change::Matrix {
                a: numbers(a),
                b: numbers(b),
                scale: *scale,
                magnitude: magnitude.as_ref().map(numbers),
            },
            StoredChange::Embedding { a, b, magnitude, scale } => Change::Embedding {
                a: numbers(a),
                b: numbers(b),
                scale: *scale,
                magnitude: magnitude.as_ref().map(numbers),
            },
            StoredChange::Bias { values, scale } => Change::Bias { values: numbers(values), scale: *scale },
            StoredChange::Rows { indices, values } => {
                let values = numbers(values);
                let rows = values.chunks(values.len() / indices.len()).map(<[f32]>::to_vec);
                Change::Rows { rows: indices.iter().copied().zip(rows).collect() }
            }
        });
        Some(MergedTensor::new(tensor.float()?, tensor.bytes, tensor.shape, changes.collect()))
    }

    /// The merged adapters, for the manifest.
    pub(crate) fn adapter_records(&self) -> Vec<AdapterRecord> {
        let record = |adapter: &OpenedAdapter| {
            let bytes = &self.shards[adapter.shard].bytes;
            AdapterRecord {
                name: adapter.folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
                scale: adapter.scale,
                r: adapter.rank,
                lora_alpha: adapter.alpha,
                record: FileRecord { bytes: bytes.len() as u64, sha256: hex::encode(Sha256::digest(bytes)) },
            }
        };
        self.adapters.iter().map(record).collect()
    }

    /// Remarks on the merged adapters.
    pub(super) fn adapter_notes(&self) -> impl Iterator<Item = String> {
        self.adapters.iter().flat_map(|adapter| adapter.notes.iter().cloned())
    }

    /// Whether the adapter in a folder is merged.
    pub(super) fn merges(&self, folder: &Path) -> bool {
        self.adapters.iter().any(|adapter| adapter.folder == folder)
    }
}

/// An adapter on its way into a checkpoint.
struct Merging<'m> {
    checkpoint: &'m mut Checkpoint,
    config: &'m AdapterConfig,
    family: Family,
    weights: &'m Path,
    /// By their names in the file.
    tensors: BTreeMap<String, Location>,
    scale: f32,
}

impl Merging<'_> {
    fn invalid(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::invalid(self.weights.display(), expected, found).of(cut(name))
    }

    /// The shape of a tensor of the base model. None for tensors that this checkpoint lacks with its whole decoder, or
    /// with its whole vision tower.
    fn base_shape(&self, base: &str, stored: &str) -> Result<Option<Vec<usize>>> {
        if let Some(location) = self.checkpoint.tensors.get(base) {
            return Ok(Some(location.shape.clone()));
        }
        let is_of_decoder = |name: &str| !name.starts_with("model.encoder.");
        let has_decoder = self.checkpoint.names().any(|name| name.starts_with("model.decoder."));
        let is_of_vision = |name: &str| self.family.tensors().vision.iter().any(|start| name.starts_with(start));
        let has_vision = self.checkpoint.names().any(is_of_vision);
        let is_left_out = is_of_decoder(base) && !has_decoder || is_of_vision(base) && !has_vision;
        if self.checkpoint.absent.contains_key(base) || is_left_out {
            return Ok(None);
        }
        let found = format!("no {} in {}", cut(base), self.checkpoint.path.display());
        Err(self.invalid(stored, "an adapter of this base model", found))
    }

    fn location(&self, name: &str, shape: &[usize]) -> Result<Location> {
        let location = self.tensors.get(name).expect("names come from this file");
        if location.shape == shape {
            return Ok(location.clone());
        }
        Err(self.invalid(name, format!("shape {shape:?}, as in the base model"), format!("{:?}", location.shape)))
    }

    fn add(&mut self, base: &str, change: StoredChange) {
        self.checkpoint.changes.entry(base.to_string()).or_default().push(change);
    }

    fn replace(&mut self, replacements: &BTreeMap<String, String>) -> Result<()> {
        for (base, stored) in replacements {
            let Some(shape) = self.base_shape(base, stored)? else { continue };
            let location = self.location(stored, &shape)?;
            let is_of_adapter = self.checkpoint.shards[self.checkpoint.tensors[base].shard].is_adapter;
            if is_of_adapter || self.checkpoint.changes.contains_key(base) {
                let found = "another adapter that changes it".to_string();
                return Err(self.invalid(stored, format!("one adapter that replaces {base}"), found));
            }
            self.checkpoint.tensors.insert(base.clone(), location);
        }
        Ok(())
    }

    fn replace_rows(&mut self, token_rows: &BTreeMap<String, String>) -> Result<()> {
        for (module, stored) in token_rows {
            let base = format!("{module}.weight");
            let Some(shape) = self.base_shape(&base, stored)? else { continue };
            let Some(indices) = self.config.token_rows_of(module).map(<[usize]>::to_vec) else {
                let expected = format!("trainable_token_indices for {module} in {CONFIG}");
                return Err(self.invalid(stored, expected, "none"));
            };
            if let Some(index) = indices.iter().find(|&&index| index >= shape[0]) {
                return Err(self.invalid(stored, format!("token ids below {}", shape[0]), index.to_string()));
            }
            let values = self.location(stored, &[indices.len(), shape[1]])?;
            if !indices.is_empty() {
                self.add(&base, StoredChange::Rows { indices, values });
            }
        }
        Ok(())
    }

    fn add_products(&mut self, modules: &BTreeMap<String, ModuleParts>) -> Result<()> {
        let names = self.checkpoint.names().chain(self.checkpoint.absent.keys().map(String::as_str));
        let all = modules_of(names, self.family);
        let mut found = BTreeSet::new();
        for (module, parts) in modules {
            let base = format!("{module}.weight");
            let any = parts.a.as_ref().or(parts.b.as_ref()).or(parts.magnitude.as_ref()).or(parts.bias.as_ref());
            let any = any.expect("a module has a part");
            let Some(shape) = self.base_shape(&base, any)? else {
                if all.contains_key(module) {
                    found.insert(module.clone());
                }
                continue;
            };
            found.insert(module.clone());
            self.add_product(module, parts, &shape, all.get(module).copied())?;
        }
        let expected = self.config.modules(&all);
        check_modules(&expected, &found)
            .map_err(|(expected, found)| Error::invalid(self.weights.display(), expected, found))
    }

    fn add_product(
        &mut self,
        module: &str,
        parts: &ModuleParts,
        shape: &[usize],
        kind: Option<ModuleKind>,
    ) -> Result<()> {
        let (Some(a), Some(b)) = (&parts.a, &parts.b) else {
            let missing = if parts.a.is_none() { "lora_A" } else { "lora_B" };
            return Err(self.invalid(module, "lora_A and lora_B", format!("no {missing}")));
        };
        let &[rows, width] = shape else {
            return Err(self.invalid(module, "a module with a matrix", format!("shape {shape:?}")));
        };
        if parts.is_embedding != (kind == Some(ModuleKind::Embedding)) {
            let expected = if parts.is_embedding { "an embedding" } else { "a linear module" };
            return Err(self.invalid(a, expected, module));
        }
        let rank = self.config.rank_of(module) as usize;
        let found = self.tensors[a].shape.first().copied().unwrap_or(0);
        if found != rank {
            return Err(self.invalid(a, format!("rank {rank}, as {CONFIG} says"), found.to_string()));
        }
        let (input, output) = if parts.is_embedding { (rows, width) } else { (width, rows) };
        let (a, b) = (self.location(a, &[rank, input])?, self.location(b, &[output, rank])?);
        let magnitude = match &parts.magnitude {
            Some(name) => Some(self.location(name, &[output])?),
            None => None,
        };
        if magnitude.is_some() != self.config.use_dora {
            let expected = if self.config.use_dora { "a lora_magnitude_vector" } else { "none without use_dora" };
            let found = if magnitude.is_some() { "a lora_magnitude_vector" } else { "none" };
            return Err(self.invalid(module, expected, found));
        }
        if parts.bias.is_some() != (self.config.lora_bias && !parts.is_embedding) {
            let expected = if self.config.lora_bias { "a lora_B.bias" } else { "none without lora_bias" };
            let found = if parts.bias.is_some() { "a lora_B.bias" } else { "none" };
            return Err(self.invalid(module, expected, found));
        }
        let scale = (self.config.scale_of(module) * f64::from(self.scale)) as f32;
        if let Some(name) = &parts.bias {
            let base = format!("{module}.bias");
            if !self.checkpoint.tensors.contains_key(&base) {
                return Err(self.invalid(name, format!("a base model with {base}"), "none"));
            }
            let values = self.location(name, &[output])?;
            self.add(&base, StoredChange::Bias { values, scale });
        }
        let change = if parts.is_embedding {
            StoredChange::Embedding { a, b, magnitude, scale }
        } else {
            StoredChange::Matrix { a, b, magnitude, scale }
        };
        self.add(&format!("{module}.weight"), change);
        Ok(())
    }
}
