//! Summarizes a model folder or a checkpoint from its configuration, manifest and headers, without reading weights.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use serde::Serialize;
use t5gemma_graphs::config::{Config, LayerType, Stack};
use t5gemma_graphs::interface::{LoraModule, Port};
use t5gemma_graphs::manifest::{KEPT_TOKENS, MANIFEST, Manifest};
use t5gemma_graphs::onnx::Dim;
use t5gemma_graphs::task::Task;
use t5gemma_graphs::tensors::Role;
use t5gemma_graphs::{Options, definitions};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::files;
use crate::model_folder::{path_of, read_manifest};
use crate::parameters::plain_options;
use crate::proto;
use crate::weights;

/// The contents of a model folder or checkpoint.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct InspectReport {
    /// `model` or `checkpoint`.
    pub kind: &'static str,
    /// The sizes of the encoder in one line.
    pub encoder: String,
    /// The sizes of the decoder in one line.
    pub decoder: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Number of parameters by part of the model.
    pub parts: BTreeMap<&'static str, u64>,
    /// Number of tensors by element type.
    pub dtypes: BTreeMap<String, usize>,
    /// Size in bytes of each weights file.
    pub weights: BTreeMap<String, u64>,
    /// The differences from T5Gemma's own interface, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interface: Vec<String>,
    /// Fast operators that graphs of such an interface do without, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_aside: Vec<String>,
    /// The exported model; `None` for a checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelReport>,
}

/// The part that only exported models have.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ModelReport {
    /// Name and version of the exporter.
    pub exporter: String,
    /// What the model is for.
    pub task: Task,
    /// The runtime that the graphs are written for.
    pub target: String,
    /// Type of weights, activations and caches.
    pub dtype: String,
    /// The serving plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// The graphs, in the order in which they run.
    pub graphs: Vec<GraphReport>,
}

/// A graph of an exported model.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct GraphReport {
    /// File name.
    pub file: String,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Version of ONNX's intermediate representation.
    pub ir_version: i64,
    /// Number of nodes by operator.
    pub operators: BTreeMap<String, usize>,
    /// Inputs.
    pub inputs: Vec<Port>,
    /// Outputs.
    pub outputs: Vec<Port>,
}

/// Summarizes an exported model or a checkpoint folder.
///
/// # Errors
/// If the folder is neither, or a file that describes it is malformed.
pub fn inspect(folder: &Path) -> Result<InspectReport> {
    if !folder.is_dir() {
        let found = if folder.exists() { "a file".to_string() } else { files::describe_missing(folder) };
        return Err(Error::invalid(folder.display(), "a model folder or a checkpoint", found));
    }
    let (path, is_model) = (folder.join("config.json"), folder.join(MANIFEST).exists());
    if !is_model && !files::entry_exists(&path) {
        let hint = files::nearby_checkpoint(folder).map_or_else(String::new, |hint| format!(" ({hint})"));
        let expected = format!("a model folder (with {MANIFEST}) or a checkpoint (with config.json)");
        return Err(Error::invalid(folder.display(), expected, format!("neither{hint}")));
    }
    let text = files::read_text(&path)?;
    let mut config = Config::parse(&text).map_err(|error| Error::config(path.display(), error))?;
    if is_model { model(folder, &mut config) } else { checkpoint(folder, &config) }
}

fn model(folder: &Path, config: &mut Config) -> Result<InspectReport> {
    let manifest = read_manifest(folder)?;
    // What export options said of the interface is not in the configuration.
    config.custom = manifest.facts.custom.clone();
    config.decoder.vocab_size = manifest.facts.decoder.vocab_size;
    config.decoder.final_logit_softcapping = manifest.facts.final_logit_softcapping;
    let mut report = InspectReport::new("model", config, parameters(folder, &manifest, config)?.into_iter());
    for tensor in &manifest.weights.tensors {
        let numbers = tensor.shape.iter().try_fold(1_u64, |numbers, &size| numbers.checked_mul(size as u64));
        // Two 4-bit numbers take a byte.
        if numbers.is_none_or(|numbers| numbers / 2 > manifest.weights.record.bytes) {
            let expected = format!("a tensor within the file's {} bytes", manifest.weights.record.bytes);
            let error = Error::invalid(folder.join(MANIFEST).display(), expected, format!("{:?}", tensor.shape));
            return Err(error.of(format!("weights.tensors[{:?}].shape", tensor.name)));
        }
        *report.dtypes.entry(tensor.dtype.to_string()).or_default() += usize::from(tensor.same_bytes_as.is_none());
    }
    report.weights.insert(manifest.weights.file.clone(), manifest.weights.record.bytes);
    let mut graphs = Vec::new();
    let parts = ["model", "encoder", "decoder", "decoder_with_past", "vision_encoder"];
    let parts = parts.into_iter().chain(["encoder_lora", "decoder_lora", "decoder_with_past_lora"]);
    for part in parts {
        let Some(record) = manifest.graphs.get(part) else { continue };
        let path = path_of(folder, &record.file)?;
        let bytes = fs::read(&path).map_err(Error::io(&path, "cannot be read"))?;
        let summary = proto::summary(&path, &bytes)?;
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

/// The checkpoint tensors that a model was made of, with the number of parameters in each. The weights file does not
/// show them: its tensors may be quantized, padded or stored twice.
fn parameters(folder: &Path, manifest: &Manifest, config: &Config) -> Result<Vec<(String, u64)>> {
    let is_stored = |tensor: &str| manifest.weights.tensors.iter().any(|stored| stored.name.starts_with(tensor));
    let mut vocabulary = weights::exported_vocabulary(config, is_stored);
    if manifest.kept_tokens.is_some() {
        let path = folder.join(KEPT_TOKENS);
        let text = files::read_text(&path)?;
        let vocab_size = config.decoder.vocab_size;
        let invalid =
            |found: String| Error::invalid(path.display(), format!("an array of ids below {vocab_size}"), found);
        let tokens: Vec<usize> = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        if let Some(id) = tokens.iter().find(|&&id| id >= vocab_size) {
            return Err(invalid(id.to_string()));
        }
        vocabulary.kept = Some(tokens.into());
    }
    // The numbers of a padding row do not matter here.
    let padding_row = Some(vec![0.0; config.encoder.hidden_size].into());
    let options = Options { task: manifest.task.clone(), padding_row, ..plain_options(vocabulary) };
    let weights = weights::collect(&definitions(config, &options), config, &options);
    weights::check_size(&weights, &folder.join("config.json").display().to_string())?;
    Ok(weights::parameters_by_tensor(&weights))
}

fn checkpoint(folder: &Path, config: &Config) -> Result<InspectReport> {
    let checkpoint = Checkpoint::open(folder)?;
    checkpoint.check_present(|_| true)?;
    let tensors = checkpoint.names().filter_map(|name| {
        let tensor = checkpoint.tensor(name)?;
        Some((name.to_string(), tensor.shape.iter().product::<usize>() as u64))
    });
    let mut report = InspectReport::new("checkpoint", config, tensors);
    for tensor in checkpoint.names().filter_map(|name| checkpoint.tensor(name)) {
        let dtype = tensor.float().map_or_else(|| format!("{:?}", tensor.dtype), |dtype| dtype.to_string());
        *report.dtypes.entry(dtype).or_default() += 1;
    }
    report.weights = checkpoint.files(|_| true).map(|(name, bytes)| (name.to_string(), bytes.len() as u64)).collect();
    Ok(report)
}

impl InspectReport {
    fn new(kind: &'static str, config: &Config, tensors: impl Iterator<Item = (String, u64)>) -> InspectReport {
        let mut report = InspectReport {
            kind,
            encoder: describe(&config.encoder),
            decoder: describe(&config.decoder),
            parameters: 0,
            parts: BTreeMap::new(),
            dtypes: BTreeMap::new(),
            weights: BTreeMap::new(),
            interface: config.custom.describe(),
            left_aside: config.custom.left_aside(),
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
    match config.role(tensor) {
        Some(Role::EncoderEmbedding) => "encoder embedding",
        Some(Role::Encoder) => "encoder",
        Some(Role::DecoderEmbedding) => "decoder embedding",
        Some(Role::Decoder | Role::CrossKeyValue) => "decoder",
        Some(Role::Head | Role::Classifier) => "head",
        Some(Role::Vision) => "vision",
        None => "other",
    }
}

fn describe(stack: &Stack) -> String {
    let sliding = stack.layers.iter().filter_map(|layer| match layer {
        LayerType::Sliding(window) => Some(*window),
        LayerType::Full => None,
    });
    let windows: Vec<usize> = sliding.collect();
    let window = match windows.first() {
        None => String::new(),
        Some(window) => format!(", {} with a sliding window of {window}", windows.len()),
    };
    format!(
        "{} layers{window}, hidden size {}, {} heads ({} for keys and values) of size {}, feed-forward size {}, \
         vocabulary {}, at most {} positions",
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

impl fmt::Display for InspectReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.kind)?;
        writeln!(f, "  encoder     {}", self.encoder)?;
        writeln!(f, "  decoder     {}", self.decoder)?;
        for difference in &self.interface {
            writeln!(f, "  interface   {difference}")?;
        }
        for operator in &self.left_aside {
            writeln!(f, "  left aside  {operator}")?;
        }
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
                for port in ports.iter().filter(|port| !LoraModule::has_port(port)) {
                    writeln!(f, "  {direction}  {:<34} {:<8} {}", port.name, port.dtype, Dim::list(&port.shape))?;
                }
                let of_adapters = ports.iter().filter(|port| LoraModule::has_port(port)).count();
                if of_adapters > 0 {
                    let names = format!("MODULE.lora_A, MODULE.lora_B of {} layers", of_adapters / 2);
                    writeln!(f, "  {direction}  {names:<43} [in, lora_rank], [lora_rank, out]")?;
                }
            }
        }
        Ok(())
    }
}
