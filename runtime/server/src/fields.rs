//! `Fields`: the fields of a JSON request, taken one by one with errors that name the field. Null counts as absent, as
//! clients send it for what was not given.

use serde_json::{Map, Value};
use t5gemma_protocol::{ImageFields, Images, abbreviated};

use crate::failure::{Failure, Reason};

/// Fields that have not been taken yet.
pub struct Fields {
    fields: Map<String, Value>,
    /// The object that they belong to, with a dot, for messages.
    within: String,
}

impl Fields {
    /// The fields of the body of a request.
    pub fn parse(body: &[u8]) -> Result<Fields, Failure> {
        let text = str::from_utf8(body)
            .map_err(|error| Failure::new(Reason::Invalid, t5gemma_protocol::describe_invalid_utf8(body, &error)))?;
        Ok(Fields::of(t5gemma_protocol::parse_object(text)?))
    }

    /// The fields of an object.
    pub fn of(fields: Map<String, Value>) -> Fields {
        Fields { fields, within: String::new() }
    }

    /// Whether a field is an object.
    pub fn has_object(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(Value::is_object)
    }

    /// Takes a field that is not null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    fn as_form<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.refused(name, expected, &value)),
        }
    }

    /// The error of a field.
    pub fn refused(&self, name: &str, expected: &str, found: &Value) -> Failure {
        Failure::field(&format!("{}{name}", self.within), expected, abbreviated(found))
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        self.as_form(name, "a string", |value| value.as_str().map(str::to_string))
    }

    /// True or false.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, Failure> {
        self.as_form(name, "true or false", Value::as_bool)
    }

    /// An integer of at least 0.
    pub fn count(&mut self, name: &str) -> Result<Option<u64>, Failure> {
        self.as_form(name, "an integer of at least 0", Value::as_u64)
    }

    /// A number.
    pub fn number(&mut self, name: &str) -> Result<Option<f64>, Failure> {
        self.as_form(name, "a number", Value::as_f64)
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, Failure> {
        let object = self.as_form(name, "an object", |value| value.as_object().cloned())?;
        Ok(object.map(|fields| Fields { fields, within: format!("{}{name}.", self.within) }))
    }

    /// A text or a list of texts.
    pub fn texts(&mut self, name: &str) -> Result<Option<Vec<String>>, Failure> {
        self.as_form(name, "a string or a list of strings", texts)
    }

    /// The fields of the images of sources.
    pub fn image_fields(&mut self) -> Result<ImageFields, Failure> {
        Ok(ImageFields { images: self.images()?, pan_and_scan: self.flag("pan_and_scan")?, pixel_values: None })
    }

    /// The images of one source, or those of each: data URIs.
    pub fn images(&mut self) -> Result<Option<Images>, Failure> {
        let list = |value: &Value| value.as_array()?.iter().map(|uri| uri.as_str().map(str::to_string)).collect();
        self.as_form("images", "data URIs in a list or a list of lists", |value| match value.as_array()? {
            rows if rows.first().is_some_and(Value::is_array) => {
                rows.iter().map(list).collect::<Option<Vec<Vec<String>>>>().map(Images::Several)
            }
            _ => list(value).map(Images::One),
        })
    }

    /// The names of the fields that are left and not null.
    pub fn left(&self) -> impl Iterator<Item = &String> {
        self.fields.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name)
    }

    /// Refuses fields that nobody has taken.
    pub fn end(self) -> Result<(), Failure> {
        match self.left().next() {
            None => Ok(()),
            Some(name) => {
                let field = format!("{}{name}", self.within);
                let message = format!("{field}: no such field");
                Err(Failure { field: Some(field), ..Failure::new(Reason::Invalid, message) })
            }
        }
    }

    /// The fields that are left.
    pub fn into_rest(self) -> Map<String, Value> {
        self.fields.into_iter().filter(|(_, value)| !value.is_null()).collect()
    }
}

/// A text, or a list of texts.
pub fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(list) => list.iter().map(|text| text.as_str().map(str::to_string)).collect(),
        _ => None,
    }
}

/// A list of token ids, or a list of such lists.
pub fn tokens(value: &Value) -> Option<Vec<Vec<i64>>> {
    let row = |value: &Value| value.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>();
    match value.as_array()? {
        list if list.first().is_some_and(Value::is_array) => list.iter().map(row).collect(),
        _ => row(value).map(|row| vec![row]),
    }
}
