//! `Source`: a grammar from a request, with the checks before `llguidance` reads it: against grammars that would crash
//! the process, and against numbers that overflow its arithmetic.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

/// Maximum nesting of a grammar: the parser recurses, and a stack overflow cannot be caught.
const MAX_DEPTH: usize = 250;
/// Maximum number of rules of a grammar or references of a schema, as each may nest the next.
const MAX_RULES: usize = 50_000;

/// A grammar from a request.
pub(super) enum Source {
    Schema(Value),
    /// In the syntax of Rust's `regex`.
    Regex(String),
    /// In llguidance's variant of Lark. Special tokens are named as in `<end_of_turn>` or `<[107]>`.
    Lark(String),
}

impl Source {
    /// Rejects grammars that would crash the library or that it would misread.
    pub fn check(&self) -> Result<(), String> {
        self.check_depth()?;
        let rules = match self {
            Source::Schema(schema) => references(schema),
            Source::Regex(_) => 0,
            Source::Lark(lark) => lark.matches([':', '$']).count(),
        };
        if rules > MAX_RULES {
            return Err(format!("{rules} rules, more than {MAX_RULES}"));
        }
        self.check_multiples()
    }

    /// The grammar for the library.
    pub fn grammar(self) -> TopLevelGrammar {
        match self {
            Source::Schema(schema) => of_schema(schema),
            Source::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            Source::Lark(lark) => TopLevelGrammar::from_lark(lark),
        }
    }

    /// Rejects `multipleOf` values that overflow the library's arithmetic, which would then allow other numbers. Where
    /// parts of a schema combine, the library takes the least common multiple of their values, so the multiple of all
    /// of them has to fit.
    fn check_multiples(&self) -> Result<(), String> {
        let mut numbers = Vec::new();
        match self {
            Source::Schema(schema) => multiples(schema, &mut numbers),
            // Schemas in a grammar, as `%json`.
            Source::Lark(lark) => numbers.extend(lark.split("\"multipleOf\"").skip(1).filter_map(|rest| {
                let rest = rest.trim_start().strip_prefix(':')?.trim_start();
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c)).unwrap_or(rest.len());
                rest[..end].parse::<f64>().ok()
            })),
            Source::Regex(_) => {}
        }
        let refused = |number: f64| {
            format!("multipleOf {number} is too large or has too many decimals (at most 429496728, and 8 decimals)")
        };
        let mut all: Option<Multiple> = None;
        for number in numbers {
            // The library reports numbers that cannot be a multiple.
            if number <= 0.0 {
                continue;
            }
            let multiple = Multiple::of(number).filter(|multiple| multiple.fits()).ok_or_else(|| refused(number))?;
            let common = match all {
                None => Some(multiple),
                Some(other) if other == multiple => Some(other),
                Some(other) => {
                    let decimals = other.decimals.max(multiple.decimals);
                    let parts = other.scaled(decimals).zip(multiple.scaled(decimals));
                    let product = parts
                        .and_then(|(a, b)| Some((a.checked_mul(b).filter(|&product| product <= Multiple::MAX)?, a, b)));
                    let common = product.map(|(product, a, b)| Multiple { coefficient: product / gcd(a, b), decimals });
                    common.filter(|common| common.fits())
                }
            };
            match common {
                Some(common) => all = Some(common),
                None if !self.combines() => {}
                None => {
                    return Err(format!(
                        "multipleOf {number} combined with others: their least common multiple is too large"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether parts of a schema may combine.
    fn combines(&self) -> bool {
        match self {
            Source::Schema(schema) => combines(schema),
            Source::Lark(_) => true,
            Source::Regex(_) => false,
        }
    }

    /// Refuses grammars that are nested too deep. Brackets in strings count too; real ones are never that many.
    fn check_depth(&self) -> Result<(), String> {
        let is_too_deep = match self {
            Source::Schema(schema) => is_deeper(schema, MAX_DEPTH),
            Source::Regex(text) | Source::Lark(text) => {
                let depths = text.bytes().scan(0_usize, |depth, byte| {
                    match byte {
                        b'(' | b'[' | b'{' => *depth += 1,
                        b')' | b']' | b'}' => *depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    Some(*depth)
                });
                depths.into_iter().any(|depth| depth > MAX_DEPTH)
            }
        };
        if is_too_deep { Err(format!("nested deeper than {MAX_DEPTH}")) } else { Ok(()) }
    }
}

/// A `multipleOf` in the library's form: `coefficient` / 10^`decimals`.
#[derive(Clone, Copy, PartialEq)]
struct Multiple {
    coefficient: u64,
    decimals: u32,
}

impl Multiple {
    /// The largest number that fits the library's 32-bit arithmetic.
    const MAX: u64 = u32::MAX as u64;

    fn of(number: f64) -> Option<Multiple> {
        let (mut value, mut decimals) = (number, 0);
        while value.fract() != 0.0 && decimals < 20 {
            (value, decimals) = (value * 10.0, decimals + 1);
        }
        let is_integer = value.fract() == 0.0 && (0.0..=Multiple::MAX as f64).contains(&value);
        Some(Multiple { coefficient: value as u64, decimals }).filter(|_| is_integer)
    }

    /// In units of 10^-`decimals`.
    fn scaled(self, decimals: u32) -> Option<u64> {
        self.coefficient.checked_mul(10_u64.checked_pow(decimals - self.decimals)?)
    }

    fn fits(self) -> bool {
        let digit = 10_u64.checked_pow(self.decimals).and_then(|place| place.checked_mul(9));
        let next = digit.and_then(|digit| self.coefficient.checked_mul(10)?.checked_add(digit));
        next.is_some_and(|next| next <= Multiple::MAX)
    }
}

fn references(schema: &Value) -> usize {
    match schema {
        Value::Array(values) => values.iter().map(references).sum(),
        Value::Object(values) => {
            values.iter().map(|(name, value)| usize::from(name.starts_with('$')) + references(value)).sum()
        }
        _ => 0,
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn combines(schema: &Value) -> bool {
    const KEYS: [&str; 7] = ["allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "patternProperties"];
    match schema {
        Value::Array(values) => values.iter().any(combines),
        Value::Object(values) => values.iter().any(|(name, value)| KEYS.contains(&name.as_str()) || combines(value)),
        _ => false,
    }
}

/// The values of every `multipleOf`.
fn multiples(value: &Value, found: &mut Vec<f64>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| multiples(value, found)),
        Value::Object(values) => values.iter().for_each(|(name, value)| match value.as_f64() {
            Some(number) if name == "multipleOf" => found.push(number),
            _ => multiples(value, found),
        }),
        _ => {}
    }
}

fn is_deeper(value: &Value, depth: usize) -> bool {
    match value {
        Value::Array(values) => depth == 0 || values.iter().any(|value| is_deeper(value, depth - 1)),
        Value::Object(values) => depth == 0 || values.values().any(|value| is_deeper(value, depth - 1)),
        _ => false,
    }
}

/// The grammar of a schema's JSON.
///
/// Between the tokens of the JSON, at most one space or a line break with indentation is allowed: with unlimited
/// whitespace, small models are known to write nothing else. `x-guidance` in the schema overrides it.
fn of_schema(mut schema: Value) -> TopLevelGrammar {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": r"\x20|\x0A\x20{0,16}"}));
    }
    TopLevelGrammar::from_json_schema(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grammars_that_the_library_would_not_survive_are_refused() {
        let schema = |text: &str| Source::Schema(serde_json::from_str(text).expect("JSON"));
        let deep = |depth: usize| "(".repeat(depth) + "a" + &")".repeat(depth);
        let mut nested = json!(1);
        for _ in 0..300 {
            nested = json!([nested]);
        }
        for (source, expected) in [
            (Source::Regex(deep(250)), None),
            (Source::Regex(deep(251)), Some("nested deeper than 250")),
            (Source::Lark(format!("start: {}", deep(251))), Some("nested deeper than 250")),
            (Source::Schema(nested), Some("nested deeper than 250")),
            (Source::Lark("a: b\n".repeat(50_001)), Some("50001 rules, more than 50000")),
            (schema(r#"{"multipleOf": 429496728}"#), None),
            (schema(r#"{"items": {"multipleOf": 429496729}}"#), Some("multipleOf 429496729")),
            (schema(r#"{"multipleOf": 4294967295}"#), Some("multipleOf 4294967295")),
            (schema(r#"{"multipleOf": 0.01}"#), None),
            (schema(r#"{"multipleOf": 0.000000001}"#), Some("multipleOf 0.000000001")),
            (Source::Lark(r#"start: %json {"multipleOf" : 4294967295}"#.into()), Some("multipleOf 4294967295")),
            (schema(r#"{"properties": {"a": {"multipleOf": 65536}, "b": {"multipleOf": 99991}}}"#), None),
            (schema(r#"{"allOf": [{"multipleOf": 6}, {"multipleOf": 0.25}, {"multipleOf": 10}]}"#), None),
            (
                schema(r#"{"allOf": [{"multipleOf": 65536}, {"multipleOf": 99991}]}"#),
                Some("least common multiple is too large"),
            ),
        ] {
            let found = source.check().err();
            match expected {
                None => assert_eq!(found, None),
                Some(expected) => {
                    assert!(found.as_ref().is_some_and(|found| found.contains(expected)), "{expected}: {found:?}")
                }
            }
        }
    }
}
