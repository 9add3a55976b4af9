//! [`Export`]: the options of an export, and the way from a checkpoint to a model folder in four steps: check the options,
//! prepare everything that needs no weights, write the folder, rename it.

mod prepare;
mod rules;
mod write;

use std::path::Path;

use anyhow::Result;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::manifest::{EncoderWindow, Manifest};
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_graphs::task::Task;

use crate::notes;
use crate::progress::Watch;
use crate::source::Source;
use crate::staging::{Existing, StagingDir};
use crate::tensorrt::{Bytes, Plan};

use prepare::Prepared;

/// Options of an export.
#[derive(Clone, Debug)]
pub struct Export {
    /// What the model is for; by default the task that the checkpoint was saved for.
    pub task: Option<Task>,
    /// The runtime that the graphs are written for.
    pub target: Target,
    /// Type of weights, activations and caches: float32, float16 or bfloat16.
    pub dtype: DType,
    /// Positions whose logits the decoder graphs return.
    pub logits: Logits,
    /// The token ids that the model can generate, ascending; `None` for the whole vocabulary. Other tokens have no logits, and
    /// the output head has no rows for them.
    pub kept_tokens: Option<Vec<usize>>,
    /// Decoder layers whose cross-attention the decoder graphs return the mean of, all if empty; `None` returns no
    /// cross-attention.
    pub alignment: Option<Vec<usize>>,
    /// Whether positions exactly one window apart see each other in the encoder.
    pub encoder_window: EncoderWindow,
    /// Which matrices to quantize; for targets that can read them.
    pub quantization: Quantization,
    /// Activation ranges, or whether the graphs are to report them. 8-bit matrices for TensorRT require ranges.
    pub activations: Activations,
    /// Fixed capacity of the target's cache in tokens, for TensorRT; `None` leaves the cache layout to the target.
    pub capacity: Option<usize>,
    /// The range of request sizes that will be served, for TensorRT.
    pub plan: Option<Plan>,
    /// GPU memory that the plan has to fit into.
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

/// What an export wrote and noticed.
#[derive(Debug)]
pub struct Exported {
    /// The manifest as written.
    pub manifest: Manifest,
    /// Tensors of the checkpoint that no graph uses.
    pub unused: Vec<String>,
    /// Remarks for people: what of the checkpoint has no effect, what the model lacks.
    pub notes: Vec<String>,
    /// Probable mistakes, for people.
    pub warnings: Vec<String>,
}

impl Export {
    /// Writes the model folder `out`. It is written under another name and renamed when complete, so an export that fails or
    /// is stopped leaves nothing behind.
    ///
    /// # Errors
    /// What is wrong with the options, with the checkpoint, or with writing, by file and field.
    pub fn run(&self, source: &Source, out: &Path, watch: &dyn Watch) -> Result<Exported> {
        rules::check(self)?;
        let prepared = Prepared::new(self, source)?;
        let folder = StagingDir::create(out, self.existing)?;
        let (manifest, not_finite) = prepared.write(&folder, watch)?;
        watch.check()?;
        folder.publish()?;
        let Prepared { config, generation_config, weights, unused, .. } = prepared;
        let mut notes = notes::of_settings(&config, generation_config.as_ref());
        if let Source::Checkpoint(checkpoint) = source {
            notes.extend(checkpoint.notes());
            notes.extend(notes::of_tokenizer(checkpoint.folder()));
        }
        notes.extend(notes::of_blocks(&weights));
        let warnings = notes::of_capacity(self.capacity, generation_config.as_ref()).into_iter();
        let warnings = warnings.chain(notes::of_numbers(&not_finite)).collect();
        Ok(Exported { manifest, unused, notes, warnings })
    }
}
