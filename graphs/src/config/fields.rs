//! Reads a JSON object field by field, checks each field's type, and keeps track of the fields not yet taken.

use serde_json::{Map, Value};

use super::{ConfigError, MOST_SIZE};
use crate::json::{self, shown};

/// A field that may only have values without effect.
pub(crate) struct Refused {
    /// The field's name.
    pub field: &'static str,
    /// The values it may have, for messages.
    pub expected: &'static str,
    /// Whether a value is one of them.
    pub accepts: fn(&Value) -> bool,
}

/// The fields of one JSON object that have not been taken yet.
pub(crate) struct Fields {
    /// The object's path in the document, empty for the document itself.
    path: String,
    left: Map<String, Value>,
    /// Those that were taken and found to be without effect.
    pub(super) ignored: Vec<String>,
}

impl Fields {
    /// The fields of a document.
    pub fn parse(text: &str) -> Result<Fields, ConfigError> {
        let value = json::parse(text).map_err(|error| ConfigError {
            field: String::new(),
            expected: "a JSON object".into(),
            found: error.to_string(),
        })?;
        Fields::of("", value)
    }

    /// The fields of the object at `path`.
    pub fn of(path: &str, value: Value) -> Result<Fields, ConfigError> {
        match value {
            Value::Object(left) => Ok(Fields { path: path.to_string(), left, ignored: Vec::new() }),
            other => {
                Err(ConfigError { field: path.to_string(), expected: "a JSON object".into(), found: shown(&other) })
            }
        }
    }

    /// The error of one of the fields.
    pub fn error(&self, field: &str, expected: impl Into<String>, found: impl Into<String>) -> ConfigError {
        ConfigError { field: self.path_of(field), expected: expected.into(), found: found.into() }
    }

    /// The path of a field in the document.
    pub fn path_of(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_string() } else { format!("{}.{field}", self.path) }
    }

    /// The value of a field that has not been taken.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.left.get(field)
    }

    /// Takes a field's value, of whatever kind.
    pub fn remove(&mut self, field: &str) -> Option<Value> {
        self.left.remove(field)
    }

    /// Notes that a field that was taken has no effect.
    pub fn ignore(&mut self, field: impl Into<String>) {
        self.ignored.push(field.into());
    }

    /// The fields that have not been taken, except nulls.
    pub fn rest(&self) -> impl Iterator<Item = &String> {
        self.left.iter().filter(|(_, value)| !value.is_null()).map(|(field, _)| field)
    }

    /// Takes a field as a `T`; absent and `null` are `None`.
    pub fn take<T>(
        &mut self,
        field: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.left.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.error(field, expected, shown(&value))),
            },
        }
    }

    /// Takes a field that is absent, null or a value that `accepts` takes.
    pub fn expect(
        &mut self,
        field: &str,
        expected: &str,
        accepts: impl FnOnce(&Value) -> bool,
    ) -> Result<(), ConfigError> {
        self.take(field, expected, |value| accepts(value).then_some(())).map(|_| ())
    }

    /// Takes fields that change what is computed, and rejects any value that would.
    pub fn refuse(&mut self, fields: &[Refused]) -> Result<(), ConfigError> {
        fields.iter().try_for_each(|refused| self.expect(refused.field, refused.expected, refused.accepts))
    }

    pub fn text(&mut self, field: &str) -> Result<Option<String>, ConfigError> {
        self.take(field, "a string", |value| value.as_str().map(str::to_string))
    }

    pub fn boolean(&mut self, field: &str) -> Result<Option<bool>, ConfigError> {
        self.take(field, "true or false", Value::as_bool)
    }

    pub fn size(&mut self, field: &str) -> Result<Option<usize>, ConfigError> {
        self.size_up_to(MOST_SIZE, field)
    }

    pub fn size_up_to(&mut self, most: usize, field: &str) -> Result<Option<usize>, ConfigError> {
        self.take(field, &format!("an integer between 1 and {most}"), |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=most).contains(n))
        })
    }

    pub fn positive(&mut self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.take(field, "a positive number", |value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    /// A soft-cap: `null` is none, and absent the default.
    pub fn softcap(&mut self, field: &str, default: f64) -> Result<Option<f64>, ConfigError> {
        if self.left.contains_key(field) { self.positive(field) } else { Ok(Some(default)) }
    }

    pub fn token(&mut self, field: &str) -> Result<Option<i64>, ConfigError> {
        self.take(field, "a token id", |value| value.as_i64().filter(|&id| id >= 0))
    }

    pub fn tokens(&mut self, field: &str) -> Result<Option<Vec<i64>>, ConfigError> {
        self.take(field, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(|id| id.as_i64().filter(|&id| id >= 0)).collect(),
            one => one.as_i64().filter(|&id| id >= 0).map(|id| vec![id]),
        })
    }
}

/// Whether a value is an object or an array without entries.
pub(crate) fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}
