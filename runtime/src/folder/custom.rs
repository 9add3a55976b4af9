//! Checks of models with a custom interface: that the inputs of their graphs follow from tokens, and that a batch has the
//! estimates that positions depend on.

use t5gemma_graphs::config::{Head, Positions, StackInput};

use super::Folder;
use crate::batch::Batch;
use crate::error::Error;

impl Folder {
    /// Checks that the encoder can be run on tokens.
    pub(super) fn check_source_inputs(&self) -> Result<(), Error> {
        let custom = &self.manifest.facts.custom;
        if custom.encoder_input == StackInput::InputsEmbeds {
            return Err(self.needs_own_loop("its encoder reads inputs_embeds"));
        }
        if custom.source_positions == Positions::Float && custom.source_scale().is_none() {
            return Err(self.needs_own_loop("its source positions are an input"));
        }
        Ok(())
    }

    /// Checks that the decoder can be run for this batch with prompts of `prompt` tokens: that its inputs follow from
    /// tokens, and that targets have the lengths that positions depend on.
    pub fn check_targets(&self, batch: &Batch, prompt: usize) -> Result<(), Error> {
        let custom = &self.manifest.facts.custom;
        if custom.decoder_input == StackInput::InputsEmbeds {
            return Err(self.needs_own_loop("its decoder reads decoder_inputs_embeds"));
        }
        if custom.head == Head::None {
            return Err(self.needs_own_loop("its decoder has no head"));
        }
        if custom.target_positions == Positions::Float && custom.target_scale().is_none() {
            return Err(self.needs_own_loop("its target positions are an input"));
        }
        for (row, total) in batch.progress_totals().iter().enumerate() {
            let field = || format!("progress_total[{row}]");
            match total {
                None if custom.target_scale().is_some() => return Err(no_progress_total(row)),
                Some(total) if custom.progress.is_none() => {
                    let expected = "none (the model's targets have no expected length)";
                    return Err(Error::input(field(), expected, total.to_string()));
                }
                Some(total) if *total < prompt => {
                    let expected = format!("at least {prompt}, the length of the decoder prompt");
                    return Err(Error::input(field(), expected, total.to_string()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The error of running a model whose inputs only the caller can compute.
    fn needs_own_loop(&self, why: &str) -> Error {
        Error::Unsupported {
            what: format!("{}: the model was exported for a loop of the caller's own: {why}", self.path.display()),
            remedy: "run its graphs with ONNX Runtime".into(),
        }
    }
}

/// The error of a row without `progress_total`, of a model whose positions depend on it.
pub(crate) fn no_progress_total(row: usize) -> Error {
    let expected = "an estimate of the target's length in tokens, the start token included (positions depend on it)";
    Error::input(format!("progress_total[{row}]"), expected, "none")
}
