//! [`SettingError`]: options of an [`Export`](crate::Export) that contradict each other or do not fit the checkpoint.
//! It names fields, which the program maps to flags.

use std::fmt;

/// An option of an [`Export`](crate::Export), or a part of one that has a flag of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Setting {
    /// `task`.
    Task,
    /// The hidden layer of the task feature extraction.
    HiddenLayer,
    /// The pooling of the task feature extraction.
    Pooling,
    /// The fixed length of the task feature extraction.
    FixedLength,
    /// The states at padding of the task feature extraction, or `padding_row`.
    PaddingRows,
    /// The output dtype of the task feature extraction.
    OutputDtype,
    /// Whether all hidden states of the task feature extraction are returned.
    OutputHiddenStates,
    /// `target`.
    Target,
    /// `dtype`.
    Dtype,
    /// `logits` of all positions.
    AllLogits,
    /// `logits` with candidates.
    Candidates,
    /// `kept_tokens`.
    KeptTokens,
    /// `alignment`.
    Alignment,
    /// The layers of `alignment`.
    AlignmentLayers,
    /// `capacity`.
    Capacity,
    /// The source positions of `custom`.
    SourcePositions,
    /// The target positions of `custom`.
    TargetPositions,
    /// The decoder's table of `custom`.
    DecoderEmbedding,
    /// The head of `custom`.
    Head,
    /// `custom`.
    Custom,
    /// `encoder_window`.
    EncoderWindow,
    /// `write_sentencepiece`.
    WriteSentencepiece,
    /// `lora_inputs`.
    LoraInputs,
    /// `plan`.
    Plan,
    /// `memory_limit`.
    MemoryLimit,
    /// `activations`, when they are observed.
    Observed,
    /// The ranges of `activations`.
    Ranges,
    /// `quantization`.
    Quantization,
    /// The block size of `quantization`.
    BlockSize,
    /// `quantization.vision`.
    VisionQuantization,
    /// Whether blocks of `quantization` have zero points.
    Asymmetric,
    /// `quantization.exclude`.
    Exclude,
}

impl Setting {
    /// The field of [`Export`](crate::Export).
    pub fn field(self) -> &'static str {
        match self {
            Setting::Task => "task",
            Setting::HiddenLayer => "task.hidden_layer",
            Setting::Pooling => "task.pooling",
            Setting::FixedLength => "task.fixed_length",
            Setting::PaddingRows => "task.padding_rows",
            Setting::OutputDtype => "task.output_dtype",
            Setting::OutputHiddenStates => "task.output_hidden_states",
            Setting::Target => "target",
            Setting::Dtype => "dtype",
            Setting::AllLogits | Setting::Candidates => "logits",
            Setting::KeptTokens => "kept_tokens",
            Setting::Alignment | Setting::AlignmentLayers => "alignment",
            Setting::Capacity => "capacity",
            Setting::SourcePositions => "custom.float_source_positions",
            Setting::TargetPositions => "custom.float_target_positions",
            Setting::DecoderEmbedding => "custom.decoder_embedding",
            Setting::Head => "custom.head",
            Setting::Custom => "custom",
            Setting::EncoderWindow => "encoder_window",
            Setting::WriteSentencepiece => "write_sentencepiece",
            Setting::LoraInputs => "lora_inputs",
            Setting::Plan => "plan",
            Setting::MemoryLimit => "memory_limit",
            Setting::Observed | Setting::Ranges => "activations",
            Setting::Quantization => "quantization",
            Setting::BlockSize => "quantization.size",
            Setting::VisionQuantization => "quantization.vision",
            Setting::Asymmetric => "quantization.symmetric",
            Setting::Exclude => "quantization.exclude",
        }
    }
}

/// An invalid option.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SettingError {
    /// The value is invalid, perhaps only for this checkpoint.
    Invalid {
        /// The option.
        setting: Setting,
        /// The part of its value in question, or empty.
        part: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The option requires another one.
    Requires {
        /// The option.
        setting: Setting,
        /// Its value, where other values do not require the other option; or empty.
        value: String,
        /// The option that is required.
        other: Setting,
        /// The values of the other option that are accepted; empty if any is.
        needed: String,
        /// The value of the other option; empty if it is not given.
        found: String,
    },
    /// The option cannot be used with another one.
    Excludes {
        /// The option.
        setting: Setting,
        /// The option that may not be given with it.
        other: Setting,
    },
    /// The plan needs more GPU memory than the limit.
    Memory {
        /// The limit in bytes.
        limit: u64,
        /// The bytes that the plan takes.
        needed: u64,
        /// The estimate as a table, as in `memory.txt`.
        table: String,
    },
}

impl SettingError {
    pub(crate) fn invalid(setting: Setting, expected: impl Into<String>, found: impl ToString) -> SettingError {
        SettingError::Invalid { setting, part: String::new(), expected: expected.into(), found: found.to_string() }
    }

    /// The same for a part of the value.
    pub(crate) fn of(self, name: impl Into<String>) -> SettingError {
        match self {
            SettingError::Invalid { setting, expected, found, .. } => {
                SettingError::Invalid { setting, part: name.into(), expected, found }
            }
            error => error,
        }
    }

    /// The invalid option.
    pub fn setting(&self) -> Setting {
        match self {
            SettingError::Invalid { setting, .. }
            | SettingError::Requires { setting, .. }
            | SettingError::Excludes { setting, .. } => *setting,
            SettingError::Memory { .. } => Setting::MemoryLimit,
        }
    }

    /// The message with other names for the options. `name` gets an option and the value that the message gives for
    /// it, which may be empty, and returns both as one text.
    pub fn message(&self, name: impl Fn(Setting, &str) -> String) -> String {
        match self {
            SettingError::Invalid { setting, part, expected, found } => {
                let part = if part.is_empty() { String::new() } else { format!(" {part}:") };
                format!("{}:{part} expected {expected}, found {found}", name(*setting, ""))
            }
            SettingError::Requires { setting, value, other, needed, found } => {
                let got = if found.is_empty() { String::new() } else { format!(" (got {found})") };
                format!("{} requires {}{got}", name(*setting, value), name(*other, needed))
            }
            SettingError::Excludes { setting, other } => {
                format!("{} cannot be used with {}", name(*setting, ""), name(*other, ""))
            }
            SettingError::Memory { limit, needed, .. } => {
                let (plan, limit_name) = (name(Setting::Plan, ""), name(Setting::MemoryLimit, ""));
                format!("{plan} takes {needed} bytes of GPU memory, more than {limit_name} allows ({limit} bytes)")
            }
        }
    }
}

impl fmt::Display for SettingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message(|setting, value| format!("{} {value}", setting.field()).trim_end().to_string()))
    }
}

impl std::error::Error for SettingError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_use_the_names_of_the_caller() {
        let requires = SettingError::Requires {
            setting: Setting::Quantization,
            value: "fp8".into(),
            other: Setting::Target,
            needed: "tensorrt".into(),
            found: "cpu".into(),
        };
        assert_eq!(requires.to_string(), "quantization fp8 requires target tensorrt (got cpu)");
        let flags = requires.message(|setting, value| format!("--{} {value}", setting.field()));
        assert_eq!(flags, "--quantization fp8 requires --target tensorrt (got cpu)");
        let invalid = SettingError::invalid(Setting::Plan, "at most 9", 10);
        assert_eq!(invalid.to_string(), "plan: expected at most 9, found 10");
        assert_eq!(invalid.of("source").to_string(), "plan: source: expected at most 9, found 10");
        let excludes = SettingError::Excludes { setting: Setting::Observed, other: Setting::Alignment };
        assert_eq!(excludes.to_string(), "activations cannot be used with alignment");
    }
}
