//! `manifest.json`: the exporter's record of a model folder. The runtime checks the files against it and takes its
//! facts from it. Plain data; `versions.rs` reads it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, Family};
use crate::facts::Facts;
use crate::images::ImageSettings;
use crate::interface::{self, CacheLayout, DType, DecoderOutputs, GraphSpec, Logits, LoraModules, Ports};
use crate::quantization::Quantization;
use crate::task::Task;
use crate::tensors::Role;

/// The name of the file.
pub const MANIFEST: &str = "manifest.json";
/// The name of the file with the tokens that a model can generate, if that is not the whole vocabulary: a JSON array of
/// ids, ascending, in the order of the logits.
pub const KEPT_TOKENS: &str = "kept_tokens.json";
/// The model card, for people and the Hugging Face hub.
pub const CARD: &str = "README.md";
/// Which files Git LFS holds.
pub const GIT_ATTRIBUTES: &str = ".gitattributes";
/// The notice of the model's licence.
pub const NOTICE: &str = "NOTICE";
/// Files that nothing is computed from. Unlike the others, they may be edited or removed after the export.
pub const DOCUMENTS: [&str; 3] = [CARD, GIT_ATTRIBUTES, NOTICE];
/// The value of `format`.
pub const FORMAT: &str = "t5gemma-onnx";
/// The version that this code writes; raised when an older reader would misread a folder.
pub const FORMAT_VERSION: u32 = 2;
/// The oldest version that it reads.
pub const OLDEST_FORMAT_VERSION: u32 = 1;
/// Bytes of one sampled block of the weights: see [`WeightsRecord::sample_sha256`].
pub const SAMPLE_BLOCK: u64 = 4096;
/// The most blocks of the weights that are sampled.
pub const SAMPLE_BLOCKS: u64 = 256;

/// The document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name and version of the program that wrote the folder.
    pub exporter: String,
    /// The family of models.
    pub family: Family,
    /// What the graphs are for; left out where that is generation.
    #[serde(default, skip_serializing_if = "Task::is_generation")]
    pub task: Task,
    /// The target that the graphs are written for: `portable`, `cpu`, `cuda` or `tensorrt`.
    pub target: String,
    /// Dtype of weights, activations and caches.
    pub dtype: DType,
    /// Version of the standard operator set.
    pub opset: u32,
    /// The positions that encoder layers with a sliding window attend to: `inclusive`, `exclusive` or `total`.
    pub encoder_window: EncoderWindow,
    /// Whether several sources can lie side by side in a row of the encoder: `attention_mask` then has the number of
    /// each token's source, from 1 on, or 0 for padding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub side_by_side: bool,
    /// The logits that the decoder graphs return.
    pub logits: Logits,
    /// The number of tokens that have logits, if not the whole vocabulary: those in [`KEPT_TOKENS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_tokens: Option<usize>,
    /// The decoder layers whose mean cross-attention the decoder graphs return; none if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alignment_layers: Vec<usize>,
    /// How the keys and values of the target tokens pass from step to step.
    #[serde(default)]
    pub cache: CacheLayout,
    /// The serving plan, as given to `t5gemma-export --plan`, for people; what engines are built with is in
    /// [`PROFILES_FILE`](interface::PROFILES_FILE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// Which matrices are quantized, and how.
    #[serde(default)]
    pub quantization: Quantization,
    /// For each graph with observed activations, the matrices whose operands are observed, in the order of its last
    /// output.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub observed: BTreeMap<String, Vec<String>>,
    /// The number of parameters, each tensor counted once.
    pub parameters: u64,
    /// What a runtime needs to know of the model besides its graphs.
    pub facts: Facts,
    /// How images become pixel values and tokens, if the model reads images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<ImageSettings>,
    /// Where the weights came from.
    pub source: Source,
    /// The adapters that were merged into them, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterRecord>,
    /// The adapters that the graphs take as inputs, if they take any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_inputs: Option<LoraInputs>,
    /// The graphs: `encoder`, `decoder` and `decoder_with_past`, or for tasks other than generation one `model`.
    pub graphs: BTreeMap<String, GraphRecord>,
    /// The weights file that all graphs share.
    pub weights: WeightsRecord,
    /// Every other file of the folder but this one.
    pub files: BTreeMap<String, FileRecord>,
}

/// The LoRA adapters that graphs take as inputs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraInputs {
    /// The greatest rank of an adapter.
    pub rank: usize,
    /// The linear layers that an adapter can change, for each graph in the order of its inputs.
    pub modules: LoraModules,
}

/// An adapter that was merged into the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// The name of its folder.
    pub name: String,
    /// The factor that it was merged with, besides its own.
    pub scale: f32,
    /// Its rank, for modules without their own.
    pub r: u64,
    /// Its alpha, for modules without their own.
    pub lora_alpha: f64,
    /// Its weights file.
    #[serde(flatten)]
    pub record: FileRecord,
}

impl Manifest {
    /// The outputs of the decoder graphs besides keys and values.
    pub fn decoder_outputs(&self) -> DecoderOutputs {
        let (logits, kept_tokens) = (self.logits, self.kept_tokens);
        DecoderOutputs { logits, kept_tokens, cross_attentions: !self.alignment_layers.is_empty() }
    }

    /// The graphs that the model has to have, in the order in which they are run.
    pub fn graph_specs(&self) -> Vec<GraphSpec> {
        let mut specs = interface::graphs(&self.facts, self.dtype, self.decoder_outputs(), self.cache, &self.task);
        for spec in &mut specs {
            let observed = self.observed.get(spec.name).map(|names| interface::activation_ranges(names.len()));
            spec.ports.outputs.extend(observed);
        }
        if let Some(LoraInputs { modules, .. }) = &self.lora_inputs {
            let lora = specs.iter().filter_map(|spec| interface::lora(spec, self.dtype, modules));
            let lora: Vec<GraphSpec> = lora.collect();
            specs.extend(lora);
        }
        specs
    }
}

/// The ranges of activations: what `t5gemma calibrate` writes and `t5gemma-export --calibrate` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationRanges {
    /// The number of texts that they were measured with.
    pub texts: usize,
    /// The percentile, over texts, of the largest absolute value in each text; 100 is the overall maximum.
    pub percentile: f64,
    /// `max |x|` of the operand of each matrix, by the checkpoint's name of the matrix.
    pub ranges: BTreeMap<String, f32>,
}

/// The positions that an encoder layer with a sliding window `W` attends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderWindow {
    /// `|query - key| <= W`: transformers 5.4 and later, eager attention.
    #[default]
    Inclusive,
    /// `|query - key| < W`: Google's own code, transformers up to 5.3, and flash attention.
    Exclusive,
    /// `W` positions in all, `-(W / 2) <= query - key < (W + 1) / 2`, of which one more lies ahead if `W` is even:
    /// T5Gemma 2.
    Total,
}

impl EncoderWindow {
    /// How many positions a query sees before and after its own.
    pub fn reach(self, window: usize) -> (usize, usize) {
        match self {
            EncoderWindow::Inclusive => (window, window),
            EncoderWindow::Exclusive => (window - 1, window - 1),
            EncoderWindow::Total => (window.div_ceil(2) - 1, window / 2),
        }
    }
}

/// Where the weights came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A checkpoint: the records of its weights files.
    Checkpoint(BTreeMap<String, FileRecord>),
    /// Random weights, to measure a size.
    Dummy {
        /// The seed of the generator.
        seed: u64,
    },
}

/// A file's size and content hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
}

/// One graph: its file, its ports, and the weights it uses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GraphRecord {
    /// File name.
    pub file: String,
    /// Size and hash of the file.
    #[serde(flatten)]
    pub record: FileRecord,
    /// Inputs and outputs.
    #[serde(flatten)]
    pub ports: Ports,
    /// The names of its initializers in [`WeightsRecord::tensors`].
    pub weights: Vec<String>,
}

/// The weights file and its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightsRecord {
    /// File name.
    pub file: String,
    /// Size and hash of the file.
    #[serde(flatten)]
    pub record: FileRecord,
    /// SHA-256 over up to [`SAMPLE_BLOCKS`] blocks of [`SAMPLE_BLOCK`] bytes, block `i` of `n` starting at
    /// `i * (bytes - SAMPLE_BLOCK) / (n - 1)`: enough to detect the weights of another model without reading gigabytes.
    pub sample_sha256: String,
    /// The tensors, in the order of the file.
    pub tensors: Vec<TensorRecord>,
}

/// One tensor of the weights file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// The name of the initializer in every graph that uses it.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// First byte, a multiple of 4096.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// An earlier tensor with the same bytes in another shape, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_bytes_as: Option<String>,
}

/// Why a manifest cannot be read. `E` is the error of reading the folder's `config.json`.
#[derive(Debug)]
pub enum ManifestError<E> {
    /// A field has a value that this code does not read.
    Field(ConfigError),
    /// The document is not a manifest of its version.
    Malformed(serde_json::Error),
    /// The manifest is of version 1, and its `config.json` cannot be read.
    Config(E),
}

impl<E: fmt::Display> fmt::Display for ManifestError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ManifestError::Field(error) => error.fmt(f),
            ManifestError::Malformed(error) => write!(f, "not a manifest: {error}"),
            ManifestError::Config(error) => error.fmt(f),
        }
    }
}

/// The offsets of the sampled blocks in a file of `bytes` bytes; a file too small to sample is one block.
pub fn sample_offsets(bytes: u64) -> Vec<u64> {
    let blocks = (bytes / SAMPLE_BLOCK).clamp(1, SAMPLE_BLOCKS);
    let last = bytes.saturating_sub(SAMPLE_BLOCK);
    (0..blocks)
        .map(|block| if blocks == 1 { 0 } else { (last as u128 * block as u128 / (blocks - 1) as u128) as u64 })
        .collect()
}
