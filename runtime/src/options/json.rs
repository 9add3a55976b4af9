//! Generation options as JSON: a request's `options`, or a `generation_config.json`.

use serde_json::{Map, Value};
use t5gemma_graphs::json::shown;

use super::unsupported::{Neutral, unsupported};
use super::{GenerationOptions, OptionError, OptionProblem};

impl GenerationOptions {
    /// Reads a JSON object of options under Hugging Face's names. An option that is `null` is not set; an unsupported
    /// one is accepted at the value at which it has no effect.
    ///
    /// # Errors
    /// The first option that is unknown, unsupported, or has a value of the wrong form.
    pub fn from_json(object: &Map<String, Value>) -> Result<GenerationOptions, OptionError> {
        GenerationOptions::read_all(object, |options, name, value| {
            let Some(option) = unsupported(name) else {
                return Err(OptionError::of(name, OptionProblem::Unknown, shown(value)));
            };
            if option.neutral.is(value) {
                options.disabled.push(name.to_string());
                return Ok(());
            }
            let remedy = match option.neutral {
                Neutral::Absent => "remove it".to_string(),
                _ => format!("remove it or set it to {}", option.neutral),
            };
            Err(OptionError::of(name, OptionProblem::Unsupported(remedy), shown(value)))
        })
    }

    /// Reads an object and hands every option that is not implemented to `other`.
    pub(super) fn read_all(
        object: &Map<String, Value>,
        mut other: impl FnMut(&mut GenerationOptions, &str, &Value) -> Result<(), OptionError>,
    ) -> Result<GenerationOptions, OptionError> {
        let mut options = GenerationOptions::default();
        for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
            if !options.read(name, value)? {
                other(&mut options, name, value)?;
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::options::tests::{model, with};
    use crate::options::{
        EarlyStopping, ExponentialDecay, GenerationConfig, MaxLength, ModelDefaults, Sequence, SequenceBias,
    };

    fn bias(tokens: Vec<i64>, bias: f32) -> SequenceBias {
        SequenceBias { tokens, bias }
    }

    #[test]
    fn every_option_is_read() {
        let request: Value = serde_json::from_str(
            r#"{
            "max_new_tokens": 7, "max_length": 9.0, "min_length": 3, "min_new_tokens": 2, "num_beams": 4,
            "num_return_sequences": 3, "length_penalty": 2, "coverage_penalty": 0.2,
            "early_stopping": "never", "patience": 1, "decoder_start_token_id": 5,
            "bos_token_id": 6, "eos_token_id": [1, 107], "pad_token_id": 3, "repetition_penalty": 1.5,
            "encoder_repetition_penalty": 2, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 4,
            "bad_words_ids": [[5], [6, 7]], "sequence_bias": [[[5], 3], [[6, 7], -4.5]], "forced_bos_token_id": 17,
            "forced_eos_token_id": 1, "exponential_decay_length_penalty": [6, 1.6], "suppress_tokens": [8, 9],
            "begin_suppress_tokens": [10], "renormalize_logits": true, "remove_invalid_values": true,
            "do_sample": true, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "top_h": 0.4,
            "top_n_sigma": 2, "eos_on_argmax": false,
            "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "seed": 18446744073709551615,
            "return_alternatives": false, "stop_strings": ["\n", "."], "max_time": 2.5, "num_beam_groups": 1,
            "diversity_penalty": 0, "frequency_penalty": 0.5, "presence_penalty": -0.25,
            "output_logprobs": true, "top_logprobs": 3, "output_attentions": true, "regex": "a+"
        }"#,
        )
        .expect("JSON");
        let expected = GenerationConfig {
            max_new_tokens: Some(7),
            max_length: Some(9),
            min_length: 3,
            min_new_tokens: Some(2),
            num_beams: 4,
            num_return_sequences: 3,
            do_sample: true,
            temperature: 0.7,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            top_h: Some(0.4),
            top_n_sigma: 2.0,
            eos_on_argmax: false,
            typical_p: 0.8,
            epsilon_cutoff: 0.01,
            eta_cutoff: 0.02,
            seed: Some(u64::MAX),
            num_beam_groups: 1,
            diversity_penalty: 0.0,
            stop_strings: vec!["\n".into(), ".".into()],
            max_time: Some(2.5),
            return_alternatives: false,
            length_penalty: 2.0,
            coverage_penalty: 0.2,
            early_stopping: EarlyStopping::Never,
            patience: 1.0,
            decoder_start_token_id: 5,
            bos_token_id: Some(6),
            eos_token_id: vec![1, 107],
            pad_token_id: 3,
            repetition_penalty: 1.5,
            encoder_repetition_penalty: 2.0,
            no_repeat_ngram_size: 3,
            encoder_no_repeat_ngram_size: 4,
            bad_words_ids: vec![vec![5], vec![6, 7]],
            sequence_bias: vec![bias(vec![5], 3.0), bias(vec![6, 7], -4.5)],
            forced_bos_token_id: Some(17),
            forced_eos_token_id: vec![1],
            exponential_decay_length_penalty: Some(ExponentialDecay { start: 6, factor: 1.6 }),
            suppress_tokens: vec![8, 9],
            begin_suppress_tokens: vec![10],
            renormalize_logits: true,
            remove_invalid_values: true,
            frequency_penalty: 0.5,
            presence_penalty: -0.25,
            output_logprobs: true,
            top_logprobs: 3,
            output_attentions: true,
            logits_processor: vec![],
            prompt_lookup_num_tokens: None,
            adapter: None,
            max_matching_ngram_size: None,
            allowed_sequences: vec![],
            required_phrases: vec![],
            json_schema: None,
            regex: Some("a+".into()),
            grammar: None,
            prefix_allowed_tokens: None,
            model: ModelDefaults { max_length: None, ..ModelDefaults::default() },
        };
        assert_eq!(with(&GenerationConfig::default(), request.clone()), Ok(expected.clone()));
        // A file cannot ask for what most exports do not return.
        let of_model = GenerationConfig {
            output_attentions: false,
            model: ModelDefaults {
                max_length: Some(MaxLength { max_new_tokens: Some(7), max_length: Some(9) }),
                eos_token_id: vec![1, 107],
                unsupported: vec![],
            },
            ..expected
        };
        assert_eq!(model(request), Ok(of_model));
    }

    #[test]
    fn options_of_prompt_lookup_are_read() {
        let request = json!({"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3});
        let options = with(&GenerationConfig::default(), request).expect("greedy search of one target");
        assert_eq!((options.prompt_lookup_num_tokens, options.max_matching_ngram_size), (Some(5), Some(3)));
    }

    #[test]
    fn older_spellings_are_read() {
        let cases = [
            (
                "tuples as keys",
                json!({"(10, 45)": -2.0, "(64,)": 1}),
                vec![bias(vec![10, 45], -2.0), bias(vec![64], 1.0)],
            ),
            ("bare keys", json!({"10,45": -2.0, "[7]": 1.5}), vec![bias(vec![10, 45], -2.0), bias(vec![7], 1.5)]),
        ];
        for (name, sequence_bias, expected) in cases {
            let options = with(&GenerationConfig::default(), json!({"sequence_bias": sequence_bias}));
            assert_eq!(options.expect(name).sequence_bias, expected, "{name}");
        }
    }

    #[test]
    fn constraints_are_read_or_refused() {
        let options = with(
            &GenerationConfig::default(),
            json!({
                "allowed_sequences": ["a b", [5, 6]],
                "required_phrases": [],
                "json_schema": {"type": "object"},
                "regex": "[0-9]+",
                "grammar": "start: \"a\"",
            }),
        )
        .expect("well formed");
        assert_eq!(options.allowed_sequences, [Sequence::Text("a b".into()), Sequence::Tokens(vec![5, 6])]);
        assert!(options.is_constrained() && !GenerationConfig::default().is_constrained());
        let refused = [
            ("allowed_sequences", json!("a")),
            ("allowed_sequences", json!([""])),
            ("allowed_sequences", json!([[]])),
            ("required_phrases", json!([5])),
            ("required_phrases", json!([[-5]])),
            ("json_schema", json!("{}")),
            ("regex", json!(5)),
            ("grammar", json!({})),
        ];
        for (name, value) in refused {
            let error = with(&GenerationConfig::default(), json!({name: value})).expect_err(name);
            assert_eq!(error.option, name, "{value}");
        }
    }

    #[test]
    fn callbacks_are_no_options_of_requests() {
        for name in ["logits_processor", "prefix_allowed_tokens"] {
            let error = with(&GenerationConfig::default(), json!({name: 1})).expect_err(name);
            assert_eq!(error.to_string(), format!("{name}: unknown generation option"));
        }
    }
}
