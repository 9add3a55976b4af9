//! `Constraints`: what a request says of the output as a whole, as data. It is part of the generation options; what it
//! says becomes a `Constraint` when a generation begins, because texts and grammars need the model's tokenizer.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

/// What the output must be. All that are given hold together; an output ends only where each of them is met.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Constraints {
    /// The output is one of these; empty is off.
    pub allowed_sequences: Vec<Sequence>,
    /// Each of these occurs in the output. They are forced where the length would run out without them.
    pub required_phrases: Vec<Sequence>,
    /// The output is JSON of this schema.
    pub json_schema: Option<Value>,
    /// The whole output matches this regular expression, in the syntax of Rust's `regex`.
    pub regex: Option<String>,
    /// The output is of this grammar, in llguidance's variant of Lark.
    pub grammar: Option<String>,
    /// Says which tokens may come next.
    pub prefix_allowed_tokens: Option<PrefixAllowedTokens>,
}

/// A part of an output as a request gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sequence {
    /// Text, for the model's tokenizer.
    Text(String),
    /// Token ids.
    Tokens(Vec<i64>),
}

/// Hugging Face's `prefix_allowed_tokens_fn`: given the number of a source row and its target so far, decoder prompt
/// included, the tokens that may come next. Two are equal if they are clones.
#[derive(Clone)]
pub struct PrefixAllowedTokens(Arc<AllowedTokens>);

type AllowedTokens = dyn Fn(usize, &[i64]) -> Vec<i64> + Send + Sync;

impl PrefixAllowedTokens {
    /// Takes the function.
    pub fn new(allowed: impl Fn(usize, &[i64]) -> Vec<i64> + Send + Sync + 'static) -> PrefixAllowedTokens {
        PrefixAllowedTokens(Arc::new(allowed))
    }

    pub(super) fn call(&self, row: usize, history: &[i64]) -> Vec<i64> {
        (self.0)(row, history)
    }
}

impl fmt::Debug for PrefixAllowedTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrefixAllowedTokens(..)")
    }
}

impl PartialEq for PrefixAllowedTokens {
    fn eq(&self, other: &PrefixAllowedTokens) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Constraints {
    /// Reads one option: false if it is not one of these, otherwise what would have been accepted where it cannot be taken.
    pub(crate) fn read(&mut self, name: &str, value: &Value) -> Result<bool, &'static str> {
        match name {
            "allowed_sequences" => self.allowed_sequences = sequences(value).ok_or(SEQUENCES)?,
            "required_phrases" => self.required_phrases = sequences(value).ok_or(SEQUENCES)?,
            "json_schema" => {
                let schema = Some(value).filter(|value| value.is_object() || value.is_boolean());
                self.json_schema = Some(schema.ok_or("a JSON schema: an object, true or false")?.clone());
            }
            "regex" => self.regex = Some(text(value).ok_or("a regular expression as a string")?),
            "grammar" => self.grammar = Some(text(value).ok_or("a Lark grammar as a string")?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether anything is asked for.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Constraints::default()
    }
}

const SEQUENCES: &str = "a list of texts or lists of token ids, none of them empty";

fn sequences(value: &Value) -> Option<Vec<Sequence>> {
    let sequence = |value: &Value| match value {
        Value::String(text) if !text.is_empty() => Some(Sequence::Text(text.clone())),
        Value::Array(tokens) if !tokens.is_empty() => {
            let token = |token: &Value| token.as_i64().filter(|&token| token >= 0);
            Some(Sequence::Tokens(tokens.iter().map(token).collect::<Option<_>>()?))
        }
        _ => None,
    };
    value.as_array()?.iter().map(sequence).collect()
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn options_are_read_or_refused() {
        let mut constraints = Constraints::default();
        let accepted = [
            ("allowed_sequences", json!(["a b", [5, 6]])),
            ("required_phrases", json!([])),
            ("json_schema", json!({"type": "object"})),
            ("regex", json!("[0-9]+")),
            ("grammar", json!("start: \"a\"")),
        ];
        for (name, value) in &accepted {
            assert_eq!(constraints.read(name, value), Ok(true), "{name}");
        }
        assert_eq!(constraints.allowed_sequences, [Sequence::Text("a b".into()), Sequence::Tokens(vec![5, 6])]);
        assert_eq!(constraints.read("num_beams", &json!(1)), Ok(false));
        let refused = [
            ("allowed_sequences", json!("a")),
            ("allowed_sequences", json!([""])),
            ("allowed_sequences", json!([[]])),
            ("required_phrases", json!([5])),
            ("required_phrases", json!([[-5]])),
            ("json_schema", json!("{}")),
            ("regex", json!(5)),
            ("grammar", json!({})),
        ];
        for (name, value) in refused {
            assert!(constraints.clone().read(name, &value).is_err(), "{name} {value}");
        }
        assert!(!constraints.is_empty() && Constraints::default().is_empty());
    }
}
