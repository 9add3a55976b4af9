//! Generation options on the command line: one flag per option of the protocol. The flags become a JSON object like the
//! `options` of a request; the library checks the values.

use std::ffi::OsString;

use anyhow::Result;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};
use t5gemma_protocol::{GENERATION_OPTIONS, GenerationOption, OptionGroup, OptionValue, describe_error};

use crate::constraints::{self, Constraint};
use crate::exit::bail_usage;

/// The options that flags set, by their Hugging Face names.
#[derive(Clone, Default)]
pub struct GenerationFlags {
    given: Map<String, Value>,
    /// Constraints whose files have not been read yet.
    constraints: Vec<Constraint>,
    /// The error of a flag whose text is malformed.
    wrong: Option<String>,
}

impl GenerationFlags {
    /// The options as the JSON object of a request; reads the files that flags name.
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

    /// Whether a flag sets an option.
    pub fn gives(&self, option: &str) -> bool {
        self.given.contains_key(option) || self.constraints.iter().any(|constraint| constraint.name() == option)
    }

    /// Flags whose values have been read.
    #[cfg(test)]
    pub fn of(given: Map<String, Value>) -> GenerationFlags {
        GenerationFlags { given, ..GenerationFlags::default() }
    }
}

/// Whether an option has a flag.
pub fn has_flag(option: &str) -> bool {
    GENERATION_OPTIONS.iter().any(|known| known.name == option)
}

/// Joins boolean flags with a value in the next argument: `--do-sample false` becomes `--do-sample=false`, while in
/// `--do-sample TEXT` the text stays an argument.
pub fn joined(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let values_of = |argument: &str| match argument.strip_prefix("--").map(|name| name.replace('-', "_")) {
        Some(name) => flags().find(|option| option.name == name).map_or(&[][..], |option| values(option.value)),
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

/// The options whose flags are defined here; those of constraints that may be files are in `constraints`.
fn flags() -> impl Iterator<Item = &'static GenerationOption> {
    // Flags load adapters: see `AdapterArguments`.
    GENERATION_OPTIONS.iter().filter(|option| !constraints::has_flag(option.name) && option.name != "adapter")
}

/// The value name of a flag.
fn value_name(option: &GenerationOption) -> &'static str {
    match option.value {
        OptionValue::Flag => "BOOL",
        OptionValue::EarlyStopping => "MODE",
        OptionValue::Integer => "N",
        OptionValue::Number => "X",
        OptionValue::Probability => "P",
        OptionValue::Seconds => "SECONDS",
        OptionValue::Token => "ID",
        OptionValue::TokenOrTokens => "IDS",
        OptionValue::Text => "TEXT",
        OptionValue::TextOrTexts => "TEXT|JSON",
        _ => "JSON",
    }
}

fn flag(option: &'static GenerationOption) -> Arg {
    let flag = Arg::new(option.name)
        .long(option.name.replace('_', "-"))
        .value_name(value_name(option))
        .help(in_flags(option.summary))
        .allow_negative_numbers(true)
        .help_heading(heading(option.group));
    match values(option.value) {
        [] => flag,
        values => flag.num_args(0..=1).require_equals(true).default_missing_value("true").value_parser(values.to_vec()),
    }
}

fn heading(group: OptionGroup) -> &'static str {
    match group {
        OptionGroup::Generation => "Generation",
        OptionGroup::Sampling => "Sampling",
        OptionGroup::Constraints => "Constraints",
        OptionGroup::Output => "Output",
    }
}

/// The values of a flag whose value may be omitted; the first is then implied.
fn values(value: OptionValue) -> &'static [&'static str] {
    match value {
        OptionValue::Flag => &["true", "false"],
        OptionValue::EarlyStopping => &["true", "false", "never"],
        _ => &[],
    }
}

/// The JSON of a flag's text.
fn value(option: &GenerationOption, text: &str) -> Result<Value, String> {
    let json = || serde_json::from_str(text).map_err(|error| describe_error(text, &error));
    match value_name(option) {
        "TEXT|JSON" if text.trim_start().starts_with('[') => json(),
        "TEXT|JSON" | "TEXT" => Ok(text.into()),
        "JSON" => json(),
        // Text that is not JSON is a word, such as `never`; the library says whether the option takes it.
        _ => Ok(serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()))),
    }
    .map_err(|problem| format!("{}: expected JSON: {problem}", as_flag(option.name)))
}

/// The flag of an option.
pub fn as_flag(option: &str) -> String {
    format!("--{}", option.replace('_', "-"))
}

/// Replaces option names in a text by flags and drops a `true` after them. Option names that are also English words
/// stay.
pub fn in_flags(text: &str) -> String {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find(is_of_name) {
        let end = rest[start..].find(|c| !is_of_name(c)).map_or(rest.len(), |end| start + end);
        let (before, word) = (&rest[..start], &rest[start..end]);
        out.push_str(before);
        rest = &rest[end..];
        if word.contains('_') && has_flag(word) {
            out.push_str(&as_flag(word));
            rest = rest.strip_prefix(" true").unwrap_or(rest);
        } else {
            out.push_str(word);
        }
    }
    out + rest
}

impl Args for GenerationFlags {
    fn augment_args(command: Command) -> Command {
        constraints::augment(command.args(flags().map(flag)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for GenerationFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<GenerationFlags, clap::Error> {
        let mut flags = GenerationFlags { constraints: constraints::given(matches), ..GenerationFlags::default() };
        for option in self::flags() {
            let Some(text) = matches.get_one::<String>(option.name) else { continue };
            match value(option, text) {
                Ok(value) => drop(flags.given.insert(option.name.to_string(), value)),
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
            ("stop_strings", "5", Ok(Value::from("5"))),
            ("stop_strings", "\"a\"", Ok("\"a\"".into())),
            ("stop_strings", "[\"a\", \"b\"]", Ok(vec!["a", "b"].into())),
            (
                "stop_strings",
                "[a",
                Err("--stop-strings: expected JSON: column 2: expected value, found `a`".to_string()),
            ),
            ("num_beams", "5", Ok(5.into())),
            ("num_beams", "five", Ok("five".into())),
        ];
        for (name, text, expected) in cases {
            let option = flags().find(|option| option.name == name).expect("an option");
            assert_eq!(value(option, text), expected, "{text}");
        }
    }

    #[test]
    fn options_in_help_are_flags() {
        assert_eq!(in_flags("1 is sampling with do_sample true"), "1 is sampling with --do-sample");
        assert_eq!(in_flags("seed, num_beams and a_name"), "seed, --num-beams and a_name");
    }
}
