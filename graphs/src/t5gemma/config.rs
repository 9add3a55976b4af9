//! Reads a T5Gemma `config.json`, in both layouts that Hugging Face writes: that of transformers 4.53 (the official
//! checkpoints: flat `rope_theta`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`, token ids in
//! each stack).

use serde_json::Value;

use crate::config::{
    Architecture, Classifier, Config, ConfigError, Custom, Family, Fields, IS_CAUSAL, MOST_HEAD_DIM, MOST_LAYERS,
    PER_LAYER_CONFIG, QUANTIZATION_CONFIG, Refused, Rope, Stack, TRANSFORMERS_WEIGHTS, TokenIds, is_empty,
};

/// Fields that change what transformers computes without the model's own code reading them.
const REFUSED: &[Refused] = &[QUANTIZATION_CONFIG, PER_LAYER_CONFIG, TRANSFORMERS_WEIGHTS];
/// See [`REFUSED`].
const REFUSED_IN_ENCODER: &[Refused] = &[QUANTIZATION_CONFIG, PER_LAYER_CONFIG];
/// See [`REFUSED`].
const REFUSED_IN_DECODER: &[Refused] = &[QUANTIZATION_CONFIG, PER_LAYER_CONFIG, IS_CAUSAL, KV_SHARING_MODES];

const KV_SHARING_MODES: Refused = Refused {
    field: "kv_sharing_modes",
    expected: "null (every layer has keys and values of its own)",
    accepts: Value::is_null,
};

/// Reads a document whose `model_type` has been taken. Defaults are those of transformers.
pub fn parse(mut top: Fields) -> Result<Config, ConfigError> {
    let family = Family::T5Gemma;
    let architecture = top.architecture(family)?;
    let is_encoder_decoder = top.is_encoder_decoder(family, architecture)?;

    let encoder = parse_stack(&mut top, "encoder")?;
    let decoder = parse_stack(&mut top, "decoder")?;
    let classifier = match architecture {
        Architecture::SequenceClassification | Architecture::TokenClassification => Some(Classifier {
            is_encoder_decoder,
            labels: top.labels()?,
            problem_type: top.problem_type()?,
            decoder_start: decoder.bos.unwrap_or(2),
            decoder_pad: decoder.pad.unwrap_or(0),
        }),
        _ => None,
    };
    let tie_word_embeddings = top.boolean("tie_word_embeddings")?.unwrap_or(true);
    let tokens = TokenIds {
        bos: top.token("bos_token_id")?.or(decoder.bos).or(Some(2)),
        eos: top.tokens("eos_token_id")?.or(decoder.eos).unwrap_or_else(|| vec![1]),
        pad: top.padding()?.or(decoder.pad).or(Some(0)),
    };
    // The stacks' own sizes decide; the top-level copy is informative in every layout.
    top.size("vocab_size")?;
    top.refuse(REFUSED)?;
    let (mut of_encoder, mut of_decoder) = (encoder.fields, decoder.fields);
    of_decoder.refuse(REFUSED_IN_DECODER)?;
    of_encoder.refuse(REFUSED_IN_ENCODER)?;
    let mut generation = of_decoder.generation_settings();
    generation.extend(top.generation_settings());
    let mut ignored = [of_decoder, of_encoder, top].map(|fields| fields.without_effect()).concat();
    ignored.sort();
    Ok(Config {
        family,
        encoder: encoder.stack,
        decoder: decoder.stack,
        merged_attention: false,
        tie_word_embeddings,
        tokens,
        architecture,
        classifier,
        vision: None,
        end_of_image: None,
        custom: Custom::default(),
        generation,
        ignored,
    })
}

/// A stack, with the token ids that transformers 5 repeats in it.
struct ParsedStack {
    stack: Stack,
    bos: Option<i64>,
    eos: Option<Vec<i64>>,
    pad: Option<i64>,
    /// What has not been taken.
    fields: Fields,
}

fn parse_stack(top: &mut Fields, name: &str) -> Result<ParsedStack, ConfigError> {
    let Some(value) = top.remove(name) else {
        return Err(top.error(name, format!("the settings of the {name}"), "nothing"));
    };
    let mut fields = Fields::of(&top.path_of(name), value)?;
    // transformers reads either object as a T5Gemma stack, whatever it calls itself.
    if fields.get("model_type").is_some_and(|kind| kind == "t5_gemma_module") {
        fields.remove("model_type");
    }
    fields.expect("hidden_activation", "\"gelu_pytorch_tanh\"", |value| value == "gelu_pytorch_tanh")?;

    let num_hidden_layers = fields.size_up_to(MOST_LAYERS, "num_hidden_layers")?.unwrap_or(26);
    let has_no_window = fields.get("sliding_window").is_some_and(Value::is_null);
    let sliding_window = fields.size("sliding_window")?;
    let rope = Rope { theta: rope_theta(&mut fields)?, factor: 1.0 };
    let stack = Stack {
        vocab_size: fields.size("vocab_size")?.unwrap_or(256_000),
        hidden_size: fields.size("hidden_size")?.unwrap_or(2304),
        intermediate_size: fields.size("intermediate_size")?.unwrap_or(9216),
        num_attention_heads: fields.size("num_attention_heads")?.unwrap_or(8),
        num_key_value_heads: fields.size("num_key_value_heads")?.unwrap_or(4),
        head_dim: fields.size_up_to(MOST_HEAD_DIM, "head_dim")?.unwrap_or(256),
        query_pre_attn_scalar: fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
        attn_logit_softcapping: fields.softcap("attn_logit_softcapping", 50.0)?,
        final_logit_softcapping: fields.softcap("final_logit_softcapping", 30.0)?,
        attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
        rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
        qk_norm: false,
        full_rope: rope,
        sliding_rope: rope,
        max_position_embeddings: fields.size("max_position_embeddings")?.unwrap_or(8192),
        // By default, every other layer has a window, from the first on.
        layers: fields.layer_types(num_hidden_layers, sliding_window.unwrap_or(4096), |layer| layer % 2 == 1)?,
    };
    fields.check_heads(&stack)?;
    if has_no_window && stack.layers.iter().any(|layer| layer.window().is_some()) {
        return Err(fields.error("sliding_window", "a window for the layers of sliding_attention", "null"));
    }
    let (bos, pad) = (fields.token("bos_token_id")?, fields.padding()?);
    let eos = fields.tokens("eos_token_id")?;
    Ok(ParsedStack { stack, bos, eos, pad, fields })
}

/// The base of the rotary frequencies: that of `rope_scaling` (the older name) or `rope_parameters`, otherwise the flat
/// one.
fn rope_theta(fields: &mut Fields) -> Result<f64, ConfigError> {
    let flat = fields.positive("rope_theta")?;
    let objects = ["rope_scaling", "rope_parameters"].map(|name| (name, fields.remove(name)));
    let is_given = |value: &Value| !value.is_null() && !is_empty(value);
    let mut given = objects.into_iter().filter_map(|(name, value)| Some((name, value.filter(is_given)?)));
    let Some((name, value)) = given.next() else { return Ok(flat.unwrap_or(10_000.0)) };
    given.for_each(|(name, _)| fields.ignore(name));
    let mut rope = Fields::of(&fields.path_of(name), value)?;
    let type_field = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    rope.expect(type_field, "\"default\"", |value| value == "default")?;
    rope.remove("type");
    for layers in ["full_attention", "sliding_attention"] {
        rope.expect(layers, "nothing (all layers of a stack have the same rotary positions)", |_| false)?;
    }
    let theta = rope.positive("rope_theta")?.or(flat).unwrap_or(10_000.0);
    rope.rest().for_each(|field| fields.ignore(format!("{name}.{field}")));
    Ok(theta)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::LayerType;
    use serde_json::json;

    fn minimal() -> Value {
        json!({
            "model_type": "t5gemma",
            "encoder": {"num_hidden_layers": 2, "sliding_window": 3},
            "decoder": {"num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        })
    }

    #[test]
    fn missing_fields_take_the_documented_defaults() {
        let config = Config::parse(&minimal().to_string()).expect("a minimal config is valid");
        assert_eq!(config.encoder.layers, [LayerType::Sliding(3), LayerType::Full]);
        assert_eq!(config.decoder.layers[2], LayerType::Sliding(4096));
        assert_eq!(config.decoder.attn_logit_softcapping, Some(50.0));
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn null_switches_a_softcap_off() {
        let mut json = minimal();
        json["decoder"]["attn_logit_softcapping"] = Value::Null;
        let config = Config::parse(&json.to_string()).expect("null is allowed");
        assert_eq!(config.decoder.attn_logit_softcapping, None);
        assert_eq!(config.encoder.attn_logit_softcapping, Some(50.0));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            ("/encoder/hidden_activation", json!("silu"), "encoder.hidden_activation"),
            ("/decoder/rope_scaling", json!({"type": "linear"}), "decoder.rope_scaling.type"),
            ("/decoder/rope_parameters", json!({"rope_type": "yarn"}), "decoder.rope_parameters.rope_type"),
            ("/decoder/num_key_value_heads", json!(3), "decoder.num_key_value_heads"),
            ("/decoder/layer_types", json!(["full_attention"]), "decoder.layer_types"),
            ("/encoder/hidden_size", json!("wide"), "encoder.hidden_size"),
            ("/encoder/hidden_size", json!(0), "encoder.hidden_size"),
            ("/encoder/head_dim", json!(7), "encoder.head_dim"),
            ("/encoder/head_dim", json!(2_147_483_646), "encoder.head_dim"),
            ("/decoder/num_hidden_layers", json!(2_147_483_647), "decoder.num_hidden_layers"),
            ("/decoder/rope_scaling", json!({"rope_type": "linear", "factor": 1.0}), "decoder.rope_scaling.rope_type"),
            ("/decoder/rope_parameters", json!({"type": "yarn"}), "decoder.rope_parameters.type"),
            (
                "/decoder/rope_parameters",
                json!({"sliding_attention": {"rope_type": "default"}}),
                "decoder.rope_parameters.sliding_attention",
            ),
            ("/encoder/sliding_window", Value::Null, "encoder.sliding_window"),
            ("/encoder/per_layer_config", json!({"0": {"head_dim": 8}}), "encoder.per_layer_config"),
            ("/decoder/is_causal", json!(false), "decoder.is_causal"),
            ("/quantization_config", json!({"quant_method": "bitsandbytes"}), "quantization_config"),
            ("/transformers_weights", json!("other.safetensors"), "transformers_weights"),
            ("/architectures", json!("T5GemmaModel"), "architectures"),
            ("/architectures", json!(["T5GemmaEncoderModel", "T5GemmaModel"]), "architectures"),
            ("/encoder/rms_norm_eps", json!("NaN"), "encoder.rms_norm_eps"),
            ("/encoder", json!([]), "encoder"),
        ];
        check_refused(minimal, &cases);
    }

    #[test]
    fn fields_that_transformers_does_not_read_are_listed() {
        let cases = [
            ("/num_beams", json!(4), Some("num_beams")),
            ("/task_specific_params", json!({"summarization": {"max_length": 200}}), Some("task_specific_params")),
            ("/auto_map", json!({"AutoModel": "x.Y"}), Some("auto_map")),
            ("/_attn_implementation", json!("eager"), Some("_attn_implementation")),
            ("/transformers.js_config", json!({"dtype": "q4"}), Some("transformers.js_config")),
            ("/is_encoder_decoder", json!(false), Some("is_encoder_decoder")),
            ("/architectures", json!(["MyT5GemmaForConditionalGeneration"]), Some("architectures")),
            ("/architectures", json!(["PeftModelForSeq2SeqLM"]), Some("architectures")),
            ("/architectures", json!([]), None),
            ("/quantization_config", Value::Null, None),
            ("/torch_dtype", json!("bfloat16"), None),
            ("/is_decoder", json!(false), None),
            ("/problem_type", json!("riddle"), None),
            ("/pad_token_id", json!(-1), Some("pad_token_id")),
            ("/encoder/qk_norm", json!(true), Some("encoder.qk_norm")),
            ("/encoder/model_type", json!("gemma2"), Some("encoder.model_type")),
            ("/encoder/is_decoder", json!(true), None),
            ("/encoder/is_causal", json!(false), Some("encoder.is_causal")),
            ("/encoder/rope_scaling", json!({}), None),
            ("/encoder/rope_parameters", json!({"type": "default", "rope_theta": 9.0}), None),
            ("/encoder/rope_parameters", json!({"factor": 2.0}), Some("encoder.rope_parameters.factor")),
            ("/decoder/pad_token_id", json!(-1), Some("decoder.pad_token_id")),
        ];
        for (pointer, value, ignored) in cases {
            let mut json = minimal();
            let (parent, key) = pointer.rsplit_once('/').expect("pointers start with a slash");
            json.pointer_mut(parent).expect("the parent exists")[key] = value;
            let config = Config::parse(&json.to_string()).unwrap_or_else(|error| panic!("{pointer}: {error}"));
            assert_eq!(config.ignored, ignored.into_iter().map(str::to_string).collect::<Vec<_>>(), "{pointer}");
        }
        let mut json = minimal();
        json["x".repeat(1000)] = json!(1);
        let config = Config::parse(&json.to_string()).expect("a long name is a name");
        assert!(config.ignored[0].chars().count() < 100);
    }

    #[test]
    fn the_rotary_base_is_where_transformers_finds_it() {
        for (changes, theta) in [
            (json!({"rope_theta": 3.0}), 3.0),
            (json!({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}), 5.0),
            (json!({"rope_theta": 3.0, "rope_parameters": {}}), 3.0),
            (json!({"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}), 7.0),
            (json!({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}}), 10_000.0),
        ] {
            let mut json = minimal();
            json["decoder"].as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            assert_eq!(Config::parse(&json.to_string()).expect("valid").decoder.full_rope.theta, theta, "{changes}");
        }
    }

    #[test]
    fn training_fields_may_be_no_numbers() {
        let text = minimal().to_string().replacen("{", "\u{feff}{\"initializer_range\": NaN, \"loss\": -Infinity,", 1);
        let config = Config::parse(&text).expect("as Python writes it");
        assert_eq!(config.ignored, ["loss"]);
    }

    #[test]
    fn settings_for_generation_are_kept_as_transformers_keeps_them() {
        let mut json = minimal();
        json["decoder_start_token_id"] = json!(7);
        json["max_length"] = json!(128);
        json["decoder"]["decoder_start_token_id"] = json!(5);
        json["decoder"]["stop_strings"] = json!(["x"]);
        json["encoder"]["min_p"] = json!(0.5);
        let config = Config::parse(&json.to_string()).expect("valid");
        let expected = json!({"decoder_start_token_id": 7, "stop_strings": ["x"]});
        assert_eq!(Value::Object(config.generation), expected);
    }

    #[test]
    fn classifiers_name_their_labels() {
        let classifier = |changes: Value| {
            let mut json = minimal();
            json["architectures"] = json!(["T5GemmaForSequenceClassification"]);
            json.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            Config::parse(&json.to_string()).map(|config| config.classifier.expect("a classifier").labels)
        };
        for (changes, labels) in [
            (json!({}), vec!["LABEL_0", "LABEL_1"]),
            (json!({"num_labels": 3}), vec!["LABEL_0", "LABEL_1", "LABEL_2"]),
            (json!({"id2label": {"1": "no", "0": "yes"}}), vec!["yes", "no"]),
        ] {
            assert_eq!(classifier(changes).expect("well-formed"), labels);
        }
        for (changes, field) in [
            (json!({"id2label": {"1": "no"}}), "id2label"),
            (json!({"id2label": {}}), "id2label"),
            (json!({"id2label": {"0": "no"}, "num_labels": 2}), "num_labels"),
            (json!({"num_labels": 1_000_000}), "num_labels"),
            (json!({"problem_type": "riddle"}), "problem_type"),
        ] {
            assert_eq!(classifier(changes).expect_err(field).field, field);
        }
        let mut json = minimal();
        json["id2label"] = json!(7);
        Config::parse(&json.to_string()).expect("labels mean nothing to a generating model");
    }

    #[test]
    fn a_side_must_be_there() {
        let error = Config::parse(r#"{"model_type": "t5gemma", "encoder": {}}"#).expect_err("no decoder");
        assert_eq!(error.to_string(), "decoder: expected the settings of the decoder, found nothing");
    }

    /// Checks that each value at its place makes the configuration wrong, in the field named.
    pub fn check_refused(minimal: fn() -> Value, cases: &[(&str, Value, &str)]) {
        for (pointer, value, field) in cases {
            let mut json = minimal();
            let (parent, key) = pointer.rsplit_once('/').expect("pointers start with a slash");
            json.pointer_mut(parent).expect("the parent exists")[key] = value.clone();
            let error = Config::parse(&json.to_string()).expect_err(field);
            assert_eq!(error.field, *field, "{error}");
        }
    }
}
