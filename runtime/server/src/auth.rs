//! `Keys`: the bearer keys that callers need, read from a file, and what each allows.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, header};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use t5gemma_runtime::Priority;

/// The keys of a file: one a line, before its limits: `KEY tenant=NAME max-requests=8 priority=low`. Empty lines and lines
/// that begin with `#` are skipped. Copies share the keys.
#[derive(Clone)]
pub struct Keys {
    path: PathBuf,
    keys: Arc<RwLock<Vec<Entry>>>,
}

/// A key, and whose it is.
type Entry = (Vec<u8>, Arc<Tenant>);

/// Whose key a request came with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// The tenant's name. Keys with the same tenant share its limits.
    pub name: String,
    /// How many of its requests may be accepted and unfinished.
    pub max_requests: usize,
    /// The highest priority of its requests.
    pub priority: Priority,
}

/// Shows no key.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Keys {
    /// Reads the keys.
    ///
    /// # Errors
    /// A file that cannot be read or has no key.
    pub fn read(path: &Path) -> Result<Keys, String> {
        let keys = Keys { path: path.to_path_buf(), keys: Arc::default() };
        keys.reload()?;
        Ok(keys)
    }

    /// Reads the file again. If that fails, the old keys stay.
    ///
    /// # Errors
    /// As [`Keys::read`].
    pub fn reload(&self) -> Result<(), String> {
        let path = self.path.display();
        let text = std::fs::read_to_string(&self.path).map_err(|error| format!("{path}: {error}"))?;
        let lines = text.lines().map(str::trim).zip(1..);
        let lines = lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
        let keys =
            lines.map(|(line, number)| entry(line, number).map_err(|problem| format!("{path}:{number}: {problem}")));
        let keys = keys.collect::<Result<Vec<_>, String>>()?;
        if keys.is_empty() {
            return Err(format!("{path}: expected a key on a line, found none"));
        }
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    /// The tenant of the key in the `Authorization` header. The time does not depend on where a wrong key differs, nor on
    /// which key is right.
    pub fn find(&self, headers: &HeaderMap) -> Option<Arc<Tenant>> {
        let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).unwrap_or_default();
        let (scheme, key) = given.split_at_checked("Bearer ".len())?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return None;
        }
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let found = keys.iter().zip(1u64..).fold(0, |found, ((known, _), number)| {
            u64::conditional_select(&found, &number, known.as_slice().ct_eq(key))
        });
        let at = usize::try_from(found).ok()?.checked_sub(1)?;
        keys.get(at).map(|(_, tenant)| tenant.clone())
    }
}

/// The key of a line, and what it allows.
fn entry(line: &str, number: usize) -> Result<Entry, String> {
    let mut words = line.split_whitespace();
    let key = words.next().unwrap_or_default().as_bytes().to_vec();
    let mut tenant = Tenant { name: format!("line {number}"), max_requests: usize::MAX, priority: Priority::High };
    for word in words {
        let refused = || format!("expected tenant=NAME, max-requests=N or priority=high|normal|low, found {word}");
        let (name, value) = word.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(refused)?;
        match name {
            "tenant" => tenant.name = value.to_string(),
            "max-requests" => {
                tenant.max_requests = value.parse().ok().filter(|&count| count > 0).ok_or_else(refused)?
            }
            "priority" => tenant.priority = Priority::from_name(value).ok_or_else(refused)?,
            _ => return Err(refused()),
        }
    }
    Ok((key, Arc::new(tenant)))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_key_is_one_of_the_lines() {
        let path = std::env::temp_dir().join(format!("t5gemma-keys-{}", std::process::id()));
        let text = "# of the team\nabc\n\n  def  \nghi tenant=b max-requests=2 priority=low\n";
        std::fs::write(&path, text).expect("a file can be written");
        let keys = Keys::read(&path).expect("there are keys");
        let of = |given: &'static str| {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(given))]);
            keys.find(&headers)
        };
        let cases = [
            ("Bearer abc", Some("line 2")),
            ("bearer def", Some("line 4")),
            ("Bearer ghi", Some("b")),
            ("Bearer ab", None),
            ("Bearer abcd", None),
            ("Bearer ", None),
            ("Bearer # of the team", None),
            ("Bearer ghi tenant=b", None),
            ("Basic abc", None),
            ("abc", None),
        ];
        for (given, expected) in cases {
            assert_eq!(of(given).as_ref().map(|tenant| tenant.name.as_str()), expected, "{given}");
        }
        let tenant = of("Bearer ghi").expect("it is one");
        assert_eq!((tenant.max_requests, tenant.priority), (2, Priority::Low));
        assert!(keys.find(&HeaderMap::new()).is_none());
        let refused = [
            ("# none\n", "expected a key on a line, found none"),
            (
                "a\nb max-requests=0\n",
                ":2: expected tenant=NAME, max-requests=N or priority=high|normal|low, found max-",
            ),
            ("a b\n", ":1: expected tenant=NAME"),
            ("a priority=urgent\n", "found priority=urgent"),
            ("a tenant=\n", "found tenant="),
        ];
        for (text, expected) in refused {
            std::fs::write(&path, text).expect("a file can be written");
            let problem = keys.reload().expect_err(text);
            assert!(problem.contains(expected), "{problem}");
            assert!(of("Bearer abc").is_some(), "the old keys stay");
        }
        std::fs::remove_file(&path).expect("it was there");
    }
}
