//! [`Export`]: the options of an export, and the way from a checkpoint to a model folder: check the options, prepare
//! everything that needs no weights, write the folder, rename it.

mod custom;
mod prepare;
mod rules;
mod write;

use std::path::{Path, PathBuf};

use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::manifest::{EncoderWindow, Manifest};
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_graphs::task::Task;

use crate::error::{Error, Result};
use crate::notes;
use crate::progress::Progress;
use crate::source::Source;
use crate::staging::{Existing, StagingDir};
use crate::tensorrt::{MemorySize, ServingPlan};
use crate::triton::{TritonBackend, TritonRepository};

pub use custom::{CustomHead, CustomInterface};
use prepare::Prepared;
use write::WrittenModel;

/// The options of an export. Every field has a method of the same name that sets it:
///
/// ```
/// use t5gemma_exporter::{DType, Export, Target};
///
/// let export = Export::default().target(Target::TensorRt).dtype(DType::Float16).capacity(256);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Export {
    /// What the model is for; `None` for the task that the checkpoint was saved for.
    pub task: Option<Task>,
    /// The runtime that the graphs are written for.
    pub target: Target,
    /// Type of weights, activations and caches: float32, float16 or bfloat16.
    pub dtype: DType,
    /// Positions whose logits the decoder graphs return.
    pub logits: Logits,
    /// The token ids that the model can generate, ascending; `None` for the whole vocabulary. Other tokens have no
    /// logits, and the output head has no rows for them.
    pub kept_tokens: Option<Vec<usize>>,
    /// The decoder layers whose cross-attention the decoder graphs return.
    pub alignment: Alignment,
    /// Whether positions exactly one window apart see each other in the encoder.
    pub encoder_window: EncoderWindow,
    /// Whether the model reads images, if the checkpoint has the weights for it.
    pub vision: bool,
    /// Which matrices to quantize, for targets that can read them.
    pub quantization: Quantization,
    /// Activation ranges, or whether the graphs are to report them. 8-bit matrices for TensorRT require ranges.
    pub activations: Activations,
    /// Fixed capacity of the decoder's cache in target tokens, for TensorRT; `None` leaves the cache layout to the
    /// target.
    pub capacity: Option<usize>,
    /// The vector for [`PaddingRows::Learned`](t5gemma_graphs::task::PaddingRows::Learned) of the task feature extraction.
    pub padding_row: Option<PaddingRow>,
    /// How the interface of the graphs differs from what `config.json` says.
    pub custom: CustomInterface,
    /// Whether to write the SentencePiece model that the checkpoint has as a tensor to `tokenizer.model`.
    pub write_sentencepiece: bool,
    /// The greatest rank of the LoRA adapters that the model can be given at run time; `None` for a model without
    /// graphs that take adapters.
    pub lora_inputs: Option<usize>,
    /// Whether to write what a model repository on the Hugging Face hub has besides the model: the card `README.md`,
    /// `.gitattributes` and the notice of Gemma's licence.
    pub model_card: bool,
    /// A folder to add models of Triton Inference Server to, which name the exported folder.
    pub triton_repository: Option<PathBuf>,
    /// The backend that these are for.
    pub triton_backend: TritonBackend,
    /// The request sizes that will be served, for TensorRT.
    pub plan: Option<ServingPlan>,
    /// GPU memory that the plan must not exceed.
    pub memory_limit: Option<MemorySize>,
    /// What to do when the output folder exists.
    pub existing: Existing,
}

/// The decoder layers whose cross-attention the decoder graphs return. They return the mean over these layers and their
/// heads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Alignment {
    /// The graphs return no cross-attention.
    #[default]
    None,
    /// All layers.
    AllLayers,
    /// Layers by index, from 0.
    Layers(Vec<usize>),
}

/// Where to find the hidden state of padding, a tensor of `hidden_size` numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaddingRow {
    /// A safetensors file.
    pub file: PathBuf,
    /// The name of the tensor.
    pub tensor: String,
}

impl Default for Export {
    /// The task of the checkpoint, for any ONNX runtime, in float32.
    fn default() -> Export {
        Export {
            task: None,
            target: Target::Portable,
            dtype: DType::Float32,
            logits: Logits::default(),
            kept_tokens: None,
            alignment: Alignment::None,
            encoder_window: EncoderWindow::default(),
            vision: true,
            quantization: Quantization::default(),
            activations: Activations::default(),
            capacity: None,
            padding_row: None,
            custom: CustomInterface::default(),
            write_sentencepiece: false,
            lora_inputs: None,
            model_card: false,
            triton_repository: None,
            triton_backend: TritonBackend::default(),
            plan: None,
            memory_limit: None,
            existing: Existing::Refuse,
        }
    }
}

/// Defines the methods that set a field.
macro_rules! setters {
    ($($field:ident: $type:ty,)*) => {
        impl Export {
            $(
                #[doc = concat!("Sets [`", stringify!($field), "`](Export#structfield.", stringify!($field), ").")]
                pub fn $field(mut self, $field: impl Into<$type>) -> Export {
                    self.$field = $field.into();
                    self
                }
            )*
        }
    };
}

setters! {
    task: Option<Task>,
    target: Target,
    dtype: DType,
    logits: Logits,
    kept_tokens: Option<Vec<usize>>,
    alignment: Alignment,
    encoder_window: EncoderWindow,
    vision: bool,
    quantization: Quantization,
    activations: Activations,
    capacity: Option<usize>,
    padding_row: Option<PaddingRow>,
    custom: CustomInterface,
    write_sentencepiece: bool,
    lora_inputs: Option<usize>,
    model_card: bool,
    triton_repository: Option<PathBuf>,
    triton_backend: TritonBackend,
    plan: Option<ServingPlan>,
    memory_limit: Option<MemorySize>,
    existing: Existing,
}

/// The result of an export.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Exported {
    /// The manifest as written.
    pub manifest: Manifest,
    /// Tensors of the checkpoint that no graph uses.
    pub unused: Vec<String>,
    /// Remarks for people: parts of the checkpoint without effect, features that the model lacks.
    pub notes: Vec<String>,
    /// Probable mistakes, for people.
    pub warnings: Vec<String>,
}

impl Export {
    /// Writes the model folder `out`. It has another name until it is complete, so an export that fails leaves nothing
    /// behind.
    ///
    /// # Errors
    /// Options that contradict each other or do not suit the checkpoint, a checkpoint that is incomplete or not
    /// supported, or a folder that cannot be written.
    pub fn run(&self, source: &Source, out: &Path) -> Result<Exported> {
        self.run_with(source, out, &())
    }

    /// Refuses models that Triton's own backends and the loop over them do not run.
    fn check_triton(&self, task: &Task) -> Result<()> {
        let has_logits = !matches!(self.logits, Logits::Candidates(_)) && task.is_generation();
        let (is_suitable, expected) = match self.triton_backend {
            _ if self.triton_repository.is_none() => return Ok(()),
            TritonBackend::T5Gemma => return Ok(()),
            TritonBackend::OnnxRuntime => (
                self.target == Target::Portable && has_logits,
                "target portable with logits, and a task that generates",
            ),
            // NumPy, which the loop is written with, has no bfloat16.
            TritonBackend::TensorRt => {
                let has_type = matches!(self.dtype, DType::Float32 | DType::Float16);
                let begins_at_one = self.plan.as_ref().is_some_and(ServingPlan::begins_at_one);
                let is_suitable =
                    self.target == Target::TensorRt && has_type && begins_at_one && self.capacity.is_none();
                let expected = "target tensorrt in float16 or float32 with logits, a plan from batch 1 and source 1 on, a growing \
                                cache, and a task that generates";
                (is_suitable && has_logits, expected)
            }
        };
        if is_suitable {
            return Ok(());
        }
        let plan = self.plan.as_ref().map_or("none".to_string(), ServingPlan::to_string);
        let found = format!("target {} in {}, plan {plan}, task {task}", self.target.name(), self.dtype);
        Err(Error::invalid(format!("triton_backend {}", self.triton_backend.name()), expected, found))
    }

    /// As [`run`](Export::run), followed by `progress`, which can cancel the export.
    ///
    /// # Errors
    /// The same, and [`Error::Cancelled`].
    pub fn run_with(&self, source: &Source, out: &Path, progress: &dyn Progress) -> Result<Exported> {
        rules::check(self)?;
        let prepared = Prepared::new(self, source)?;
        self.check_triton(&prepared.options.task)?;
        let triton = self.triton_repository.as_deref();
        let triton = triton.map(|folder| TritonRepository::new(folder, out, self.existing, self.triton_backend));
        let triton = triton.transpose()?;
        let folder = StagingDir::create(out, self.existing)?;
        let WrittenModel { manifest, not_finite } = prepared.write(&folder, progress)?;
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        folder.publish()?;
        if let Some(triton) = triton {
            triton.write(&manifest)?;
        }
        let Prepared { config, generation_config, options, weights, unused, .. } = prepared;
        let mut notes = notes::of_config(&config, generation_config.as_ref());
        if let Source::Checkpoint(checkpoint) = source {
            notes.extend(checkpoint.notes());
            notes.extend(notes::of_tokenizer(checkpoint.tokenizer_folder()));
        }
        notes.extend(notes::of_end_of_image(&config, &options.vocabulary));
        notes.extend(notes::of_blocks(&weights));
        let warnings = notes::of_capacity(self.capacity, generation_config.as_ref()).into_iter();
        let warnings = warnings.chain(notes::of_numbers(&not_finite)).collect();
        Ok(Exported { manifest, unused, notes, warnings })
    }
}
