//! Reads the `config.json` of T5Gemma-TTS (`model_type: t5gemma_voice`, arXiv 2604.01760): a T5Gemma in
//! `t5_config_dict`, whose targets are audio tokens (*frames*) with a table and a head of their own, and whose rotary
//! positions say how far a source or a target has come.
//!
//! The graphs are those of T5Gemma, with the differences as data in [`Custom`]. What of the published loop can be said
//! in generation options is in [`Config::generation`].

use serde_json::{Map, Value, json};

use super::config;
use crate::config::{Activation, Config, ConfigError, Custom, Fields, Head, MOST_SIZE, Positions, Progress, TokenIds};

/// The table of audio tokens.
const AUDIO_EMBEDDING: &str = "audio_embedding.0.weight";
/// The two layers of the head: weights and biases.
const PREDICT_LAYER: [&str; 4] =
    ["predict_layer.0.0.weight", "predict_layer.0.0.bias", "predict_layer.0.2.weight", "predict_layer.0.2.bias"];

/// Fields that say how the model was made or loaded, or that concern what is around it.
const WITHOUT_EFFECT: &[&str] = &[
    "architectures",
    "attn_implementation",
    "audio_pad_token",
    "audio_tokenizer",
    "bos_token_id",
    "eog",
    "eos_token_id",
    "is_encoder_decoder",
    "pad_token_id",
    "parallel_pattern",
    "precision",
    "progress_lookahead_secs",
    "prune_text_modules",
    "special_first",
    "t5gemma_model_name",
    "vocab_size",
    "x_sep_token",
    "y_sep_token",
];

/// Reads a document whose `model_type` has been taken.
pub fn parse(mut top: Fields) -> Result<Config, ConfigError> {
    let Some(inner) = top.remove("t5_config_dict") else {
        return Err(top.error("t5_config_dict", "the configuration of a T5Gemma", "nothing"));
    };
    let mut inner = Fields::of("t5_config_dict", inner)?;
    inner.expect("model_type", "\"t5gemma\"", |value| value == "t5gemma")?;
    let mut config = config::parse(inner)?;

    // The published code has one codebook, whatever this field says; with several, tables and heads would be left out.
    top.expect("n_codebooks", "1", |value| value == 1)?;
    let Some(audio_vocab_size) = top.size("audio_vocab_size")? else {
        return Err(top.error("audio_vocab_size", "the number of audio tokens", "nothing"));
    };
    let vocab_size = audio_vocab_size + top.size("n_special")?.unwrap_or(5);
    if vocab_size > MOST_SIZE {
        let expected = format!("at most {MOST_SIZE} with n_special");
        return Err(top.error("audio_vocab_size", expected, vocab_size.to_string()));
    }
    let start = token(&mut top, "empty_token", "bos_token_id", vocab_size)?;
    let end = token(&mut top, "eos", "eos_token_id", vocab_size)?;
    let has_progress_positions = top.take("use_pm_rope", "0 or 1", |value| match value {
        Value::Bool(flag) => Some(*flag),
        number => number.as_u64().filter(|number| *number <= 1).map(|number| number == 1),
    })?;
    let scale = top.positive("progress_scale")?.unwrap_or(2000.0);
    let tokens_per_second = top.positive("encodec_sr")?.unwrap_or(50.0);
    let extra_seconds = top.take("extra_cutoff", "a number of at least 0", |value| {
        value.as_f64().filter(|seconds| seconds.is_finite() && *seconds >= 0.0)
    })?;
    // A rule of the published loop that this one does not have.
    if top.get("text_guard_frames_per_token").is_some_and(|frames| frames == 0) {
        top.remove("text_guard_frames_per_token");
    }
    WITHOUT_EFFECT.iter().for_each(|field| drop(top.remove(field)));

    let has_progress_positions = has_progress_positions.unwrap_or(true);
    let positions = if has_progress_positions { Positions::Float } else { Positions::Integer };
    config.custom = Custom {
        source_positions: positions,
        target_positions: positions,
        cross_rope: has_progress_positions,
        decoder_embedding: Some(AUDIO_EMBEDDING.into()),
        head: Head::Mlp {
            tensors: PREDICT_LAYER.map(String::from),
            size: config.decoder.hidden_size,
            activation: Activation::Gelu,
        },
        progress: Some(Progress { scale, tokens_per_second, extra_seconds: extra_seconds.unwrap_or(5.0) }),
        ..Custom::default()
    };
    config.decoder.vocab_size = vocab_size;
    config.decoder.final_logit_softcapping = None;
    config.tie_word_embeddings = false;
    // Padding is that of sources: targets of text tokenizers and of audio tokens have nothing in common.
    config.tokens = TokenIds { bos: Some(start), eos: vec![end], pad: config.tokens.pad };
    config.generation = generation(start, end, tokens_per_second);
    let mut ignored = [std::mem::take(&mut config.ignored), top.without_effect()].concat();
    ignored.sort();
    config.ignored = ignored;
    Ok(config)
}

/// A special token, under its own name or under transformers' one.
fn token(top: &mut Fields, name: &str, other: &str, vocab_size: usize) -> Result<i64, ConfigError> {
    let own = top.token(name)?;
    let token = match own {
        Some(token) => Some(token),
        None => top.token(other)?,
    };
    let Some(token) = token else { return Err(top.error(name, "a token id", "nothing")) };
    if usize::try_from(token).is_ok_and(|token| token < vocab_size) {
        return Ok(token);
    }
    let expected = format!("a token id below {vocab_size} (audio_vocab_size and n_special)");
    Err(top.error(if own.is_some() { name } else { other }, expected, token.to_string()))
}

/// The published loop's settings: no end within the first fifth of a second, an end as soon as it is the most likely
/// token, and those of sampling.
fn generation(start: i64, end: i64, tokens_per_second: f64) -> Map<String, Value> {
    let settings = json!({
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "min_new_tokens": (tokens_per_second / 5.0).ceil() as u64,
        "eos_on_argmax": true,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
    });
    settings.as_object().expect("written as an object").clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::t5gemma::config::tests::check_refused;

    fn minimal() -> Value {
        let stack = json!({"num_hidden_layers": 1, "vocab_size": 60, "hidden_size": 24});
        json!({
            "model_type": "t5gemma_voice",
            "t5_config_dict": {"model_type": "t5gemma", "encoder": stack, "decoder": stack},
            "audio_vocab_size": 70, "n_special": 5, "empty_token": 70, "eos": 73, "n_codebooks": 1,
        })
    }

    #[test]
    fn the_differences_are_data() {
        let config = Config::parse(&minimal().to_string()).expect("a minimal config");
        assert_eq!((config.encoder.vocab_size, config.decoder.vocab_size), (60, 75));
        assert_eq!((config.tokens.bos, config.tokens.pad), (Some(70), Some(0)));
        assert_eq!(config.decoder.final_logit_softcapping, None);
        assert_eq!(config.generation["min_new_tokens"], 10);
        assert!(config.custom.cross_rope && !config.custom.has_text_targets());
        assert_eq!(config.role(AUDIO_EMBEDDING), Some(crate::tensors::Role::DecoderEmbedding));
        assert_eq!(config.role("predict_layer.0.2.bias"), Some(crate::tensors::Role::Head));
        let mut plain = minimal();
        plain["use_pm_rope"] = json!(0);
        let plain = Config::parse(&plain.to_string()).expect("a minimal config");
        assert_eq!((plain.custom.target_positions, plain.custom.cross_rope), (Positions::Integer, false));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let cases = [
            ("/n_codebooks", json!(2), "n_codebooks"),
            ("/audio_vocab_size", Value::Null, "audio_vocab_size"),
            ("/eos", json!(75), "eos"),
            ("/empty_token", Value::Null, "empty_token"),
            ("/use_pm_rope", json!(2), "use_pm_rope"),
            ("/progress_scale", json!(0), "progress_scale"),
            ("/extra_cutoff", json!(-1), "extra_cutoff"),
            ("/t5_config_dict", Value::Null, "t5_config_dict"),
            ("/t5_config_dict/model_type", json!("t5"), "t5_config_dict.model_type"),
            ("/t5_config_dict/decoder/head_dim", json!(7), "t5_config_dict.decoder.head_dim"),
        ];
        check_refused(minimal, &cases);
    }

    #[test]
    fn unknown_fields_are_listed() {
        let mut json = minimal();
        json["text_guard_frames_per_token"] = json!(2);
        json["something"] = json!(1);
        json["parallel_pattern"] = json!(0);
        let config = Config::parse(&json.to_string()).expect("they do not matter");
        assert_eq!(config.ignored, ["something", "text_guard_frames_per_token"]);
    }
}
