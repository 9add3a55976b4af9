//! Constraints on the command line: flags that name files or hold text, and become the JSON that a request would say.

use std::fs;

use clap::{Arg, ArgMatches, Command};
use serde_json::Value;

/// How a flag's text becomes the option's value.
#[derive(Clone, Copy)]
enum Reading {
    /// The text itself.
    Text,
    /// What the file holds.
    File,
    /// JSON in the text, or in the file that it names.
    JsonOrFile,
    /// A text a line of a file, or a JSON list in it.
    Lines,
    /// JSON, or else one text.
    List,
}

/// Name, placeholder, reading and meaning of each flag.
const FLAGS: &[(&str, &str, Reading, &str)] = &[
    ("json_schema", "FILE|JSON", Reading::JsonOrFile, "The output is JSON of this schema"),
    ("regex", "REGEX", Reading::Text, "The whole output matches this regular expression"),
    ("grammar", "FILE", Reading::File, "The output is of this Lark grammar (llguidance's variant)"),
    ("allowed_sequences", "FILE", Reading::Lines, "The output is one of these: a text a line, or a JSON list"),
    ("required_phrases", "JSON", Reading::List, "Each of these occurs in the output: a text or [\"texts\", [5, 6]]"),
];

/// Adds the flags to a command.
pub fn augment(command: Command) -> Command {
    command.args(FLAGS.iter().map(|&(name, placeholder, reading, help)| {
        Arg::new(name)
            .long(name.replace('_', "-"))
            .value_name(placeholder)
            .help(help)
            .help_heading("Constraints on the whole output")
            .value_parser(move |text: &str| read(reading, text))
    }))
}

/// The constraints given, by their names in requests.
pub fn given(matches: &ArgMatches) -> impl Iterator<Item = (String, Value)> {
    let names = FLAGS.iter().map(|&(name, ..)| name);
    names.filter_map(|name| Some((name.to_string(), matches.get_one::<Value>(name)?.clone())))
}

fn read(reading: Reading, text: &str) -> Result<Value, String> {
    let file = || fs::read_to_string(text).map_err(|error| error.to_string());
    match reading {
        Reading::Text => Ok(text.into()),
        Reading::File => Ok(file()?.into()),
        Reading::JsonOrFile => {
            let is_json = text.trim_start().starts_with('{') || ["true", "false"].contains(&text);
            let json = if is_json { text.to_string() } else { file()? };
            serde_json::from_str(&json).map_err(|error| error.to_string())
        }
        Reading::Lines => {
            let lines = file()?;
            match lines.trim_start().starts_with('[').then(|| serde_json::from_str(&lines)) {
                Some(Ok(list)) => Ok(list),
                _ => Ok(lines.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().into()),
            }
        }
        Reading::List => Ok(match serde_json::from_str(text) {
            Ok(list @ Value::Array(_)) => list,
            _ => vec![text].into(),
        }),
    }
}
