//! Reads a T5Gemma 2 `config.json`, in every layout that transformers 5.24 reads: that of the published checkpoints,
//! that which it writes, and the older names of Gemma 3 (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
//! `sliding_window_pattern`).

use serde_json::Value;

use crate::config::{
    Architecture, Classifier, Config, ConfigError, Custom, Family, Fields, IS_CAUSAL, LayerType, MOST_HEAD_DIM,
    MOST_LAYERS, PER_LAYER_CONFIG, QUANTIZATION_CONFIG, Refused, Rope, Stack, TRANSFORMERS_WEIGHTS, TokenIds, Vision,
    is_empty,
};

/// Fields that change what transformers computes without the model's own code reading them.
const REFUSED: &[Refused] = &[QUANTIZATION_CONFIG, PER_LAYER_CONFIG, TRANSFORMERS_WEIGHTS];
/// See [`REFUSED`].
const REFUSED_IN_DECODER: &[Refused] = &[QUANTIZATION_CONFIG, PER_LAYER_CONFIG, IS_CAUSAL];
/// See [`REFUSED`].
const REFUSED_IN_ENCODER: &[Refused] = &[QUANTIZATION_CONFIG, PER_LAYER_CONFIG];

/// Fields without effect that the published checkpoints have.
const WITHOUT_EFFECT: &[&str] = &[
    "_sliding_window_pattern",
    "add_cross_attention",
    "architectures",
    "is_encoder_decoder",
    "model_type",
    "use_bidirectional_attention",
    "vocab_size",
];

/// Reads a document whose `model_type` has been taken. Defaults are those of transformers.
pub fn parse(mut top: Fields) -> Result<Config, ConfigError> {
    let family = Family::T5Gemma2;
    let architecture = top.architecture(family)?;
    top.is_encoder_decoder(family, architecture)?;

    let mut of_encoder = object(&mut top, "encoder")?;
    let text = parse_stack(object(&mut of_encoder, "text_config")?)?;
    let decoder = parse_stack(object(&mut top, "decoder")?)?;
    for (field, of_text, of_decoder) in [
        ("hidden_size", text.stack.hidden_size, decoder.stack.hidden_size),
        ("vocab_size", text.stack.vocab_size, decoder.stack.vocab_size),
    ] {
        if of_text != of_decoder {
            let expected = format!("{of_text}, as encoder.text_config has");
            return Err(decoder.fields.error(field, expected, of_decoder.to_string()));
        }
    }
    let classifier = match architecture {
        Architecture::SequenceClassification | Architecture::TokenClassification => Some(Classifier {
            // The classes have no other kind.
            is_encoder_decoder: true,
            labels: top.labels()?,
            problem_type: top.problem_type()?,
            decoder_start: decoder.bos.unwrap_or(2),
            decoder_pad: decoder.pad.unwrap_or(0),
        }),
        _ => None,
    };
    let (image_token, end_of_image) = image_tokens(&mut top, &mut of_encoder)?;
    let vision = vision(&mut of_encoder, image_token)?;
    let tie_word_embeddings = top.boolean("tie_word_embeddings")?.unwrap_or(true);
    let tokens = TokenIds {
        bos: top.token("bos_token_id")?.or(decoder.bos).or(Some(2)),
        eos: top.tokens("eos_token_id")?.or(decoder.eos).unwrap_or_else(|| vec![1]),
        pad: top.padding()?.or(decoder.pad).or(Some(0)),
    };
    top.size("vocab_size")?;
    top.refuse(REFUSED)?;
    let (mut of_text, mut of_decoder) = (text.fields, decoder.fields);
    of_decoder.refuse(REFUSED_IN_DECODER)?;
    of_text.refuse(REFUSED_IN_ENCODER)?;
    of_encoder.refuse(REFUSED_IN_ENCODER)?;
    let mut generation = of_decoder.generation_settings();
    generation.extend(top.generation_settings());
    let all = [of_decoder, of_encoder, of_text, top].map(|mut fields| {
        WITHOUT_EFFECT.iter().for_each(|field| drop(fields.remove(field)));
        fields.without_effect()
    });
    let mut ignored = [all.concat(), vision.ignored].concat();
    ignored.sort();
    Ok(Config {
        family,
        encoder: text.stack,
        decoder: decoder.stack,
        merged_attention: true,
        tie_word_embeddings,
        tokens,
        architecture,
        classifier,
        vision: Some(vision.vision),
        end_of_image: Some(end_of_image),
        custom: Custom::default(),
        generation,
        ignored,
    })
}

/// The object in a field, or an empty one: every setting has a default.
fn object(fields: &mut Fields, name: &str) -> Result<Fields, ConfigError> {
    let value = fields.remove(name).filter(|value| !value.is_null());
    Fields::of(&fields.path_of(name), value.unwrap_or_else(|| Value::Object(serde_json::Map::new())))
}

/// The tokens that stand for a token of an image and for the end of one. The first is the top level's, even if that is
/// only the default; the second is the encoder's.
fn image_tokens(top: &mut Fields, encoder: &mut Fields) -> Result<(i64, i64), ConfigError> {
    let image = top.token("image_token_index")?.unwrap_or(256_001);
    if let Some(other) = encoder.token("image_token_index")?
        && other != image
    {
        encoder.ignore("image_token_index");
    }
    let end = encoder.token("eoi_token_index")?.unwrap_or(256_000);
    if let Some(other) = top.token("eoi_token_index")?
        && other != end
    {
        top.ignore("eoi_token_index");
    }
    Ok((image, end))
}

/// The part that reads images, and the fields without effect.
struct ParsedVision {
    vision: Vision,
    ignored: Vec<String>,
}

fn vision(encoder: &mut Fields, image_token: i64) -> Result<ParsedVision, ConfigError> {
    let mut fields = object(encoder, "vision_config")?;
    fields.expect("hidden_act", "\"gelu_pytorch_tanh\"", |value| value == "gelu_pytorch_tanh")?;
    fields.expect("num_channels", "3", |value| value == 3)?;
    fields.expect("model_type", "\"siglip_vision_model\"", |value| value == "siglip_vision_model")?;
    fields.refuse(&[QUANTIZATION_CONFIG])?;
    // The head's result is not read.
    fields.boolean("vision_use_head")?;
    let vision = Vision {
        hidden_size: fields.size("hidden_size")?.unwrap_or(768),
        intermediate_size: fields.size("intermediate_size")?.unwrap_or(3072),
        num_hidden_layers: fields.size_up_to(MOST_LAYERS, "num_hidden_layers")?.unwrap_or(12),
        num_attention_heads: fields.size("num_attention_heads")?.unwrap_or(12),
        layer_norm_eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-6),
        image_size: fields.size_up_to(MOST_HEAD_DIM, "image_size")?.unwrap_or(224),
        patch_size: fields.size_up_to(MOST_HEAD_DIM, "patch_size")?.unwrap_or(16),
        tokens_per_image: encoder.size("mm_tokens_per_image")?.unwrap_or(256),
        image_token,
        start_of_image: encoder.token("boi_token_index")?.unwrap_or(255_999),
    };
    WITHOUT_EFFECT.iter().for_each(|field| drop(fields.remove(field)));
    Ok(ParsedVision { vision, ignored: fields.without_effect() })
}

/// A stack, with the token ids that are repeated in it.
struct ParsedStack {
    stack: Stack,
    bos: Option<i64>,
    eos: Option<Vec<i64>>,
    pad: Option<i64>,
    /// What has not been taken.
    fields: Fields,
}

fn parse_stack(mut fields: Fields) -> Result<ParsedStack, ConfigError> {
    fields.expect("hidden_activation", "\"gelu_pytorch_tanh\"", |value| value == "gelu_pytorch_tanh")?;
    let num_hidden_layers = fields.size_up_to(MOST_LAYERS, "num_hidden_layers")?.unwrap_or(26);
    let has_no_window = fields.get("sliding_window").is_some_and(Value::is_null);
    let sliding_window = fields.size("sliding_window")?.unwrap_or(4096);
    let [full_rope, sliding_rope] = ropes(&mut fields)?;
    // Only layers without types of their own follow the pattern.
    let pattern = fields.size("sliding_window_pattern")?.unwrap_or(6);
    let stack = Stack {
        vocab_size: fields.size("vocab_size")?.unwrap_or(262_208),
        hidden_size: fields.size("hidden_size")?.unwrap_or(2304),
        intermediate_size: fields.size("intermediate_size")?.unwrap_or(9216),
        num_attention_heads: fields.size("num_attention_heads")?.unwrap_or(8),
        num_key_value_heads: fields.size("num_key_value_heads")?.unwrap_or(4),
        head_dim: fields.size_up_to(MOST_HEAD_DIM, "head_dim")?.unwrap_or(256),
        query_pre_attn_scalar: fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
        attn_logit_softcapping: None,
        final_logit_softcapping: fields.positive("final_logit_softcapping")?,
        attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
        rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
        qk_norm: true,
        full_rope,
        sliding_rope,
        max_position_embeddings: fields.size("max_position_embeddings")?.unwrap_or(131_072),
        layers: fields.layer_types(num_hidden_layers, sliding_window, |layer| (layer + 1) % pattern == 0)?,
    };
    fields.check_heads(&stack)?;
    if has_no_window && stack.layers.iter().any(|layer| *layer != LayerType::Full) {
        return Err(fields.error("sliding_window", "a window for the layers of sliding_attention", "null"));
    }
    // transformers has this setting, and does not use it.
    if fields.remove("attn_logit_softcapping").is_some_and(|cap| !cap.is_null()) {
        fields.ignore("attn_logit_softcapping");
    }
    if fields.get("use_bidirectional_attention").is_some_and(|value| value == true) {
        fields.ignore("use_bidirectional_attention");
    }
    let (bos, pad) = (fields.token("bos_token_id")?, fields.padding()?);
    let eos = fields.tokens("eos_token_id")?;
    Ok(ParsedStack { stack, bos, eos, pad, fields })
}

/// The rotary positions of full layers and of those with a window: `rope_parameters` for each, over the older
/// `rope_scaling` (of full layers), `rope_theta` and `rope_local_base_freq`. transformers reads a flat
/// `rope_parameters`, or a `rope_scaling` with `type`, as if there were none.
fn ropes(fields: &mut Fields) -> Result<[Rope; 2], ConfigError> {
    let flat = [fields.positive("rope_theta")?, fields.positive("rope_local_base_freq")?];
    let scaling = taken_object(fields, "rope_scaling")?;
    let parameters = taken_object(fields, "rope_parameters")?;
    let [mut full, mut sliding] = [Parts::default(), Parts::default()];
    if let Some(mut parameters) = parameters {
        for (layers, parts) in [("full_attention", &mut full), ("sliding_attention", &mut sliding)] {
            let Some(value) = parameters.remove(layers) else {
                let expected = "full_attention and sliding_attention, with the rotary positions of each";
                let found = format!("nothing for {layers} (transformers ignores such parameters)");
                return Err(fields.error("rope_parameters", expected, found));
            };
            let path = format!("rope_parameters.{layers}");
            parts.take(Fields::of(&fields.path_of(&path), value)?, &path, fields)?;
        }
        parameters.rest().for_each(|field| fields.ignore(format!("rope_parameters.{field}")));
    }
    if let Some(scaling) = scaling {
        if scaling.get("rope_type").is_none() {
            let found = "none (transformers ignores such a rope_scaling)";
            return Err(scaling.error("rope_type", "\"default\" or \"linear\"", found));
        }
        full.take(scaling, "rope_scaling", fields)?;
    }
    let rope = |parts: Parts, flat: Option<f64>, default: f64| Rope {
        theta: parts.theta.or(flat).unwrap_or(default),
        factor: parts.factor.unwrap_or(1.0),
    };
    Ok([rope(full, flat[0], 1e6), rope(sliding, flat[1], 1e4)])
}

fn taken_object(fields: &mut Fields, name: &str) -> Result<Option<Fields>, ConfigError> {
    let value = fields.remove(name).filter(|value| !value.is_null() && !is_empty(value));
    value.map(|value| Fields::of(&fields.path_of(name), value)).transpose()
}

/// What is given of the rotary positions of some layers.
#[derive(Default)]
struct Parts {
    theta: Option<f64>,
    factor: Option<f64>,
}

impl Parts {
    /// Adds the parameters in `from`, the object at `path` in `all`, where those without effect are noted.
    fn take(&mut self, mut from: Fields, path: &str, all: &mut Fields) -> Result<(), ConfigError> {
        let kind = from.take("rope_type", "\"default\" or \"linear\"", |value| match value.as_str()? {
            "default" => Some(false),
            "linear" => Some(true),
            _ => None,
        })?;
        self.theta = from.positive("rope_theta")?.or(self.theta);
        match kind {
            Some(true) => match from.positive("factor")? {
                Some(factor) => self.factor = Some(factor),
                None => return Err(from.error("factor", "a positive number", "nothing")),
            },
            Some(false) => self.factor = None,
            None => {}
        }
        from.rest().for_each(|field| all.ignore(format!("{path}.{field}")));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::t5gemma::config::tests::check_refused;
    use serde_json::json;

    fn minimal() -> Value {
        let stack = json!({"num_hidden_layers": 7, "hidden_size": 32, "vocab_size": 60, "sliding_window": 8});
        json!({"model_type": "t5gemma2", "encoder": {"text_config": stack}, "decoder": stack})
    }

    fn parsed(change: impl FnOnce(&mut Value)) -> Config {
        let mut json = minimal();
        change(&mut json);
        Config::parse(&json.to_string()).unwrap_or_else(|error| panic!("{json}: {error}"))
    }

    #[test]
    fn missing_fields_take_the_documented_defaults() {
        let config = parsed(|_| ());
        let is_full = |layer: &LayerType| *layer == LayerType::Full;
        assert_eq!(config.encoder.layers.iter().position(is_full), Some(5));
        assert_eq!(config.decoder.layers[0], LayerType::Sliding(8));
        assert_eq!(config.decoder.full_rope, Rope { theta: 1e6, factor: 1.0 });
        assert_eq!(config.decoder.sliding_rope, Rope { theta: 1e4, factor: 1.0 });
        assert_eq!(config.decoder.final_logit_softcapping, None);
        assert_eq!(config.end_of_image, Some(256_000));
        let vision = config.vision.expect("a model may read images");
        assert_eq!((vision.image_token, vision.start_of_image, vision.image_size), (256_001, 255_999, 224));
        assert_eq!((config.tokens.bos, config.tokens.eos), (Some(2), vec![1]));
        assert!(config.tie_word_embeddings && config.ignored.is_empty());
    }

    #[test]
    fn rotary_positions_are_where_transformers_finds_them() {
        let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
        let both = |full: Value, sliding: Value| json!({"full_attention": full, "sliding_attention": sliding});
        let none = || json!({"rope_type": "default"});
        for (changes, full, sliding) in [
            (json!({"rope_theta": 5.0, "rope_local_base_freq": 3.0}), (5.0, 1.0), 3.0),
            (json!({"rope_scaling": linear(8.0)}), (1e6, 8.0), 1e4),
            (json!({"rope_theta": 5.0, "rope_scaling": linear(4.0)}), (5.0, 4.0), 1e4),
            (json!({"rope_parameters": both(linear(8.0), none())}), (1e6, 8.0), 1e4),
            (
                json!({"rope_parameters": both(json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}),
                json!({"rope_theta": 9.0}))}),
                (7.0, 2.0),
                9.0,
            ),
            (json!({"rope_theta": 5.0, "rope_parameters": both(json!({"rope_theta": 7.0}), none())}), (7.0, 1.0), 1e4),
            (json!({"rope_scaling": null, "rope_parameters": {}}), (1e6, 1.0), 1e4),
        ] {
            let config = parsed(|json| {
                let decoder = json["decoder"].as_object_mut().expect("an object");
                decoder.extend(changes.as_object().expect("an object").clone());
            });
            let Rope { theta, factor } = config.decoder.full_rope;
            assert_eq!(((theta, factor), config.decoder.sliding_rope.theta), (full, sliding), "{changes}");
            assert_eq!(config.encoder.full_rope.theta, 1e6, "the other stack has its own");
        }
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let both = json!({"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}});
        let cases = [
            ("/decoder/hidden_activation", json!("silu"), "decoder.hidden_activation"),
            ("/decoder/hidden_size", json!(48), "decoder.hidden_size"),
            ("/encoder/text_config/vocab_size", json!(61), "decoder.vocab_size"),
            ("/decoder/rope_scaling", json!({"type": "linear", "factor": 8.0}), "decoder.rope_scaling.rope_type"),
            ("/decoder/rope_scaling", json!({"rope_type": "linear"}), "decoder.rope_scaling.factor"),
            ("/decoder/rope_parameters", json!({"rope_type": "default"}), "decoder.rope_parameters"),
            ("/decoder/rope_parameters", both, "decoder.rope_parameters.full_attention.rope_type"),
            ("/decoder/num_key_value_heads", json!(3), "decoder.num_key_value_heads"),
            ("/decoder/head_dim", json!(7), "decoder.head_dim"),
            ("/decoder/layer_types", json!(["full_attention"]), "decoder.layer_types"),
            ("/decoder/sliding_window", Value::Null, "decoder.sliding_window"),
            ("/decoder/is_causal", json!(false), "decoder.is_causal"),
            ("/encoder/vision_config", json!({"hidden_act": "gelu"}), "encoder.vision_config.hidden_act"),
            ("/encoder/vision_config", json!({"num_channels": 1}), "encoder.vision_config.num_channels"),
            ("/encoder/eoi_token_index", json!(-1), "encoder.eoi_token_index"),
            ("/quantization_config", json!({"quant_method": "bitsandbytes"}), "quantization_config"),
        ];
        check_refused(minimal, &cases);
    }

    #[test]
    fn classifiers_score_labels_from_the_decoder() {
        let config = parsed(|json| {
            json["architectures"] = json!(["T5Gemma2ForSequenceClassification"]);
            json["decoder"]["bos_token_id"] = json!(3);
            json["id2label"] = json!({"0": "bad", "1": "good"});
        });
        let classifier = config.classifier.expect("a classifier");
        assert_eq!((classifier.labels, classifier.decoder_start), (vec!["bad".to_string(), "good".to_string()], 3));
        assert!(classifier.is_encoder_decoder && config.vision.is_some());
    }

    #[test]
    fn the_top_level_names_the_image_token_and_the_encoder_the_one_behind() {
        let config = parsed(|json| {
            json["encoder"]["image_token_index"] = json!(40);
            json["encoder"]["eoi_token_index"] = json!(41);
            json["eoi_token_index"] = json!(42);
            json["decoder"]["attn_logit_softcapping"] = json!(50.0);
            json["decoder"]["_sliding_window_pattern"] = json!(6);
        });
        assert_eq!((config.vision.map(|vision| vision.image_token), config.end_of_image), (Some(256_001), Some(41)));
        let expected = ["decoder.attn_logit_softcapping", "encoder.image_token_index", "eoi_token_index"];
        assert_eq!(config.ignored, expected);
    }

    #[test]
    fn the_tokens_of_an_image_are_a_square_of_its_patches() {
        let vision = |image: usize, patch: usize, tokens: usize| {
            let config = parsed(|json| {
                json["encoder"]["vision_config"] = json!({"image_size": image, "patch_size": patch});
                json["encoder"]["mm_tokens_per_image"] = json!(tokens);
            });
            config.vision.expect("it has one").check().map_err(|error| error.field)
        };
        for (image, patch, tokens, field) in [
            (896, 14, 256, None),
            (28, 7, 4, None),
            (224, 16, 256, Some("encoder.mm_tokens_per_image")),
            (28, 7, 5, Some("encoder.mm_tokens_per_image")),
            (35, 7, 16, Some("encoder.mm_tokens_per_image")),
            (8, 16, 1, Some("encoder.vision_config.patch_size")),
        ] {
            assert_eq!(vision(image, patch, tokens).err().as_deref(), field, "{image}, {patch}, {tokens}");
        }
    }
}
