//! `Task`: what a model folder is for, by Hugging Face's task names. Plain data that the exporter writes into the
//! manifest and the runtime reads.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::onnx::DType;

/// What a model folder is for; it decides which graphs there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Task {
    /// The encoder and both decoder graphs.
    #[default]
    #[serde(rename = "text2text-generation")]
    Text2TextGeneration,
    /// The encoder alone: hidden states, or one vector for each source.
    FeatureExtraction(Features),
    /// Scores of labels for each source.
    TextClassification,
    /// Scores of labels for each token of a source.
    TokenClassification,
}

/// What feature extraction returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// How the states of a source are pooled.
    pub pooling: Pooling,
    /// Whether vectors are divided by their Euclidean norm.
    pub normalize: bool,
    /// An index into Hugging Face's `hidden_states`: 0 is the embedding, `n` the output of the `n`-th layer, and the
    /// last one is normed. Negative indices count from the end; manifests have none.
    pub hidden_layer: i64,
    /// The length of every source, padding included; `None` for any length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_length: Option<usize>,
    /// The hidden states at padding; requires pooling `none`.
    #[serde(default, skip_serializing_if = "PaddingRows::is_unspecified")]
    pub padding_rows: PaddingRows,
    /// The dtype of the output, float16 or float32; requires pooling `none`. `None` for the dtype of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_dtype: Option<DType>,
    /// Whether the graph returns the embedding and the output of every layer too; requires pooling `none` and the last
    /// hidden layer.
    #[serde(default, skip_serializing_if = "is_false")]
    pub output_hidden_states: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// The hidden states at padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaddingRows {
    /// Values without meaning.
    #[default]
    Unspecified,
    /// Zeros.
    Zero,
    /// A learned vector, [`Options::padding_row`](crate::Options::padding_row).
    Learned,
}

impl PaddingRows {
    /// Whether the states at padding have no meaning.
    pub fn is_unspecified(&self) -> bool {
        *self == PaddingRows::Unspecified
    }
}

/// How the states of a source are pooled to one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// Not at all: every token keeps its own.
    #[default]
    None,
    /// The mean over tokens that are not padding.
    Mean,
    /// The state of the first token that is not padding.
    First,
    /// The state of the last token that is not padding.
    Last,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        let Task::FeatureExtraction(features) = self else { return Ok(()) };
        write!(f, " of hidden layer {}, pooling {}", features.hidden_layer, features.pooling)?;
        if features.normalize {
            f.write_str(", normalized")?;
        }
        if let Some(length) = features.fixed_length {
            write!(f, ", sources of length {length}")?;
        }
        match features.padding_rows {
            PaddingRows::Unspecified => {}
            PaddingRows::Zero => f.write_str(", zeros at padding")?,
            PaddingRows::Learned => f.write_str(", a learned vector at padding")?,
        }
        if let Some(dtype) = features.output_dtype {
            write!(f, ", output in {dtype}")?;
        }
        if features.output_hidden_states { f.write_str(", with all hidden states") } else { Ok(()) }
    }
}

impl Pooling {
    /// Every pooling.
    pub const ALL: [Pooling; 4] = [Pooling::None, Pooling::Mean, Pooling::First, Pooling::Last];

    /// The name on command lines and in a manifest.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::None => "none",
            Pooling::Mean => "mean",
            Pooling::First => "first",
            Pooling::Last => "last",
        }
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Default for Features {
    /// The last hidden states, unchanged.
    fn default() -> Features {
        Features {
            pooling: Pooling::None,
            normalize: false,
            hidden_layer: -1,
            fixed_length: None,
            padding_rows: PaddingRows::Unspecified,
            output_dtype: None,
            output_hidden_states: false,
        }
    }
}

impl Features {
    /// The number of layers that the states have passed, of an encoder with `all` layers; none if there are not as
    /// many.
    pub fn layers(&self, all: usize) -> Option<usize> {
        match usize::try_from(self.hidden_layer) {
            Ok(layer) => Some(layer).filter(|&layer| layer <= all),
            Err(_) => (all + 1).checked_sub(usize::try_from(self.hidden_layer.unsigned_abs()).ok()?),
        }
    }
}

impl Task {
    /// Every task, with default settings.
    pub fn all() -> [Task; 4] {
        let features = Task::FeatureExtraction(Features::default());
        [Task::Text2TextGeneration, features, Task::TextClassification, Task::TokenClassification]
    }

    /// Hugging Face's name.
    pub fn name(&self) -> &'static str {
        match self {
            Task::Text2TextGeneration => "text2text-generation",
            Task::FeatureExtraction(_) => "feature-extraction",
            Task::TextClassification => "text-classification",
            Task::TokenClassification => "token-classification",
        }
    }

    /// Whether a checkpoint that was made for the task `own` has what this one needs: every checkpoint has an encoder.
    pub fn suits(&self, own: &Task) -> bool {
        matches!(self, Task::FeatureExtraction(_)) || self.name() == own.name()
    }

    /// Whether this is generation, the task of a manifest that names none.
    pub fn is_generation(&self) -> bool {
        *self == Task::Text2TextGeneration
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_layers_count_from_both_ends() {
        for (hidden_layer, layers) in
            [(0, Some(0)), (3, Some(3)), (4, None), (-1, Some(3)), (-4, Some(0)), (-5, None), (i64::MIN, None)]
        {
            assert_eq!(Features { hidden_layer, ..Features::default() }.layers(3), layers, "{hidden_layer}");
        }
    }

    #[test]
    fn tasks_survive_json() {
        for task in Task::all() {
            let text = serde_json::to_string(&task).expect("a task is an object");
            assert!(text.starts_with(&format!("{{\"name\":\"{}\"", task.name())), "{text}");
            assert_eq!(serde_json::from_str::<Task>(&text).expect("reads what was written"), task);
        }
        let features = Features {
            fixed_length: Some(256),
            padding_rows: PaddingRows::Learned,
            output_dtype: Some(DType::Float16),
            output_hidden_states: true,
            ..Features::default()
        };
        let task = Task::FeatureExtraction(features);
        let text = serde_json::to_string(&task).expect("a task is an object");
        assert_eq!(serde_json::from_str::<Task>(&text).expect("reads what was written"), task);
        // Manifests of exports without these options have no fields for them.
        let text = serde_json::to_string(&Task::FeatureExtraction(Features::default())).expect("a task is an object");
        assert!(!text.contains("padding") && !text.contains("output"), "{text}");
    }
}
