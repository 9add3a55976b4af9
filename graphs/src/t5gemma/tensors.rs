//! The names of a T5Gemma checkpoint's tensors.

use crate::tensors::{Role, Tensors};

pub const ENCODER_EMBEDDING: &str = "model.encoder.embed_tokens.weight";
const EMBEDDING: &str = "model.decoder.embed_tokens.weight";
const HEAD: &str = "lm_head.out_proj.weight";

pub static TENSORS: Tensors = Tensors {
    encoder_embedding: &[ENCODER_EMBEDDING],
    decoder_embedding: &[EMBEDDING, HEAD],
    head: &[HEAD, EMBEDDING],
    end_of_image: None,
    vision: &[],
    decoder_norm: "model.decoder.norm.weight",
    stacks: &[
        "encoder.layers.",
        "decoder.layers.",
        "encoder.embed_tokens.",
        "decoder.embed_tokens.",
        "encoder.norm.",
        "decoder.norm.",
    ],
    role,
};

/// What a tensor is for. Only the beginning and the block of a name count, so that the name of an initializer, which
/// may have a suffix, will do.
pub fn role(tensor: &str) -> Option<Role> {
    let reads_source = || ["k_proj", "v_proj"].iter().any(|part| tensor.contains(&format!(".cross_attn.{part}.")));
    match tensor {
        _ if tensor.starts_with("model.encoder.embed_tokens") => Some(Role::EncoderEmbedding),
        _ if tensor.starts_with("model.encoder.") => Some(Role::Encoder),
        _ if tensor.starts_with("model.decoder.embed_tokens") => Some(Role::DecoderEmbedding),
        _ if tensor.starts_with("model.decoder.") && reads_source() => Some(Role::CrossKeyValue),
        _ if tensor.starts_with("model.decoder.") => Some(Role::Decoder),
        _ if tensor.starts_with("lm_head.") => Some(Role::Head),
        _ if tensor.starts_with("score.") => Some(Role::Classifier),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_has_the_role_of_its_block() {
        for (tensor, expected) in [
            ("model.encoder.embed_tokens.weight", Some(Role::EncoderEmbedding)),
            ("model.encoder.layers.0.self_attn.k_proj.weight", Some(Role::Encoder)),
            ("model.encoder.norm.weight", Some(Role::Encoder)),
            ("model.decoder.embed_tokens.weight", Some(Role::DecoderEmbedding)),
            ("model.decoder.layers.0.self_attn.k_proj.weight", Some(Role::Decoder)),
            ("model.decoder.layers.0.cross_attn.q_proj.weight", Some(Role::Decoder)),
            ("model.decoder.layers.0.cross_attn.k_proj.weight", Some(Role::CrossKeyValue)),
            ("model.decoder.layers.11.cross_attn.v_proj.bias", Some(Role::CrossKeyValue)),
            ("model.decoder.layers.0.cross_attn.v_proj.weight.int8", Some(Role::CrossKeyValue)),
            ("model.decoder.norm.weight.one_plus", Some(Role::Decoder)),
            ("lm_head.out_proj.weight", Some(Role::Head)),
            ("score.out_proj.bias", Some(Role::Classifier)),
            ("spiece_model", None),
        ] {
            assert_eq!(role(tensor), expected, "{tensor}");
        }
    }
}
