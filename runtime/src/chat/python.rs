//! The Python that templates use: methods of strings, lists and dictionaries, and formatting of values, including
//! `%`. Here is what `minijinja` and `minijinja-contrib` lack, and what they do without counting its cost.
//!
//! # Design
//! Every allocation is paid for in fuel first, one unit for 64 bytes as `minijinja` counts its own, so that a template
//! cannot allocate more than its fuel is worth.

use std::fmt::Write;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State};
use minijinja_contrib::pycompat;

/// Bytes that a unit of fuel pays for.
pub(super) const BYTES: u64 = 64;
/// The cost of a byte of a value that is written as text, as `minijinja` counts it.
const WRITTEN: usize = 16;
/// Maximum nesting of values that are written; Python's own limit is near.
pub(super) const DEPTH: usize = 500;

pub(super) fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / BYTES + 1)
}

/// The right operand of `+`: lazy sums of lists are collected and paid for.
pub(super) fn added(state: &State, value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        pay(state, size_of::<Value>())?;
        items.push(item);
    }
    Ok(Value::from(items))
}

pub(super) fn refused(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Python's methods of built-in values.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => of_text(state, value.as_str().unwrap_or_default(), value, name, args),
        ValueKind::Seq => match name {
            "index" => {
                let (wanted,): (Value,) = from_args(args)?;
                pay(state, value.len().unwrap_or(0))?;
                let at = value.try_iter()?.position(|item| item == wanted);
                at.map(Value::from).ok_or_else(|| refused("the value that index() looks for is not in the list"))
            }
            "copy" => Ok(value.clone()),
            _ => pycompat::unknown_method_callback(state, value, name, args),
        },
        ValueKind::Map if name == "copy" => Ok(value.clone()),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn of_text(state: &mut State, text: &str, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    pay(state, text.len())?;
    let padded = |args: &[Value]| -> Result<(usize, String), Error> {
        let (width, fill): (i64, Option<String>) = from_args(args)?;
        let fill = fill.unwrap_or_else(|| " ".into());
        if fill.chars().count() != 1 {
            return Err(refused("the fill character must be exactly one character long"));
        }
        let room = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
        pay(state, room.saturating_mul(fill.len()))?;
        Ok((room, fill))
    };
    let parted = |at: Option<usize>, mark: &str, rest_first: bool| {
        let parts = match at {
            Some(at) => [&text[..at], mark, &text[at + mark.len()..]],
            None if rest_first => ["", "", text],
            None => [text, "", ""],
        };
        Value::from(Tuple::from(parts.map(Value::from)))
    };
    Ok(match name {
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
            let found = text.matches(old).take(count).count();
            pay(state, found.saturating_mul(new.len()))?;
            text.replacen(old, new, count).into()
        }
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            let mut joined = String::new();
            for (at, value) in values.try_iter()?.enumerate() {
                let Some(part) = value.as_str() else {
                    return Err(refused(format!("join() takes texts, found {} at {at}", value.kind())));
                };
                pay(state, text.len() + part.len())?;
                joined.push_str(if at > 0 { text } else { "" });
                joined.push_str(part);
            }
            joined.into()
        }
        "format" => {
            pay_widths(state, text, args, '{')?;
            format(FormatStyle::StrFormat, text, &plain(state, args)?)?.into()
        }
        // A value of the result is larger than the character that it may be of.
        "split" => {
            pay(state, text.len().saturating_mul(24))?;
            return pycompat::unknown_method_callback(state, value, name, args);
        }
        "rsplit" => {
            let (mark, most): (Option<&str>, Option<i64>) = from_args(args)?;
            pay(state, text.len().saturating_mul(24))?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            let mut parts: Vec<Value> = Vec::new();
            let mut rest = if mark.is_none() { text.trim_end() } else { text };
            while parts.len() < most {
                let cut = match mark {
                    Some("") => return Err(refused("empty separator")),
                    Some(mark) => rest.rsplit_once(mark),
                    None => rest.rsplit_once(char::is_whitespace),
                };
                let Some((before, part)) = cut else { break };
                parts.push(part.into());
                rest = if mark.is_none() { before.trim_end() } else { before };
            }
            if mark.is_none() {
                rest = rest.trim_start_matches(|c: char| parts.len() < most && c.is_whitespace());
            }
            if mark.is_some() || !rest.is_empty() {
                parts.push(rest.into());
            }
            parts.reverse();
            parts.into()
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            pay(state, text.len().saturating_mul(24))?;
            lines(text, keep.unwrap_or(false)).into()
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let room = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
            pay(state, room)?;
            let digits = text.trim_start_matches(['+', '-']);
            let sign = &text[..(text.len() - digits.len()).min(1)];
            format!("{sign}{}{}", "0".repeat(room), &text[sign.len()..]).into()
        }
        "ljust" => {
            let (room, fill) = padded(args)?;
            (text.to_string() + &fill.repeat(room)).into()
        }
        "rjust" => {
            let (room, fill) = padded(args)?;
            (fill.repeat(room) + text).into()
        }
        "center" => {
            let (room, fill) = padded(args)?;
            // The odd place goes where CPython puts it.
            let width = room + text.chars().count();
            let left = room / 2 + (room & width & 1);
            (fill.repeat(left) + text + &fill.repeat(room - left)).into()
        }
        "partition" | "rpartition" => {
            let (mark,): (&str,) = from_args(args)?;
            if mark.is_empty() {
                return Err(refused("empty separator"));
            }
            let is_first = name == "partition";
            parted(if is_first { text.find(mark) } else { text.rfind(mark) }, mark, !is_first)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = if name == "index" { text.find(wanted) } else { text.rfind(wanted) };
            let at = at.ok_or_else(|| refused("substring not found"))?;
            text[..at].chars().count().into()
        }
        "swapcase" => {
            let swapped = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            };
            text.chars().map(swapped).collect::<String>().into()
        }
        "casefold" => text.to_lowercase().replace('ß', "ss").into(),
        "isdecimal" => (!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())).into(),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// `str.splitlines`.
fn lines(text: &str, keep: bool) -> Vec<Value> {
    let is_end =
        |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let (mut lines, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let mark = match &rest[end..] {
            mark if mark.starts_with("\r\n") => 2,
            mark => mark.chars().next().map_or(0, char::len_utf8),
        };
        lines.push(Value::from(&rest[..if keep { end + mark } else { end }]));
        rest = &rest[end + mark..];
    }
    lines
}

/// Pays for the widths of a format: those written in it, and integer arguments that may be widths.
fn pay_widths(state: &State, text: &str, args: &[Value], mark: char) -> Result<(), Error> {
    let mut widths = 0_usize;
    let mut is_given = false;
    for spec in text.split(mark).skip(1) {
        let end = match mark {
            '{' => spec.find('}').unwrap_or(spec.len()),
            _ => spec.find(|c: char| c.is_alphabetic()).unwrap_or(spec.len()),
        };
        let spec = &spec[..end];
        is_given |= spec.contains(['*']) || (mark == '{' && spec.is_empty());
        for number in spec.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()) {
            widths = widths.saturating_add(number.parse().unwrap_or(usize::MAX));
        }
    }
    // An argument is a width only in a nested field or for a star.
    if is_given && (mark == '%' || text.matches('{').count() > text.matches("{{").count()) {
        let number =
            |value: &Value| value.as_i64().filter(|_| value.is_integer()).map_or(0, |number| number.unsigned_abs());
        let is_nested = mark == '%' || nests(text);
        let more = args.iter().filter(|_| is_nested).map(number).fold(0_u64, u64::saturating_add);
        widths = widths.saturating_add(usize::try_from(more).unwrap_or(usize::MAX));
    }
    pay(state, widths)
}

/// Whether a format has nested fields.
fn nests(text: &str) -> bool {
    let mut depth = 0_usize;
    text.replace("{{", "").replace("}}", "").chars().any(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > 1
    })
}

/// `text % values`.
pub(super) fn percent(state: &State, text: &str, values: Value) -> Result<String, Error> {
    let args: Vec<Value> = if values.is_tuple() { values.try_iter()?.collect() } else { vec![values] };
    pay_widths(state, text, &args, '%')?;
    format(FormatStyle::Printf, text, &plain(state, &args)?)
}

/// `str(value)`.
fn text_of(state: &State, value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            represent(state, value, &mut text, 0)?;
        }
        _ => {
            pay(state, value.as_str().map_or(0, str::len))?;
            text = value.to_string();
        }
    }
    Ok(text)
}

/// The filters `string`, and `pprint` without its lines.
pub(super) fn string(state: &State, value: &Value) -> Result<String, Error> {
    text_of(state, value)
}

pub(super) fn pprint(state: &State, value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    represent(state, value, &mut text, 0)?;
    Ok(text)
}

/// The filter `join(d='', attribute=None)`.
pub(super) fn join(state: &State, values: &Value, mark: Option<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let mark = match mark {
        Some(mark) => Some(mark),
        None => kwargs.get("d")?,
    };
    let mark = mark.map_or(Ok(String::new()), |mark| text_of(state, &mark))?;
    let attribute: Option<String> = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    let mut joined = String::new();
    if values.is_undefined() {
        return Ok(joined);
    }
    for (at, value) in values.try_iter()?.enumerate() {
        pay(state, mark.len())?;
        joined.push_str(if at > 0 { &mark } else { "" });
        let value = match &attribute {
            Some(path) => path.split('.').try_fold(value, |value, name| value.get_attr(name))?,
            None => value,
        };
        joined.push_str(&text_of(state, &value)?);
    }
    Ok(joined)
}

/// Values for a format; lists are converted to text.
fn plain(state: &State, args: &[Value]) -> Result<Vec<Value>, Error> {
    let plain = |value: &Value| match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => Ok(Value::from(text_of(state, value)?)),
        _ => {
            pay(state, value.as_str().map_or(0, str::len))?;
            Ok(value.clone())
        }
    };
    args.iter().map(plain).collect()
}

/// The jinja filter `center`.
pub(super) fn center(state: &mut State, value: &Value, width: Option<i64>) -> Result<Value, Error> {
    let text = Value::from(value.to_string());
    method(state, &text, "center", &[width.unwrap_or(80).into()])
}

/// Writes a value into the output as Python does.
pub(super) fn written(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => text_of(state, value)?,
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(&text).map_err(Error::from)
}

/// `repr(value)`.
fn represent(state: &State, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    if depth > DEPTH {
        return Err(refused(format!("values nested deeper than {DEPTH}")));
    }
    pay(state, WRITTEN)?;
    match value.kind() {
        ValueKind::Number => out.push_str(&number(value, ["nan", "inf"])),
        ValueKind::Seq if value.is_tuple() => {
            out.push('(');
            each(state, value, out, depth)?;
            out.push_str(if value.len() == Some(1) { ",)" } else { ")" });
        }
        // Some lists are lazy.
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            each(state, value, out, depth)?;
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                represent(state, &key, out, depth + 1)?;
                out.push_str(": ");
                represent(state, &value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => {
            pay(state, value.as_str().map_or(0, str::len).saturating_mul(WRITTEN))?;
            write!(out, "{value:?}").map_err(Error::from)?;
        }
    }
    Ok(())
}

fn each(state: &State, values: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    for (at, value) in values.try_iter()?.enumerate() {
        out.push_str(if at > 0 { ", " } else { "" });
        represent(state, &value, out, depth + 1)?;
    }
    Ok(())
}

/// A number as Python writes it; NaN and infinity by the given names.
pub(super) fn number(value: &Value, [nan, infinity]: [&str; 2]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(number) = f64::try_from(value.clone()) else { return value.to_string() };
    if number.is_nan() {
        return nan.into();
    }
    if number.is_infinite() {
        return if number < 0.0 { format!("-{infinity}") } else { infinity.into() };
    }
    // Rust and Python write the same shortest digits, but use exponents from different magnitudes on.
    let (digits, exponent) = {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').expect("written so");
        (digits.to_string(), exponent.parse::<i32>().expect("written so"))
    };
    match exponent {
        -4..16 => {
            let text = number.to_string();
            if text.contains('.') { text } else { text + ".0" }
        }
        _ => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

/// transformers' `strftime_now(format)`: the local time.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    #[cfg(unix)]
    {
        // One more character distinguishes an empty result from one that does not fit.
        let format = std::ffi::CString::new(format!("x{format}"));
        let format = format.map_err(|_| refused("strftime_now: a zero byte in the format"))?;
        let mut out = vec![0_u8; 4096];
        // SAFETY: `tm` is plain numbers that `localtime_r` fills in, the format ends in a zero, and no more than the
        // buffer's length is written.
        let written = unsafe {
            let now = libc::time(std::ptr::null_mut());
            let mut time: libc::tm = std::mem::zeroed();
            libc::localtime_r(&now, &mut time);
            libc::strftime(out.as_mut_ptr().cast(), out.len(), format.as_ptr(), &time)
        };
        if written == 0 {
            return Err(refused("strftime_now: expected a format of at most 4095 bytes of text"));
        }
        out.truncate(written);
        out.remove(0);
        String::from_utf8(out).map_err(|_| refused("strftime_now: the time is not UTF-8"))
    }
    #[cfg(not(unix))]
    {
        let _ = format;
        Err(refused("strftime_now is not supported on this system"))
    }
}
