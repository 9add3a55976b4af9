//! `manifest.json`: what the exporter says of a model folder and the runtime checks before it trusts one. Plain data; the
//! exporter fills it, the runtime compares it with the files.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, Family};
use crate::facts::Facts;
use crate::interface::{self, CacheLayout, DType, Logits, Part, Ports, Returned};
use crate::quantization::Quantization;
use crate::task::Task;
use crate::tensors::Role;

/// The name of the file, beside the graphs.
pub const MANIFEST: &str = "manifest.json";
/// The name of the file of a model that generates only some tokens of the vocabulary: their ids, a JSON array, ascending. The
/// logits are theirs, in this order.
pub const KEPT_TOKENS: &str = "kept_tokens.json";
/// The value of `format`.
pub const FORMAT: &str = "t5gemma-onnx";
/// The version that this code writes; raised when an older reader would misread a folder.
pub const FORMAT_VERSION: u32 = 2;
/// The oldest version that it reads.
pub const OLDEST_FORMAT_VERSION: u32 = 1;
/// Bytes of one sampled block of the weights: see [`WeightsRecord::sample_sha256`].
pub const SAMPLE_BLOCK: u64 = 4096;
/// Sampled blocks at most, spread evenly over the weights.
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
    /// The lowering of the graphs: `portable`, …
    pub target: String,
    /// Type of weights, activations and caches.
    pub dtype: DType,
    /// Version of the standard operator set.
    pub opset: u32,
    /// Whether positions exactly one window apart see each other in the encoder: `inclusive` or `exclusive`.
    pub encoder_window: EncoderWindow,
    /// Whether the numbers in the encoder's `attention_mask` say which of several sources that lie side by side in a row a token
    /// belongs to, from 1 on; 0 is padding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub side_by_side: bool,
    /// Positions whose logits the decoder graphs return.
    pub logits: Logits,
    /// How many tokens have logits, if not all of the vocabulary: those of [`KEPT_TOKENS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_tokens: Option<usize>,
    /// Decoder layers whose cross-attention the decoder graphs return the mean of; empty where they return none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alignment_layers: Vec<usize>,
    /// How the keys and values of the target pass from step to step.
    #[serde(default)]
    pub cache: CacheLayout,
    /// What it is going to be served with, as `t5gemma-export --plan` was told, for people; what the engines take is in
    /// [`PROFILES_FILE`](interface::PROFILES_FILE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// Which matrices are held in few bits.
    #[serde(default)]
    pub quantization: Quantization,
    /// Of the graphs whose activations are observed, what they are multiplied with, in the order of the last output.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub observed: BTreeMap<String, Vec<String>>,
    /// Numbers in the model, counted once each.
    pub parameters: u64,
    /// What a runtime needs to know of the model besides its graphs.
    pub facts: Facts,
    /// Where the weights came from.
    pub source: Source,
    /// The graphs: `encoder`, `decoder` and `decoder_with_past`, or for tasks other than generation one `model`.
    pub graphs: BTreeMap<String, GraphRecord>,
    /// The file of weights under all graphs.
    pub weights: WeightsRecord,
    /// Every other file of the folder but this one.
    pub files: BTreeMap<String, FileRecord>,
}

impl Manifest {
    /// What the decoder graphs return besides keys and values.
    pub fn returned(&self) -> Returned {
        let (logits, kept_tokens) = (self.logits, self.kept_tokens);
        Returned { logits, kept_tokens, alignment: !self.alignment_layers.is_empty() }
    }

    /// The graphs that a model of this manifest has, in the order in which they are run.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = interface::parts(&self.facts, self.dtype, self.returned(), self.cache, &self.task);
        for part in &mut parts {
            let observed = self.observed.get(part.name).map(|names| interface::activation_ranges(names.len()));
            part.ports.outputs.extend(observed);
        }
        parts
    }
}

/// How large the numbers become that matrices are multiplied with: what `t5gemma calibrate` writes and
/// `t5gemma-export --calibrate` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationRanges {
    /// Texts that they were found with.
    pub texts: usize,
    /// Of the greatest absolute numbers in each text, this percentile is given; 100 is the greatest of all.
    pub percentile: f64,
    /// By the checkpoint's name of the matrix.
    pub ranges: BTreeMap<String, f32>,
}

/// Which positions a sliding encoder layer of window `W` sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderWindow {
    /// `|query - key| <= W`: transformers 5.4 and later, eager attention.
    #[default]
    Inclusive,
    /// `|query - key| < W`: Google's own code, transformers up to 5.3, flash attention.
    Exclusive,
}

/// Where the weights came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The checkpoint's files with their hashes.
    Checkpoint(BTreeMap<String, FileRecord>),
    /// Random weights, for measuring a size.
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
    /// SHA-256 of the content, in lower-case hexadecimal.
    pub sha256: String,
}

/// One graph: its file, its ports, and the weights it refers to.
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
    /// Names of the tensors in [`WeightsRecord::tensors`] that are initializers of this graph.
    pub weights: Vec<String>,
}

/// The weights file and what lies where in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightsRecord {
    /// File name.
    pub file: String,
    /// Size and hash of the file.
    #[serde(flatten)]
    pub record: FileRecord,
    /// SHA-256 over up to [`SAMPLE_BLOCKS`] blocks of [`SAMPLE_BLOCK`] bytes, the `i`-th of `n` blocks starting at
    /// `i * (bytes - SAMPLE_BLOCK) / (n - 1)`: enough to notice another model's weights without reading gigabytes.
    pub sample_sha256: String,
    /// The tensors, in the order of the file.
    pub tensors: Vec<TensorRecord>,
}

/// One tensor of the weights file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Name of the initializer in every graph that uses it.
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
    /// An earlier tensor that is the same bytes in another shape, if this one is.
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
