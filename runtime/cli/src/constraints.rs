//! Constraints on the command line: flags that hold a text or name a file. Their content becomes the JSON value of a
//! request option.

use std::path::Path;

use anyhow::Result;
use clap::{Arg, ArgMatches, Command};
use serde_json::Value;

use crate::exit::bail_usage;
use crate::files;

/// How a flag's text becomes the option's value.
#[derive(Clone, Copy)]
enum Reading {
    /// The text itself.
    Text,
    /// The content of the file.
    File,
    /// JSON in the text, or in the file that it names.
    JsonOrFile,
    /// The lines of a file, or a JSON list in it.
    Lines,
    /// A JSON list, or a single text.
    List,
}

/// Name, placeholder, reading and meaning of each flag.
const FLAGS: &[(&str, &str, Reading, &str)] = &[
    (
        "json_schema",
        "FILE|JSON",
        Reading::JsonOrFile,
        "Generate JSON that satisfies this JSON Schema: a file, or text that begins with {",
    ),
    ("regex", "REGEX", Reading::Text, "Generate text that matches this regular expression in full"),
    (
        "grammar",
        "FILE",
        Reading::File,
        "Generate text accepted by the grammar in this file, in llguidance's variant of Lark",
    ),
    (
        "allowed_sequences",
        "FILE",
        Reading::Lines,
        "Generate one of the texts in this file: one per line, or a JSON list",
    ),
    (
        "required_phrases",
        "TEXT|JSON",
        Reading::List,
        "Generate text that contains this text, or every element of a JSON list such as [\"text\", [5, 6]]",
    ),
];

/// A flag that was given.
#[derive(Clone)]
pub struct Constraint {
    name: &'static str,
    reading: Reading,
    text: String,
}

/// Adds the flags to a command.
pub fn augment(command: Command) -> Command {
    command.args(FLAGS.iter().map(|&(name, placeholder, _, help)| {
        Arg::new(name).long(name.replace('_', "-")).value_name(placeholder).help(help).help_heading("Constraints")
    }))
}

/// Whether a constraint has a flag of this name.
pub fn has_flag(option: &str) -> bool {
    FLAGS.iter().any(|(name, ..)| *name == option)
}

/// The constraints given.
pub fn given(matches: &ArgMatches) -> Vec<Constraint> {
    let given = |&(name, _, reading, _): &(&'static str, &str, Reading, &str)| {
        Some(Constraint { name, reading, text: matches.get_one::<String>(name)?.clone() })
    };
    FLAGS.iter().filter_map(given).collect()
}

/// The constraint of a flag whose value is the path of a file.
pub fn of_file(flag: &str, path: &Path) -> Option<Constraint> {
    let &(name, _, reading, _) = FLAGS.iter().find(|(name, ..)| *name == flag)?;
    Some(Constraint { name, reading, text: path.to_string_lossy().into_owned() })
}

impl Constraint {
    /// Its name in requests.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its value in requests.
    pub fn read(&self) -> Result<Value> {
        let text = &*self.text;
        let path = Path::new(text);
        match self.reading {
            Reading::Text => Ok(text.into()),
            Reading::File => Ok(files::read_text(path)?.into()),
            Reading::JsonOrFile if text.trim_start().starts_with('{') || ["true", "false"].contains(&text) => {
                self.json(text)
            }
            Reading::JsonOrFile => files::read_json(path),
            Reading::Lines => {
                let lines = files::read_text(path)?;
                if lines.trim_start().starts_with('[') {
                    return files::parse_json(path, &lines);
                }
                Ok(lines.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().into())
            }
            Reading::List if text.trim_start().starts_with('[') => self.json(text),
            Reading::List => Ok(vec![text].into()),
        }
    }

    fn json(&self, text: &str) -> Result<Value> {
        match serde_json::from_str(text) {
            Ok(value) => Ok(value),
            Err(error) => {
                let (flag, problem) = (self.name.replace('_', "-"), t5gemma_protocol::describe_error(text, &error));
                bail_usage!("--{flag}: expected JSON: {problem}")
            }
        }
    }
}
