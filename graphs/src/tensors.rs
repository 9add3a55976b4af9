//! The names of a family's tensors, and their roles.

use serde::{Deserialize, Serialize};

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Looked up by source tokens.
    EncoderEmbedding,
    /// The encoder's layers and final norm.
    Encoder,
    /// Looked up by target tokens.
    DecoderEmbedding,
    /// The decoder's layers and final norm, but for those of [`Role::CrossKeyValue`].
    Decoder,
    /// A decoder's weight that is multiplied with the hidden states of the source rather than with states of the
    /// target.
    CrossKeyValue,
    /// Multiplied with the last hidden state, for logits. A table that is both this and the decoder's embedding is
    /// this.
    Head,
    /// Multiplied with hidden states, for the scores of labels.
    Classifier,
    /// The tower that reads images, and what projects its output to the encoder's width.
    Vision,
}

/// Levels of module names, each with the one above it, that transformers' classes have and [`Tensors`] leave out. Some
/// files have them in the names of tensors, others do not.
pub const LEVELS: [(&str, &str); 2] = [("encoder", "text_model"), ("vision_tower", "vision_model")];

/// A name without [`LEVELS`].
pub fn without_levels(name: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for part in name.split('.') {
        let above = kept.last().copied();
        if !LEVELS.iter().any(|(parent, level)| *level == part && above == Some(*parent)) {
            kept.push(part);
        }
    }
    kept.join(".")
}

/// The names of a family's tensors.
#[derive(Debug)]
pub struct Tensors {
    /// The encoder's embedding, `[vocab_size, hidden_size]`: first its own name, then the tensors that stand for it, in
    /// this order, where embeddings are tied and it is not stored.
    pub encoder_embedding: &'static [&'static str],
    /// The decoder's embedding, `[vocab_size, hidden_size]`: as for the encoder's.
    pub decoder_embedding: &'static [&'static str],
    /// The output head, `[vocab_size, hidden_size]`: as for the embedding.
    pub head: &'static [&'static str],
    /// The vectors of the token behind an image, `[hidden_size]`, of the encoder and of the decoder; each stands for the
    /// other where it is not stored.
    pub end_of_image: Option<[&'static str; 2]>,
    /// What the names of the tensors that read images begin with; nothing else has such names.
    pub vision: &'static [&'static str],
    /// The norm behind the decoder's last layer, `[hidden_size]`.
    pub decoder_norm: &'static str,
    /// What the names of both stacks' tensors begin with. The classes with a head put `model.` before it.
    pub stacks: &'static [&'static str],
    /// What a tensor is for, by its name in the classes with a head; none if the family has no such tensor.
    pub role: fn(&str) -> Option<Role>,
}
