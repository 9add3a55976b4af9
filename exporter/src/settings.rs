//! What does not go together in an [`Export`](crate::Export), or not with the checkpoint: by the names of settings, for which
//! the program has flags.

use std::fmt;

/// A setting of an [`Export`](crate::Export).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// `task`.
    Task,
    /// Of a task of feature extraction.
    HiddenLayer,
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
    /// `plan`.
    Plan,
    /// `fits`.
    Fits,
    /// `activations` that are observed.
    Observed,
    /// The ranges of `activations`.
    Ranges,
    /// `quantization`.
    Quantization,
    /// The numbers in a block of `quantization`.
    BlockSize,
    /// Whether blocks of `quantization` have zero points.
    Asymmetric,
    /// `quantization.exclude`.
    Exclude,
}

impl Setting {
    /// The name in [`Export`](crate::Export).
    pub fn field(self) -> &'static str {
        match self {
            Setting::Task => "task",
            Setting::HiddenLayer => "task.hidden_layer",
            Setting::Target => "target",
            Setting::Dtype => "dtype",
            Setting::AllLogits | Setting::Candidates => "logits",
            Setting::KeptTokens => "kept_tokens",
            Setting::Alignment | Setting::AlignmentLayers => "alignment",
            Setting::Capacity => "capacity",
            Setting::Plan => "plan",
            Setting::Fits => "fits",
            Setting::Observed | Setting::Ranges => "activations",
            Setting::Quantization => "quantization",
            Setting::BlockSize => "quantization.size",
            Setting::Asymmetric => "quantization.symmetric",
            Setting::Exclude => "quantization.exclude",
        }
    }
}

/// A setting that cannot be as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingError {
    /// A value that it cannot have.
    Value {
        /// The setting.
        setting: Setting,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// It does not fit the model.
    Unfit {
        /// The setting.
        setting: Setting,
        /// Which part of it, what would have been accepted, and what was given.
        why: String,
    },
    /// Another setting is not as this one needs it.
    Requires {
        /// The setting.
        setting: Setting,
        /// Its value, where it is not for all of them; or empty.
        value: String,
        /// The other setting.
        other: Setting,
        /// What that has to be; empty where it only has to be given.
        needed: String,
        /// What it is; empty where it is not given.
        found: String,
    },
}

impl SettingError {
    pub(crate) fn value(setting: Setting, expected: impl Into<String>, found: impl ToString) -> SettingError {
        SettingError::Value { setting, expected: expected.into(), found: found.to_string() }
    }

    /// The setting that is refused.
    pub fn setting(&self) -> Setting {
        match self {
            SettingError::Value { setting, .. }
            | SettingError::Unfit { setting, .. }
            | SettingError::Requires { setting, .. } => *setting,
        }
    }

    /// The sentence with the names that the caller has for settings.
    pub fn told(&self, name: impl Fn(Setting) -> String) -> String {
        match self {
            SettingError::Value { setting, expected, found } => {
                format!("{}: expected {expected}, found {found}", name(*setting))
            }
            SettingError::Unfit { setting, why } => format!("{}: {why}", name(*setting)),
            SettingError::Requires { setting, value, other, needed, found } => {
                let spaced = |text: &str| if text.is_empty() { String::new() } else { format!(" {text}") };
                let got = if found.is_empty() { String::new() } else { format!(" (got {found})") };
                format!("{}{} requires {}{}{got}", name(*setting), spaced(value), name(*other), spaced(needed))
            }
        }
    }
}

impl fmt::Display for SettingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.told(|setting| setting.field().to_string()))
    }
}

impl std::error::Error for SettingError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_have_the_names_of_the_caller() {
        let requires = SettingError::Requires {
            setting: Setting::Quantization,
            value: "fp8".into(),
            other: Setting::Target,
            needed: "tensorrt".into(),
            found: "cpu".into(),
        };
        assert_eq!(requires.to_string(), "quantization fp8 requires target tensorrt (got cpu)");
        let flags = requires.told(|setting| format!("--{}", setting.field()));
        assert_eq!(flags, "--quantization fp8 requires --target tensorrt (got cpu)");
        let value = SettingError::value(Setting::Candidates, "1 to 9", 0);
        assert_eq!(value.to_string(), "logits: expected 1 to 9, found 0");
    }
}
