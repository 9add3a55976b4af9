//! Which matrices are quantized, and how: plain data, decided by the exporter and recorded in the manifest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::onnx::Blocks;
use crate::tensors::Role;

/// How the matrices of each part of the model are quantized; those without a format are not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// The encoder's layers and its embedding.
    pub encoder: Option<Blocks>,
    /// The decoder's layers.
    pub decoder: Option<Blocks>,
    /// The output head and the decoder's embedding.
    pub head: Option<Blocks>,
    /// The layers of the vision tower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<Blocks>,
    /// Checkpoint names of matrices that are not quantized; `*` matches any text.
    pub exclude: Vec<String>,
}

impl Quantization {
    /// How the matrix that the checkpoint calls `name` is quantized, if it is.
    pub fn of(&self, name: &str, role: Option<Role>) -> Option<Blocks> {
        if self.exclude.iter().any(|pattern| matches(pattern, name)) {
            return None;
        }
        match role? {
            Role::Encoder | Role::EncoderEmbedding => self.encoder,
            Role::Decoder | Role::CrossKeyValue => self.decoder,
            Role::Head | Role::DecoderEmbedding => self.head,
            Role::Vision => self.vision,
            // A row for each label: nothing to save, and it decides the answer.
            Role::Classifier => None,
        }
    }

    /// The formats in use, one for each part of the model that is quantized.
    pub fn formats(&self) -> impl Iterator<Item = Blocks> {
        [self.encoder, self.decoder, self.head, self.vision].into_iter().flatten()
    }

    /// Whether any part of the model is quantized.
    pub fn is_any(&self) -> bool {
        self.formats().next().is_some()
    }
}

/// What is known of the activations that matrices are multiplied with, and what is done to them.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Activations {
    /// Nothing is known, and nothing done.
    #[default]
    Unknown,
    /// Their ranges are an output of the graphs: see [`activation_ranges`](crate::interface::activation_ranges).
    Observed,
    /// Their ranges, by the checkpoint's name of the matrix. They are quantized to 8 bits where the matrix is.
    Ranges(BTreeMap<String, f32>),
}

/// Whether `pattern`, in which `*` matches any text, matches the whole `name`.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_matches_any_text() {
        let cases = [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*.down_proj.weight", "model.decoder.layers.3.mlp.down_proj.weight", true),
            ("model.*.layers.0.*", "model.encoder.layers.0.mlp.up_proj.weight", true),
            ("model.*.layers.0.*", "model.encoder.layers.10.mlp.up_proj.weight", false),
            ("*", "", true),
            ("a*a", "a", false),
            ("a*b*c", "axxbyyc", true),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(matches(pattern, name), expected, "{pattern} on {name}");
        }
    }

    #[test]
    fn a_matrix_is_quantized_as_its_part_of_the_model() {
        let blocks = |bits| Some(Blocks::integer(bits, 32));
        let quantization = Quantization {
            encoder: blocks(8),
            decoder: blocks(4),
            exclude: vec!["*.layers.0.*".into()],
            ..Quantization::default()
        };
        let of = |quantization: &Quantization, name: &str, role| quantization.of(name, Some(role));
        assert_eq!(of(&quantization, "model.encoder.layers.1.mlp.up_proj.weight", Role::Encoder), blocks(8));
        assert_eq!(of(&quantization, "model.decoder.layers.1.mlp.up_proj.weight", Role::Decoder), blocks(4));
        assert_eq!(of(&quantization, "model.decoder.layers.0.mlp.up_proj.weight", Role::Decoder), None);
        assert_eq!(of(&quantization, "model.decoder.embed_tokens.weight", Role::DecoderEmbedding), None);
        let quantization = Quantization { head: blocks(8), ..quantization };
        assert_eq!(of(&quantization, "model.decoder.embed_tokens.weight", Role::DecoderEmbedding), blocks(8));
        assert_eq!(of(&quantization, "score.out_proj.weight", Role::Classifier), None);
        let tower = "model.encoder.vision_tower.encoder.layers.1.mlp.fc1.weight";
        assert_eq!(of(&quantization, tower, Role::Vision), None);
        assert_eq!(of(&Quantization { vision: blocks(8), ..quantization }, tower, Role::Vision), blocks(8));
    }
}
