//! Text from files and stdin, whatever editors put before and behind it, and JSON of which an error tells the place and what
//! stands there.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Reads a file of text, without the byte-order mark that it may begin with.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let text = without_mark(&bytes).map_err(|problem| anyhow!("{}: {problem}", path.display()))?;
    match str::from_utf8(text) {
        Ok(text) => Ok(text.to_string()),
        Err(error) => {
            let line = 1 + text[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
            Err(anyhow!("{}: line {line}: {}", path.display(), not_utf8(text, &error)))
        }
    }
}

/// Reads a file of JSON.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    json(path, &read_text(path)?)
}

/// Reads the text of a file as JSON.
pub fn json<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|error| anyhow!("{}: expected JSON: {}", path.display(), problem_of_json(text, &error)))
}

/// A text without the byte-order mark of UTF-8.
///
/// # Errors
/// The text begins with the mark of another encoding.
pub fn without_mark(bytes: &[u8]) -> Result<&[u8], String> {
    let other = match bytes {
        [0xef, 0xbb, 0xbf, text @ ..] => return Ok(text),
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => "UTF-32",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => return Ok(bytes),
    };
    Err(format!("expected UTF-8, found the byte-order mark of {other} (convert it: iconv -f {other} -t UTF-8)"))
}

/// What stands where UTF-8 ends.
pub fn not_utf8(text: &[u8], error: &std::str::Utf8Error) -> String {
    let byte = text.get(error.valid_up_to()).copied().unwrap_or_default();
    format!("expected UTF-8, found the byte 0x{byte:02x} at byte {}", error.valid_up_to() + 1)
}

/// What an error of JSON says, where, and what stands there.
pub fn problem_of_json(text: &str, error: &serde_json::Error) -> String {
    let whole = error.to_string();
    let (line, column) = (error.line(), error.column());
    let problem = whole.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&whole);
    let problem = match problem {
        "recursion limit exceeded" => "lists and objects are nested more than 127 deep",
        problem => problem,
    };
    let place = match text.trim_end().contains('\n') {
        true => format!("line {line}, column {column}"),
        false => format!("column {column}"),
    };
    let found = match error.classify() {
        serde_json::error::Category::Syntax if problem.starts_with("expected") || problem == "trailing characters" => {
            let of_line = text.split('\n').nth(line.saturating_sub(1)).unwrap_or_default();
            // Columns count bytes, the last that was read.
            let at = (0..=column.saturating_sub(1).min(of_line.len())).rev().find(|&at| of_line.is_char_boundary(at));
            match of_line[at.unwrap_or(0)..].chars().next() {
                Some('\u{feff}') => ", found a byte-order mark".to_string(),
                Some(found) => format!(", found `{}`", found.escape_debug()),
                None => ", found the end".to_string(),
            }
        }
        _ => String::new(),
    };
    format!("{place}: {problem}{found}")
}

/// A value in a message, cut where it is long.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Reads a JSON object of which no field stands twice, at any depth: of two, one would be dropped silently.
pub fn object(text: &str) -> Result<Map<String, Value>> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Once.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    match value.map_err(|error| anyhow!("expected JSON: {}", problem_of_json(text, &error)))? {
        Value::Object(fields) => Ok(fields),
        other => Err(anyhow!("expected a JSON object, found {}", shown(&other))),
    }
}

/// A value whose objects have each field once.
struct Once;

impl<'de> DeserializeSeed<'de> for Once {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Once {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Once)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = object.next_key::<String>()? {
            let value = object.next_value_seed(Once)?;
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format_args!("the field {name:?} stands twice")));
            }
            fields.insert(name, value);
        }
        Ok(fields.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_other_encodings_are_named() {
        assert_eq!(without_mark(b"\xef\xbb\xbfa"), Ok(b"a".as_slice()));
        assert_eq!(without_mark(b"a\xef\xbb\xbf"), Ok(b"a\xef\xbb\xbf".as_slice()));
        for (bytes, expected) in
            [(b"\xff\xfea\0".as_slice(), "UTF-16"), (b"\xfe\xff\0a", "UTF-16"), (b"\xff\xfe\0\0a\0\0\0", "UTF-32")]
        {
            let problem = without_mark(bytes).expect_err("not UTF-8");
            assert!(problem.contains(&format!("found the byte-order mark of {expected} ")), "{problem}");
        }
    }

    #[test]
    fn what_is_no_object_is_told_with_its_place() {
        let deep = "[".repeat(200);
        let cases = [
            ("", "expected JSON: column 0: EOF while parsing a value"),
            ("{\"a\": }", "expected JSON: column 7: expected value, found `}`"),
            ("{\"a\": 1} x", "expected JSON: column 10: trailing characters, found `x`"),
            ("{\"a\": 1,\n\"b\": x}", "expected JSON: line 2, column 6: expected value, found `x`"),
            ("\u{feff}{}", "expected JSON: column 1: expected value, found a byte-order mark"),
            ("{\"a\": 1e999}", "expected JSON: column 11: number out of range"),
            ("{\"a\": \"\\ud800\"}", "expected JSON: column 14: unexpected end of hex escape"),
            ("{\"a\": {\"b\": 1, \"b\": 1}}", "expected JSON: column 22: the field \"b\" stands twice"),
            (&deep, "expected JSON: column 128: lists and objects are nested more than 127 deep"),
            ("[1, 2]", "expected a JSON object, found [1,2]"),
            ("null", "expected a JSON object, found null"),
        ];
        for (text, expected) in cases {
            assert_eq!(object(text).expect_err(expected).to_string(), expected, "{text}");
        }
        let fields = object("{\"a\": [1, -2, 0.5, true, null, {\"a\": \"x\"}], \"\": \"\\u0000\"}").expect("an object");
        assert_eq!(Value::Object(fields).to_string(), "{\"a\":[1,-2,0.5,true,null,{\"a\":\"x\"}],\"\":\"\\u0000\"}");
    }
}
