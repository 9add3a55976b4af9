//! Configurations that cannot be adapted.

use serde_json::{Value, json};

use super::super::{check_all, set};
use super::Sources;

/// The fixture, the file that is changed, the field and its value, and what is said.
type FieldCase = (&'static str, &'static str, &'static str, fn() -> Value, &'static [&'static str]);

#[test]
fn configurations_that_cannot_be_adapted_are_refused() {
    const DECODER: &str = "decoder/config.json";
    const ENCODER: &str = "encoder/config.json";
    let cases: &[FieldCase] = &[
        (
            "balanced",
            ENCODER,
            "model_type",
            || json!("gemma"),
            &["encoder: ", "model_type: expected \"gemma2\", found \"gemma\" (Gemma 1"],
        ),
        (
            "balanced",
            DECODER,
            "model_type",
            || json!("gemma3"),
            &[
                "encoder: ",
                "model_type: expected \"gemma3_text\" or \"gemma3\", as on the other side, found \"gemma2\"",
            ],
        ),
        (
            "balanced",
            ENCODER,
            "model_type",
            || json!("t5gemma"),
            &["found \"t5gemma\" (it is an encoder-decoder already)"],
        ),
        ("balanced", ENCODER, "model_type", || json!(null), &["model_type: expected \"gemma2\", found null"]),
        (
            "balanced",
            DECODER,
            "quantization_config",
            || json!({"quant_method": "gptq"}),
            &["decoder: ", "quantization_config: expected null", "gptq"],
        ),
        (
            "balanced",
            ENCODER,
            "rope_parameters",
            || json!({"rope_type": "yarn", "factor": 2.0}),
            &["encoder: ", "rope_parameters.rope_type: expected \"default\", found \"yarn\""],
        ),
        (
            "unbalanced",
            ENCODER,
            "rope_scaling",
            || json!({"type": "linear"}),
            &["rope_scaling.type: expected \"default\", found \"linear\""],
        ),
        (
            "balanced",
            DECODER,
            "rope_parameters",
            || json!({"full_attention": {"rope_type": "default"}}),
            &["rope_parameters.full_attention: expected nothing"],
        ),
        (
            "balanced",
            DECODER,
            "hidden_activation",
            || json!("silu"),
            &["decoder: ", "hidden_activation: expected \"gelu_pytorch_tanh\", found \"silu\""],
        ),
        (
            "balanced",
            ENCODER,
            "layer_types",
            || json!(["full_attention"]),
            &["layer_types: expected one entry per layer (num_hidden_layers is 3), found 1 entries"],
        ),
        (
            "balanced",
            ENCODER,
            "layer_types",
            || json!(["full_attention", "chunked_attention", "full_attention"]),
            &["layer_types: expected a list of", "chunked_attention"],
        ),
        (
            "untied",
            DECODER,
            "num_attention_heads",
            || json!(3),
            &["decoder: ", "hidden_size: expected a multiple of num_attention_heads (3), found 32"],
        ),
        (
            "balanced",
            DECODER,
            "num_key_value_heads",
            || json!(3),
            &["num_key_value_heads: expected a divisor of num_attention_heads (4), found 3"],
        ),
        (
            "balanced",
            ENCODER,
            "head_dim",
            || json!(11),
            &["encoder: ", "head_dim: expected an even number (rotary halves), found 11"],
        ),
        (
            "balanced",
            ENCODER,
            "hidden_size",
            || json!(0),
            &["hidden_size: expected an integer between 1 and 2147483647, found 0"],
        ),
        (
            "balanced",
            ENCODER,
            "hidden_size",
            || json!(null),
            &["hidden_size: expected an integer between 1 and 2147483647, found null"],
        ),
        (
            "balanced",
            DECODER,
            "num_hidden_layers",
            || json!(2_000_000_000),
            &["num_hidden_layers: expected at most 4096, found 2000000000"],
        ),
        (
            "balanced",
            DECODER,
            "num_hidden_layers",
            || json!("3"),
            &["num_hidden_layers: expected an integer", "found \"3\""],
        ),
        (
            "balanced",
            DECODER,
            "attn_logit_softcapping",
            || json!(-1.0),
            &["attn_logit_softcapping: expected a positive number or null, found -1.0"],
        ),
        (
            "balanced",
            DECODER,
            "attention_bias",
            || json!("no"),
            &["attention_bias: expected true or false, found \"no\""],
        ),
        (
            "balanced",
            DECODER,
            "initializer_range",
            || json!(-0.02),
            &["initializer_range: expected a number of at least 0, found -0.02"],
        ),
        (
            "balanced",
            DECODER,
            "sliding_window",
            || json!(null),
            &["sliding_window: expected a window for the layers of sliding_attention, found null"],
        ),
        (
            "balanced",
            DECODER,
            "use_bidirectional_attention",
            || json!("all"),
            &["decoder: ", "use_bidirectional_attention: expected false or null", "found \"all\""],
        ),
        (
            "balanced",
            DECODER,
            "vocab_size",
            || json!(85),
            &["decoder: model.embed_tokens.weight: expected shape [85, 32], found [84, 32]"],
        ),
        (
            "balanced",
            ENCODER,
            "attention_bias",
            || json!(true),
            &["encoder: model.layers.0.self_attn.q_proj.bias: missing (expected shape [48])"],
        ),
        ("balanced", ENCODER, "num_hidden_layers", || json!(2), &["layer_types: expected one entry per layer"]),
        (
            "unbalanced",
            ENCODER,
            "num_hidden_layers",
            || json!(3),
            &[
                "encoder: model.layers.3.input_layernorm.weight: expected no tensor of this name, found one of shape [48]",
            ],
        ),
        (
            "balanced",
            "decoder/generation_config.json",
            "bos_token_id",
            || json!("<bos>"),
            &["bos_token_id: expected a token id, found \"<bos>\""],
        ),
        (
            "balanced",
            "decoder/generation_config.json",
            "eos_token_id",
            || json!([1, -1]),
            &["eos_token_id: expected a token id or a list of them, found [1,-1]"],
        ),
        (
            "balanced",
            "decoder/tokenizer.json",
            "stub",
            || json!("another"),
            &[
                "tokenizer.json: expected the same in both checkpoints",
                "(encoder)",
                "(decoder)",
                "choose one with --tokenizer-from",
            ],
        ),
    ];
    check_all(
        cases,
        |(_, _, field, ..)| field,
        |(name, file, field, value, says)| {
            let sources = Sources::of(name);
            set(sources.scratch.path(), file, &[(&format!("/{field}"), value())]);
            sources.refuse(&[], says)
        },
    );
}
