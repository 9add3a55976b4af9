//! `GenerationOptions`: Hugging Face's generation options as a checked value. Every option of a request is read here or
//! refused here, so the search never meets one that it does not implement.
//!
//! # Design
//! A request is held to more than a model's `generation_config.json`: an option that this version lacks, or that would
//! have no effect, is an error in a request. In the file such keys are common and mostly harmless (cache settings,
//! `top_k` beside greedy search), so they are passed over, except those that would change the result: these are kept in
//! `unsupported`, the model opens, and a request has to override them before anything is generated.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::{fmt, slice};

use serde_json::{Map, Value};
use t5gemma_graphs::config::{TokenIds, shown};
use t5gemma_graphs::json;

use crate::constraint::Constraints;
use crate::scores::Kept;

/// What to generate and how: the options of Hugging Face's `generate` under their names there.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationOptions {
    /// How many tokens may be generated; has precedence over `max_length`. Neither given: 20.
    pub max_new_tokens: Option<usize>,
    /// How long a target may become, decoder prompt included.
    pub max_length: Option<usize>,
    /// `max_new_tokens` and `max_length` as the model's own files have them. As long as they are what they are there, they end
    /// where the model does; those of a request are refused where it cannot reach them.
    pub length_of_model: Option<(Option<usize>, Option<usize>)>,
    /// No end of sequence before the target has this length, decoder prompt included.
    pub min_length: usize,
    /// No end of sequence before so many tokens have been generated; has precedence over `min_length`.
    pub min_new_tokens: Option<usize>,
    /// Beams of beam search; 1 is greedy search, or sampling.
    pub num_beams: usize,
    /// How many hypotheses are returned for a source; with beams at most as many, without only where each differs: by
    /// `do_sample` or `return_alternatives`.
    pub num_return_sequences: usize,
    /// Whether tokens are drawn with the probabilities that are left after the options below.
    pub do_sample: bool,
    /// Scores are divided by it before a draw; below 1 makes likely tokens likelier.
    pub temperature: f64,
    /// Only so many best tokens are drawn from; 0 is off.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities add up to it are drawn from; 1 is off.
    pub top_p: f64,
    /// Only tokens with at least such a part of the best token's probability are drawn from; 0 is off.
    pub min_p: f64,
    /// Only the likeliest tokens that carry such a part of the entropy are drawn from, of 100.
    pub top_h: Option<f64>,
    /// Only tokens whose scores are within so many standard deviations of the best are drawn from; 0 is off.
    pub top_n_sigma: f64,
    /// Only the tokens closest to the expected information whose probabilities add up to it are drawn from; 1 is off.
    pub typical_p: f64,
    /// Only tokens with at least this probability are drawn from; 0 is off.
    pub epsilon_cutoff: f64,
    /// The same with a bound that falls where the choice is wide; 0 is off.
    pub eta_cutoff: f64,
    /// What the draws depend on, with the source and its place in the request; another one for each call if not given.
    pub seed: Option<u64>,
    /// Groups that the beams are in; those of one avoid the tokens of the others. 1 is off.
    pub num_beam_groups: usize,
    /// Subtracted from the score of a token for each beam of an earlier group that has just chosen it.
    pub diversity_penalty: f64,
    /// Texts that end a target in which one of them has come to stand; they may begin in one token and end in another.
    pub stop_strings: Vec<String>,
    /// After so many seconds all targets end as they are.
    pub max_time: Option<f64>,
    /// Whether each hypothesis begins with another of the best first tokens, which are then completed.
    pub return_alternatives: bool,
    /// Beam scores are divided by `length^length_penalty`.
    pub length_penalty: f64,
    /// Beam scores get so many times the sum of `log(min(coverage, 1))` over the source's tokens, the coverage of one being what
    /// all tokens of the target attended to it; 0 is off. Needs a model exported with `--alignment`.
    pub coverage_penalty: f64,
    /// When beam search is content with the hypotheses it has.
    pub early_stopping: EarlyStopping,
    /// With `early_stopping` true, beam search goes on until `num_beams · patience` hypotheses have finished, rounded.
    pub patience: f64,
    /// What a target starts with.
    pub decoder_start_token_id: i64,
    /// The beginning-of-sequence token.
    pub bos_token_id: Option<i64>,
    /// The tokens that end a target. Their number, repetitions included, widens the choice of beam search.
    pub eos_token_id: Vec<i64>,
    /// The end tokens that the model's own files name. Small models keep Gemma's `[1, 107]` whatever their vocabulary; one
    /// outside of it is never generated, where in a request it is a mistake.
    pub eos_of_model: Vec<i64>,
    /// What fills rows that have ended.
    pub pad_token_id: i64,
    /// Scores of tokens in the target are divided by it if positive, multiplied if negative; 1 is off.
    pub repetition_penalty: f64,
    /// The inverse of it is what `repetition_penalty` is, for the tokens of the source; 1 is off.
    pub encoder_repetition_penalty: f64,
    /// No sequence of so many tokens occurs twice in the target; 0 is off.
    pub no_repeat_ngram_size: usize,
    /// No sequence of so many tokens of the source occurs in the target; 0 is off.
    pub encoder_no_repeat_ngram_size: usize,
    /// Token sequences that are not generated.
    pub bad_words_ids: Vec<Vec<i64>>,
    /// Token sequences, and what is added to the score of their last token where it would complete them.
    pub sequence_bias: Vec<(Vec<i64>, f32)>,
    /// The token generated first if the decoder prompt is one token.
    pub forced_bos_token_id: Option<i64>,
    /// The tokens one of which is generated last if the maximum length is reached.
    pub forced_eos_token_id: Vec<i64>,
    /// After how many generated tokens ending becomes likelier, and by which factor with each further token.
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    /// Tokens that are never generated.
    pub suppress_tokens: Vec<i64>,
    /// Tokens that are not generated first.
    pub begin_suppress_tokens: Vec<i64>,
    /// Whether processed scores are made log-probabilities again.
    pub renormalize_logits: bool,
    /// Whether NaN and infinite scores are replaced by finite ones.
    pub remove_invalid_values: bool,
    /// Subtracted from the score of a token for each time it was generated.
    pub frequency_penalty: f64,
    /// Subtracted from the score of a token that was generated, however often.
    pub presence_penalty: f64,
    /// Whether hypotheses come with the model's log-probabilities of their tokens.
    pub output_logprobs: bool,
    /// Of how many of the likeliest tokens at each place these are given too.
    pub top_logprobs: usize,
    /// Whether hypotheses come with what each token attended to in the source. Needs a model exported with `--alignment`.
    pub output_attentions: bool,
    /// The caller's own changes to scores, after all others but those of sampling. Not an option of requests.
    pub logits_processor: Vec<LogitsProcessor>,
    /// Drafts of so many tokens are looked up in the source, for greedy search of one row. Needs a model that gives the
    /// scores of all positions. Which tokens are generated does not depend on it.
    pub prompt_lookup_num_tokens: Option<usize>,
    /// How many of the last tokens are looked for then, at most; not given: 2.
    pub max_matching_ngram_size: Option<usize>,
    /// What the output as a whole has to be.
    pub constraints: Constraints,
    /// Names and JSON values of what `generation_config.json` asks for and this version cannot do. Until a request
    /// overrides each of them, [`GenerationOptions::check`] fails.
    pub unsupported: Vec<(String, String)>,
}

/// A change to scores that the caller makes.
#[derive(Clone)]
pub struct LogitsProcessor(Arc<Change>);

type Change = dyn Fn(&Position, &mut [f32]) + Send + Sync;

/// Where scores belong: what a [`LogitsProcessor`] is told.
#[derive(Clone, Copy, Debug)]
pub struct Position<'a> {
    /// The tokens of the source, with the padding that it was given with.
    pub source: &'a [i64],
    /// Prompt and generated tokens of the target so far.
    pub history: &'a [i64],
    /// How many of these are the prompt.
    pub prompt_len: usize,
}

impl LogitsProcessor {
    /// Makes one of a function that changes the scores of the next token, one for each of the vocabulary: logits, or
    /// log-probabilities in beam search. A score of −∞ forbids its token. It is called for each target at each step and
    /// must not depend on anything but what it is given, or results will depend on neighbours in a batch.
    pub fn new(change: impl Fn(&Position, &mut [f32]) + Send + Sync + 'static) -> LogitsProcessor {
        LogitsProcessor(Arc::new(change))
    }

    pub(crate) fn apply(&self, place: &Position, scores: &mut [f32]) {
        (self.0)(place, scores);
    }
}

impl fmt::Debug for LogitsProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogitsProcessor(…)")
    }
}

/// Equal are clones of one.
impl PartialEq for LogitsProcessor {
    fn eq(&self, other: &LogitsProcessor) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// When beam search is content with the hypotheses it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EarlyStopping {
    /// When `num_beams` have finished and no beam is better than the worst of them at its present length and coverage.
    False,
    /// As soon as `num_beams` have finished.
    True,
    /// When `num_beams` have finished and no beam can become better than the worst of them.
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

/// An option that cannot be taken as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// The option's name; empty for the document as a whole.
    pub option: String,
    /// What is wrong with it.
    pub problem: OptionProblem,
    /// What stands there, or what stands where something else is required.
    pub found: String,
}

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionProblem {
    /// Its value: this would have been accepted.
    Expected(String),
    /// Another option: this is required for it to be given.
    Requires(String),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = if self.option.is_empty() { "the document" } else { &self.option };
        match &self.problem {
            OptionProblem::Expected(expected) => write!(f, "{option}: expected {expected}, found {}", self.found),
            OptionProblem::Requires(required) => write!(f, "{option} requires {required} (got {})", self.found),
        }
    }
}

impl std::error::Error for OptionError {}

impl OptionError {
    pub(crate) fn new(option: &str, expected: impl Into<String>, found: impl Into<String>) -> OptionError {
        let problem = OptionProblem::Expected(expected.into());
        OptionError { option: option.to_string(), problem, found: found.into() }
    }

    fn requires(option: &str, required: impl Into<String>, found: impl Into<String>) -> OptionError {
        let problem = OptionProblem::Requires(required.into());
        OptionError { option: option.to_string(), problem, found: found.into() }
    }
}

/// Sums of so large a bias over a whole target are still finite; -1e9 is as good as forbidden already.
const MAX_BIAS: f32 = 1e30;

/// Tokens to generate at most where nothing is said of it.
const DEFAULT_NEW_TOKENS: usize = 20;

/// Bounds what one source may cost; far above any useful number.
const MAX_NUM_BEAMS: usize = 256;
/// With the longest source it is still far from the number that stands for −∞ in beam search.
const MAX_COVERAGE_PENALTY: f64 = 100.0;
/// Bounds the hypotheses that are kept.
const MAX_PATIENCE: f64 = 100.0;
/// Bounds the size of a result.
const MAX_TOP_LOGPROBS: usize = 1000;
/// As `MAX_NUM_BEAMS`, without beams.
const MAX_NUM_RETURN_SEQUENCES: usize = 256;

impl Default for GenerationOptions {
    /// Hugging Face's defaults with T5Gemma's token ids (start 2, end 1, padding 0).
    fn default() -> GenerationOptions {
        GenerationOptions {
            max_new_tokens: None,
            max_length: None,
            length_of_model: Some((None, None)),
            min_length: 0,
            min_new_tokens: None,
            num_beams: 1,
            num_return_sequences: 1,
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            top_h: None,
            top_n_sigma: 0.0,
            typical_p: 1.0,
            epsilon_cutoff: 0.0,
            eta_cutoff: 0.0,
            seed: None,
            num_beam_groups: 1,
            diversity_penalty: 0.0,
            stop_strings: Vec::new(),
            max_time: None,
            return_alternatives: false,
            length_penalty: 1.0,
            coverage_penalty: 0.0,
            early_stopping: EarlyStopping::False,
            patience: 1.0,
            decoder_start_token_id: 2,
            bos_token_id: Some(2),
            eos_token_id: vec![1],
            eos_of_model: vec![1],
            pad_token_id: 0,
            repetition_penalty: 1.0,
            encoder_repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            encoder_no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            sequence_bias: Vec::new(),
            forced_bos_token_id: None,
            forced_eos_token_id: Vec::new(),
            exponential_decay_length_penalty: None,
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            renormalize_logits: false,
            remove_invalid_values: false,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            output_logprobs: false,
            top_logprobs: 0,
            output_attentions: false,
            logits_processor: Vec::new(),
            prompt_lookup_num_tokens: None,
            max_matching_ngram_size: None,
            constraints: Constraints::default(),
            unsupported: Vec::new(),
        }
    }
}

impl GenerationOptions {
    /// Reads a model's defaults: the text of its `generation_config.json` if it has one, laid over `tokens` of its
    /// `config.json`, laid over [`GenerationOptions::default`]. With a `generation_config.json` that names no `eos_token_id`,
    /// or null, no token ends a target, as in transformers.
    ///
    /// # Errors
    /// The first option with a value that it cannot have. Unknown keys are passed over.
    pub fn of_model(generation_config: Option<&str>, tokens: &TokenIds) -> Result<GenerationOptions, OptionError> {
        let mut options = GenerationOptions::default();
        if let Some(bos) = tokens.bos {
            options.bos_token_id = Some(bos);
            options.decoder_start_token_id = bos;
        }
        if !tokens.eos.is_empty() {
            options.eos_token_id.clone_from(&tokens.eos);
            options.eos_of_model.clone_from(&tokens.eos);
        }
        options.pad_token_id = tokens.pad.unwrap_or(options.pad_token_id);
        let Some(text) = generation_config else { return Ok(options) };
        let value = json::parse(text).map_err(|error| OptionError::new("", "a JSON object", error.to_string()))?;
        let Value::Object(object) = value else { return Err(OptionError::new("", "a JSON object", shown(&value))) };
        // A file that names no end token, or null, has none: `GenerationConfig.from_pretrained` does not look at config.json
        // where there is a generation_config.json.
        options.eos_token_id = Vec::new();
        options.read_all(&object, |options, name, value| {
            if let Some((_, neutral, Effect::Result)) = unsupported(name)
                && !neutral.is(value)
            {
                options.unsupported.push((name.to_string(), shown(value)));
            }
            Ok(())
        })?;
        options.eos_of_model.clone_from(&options.eos_token_id);
        options.length_of_model = Some((options.max_new_tokens, options.max_length));
        // Not every model can tell them, and files set it for other runtimes.
        options.output_attentions = false;
        Ok(options)
    }

    /// Lays a request's options over these. A `null` is an option not given; of `max_new_tokens` and `max_length`, and
    /// of `min_new_tokens` and `min_length`, the first has precedence.
    ///
    /// # Errors
    /// The first option that is unknown, not supported, without effect, or has a value that it cannot have, and options
    /// that contradict each other.
    pub fn with(&self, request: &Map<String, Value>) -> Result<GenerationOptions, OptionError> {
        let mut options = self.clone();
        options.read_all(request, |options, name, value| match unsupported(name) {
            Some((_, neutral, _)) if neutral.is(value) => {
                options.unsupported.retain(|(unsupported, _)| unsupported != name);
                Ok(())
            }
            Some((_, neutral, _)) => {
                let expected = match neutral {
                    Neutral::Absent => "it left out (it is not supported by this version)".to_string(),
                    _ => format!("{neutral} or it left out (it is not supported by this version)"),
                };
                Err(OptionError::new(name, expected, shown(value)))
            }
            None => Err(OptionError::new(name, "the name of a generation option", "an unknown name")),
        })?;
        options.check_together()?;

        let given = |name: &str| request.get(name).filter(|value| !value.is_null());
        if given("max_new_tokens").or(given("max_length")).is_some() {
            options.length_of_model = None;
        }
        for (length, new_tokens, set) in [
            ("max_length", "max_new_tokens", self.max_new_tokens),
            ("min_length", "min_new_tokens", self.min_new_tokens),
        ] {
            if let (Some(value), None, Some(set)) = (given(length), given(new_tokens), set) {
                let expected = format!("{new_tokens} in its place (it is set to {set} already, and has precedence)");
                return Err(OptionError::new(length, expected, shown(value)));
            }
        }
        let default = GenerationOptions::default();
        for (acts, required, found, of) in [
            (options.num_beams > 1, "num_beams above 1", "1", of_beam_search as Named),
            (options.do_sample, "do_sample true", "false", of_sampling),
            (options.num_beam_groups > 1, "num_beam_groups above 1", "1", of_groups),
            (options.output_logprobs, "output_logprobs true", "false", of_logprobs),
        ] {
            for ((name, value_now), (_, default)) in of(&options).into_iter().zip(of(&default)) {
                if given(name).is_some() && !acts && value_now != default {
                    return Err(OptionError::requires(name, required, found));
                }
            }
        }
        Ok(options)
    }

    /// Why the least length that is asked for cannot be reached, if it cannot: targets end at the greatest length then, of which
    /// transformers warns.
    pub fn check_lengths(&self) -> Result<(), OptionError> {
        let (least, needed, most, found) = match (self.min_new_tokens, self.max_new_tokens, self.max_length) {
            (Some(least), Some(most), _) => ("min_new_tokens", least, "max_new_tokens", most),
            (Some(least), None, None) => ("min_new_tokens", least, "max_new_tokens", DEFAULT_NEW_TOKENS),
            // A decoder prompt is one token at least.
            (Some(least), None, Some(most)) => ("min_new_tokens", least + 1, "max_length", most),
            (None, None, Some(most)) => ("min_length", self.min_length, "max_length", most),
            _ => return Ok(()),
        };
        if needed > found {
            return Err(OptionError::requires(least, format!("{most} of at least {needed}"), found.to_string()));
        }
        Ok(())
    }

    /// A seed for a call that gives none: another one each time.
    pub fn draw_seed() -> u64 {
        RandomState::new().build_hasher().finish()
    }

    /// How many hypotheses of `beams` beams have to finish before early stopping ends the search.
    pub(crate) fn patient_size(&self, beams: usize) -> usize {
        (beams as f64 * self.patience).round() as usize
    }

    /// Tells how long a target may become whose decoder prompt has `prompt_len` tokens.
    pub fn max_length(&self, prompt_len: usize) -> usize {
        match (self.max_new_tokens, self.max_length) {
            (Some(new_tokens), _) => prompt_len.saturating_add(new_tokens),
            (None, Some(length)) => length,
            (None, None) => prompt_len.saturating_add(DEFAULT_NEW_TOKENS),
        }
    }

    /// These, with a length that only the model's own files ask for ending at the `longest` target that the model can continue.
    pub(crate) fn within(mut self, longest: usize, prompt_len: usize) -> GenerationOptions {
        let is_of_model = self.length_of_model == Some((self.max_new_tokens, self.max_length));
        if is_of_model && prompt_len < longest && longest < self.max_length(prompt_len) {
            (self.max_new_tokens, self.max_length) = (None, Some(longest));
        }
        self
    }

    /// Checks what depends on the model and the decoder prompt, just before generating.
    ///
    /// # Errors
    /// A token id outside the vocabulary, a `max_length` that leaves no token to generate, something that
    /// `generation_config.json` asks for and this version cannot do, and options that contradict each other.
    pub fn check(&self, vocab_size: usize, prompt_len: usize) -> Result<(), OptionError> {
        if let Some((name, value)) = self.unsupported.first() {
            let expected = match unsupported(name) {
                Some((_, Neutral::Absent, _)) | None => {
                    "nothing (the model's generation_config.json sets it, and it is not supported by this version)"
                        .into()
                }
                Some((_, neutral, _)) => format!(
                    "{neutral} in the request (the model's generation_config.json sets it otherwise, which is not \
                     supported by this version)"
                ),
            };
            return Err(OptionError::new(name, expected, value));
        }
        self.check_together()?;
        if self.max_length(prompt_len) <= prompt_len {
            let (name, value) = match self.max_new_tokens {
                Some(value) => ("max_new_tokens", value),
                None => ("max_length", self.max_length(prompt_len)),
            };
            let expected = format!("room for at least one token after the {prompt_len} of the decoder prompt");
            return Err(OptionError::new(name, expected, value.to_string()));
        }
        if self.num_beams > 1 && self.eos_token_id.len() >= vocab_size {
            let expected = format!("fewer than the {vocab_size} tokens of the vocabulary");
            return Err(OptionError::new("eos_token_id", expected, self.eos_token_id.len().to_string()));
        }
        let of_request: Vec<i64> =
            self.eos_token_id.iter().copied().filter(|id| !self.eos_of_model.contains(id)).collect();
        let biased: Vec<i64> = self.sequence_bias.iter().flat_map(|(tokens, _)| tokens).copied().collect();
        for (name, tokens) in [
            ("decoder_start_token_id", slice::from_ref(&self.decoder_start_token_id)),
            ("bos_token_id", self.bos_token_id.as_slice()),
            ("eos_token_id", &of_request),
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

    /// Checks what would have only tokens chosen that the model has no logits of.
    pub(crate) fn check_kept(&self, kept: &Kept) -> Result<(), OptionError> {
        for (name, tokens) in [
            ("forced_bos_token_id", self.forced_bos_token_id.as_slice()),
            ("forced_eos_token_id", &self.forced_eos_token_id),
        ] {
            if let Some(token) = tokens.iter().find(|&&token| !kept.has(token)) {
                let expected = "tokens that this model keeps (those of kept_tokens.json)";
                return Err(OptionError::new(name, expected, token.to_string()));
            }
        }
        if self.top_logprobs > kept.tokens().len() {
            let expected = format!("at most {}, the tokens that this model keeps", kept.tokens().len());
            return Err(OptionError::new("top_logprobs", expected, self.top_logprobs.to_string()));
        }
        Ok(())
    }

    /// Checks the options against each other.
    fn check_together(&self) -> Result<(), OptionError> {
        let is_inside = |n: usize, max: usize| (1..=max).contains(&n);
        if !is_inside(self.num_beams, MAX_NUM_BEAMS) {
            let expected = format!("a whole number from 1 to {MAX_NUM_BEAMS}");
            return Err(OptionError::new("num_beams", expected, self.num_beams.to_string()));
        }
        let differ = self.num_beams == 1 && (self.do_sample || self.return_alternatives);
        let (returned, most) = (self.num_return_sequences, MAX_NUM_RETURN_SEQUENCES);
        if !is_inside(returned, most) {
            let expected = format!("a whole number from 1 to {most}");
            return Err(OptionError::new("num_return_sequences", expected, returned.to_string()));
        }
        if !differ && returned > self.num_beams {
            let or = if self.num_beams == 1 { ", do_sample true or return_alternatives true" } else { "" };
            let required = format!("num_beams of at least {returned}{or}");
            let found = format!("num_beams {}", self.num_beams);
            return Err(OptionError::requires("num_return_sequences", required, found));
        }
        let (groups, beams) = (self.num_beam_groups, self.num_beams);
        if groups == 0 || beams % groups != 0 {
            let expected = format!("a divisor of num_beams ({beams})");
            return Err(OptionError::new("num_beam_groups", expected, groups.to_string()));
        }
        if groups > 1 && self.do_sample {
            return Err(OptionError::requires("num_beam_groups", "do_sample false", "true"));
        }
        if self.patience != 1.0 && self.num_beams > 1 {
            if self.early_stopping != EarlyStopping::True {
                return Err(OptionError::requires("patience", "early_stopping true", self.early_stopping.as_str()));
            }
            let least = self.num_return_sequences.div_ceil(groups);
            if self.patient_size(beams / groups) < least {
                let expected = format!("enough for num_return_sequences ({})", self.num_return_sequences);
                return Err(OptionError::new("patience", expected, self.patience.to_string()));
            }
        }
        if !(0.0..=MAX_COVERAGE_PENALTY).contains(&self.coverage_penalty) {
            let found = self.coverage_penalty.to_string();
            return Err(OptionError::new("coverage_penalty", "a number from 0 to 100", found));
        }
        if groups > 1 && self.diversity_penalty <= 0.0 {
            let found = self.diversity_penalty.to_string();
            return Err(OptionError::requires("num_beam_groups", "diversity_penalty above 0", found));
        }
        if self.return_alternatives && self.num_beams > 1 {
            return Err(OptionError::requires("return_alternatives", "num_beams 1", self.num_beams.to_string()));
        }
        for (is_other, required, found) in [
            (self.num_beams > 1, "num_beams 1", self.num_beams.to_string()),
            (self.do_sample, "do_sample false", "true".to_string()),
            (self.num_return_sequences > 1, "num_return_sequences 1", self.num_return_sequences.to_string()),
        ] {
            if self.prompt_lookup_num_tokens.is_some() && is_other {
                return Err(OptionError::requires("prompt_lookup_num_tokens", required, found));
            }
        }
        if self.prompt_lookup_num_tokens.is_none() && self.max_matching_ngram_size.is_some() {
            return Err(OptionError::requires("max_matching_ngram_size", "prompt_lookup_num_tokens", "none"));
        }
        if self.do_sample {
            let is_positive = |x: f64| (x as f32).is_normal() && x > 0.0 && ((1.0 / x) as f32).is_normal();
            let is_part = |x: f64| (0.0..=1.0).contains(&x);
            let above_0 = |x: f64| x > 0.0 && x <= 1.0;
            let cutoff = |x: f64| (0.0..1.0).contains(&x);
            for (name, value, is_valid, expected) in [
                (
                    "temperature",
                    self.temperature,
                    is_positive(self.temperature),
                    "a positive number (do_sample false takes the likeliest tokens)",
                ),
                ("top_p", self.top_p, is_part(self.top_p), "a number from 0 to 1"),
                ("min_p", self.min_p, is_part(self.min_p), "a number from 0 to 1"),
                ("top_h", self.top_h.unwrap_or(1.0), above_0(self.top_h.unwrap_or(1.0)), "a number above 0, at most 1"),
                ("top_n_sigma", self.top_n_sigma, self.top_n_sigma >= 0.0, "a number of at least 0"),
                ("typical_p", self.typical_p, above_0(self.typical_p), "a number above 0, at most 1"),
                ("epsilon_cutoff", self.epsilon_cutoff, cutoff(self.epsilon_cutoff), "a number from 0 to below 1"),
                ("eta_cutoff", self.eta_cutoff, cutoff(self.eta_cutoff), "a number from 0 to below 1"),
            ] {
                if !is_valid {
                    return Err(OptionError::new(name, expected, value.to_string()));
                }
            }
        }
        Ok(())
    }

    /// Lays `given` over these options and hands every option that is not implemented to `unsupported`. The start
    /// token follows the beginning-of-sequence token where it was the same before and is not given.
    fn read_all(
        &mut self,
        given: &Map<String, Value>,
        mut unsupported: impl FnMut(&mut Self, &str, &Value) -> Result<(), OptionError>,
    ) -> Result<(), OptionError> {
        let starts_with_bos = self.bos_token_id == Some(self.decoder_start_token_id);
        for (name, value) in given.iter().filter(|(_, value)| !value.is_null()) {
            if !self.read(name, value)? {
                unsupported(self, name, value)?;
            }
        }
        let start_is_given = given.get("decoder_start_token_id").is_some_and(|value| !value.is_null());
        if let (true, false, Some(bos)) = (starts_with_bos, start_is_given, self.bos_token_id) {
            self.decoder_start_token_id = bos;
        }
        Ok(())
    }

    /// Reads one option; false if it is not one that this version implements.
    fn read(&mut self, name: &str, value: &Value) -> Result<bool, OptionError> {
        let given = Given { name, value };
        match name {
            "max_new_tokens" => self.max_new_tokens = Some(given.whole(1)?),
            "max_length" => self.max_length = Some(given.whole(1)?),
            "min_length" => self.min_length = given.whole(0)?,
            "min_new_tokens" => self.min_new_tokens = Some(given.whole(0)?),
            "num_beams" => self.num_beams = given.whole(1)?,
            "num_return_sequences" => self.num_return_sequences = given.whole(1)?,
            "do_sample" => self.do_sample = given.flag()?,
            "temperature" => self.temperature = given.number()?,
            "top_k" => self.top_k = given.whole(0)?,
            "top_p" => self.top_p = given.number()?,
            "min_p" => self.min_p = given.number()?,
            "top_h" => self.top_h = Some(given.number()?),
            "top_n_sigma" => self.top_n_sigma = given.number()?,
            "typical_p" => self.typical_p = given.number()?,
            "epsilon_cutoff" => self.epsilon_cutoff = given.number()?,
            "eta_cutoff" => self.eta_cutoff = given.number()?,
            "seed" => self.seed = Some(given.take("a whole number below 2^64", Value::as_u64)?),
            "num_beam_groups" => self.num_beam_groups = given.whole(1)?,
            "diversity_penalty" => {
                let usable = |value: &Value| value.as_f64().filter(|x| (0.0..=f64::from(MAX_BIAS)).contains(x));
                self.diversity_penalty = given.take("a number of at least 0", usable)?;
            }
            "stop_strings" => {
                self.stop_strings = given.take("a string or a list of strings, none of them empty", strings)?;
            }
            "max_time" => {
                let seconds = |value: &Value| value.as_f64().filter(|&seconds| seconds >= 0.0);
                self.max_time = Some(given.take("a number of seconds, 0 or more", seconds)?);
            }
            "return_alternatives" => self.return_alternatives = given.flag()?,
            "length_penalty" => {
                // Beyond, lengths to that power leave the range of float32 and with it all order among hypotheses.
                let usable = |value: &Value| value.as_f64().filter(|x| x.abs() <= 10.0);
                self.length_penalty = given.take("a number from -10 to 10", usable)?;
            }
            "coverage_penalty" => {
                let usable = |value: &Value| value.as_f64().filter(|x| (0.0..=MAX_COVERAGE_PENALTY).contains(x));
                self.coverage_penalty = given.take("a number from 0 to 100", usable)?;
            }
            "early_stopping" => {
                self.early_stopping = given.take("true, false or \"never\"", |value| match value {
                    Value::Bool(false) => Some(EarlyStopping::False),
                    Value::Bool(true) => Some(EarlyStopping::True),
                    Value::String(never) if never == "never" => Some(EarlyStopping::Never),
                    _ => None,
                })?;
            }
            "patience" => {
                let usable = |value: &Value| value.as_f64().filter(|x| *x > 0.0 && *x <= MAX_PATIENCE);
                self.patience = given.take("a number above 0, at most 100", usable)?;
            }
            "decoder_start_token_id" => self.decoder_start_token_id = given.token()?,
            "bos_token_id" => self.bos_token_id = Some(given.token()?),
            "eos_token_id" => self.eos_token_id = given.token_or_tokens()?,
            "pad_token_id" => self.pad_token_id = given.token()?,
            "repetition_penalty" => self.repetition_penalty = given.positive()?,
            "encoder_repetition_penalty" => self.encoder_repetition_penalty = given.positive()?,
            "no_repeat_ngram_size" => self.no_repeat_ngram_size = given.whole(0)?,
            "encoder_no_repeat_ngram_size" => self.encoder_no_repeat_ngram_size = given.whole(0)?,
            "bad_words_ids" => {
                self.bad_words_ids = given.take("a list of lists of token ids, none of them empty", |value| {
                    value.as_array()?.iter().map(sequence).collect()
                })?;
            }
            "sequence_bias" => {
                self.sequence_bias =
                    given.take("a list of [[token ids], bias] pairs, no sequence empty", sequence_bias)?;
            }
            "forced_bos_token_id" => self.forced_bos_token_id = Some(given.token()?),
            "forced_eos_token_id" => self.forced_eos_token_id = given.token_or_tokens()?,
            "exponential_decay_length_penalty" => {
                let decay = given.take("a pair [start, factor]", |value| match value.as_array()?.as_slice() {
                    [start, factor] => Some((whole(start)?, factor.as_f64()?)),
                    _ => None,
                })?;
                self.exponential_decay_length_penalty = Some(decay);
            }
            "suppress_tokens" => self.suppress_tokens = given.take("a list of token ids", tokens)?,
            "begin_suppress_tokens" => self.begin_suppress_tokens = given.take("a list of token ids", tokens)?,
            "renormalize_logits" => self.renormalize_logits = given.flag()?,
            "frequency_penalty" => self.frequency_penalty = given.openai_penalty()?,
            "presence_penalty" => self.presence_penalty = given.openai_penalty()?,
            "prompt_lookup_num_tokens" => self.prompt_lookup_num_tokens = Some(given.whole(1)?),
            "max_matching_ngram_size" => self.max_matching_ngram_size = Some(given.whole(1)?),
            "output_logprobs" => self.output_logprobs = given.flag()?,
            "output_attentions" => self.output_attentions = given.flag()?,
            "top_logprobs" => {
                self.top_logprobs = given
                    .take("a whole number from 0 to 1000", |value| whole(value).filter(|&n| n <= MAX_TOP_LOGPROBS))?
            }
            "remove_invalid_values" => self.remove_invalid_values = given.flag()?,
            _ => {
                let refused = |expected| OptionError::new(name, expected, shown(value));
                return self.constraints.read(name, value).map_err(refused);
            }
        }
        Ok(true)
    }
}

/// Names and values, as text, of some of the options.
type Named = fn(&GenerationOptions) -> Vec<(&'static str, String)>;

/// What acts in beam search only.
fn of_beam_search(options: &GenerationOptions) -> Vec<(&'static str, String)> {
    vec![
        ("length_penalty", options.length_penalty.to_string()),
        ("coverage_penalty", options.coverage_penalty.to_string()),
        ("early_stopping", options.early_stopping.as_str().to_string()),
        ("patience", options.patience.to_string()),
    ]
}

/// What acts between groups of beams only.
fn of_groups(options: &GenerationOptions) -> Vec<(&'static str, String)> {
    vec![("diversity_penalty", options.diversity_penalty.to_string())]
}

/// What belongs to log-probabilities.
fn of_logprobs(options: &GenerationOptions) -> Vec<(&'static str, String)> {
    vec![("top_logprobs", options.top_logprobs.to_string())]
}

/// What acts in sampling only.
fn of_sampling(options: &GenerationOptions) -> Vec<(&'static str, String)> {
    let or_nothing = |value: Option<String>| value.unwrap_or_else(|| "it left out".to_string());
    vec![
        ("temperature", options.temperature.to_string()),
        ("top_k", options.top_k.to_string()),
        ("top_p", options.top_p.to_string()),
        ("min_p", options.min_p.to_string()),
        ("top_h", or_nothing(options.top_h.map(|share| share.to_string()))),
        ("top_n_sigma", options.top_n_sigma.to_string()),
        ("typical_p", options.typical_p.to_string()),
        ("epsilon_cutoff", options.epsilon_cutoff.to_string()),
        ("eta_cutoff", options.eta_cutoff.to_string()),
        ("seed", or_nothing(options.seed.map(|seed| seed.to_string()))),
    ]
}

/// An option as it stands in a document.
struct Given<'a> {
    name: &'a str,
    value: &'a Value,
}

impl Given<'_> {
    fn take<T>(&self, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<T, OptionError> {
        read(self.value).ok_or_else(|| OptionError::new(self.name, expected, shown(self.value)))
    }

    fn whole(&self, least: usize) -> Result<usize, OptionError> {
        self.take(&format!("a whole number of at least {least}"), |value| whole(value).filter(|&n| n >= least))
    }

    fn flag(&self) -> Result<bool, OptionError> {
        self.take("true or false", Value::as_bool)
    }

    fn number(&self) -> Result<f64, OptionError> {
        self.take("a number", Value::as_f64)
    }

    fn openai_penalty(&self) -> Result<f64, OptionError> {
        self.take("a number from -2 to 2", |value| value.as_f64().filter(|x| x.abs() <= 2.0))
    }

    fn positive(&self) -> Result<f64, OptionError> {
        // Scores are float32: a penalty must not become 0 or infinite there, nor its inverse.
        let is_usable = |x: &f64| *x > 0.0 && (*x as f32).is_normal() && ((1.0 / *x) as f32).is_normal();
        self.take("a positive number", |value| value.as_f64().filter(is_usable))
    }

    fn token(&self) -> Result<i64, OptionError> {
        self.take("a token id", token)
    }

    fn token_or_tokens(&self) -> Result<Vec<i64>, OptionError> {
        self.take("a token id or a list of them", |value| tokens(value).or_else(|| Some(vec![token(value)?])))
    }
}

/// A number without a fraction, however it is written: 4 or 4.0.
fn whole(value: &Value) -> Option<usize> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=EXACT).contains(x)).map(|x| x as usize);
    value.as_u64().and_then(|n| usize::try_from(n).ok()).or_else(float)
}

fn token(value: &Value) -> Option<i64> {
    i64::try_from(whole(value)?).ok()
}

fn tokens(value: &Value) -> Option<Vec<i64>> {
    value.as_array()?.iter().map(token).collect()
}

/// Texts, given as one or as a list.
fn strings(value: &Value) -> Option<Vec<String>> {
    let string = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_string);
    match value {
        Value::Array(list) => list.iter().map(string).collect(),
        one => Some(vec![string(one)?]),
    }
}

/// Token ids, at least one.
fn sequence(value: &Value) -> Option<Vec<i64>> {
    tokens(value).filter(|tokens| !tokens.is_empty())
}

/// Pairs of a sequence and its bias; also the older form, an object whose keys are written like `(10, 45)` or `10`.
fn sequence_bias(value: &Value) -> Option<Vec<(Vec<i64>, f32)>> {
    let bias = |value: &Value| value.as_f64().map(|x| x as f32).filter(|x| x.abs() <= MAX_BIAS);
    match value {
        Value::Array(pairs) => pairs
            .iter()
            .map(|pair| match pair.as_array()?.as_slice() {
                [tokens, value] => Some((sequence(tokens)?, bias(value)?)),
                _ => None,
            })
            .collect(),
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| {
                let ids = key.trim().trim_start_matches(['(', '[']).trim_end_matches([')', ']', ',']);
                let ids = ids.split(',').map(|id| id.trim().parse().ok().filter(|&id| id >= 0));
                Some((ids.collect::<Option<_>>()?, bias(value)?))
            })
            .collect(),
        _ => None,
    }
}

/// The value of an option that has no effect.
enum Neutral {
    Absent,
    Flag(bool),
    Number(f64),
}

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        match self {
            Neutral::Absent => false,
            Neutral::Flag(flag) => value.as_bool() == Some(*flag),
            Neutral::Number(number) => value.as_f64() == Some(*number),
        }
    }
}

impl fmt::Display for Neutral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Neutral::Absent => write!(f, "nothing"),
            Neutral::Flag(flag) => write!(f, "{flag}"),
            Neutral::Number(number) => write!(f, "{number}"),
        }
    }
}

/// What ignoring an option of `generation_config.json` would do.
enum Effect {
    /// Other tokens would be generated than the model's authors asked for.
    Result,
    /// Nothing without sampling, or nothing at all.
    None,
}

fn unsupported(name: &str) -> Option<&'static (&'static str, Neutral, Effect)> {
    UNSUPPORTED.iter().find(|(unsupported, ..)| *unsupported == name)
}

/// Hugging Face's options that this version does not implement.
const UNSUPPORTED: &[(&str, Neutral, Effect)] = &[
    ("penalty_alpha", Neutral::Number(0.0), Effect::Result),
    ("constraints", Neutral::Absent, Effect::Result),
    ("force_words_ids", Neutral::Absent, Effect::Result),
    ("guidance_scale", Neutral::Number(1.0), Effect::Result),
    ("watermarking_config", Neutral::Absent, Effect::Result),
    ("token_healing", Neutral::Flag(false), Effect::Result),
    ("dola_layers", Neutral::Absent, Effect::Result),
    ("use_mtp", Neutral::Flag(false), Effect::None),
    ("is_assistant", Neutral::Flag(false), Effect::None),
    ("num_assistant_tokens", Neutral::Absent, Effect::None),
    ("num_assistant_tokens_schedule", Neutral::Absent, Effect::None),
    ("assistant_confidence_threshold", Neutral::Absent, Effect::None),
    ("assistant_early_exit", Neutral::Absent, Effect::None),
    ("assistant_lookbehind", Neutral::Absent, Effect::None),
    ("assistant_ensemble_weight", Neutral::Absent, Effect::None),
    ("target_lookbehind", Neutral::Absent, Effect::None),
    ("speculation_type", Neutral::Absent, Effect::None),
    ("use_cache", Neutral::Flag(true), Effect::None),
    ("cache_implementation", Neutral::Absent, Effect::None),
    ("cache_config", Neutral::Absent, Effect::None),
    ("max_cache_len", Neutral::Absent, Effect::None),
    ("prefill_chunk_size", Neutral::Absent, Effect::None),
    ("low_memory", Neutral::Flag(false), Effect::None),
    ("compile_config", Neutral::Absent, Effect::None),
    ("disable_compile", Neutral::Absent, Effect::None),
    ("continuous_batching_config", Neutral::Absent, Effect::None),
    ("output_hidden_states", Neutral::Flag(false), Effect::None),
    ("output_scores", Neutral::Flag(false), Effect::None),
    ("output_logits", Neutral::Flag(false), Effect::None),
    ("return_dict_in_generate", Neutral::Flag(false), Effect::None),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn model(generation_config: Value) -> Result<GenerationOptions, OptionError> {
        GenerationOptions::of_model(Some(&generation_config.to_string()), &TokenIds::default())
    }

    fn with(options: &GenerationOptions, request: Value) -> Result<GenerationOptions, OptionError> {
        options.with(request.as_object().expect("requests are objects"))
    }

    #[test]
    fn a_least_length_that_cannot_be_reached_is_told_and_ends_nothing() {
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
            let options = GenerationOptions::default().with(request.as_object().expect("an object")).expect("taken");
            assert_eq!(options.check_lengths().err().map(|error| error.to_string()).as_deref(), expected, "{request}");
        }
    }

    #[test]
    fn every_option_is_read() {
        let request: Value = serde_json::from_str(
            r#"{
            "max_new_tokens": 7, "max_length": 9.0, "min_length": 3, "min_new_tokens": 2, "num_beams": 4,
            "num_return_sequences": 3, "length_penalty": 2, "coverage_penalty": 0.2, "early_stopping": "never", "patience": 1, "decoder_start_token_id": 5,
            "bos_token_id": 6, "eos_token_id": [1, 107], "pad_token_id": 3, "repetition_penalty": 1.5,
            "encoder_repetition_penalty": 2, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 4,
            "bad_words_ids": [[5], [6, 7]], "sequence_bias": [[[5], 3], [[6, 7], -4.5]], "forced_bos_token_id": 17,
            "forced_eos_token_id": 1, "exponential_decay_length_penalty": [6, 1.6], "suppress_tokens": [8, 9],
            "begin_suppress_tokens": [10], "renormalize_logits": true, "remove_invalid_values": true,
            "do_sample": true, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "top_h": 0.4, "top_n_sigma": 2,
            "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "seed": 18446744073709551615,
            "return_alternatives": false, "stop_strings": ["\n", "."], "max_time": 2.5, "num_beam_groups": 1,
            "diversity_penalty": 0, "frequency_penalty": 0.5, "presence_penalty": -0.25,
            "output_logprobs": true, "top_logprobs": 3, "output_attentions": true, "regex": "a+"
        }"#,
        )
        .expect("JSON");
        let expected = GenerationOptions {
            max_new_tokens: Some(7),
            max_length: Some(9),
            length_of_model: None,
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
            eos_of_model: vec![1],
            pad_token_id: 3,
            repetition_penalty: 1.5,
            encoder_repetition_penalty: 2.0,
            no_repeat_ngram_size: 3,
            encoder_no_repeat_ngram_size: 4,
            bad_words_ids: vec![vec![5], vec![6, 7]],
            sequence_bias: vec![(vec![5], 3.0), (vec![6, 7], -4.5)],
            forced_bos_token_id: Some(17),
            forced_eos_token_id: vec![1],
            exponential_decay_length_penalty: Some((6, 1.6)),
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
            max_matching_ngram_size: None,
            constraints: Constraints { regex: Some("a+".into()), ..Constraints::default() },
            unsupported: vec![],
        };
        assert_eq!(with(&GenerationOptions::default(), request.clone()), Ok(expected.clone()));
        // A file cannot ask for what most exports do not tell.
        let of_model = GenerationOptions {
            eos_of_model: vec![1, 107],
            output_attentions: false,
            length_of_model: Some((Some(7), Some(9))),
            ..expected
        };
        assert_eq!(model(request), Ok(of_model));
    }

    #[test]
    fn options_of_drafts_are_read() {
        let request = json!({"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3});
        let options = with(&GenerationOptions::default(), request).expect("greedy search of one target");
        assert_eq!((options.prompt_lookup_num_tokens, options.max_matching_ngram_size), (Some(5), Some(3)));
    }

    #[test]
    fn older_spellings_are_read() {
        let cases = [
            ("tuples as keys", json!({"(10, 45)": -2.0, "(64,)": 1}), vec![(vec![10, 45], -2.0), (vec![64], 1.0)]),
            ("bare keys", json!({"10,45": -2.0, "[7]": 1.5}), vec![(vec![10, 45], -2.0), (vec![7], 1.5)]),
        ];
        for (name, sequence_bias, expected) in cases {
            let options = with(&GenerationOptions::default(), json!({"sequence_bias": sequence_bias}));
            assert_eq!(options.expect(name).sequence_bias, expected, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_taken_is_refused_in_words() {
        let cases = [
            (json!({"num_beams": "four"}), "num_beams: expected a whole number of at least 1, found \"four\""),
            (json!({"num_beams": 0}), "num_beams: expected a whole number of at least 1, found 0"),
            (json!({"num_beams": 2.5}), "num_beams: expected a whole number of at least 1, found 2.5"),
            (json!({"num_beams": 5000}), "num_beams: expected a whole number from 1 to 256, found 5000"),
            (json!({"max_new_tokens": -1}), "max_new_tokens: expected a whole number of at least 1, found -1"),
            (json!({"min_length": true}), "min_length: expected a whole number of at least 0, found true"),
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
                "bad_words_ids: expected a list of lists of token ids, none of them empty, found [[]]",
            ),
            (
                json!({"sequence_bias": [[[], 1.0]]}),
                "sequence_bias: expected a list of [[token ids], bias] pairs, no sequence empty, found [[[],1.0]]",
            ),
            (
                json!({"sequence_bias": {"a": 1.0}}),
                "sequence_bias: expected a list of [[token ids], bias] pairs, no sequence empty, found {\"a\":1.0}",
            ),
            (
                json!({"exponential_decay_length_penalty": 2}),
                "exponential_decay_length_penalty: expected a pair [start, factor], found 2",
            ),
            (json!({"suppress_tokens": 3}), "suppress_tokens: expected a list of token ids, found 3"),
            (json!({"temprature": 1}), "temprature: expected the name of a generation option, found an unknown name"),
            (json!({"presence_penalty": 3}), "presence_penalty: expected a number from -2 to 2, found 3"),
            (json!({"top_logprobs": 3}), "top_logprobs requires output_logprobs true (got false)"),
            (
                json!({"stop_strings": ["a", ""]}),
                "stop_strings: expected a string or a list of strings, none of them empty, found [\"a\",\"\"]",
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
            (json!({"seed": -1, "do_sample": true}), "seed: expected a whole number below 2^64, found -1"),
            (json!({"top_k": 2.5, "do_sample": true}), "top_k: expected a whole number of at least 0, found 2.5"),
            (json!({"top_p": "1"}), "top_p: expected a number, found \"1\""),
            (
                json!({"temperature": 0, "do_sample": true}),
                "temperature: expected a positive number (do_sample false takes the likeliest tokens), found 0",
            ),
            (json!({"top_p": 1.5, "do_sample": true}), "top_p: expected a number from 0 to 1, found 1.5"),
            (json!({"top_h": 0, "do_sample": true}), "top_h: expected a number above 0, at most 1, found 0"),
            (json!({"typical_p": 0, "do_sample": true}), "typical_p: expected a number above 0, at most 1, found 0"),
            (json!({"eta_cutoff": 1, "do_sample": true}), "eta_cutoff: expected a number from 0 to below 1, found 1"),
            (
                json!({"num_return_sequences": 257, "do_sample": true}),
                "num_return_sequences: expected a whole number from 1 to 256, found 257",
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
                "force_words_ids: expected it left out (it is not supported by this version), found [[5]]",
            ),
            (
                json!({"num_return_sequences": 2}),
                "num_return_sequences requires num_beams of at least 2, do_sample true or return_alternatives true (got \
                 num_beams 1)",
            ),
            (json!({"length_penalty": 0.5}), "length_penalty requires num_beams above 1 (got 1)"),
            (
                json!({"patience": 2, "early_stopping": true, "num_beams": 1}),
                "early_stopping requires num_beams above 1 (got 1)",
            ),
            (json!({"early_stopping": true, "num_beams": 1}), "early_stopping requires num_beams above 1 (got 1)"),
        ];
        for (request, message) in cases {
            let error = with(&GenerationOptions::default(), request).expect_err(message);
            assert_eq!(error.to_string(), message);
        }
        let error = GenerationOptions::of_model(Some("[1]"), &TokenIds::default()).expect_err("no object");
        assert!(error.to_string().starts_with("the document: expected a JSON object, found"), "{error}");
    }

    #[test]
    fn options_without_effect_are_accepted_at_their_defaults() {
        for request in [
            json!({"length_penalty": 1, "early_stopping": false}),
            json!({"temperature": 1.0, "top_p": 1, "use_cache": true, "num_beam_groups": 1, "output_scores": false}),
            json!({"do_sample": null, "stop_strings": null, "max_new_tokens": null}),
        ] {
            assert_eq!(with(&GenerationOptions::default(), request), Ok(GenerationOptions::default()));
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
            let options = GenerationOptions::of_model(text.as_deref(), &tokens).expect(name);
            let options = with(&options, request).expect(name);
            assert_eq!(options.decoder_start_token_id, start, "{name}");
            assert_eq!((options.eos_token_id, options.pad_token_id), (eos, pad), "{name}");
        }
        let bare = GenerationOptions::of_model(None, &TokenIds::default()).expect("nothing can be wrong");
        assert_eq!(bare, GenerationOptions::default());
    }

    #[test]
    fn a_generation_config_may_hold_what_this_version_passes_over() {
        let config = json!({
            "_from_model_config": true, "cache_implementation": "hybrid", "transformers_version": "4.53.0.dev0",
            "top_k": 64, "top_p": 0.95, "temperature": 0.7, "use_cache": false, "output_attentions": true,
            "something_new": {"a": 1},
        });
        let kept = GenerationOptions {
            top_k: 64,
            top_p: 0.95,
            temperature: 0.7,
            eos_token_id: vec![],
            eos_of_model: vec![],
            ..GenerationOptions::default()
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
    fn a_model_that_asks_for_more_than_there_is_opens_but_does_not_generate_unasked() {
        let error = model(json!({"guidance_scale": 2})).expect("it opens").check(256, 1).expect_err("not obeyed");
        assert_eq!(error.option, "guidance_scale");
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
            "min_length: expected min_new_tokens in its place (it is set to 4 already, and has precedence), found 2"
        );
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
            let options = with(&GenerationOptions::default(), request.clone()).expect("well formed");
            let option = options.check(10, 3).err().map(|error| error.option);
            assert_eq!(option.as_deref(), expected, "{request}");
        }
    }

    #[test]
    fn a_length_that_only_the_model_names_ends_where_the_model_does() {
        let of_model = model(json!({"max_new_tokens": 160})).expect("valid");
        let within =
            |options: &GenerationOptions, prompt_len| options.clone().within(64, prompt_len).max_length(prompt_len);
        assert_eq!(within(&of_model, 1), 64);
        assert_eq!(within(&of_model, 64), 224, "there is no room at all, which is for `check` to say");
        assert_eq!(within(&with(&of_model, json!({"num_beams": 4})).expect("valid"), 1), 64);
        assert_eq!(within(&with(&of_model, json!({"max_new_tokens": null})).expect("valid"), 1), 64);
        assert_eq!(within(&with(&of_model, json!({"max_new_tokens": 160})).expect("valid"), 1), 161);
        assert_eq!(within(&GenerationOptions { max_new_tokens: Some(100), ..of_model.clone() }, 1), 101);
        assert_eq!(within(&model(json!({"max_length": 500})).expect("valid"), 1), 64);
        assert_eq!(within(&model(json!({"max_length": 50})).expect("valid"), 1), 50);
        let bare = GenerationOptions::of_model(None, &TokenIds::default()).expect("nothing can be wrong");
        assert_eq!(bare.clone().within(16, 1).max_length(1), 16);
        assert_eq!(with(&bare, json!({"max_length": 500})).expect("valid").within(64, 1).max_length(1), 500);
    }

    #[test]
    fn a_file_is_read_as_python_reads_it() {
        let text = "\u{feff}{\"max_length\": 9, \"initializer_range\": NaN}";
        let options = GenerationOptions::of_model(Some(text), &TokenIds::default()).expect("as Python writes it");
        assert_eq!(options.max_length, Some(9));
        let error = GenerationOptions::of_model(Some("{\"repetition_penalty\": NaN}"), &TokenIds::default());
        assert_eq!(error.expect_err("no number").option, "repetition_penalty");
    }

    #[test]
    fn an_end_token_that_only_the_model_names_may_lie_outside_the_vocabulary() {
        let options = model(json!({"eos_token_id": [1, 107]})).expect("valid");
        assert_eq!(options.check(10, 1), Ok(()));
        let error = with(&options, json!({"eos_token_id": [1, 108]})).expect("well formed").check(10, 1);
        assert_eq!(error.expect_err("a request's mistake").option, "eos_token_id");
    }
}
