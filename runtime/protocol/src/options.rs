//! Generation options as data: name, value type and meaning of each, for command lines and schemas. The runtime checks the values.

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
    /// Sampling.
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
    option("min_new_tokens", Generation, Integer, "Minimum number of generated tokens before an end token is allowed"),
    option("min_length", Generation, Integer, "Minimum length of a target before an end token is allowed, decoder prompt included; min_new_tokens takes precedence [default: 0]"),
    option("num_beams", Generation, Integer, "Number of beams, up to 256; 1 is greedy search, or sampling with do_sample [default: 1]"),
    option("num_return_sequences", Generation, Integer, "Number of targets per source: at most num_beams, except with do_sample or return_alternatives [default: 1]"),
    option("length_penalty", Generation, Number, "Beam scores are divided by the length to this power, from -10 to 10 [default: 1]"),
    option("early_stopping", Generation, OptionValue::EarlyStopping, "When beam search stops once it has num_beams finished targets: true at once, false when no running beam scores better at its current length, never when none can ever score better [default: false]"),
    option("patience", Generation, Number, "With early_stopping true, beam search stops after num_beams times this number of finished targets [default: 1]"),
    option("coverage_penalty", Generation, Number, "Weight of the bonus for targets that cover the whole source; requires a model exported with --alignment [default: 0]"),
    option("num_beam_groups", Generation, Integer, "Number of beam groups for diverse beam search, a divisor of num_beams [default: 1]"),
    option("diversity_penalty", Generation, Number, "Penalty of a token for each beam of an earlier group that chose it in the same step [default: 0]"),
    option("return_alternatives", Generation, Flag, "Return num_return_sequences targets, one for each of the most likely first tokens"),
    option("stop_strings", Generation, OptionValue::TextOrTexts, "Text, or list of texts, that ends a target"),
    option("max_time", Generation, Seconds, "Time limit in seconds; unfinished targets are returned as they are"),
    option("exponential_decay_length_penalty", Generation, OptionValue::LengthPenalty, "Start and factor, such as [30, 1.05]: after that many generated tokens, the score of the end token grows exponentially"),
    option("repetition_penalty", Generation, Number, "Penalty of tokens already in the target; above 1 makes them less likely [default: 1]"),
    option("encoder_repetition_penalty", Generation, Number, "Bonus for tokens of the source; above 1 makes them more likely [default: 1]"),
    option("frequency_penalty", Generation, Number, "Penalty of a token for each time that it was generated, from -2 to 2 [default: 0]"),
    option("presence_penalty", Generation, Number, "Penalty of a token that was generated at least once, from -2 to 2 [default: 0]"),
    option("renormalize_logits", Generation, Flag, "Renormalize the processed scores to log-probabilities"),
    option("remove_invalid_values", Generation, Flag, "Replace NaN and infinite scores instead of failing"),
    option("prompt_lookup_num_tokens", Generation, Integer, "Number of tokens that greedy search drafts by n-gram lookup in the source, for the same output in fewer steps; requires a model exported with --all-logits"),
    option("max_matching_ngram_size", Generation, Integer, "With prompt_lookup_num_tokens, maximum size of the n-grams to look up [default: 2]"),
    option("eos_token_id", Generation, TokenOrTokens, "Token or tokens that end a target, such as 1 or [1, 107] [default: the model's]"),
    option("decoder_start_token_id", Generation, Token, "Token that every target starts with [default: the model's]"),
    option("bos_token_id", Generation, Token, "Beginning-of-sequence token [default: the model's]"),
    option("pad_token_id", Generation, Token, "Token that pads sources of unequal length [default: the model's]"),
    option("adapter", Generation, Text, "Name of the loaded LoRA adapter to generate with; requires a model exported with --lora-inputs [default: none]"),
    option("do_sample", Sampling, Flag, "Sample tokens instead of taking the most likely ones"),
    option("seed", Sampling, Integer, "Random seed; the same result whether a request runs alone or in a batch [default: a new one per request]"),
    option("temperature", Sampling, Number, "Scores are divided by it: below 1 favors likely tokens, above 1 unlikely ones [default: 1]"),
    option("top_k", Sampling, Integer, "Keep the N most likely tokens; 0 keeps all [default: the model's, or 50]"),
    option("top_p", Sampling, Probability, "Keep the most likely tokens whose probabilities add up to P [default: 1]"),
    option("min_p", Sampling, Probability, "Keep tokens at least P times as likely as the most likely one [default: 0]"),
    option("typical_p", Sampling, Probability, "Keep the tokens whose information content is closest to the entropy, up to a total probability of P [default: 1]"),
    option("top_h", Sampling, Probability, "Keep the most likely tokens, up to a fraction P of the entropy of the top 100"),
    option("top_n_sigma", Sampling, Number, "Keep tokens within X standard deviations of the best score; 0 keeps all [default: 0]"),
    option("epsilon_cutoff", Sampling, Probability, "Keep tokens with a probability of at least P [default: 0]"),
    option("eta_cutoff", Sampling, Probability, "Keep tokens with a probability of at least P, or less if the entropy is high [default: 0]"),
    option("eos_on_argmax", Sampling, Flag, "End a target as soon as an end token is the most likely one, whatever would be drawn"),
    option("json_schema", Constraints, OptionValue::JsonSchema, "Generate JSON that satisfies this JSON Schema"),
    option("regex", Constraints, Text, "Generate text that matches this regular expression in full"),
    option("grammar", Constraints, Text, "Generate text accepted by this grammar, in llguidance's variant of Lark"),
    option("allowed_sequences", Constraints, OptionValue::Phrases, "Generate one of these texts or lists of token ids"),
    option("required_phrases", Constraints, OptionValue::Phrases, "Generate text that contains each of these texts or lists of token ids"),
    option("bad_words_ids", Constraints, OptionValue::Sequences, "Token sequences that are never generated, such as [[17], [5, 6]]"),
    option("suppress_tokens", Constraints, Tokens, "Tokens that are never generated, such as [5, 6]"),
    option("begin_suppress_tokens", Constraints, Tokens, "Tokens that are never generated first, such as [5, 6]"),
    option("sequence_bias", Constraints, OptionValue::SequenceBias, "Token sequences, each with a bias that is added to the score of its last token, such as [[[17], -2.5]]"),
    option("no_repeat_ngram_size", Constraints, Integer, "Size of n-grams that may occur only once in a target; 0 turns it off [default: 0]"),
    option("encoder_no_repeat_ngram_size", Constraints, Integer, "Size of n-grams of the source that may not occur in the target; 0 turns it off [default: 0]"),
    option("forced_bos_token_id", Constraints, Token, "Token to force as the first generated token"),
    option("forced_eos_token_id", Constraints, TokenOrTokens, "Token, or list of tokens, to force at the maximum length"),
    option("output_logprobs", Output, Flag, "Return the model's log-probability of each token, before any score processing"),
    option("top_logprobs", Output, Integer, "With output_logprobs, also return the log-probabilities of the N most likely tokens at each position, up to 1000"),
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

/// The schema of a generation options object. Other Hugging Face options are accepted if their value has no effect.
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
