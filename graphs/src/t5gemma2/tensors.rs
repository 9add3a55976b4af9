//! The names of a T5Gemma 2 checkpoint's tensors, as the published files have them, but for `vision_model.`, which files
//! of transformers 5 leave out.

use crate::tensors::{Role, Tensors};

const ENCODER_EMBEDDING: &str = "model.encoder.embed_tokens.weight";
const DECODER_EMBEDDING: &str = "model.decoder.embed_tokens.weight";
const HEAD: &str = "lm_head.out_proj.weight";

pub static TENSORS: Tensors = Tensors {
    encoder_embedding: &[ENCODER_EMBEDDING, HEAD, DECODER_EMBEDDING],
    decoder_embedding: &[DECODER_EMBEDDING, ENCODER_EMBEDDING, HEAD],
    head: &[HEAD, ENCODER_EMBEDDING, DECODER_EMBEDDING],
    end_of_image: Some(["model.encoder.embed_tokens.eoi_embedding", "model.decoder.embed_tokens.eoi_embedding"]),
    vision: &["model.encoder.vision_tower.", "model.encoder.multi_modal_projector."],
    decoder_norm: "model.decoder.norm.weight",
    stacks: &[
        "encoder.layers.",
        "decoder.layers.",
        "encoder.embed_tokens.",
        "decoder.embed_tokens.",
        "encoder.norm.",
        "decoder.norm.",
        "encoder.text_model.",
        "encoder.vision_tower.",
        "encoder.multi_modal_projector.",
    ],
    role,
};

/// What a tensor is for. Only the beginning and the block of a name count, so that the name of an initializer, which
/// may have a suffix, will do. Keys and values of the source are made by the weights that make those of the target.
pub fn role(tensor: &str) -> Option<Role> {
    match tensor {
        _ if tensor.starts_with("model.encoder.embed_tokens") => Some(Role::EncoderEmbedding),
        _ if TENSORS.vision.iter().any(|start| tensor.starts_with(start)) => Some(Role::Vision),
        _ if tensor.starts_with("model.encoder.") => Some(Role::Encoder),
        _ if tensor.starts_with("model.decoder.embed_tokens") => Some(Role::DecoderEmbedding),
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
            ("model.encoder.embed_tokens.eoi_embedding", Some(Role::EncoderEmbedding)),
            ("model.encoder.layers.0.self_attn.q_norm.weight.one_plus", Some(Role::Encoder)),
            ("model.encoder.vision_tower.encoder.layers.0.mlp.fc1.weight", Some(Role::Vision)),
            ("model.encoder.multi_modal_projector.mm_input_projection_weight", Some(Role::Vision)),
            ("model.decoder.layers.0.self_attn.k_proj.weight", Some(Role::Decoder)),
            ("model.decoder.embed_tokens.eoi_embedding", Some(Role::DecoderEmbedding)),
            ("lm_head.out_proj.weight", Some(Role::Head)),
            ("score.out_proj.weight", Some(Role::Classifier)),
            ("spiece_model", None),
        ] {
            assert_eq!(role(tensor), expected, "{tensor}");
        }
    }
}
