//! What a model folder or a checkpoint holds, read from its settings, manifest and headers: no weights are read.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use t5gemma_graphs::config::{Config, LayerType, Stack};
use t5gemma_graphs::interface::Port;
use t5gemma_graphs::manifest::{KEPT_TOKENS, MANIFEST, Manifest};
use t5gemma_graphs::onnx::Dim;
use t5gemma_graphs::task::Task;
use t5gemma_graphs::tensors::Role;
use t5gemma_graphs::{Options, definitions};

use crate::checkpoint::Checkpoint;
use crate::found::{self, read_text};
use crate::parameters::plain_options;
use crate::proto;
use crate::reseal::manifest;
use crate::weights;

/// The findings.
#[derive(Debug, Serialize)]
pub struct Report {
    /// `model` or `checkpoint`.
    pub kind: &'static str,
    /// The two stacks in a line each.
    pub encoder: String,
    /// See `encoder`.
    pub decoder: String,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Numbers by part of the model.
    pub parts: BTreeMap<&'static str, u64>,
    /// Tensors by element type.
    pub dtypes: BTreeMap<String, usize>,
    /// Bytes of each file that holds weights.
    pub weights: BTreeMap<String, u64>,
    /// What only an exported model has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelReport>,
}

/// What only an exported model has.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    /// Name and version of the program that wrote it.
    pub exporter: String,
    /// What the model is for.
    pub task: Task,
    /// The lowering of the graphs.
    pub target: String,
    /// Type of weights, activations and caches.
    pub dtype: String,
    /// What it is going to be served with, if that was planned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// The graphs, in the order in which they are run.
    pub graphs: Vec<GraphReport>,
}

/// One graph.
#[derive(Debug, Serialize)]
pub struct GraphReport {
    /// File name.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Version of the file format.
    pub ir_version: i64,
    /// How often each operator is used.
    pub operators: BTreeMap<String, usize>,
    /// What a run is given.
    pub inputs: Vec<Port>,
    /// What a run returns.
    pub outputs: Vec<Port>,
}

/// Looks into an exported model or a checkpoint folder.
///
/// # Errors
/// If the folder is neither, or a file that describes it is malformed.
pub fn inspect(folder: &Path) -> Result<Report> {
    ensure!(
        folder.is_dir(),
        "{}: expected a model folder or a checkpoint, found {}",
        folder.display(),
        if folder.exists() { "a file".to_string() } else { found::absent(folder) }
    );
    let (path, is_model) = (folder.join("config.json"), folder.join(MANIFEST).exists());
    if !is_model && !found::is_there(&path) {
        let near = found::checkpoint_near(folder).map_or_else(String::new, |near| format!(" ({near})"));
        bail!(
            "{}: expected a model folder (with {MANIFEST}) or a checkpoint (with config.json), found neither{near}",
            folder.display()
        );
    }
    let config = Config::parse(&read_text(&path)?).with_context(|| path.display().to_string())?;
    if is_model { model(folder, &config) } else { checkpoint(folder, &config) }
}

fn model(folder: &Path, config: &Config) -> Result<Report> {
    let path = folder.join(MANIFEST);
    let manifest = manifest(folder)?;
    let mut report = Report::of("model", config, numbers(folder, &manifest, config)?.into_iter());
    for tensor in &manifest.weights.tensors {
        let numbers = tensor.shape.iter().try_fold(1_u64, |numbers, &size| numbers.checked_mul(size as u64));
        let place = format!("{}: weights.tensors[{:?}]", path.display(), tensor.name);
        // Two of 4 bits are a byte.
        let is_within = numbers.is_some_and(|numbers| numbers / 2 <= manifest.weights.record.bytes);
        ensure!(is_within, "{place}.shape: more numbers than the file has bytes");
        *report.dtypes.entry(tensor.dtype.to_string()).or_default() += usize::from(tensor.same_bytes_as.is_none());
    }
    report.weights.insert(manifest.weights.file.clone(), manifest.weights.record.bytes);
    let mut graphs = Vec::new();
    for part in ["model", "encoder", "decoder", "decoder_with_past"] {
        let Some(record) = manifest.graphs.get(part) else { continue };
        let plain = Path::new(&record.file).file_name().is_some_and(|name| name == record.file.as_str());
        ensure!(plain, "{}: expected the name of a file in the folder, found {:?}", path.display(), record.file);
        let path = folder.join(&record.file);
        let bytes = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let summary = proto::summary(&bytes).with_context(|| path.display().to_string())?;
        graphs.push(GraphReport {
            file: record.file.clone(),
            bytes: bytes.len() as u64,
            opset: summary.opset,
            ir_version: summary.ir_version,
            operators: summary.operators,
            inputs: record.ports.inputs.clone(),
            outputs: record.ports.outputs.clone(),
        });
    }
    let dtype = manifest.dtype.to_string();
    let Manifest { exporter, task, target, plan, .. } = manifest;
    report.model = Some(ModelReport { exporter, task, target, dtype, plan, graphs });
    Ok(report)
}

/// The tensors of the checkpoint that a model was made of, with the numbers in each: what the file of weights has of them may be
/// packed, filled up and there twice.
fn numbers(folder: &Path, manifest: &Manifest, config: &Config) -> Result<Vec<(String, u64)>> {
    let is_stored = |tensor: &str| manifest.weights.tensors.iter().any(|stored| stored.name.starts_with(tensor));
    let mut vocabulary = weights::exported_vocabulary(config, is_stored);
    if manifest.kept_tokens.is_some() {
        let path = folder.join(KEPT_TOKENS);
        let tokens: Vec<usize> = serde_json::from_str(&read_text(&path)?)
            .with_context(|| format!("{}: expected an array of ids", path.display()))?;
        let vocab_size = config.decoder.vocab_size;
        ensure!(tokens.iter().all(|&id| id < vocab_size), "{}: expected ids below {vocab_size}", path.display());
        vocabulary.kept = Some(tokens.into());
    }
    let options = Options { task: manifest.task.clone(), ..plain_options(vocabulary) };
    let weights = weights::collect(&definitions(config, &options).iter().collect::<Vec<_>>());
    weights::check_size(&weights).with_context(|| folder.join("config.json").display().to_string())?;
    Ok(weights::numbers_of(&weights))
}

fn checkpoint(folder: &Path, config: &Config) -> Result<Report> {
    let checkpoint = Checkpoint::open(folder)?;
    let tensors = checkpoint.names().filter_map(|name| {
        let tensor = checkpoint.tensor(name)?;
        Some((name.to_string(), tensor.shape.iter().product::<usize>() as u64))
    });
    let mut report = Report::of("checkpoint", config, tensors);
    for tensor in checkpoint.names().filter_map(|name| checkpoint.tensor(name)) {
        let dtype = tensor.float().map_or_else(|| format!("{:?}", tensor.dtype), |dtype| dtype.to_string());
        *report.dtypes.entry(dtype).or_default() += 1;
    }
    report.weights = checkpoint.files().map(|(name, bytes)| (name.to_string(), bytes.len() as u64)).collect();
    Ok(report)
}

impl Report {
    fn of(kind: &'static str, config: &Config, tensors: impl Iterator<Item = (String, u64)>) -> Report {
        let mut report = Report {
            kind,
            encoder: described(&config.encoder),
            decoder: described(&config.decoder),
            parameters: 0,
            parts: BTreeMap::new(),
            dtypes: BTreeMap::new(),
            weights: BTreeMap::new(),
            model: None,
        };
        for (name, count) in tensors {
            report.parameters += count;
            *report.parts.entry(part(config, &name)).or_default() += count;
        }
        report
    }
}

fn part(config: &Config, tensor: &str) -> &'static str {
    match (config.family.tensors().role)(tensor) {
        Some(Role::EncoderEmbedding) => "encoder embedding",
        Some(Role::Encoder) => "encoder",
        Some(Role::DecoderEmbedding) => "decoder embedding",
        Some(Role::Decoder | Role::CrossKeyValue) => "decoder",
        Some(Role::Head | Role::Classifier) => "head",
        None => "other",
    }
}

fn described(stack: &Stack) -> String {
    let sliding = stack.layers.iter().filter_map(|layer| match layer {
        LayerType::Sliding(window) => Some(*window),
        LayerType::Full => None,
    });
    let windows: Vec<usize> = sliding.collect();
    let window = match windows.first() {
        None => String::new(),
        Some(window) => format!(", layers with a window of {window}: {}", windows.len()),
    };
    format!(
        "{} layers of width {}, {} heads ({} for keys and values) of {}, {} wide feed-forward, vocabulary {}, at most {} positions{window}",
        stack.layers.len(),
        stack.hidden_size,
        stack.num_attention_heads,
        stack.num_key_value_heads,
        stack.head_dim,
        stack.intermediate_size,
        stack.vocab_size,
        stack.max_position_embeddings
    )
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.kind)?;
        writeln!(f, "  encoder     {}", self.encoder)?;
        writeln!(f, "  decoder     {}", self.decoder)?;
        writeln!(f, "  parameters  {}", self.parameters)?;
        for (part, count) in &self.parts {
            writeln!(f, "    {part:<18} {count:>14}")?;
        }
        for (dtype, count) in &self.dtypes {
            writeln!(f, "  {dtype:<11} {count} tensors")?;
        }
        for (file, bytes) in &self.weights {
            writeln!(f, "  {file}  {bytes} bytes")?;
        }
        let Some(model) = &self.model else { return Ok(()) };
        writeln!(f, "  exported by {}, target {}, dtype {}", model.exporter, model.target, model.dtype)?;
        writeln!(f, "  task {}", model.task)?;
        if let Some(plan) = &model.plan {
            writeln!(f, "  plan {plan}")?;
        }
        for graph in &model.graphs {
            let (opset, ir) = (graph.opset, graph.ir_version);
            writeln!(f, "{}  {} bytes, opset {opset}, IR {ir}", graph.file, graph.bytes)?;
            let operators: Vec<String> = graph.operators.iter().map(|(op, count)| format!("{op} {count}")).collect();
            writeln!(f, "  operators  {}", operators.join(", "))?;
            for (direction, ports) in [("in ", &graph.inputs), ("out", &graph.outputs)] {
                for port in ports {
                    writeln!(f, "  {direction}  {:<34} {:<8} {}", port.name, port.dtype, Dim::list(&port.shape))?;
                }
            }
        }
        Ok(())
    }
}
