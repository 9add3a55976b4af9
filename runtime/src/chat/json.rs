//! transformers' `tojson`: JSON as Python's `json.dumps` writes it.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Error, State};

use super::python::{DEPTH, number, pay, refused};

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut given = args.0.into_iter();
    let mut take = |name: &str| -> Result<Option<Value>, Error> {
        let value = match given.next() {
            Some(value) => Some(value),
            None => kwargs.get(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = take("ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match take("indent")? {
        None => None,
        Some(text) if text.as_str().is_some() => Some(text.to_string()),
        Some(value) => {
            let width = match value.kind() {
                ValueKind::Bool => i64::from(value.is_true()),
                _ => value.as_i64().ok_or_else(|| refused("tojson: expected an integer or a string as indent"))?,
            };
            let width = usize::try_from(width).unwrap_or(0);
            pay(state, width)?;
            Some(" ".repeat(width))
        }
    };
    let separators = match take("separators")? {
        Some(value) => {
            let parts: Vec<String> = value.try_iter()?.filter_map(|part| part.as_str().map(str::to_string)).collect();
            parts.try_into().map_err(|_| refused("tojson: expected two strings as separators"))?
        }
        None => [if indent.is_some() { "," } else { ", " }.into(), ": ".into()],
    };
    let sort_keys = take("sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let mut out = String::new();
    Json { ensure_ascii, indent, separators, sort_keys }.write(state, value, &mut out, 0)?;
    Ok(Value::from_safe_string(out))
}

/// The formatting of `json.dumps`.
struct Json {
    ensure_ascii: bool,
    indent: Option<String>,
    separators: [String; 2],
    sort_keys: bool,
}

impl Json {
    fn write(&self, state: &State, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(refused(format!("tojson: values nested deeper than {DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, ["NaN", "Infinity"])),
            ValueKind::String => self.text(state, value.as_str().unwrap_or_default(), out)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<(Option<String>, Value)> = value.try_iter()?.map(|item| (None, item)).collect();
                self.entries(state, ['[', ']'], items, out, depth)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let name = match key.kind() {
                        ValueKind::String => key.to_string(),
                        ValueKind::None => "null".into(),
                        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
                        ValueKind::Number => number(&key, ["NaN", "Infinity"]),
                        other => return Err(refused(format!("tojson: a key is {other}"))),
                    };
                    items.push((Some(name), value.get_item(&key)?));
                }
                if self.sort_keys {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.entries(state, ['{', '}'], items, out, depth)?;
            }
            other => return Err(refused(format!("tojson: {other} cannot be written as JSON"))),
        }
        pay(state, 1)
    }

    fn entries(
        &self,
        state: &State,
        [open, close]: [char; 2],
        entries: Vec<(Option<String>, Value)>,
        out: &mut String,
        depth: usize,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| -> Result<(), Error> {
            if let Some(indent) = &self.indent {
                pay(state, indent.len().saturating_mul(depth))?;
                out.push('\n');
                out.extend(std::iter::repeat_n(indent.as_str(), depth));
            }
            Ok(())
        };
        out.push(open);
        for (at, (key, value)) in entries.iter().enumerate() {
            if at > 0 {
                pay(state, self.separators[0].len())?;
                out.push_str(&self.separators[0]);
            }
            line(out, depth + 1)?;
            if let Some(key) = key {
                self.text(state, key, out)?;
                pay(state, self.separators[1].len())?;
                out.push_str(&self.separators[1]);
            }
            self.write(state, value, out, depth + 1)?;
        }
        if !entries.is_empty() {
            line(out, depth)?;
        }
        out.push(close);
        Ok(())
    }

    fn text(&self, state: &State, text: &str, out: &mut String) -> Result<(), Error> {
        pay(state, text.len().saturating_mul(2))?;
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            out.push_str(&quoted);
            return Ok(());
        }
        for c in quoted.chars() {
            if c.is_ascii() && c != '\x7f' {
                out.push(c);
            } else {
                c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }
}
