//! `Form`: the accepted values of an option: in words, as JSON, and as a check that also applies to values set in Rust.

use std::fmt::Debug;

use serde_json::Value;
use t5gemma_graphs::json::shown;

use super::{EarlyStopping, ExponentialDecay, OptionError, Sequence, SequenceBias};

/// The accepted values of an option.
pub(super) struct Form<T> {
    /// In words, after "expected"; empty for options that JSON cannot hold.
    pub expected: &'static str,
    /// Reads JSON of the right type.
    pub read: fn(&Value) -> Option<T>,
    /// Whether a value of the right type is in range.
    pub holds: fn(&T) -> bool,
}

impl<T: Debug> Form<T> {
    /// Reads the JSON of an option into `option`; false if JSON cannot hold it.
    pub fn read_into(&self, option: &mut Option<T>, name: &str, value: &Value) -> Result<bool, OptionError> {
        if self.expected.is_empty() {
            return Ok(false);
        }
        let found = (self.read)(value).filter(|value| (self.holds)(value));
        *option = Some(found.ok_or_else(|| OptionError::new(name, self.expected, shown(value)))?);
        Ok(true)
    }

    /// Checks a value that has not been read by the form.
    pub fn check(&self, name: &str, value: Option<&T>) -> Result<(), OptionError> {
        match value.filter(|value| !(self.holds)(value)) {
            Some(value) => Err(OptionError::new(name, self.expected, format!("{value:?}"))),
            None => Ok(()),
        }
    }
}

/// Sums of so large a bias over a whole target are still finite; -1e9 is as good as forbidden already.
const MAX_BIAS: f32 = 1e30;
/// With the longest source it is still far from the number that stands for −∞ in beam search.
const MAX_COVERAGE_PENALTY: f64 = 100.0;
/// Bounds the number of hypotheses that are kept.
const MAX_PATIENCE: f64 = 100.0;
/// Bounds the size of a result.
const MAX_TOP_LOGPROBS: usize = 1000;

/// An option that JSON cannot hold.
pub(super) const fn not_json<T>() -> Form<T> {
    Form { expected: "", read: |_| None, holds: |_| true }
}

pub(super) const FLAG: Form<bool> = Form { expected: "true or false", read: Value::as_bool, holds: |_| true };

pub(super) const AT_LEAST_0: Form<usize> =
    Form { expected: "an integer of at least 0", read: integer, holds: |_| true };

pub(super) const AT_LEAST_1: Form<usize> =
    Form { expected: "an integer of at least 1", read: integer, holds: |&n| n >= 1 };

pub(super) const TOP_LOGPROBS: Form<usize> =
    Form { expected: "an integer from 0 to 1000", read: integer, holds: |&n| n <= MAX_TOP_LOGPROBS };

pub(super) const SEED: Form<u64> = Form { expected: "an integer below 2^64", read: Value::as_u64, holds: |_| true };

pub(super) const NUMBER: Form<f64> = Form { expected: "a number", read: Value::as_f64, holds: |_| true };

/// Scores are float32: neither the number nor its inverse may become 0 or infinite there.
pub(super) const POSITIVE: Form<f64> =
    Form { expected: "a positive number", read: Value::as_f64, holds: |&x| is_positive(x) };

pub(super) const SECONDS: Form<f64> =
    Form { expected: "a number of seconds, 0 or more", read: Value::as_f64, holds: |&x| x >= 0.0 };

pub(super) const OPENAI_PENALTY: Form<f64> =
    Form { expected: "a number from -2 to 2", read: Value::as_f64, holds: |x| x.abs() <= 2.0 };

/// Beyond, lengths to that power leave the range of float32 and with it all order among hypotheses.
pub(super) const LENGTH_PENALTY: Form<f64> =
    Form { expected: "a number from -10 to 10", read: Value::as_f64, holds: |x| x.abs() <= 10.0 };

pub(super) const COVERAGE_PENALTY: Form<f64> = Form {
    expected: "a number from 0 to 100",
    read: Value::as_f64,
    holds: |x| (0.0..=MAX_COVERAGE_PENALTY).contains(x),
};

pub(super) const DIVERSITY_PENALTY: Form<f64> = Form {
    expected: "a number of at least 0",
    read: Value::as_f64,
    holds: |x| (0.0..=f64::from(MAX_BIAS)).contains(x),
};

pub(super) const PATIENCE: Form<f64> =
    Form { expected: "a number above 0, at most 100", read: Value::as_f64, holds: |&x| x > 0.0 && x <= MAX_PATIENCE };

pub(super) const EARLY_STOPPING: Form<EarlyStopping> = Form {
    expected: "true, false or \"never\"",
    read: |value| match value {
        Value::Bool(false) => Some(EarlyStopping::False),
        Value::Bool(true) => Some(EarlyStopping::True),
        Value::String(never) if never == "never" => Some(EarlyStopping::Never),
        _ => None,
    },
    holds: |_| true,
};

pub(super) const TOKEN: Form<i64> = Form { expected: "a token id", read: token, holds: is_token };

pub(super) const TOKENS: Form<Vec<i64>> =
    Form { expected: "a list of token ids", read: tokens, holds: |ids| are_tokens(ids) };

pub(super) const TOKEN_OR_TOKENS: Form<Vec<i64>> = Form {
    expected: "a token id or a list of them",
    read: |value| tokens(value).or_else(|| Some(vec![token(value)?])),
    holds: |ids| are_tokens(ids),
};

pub(super) const TOKEN_SEQUENCES: Form<Vec<Vec<i64>>> = Form {
    expected: "a list of non-empty lists of token ids",
    read: |value| value.as_array()?.iter().map(tokens).collect(),
    holds: |sequences| sequences.iter().all(|ids| is_sequence(ids)),
};

pub(super) const SEQUENCE_BIAS: Form<Vec<SequenceBias>> = Form {
    expected: "a list of [[token ids], bias] pairs without empty sequences",
    read: sequence_bias,
    holds: |biases| biases.iter().all(|entry| is_sequence(&entry.tokens) && entry.bias.abs() <= MAX_BIAS),
};

pub(super) const EXPONENTIAL_DECAY: Form<ExponentialDecay> = Form {
    expected: "a pair [start, factor]",
    read: |value| match value.as_array()?.as_slice() {
        [start, factor] => Some(ExponentialDecay { start: integer(start)?, factor: factor.as_f64()? }),
        _ => None,
    },
    holds: |_| true,
};

pub(super) const STRINGS: Form<Vec<String>> = Form {
    expected: "a non-empty string or a list of them",
    read: |value| match value {
        Value::Array(list) => list.iter().map(text).collect(),
        one => Some(vec![text(one)?]),
    },
    holds: |texts| texts.iter().all(|text| !text.is_empty()),
};

pub(super) const SEQUENCES: Form<Vec<Sequence>> = Form {
    expected: "a list of non-empty texts or lists of token ids",
    read: |value| {
        let sequence = |value: &Value| match value {
            Value::String(text) => Some(Sequence::Text(text.clone())),
            value => Some(Sequence::Tokens(tokens(value)?)),
        };
        value.as_array()?.iter().map(sequence).collect()
    },
    holds: |sequences| {
        sequences.iter().all(|sequence| match sequence {
            Sequence::Text(text) => !text.is_empty(),
            Sequence::Tokens(tokens) => is_sequence(tokens),
        })
    },
};

pub(super) const JSON_SCHEMA: Form<Value> = Form {
    expected: "a JSON schema: an object, true or false",
    read: |value| Some(value.clone()),
    holds: |value| value.is_object() || value.is_boolean(),
};

pub(super) const NAME: Form<String> = Form { expected: "a name", read: text, holds: |name| !name.is_empty() };

pub(super) const REGEX: Form<String> =
    Form { expected: "a regular expression as a string", read: text, holds: |_| true };

pub(super) const GRAMMAR: Form<String> = Form { expected: "a Lark grammar as a string", read: text, holds: |_| true };

/// Whether a number and its inverse are positive and finite as float32, and no subnormal numbers.
pub(super) fn is_positive(x: f64) -> bool {
    x > 0.0 && (x as f32).is_normal() && ((1.0 / x) as f32).is_normal()
}

/// An integer, however it is written: 4 or 4.0.
fn integer(value: &Value) -> Option<usize> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=EXACT).contains(x)).map(|x| x as usize);
    value.as_u64().and_then(|n| usize::try_from(n).ok()).or_else(float)
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_string)
}

fn token(value: &Value) -> Option<i64> {
    i64::try_from(integer(value)?).ok()
}

fn tokens(value: &Value) -> Option<Vec<i64>> {
    value.as_array()?.iter().map(token).collect()
}

fn is_token(id: &i64) -> bool {
    *id >= 0
}

fn are_tokens(ids: &[i64]) -> bool {
    ids.iter().all(is_token)
}

fn is_sequence(ids: &[i64]) -> bool {
    !ids.is_empty() && are_tokens(ids)
}

/// Pairs of a sequence and its bias; also the older form, an object whose keys are written like `(10, 45)` or `10`.
fn sequence_bias(value: &Value) -> Option<Vec<SequenceBias>> {
    let bias = |value: &Value| value.as_f64().map(|x| x as f32);
    match value {
        Value::Array(pairs) => pairs
            .iter()
            .map(|pair| match pair.as_array()?.as_slice() {
                [ids, value] => Some(SequenceBias { tokens: tokens(ids)?, bias: bias(value)? }),
                _ => None,
            })
            .collect(),
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| {
                let ids = key.trim().trim_start_matches(['(', '[']).trim_end_matches([')', ']', ',']);
                let ids = ids.split(',').map(|id| id.trim().parse().ok());
                Some(SequenceBias { tokens: ids.collect::<Option<_>>()?, bias: bias(value)? })
            })
            .collect(),
        _ => None,
    }
}
