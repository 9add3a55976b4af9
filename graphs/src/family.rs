//! The one place that distinguishes model families: each has a match arm here, and everything else in a folder of its
//! own. Callers above never ask for the family; code below does not know that there are several.

use crate::config::{Config, ConfigError, Family, Fields};
use crate::manifest::EncoderWindow;
use crate::onnx::Definition;
use crate::options::Options;
use crate::tensors::Tensors;

/// The `model_type` of T5Gemma-TTS, a T5Gemma with another interface.
const VOICE: &str = "t5gemma_voice";

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// The first field that is missing, malformed, contradictory, unknown or unsupported.
    pub fn parse(json: &str) -> Result<Config, ConfigError> {
        let mut top = Fields::parse(json)?;
        let model_type = top.text("model_type")?;
        match model_type.as_deref() {
            None | Some("t5gemma") => crate::t5gemma::config::parse(top),
            Some("t5gemma2") => crate::t5gemma2::config::parse(top),
            Some(VOICE) => crate::t5gemma::voice::parse(top),
            Some(other) => {
                let hint = match other {
                    "t5_gemma_module" => " (one stack of a T5Gemma; the whole model's config.json is needed)",
                    _ => "",
                };
                let names = Family::ALL.map(Family::name).into_iter().chain([VOICE]);
                let expected = names.map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
                Err(top.error("model_type", expected, format!("{other:?}{hint}")))
            }
        }
    }
}

/// The graphs of the options' task, in the order of [`interface::graphs`](crate::interface::graphs).
pub fn definitions(config: &Config, options: &Options) -> Vec<Definition> {
    match config.family {
        Family::T5Gemma => crate::t5gemma::definitions(config, options),
        Family::T5Gemma2 => crate::t5gemma2::definitions(config, options),
    }
}

impl Family {
    /// The window of its encoder, if that is the same in every version of transformers.
    pub fn encoder_window(self) -> Option<EncoderWindow> {
        match self {
            Family::T5Gemma => None,
            Family::T5Gemma2 => Some(EncoderWindow::Total),
        }
    }

    /// Whether its decoder attends to target and source in one softmax, so that a source of padding alone has a meaning: the
    /// decoder by itself.
    pub fn sees_target_beside_source(self) -> bool {
        match self {
            Family::T5Gemma => false,
            Family::T5Gemma2 => true,
        }
    }

    /// The names of its tensors.
    pub fn tensors(self) -> &'static Tensors {
        match self {
            Family::T5Gemma => &crate::t5gemma::TENSORS,
            Family::T5Gemma2 => &crate::t5gemma2::TENSORS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_found_by_its_name_and_others_are_refused() {
        let parsed = |model_type: &str| {
            let layers = r#"{"num_hidden_layers": 1}"#;
            Config::parse(&format!(r#"{{{model_type} "encoder": {layers}, "decoder": {layers}}}"#))
        };
        for family in Family::ALL {
            let config = parsed(&format!("\"model_type\": {:?},", family.name())).expect("its own name");
            assert_eq!(config.family, family);
        }
        assert_eq!(parsed("").expect("without a name").family, Family::T5Gemma);
        let error = parsed("\"model_type\": \"t5\",").expect_err("another family").to_string();
        assert_eq!(error, "model_type: expected \"t5gemma\" or \"t5gemma2\" or \"t5gemma_voice\", found \"t5\"");
    }
}
