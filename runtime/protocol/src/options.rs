//! Generation options as data: the name, the value and the meaning of each, for command lines and schemas. Which values are accepted is
//! the runtime's to say.

use schemars::{Schema, json_schema};
use serde_json::{Map, Value, json};

use OptionGroup::{Constraints, Generation, Output, Sampling};
use OptionValue::{Flag, Integer, Number, Probability, Seconds, Text, Token, TokenOrTokens, Tokens};

/// A generation option.
#[derive(Clone, Copy, Debug)]
pub struct GenerationOption {
    /// The Hugging Face name.
    pub name: &'static str,
    /// The part of generation that the option belongs to.
    pub group: OptionGroup,
    /// The form of the value.
    pub value: OptionValue,
    /// The meaning: a sentence without a full stop.
    pub summary: &'static str,
}

/// The part of generation that an option belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionGroup {
    /// The length of targets, the search, and penalties.
    Generation,
    /// Drawing tokens by their probabilities.
    Sampling,
    /// What targets must or must not contain.
    Constraints,
    /// What results contain besides targets.
    Output,
}

/// The form of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// True or false.
    Flag,
    /// True, false or `"never"`.
    EarlyStopping,
    /// An integer.
    Integer,
    /// A number.
    Number,
    /// A number from 0 to 1.
    Probability,
    /// A number of seconds.
    Seconds,
    /// A token id.
    Token,
    /// A token id, or a list of them.
    TokenOrTokens,
    /// A list of token ids.
    Tokens,
    /// A list of lists of token ids.
    Sequences,
    /// Pairs of a list of token ids and a number.
    SequenceBias,
    /// A pair of an integer and a number.
    LengthPenalty,
    /// A text.
    Text,
    /// A text, or a list of texts.
    TextOrTexts,
    /// A list of texts or lists of token ids.
    Phrases,
    /// A JSON Schema.
    JsonSchema,
}

const fn option(name: &'static str, group: OptionGroup, value: OptionValue, summary: &'static str) -> GenerationOption {
    GenerationOption { name, group, value, summary }
}

/// Every option of a request.
#[rustfmt::skip]
pub const GENERATION_OPTIONS: &[GenerationOption] = &[
    option("max_new_tokens", Generation, Integer, "Maximum number of generated tokens [default: the model's, or 20]"),
    option("max_length", Generation, Integer, "Maximum length of a target, decoder prompt included; max_new_tokens takes precedence"),
    option("min_new_tokens", Generation, Integer, "Minimum number of generated tokens before an end token"),
    option("min_length", Generation, Integer, "Minimum length of a target before an end token, decoder prompt included; min_new_tokens takes precedence [default: 0]"),
    option("num_beams", Generation, Integer, "Number of beams, up to 256; 1 is greedy search, or sampling with do_sample [default: 1]"),
    option("num_return_sequences", Generation, Integer, "Number of targets for each source: at most num_beams, unless with do_sample or return_alternatives [default: 1]"),
    option("length_penalty", Generation, Number, "Exponent of the length by which beam scores are divided, from -10 to 10 [default: 1]"),
    option("early_stopping", Generation, OptionValue::EarlyStopping, "When beam search ends after num_beams finished targets: true at once, false when no beam scores better at its present length, never when no beam can become better [default: false]"),
    option("patience", Generation, Number, "With early_stopping true, factor of num_beams by which beam search waits for finished targets [default: 1]"),
    option("coverage_penalty", Generation, Number, "Weight of the reward for targets that leave no part of the source out; requires a model exported with --alignment [default: 0]"),
    option("num_beam_groups", Generation, Integer, "Number of groups of beams that avoid each other's tokens, a divisor of num_beams [default: 1]"),
    option("diversity_penalty", Generation, Number, "Penalty of a token for each beam of an earlier group that has just chosen it [default: 0]"),
    option("return_alternatives", Generation, Flag, "Return num_return_sequences targets that begin with the likeliest first tokens"),
    option("stop_strings", Generation, OptionValue::TextOrTexts, "Text that ends a target, or a list of texts"),
    option("max_time", Generation, Seconds, "Seconds after which all targets end as they are"),
    option("exponential_decay_length_penalty", Generation, OptionValue::LengthPenalty, "Start and factor: after so many generated tokens, an end becomes likelier by the factor with each further token, such as [30, 1.05]"),
    option("repetition_penalty", Generation, Number, "Penalty of tokens that the target contains; above 1 makes them less likely [default: 1]"),
    option("encoder_repetition_penalty", Generation, Number, "Reward of tokens that the source contains; above 1 makes them likelier [default: 1]"),
    option("frequency_penalty", Generation, Number, "Penalty of a token for each time it was generated, from -2 to 2 [default: 0]"),
    option("presence_penalty", Generation, Number, "Penalty of a token that was generated at least once, from -2 to 2 [default: 0]"),
    option("renormalize_logits", Generation, Flag, "Normalize processed scores to log-probabilities"),
    option("remove_invalid_values", Generation, Flag, "Replace NaN and infinite scores instead of failing"),
    option("prompt_lookup_num_tokens", Generation, Integer, "Number of tokens that greedy search drafts from the source, for the same output in fewer steps; requires a model exported with --all-logits"),
    option("max_matching_ngram_size", Generation, Integer, "With prompt_lookup_num_tokens, maximum number of last tokens to look up in the source [default: 2]"),
    option("eos_token_id", Generation, TokenOrTokens, "Token or tokens that end a target, such as 1 or [1, 107] [default: the model's]"),
    option("decoder_start_token_id", Generation, Token, "Token that every target starts with [default: the model's]"),
    option("bos_token_id", Generation, Token, "Beginning-of-sequence token [default: the model's]"),
    option("pad_token_id", Generation, Token, "Token that pads sources of unequal length [default: the model's]"),
    option("do_sample", Sampling, Flag, "Draw tokens by their probabilities instead of taking the likeliest"),
    option("seed", Sampling, Integer, "Seed of the draws, which are the same for a request alone or among others [default: another for each request]"),
    option("temperature", Sampling, Number, "Divisor of the scores; below 1 makes likely tokens likelier [default: 1]"),
    option("top_k", Sampling, Integer, "Keep the N likeliest tokens; 0 keeps all [default: the model's, or 50]"),
    option("top_p", Sampling, Probability, "Keep the likeliest tokens whose probabilities add up to P [default: 1]"),
    option("min_p", Sampling, Probability, "Keep tokens at least P times as likely as the likeliest [default: 0]"),
    option("typical_p", Sampling, Probability, "Keep the tokens closest to the expected information whose probabilities add up to P [default: 1]"),
    option("top_h", Sampling, Probability, "Keep the likeliest tokens that carry the part P of the entropy of the best 100"),
    option("top_n_sigma", Sampling, Number, "Keep tokens within X standard deviations of the best score; 0 keeps all [default: 0]"),
    option("epsilon_cutoff", Sampling, Probability, "Keep tokens of at least the probability P [default: 0]"),
    option("eta_cutoff", Sampling, Probability, "Keep tokens of at least the probability P, or less where many tokens are likely [default: 0]"),
    option("json_schema", Constraints, OptionValue::JsonSchema, "Generate JSON that satisfies this schema"),
    option("regex", Constraints, Text, "Generate a text that matches this regular expression as a whole"),
    option("grammar", Constraints, Text, "Generate a text of this Lark grammar, in llguidance's variant"),
    option("allowed_sequences", Constraints, OptionValue::Phrases, "Generate one of these texts or lists of token ids"),
    option("required_phrases", Constraints, OptionValue::Phrases, "Generate a text that contains each of these texts or lists of token ids"),
    option("bad_words_ids", Constraints, OptionValue::Sequences, "Token sequences that are not generated, such as [[17], [5, 6]]"),
    option("suppress_tokens", Constraints, Tokens, "Tokens that are never generated, such as [5, 6]"),
    option("begin_suppress_tokens", Constraints, Tokens, "Tokens that are not generated first, such as [5, 6]"),
    option("sequence_bias", Constraints, OptionValue::SequenceBias, "Token sequences and what is added to the score of their last token, such as [[[17], -2.5]]"),
    option("no_repeat_ngram_size", Constraints, Integer, "Length of token sequences that occur only once in a target; 0 is off [default: 0]"),
    option("encoder_no_repeat_ngram_size", Constraints, Integer, "Length of token sequences of the source that do not occur in the target; 0 is off [default: 0]"),
    option("forced_bos_token_id", Constraints, Token, "Token that is generated first"),
    option("forced_eos_token_id", Constraints, TokenOrTokens, "Token or tokens of which one is generated last at the maximum length"),
    option("output_logprobs", Output, Flag, "Return the model's log-probability of each token, before any processing"),
    option("top_logprobs", Output, Integer, "With output_logprobs, return the log-probabilities of the N likeliest tokens at each position too, up to 1000"),
    option("output_attentions", Output, Flag, "Return the attention of each token to the source; requires a model exported with --alignment"),
];

impl OptionValue {
    fn schema(self) -> Value {
        let token = json!({"type": "integer"});
        let tokens = json!({"type": "array", "items": token});
        match self {
            OptionValue::Flag => json!({"type": "boolean"}),
            OptionValue::EarlyStopping => json!({"enum": [true, false, "never"]}),
            OptionValue::Integer => json!({"type": "integer"}),
            OptionValue::Number | OptionValue::Probability | OptionValue::Seconds => json!({"type": "number"}),
            OptionValue::Token => token,
            OptionValue::TokenOrTokens => json!({"anyOf": [token, tokens]}),
            OptionValue::Tokens => tokens,
            OptionValue::Sequences => json!({"type": "array", "items": tokens}),
            OptionValue::SequenceBias => {
                let pair = json!({"type": "array", "prefixItems": [tokens, {"type": "number"}], "items": false});
                // The older form maps sequences, written as `(10, 45)`, to numbers.
                let map = json!({"type": "object", "additionalProperties": {"type": "number"}});
                json!({"anyOf": [{"type": "array", "items": pair}, map]})
            }
            OptionValue::LengthPenalty => {
                json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "number"}], "items": false})
            }
            OptionValue::Text => json!({"type": "string"}),
            OptionValue::TextOrTexts => {
                json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
            }
            OptionValue::Phrases => json!({"type": "array", "items": {"anyOf": [{"type": "string"}, tokens]}}),
            OptionValue::JsonSchema => json!({"type": ["object", "boolean"]}),
        }
    }
}

/// The schema of an object of generation options. Other options of Hugging Face's are accepted with values that change nothing.
pub(crate) fn schema(_: &mut schemars::SchemaGenerator) -> Schema {
    let property = |option: &GenerationOption| {
        let schema = json!({"description": option.summary, "anyOf": [option.value.schema(), {"type": "null"}]});
        (option.name.to_string(), schema)
    };
    let properties: Map<String, Value> = GENERATION_OPTIONS.iter().map(property).collect();
    json_schema!({"type": ["object", "null"], "properties": properties})
}

#[cfg(test)]
mod tests {
    use t5gemma_runtime::{GenerationConfig, GenerationOptions};

    use super::*;

    #[test]
    fn the_runtime_knows_every_option() {
        for option in GENERATION_OPTIONS {
            let given = Map::from_iter([(option.name.to_string(), json!([[[]]]))]);
            let error = GenerationConfig::default().with_json(&given).expect_err(option.name);
            assert_eq!(error.option, option.name, "{error}");
            assert!(!error.to_string().contains("name of a generation option"), "{error}");
        }
    }

    #[test]
    fn every_option_of_the_runtime_is_listed() {
        // The names of the fields, which are the names of the options.
        let written = format!("{:#?}", GenerationOptions::default());
        let fields = written.lines().filter_map(|line| line.strip_prefix("    ")?.split_once(':'));
        // Functions and bookkeeping are not part of requests.
        let others = ["logits_processor", "prefix_allowed_tokens", "disabled"];
        let mut names: Vec<&str> = fields.map(|(name, _)| name).filter(|name| !others.contains(name)).collect();
        let mut listed: Vec<&str> = GENERATION_OPTIONS.iter().map(|option| option.name).collect();
        names.sort_unstable();
        listed.sort_unstable();
        assert_eq!(listed, names);
    }
}
