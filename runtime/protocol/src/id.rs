//! The id of a request, which identifies its result.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

use crate::error::RequestError;
use crate::json::abbreviated;

/// A number, which is returned exactly as written, or a string.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Id {
    /// A number.
    Number(#[schemars(with = "f64")] Number),
    /// A string.
    Text(String),
}

/// 2^53: from there on, float64 cannot represent every integer.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

impl Id {
    /// Takes the id out of a request's fields.
    ///
    /// # Errors
    /// An id that is neither a string nor a number, or a number that would not be returned as it was written.
    pub fn take(fields: &mut Map<String, Value>) -> Result<Option<Id>, RequestError> {
        match fields.remove("id") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(id)) if id.is_f64() && id.as_f64().is_none_or(|id| id.abs() >= MAX_EXACT) => {
                Err(RequestError::form("id", "a number of fewer digits, or a string", id.to_string()))
            }
            Some(Value::Number(id)) => Ok(Some(Id::Number(id))),
            Some(Value::String(id)) => Ok(Some(Id::Text(id))),
            Some(other) => Err(RequestError::form("id", "a string or a number", abbreviated(&other))),
        }
    }

    /// The string, or the digits of the number.
    pub fn name(&self) -> String {
        match self {
            Id::Number(number) => number.to_string(),
            Id::Text(text) => text.clone(),
        }
    }
}

impl From<usize> for Id {
    fn from(number: usize) -> Id {
        Id::Number(number.into())
    }
}

/// As JSON: a string in quotation marks.
impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Id::Number(number) => number.fmt(f),
            Id::Text(text) => write!(f, "{}", Value::from(text.as_str())),
        }
    }
}
