//! Generation options under Hugging Face's names: [`GenerationOptions`] holds what one call sets, [`GenerationConfig`]
//! the complete values that a call generates with. Both are checked here and nowhere else, so the search never meets an
//! option that it does not implement. Plain data: no model, no tokenizer, no logits.
//!
//! # Design
//! As in transformers, an option that a call does not set has the value of the model's `generation_config.json`, and
//! one that the file does not set has Hugging Face's default. Both types come from one table, so that an option is one
//! entry: its meaning, type and default.
//!
//! A call is held to more than the file: an option that is unsupported, or that would have no effect, is an error in a
//! call. In the file such keys are common and mostly harmless (cache settings, `top_k` beside greedy search), so they
//! are ignored, except those that would change the result: the model opens, but [`GenerationConfig::check`] fails until
//! a call overrides them.

mod check;
mod constraints;
mod error;
mod form;
mod json;
mod processor;
mod unsupported;

use serde_json::{Map, Value};
use t5gemma_graphs::config::TokenIds;
use t5gemma_graphs::json::{parse, shown};

pub use constraints::{PrefixAllowedTokens, Sequence};
pub use error::{OptionError, OptionProblem};
pub use processor::{LogitsProcessor, Position};

use unsupported::unsupported;

/// Number of new tokens if neither a call nor the model limits the length.
const DEFAULT_NEW_TOKENS: usize = 20;

/// The second type if there is one, or else the first.
macro_rules! type_in_config {
    ($value:ty) => {
        $value
    };
    ($value:ty, $complete:ty) => {
        $complete
    };
}

/// Makes both types of one table. An entry is a doc comment and `name: type of a value, type in the configuration if it
/// is another one = default, form`.
macro_rules! generation_options {
    ($( $(#[$doc:meta])* $name:ident: $value:ty $(, $complete:ty)? = $default:expr, $form:expr; )*) => {
        /// The values of all generation options: a model's own ([`Model::generation_config`]) or, after
        /// [`GenerationConfig::with`], those of a call. Its fields have Hugging Face's names.
        ///
        /// [`Model::generation_config`]: crate::Model::generation_config
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub struct GenerationConfig {
            $( $(#[$doc])* pub $name: type_in_config!($value $(, $complete)?), )*
            /// The settings of the model's own files.
            pub(crate) model: ModelDefaults,
        }

        impl Default for GenerationConfig {
            /// Hugging Face's defaults with T5Gemma's token ids (start 2, end 1, padding 0).
            fn default() -> GenerationConfig {
                GenerationConfig { $( $name: $default, )* model: ModelDefaults::default() }
            }
        }

        /// The generation options that a call sets, under Hugging Face's names. Options that it does not set have the
        /// values of the model's [`GenerationConfig`]. Values and combinations are checked when they are laid over it:
        /// by [`GenerationConfig::with`], which [`Model::generate`](crate::Model::generate) calls.
        ///
        /// ```
        /// use t5gemma_runtime::{GenerationConfig, GenerationOptions};
        ///
        /// let options = GenerationOptions::default().num_beams(4).length_penalty(0.6);
        /// let config = GenerationConfig::default().with(&options)?;
        /// assert_eq!((config.num_beams, config.do_sample), (4, false));
        /// # Ok::<(), t5gemma_runtime::OptionError>(())
        /// ```
        #[derive(Clone, Debug, Default, PartialEq)]
        #[non_exhaustive]
        pub struct GenerationOptions {
            $( $(#[$doc])* pub $name: Option<$value>, )*
            /// Names of unsupported options that are set to the value at which they have no effect.
            pub(crate) disabled: Vec<String>,
        }

        impl GenerationOptions {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(mut self, $name: $value) -> GenerationOptions {
                    self.$name = Some($name);
                    self
                }
            )*
        }

        impl GenerationConfig {
            /// Replaces the values of the options that are set.
            fn replace(&mut self, options: &GenerationOptions) {
                $(
                    if let Some(value) = &options.$name {
                        self.$name = value.clone().into();
                    }
                )*
            }

            /// Checks each value alone: values set in Rust have not passed a form.
            fn check_values(&self) -> Result<(), OptionError> {
                $(
                    $form.check(stringify!($name), Option::<&$value>::from(&self.$name))?;
                )*
                Ok(())
            }
        }

        impl GenerationOptions {
            /// Reads one option; false if it is not one that JSON can hold.
            fn read(&mut self, name: &str, value: &Value) -> Result<bool, OptionError> {
                $(
                    if name == stringify!($name) {
                        return $form.read_into(&mut self.$name, name, value);
                    }
                )*
                Ok(false)
            }
        }
    };
}

generation_options! {
    /// Maximum number of new tokens; takes precedence over `max_length`. If neither is set, 20.
    max_new_tokens: usize, Option<usize> = None, form::AT_LEAST_1;
    /// Maximum length of a target, decoder prompt included.
    max_length: usize, Option<usize> = None, form::AT_LEAST_1;
    /// Minimum length of a target before an end-of-sequence token may follow, decoder prompt included.
    min_length: usize = 0, form::AT_LEAST_0;
    /// Minimum number of new tokens before an end-of-sequence token may follow; takes precedence over `min_length`.
    min_new_tokens: usize, Option<usize> = None, form::AT_LEAST_0;
    /// Number of beams; 1 is greedy search or, with `do_sample`, sampling.
    num_beams: usize = 1, form::AT_LEAST_1;
    /// Number of hypotheses returned for each source. At most `num_beams` with beam search; more than 1 without it
    /// requires `do_sample` or `return_alternatives`.
    num_return_sequences: usize = 1, form::AT_LEAST_1;
    /// Whether tokens are sampled instead of taking the most likely.
    do_sample: bool = false, form::FLAG;
    /// Logits are divided by it before sampling; below 1 makes likely tokens more likely.
    temperature: f64 = 1.0, form::NUMBER;
    /// Samples from the `top_k` most likely tokens only; 0 is off.
    top_k: usize = 50, form::AT_LEAST_0;
    /// Samples from the smallest set of most likely tokens whose probabilities add up to `top_p`; 1 is off.
    top_p: f64 = 1.0, form::NUMBER;
    /// Samples from tokens that are at least `min_p` times as likely as the most likely; 0 is off.
    min_p: f64 = 0.0, form::NUMBER;
    /// Samples from the most likely tokens, up to this share of the entropy of the 100 most likely.
    top_h: f64, Option<f64> = None, form::NUMBER;
    /// Samples from tokens whose logits are within this many standard deviations of the highest; 0 is off.
    top_n_sigma: f64 = 0.0, form::NUMBER;
    /// Samples from the tokens whose information content is closest to the entropy, up to a total probability of
    /// `typical_p` (locally typical sampling); 1 is off.
    typical_p: f64 = 1.0, form::NUMBER;
    /// Samples from tokens of at least this probability; 0 is off.
    epsilon_cutoff: f64 = 0.0, form::NUMBER;
    /// As `epsilon_cutoff`, with a threshold that falls as the entropy rises (eta sampling); 0 is off.
    eta_cutoff: f64 = 0.0, form::NUMBER;
    /// Whether a target ends as soon as an end-of-sequence token is the most likely, whatever would be drawn. Without
    /// beams.
    eos_on_argmax: bool = false, form::FLAG;
    /// Seed of sampling: the same seed, source and position in the request give the same draws. Random for each call if
    /// not set.
    seed: u64, Option<u64> = None, form::SEED;
    /// Number of groups of beams (diverse beam search), each of which avoids the tokens of earlier groups; 1 is off.
    num_beam_groups: usize = 1, form::AT_LEAST_1;
    /// Subtracted from a token's score for each beam of an earlier group that has chosen it in the same step.
    diversity_penalty: f64 = 0.0, form::DIVERSITY_PENALTY;
    /// Texts that end a target once one of them occurs in it; a text may begin and end inside tokens.
    stop_strings: Vec<String> = Vec::new(), form::STRINGS;
    /// Time limit in seconds, after which unfinished targets are returned as they are.
    max_time: f64, Option<f64> = None, form::SECONDS;
    /// Whether the hypotheses begin with the `num_return_sequences` most likely first tokens, each completed by greedy
    /// search or sampling.
    return_alternatives: bool = false, form::FLAG;
    /// Beam scores are divided by `length^length_penalty`.
    length_penalty: f64 = 1.0, form::LENGTH_PENALTY;
    /// Beam scores get `coverage_penalty · Σ log(min(coverage, 1))` over the source's tokens, where a token's coverage
    /// is the attention that all tokens of the target pay to it; 0 is off. Requires a model exported with alignment.
    coverage_penalty: f64 = 0.0, form::COVERAGE_PENALTY;
    /// When beam search stops.
    early_stopping: EarlyStopping = EarlyStopping::False, form::EARLY_STOPPING;
    /// With `early_stopping` true, beam search stops after `num_beams · patience` finished hypotheses, rounded.
    patience: f64 = 1.0, form::PATIENCE;
    /// The token that every target starts with.
    decoder_start_token_id: i64 = 2, form::TOKEN;
    /// The beginning-of-sequence token.
    bos_token_id: i64, Option<i64> = Some(2), form::TOKEN;
    /// The tokens that end a target. Beam search considers `max(2, 1 + their number) · num_beams` candidates in each
    /// step.
    eos_token_id: Vec<i64> = vec![1], form::TOKEN_OR_TOKENS;
    /// The token that pads sources of unequal length and targets that have ended.
    pad_token_id: i64 = 0, form::TOKEN;
    /// Scores of tokens that occur in the target are divided by it if positive and multiplied by it if negative; 1 is
    /// off.
    repetition_penalty: f64 = 1.0, form::POSITIVE;
    /// As `repetition_penalty` with the inverse value, for tokens of the source: above 1 makes them more likely; 1 is
    /// off.
    encoder_repetition_penalty: f64 = 1.0, form::POSITIVE;
    /// No n-gram of this size occurs twice in the target; 0 is off.
    no_repeat_ngram_size: usize = 0, form::AT_LEAST_0;
    /// No n-gram of this size of the source occurs in the target; 0 is off.
    encoder_no_repeat_ngram_size: usize = 0, form::AT_LEAST_0;
    /// Token sequences that must not be generated.
    bad_words_ids: Vec<Vec<i64>> = Vec::new(), form::TOKEN_SEQUENCES;
    /// Biases of token sequences.
    sequence_bias: Vec<SequenceBias> = Vec::new(), form::SEQUENCE_BIAS;
    /// The first generated token, if the decoder prompt is one token.
    forced_bos_token_id: i64, Option<i64> = None, form::TOKEN;
    /// The last token of a target that reaches the maximum length is one of these.
    forced_eos_token_id: Vec<i64> = Vec::new(), form::TOKEN_OR_TOKENS;
    /// Makes an end of sequence more likely with each token after a given number of them.
    exponential_decay_length_penalty: ExponentialDecay, Option<ExponentialDecay> = None, form::EXPONENTIAL_DECAY;
    /// Tokens that must not be generated.
    suppress_tokens: Vec<i64> = Vec::new(), form::TOKENS;
    /// Tokens that must not be generated first.
    begin_suppress_tokens: Vec<i64> = Vec::new(), form::TOKENS;
    /// Whether processed scores are renormalized to log-probabilities.
    renormalize_logits: bool = false, form::FLAG;
    /// Whether NaN and infinite scores are replaced by finite ones instead of failing.
    remove_invalid_values: bool = false, form::FLAG;
    /// Subtracted from a token's score for each time it was generated.
    frequency_penalty: f64 = 0.0, form::OPENAI_PENALTY;
    /// Subtracted from the score of every token that was generated.
    presence_penalty: f64 = 0.0, form::OPENAI_PENALTY;
    /// Whether hypotheses come with the model's log-probabilities of their tokens.
    output_logprobs: bool = false, form::FLAG;
    /// Number of most likely tokens at each position whose log-probabilities are returned too.
    top_logprobs: usize = 0, form::TOP_LOGPROBS;
    /// Whether hypotheses come with the cross-attention of each token to the source. Requires a model exported with
    /// alignment.
    output_attentions: bool = false, form::FLAG;
    /// The caller's own logits processors, applied after all others except those of sampling. Not available in JSON.
    logits_processor: Vec<LogitsProcessor> = Vec::new(), form::not_json();
    /// Prompt lookup decoding: drafts of this many tokens are copied from the source. Generates the same tokens in
    /// fewer steps. Requires greedy search with `num_return_sequences` 1, and a model exported with the logits of all
    /// positions.
    prompt_lookup_num_tokens: usize, Option<usize> = None, form::AT_LEAST_1;
    /// Maximum size of the n-gram at the end of the target that is looked up in the source; 2 if not set.
    max_matching_ngram_size: usize, Option<usize> = None, form::AT_LEAST_1;
    /// The output is one of these; empty is off. An output satisfies all constraints that are set.
    allowed_sequences: Vec<Sequence> = Vec::new(), form::SEQUENCES;
    /// Each of these occurs in the output; they are forced when the remaining length leaves room for nothing else.
    required_phrases: Vec<Sequence> = Vec::new(), form::SEQUENCES;
    /// The output is JSON of this schema.
    json_schema: Value, Option<Value> = None, form::JSON_SCHEMA;
    /// The whole output matches this regular expression, in the syntax of Rust's `regex`.
    regex: String, Option<String> = None, form::REGEX;
    /// The output matches this grammar, in llguidance's variant of Lark.
    grammar: String, Option<String> = None, form::GRAMMAR;
    /// The name of the LoRA adapter to generate with, which the model has to have loaded.
    adapter: String, Option<String> = None, form::NAME;
    /// Tells which tokens may come next. Not available in JSON.
    prefix_allowed_tokens: PrefixAllowedTokens, Option<PrefixAllowedTokens> = None, form::not_json();
}

/// When beam search stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EarlyStopping {
    /// When `num_beams` hypotheses have finished and no running beam is better than the worst of them at its present
    /// length and coverage.
    False,
    /// As soon as `num_beams` hypotheses have finished.
    True,
    /// When `num_beams` hypotheses have finished and no running beam can become better than the worst of them.
    Never,
}

impl EarlyStopping {
    /// As JSON.
    fn as_str(self) -> &'static str {
        match self {
            EarlyStopping::False => "false",
            EarlyStopping::True => "true",
            EarlyStopping::Never => "\"never\"",
        }
    }
}

/// A token sequence and the bias that its last token gets where it would complete the sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceBias {
    /// The sequence.
    pub tokens: Vec<i64>,
    /// Added to the score of its last token.
    pub bias: f32,
}

/// Scores of end-of-sequence tokens grow by `|score| · (factor^n - 1)`, `n` tokens after `start` generated ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExponentialDecay {
    /// Number of generated tokens after which scores grow.
    pub start: usize,
    /// The base of the growth; below 1, scores shrink.
    pub factor: f64,
}

/// What a model's own files say, as far as checks need it beside the values of a call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelDefaults {
    /// The maximum length, while it is the one of the model's files: such a length is clipped to what the model can
    /// reach, where a call's is an error.
    max_length: Option<MaxLength>,
    /// The end-of-sequence tokens. Small models keep Gemma's `[1, 107]` whatever their vocabulary; one outside of it is
    /// never generated, where in a call it is an error.
    eos_token_id: Vec<i64>,
    /// Names and JSON values of unsupported options in `generation_config.json`.
    unsupported: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct MaxLength {
    max_new_tokens: Option<usize>,
    max_length: Option<usize>,
}

impl Default for ModelDefaults {
    fn default() -> ModelDefaults {
        ModelDefaults { max_length: Some(MaxLength::default()), eos_token_id: vec![1], unsupported: Vec::new() }
    }
}

impl GenerationConfig {
    /// Reads a model's own: the text of its `generation_config.json` if it has one, laid over `tokens` of its
    /// `config.json`, laid over [`GenerationConfig::default`]. As in transformers, a `generation_config.json` without
    /// an `eos_token_id`, or with null, has no end-of-sequence token, whatever `config.json` says.
    ///
    /// # Errors
    /// The first option whose value is invalid. Unknown keys are ignored.
    pub fn of_model(generation_config: Option<&str>, tokens: &TokenIds) -> Result<GenerationConfig, OptionError> {
        let mut config = GenerationConfig::default();
        if let Some(bos) = tokens.bos {
            config.bos_token_id = Some(bos);
            config.decoder_start_token_id = bos;
        }
        if !tokens.eos.is_empty() {
            config.eos_token_id.clone_from(&tokens.eos);
            config.model.eos_token_id.clone_from(&tokens.eos);
        }
        config.pad_token_id = tokens.pad.unwrap_or(config.pad_token_id);
        let Some(text) = generation_config else { return Ok(config) };
        let value = parse(text).map_err(|error| OptionError::new("", "a JSON object", error.to_string()))?;
        let Value::Object(object) = value else { return Err(OptionError::new("", "a JSON object", shown(&value))) };
        config.eos_token_id = Vec::new();
        let mut unsupported_here = Vec::new();
        let options = GenerationOptions::read_all(&object, |_, name, value| {
            if unsupported(name).is_some_and(|option| option.changes_results && !option.neutral.is(value)) {
                unsupported_here.push((name.to_string(), shown(value)));
            }
            Ok(())
        })?;
        config.lay_over(&options);
        config.model = ModelDefaults {
            max_length: Some(MaxLength { max_new_tokens: config.max_new_tokens, max_length: config.max_length }),
            eos_token_id: config.eos_token_id.clone(),
            unsupported: unsupported_here,
        };
        // Few models can return them, and files set it for other runtimes.
        config.output_attentions = false;
        Ok(config)
    }

    /// Lays the options of a call over this configuration.
    ///
    /// # Errors
    /// The first option that has an invalid value, that contradicts others, or that would have no effect.
    pub fn with(&self, options: &GenerationOptions) -> Result<GenerationConfig, OptionError> {
        let mut config = self.clone();
        config.lay_over(options);
        config.model.unsupported.retain(|(name, _)| !options.disabled.contains(name));
        if options.max_new_tokens.or(options.max_length).is_some() {
            config.model.max_length = None;
        }
        config.check_values()?;
        config.check_together()?;
        self.check_precedence(options)?;
        config.check_effects(options)?;
        Ok(config)
    }

    /// Lays the options of a JSON object over this configuration: [`GenerationOptions::from_json`] and
    /// [`GenerationConfig::with`].
    ///
    /// # Errors
    /// As these.
    pub fn with_json(&self, options: &Map<String, Value>) -> Result<GenerationConfig, OptionError> {
        self.with(&GenerationOptions::from_json(options)?)
    }

    /// Hugging Face's defaults with the token ids of this configuration.
    pub fn plain(&self) -> GenerationConfig {
        GenerationConfig {
            decoder_start_token_id: self.decoder_start_token_id,
            bos_token_id: self.bos_token_id,
            eos_token_id: self.eos_token_id.clone(),
            pad_token_id: self.pad_token_id,
            model: ModelDefaults { eos_token_id: self.model.eos_token_id.clone(), ..ModelDefaults::default() },
            ..GenerationConfig::default()
        }
    }

    /// The maximum length of a target whose decoder prompt has `prompt_len` tokens.
    pub fn max_length(&self, prompt_len: usize) -> usize {
        match (self.max_new_tokens, self.max_length) {
            (Some(new_tokens), _) => prompt_len.saturating_add(new_tokens),
            (None, Some(length)) => length,
            (None, None) => prompt_len.saturating_add(DEFAULT_NEW_TOKENS),
        }
    }

    /// Whether neither the model nor a call limits the length.
    pub(crate) fn has_no_length(&self) -> bool {
        self.max_new_tokens.is_none() && self.max_length.is_none()
    }

    /// Clips a maximum length that comes from the model's own files to `longest`, the longest target that the model can
    /// continue. A call's is left as it is.
    pub(crate) fn clipped_to(mut self, longest: usize, prompt_len: usize) -> GenerationConfig {
        let now = MaxLength { max_new_tokens: self.max_new_tokens, max_length: self.max_length };
        let is_of_model = self.model.max_length == Some(now);
        if is_of_model && prompt_len < longest && longest < self.max_length(prompt_len) {
            (self.max_new_tokens, self.max_length) = (None, Some(longest));
        }
        self
    }

    /// Number of finished hypotheses of `beams` beams after which early stopping ends the search.
    pub(crate) fn patient_size(&self, beams: usize) -> usize {
        (beams as f64 * self.patience).round() as usize
    }

    /// Whether the output as a whole is constrained.
    pub(crate) fn is_constrained(&self) -> bool {
        !(self.allowed_sequences.is_empty() && self.required_phrases.is_empty())
            || self.json_schema.is_some()
            || self.regex.is_some()
            || self.grammar.is_some()
            || self.prefix_allowed_tokens.is_some()
    }

    /// Replaces the values of the options that are set. The start token follows the beginning-of-sequence token where
    /// the two were the same and only the latter is set.
    fn lay_over(&mut self, options: &GenerationOptions) {
        let starts_with_bos = self.bos_token_id == Some(self.decoder_start_token_id);
        self.replace(options);
        if let (true, None, Some(bos)) = (starts_with_bos, options.decoder_start_token_id, self.bos_token_id) {
            self.decoder_start_token_id = bos;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    pub(super) fn model(generation_config: Value) -> Result<GenerationConfig, OptionError> {
        GenerationConfig::of_model(Some(&generation_config.to_string()), &TokenIds::default())
    }

    pub(super) fn with(config: &GenerationConfig, request: Value) -> Result<GenerationConfig, OptionError> {
        config.with_json(request.as_object().expect("requests are objects"))
    }

    #[test]
    fn options_set_in_rust_are_those_of_json() {
        let options = GenerationOptions::default()
            .num_beams(4)
            .early_stopping(EarlyStopping::Never)
            .max_new_tokens(9)
            .sequence_bias(vec![SequenceBias { tokens: vec![5], bias: 2.0 }]);
        let request =
            json!({"num_beams": 4, "early_stopping": "never", "max_new_tokens": 9, "sequence_bias": [[[5], 2.0]]});
        assert_eq!(GenerationOptions::from_json(request.as_object().expect("an object")), Ok(options));
    }

    #[test]
    fn options_set_in_rust_are_checked() {
        let default = GenerationOptions::default;
        let cases = [
            (default().num_beams(0), "num_beams: expected an integer of at least 1, found 0"),
            (default().num_beams(300), "num_beams: expected an integer from 1 to 256, found 300"),
            (default().repetition_penalty(f64::NAN), "repetition_penalty: expected a positive number, found NaN"),
            (default().temperature(0.5), "temperature requires do_sample true (got false)"),
            (
                default().stop_strings(vec![String::new()]),
                "stop_strings: expected a non-empty string or a list of them, found [\"\"]",
            ),
        ];
        for (options, message) in cases {
            assert_eq!(GenerationConfig::default().with(&options).expect_err(message).to_string(), message);
        }
        let config = GenerationConfig { length_penalty: 11.0, ..GenerationConfig::default() };
        assert_eq!(config.check(10, 1).expect_err("changed afterwards").option, "length_penalty");
    }

    #[test]
    fn options_without_effect_are_accepted_at_their_defaults() {
        for request in [
            json!({"length_penalty": 1, "early_stopping": false}),
            json!({"temperature": 1.0, "top_p": 1, "use_cache": true, "num_beam_groups": 1, "output_scores": false}),
            json!({"do_sample": null, "stop_strings": null, "max_new_tokens": null}),
        ] {
            assert_eq!(with(&GenerationConfig::default(), request), Ok(GenerationConfig::default()));
        }
        let beams = model(json!({"num_beams": 4, "length_penalty": 0.6})).expect("valid");
        assert!(with(&beams, json!({"num_beams": 1})).is_ok(), "what a request does not give cannot be its error");
    }

    #[test]
    fn token_ids_come_from_the_nearest_that_names_them() {
        let tokens = TokenIds { bos: Some(12), eos: vec![11], pad: Some(10) };
        // name, generation_config.json, request, start token, end tokens, padding
        type Case = (&'static str, Option<Value>, Value, i64, Vec<i64>, i64);
        let cases: Vec<Case> = vec![
            ("config.json", None, json!({}), 12, vec![11], 10),
            (
                "generation_config.json",
                Some(json!({"eos_token_id": [1, 107], "pad_token_id": 0, "bos_token_id": 2})),
                json!({}),
                2,
                vec![1, 107],
                0,
            ),
            (
                "null is no end token",
                Some(json!({"eos_token_id": null})),
                json!({"pad_token_id": null}),
                12,
                vec![],
                10,
            ),
            ("nor is none", Some(json!({"max_new_tokens": 4})), json!({}), 12, vec![], 10),
            ("null in a request is not given", None, json!({"eos_token_id": null}), 12, vec![11], 10),
            ("a request", Some(json!({"eos_token_id": 1})), json!({"eos_token_id": 7}), 12, vec![7], 10),
            ("start follows bos", None, json!({"bos_token_id": 5}), 5, vec![11], 10),
            ("start of its own", Some(json!({"decoder_start_token_id": 8})), json!({"bos_token_id": 5}), 8, vec![], 10),
            ("no end tokens", None, json!({"eos_token_id": []}), 12, vec![], 10),
        ];
        for (name, generation_config, request, start, eos, pad) in cases {
            let text = generation_config.map(|value| value.to_string());
            let options = GenerationConfig::of_model(text.as_deref(), &tokens).expect(name);
            let options = with(&options, request).expect(name);
            assert_eq!(options.decoder_start_token_id, start, "{name}");
            assert_eq!((options.eos_token_id, options.pad_token_id), (eos, pad), "{name}");
        }
        let bare = GenerationConfig::of_model(None, &TokenIds::default()).expect("nothing can be wrong");
        assert_eq!(bare, GenerationConfig::default());
    }

    #[test]
    fn a_generation_config_may_hold_options_that_are_ignored() {
        let config = json!({
            "_from_model_config": true, "cache_implementation": "hybrid", "transformers_version": "4.53.0.dev0",
            "top_k": 64, "top_p": 0.95, "temperature": 0.7, "use_cache": false, "output_attentions": true,
            "something_new": {"a": 1},
        });
        let kept = GenerationConfig {
            top_k: 64,
            top_p: 0.95,
            temperature: 0.7,
            eos_token_id: vec![],
            model: ModelDefaults { eos_token_id: vec![], ..ModelDefaults::default() },
            ..GenerationConfig::default()
        };
        assert_eq!(model(config), Ok(kept));
        let odd = model(json!({"temperature": 0})).expect("it would matter in sampling only");
        assert_eq!(odd.check(256, 1), Ok(()));
        assert_eq!(model(json!({"num_beams": "4"})).expect_err("a bad value").option, "num_beams");
    }

    #[test]
    fn a_model_may_ask_for_sampling_and_a_request_override_it() {
        let sampling = model(json!({"do_sample": true, "top_k": 64, "num_return_sequences": 3})).expect("it opens");
        assert_eq!(sampling.check(256, 1), Ok(()));
        let hotter = with(&sampling, json!({"temperature": 2})).expect("the model samples");
        assert_eq!((hotter.top_k, hotter.temperature), (64, 2.0));
        let greedy = with(&sampling, json!({"do_sample": false, "num_return_sequences": 1})).expect("well formed");
        assert_eq!(greedy.check(256, 1), Ok(()));
        let error = with(&sampling, json!({"do_sample": false})).expect_err("three of one beam");
        assert_eq!(error.option, "num_return_sequences");
    }

    #[test]
    fn a_model_with_an_unsupported_option_opens_but_does_not_generate_until_it_is_overridden() {
        let guided = model(json!({"guidance_scale": 2})).expect("it opens");
        let error = guided.check(256, 1).expect_err("not obeyed");
        assert_eq!(
            error.to_string(),
            "guidance_scale: unsupported generation option; the model's generation_config.json sets it, override it \
             with 1 (got 2)"
        );
        assert_eq!(with(&guided, json!({"guidance_scale": 1})).expect("overridden").check(256, 1), Ok(()));
    }

    #[test]
    fn lengths_have_the_precedence_they_have_in_transformers() {
        // name, generation_config.json, request, the longest target after a prompt of 3
        let cases = [
            ("default", json!({}), json!({}), Some(23)),
            ("max_length counts the prompt", json!({}), json!({"max_length": 17}), Some(17)),
            ("max_new_tokens does not", json!({}), json!({"max_new_tokens": 17}), Some(20)),
            ("both", json!({}), json!({"max_new_tokens": 4, "max_length": 17}), Some(7)),
            ("the model's max_length", json!({"max_length": 17}), json!({}), Some(17)),
            ("is overridden", json!({"max_length": 17}), json!({"max_new_tokens": 4}), Some(7)),
            ("cannot override", json!({"max_new_tokens": 4}), json!({"max_length": 17}), None),
        ];
        for (name, generation_config, request, expected) in cases {
            let options = with(&model(generation_config).expect(name), request);
            assert_eq!(options.map(|options| options.max_length(3)).ok(), expected, "{name}");
        }
        let error = with(&model(json!({"min_new_tokens": 4})).expect("valid"), json!({"min_length": 2}));
        assert_eq!(
            error.expect_err("it would have no effect").to_string(),
            "min_length: expected min_new_tokens instead (already 4, which takes precedence), found 2"
        );
    }

    #[test]
    fn a_length_that_only_the_model_names_ends_where_the_model_does() {
        let of_model = model(json!({"max_new_tokens": 160})).expect("valid");
        let within =
            |options: &GenerationConfig, prompt_len| options.clone().clipped_to(64, prompt_len).max_length(prompt_len);
        assert_eq!(within(&of_model, 1), 64);
        assert_eq!(within(&of_model, 64), 224, "there is no room at all, which is for `check` to say");
        assert_eq!(within(&with(&of_model, json!({"num_beams": 4})).expect("valid"), 1), 64);
        assert_eq!(within(&with(&of_model, json!({"max_new_tokens": null})).expect("valid"), 1), 64);
        assert_eq!(within(&with(&of_model, json!({"max_new_tokens": 160})).expect("valid"), 1), 161);
        assert_eq!(within(&GenerationConfig { max_new_tokens: Some(100), ..of_model.clone() }, 1), 101);
        assert_eq!(within(&model(json!({"max_length": 500})).expect("valid"), 1), 64);
        assert_eq!(within(&model(json!({"max_length": 50})).expect("valid"), 1), 50);
        let bare = GenerationConfig::of_model(None, &TokenIds::default()).expect("nothing can be wrong");
        assert_eq!(bare.clone().clipped_to(16, 1).max_length(1), 16);
        assert_eq!(with(&bare, json!({"max_length": 500})).expect("valid").clipped_to(64, 1).max_length(1), 500);
    }

    #[test]
    fn a_file_is_read_as_python_reads_it() {
        let text = "\u{feff}{\"max_length\": 9, \"initializer_range\": NaN}";
        let options = GenerationConfig::of_model(Some(text), &TokenIds::default()).expect("as Python writes it");
        assert_eq!(options.max_length, Some(9));
        let error = GenerationConfig::of_model(Some("{\"repetition_penalty\": NaN}"), &TokenIds::default());
        assert_eq!(error.expect_err("no number").option, "repetition_penalty");
    }
}
