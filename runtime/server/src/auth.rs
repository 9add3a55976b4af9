//! `Keys`: the bearer keys that callers need, read from a file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, header};
use subtle::{ConditionallySelectable, ConstantTimeEq};

/// The keys of a file: one a line; empty lines and lines that begin with `#` are skipped. Copies share the keys.
#[derive(Clone)]
pub struct Keys {
    path: PathBuf,
    keys: Arc<RwLock<Vec<Vec<u8>>>>,
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
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Vec<Vec<u8>> = lines.map(|line| line.as_bytes().to_vec()).collect();
        if keys.is_empty() {
            return Err(format!("{path}: expected a key on a line, found none"));
        }
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    /// The number of the key in the `Authorization` header, from 0. The time does not depend on where a wrong key differs,
    /// nor on which key is right.
    pub fn find(&self, headers: &HeaderMap) -> Option<usize> {
        let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).unwrap_or_default();
        let (scheme, key) = given.split_at_checked("Bearer ".len())?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return None;
        }
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let found = keys
            .iter()
            .zip(1u64..)
            .fold(0, |found, (known, number)| u64::conditional_select(&found, &number, known.as_slice().ct_eq(key)));
        usize::try_from(found).ok()?.checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_key_is_one_of_the_lines() {
        let path = std::env::temp_dir().join(format!("t5gemma-keys-{}", std::process::id()));
        std::fs::write(&path, "# of the team\nabc\n\n  def  \n").expect("a file can be written");
        let keys = Keys::read(&path).expect("there are keys");
        let cases = [
            ("Bearer abc", Some(0)),
            ("bearer def", Some(1)),
            ("Bearer ab", None),
            ("Bearer abcd", None),
            ("Bearer ", None),
            ("Bearer # of the team", None),
            ("Basic abc", None),
            ("abc", None),
        ];
        for (given, expected) in cases {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(given))]);
            assert_eq!(keys.find(&headers), expected, "{given}");
        }
        assert!(keys.find(&HeaderMap::new()).is_none());
        std::fs::write(&path, "# none\n").expect("a file can be written");
        assert!(keys.reload().expect_err("no key").contains("expected a key"));
        let headers = HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static("Bearer abc"))]);
        assert_eq!(keys.find(&headers), Some(0), "the old keys stay");
        std::fs::remove_file(&path).expect("it was there");
    }
}
