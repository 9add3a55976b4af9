//! Rules between options, and those that depend on the model.

use std::slice;

use super::form::is_positive;
use super::unsupported::{Neutral, unsupported};
use super::{DEFAULT_NEW_TOKENS, EarlyStopping, GenerationConfig, GenerationOptions, OptionError, OptionProblem};
use crate::vocabulary_subset::VocabularySubset;

/// Limits the cost of one source; far above any useful number.
const MAX_NUM_BEAMS: usize = 256;
/// As `MAX_NUM_BEAMS`, without beams.
const MAX_NUM_RETURN_SEQUENCES: usize = 256;

impl GenerationConfig {
    /// Checks what depends on the model and the decoder prompt, just before generating.
    ///
    /// # Errors
    /// A token id outside the vocabulary, a `max_length` that leaves no token to generate, an unsupported option in the
    /// model's `generation_config.json`, and options that contradict each other.
    pub fn check(&self, vocab_size: usize, prompt_len: usize) -> Result<(), OptionError> {
        self.check_supported()?;
        self.check_values()?;
        self.check_together()?;
        if self.max_length(prompt_len) <= prompt_len {
            let (name, value) = match self.max_new_tokens {
                Some(value) => ("max_new_tokens", value),
                None => ("max_length", self.max_length(prompt_len)),
            };
            let expected = format!("room for at least one token after the {prompt_len} tokens of the decoder prompt");
            return Err(OptionError::new(name, expected, value.to_string()));
        }
        if self.num_beams > 1 && self.eos_token_id.len() >= vocab_size {
            let expected = format!("fewer than the {vocab_size} tokens of the vocabulary");
            return Err(OptionError::new("eos_token_id", expected, self.eos_token_id.len().to_string()));
        }
        let of_call: Vec<i64> =
            self.eos_token_id.iter().copied().filter(|id| !self.model.eos_token_id.contains(id)).collect();
        let biased: Vec<i64> = self.sequence_bias.iter().flat_map(|entry| &entry.tokens).copied().collect();
        for (name, tokens) in [
            ("decoder_start_token_id", slice::from_ref(&self.decoder_start_token_id)),
            ("bos_token_id", self.bos_token_id.as_slice()),
            ("eos_token_id", &of_call),
            ("pad_token_id", slice::from_ref(&self.pad_token_id)),
            ("bad_words_ids", &self.bad_words_ids.concat()),
            ("sequence_bias", &biased),
            ("forced_bos_token_id", self.forced_bos_token_id.as_slice()),
            ("forced_eos_token_id", &self.forced_eos_token_id),
            ("suppress_tokens", &self.suppress_tokens),
            ("begin_suppress_tokens", &self.begin_suppress_tokens),
        ] {
            let is_token = |&id: &i64| usize::try_from(id).is_ok_and(|id| id < vocab_size);
            if let Some(id) = tokens.iter().find(|id| !is_token(id)) {
                let expected = format!("token ids below {vocab_size}, the size of the vocabulary");
                return Err(OptionError::new(name, expected, id.to_string()));
            }
        }
        Ok(())
    }

    /// Checks that no unsupported option of the model's `generation_config.json` is left.
    fn check_supported(&self) -> Result<(), OptionError> {
        let Some((name, value)) = self.model.unsupported.first() else { return Ok(()) };
        let by_model = "the model's generation_config.json sets it";
        let remedy = match unsupported(name).map(|option| &option.neutral) {
            Some(Neutral::Absent) | None => format!("{by_model}, remove it there"),
            Some(neutral) => format!("{by_model}, override it with {neutral}"),
        };
        Err(OptionError::of(name, OptionProblem::Unsupported(remedy), value))
    }

    /// Checks that a model that computes the logits of some tokens only is not forced to generate others.
    pub(crate) fn check_subset(&self, subset: &VocabularySubset) -> Result<(), OptionError> {
        for (name, tokens) in [
            ("forced_bos_token_id", self.forced_bos_token_id.as_slice()),
            ("forced_eos_token_id", &self.forced_eos_token_id),
        ] {
            if let Some(token) = tokens.iter().find(|&&token| !subset.contains(token)) {
                let expected = "a token of kept_tokens.json, the vocabulary subset of this model";
                return Err(OptionError::new(name, expected, token.to_string()));
            }
        }
        if self.top_logprobs > subset.tokens().len() {
            let expected = format!("at most {}, the size of the model's vocabulary subset", subset.tokens().len());
            return Err(OptionError::new("top_logprobs", expected, self.top_logprobs.to_string()));
        }
        Ok(())
    }

    /// Why the minimum length cannot be reached, if it cannot. Targets end at the maximum length then, and transformers
    /// warns.
    pub fn check_lengths(&self) -> Result<(), OptionError> {
        let (option, min, limit, max) = match (self.min_new_tokens, self.max_new_tokens, self.max_length) {
            (Some(min), Some(max), _) => ("min_new_tokens", min, "max_new_tokens", max),
            (Some(min), None, None) => ("min_new_tokens", min, "max_new_tokens", DEFAULT_NEW_TOKENS),
            // A decoder prompt is one token at least.
            (Some(min), None, Some(max)) => ("min_new_tokens", min + 1, "max_length", max),
            (None, None, Some(max)) => ("min_length", self.min_length, "max_length", max),
            _ => return Ok(()),
        };
        if min > max {
            return Err(OptionError::requires(option, format!("{limit} of at least {min}"), max.to_string()));
        }
        Ok(())
    }

    /// Checks the options against each other.
    pub(super) fn check_together(&self) -> Result<(), OptionError> {
        let in_range = |name, n: usize, max: usize| {
            let error = || OptionError::new(name, format!("an integer from 1 to {max}"), n.to_string());
            if (1..=max).contains(&n) { Ok(()) } else { Err(error()) }
        };
        in_range("num_beams", self.num_beams, MAX_NUM_BEAMS)?;
        let returned = self.num_return_sequences;
        in_range("num_return_sequences", returned, MAX_NUM_RETURN_SEQUENCES)?;
        let differ = self.num_beams == 1 && (self.do_sample || self.return_alternatives);
        if !differ && returned > self.num_beams {
            let or = if self.num_beams == 1 { ", do_sample true or return_alternatives true" } else { "" };
            let required = format!("num_beams of at least {returned}{or}");
            let found = format!("num_beams {}", self.num_beams);
            return Err(OptionError::requires("num_return_sequences", required, found));
        }
        if self.return_alternatives && self.num_beams > 1 {
            return Err(OptionError::requires("return_alternatives", "num_beams 1", self.num_beams.to_string()));
        }
        self.check_groups()?;
        self.check_patience()?;
        self.check_prompt_lookup()?;
        if self.do_sample { self.check_sampling() } else { Ok(()) }
    }

    fn check_groups(&self) -> Result<(), OptionError> {
        let (groups, beams) = (self.num_beam_groups, self.num_beams);
        if groups == 0 || beams % groups != 0 {
            let expected = format!("a divisor of num_beams ({beams})");
            return Err(OptionError::new("num_beam_groups", expected, groups.to_string()));
        }
        if groups > 1 && self.do_sample {
            return Err(OptionError::requires("num_beam_groups", "do_sample false", "true"));
        }
        if groups > 1 && self.diversity_penalty <= 0.0 {
            let found = self.diversity_penalty.to_string();
            return Err(OptionError::requires("num_beam_groups", "diversity_penalty above 0", found));
        }
        Ok(())
    }

    fn check_patience(&self) -> Result<(), OptionError> {
        if self.patience == 1.0 || self.num_beams == 1 {
            return Ok(());
        }
        if self.early_stopping != EarlyStopping::True {
            return Err(OptionError::requires("patience", "early_stopping true", self.early_stopping.as_str()));
        }
        let returned_of_group = self.num_return_sequences.div_ceil(self.num_beam_groups);
        if self.patient_size(self.num_beams / self.num_beam_groups) < returned_of_group {
            let expected = format!("enough for num_return_sequences ({})", self.num_return_sequences);
            return Err(OptionError::new("patience", expected, self.patience.to_string()));
        }
        Ok(())
    }

    fn check_prompt_lookup(&self) -> Result<(), OptionError> {
        if self.prompt_lookup_num_tokens.is_none() {
            return match self.max_matching_ngram_size {
                Some(_) => Err(OptionError::requires("max_matching_ngram_size", "prompt_lookup_num_tokens", "none")),
                None => Ok(()),
            };
        }
        for (contradicts, required, found) in [
            (self.num_beams > 1, "num_beams 1", self.num_beams.to_string()),
            (self.do_sample, "do_sample false", "true".to_string()),
            (self.num_return_sequences > 1, "num_return_sequences 1", self.num_return_sequences.to_string()),
        ] {
            if contradicts {
                return Err(OptionError::requires("prompt_lookup_num_tokens", required, found));
            }
        }
        Ok(())
    }

    /// Checks the ranges of sampling options. Without sampling they do not matter: a `generation_config.json` may hold
    /// a temperature of 0.
    fn check_sampling(&self) -> Result<(), OptionError> {
        let from_0_to_1 = |x: f64| (0.0..=1.0).contains(&x);
        let above_0 = |x: f64| x > 0.0 && x <= 1.0;
        let below_1 = |x: f64| (0.0..1.0).contains(&x);
        let top_h = self.top_h.unwrap_or(1.0);
        for (name, value, is_valid, expected) in [
            (
                "temperature",
                self.temperature,
                is_positive(self.temperature),
                "a positive number (for greedy search, set do_sample false)",
            ),
            ("top_p", self.top_p, from_0_to_1(self.top_p), "a number from 0 to 1"),
            ("min_p", self.min_p, from_0_to_1(self.min_p), "a number from 0 to 1"),
            ("top_h", top_h, above_0(top_h), "a number above 0, at most 1"),
            ("top_n_sigma", self.top_n_sigma, self.top_n_sigma >= 0.0, "a number of at least 0"),
            ("typical_p", self.typical_p, above_0(self.typical_p), "a number above 0, at most 1"),
            ("epsilon_cutoff", self.epsilon_cutoff, below_1(self.epsilon_cutoff), "a number from 0 to below 1"),
            ("eta_cutoff", self.eta_cutoff, below_1(self.eta_cutoff), "a number from 0 to below 1"),
        ] {
            if !is_valid {
                return Err(OptionError::new(name, expected, value.to_string()));
            }
        }
        Ok(())
    }

    /// Checks that a call's maximum and minimum lengths are not hidden by options that take precedence over them.
    pub(super) fn check_precedence(&self, options: &GenerationOptions) -> Result<(), OptionError> {
        for (name, set, preferred, preferred_set, hidden_by) in [
            ("max_length", options.max_length, "max_new_tokens", options.max_new_tokens, self.max_new_tokens),
            ("min_length", options.min_length, "min_new_tokens", options.min_new_tokens, self.min_new_tokens),
        ] {
            if let (Some(set), None, Some(hidden_by)) = (set, preferred_set, hidden_by) {
                let expected = format!("{preferred} instead (already {hidden_by}, which takes precedence)");
                return Err(OptionError::new(name, expected, set.to_string()));
            }
        }
        Ok(())
    }

    /// Checks that no option of a call is without effect in the configuration that results.
    pub(super) fn check_effects(&self, options: &GenerationOptions) -> Result<(), OptionError> {
        let default = GenerationConfig::default();
        /// Whether an option is set to something else than the default.
        fn changes<T: PartialEq>(set: Option<T>, default: T) -> bool {
            set.is_some_and(|value| value != default)
        }
        let of_beams = [
            ("length_penalty", changes(options.length_penalty, default.length_penalty)),
            ("coverage_penalty", changes(options.coverage_penalty, default.coverage_penalty)),
            ("early_stopping", changes(options.early_stopping, default.early_stopping)),
            ("patience", changes(options.patience, default.patience)),
        ];
        let of_sampling = [
            ("temperature", changes(options.temperature, default.temperature)),
            ("top_k", changes(options.top_k, default.top_k)),
            ("top_p", changes(options.top_p, default.top_p)),
            ("min_p", changes(options.min_p, default.min_p)),
            ("top_h", options.top_h.is_some()),
            ("top_n_sigma", changes(options.top_n_sigma, default.top_n_sigma)),
            ("typical_p", changes(options.typical_p, default.typical_p)),
            ("epsilon_cutoff", changes(options.epsilon_cutoff, default.epsilon_cutoff)),
            ("eta_cutoff", changes(options.eta_cutoff, default.eta_cutoff)),
            ("eos_on_argmax", changes(options.eos_on_argmax, default.eos_on_argmax)),
            ("seed", options.seed.is_some()),
        ];
        if options.eos_on_argmax == Some(true) && self.num_beams > 1 {
            return Err(OptionError::requires("eos_on_argmax", "num_beams 1", self.num_beams.to_string()));
        }
        let of_groups = [("diversity_penalty", changes(options.diversity_penalty, default.diversity_penalty))];
        let of_logprobs = [("top_logprobs", changes(options.top_logprobs, default.top_logprobs))];
        for (acts, required, found, options) in [
            (self.num_beams > 1, "num_beams above 1", "1", &of_beams[..]),
            (self.do_sample, "do_sample true", "false", &of_sampling),
            (self.num_beam_groups > 1, "num_beam_groups above 1", "1", &of_groups),
            (self.output_logprobs, "output_logprobs true", "false", &of_logprobs),
        ] {
            if let Some((name, _)) = options.iter().find(|(_, changes)| *changes).filter(|_| !acts) {
                return Err(OptionError::requires(name, required, found));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::options::GenerationConfig;
    use crate::options::tests::{model, with};
    use t5gemma_graphs::config::TokenIds;

    #[test]
    fn invalid_options_are_refused_in_words() {
        let cases = [
            (json!({"num_beams": "four"}), "num_beams: expected an integer of at least 1, found \"four\""),
            (json!({"num_beams": 0}), "num_beams: expected an integer of at least 1, found 0"),
            (json!({"num_beams": 2.5}), "num_beams: expected an integer of at least 1, found 2.5"),
            (json!({"num_beams": 5000}), "num_beams: expected an integer from 1 to 256, found 5000"),
            (json!({"max_new_tokens": -1}), "max_new_tokens: expected an integer of at least 1, found -1"),
            (json!({"min_length": true}), "min_length: expected an integer of at least 0, found true"),
            (json!({"eos_token_id": [1, -2]}), "eos_token_id: expected a token id or a list of them, found [1,-2]"),
            (json!({"repetition_penalty": 0}), "repetition_penalty: expected a positive number, found 0"),
            (json!({"repetition_penalty": 1e-300}), "repetition_penalty: expected a positive number, found 1e-300"),
            (json!({"length_penalty": "1"}), "length_penalty: expected a number from -10 to 10, found \"1\""),
            (json!({"patience": 0}), "patience: expected a number above 0, at most 100, found 0"),
            (
                json!({"coverage_penalty": -0.1, "num_beams": 2}),
                "coverage_penalty: expected a number from 0 to 100, found -0.1",
            ),
            (json!({"coverage_penalty": 0.1}), "coverage_penalty requires num_beams above 1 (got 1)"),
            (json!({"output_attentions": 1}), "output_attentions: expected true or false, found 1"),
            (json!({"patience": 2, "num_beams": 2}), "patience requires early_stopping true (got false)"),
            (
                json!({"patience": 2, "num_beams": 2, "early_stopping": "never"}),
                "patience requires early_stopping true (got \"never\")",
            ),
            (
                json!({"patience": 0.5, "num_beams": 4, "num_return_sequences": 3, "early_stopping": true}),
                "patience: expected enough for num_return_sequences (3), found 0.5",
            ),
            (
                json!({"early_stopping": "always"}),
                "early_stopping: expected true, false or \"never\", found \"always\"",
            ),
            (
                json!({"bad_words_ids": [[]]}),
                "bad_words_ids: expected a list of non-empty lists of token ids, found [[]]",
            ),
            (
                json!({"sequence_bias": [[[], 1.0]]}),
                "sequence_bias: expected a list of [[token ids], bias] pairs without empty sequences, found [[[],1.0]]",
            ),
            (
                json!({"sequence_bias": {"a": 1.0}}),
                "sequence_bias: expected a list of [[token ids], bias] pairs without empty sequences, found {\"a\":1.0}",
            ),
            (
                json!({"exponential_decay_length_penalty": 2}),
                "exponential_decay_length_penalty: expected a pair [start, factor], found 2",
            ),
            (json!({"suppress_tokens": 3}), "suppress_tokens: expected a list of token ids, found 3"),
            (json!({"temprature": 1}), "temprature: unknown generation option"),
            (json!({"presence_penalty": 3}), "presence_penalty: expected a number from -2 to 2, found 3"),
            (json!({"top_logprobs": 3}), "top_logprobs requires output_logprobs true (got false)"),
            (
                json!({"stop_strings": ["a", ""]}),
                "stop_strings: expected a non-empty string or a list of them, found [\"a\",\"\"]",
            ),
            (json!({"max_time": -1}), "max_time: expected a number of seconds, 0 or more, found -1"),
            (json!({"max_time": "NaN"}), "max_time: expected a number of seconds, 0 or more, found \"NaN\""),
            (
                json!({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1}),
                "num_beam_groups: expected a divisor of num_beams (4), found 3",
            ),
            (
                json!({"num_beams": 4, "num_beam_groups": 2}),
                "num_beam_groups requires diversity_penalty above 0 (got 0)",
            ),
            (json!({"diversity_penalty": 1}), "diversity_penalty requires num_beam_groups above 1 (got 1)"),
            (
                json!({"num_beams": 4, "num_beam_groups": 2, "do_sample": true, "diversity_penalty": 1}),
                "num_beam_groups requires do_sample false (got true)",
            ),
            (json!({"do_sample": 1}), "do_sample: expected true or false, found 1"),
            (json!({"temperature": 0.7}), "temperature requires do_sample true (got false)"),
            (json!({"seed": 7}), "seed requires do_sample true (got false)"),
            (json!({"seed": -1, "do_sample": true}), "seed: expected an integer below 2^64, found -1"),
            (json!({"top_k": 2.5, "do_sample": true}), "top_k: expected an integer of at least 0, found 2.5"),
            (json!({"top_p": "1"}), "top_p: expected a number, found \"1\""),
            (
                json!({"temperature": 0, "do_sample": true}),
                "temperature: expected a positive number (for greedy search, set do_sample false), found 0",
            ),
            (json!({"top_p": 1.5, "do_sample": true}), "top_p: expected a number from 0 to 1, found 1.5"),
            (json!({"top_h": 0, "do_sample": true}), "top_h: expected a number above 0, at most 1, found 0"),
            (json!({"typical_p": 0, "do_sample": true}), "typical_p: expected a number above 0, at most 1, found 0"),
            (json!({"eta_cutoff": 1, "do_sample": true}), "eta_cutoff: expected a number from 0 to below 1, found 1"),
            (
                json!({"num_return_sequences": 257, "do_sample": true}),
                "num_return_sequences: expected an integer from 1 to 256, found 257",
            ),
            (
                json!({"num_return_sequences": 3, "num_beams": 2, "do_sample": true}),
                "num_return_sequences requires num_beams of at least 3 (got num_beams 2)",
            ),
            (json!({"return_alternatives": true, "num_beams": 2}), "return_alternatives requires num_beams 1 (got 2)"),
            (
                json!({"prompt_lookup_num_tokens": 4, "do_sample": true}),
                "prompt_lookup_num_tokens requires do_sample false (got true)",
            ),
            (
                json!({"max_matching_ngram_size": 4}),
                "max_matching_ngram_size requires prompt_lookup_num_tokens (got none)",
            ),
            (
                json!({"force_words_ids": [[5]]}),
                "force_words_ids: unsupported generation option; remove it (got [[5]])",
            ),
            (
                json!({"num_return_sequences": 2}),
                "num_return_sequences requires num_beams of at least 2, do_sample true or return_alternatives true \
                 (got num_beams 1)",
            ),
            (json!({"length_penalty": 0.5}), "length_penalty requires num_beams above 1 (got 1)"),
            (
                json!({"patience": 2, "early_stopping": true, "num_beams": 1}),
                "early_stopping requires num_beams above 1 (got 1)",
            ),
            (json!({"early_stopping": true, "num_beams": 1}), "early_stopping requires num_beams above 1 (got 1)"),
            (
                json!({"token_healing": true}),
                "token_healing: unsupported generation option; remove it or set it to false (got true)",
            ),
        ];
        for (request, message) in cases {
            let error = with(&GenerationConfig::default(), request).expect_err(message);
            assert_eq!(error.to_string(), message);
        }
        let error = GenerationConfig::of_model(Some("[1]"), &TokenIds::default()).expect_err("no object");
        assert!(error.to_string().starts_with("the document: expected a JSON object, found"), "{error}");
    }

    #[test]
    fn a_minimum_length_that_cannot_be_reached_is_reported() {
        let cases = [
            (json!({"min_new_tokens": 5, "max_new_tokens": 5}), None),
            (
                json!({"min_new_tokens": 6, "max_new_tokens": 5}),
                Some("min_new_tokens requires max_new_tokens of at least 6 (got 5)"),
            ),
            (json!({"min_new_tokens": 21}), Some("min_new_tokens requires max_new_tokens of at least 21 (got 20)")),
            (
                json!({"min_new_tokens": 10, "max_length": 10}),
                Some("min_new_tokens requires max_length of at least 11 (got 10)"),
            ),
            (json!({"min_length": 9, "max_length": 8}), Some("min_length requires max_length of at least 9 (got 8)")),
            (json!({"min_length": 9, "max_new_tokens": 3}), None),
        ];
        for (request, expected) in cases {
            let options = with(&GenerationConfig::default(), request.clone()).expect("valid");
            assert_eq!(options.check_lengths().err().map(|error| error.to_string()).as_deref(), expected, "{request}");
        }
    }

    #[test]
    fn a_check_knows_the_vocabulary_and_the_prompt() {
        let cases = [
            (json!({}), None),
            (json!({"max_length": 3}), Some("max_length")),
            (json!({"max_length": 4, "eos_token_id": [8, 9]}), None),
            (json!({"eos_token_id": [1, 10]}), Some("eos_token_id")),
            (json!({"eos_token_id": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "num_beams": 2}), Some("eos_token_id")),
            (json!({"pad_token_id": 10}), Some("pad_token_id")),
            (json!({"bos_token_id": 10}), Some("decoder_start_token_id")),
            (json!({"bos_token_id": 10, "decoder_start_token_id": 1}), Some("bos_token_id")),
            (json!({"bad_words_ids": [[1, 2], [3, 10]]}), Some("bad_words_ids")),
            (json!({"sequence_bias": [[[1, 10], 1.0]]}), Some("sequence_bias")),
            (json!({"forced_bos_token_id": 10}), Some("forced_bos_token_id")),
            (json!({"forced_eos_token_id": [1, 10]}), Some("forced_eos_token_id")),
            (json!({"suppress_tokens": [10]}), Some("suppress_tokens")),
            (json!({"begin_suppress_tokens": [10]}), Some("begin_suppress_tokens")),
        ];
        for (request, expected) in cases {
            let options = with(&GenerationConfig::default(), request.clone()).expect("well formed");
            let option = options.check(10, 3).err().map(|error| error.option);
            assert_eq!(option.as_deref(), expected, "{request}");
        }
    }

    #[test]
    fn an_end_token_that_only_the_model_names_may_lie_outside_the_vocabulary() {
        let options = model(json!({"eos_token_id": [1, 107]})).expect("valid");
        assert_eq!(options.check(10, 1), Ok(()));
        let error = with(&options, json!({"eos_token_id": [1, 108]})).expect("well formed").check(10, 1);
        assert_eq!(error.expect_err("a request's mistake").option, "eos_token_id");
    }
}
