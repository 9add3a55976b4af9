//! Reads a T5Gemma 2 `config.json`, in every layout that transformers 5.24 reads: that of the published checkpoints,
//! that which it writes, and the older names of Gemma 3 (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
//! `sliding_window_pattern`).

use serde_json::Value;

use crate::config::{
    Architecture, Config, ConfigError, Custom, Family, Fields, IS_CAUSAL, LayerType, MOST_HEAD_DIM, MOST_LAYERS,
    PER_LAYER_CONFIG, QUANTIZATION_CONFIG, Refused, Rope, Stack, TRANSFORMERS_WEIGHTS, TokenIds, Vision, is_empty,
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
    if matches!(architecture, Architecture::SequenceClassification | Architecture::TokenClassification) {
        let expected = format!("{} (a T5Gemma 2 classifier cannot be exported)", Architecture::default().name(family));
        return Err(top.error("architectures", expected, architecture.name(family)));
    }
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
        classifier: None,
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
