//! JSON as Python's `json` module, which writes the files of checkpoints, reads and writes it: with the numbers `NaN`,
//! `Infinity` and `-Infinity`. A byte-order mark in front, which some editors add, is accepted.

use std::fmt;

use serde_json::Value;

/// The byte-order mark that some editors put before UTF-8 text.
pub const BYTE_ORDER_MARK: char = '\u{feff}';

/// The numbers that JSON does not have. A name that contains another comes before it.
const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// A text that is not JSON; displays what was found instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Malformed {}

/// Parses a text. A number that JSON does not have becomes a string with its name, which no reader of numbers accepts.
///
/// # Errors
/// A text that is not JSON, described with line and column.
pub fn parse(text: &str) -> Result<Value, Malformed> {
    let text = without_mark(text);
    serde_json::from_str(text).or_else(|error| {
        let Some(quoted) = replaced(text, |number| format!("\"{number}\"")) else {
            return Err(malformed(text, &error));
        };
        serde_json::from_str(&quoted).map_err(|error| {
            // Once more with replacements of the same length, for the right column.
            let padded = replaced(text, |number| format!("{:1$}", 0, number.len()).chars().rev().collect());
            let padded = padded.unwrap_or_default();
            malformed(text, &serde_json::from_str::<Value>(&padded).err().unwrap_or(error))
        })
    })
}

/// A text without its byte-order mark.
pub fn without_mark(text: &str) -> &str {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Describes a text that a JSON parser has rejected.
pub fn malformed(text: &str, error: &serde_json::Error) -> Malformed {
    let text = without_mark(text);
    let place = format!("line {}, column {}", error.line(), error.column());
    let begins = text.trim_start();
    Malformed(match begins {
        "" if text.is_empty() => "an empty file".to_string(),
        "" => "only white space".to_string(),
        _ if text.bytes().all(|byte| byte == 0) => "only zero bytes".to_string(),
        _ if error.is_eof() => format!("JSON that is truncated at {place}"),
        _ if error.line() == 1 && !begins.starts_with(['{', '[', '"']) => {
            format!("text that begins with {}", shown(&Value::String(begins.chars().take(50).collect())))
        }
        _ => {
            let words = error.to_string();
            format!("invalid JSON ({} at {place})", words.split(" at line ").next().unwrap_or_default())
        }
    })
}

/// Shortens text for messages, to 80 characters.
pub fn cut(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

/// Formats a value for messages: as JSON, shortened.
pub fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

/// The text with the numbers that JSON does not have replaced; none if there are no such numbers.
fn replaced(text: &str, by: impl Fn(&str) -> String) -> Option<String> {
    let (mut out, mut found, mut in_string, mut rest) = (String::new(), false, false, text);
    while let Some(next) = rest.chars().next() {
        let number = NUMBERS.into_iter().find(|number| !in_string && rest.starts_with(number));
        let taken = match (number, next) {
            (Some(number), _) => number.len(),
            (None, '\\') if in_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => next.len_utf8(),
        };
        in_string ^= next == '"';
        match number {
            Some(number) => out.push_str(&by(number)),
            None => out.push_str(&rest[..taken]),
        }
        found |= number.is_some();
        rest = &rest[taken..];
    }
    found.then_some(out)
}

/// Maximum number of names in a list.
const MOST_NAMES: usize = 10;

/// Joins names, and counts those beyond ten.
pub fn list(names: &[String]) -> String {
    let mut shown: Vec<String> = names.iter().take(MOST_NAMES).map(|name| cut(name)).collect();
    if names.len() > MOST_NAMES {
        shown.push(format!("and {} more", names.len() - MOST_NAMES));
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_python_writes_is_read() {
        for (text, expected) in [
            ("{\"a\": NaN, \"b\": [Infinity, -Infinity]}", json!({"a": "NaN", "b": ["Infinity", "-Infinity"]})),
            ("{\"NaN\": \"a \\\" NaN\\\\\", \"b\": NaN}", json!({"NaN": "a \" NaN\\", "b": "NaN"})),
            ("\u{feff}{\"a\": 1}", json!({"a": 1})),
            ("\u{feff}{\"\u{feff}\": NaN}", json!({"\u{feff}": "NaN"})),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_not_json_is_told_in_words() {
        for (text, expected) in [
            ("", "an empty file"),
            (" \n", "only white space"),
            ("\0\0\0", "only zero bytes"),
            ("{\"a\": [1", "JSON that is truncated at line 1, column 8"),
            ("{'a': 1}", "invalid JSON (key must be a string at line 1, column 2)"),
            ("{\"a\": NaN,}", "invalid JSON (trailing comma at line 1, column 11)"),
            ("{\"a\": -Infinity,\n \"b\": nan}", "invalid JSON (expected ident at line 2, column 8)"),
            ("<!DOCTYPE html>", "text that begins with \"<!DOCTYPE html>\""),
        ] {
            assert_eq!(parse(text).map_err(|error| error.to_string()), Err(expected.to_string()), "{text}");
        }
    }

    #[test]
    fn long_lists_are_truncated() {
        let names: Vec<String> = (0..12).map(|number| format!("n{number}")).collect();
        assert_eq!(list(&names), "n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, and 2 more");
    }
}
