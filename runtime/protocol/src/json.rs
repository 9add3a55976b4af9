//! JSON objects with unique fields, and errors that name the position and the character there.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::RequestError;

/// Reads a JSON object.
///
/// # Errors
/// Text that is not a JSON object, or duplicate fields at any depth, of which a parser would silently drop one.
pub fn parse_object(text: &str) -> Result<Map<String, Value>, RequestError> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = UniqueFields.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    match value.map_err(|error| RequestError::Json(describe_error(text, &error)))? {
        Value::Object(fields) => Ok(fields),
        other => Err(RequestError::form("", "a JSON object", abbreviated(&other))),
    }
}

/// A value whose objects have each field once.
struct UniqueFields;

impl<'de> DeserializeSeed<'de> for UniqueFields {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueFields {
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
        while let Some(value) = list.next_element_seed(UniqueFields)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = object.next_key::<String>()? {
            let value = object.next_value_seed(UniqueFields)?;
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format_args!("the field {name:?} stands twice")));
            }
            fields.insert(name, value);
        }
        Ok(fields.into())
    }
}

/// A value for a message, truncated if it is long.
pub fn abbreviated(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Describes an error in `text`: its position, the parser's message, and the character there.
pub fn describe_error(text: &str, error: &serde_json::Error) -> String {
    let whole = error.to_string();
    let (line, column) = (error.line(), error.column());
    let problem = whole.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&whole);
    let problem = match problem {
        "recursion limit exceeded" => "lists and objects are nested more than 127 deep",
        problem => problem,
    };
    let place = if text.trim_end().contains('\n') {
        format!("line {line}, column {column}")
    } else {
        format!("column {column}")
    };
    let found = match error.classify() {
        serde_json::error::Category::Syntax if problem.starts_with("expected") || problem == "trailing characters" => {
            let of_line = text.split('\n').nth(line.saturating_sub(1)).unwrap_or_default();
            // Columns count the bytes that were read.
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

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(parse_object(text).expect_err(expected).to_string(), expected, "{text}");
        }
        let fields =
            parse_object("{\"a\": [1, -2, 0.5, true, null, {\"a\": \"x\"}], \"\": \"\\u0000\"}").expect("an object");
        assert_eq!(Value::Object(fields).to_string(), "{\"a\":[1,-2,0.5,true,null,{\"a\":\"x\"}],\"\":\"\\u0000\"}");
    }
}
