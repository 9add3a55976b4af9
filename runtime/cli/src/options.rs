//! Generation options on the command line: one flag for each, under Hugging Face's name. What they mean and which values
//! they may have is the library's; here they become the JSON object that a request's `options` would be.

use std::ffi::OsString;

use anyhow::Result;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};

use crate::constraints::{self, Constraint};
use crate::exit::bail_usage;

/// The options given, by their Hugging Face names.
#[derive(Clone, Default)]
pub struct GenerationFlags {
    given: Map<String, Value>,
    /// Those of constraints, whose files are not read yet.
    constraints: Vec<Constraint>,
    /// What is wrong with the text of one.
    wrong: Option<String>,
}

impl GenerationFlags {
    /// The options as a request would say them; files that they name are read.
    pub fn read(&self) -> Result<Map<String, Value>> {
        if let Some(problem) = &self.wrong {
            bail_usage!("{problem}");
        }
        let mut options = self.given.clone();
        for constraint in &self.constraints {
            options.insert(constraint.name().to_string(), constraint.read()?);
        }
        Ok(options)
    }

    /// Whether an option is among them.
    pub fn gives(&self, option: &str) -> bool {
        self.given.contains_key(option) || self.constraints.iter().any(|constraint| constraint.name() == option)
    }

    /// Those that are read already.
    #[cfg(test)]
    pub fn of(given: Map<String, Value>) -> GenerationFlags {
        GenerationFlags { given, ..GenerationFlags::default() }
    }
}

/// Whether an option has a flag of its own.
pub fn has_flag(option: &str) -> bool {
    FLAGS.iter().any(|(name, ..)| *name == option) || constraints::has_flag(option)
}

/// Joins flags that may stand alone with a value that follows as a word of its own: `--do-sample false` becomes
/// `--do-sample=false`, and in `--do-sample TEXT` the text stays one.
pub fn joined(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let values_of = |argument: &str| match argument.strip_prefix("--").map(|name| name.replace('-', "_")) {
        Some(name) => FLAGS.iter().find(|flag| flag.0 == name).map_or(&[][..], |(_, kind, _)| values(kind)),
        None => &[],
    };
    let mut out: Vec<OsString> = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            out.push(argument);
            out.extend(arguments.by_ref());
            break;
        }
        let last = out.last().and_then(|last| last.to_str()).unwrap_or_default();
        if let Some(value) = argument.to_str().filter(|value| values_of(last).contains(value)) {
            let whole = format!("{last}={value}");
            out.pop();
            out.push(whole.into());
            continue;
        }
        out.push(argument);
    }
    out
}

/// The values of a flag that may stand alone, which says the first of them.
fn values(placeholder: &str) -> &'static [&'static str] {
    match placeholder {
        "BOOL" => &["true", "false"],
        "MODE" => &["true", "false", "never"],
        _ => &[],
    }
}

/// Name, placeholder and meaning of each flag. Lists are JSON.
const FLAGS: &[(&str, &str, &str)] = &[
    ("max_new_tokens", "N", "Generate at most so many tokens [default: the model's, or 20]"),
    ("max_length", "N", "The same, counting the decoder prompt"),
    ("min_new_tokens", "N", "No end before so many tokens"),
    ("min_length", "N", "The same, counting the decoder prompt"),
    ("num_beams", "N", "Beams of beam search; 1 is greedy, or sampling"),
    (
        "num_return_sequences",
        "N",
        "Hypotheses to return for each source: of beam search at most num_beams, of sampling any",
    ),
    ("do_sample", "BOOL", "Draw tokens by their probabilities instead of taking the likeliest"),
    ("temperature", "X", "Sampling: below 1 makes likely tokens likelier, above 1 less so"),
    ("top_k", "N", "Sampling: draw from the N likeliest tokens only, 0 from all [default: the model's, or 50]"),
    ("top_p", "P", "Sampling: draw from the likeliest tokens that make up the probability P"),
    ("min_p", "P", "Sampling: draw from tokens at least P times as likely as the likeliest"),
    ("top_h", "P", "Sampling: draw from the likeliest tokens that carry the part P of the entropy"),
    ("top_n_sigma", "X", "Sampling: draw from tokens within X standard deviations of the best score"),
    ("typical_p", "P", "Sampling: draw from the most typical tokens that make up the probability P"),
    ("epsilon_cutoff", "P", "Sampling: draw from tokens of at least the probability P"),
    ("eta_cutoff", "P", "Sampling: the same with a bound that falls where the choice is wide"),
    ("seed", "N", "Sampling: the same draws for the same request, alone or among others [default: others each time]"),
    (
        "return_alternatives",
        "BOOL",
        "Return num_return_sequences targets with the likeliest first tokens, each completed",
    ),
    ("num_beam_groups", "N", "Groups of beams that avoid each other's tokens"),
    (
        "diversity_penalty",
        "X",
        "Subtracted from a token's score for each beam of another group that has just chosen it",
    ),
    (
        "stop_strings",
        "TEXT|JSON",
        "Text after which a target ends, or several as a JSON list; what begins with [ is such a list",
    ),
    ("max_time", "SECONDS", "End all targets as they are after so long"),
    ("length_penalty", "X", "Beam scores are divided by length^X"),
    (
        "coverage_penalty",
        "X",
        "Beam scores get X times the sum of log(min(coverage, 1)) over the source's tokens, with a model exported with \
         --alignment",
    ),
    ("early_stopping", "MODE", "When beam search is content with what has finished"),
    ("patience", "X", "With early_stopping true, wait for X times as many finished hypotheses as there are beams"),
    ("repetition_penalty", "X", "Above 1 makes tokens of the target less likely to come again"),
    ("frequency_penalty", "X", "Subtracted from a token's score for each time it was generated"),
    ("presence_penalty", "X", "Subtracted from the score of a token that was generated"),
    ("encoder_repetition_penalty", "X", "Above 1 makes tokens of the source more likely"),
    ("no_repeat_ngram_size", "N", "No N tokens occur twice in a row in the target"),
    ("encoder_no_repeat_ngram_size", "N", "No N tokens of the source occur in a row in the target"),
    ("bad_words_ids", "JSON", "Token sequences that are not generated: [[17], [5, 6]]"),
    ("sequence_bias", "JSON", "Token sequences and what is added to their scores: [[[17], -2.5]]"),
    ("forced_bos_token_id", "ID", "The token generated first"),
    ("forced_eos_token_id", "ID", "The token generated last when the maximum length is reached"),
    ("exponential_decay_length_penalty", "JSON", "From where ending becomes likelier, and how fast: [30, 1.05]"),
    ("suppress_tokens", "JSON", "Tokens that are never generated: [5, 6]"),
    ("begin_suppress_tokens", "JSON", "Tokens that are not generated first: [5, 6]"),
    ("eos_token_id", "IDS", "The token or tokens that end a target: 1 or [1, 107]"),
    ("pad_token_id", "ID", "What pads sources of unequal length"),
    ("decoder_start_token_id", "ID", "The token every target starts with"),
    ("output_logprobs", "BOOL", "Tell the model's log-probability of each token (with --jsonl)"),
    ("top_logprobs", "N", "The same for the N likeliest tokens at each place"),
    (
        "output_attentions",
        "BOOL",
        "Tell what each token attended to in the source (with --jsonl, and a model exported with --alignment)",
    ),
    (
        "prompt_lookup_num_tokens",
        "N",
        "Greedy search drafts N tokens from the source, for the same output in fewer steps",
    ),
    ("max_matching_ngram_size", "N", "Last tokens to look for in the source for a draft, at most [default: 2]"),
    ("renormalize_logits", "BOOL", "Make processed scores log-probabilities again"),
    ("remove_invalid_values", "BOOL", "Replace NaN and infinite scores instead of failing"),
];

fn flag((name, placeholder, help): &(&'static str, &'static str, &'static str)) -> Arg {
    let flag = Arg::new(*name)
        .long(name.replace('_', "-"))
        .value_name(*placeholder)
        .help(*help)
        .allow_negative_numbers(true)
        .help_heading("Generation options (Hugging Face's names)");
    match values(placeholder) {
        [] => flag,
        values => flag.num_args(0..=1).require_equals(true).default_missing_value("true").value_parser(values.to_vec()),
    }
}

/// The JSON that a flag's text is.
fn value((name, placeholder): (&str, &str), text: &str) -> Result<Value, String> {
    let json = || serde_json::from_str(text).map_err(|error| t5gemma_protocol::describe_error(text, &error));
    match placeholder {
        "TEXT|JSON" if text.trim_start().starts_with('[') => json(),
        "TEXT|JSON" => Ok(text.into()),
        "JSON" => json(),
        // What is not JSON is a word, such as `never`; the library says whether the option takes it.
        _ => Ok(serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()))),
    }
    .map_err(|problem| format!("--{}: expected JSON: {problem}", name.replace('_', "-")))
}

impl Args for GenerationFlags {
    fn augment_args(command: Command) -> Command {
        constraints::augment(command.args(FLAGS.iter().map(flag)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for GenerationFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<GenerationFlags, clap::Error> {
        let mut flags = GenerationFlags { constraints: constraints::given(matches), ..GenerationFlags::default() };
        for (name, placeholder, _) in FLAGS {
            let Some(text) = matches.get_one::<String>(name) else { continue };
            match value((name, placeholder), text) {
                Ok(value) => drop(flags.given.insert(name.to_string(), value)),
                Err(problem) => flags.wrong = Some(problem),
            }
        }
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = GenerationFlags::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_that_stands_alone_swallows_no_text() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["--do-sample", "Dr. Smith"], &["--do-sample", "Dr. Smith"]),
            (&["--do-sample", "true", "Dr. Smith"], &["--do-sample=true", "Dr. Smith"]),
            (&["--do-sample", "false"], &["--do-sample=false"]),
            (&["--do-sample=false", "true"], &["--do-sample=false", "true"]),
            (&["--do-sample", "--", "true"], &["--do-sample", "--", "true"]),
            (&["--", "--do-sample", "true"], &["--", "--do-sample", "true"]),
            (&["--early-stopping", "never"], &["--early-stopping=never"]),
            (&["--do-sample", "never"], &["--do-sample", "never"]),
            (&["--num-beams", "2", "true"], &["--num-beams", "2", "true"]),
            (&["--jsonl", "true"], &["--jsonl", "true"]),
        ];
        for (given, expected) in cases {
            assert_eq!(joined(given.iter().map(OsString::from)), *expected, "{given:?}");
        }
    }

    #[test]
    fn values_are_json_only_where_they_say_so() {
        let cases = [
            (("stop_strings", "TEXT|JSON"), "5", Ok(Value::from("5"))),
            (("stop_strings", "TEXT|JSON"), "\"a\"", Ok("\"a\"".into())),
            (("stop_strings", "TEXT|JSON"), "[\"a\", \"b\"]", Ok(vec!["a", "b"].into())),
            (
                ("stop_strings", "TEXT|JSON"),
                "[a",
                Err("--stop-strings: expected JSON: column 2: expected value, found `a`".to_string()),
            ),
            (("num_beams", "N"), "5", Ok(5.into())),
            (("num_beams", "N"), "five", Ok("five".into())),
        ];
        for (flag, text, expected) in cases {
            assert_eq!(value(flag, text), expected, "{text}");
        }
    }
}
