//! `Folder`: a model folder, checked against its manifest before ONNX Runtime reads a byte, so that a truncated copy or
//! a mix of two exports is an error about files, not a wrong result.

mod custom;

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};
use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::config::Config;
use t5gemma_graphs::images::ImageSettings;
use t5gemma_graphs::interface::{Dim, GraphSpec, Port};
use t5gemma_graphs::manifest::{
    DOCUMENTS, FileRecord, GraphRecord, KEPT_TOKENS, MANIFEST, Manifest, ManifestError, SAMPLE_BLOCK, TensorRecord,
    sample_offsets,
};
use t5gemma_graphs::task::{Features, Task};

use crate::batch::{Batch, reads_no_images};
use crate::error::Error;
use crate::limits::Limits;
use crate::profiles::{self, Profiles};
use crate::tokenizer;
use crate::vocabulary_subset::VocabularySubset;
pub(crate) use custom::no_progress_total;

/// The model's generation options: the one file with an effect that may differ from its hash.
const GENERATION_CONFIG: &str = "generation_config.json";

/// Weights files up to this size are hashed completely on every opening; of larger ones, only samples by default.
const HASHED_IN_FULL: u64 = 64 << 20;

/// How the weights file is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightsAccess {
    /// Whether the whole file is hashed, however large, instead of samples of it.
    pub hash_all: bool,
    /// Whether the file is read into memory instead of mapped.
    pub read: bool,
}

/// A checked model folder.
pub(crate) struct Folder {
    /// The folder.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// The text of its `generation_config.json`, or the generation options of its configuration; `None` if it has
    /// neither.
    pub generation_config: Option<String>,
    /// Accepted differences from the export, as sentences.
    pub warnings: Vec<String>,
    /// The tokens that the decoder graphs compute logits for; `None` for all.
    pub vocabulary_subset: Option<Arc<VocabularySubset>>,
    /// The sizes of its serving plan, if it has one.
    pub profiles: Option<Profiles>,
    /// The weights file, in memory once for all graphs.
    pub weights: Mmap,
}

impl Folder {
    /// Reads and checks a model folder.
    pub fn open(path: &Path, access: WeightsAccess) -> Result<Folder, Error> {
        let manifest = read_manifest(path)?;
        let weights = &manifest.weights;

        for (file, record) in manifest.graphs.values().map(|graph| (&graph.file, &graph.record)).chain(&manifest.files)
        {
            if file != GENERATION_CONFIG && !DOCUMENTS.contains(&file.as_str()) {
                check_file(path, file, record)?;
            }
        }

        let map = weights_bytes(path, &weights.file, &weights.record, access)?;
        let in_full = access.hash_all || weights.record.bytes <= HASHED_IN_FULL;
        let (field, expected, found) = if in_full {
            ("sha256", &weights.record.sha256, hex::encode(Sha256::digest(&map)))
        } else {
            ("sample_sha256", &weights.sample_sha256, sampled(&map))
        };
        if *expected != found {
            return Err(mismatch(path.join(&weights.file), field, expected, found));
        }
        check_tensors(&path.join(MANIFEST), &manifest)?;

        if !manifest.files.contains_key("config.json") {
            return Err(mismatch(path.join(MANIFEST), "files", "config.json", "no such entry"));
        }
        check_task(&path.join(MANIFEST), &manifest)?;
        check_images(&path.join(MANIFEST), &manifest)?;
        check_ports(&path.join(MANIFEST), &manifest)?;
        let mut warnings = Vec::new();
        let generation_config = generation_config(path, &manifest, &mut warnings)?;
        let generation_config = generation_config.or_else(|| {
            let facts = &manifest.facts;
            let mut of_config = facts.generation.clone();
            // A generation_config.json without end tokens means that there are none, whereas config.json has its own.
            if !of_config.is_empty() && !facts.tokens.eos.is_empty() {
                of_config.entry("eos_token_id").or_insert_with(|| facts.tokens.eos.clone().into());
            }
            (!of_config.is_empty()).then(|| Value::Object(of_config).to_string())
        });
        let vocabulary_subset = vocabulary_subset(path, &manifest)?.map(Arc::new);
        let profiles = Profiles::read(path, &manifest)?;
        let path = path.to_path_buf();
        Ok(Folder { path, manifest, generation_config, warnings, vocabulary_subset, profiles, weights: map })
    }

    /// What the graph returns for a source, if it is an encoder.
    pub fn features(&self) -> Option<&Features> {
        match &self.manifest.task {
            Task::FeatureExtraction(features) => Some(features),
            _ => None,
        }
    }

    /// The number of outputs with hidden states of earlier layers, beside the first output.
    pub fn hidden_states(&self) -> usize {
        let returns_all = self.features().is_some_and(|features| features.output_hidden_states);
        if returns_all { self.manifest.facts.encoder.num_hidden_layers } else { 0 }
    }

    /// Checks a batch against the model: see [`Batch::check`], a fixed length of sources, and the sizes of the serving
    /// plan.
    pub fn check(&self, batch: &Batch) -> Result<(), Error> {
        self.check_source_inputs()?;
        let Manifest { family, task, .. } = &self.manifest;
        let is_decoder_alone = family.sees_target_beside_source() && task.is_generation();
        if is_decoder_alone {
            batch.check_given()?;
        } else if self.features().is_none_or(|features| features.padding_rows.is_unspecified()) {
            batch.check_visible()?;
        }
        batch.check(&self.manifest.facts)?;
        if let Some(length) = self.features().and_then(|features| features.fixed_length)
            && batch.length() > length
        {
            let expected = format!("at most {length} tokens a row (exported with fixed_length {length})");
            return Err(Error::input("input_ids", expected, format!("{} tokens", batch.length())));
        }
        self.profiles.as_ref().map_or(Ok(()), |profiles| profiles.check_source(batch.length()))
    }

    /// How images become pixel values and tokens.
    ///
    /// # Errors
    /// A model that reads no images.
    pub fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.manifest.images.as_ref().ok_or_else(reads_no_images)
    }

    /// A batch, or a piece of one, padded with rows and tokens to the minimum sizes of the serving plan.
    pub fn fit<'b>(&self, batch: &'b Batch) -> Cow<'b, Batch> {
        profiles::fit(self.profiles.as_ref(), batch, self.manifest.facts.tokens.pad.unwrap_or(0))
    }

    /// The limits of a call, within those of the serving plan.
    pub fn limits(&self, limits: Limits) -> Limits {
        let planned = self.profiles.as_ref().map_or(usize::MAX, |profiles| profiles.batch.max);
        Limits { max_sources: limits.max_sources.min(planned), ..limits }
    }

    /// The bytes of one tensor.
    pub fn tensor(&self, tensor: &TensorRecord) -> &[u8] {
        &self.weights[tensor.offset as usize..][..tensor.bytes as usize]
    }

    /// A graph by its name; opening has found all graphs of the task.
    pub fn graph(&self, name: &str) -> &GraphRecord {
        &self.manifest.graphs[name]
    }
}

/// The task that the model in a folder was exported for. Reads the manifest only.
///
/// # Errors
/// A missing or unusable manifest.
pub fn task_of(folder: impl AsRef<Path>) -> Result<Task, Error> {
    Ok(read_manifest(folder.as_ref())?.task)
}

/// The error of using a model for a task that it was not exported for.
pub(crate) fn other_task(folder: &Path, found: &Task, expected: &str) -> Error {
    let path: PathBuf = folder.join(MANIFEST);
    let name = expected.split([' ', ',']).next().unwrap_or(expected);
    let expected = format!("{expected} (export the checkpoint for the task {name})");
    Error::Folder { path, field: "task".into(), expected, found: found.name().into() }
}

fn mismatch(path: PathBuf, field: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
    Error::Folder { path, field: field.into(), expected: expected.into(), found: found.into() }
}

fn read_text(path: &Path) -> Result<String, Error> {
    tokenizer::read_text(path).map_err(|problem| Error::File { path: path.to_path_buf(), problem })
}

fn read_manifest(folder: &Path) -> Result<Manifest, Error> {
    let path = folder.join(MANIFEST);
    if !path.exists() {
        let is_checkpoint =
            ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| folder.join(name).exists());
        let problem = if is_checkpoint {
            let folder = folder.display();
            format!("no such file: {folder} is a checkpoint; export it with `t5gemma-export {folder} MODEL`")
        } else {
            "no such file: not a model folder; export a checkpoint with t5gemma-export to get one".into()
        };
        return Err(Error::File { path, problem });
    }
    let document: Value = serde_json::from_str(&read_text(&path)?)
        .map_err(|error| Error::File { path: path.clone(), problem: format!("not JSON: {error}") })?;
    let config = || {
        let path = folder.join("config.json");
        Config::parse(&read_text(&path)?).map_err(|error| Error::Config { path, error })
    };
    Manifest::read(document, config).map_err(|error| match error {
        ManifestError::Field(error) => mismatch(path, &error.field, error.expected, error.found),
        ManifestError::Malformed(error) => Error::File { path, problem: error.to_string() },
        ManifestError::Config(error) => error,
    })
}

/// The text of `generation_config.json`, which users may edit or add after the export.
fn generation_config(folder: &Path, manifest: &Manifest, warnings: &mut Vec<String>) -> Result<Option<String>, Error> {
    let path = folder.join(GENERATION_CONFIG);
    let record = manifest.files.get(GENERATION_CONFIG);
    if record.is_none() && !path.exists() {
        return Ok(None);
    }
    let text = read_text(&path)?;
    let is_same = |record: &FileRecord| hex::encode(Sha256::digest(&text)) == record.sha256;
    match record {
        None => warnings.push(format!("{GENERATION_CONFIG} was added since export")),
        Some(record) if !is_same(record) => warnings.push(format!("{GENERATION_CONFIG} was changed since export")),
        Some(_) => {}
    }
    Ok(Some(text))
}

/// The vocabulary subset of a model that was exported with one.
fn vocabulary_subset(folder: &Path, manifest: &Manifest) -> Result<Option<VocabularySubset>, Error> {
    let Some(count) = manifest.kept_tokens else { return Ok(None) };
    let vocab_size = manifest.facts.decoder.vocab_size as i64;
    let path = folder.join(KEPT_TOKENS);
    if !manifest.files.contains_key(KEPT_TOKENS) {
        return Err(mismatch(folder.join(MANIFEST), "files", KEPT_TOKENS, "no such entry"));
    }
    let tokens: Vec<i64> = serde_json::from_str(&read_text(&path)?)
        .map_err(|error| Error::File { path: path.clone(), problem: format!("expected an array of ids: {error}") })?;
    let is_within = tokens.iter().all(|token| (0..vocab_size).contains(token));
    if tokens.len() != count || !is_within || !tokens.windows(2).all(|pair| pair[0] < pair[1]) {
        let expected = format!("{count} token ids below {vocab_size} in ascending order");
        return Err(mismatch(path, "tokens", expected, format!("{} ids, out of range or out of order", tokens.len())));
    }
    Ok(Some(VocabularySubset::new(tokens)))
}

/// The path of a file named by the manifest, which must be directly in the folder.
fn file_in(folder: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = folder.join(name);
    match path.file_name() {
        Some(file) if file == name && path.parent() == Some(folder) => Ok(path),
        _ => Err(mismatch(folder.join(MANIFEST), "file", "the name of a file in the folder", format!("{name:?}"))),
    }
}

/// Opens a file and checks its size.
fn open_sized(folder: &Path, name: &str, record: &FileRecord) -> Result<(PathBuf, File), Error> {
    let path = file_in(folder, name)?;
    let file = File::open(&path).map_err(Error::reading(&path))?;
    let bytes = file.metadata().map_err(Error::reading(&path))?.len();
    if bytes == record.bytes {
        Ok((path, file))
    } else {
        Err(mismatch(path, "size", format!("{} bytes", record.bytes), format!("{bytes} bytes")))
    }
}

fn check_file(folder: &Path, name: &str, record: &FileRecord) -> Result<(), Error> {
    let (path, mut file) = open_sized(folder, name, record)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 16];
    loop {
        match file.read(&mut block).map_err(Error::reading(&path))? {
            0 => break,
            read => hash.update(&block[..read]),
        }
    }
    let found = hex::encode(hash.finalize());
    if found == record.sha256 { Ok(()) } else { Err(mismatch(path, "sha256", &record.sha256, found)) }
}

fn weights_bytes(folder: &Path, name: &str, record: &FileRecord, access: WeightsAccess) -> Result<Mmap, Error> {
    let (path, mut file) = open_sized(folder, name, record)?;
    if access.read {
        let bytes = usize::try_from(record.bytes)
            .map_err(|error| Error::File { path: path.clone(), problem: error.to_string() })?;
        // Anonymous pages are aligned like those of a mapped file.
        let mut memory = MmapMut::map_anon(bytes).map_err(Error::reading(&path))?;
        file.read_exact(&mut memory).map_err(Error::reading(&path))?;
        return memory.make_read_only().map_err(Error::reading(&path));
    }
    // SAFETY: the map is read-only, and is read only as numbers, for which every bit pattern is valid. That nobody
    // truncates the file while the model is open is required of the file system, as for any mapped library;
    // `OpenOptions::read_weights` does without.
    unsafe { Mmap::map(&file) }.map_err(Error::reading(&path))
}

/// The hash that `WeightsRecord::sample_sha256` documents.
fn sampled(bytes: &[u8]) -> String {
    let mut hash = Sha256::new();
    for offset in sample_offsets(bytes.len() as u64) {
        let rest = &bytes[offset as usize..];
        hash.update(&rest[..rest.len().min(SAMPLE_BLOCK as usize)]);
    }
    hex::encode(hash.finalize())
}

/// Checks that the model has what its task needs.
fn check_task(manifest_path: &Path, manifest: &Manifest) -> Result<(), Error> {
    let (task, facts) = (&manifest.task, &manifest.facts);
    match task {
        Task::TextClassification | Task::TokenClassification if facts.classifier.is_none() => {
            let expected = format!("the labels of a model for {}", task.name());
            Err(mismatch(manifest_path.to_path_buf(), "facts.classifier", expected, "none"))
        }
        Task::FeatureExtraction(features)
            if features.hidden_layer < 0 || features.layers(facts.encoder.num_hidden_layers).is_none() =>
        {
            let (expected, found) =
                (format!("0 to {}", facts.encoder.num_hidden_layers), features.hidden_layer.to_string());
            Err(mismatch(manifest_path.to_path_buf(), "task.hidden_layer", expected, found))
        }
        _ => Ok(()),
    }
}

/// Checks that images are prepared as the vision tower takes them.
fn check_images(manifest_path: &Path, manifest: &Manifest) -> Result<(), Error> {
    let wrong = |field: &str, expected: String, found: String| {
        Err(mismatch(manifest_path.to_path_buf(), &format!("images{field}"), expected, found))
    };
    let (images, vision) = match (&manifest.images, &manifest.facts.vision) {
        (Some(images), Some(vision)) => (images, vision),
        (None, None) => return Ok(()),
        (None, Some(_)) => return wrong("", "settings, as the model reads images".into(), "none".into()),
        (Some(_), None) => return wrong("", "none, as the model reads no images".into(), "settings".into()),
    };
    images.check().or_else(|error| wrong(&format!(".{}", error.field), error.expected, error.found))?;
    for (field, found, of_tower) in [
        (".image_size", images.image_size, vision.image_size),
        (".tokens_per_image", images.tokens_per_image, vision.tokens_per_image),
    ] {
        if found != of_tower {
            return wrong(field, format!("{of_tower}, as the vision tower has"), found.to_string());
        }
    }
    if images.image_token_id != vision.image_token {
        return wrong(".image_token_id", vision.image_token.to_string(), images.image_token_id.to_string());
    }
    Ok(())
}

/// Checks that the manifest records the inputs and outputs that its facts imply.
fn check_ports(manifest_path: &Path, manifest: &Manifest) -> Result<(), Error> {
    for GraphSpec { name: graph, ports: expected, .. } in manifest.graph_specs() {
        let Some(GraphRecord { ports: found, .. }) = manifest.graphs.get(graph) else {
            return Err(mismatch(manifest_path.to_path_buf(), "graphs", graph, "no such graph"));
        };
        for (side, expected, found) in
            [("inputs", &expected.inputs, &found.inputs), ("outputs", &expected.outputs, &found.outputs)]
        {
            let (expected, found) = (|at: usize| expected.get(at), |at: usize| found.get(at));
            let mut places = (0..).take_while(|&at| expected(at).is_some() || found(at).is_some());
            if let Some(at) = places.find(|&at| expected(at) != found(at)) {
                let described = |port: &Port| format!("{} {} {}", port.name, port.dtype, Dim::list(&port.shape));
                let shown = |port: Option<&Port>| port.map_or("none".into(), described);
                let field = format!("graphs.{graph}.{side}[{at}]");
                return Err(mismatch(manifest_path.to_path_buf(), &field, shown(expected(at)), shown(found(at))));
            }
        }
    }
    Ok(())
}

/// Checks that every tensor is within the file, has the size of its shape and comes after the one before it, and that
/// graphs name existing tensors.
fn check_tensors(manifest_path: &Path, manifest: &Manifest) -> Result<(), Error> {
    let wrong = |field: String, expected: String, found: String| {
        Err(Error::Folder { path: manifest_path.to_path_buf(), field, expected, found })
    };
    let mut names = HashSet::new();
    let mut previous_end = 0;
    for tensor in &manifest.weights.tensors {
        let field = |part: &str| format!("weights.tensors[{:?}].{part}", tensor.name);
        if !names.insert(tensor.name.as_str()) {
            return wrong(field("name"), "a unique name".into(), "a repeated one".into());
        }
        let elements = tensor.shape.iter().try_fold(1_usize, |elements, &dim| elements.checked_mul(dim));
        if elements.and_then(|elements| tensor.dtype.bytes(elements)).map(|bytes| bytes as u64) != Some(tensor.bytes) {
            let expected = format!("the size of {} {:?}", tensor.dtype, tensor.shape);
            return wrong(field("bytes"), expected, tensor.bytes.to_string());
        }
        if !tensor.offset.is_multiple_of(4096) {
            return wrong(field("offset"), "a multiple of 4096".into(), tensor.offset.to_string());
        }
        let end = tensor.offset.checked_add(tensor.bytes);
        if end.is_none_or(|end| end > manifest.weights.record.bytes) {
            let expected = format!("a tensor within the file's {} bytes", manifest.weights.record.bytes);
            return wrong(field("offset"), expected, format!("{} + {} bytes", tensor.offset, tensor.bytes));
        }
        if let Some(other) = &tensor.same_bytes_as {
            let same = manifest.weights.tensors.iter().find(|earlier| earlier.name == *other);
            if same.map(|same| (same.offset, same.bytes)) != Some((tensor.offset, tensor.bytes)) {
                return wrong(field("same_bytes_as"), "a tensor at the same offset".into(), format!("{other:?}"));
            }
            continue;
        }
        if tensor.offset < previous_end {
            let expected = format!("at least {previous_end}, the end of the tensor before it");
            return wrong(field("offset"), expected, tensor.offset.to_string());
        }
        previous_end = tensor.offset + tensor.bytes;
    }
    for (name, graph) in &manifest.graphs {
        let mut used = HashSet::new();
        for weight in &graph.weights {
            if !names.contains(weight.as_str()) || !used.insert(weight) {
                let expected = "names of weights.tensors, once each".to_string();
                return wrong(format!("graphs.{name}.weights"), expected, format!("{weight:?}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use t5gemma_graphs::config::Family;
    use t5gemma_graphs::interface::{CacheLayout, DType, Logits, Ports};
    use t5gemma_graphs::manifest::{EncoderWindow, FORMAT, FORMAT_VERSION, Source, WeightsRecord};
    use t5gemma_graphs::quantization::Quantization;
    use t5gemma_graphs::tensors::Role;

    use super::*;

    fn record(bytes: u64) -> FileRecord {
        FileRecord { bytes, sha256: String::new() }
    }

    fn manifest() -> Manifest {
        let tensor = |name: &str, offset| TensorRecord {
            name: name.into(),
            role: Role::Encoder,
            dtype: DType::Float32,
            shape: vec![2, 3],
            offset,
            bytes: 24,
            same_bytes_as: None,
        };
        let graph = GraphRecord {
            file: "encoder_model.onnx".into(),
            record: record(1),
            ports: Ports { inputs: Vec::new(), outputs: Vec::new() },
            weights: vec!["a".into(), "b".into()],
        };
        Manifest {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            exporter: String::new(),
            family: Family::T5Gemma,
            task: Task::default(),
            target: String::new(),
            dtype: DType::Float32,
            opset: 21,
            encoder_window: EncoderWindow::Inclusive,
            side_by_side: false,
            logits: Logits::Last,
            kept_tokens: None,
            alignment_layers: Vec::new(),
            cache: CacheLayout::Growing,
            plan: None,
            quantization: Quantization::default(),
            observed: BTreeMap::new(),
            parameters: 12,
            facts: Config::parse(r#"{"encoder": {}, "decoder": {}}"#).expect("a minimal config").facts(),
            images: None,
            source: Source::Dummy { seed: 0 },
            adapters: Vec::new(),
            lora_inputs: None,
            graphs: BTreeMap::from([("encoder".to_string(), graph)]),
            weights: WeightsRecord {
                file: "model.onnx_data".into(),
                record: record(4120),
                sample_sha256: String::new(),
                tensors: vec![tensor("a", 0), tensor("b", 4096)],
            },
            files: BTreeMap::new(),
        }
    }

    #[test]
    fn tensors_are_checked_against_the_file() {
        type Change = fn(&mut Manifest);
        let cases: [(&str, Change); 9] = [
            ("weights.tensors[\"b\"].same_bytes_as", |manifest| {
                manifest.weights.tensors[1].same_bytes_as = Some("a".into());
            }),
            ("weights.tensors[\"a\"].name", |manifest| manifest.weights.tensors[1].name = "a".into()),
            ("weights.tensors[\"b\"].offset", |manifest| manifest.weights.tensors[1].offset = 8192),
            ("weights.tensors[\"b\"].offset", |manifest| manifest.weights.tensors[1].offset = u64::MAX - 4095),
            ("weights.tensors[\"b\"].offset", |manifest| manifest.weights.tensors[1].offset = 100),
            ("weights.tensors[\"b\"].offset", |manifest| manifest.weights.tensors[1].offset = 0),
            ("weights.tensors[\"a\"].bytes", |manifest| manifest.weights.tensors[0].bytes = 25),
            ("weights.tensors[\"a\"].bytes", |manifest| manifest.weights.tensors[0].shape = vec![usize::MAX, 2]),
            ("graphs.encoder.weights", |manifest| manifest.weights.tensors[0].name = "c".into()),
        ];
        check_tensors(Path::new(MANIFEST), &manifest()).expect("the unchanged manifest is sound");
        for (field, change) in cases {
            let mut manifest = manifest();
            change(&mut manifest);
            let error = check_tensors(Path::new(MANIFEST), &manifest).expect_err(field);
            assert!(error.to_string().contains(&format!("{field}: expected")), "{error}");
        }
    }

    #[test]
    fn a_manifest_names_files_of_its_own_folder() {
        let folder = Path::new("folder");
        assert_eq!(file_in(folder, "a.onnx").expect("a plain name"), Path::new("folder/a.onnx"));
        for name in ["", ".", "..", "../a.onnx", "/etc/passwd", "sub/a.onnx", "a.onnx/"] {
            assert!(file_in(folder, name).is_err(), "{name:?}");
        }
    }
}
