//! [`CustomInterface`]: options that change a model's interface, for checkpoints whose `config.json` does not say how
//! they differ. They are laid over the configuration, and checked against the tensors of the checkpoint.

use t5gemma_graphs::config::{Activation, Config, Custom, Head, Positions, StackInput};
use t5gemma_graphs::interface::Logits;
use t5gemma_graphs::quantization::Activations;
use t5gemma_graphs::task::Task;

use super::Export;
use crate::error::{Error, Result};
use crate::settings::{Setting, SettingError};
use crate::source::Source;

/// How the interface of the graphs differs from what `config.json` says. By default, it does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CustomInterface {
    /// Source positions are a float32 input, `position_ids`, instead of the indices of the tokens.
    pub float_source_positions: bool,
    /// Target positions are a float32 input, `decoder_position_ids`.
    pub float_target_positions: bool,
    /// Queries and keys of cross-attention are rotated by these positions.
    pub cross_rope: bool,
    /// The encoder reads `inputs_embeds`, vectors in the place of looked-up rows, instead of `input_ids`.
    pub encoder_inputs_embeds: bool,
    /// The decoder reads `decoder_inputs_embeds` instead of `input_ids`.
    pub decoder_inputs_embeds: bool,
    /// The table that target tokens are looked up in, `[target vocabulary, hidden_size]`.
    pub decoder_embedding: Option<String>,
    /// What follows the decoder's last norm.
    pub head: Option<CustomHead>,
    /// The logits have no soft-cap, whatever `config.json` says.
    pub no_head_softcap: bool,
}

/// A head, by the names of its tensors in the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CustomHead {
    /// `x · Wᵀ (+ b)`.
    Linear {
        /// `W`, `[target vocabulary, hidden_size]`.
        weight: String,
        /// `b`.
        bias: Option<String>,
    },
    /// `act(x · W₁ᵀ + b₁) · W₂ᵀ + b₂`.
    Mlp {
        /// `W₁` `[size, hidden_size]`, `b₁`, `W₂` `[target vocabulary, size]` and `b₂`.
        tensors: [String; 4],
        /// The function between the layers.
        activation: Activation,
    },
    /// None: the decoder graphs return the normed hidden states as `decoder_last_hidden_state`.
    None,
}

impl CustomInterface {
    /// Lays the options over a configuration.
    ///
    /// # Errors
    /// A tensor that the checkpoint does not have, or that has another shape.
    pub(super) fn lay_over(&self, config: &mut Config, source: &Source) -> Result<()> {
        let custom = &mut config.custom;
        if self.float_source_positions {
            custom.source_positions = Positions::Float;
        }
        if self.float_target_positions {
            custom.target_positions = Positions::Float;
        }
        custom.cross_rope |= self.cross_rope;
        if self.encoder_inputs_embeds {
            custom.encoder_input = StackInput::InputsEmbeds;
        }
        if self.decoder_inputs_embeds {
            custom.decoder_input = StackInput::InputsEmbeds;
        }
        if self.no_head_softcap {
            config.decoder.final_logit_softcapping = None;
        }
        let hidden_size = config.decoder.hidden_size;
        if let Some(table) = &self.decoder_embedding {
            let [rows, _] = matrix(source, Setting::DecoderEmbedding, table, Some(hidden_size))?;
            custom.decoder_embedding = Some(table.clone());
            config.decoder.vocab_size = rows;
        }
        let Some(head) = &self.head else { return Ok(()) };
        let (head, scored) = match head {
            CustomHead::None => (Head::None, config.decoder.vocab_size),
            CustomHead::Linear { weight, bias } => {
                let [rows, _] = matrix(source, Setting::Head, weight, Some(hidden_size))?;
                (Head::Linear { weight: weight.clone(), bias: bias.clone() }, rows)
            }
            CustomHead::Mlp { tensors, activation } => {
                let [size, _] = matrix(source, Setting::Head, &tensors[0], Some(hidden_size))?;
                let [rows, _] = matrix(source, Setting::Head, &tensors[2], Some(size))?;
                (Head::Mlp { tensors: tensors.clone(), size, activation: *activation }, rows)
            }
        };
        if config.custom.decoder_input == StackInput::InputsEmbeds {
            config.decoder.vocab_size = scored;
        } else if scored != config.decoder.vocab_size {
            let expected = format!("{} rows, as the table of target tokens has", config.decoder.vocab_size);
            return Err(SettingError::invalid(Setting::Head, expected, format!("{scored} rows")).into());
        }
        config.custom.head = head;
        Ok(())
    }
}

/// The shape of a matrix of the checkpoint, which must have as many columns as given.
fn matrix(source: &Source, setting: Setting, name: &str, columns: Option<usize>) -> Result<[usize; 2]> {
    let Source::Checkpoint(checkpoint) = source else {
        return Err(SettingError::invalid(setting, "a tensor of a checkpoint", "random weights").into());
    };
    let Some(tensor) = checkpoint.tensor(name) else {
        let expected = format!("a tensor of {}", checkpoint.path().display());
        return Err(SettingError::invalid(setting, expected, format!("{name:?}, which it does not have")).into());
    };
    match *tensor.shape {
        [rows, width] if columns.is_none_or(|columns| columns == width) && rows > 0 => Ok([rows, width]),
        _ => {
            let columns = columns.map_or_else(String::new, |columns| columns.to_string());
            let expected = format!("{name} of shape [rows, {columns}]");
            Err(SettingError::invalid(setting, expected, format!("{:?}", tensor.shape)).into())
        }
    }
}

/// Refuses what a custom interface cannot be exported with.
pub(super) fn check(export: &Export, config: &Config, task: &Task) -> Result<()> {
    let Custom { source_positions, target_positions, encoder_input, decoder_input, head, .. } = &config.custom;
    let invalid = |setting, expected: String, found: &str| -> Result<(), Error> {
        Err(SettingError::invalid(setting, expected, found).into())
    };
    if !config.custom.is_stock() && !task.is_generation() && !matches!(task, Task::FeatureExtraction(_)) {
        let expected = "text2text-generation or feature-extraction for a model with a custom interface".to_string();
        return invalid(Setting::Task, expected, task.name());
    }
    let more_inputs = [
        (*source_positions == Positions::Float || *target_positions == Positions::Float, "float positions"),
        (*encoder_input == StackInput::InputsEmbeds || *decoder_input == StackInput::InputsEmbeds, "inputs_embeds"),
    ];
    if let Some((_, what)) = more_inputs.into_iter().find(|(has, _)| *has) {
        if export.target.capabilities().serving_plans {
            let expected =
                format!("portable, cpu or cuda for a model with {what} (engines have no profiles for that input)");
            return invalid(Setting::Target, expected, export.target.name());
        }
        if export.activations == Activations::Observed {
            let expected = format!("a model without {what}, for which no activations are observed");
            return invalid(Setting::Observed, expected, what);
        }
    }
    if export.kept_tokens.is_some() && !(head.is_stock() && config.custom.has_text_targets()) {
        let expected = "a model with T5Gemma's own head and target vocabulary".to_string();
        return invalid(Setting::KeptTokens, expected, "another head or table of target tokens");
    }
    if *head == Head::None && matches!(export.logits, Logits::Candidates(_)) {
        return invalid(Setting::Candidates, "a model with a head".into(), "one without");
    }
    Ok(())
}
