//! What an output folder was begun with: the task, the model and the options. It is written once, by the process that
//! comes first, and every later one has to agree.

use serde_json::{Map, Value};

use crate::error::BatchError;
use crate::store::Store;

/// The file in the output folder.
const NAME: &str = "settings.json";

/// What decides on the bytes of outputs, besides the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings(pub Map<String, Value>);

impl Settings {
    /// Whether the output folder was begun with them; `false` if it has not been begun.
    ///
    /// # Errors
    /// It was begun with others, or cannot be read.
    pub fn check(&self, store: &Store) -> Result<bool, BatchError> {
        let Some(bytes) = store.read_record(NAME)? else { return Ok(false) };
        let begun = serde_json::from_slice(&bytes)
            .map_err(|error| BatchError::file(store.record(NAME), format!("expected JSON: {error}")))?;
        match difference("", &begun, &Value::Object(self.0.clone())) {
            None => Ok(true),
            Some((field, begun, found)) => Err(BatchError::Arguments(format!(
                "{store}: expected {field} {begun}, with which this output folder was begun, found {found}; choose another \
                 --output"
            ))),
        }
    }

    /// Begins the output folder with them, or checks that another process has begun it with the same.
    ///
    /// # Errors
    /// As [`Settings::check`], or a folder that cannot be written.
    pub fn begin(&self, store: &Store) -> Result<(), BatchError> {
        let text = serde_json::to_string_pretty(&self.0).expect("JSON is written") + "\n";
        if !store.put_record_if_absent(NAME, text.as_bytes())? {
            self.check(store)?;
        }
        Ok(())
    }
}

/// The first field that differs, with both values.
fn difference(field: &str, begun: &Value, found: &Value) -> Option<(String, Value, Value)> {
    match (begun, found) {
        (Value::Object(begun), Value::Object(found)) => {
            let names = begun.keys().chain(found.keys().filter(|name| !begun.contains_key(*name)));
            names.map(String::as_str).find_map(|name| {
                let inner = if field.is_empty() { name.to_string() } else { format!("{field}.{name}") };
                let of = |fields: &Map<String, Value>| fields.get(name).cloned().unwrap_or(Value::Null);
                difference(&inner, &of(begun), &of(found))
            })
        }
        _ if begun == found => None,
        _ => Some((field.to_string(), begun.clone(), found.clone())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        let begun = json!({"task": "generate", "options": {"num_beams": 4}});
        let cases = [
            (json!({"task": "generate", "options": {"num_beams": 4}}), None),
            (json!({"task": "score", "options": {}}), Some(("task", json!("generate"), json!("score")))),
            (json!({"task": "generate", "options": {}}), Some(("options.num_beams", json!(4), json!(null)))),
            (
                json!({"task": "generate", "options": {"num_beams": 4, "top_k": 5}}),
                Some(("options.top_k", json!(null), json!(5))),
            ),
        ];
        for (found, expected) in cases {
            let expected = expected.map(|(field, begun, found)| (field.to_string(), begun, found));
            assert_eq!(difference("", &begun, &found), expected, "{found}");
        }
    }
}
