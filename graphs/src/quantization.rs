//! Which matrices are held in few bits: plain data, decided by the exporter and recorded in the manifest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::onnx::Blocks;
use crate::tensors::Role;

/// How the matrices of each part are held; none as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// The encoder's layers and its embedding.
    pub encoder: Option<Blocks>,
    /// The decoder's layers.
    pub decoder: Option<Blocks>,
    /// The output head, and the decoder's embedding where the head is tied to it.
    pub head: Option<Blocks>,
    /// Checkpoint names of matrices that are left as they are; `*` stands for any text.
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
            // A row for each label: nothing to save, and it decides the answer.
            Role::Classifier => None,
        }
    }

    /// How the parts are held that are held in few bits.
    pub fn parts(&self) -> impl Iterator<Item = Blocks> {
        [self.encoder, self.decoder, self.head].into_iter().flatten()
    }

    /// Whether anything may be held in few bits.
    pub fn is_any(&self) -> bool {
        self.parts().next().is_some()
    }
}

/// What is known of the numbers that matrices are multiplied with.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Activations {
    /// Nothing: they are as they come.
    #[default]
    Unknown,
    /// How large they become is to be told: [`ACTIVATION_RANGES`](crate::interface::ACTIVATION_RANGES).
    Observed,
    /// How large they become, by the checkpoint's name of the matrix. They are rounded to 8 bits where the matrix is.
    Ranges(BTreeMap<String, f32>),
}

/// Whether `pattern`, in which `*` stands for any text, describes all of `name`.
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
    fn a_star_stands_for_any_text() {
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
    fn a_matrix_is_held_as_its_part_is() {
        let blocks = |bits| Some(Blocks::whole(bits, 32));
        let quantization =
            Quantization { encoder: blocks(8), decoder: blocks(4), head: None, exclude: vec!["*.layers.0.*".into()] };
        let of = |quantization: &Quantization, name: &str, role| quantization.of(name, Some(role));
        assert_eq!(of(&quantization, "model.encoder.layers.1.mlp.up_proj.weight", Role::Encoder), blocks(8));
        assert_eq!(of(&quantization, "model.decoder.layers.1.mlp.up_proj.weight", Role::Decoder), blocks(4));
        assert_eq!(of(&quantization, "model.decoder.layers.0.mlp.up_proj.weight", Role::Decoder), None);
        assert_eq!(of(&quantization, "model.decoder.embed_tokens.weight", Role::DecoderEmbedding), None);
        let quantization = Quantization { head: blocks(8), ..quantization };
        assert_eq!(of(&quantization, "model.decoder.embed_tokens.weight", Role::DecoderEmbedding), blocks(8));
        assert_eq!(of(&quantization, "score.out_proj.weight", Role::Classifier), None);
    }
}
