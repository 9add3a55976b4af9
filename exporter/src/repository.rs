//! [`Repository`]: the name of a model repository on the Hugging Face hub. The module `hub` downloads from it.

use std::fmt;
use std::path::Path;

use crate::error::ParseError;
use crate::files;

/// A model repository on the hub, at a revision.
///
/// ```
/// use t5gemma_exporter::Repository;
///
/// let repository = Repository::parse("hf://google/t5gemma-2b-2b-ul2@main")?.expect("it begins with hf://");
/// assert_eq!(repository.id(), "google/t5gemma-2b-2b-ul2");
/// assert_eq!(repository.revision(), Some("main"));
/// assert!(Repository::parse("models/google/t5gemma-2b-2b-ul2")?.is_none());
/// # Ok::<(), t5gemma_exporter::ParseError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    id: String,
    revision: Option<String>,
}

/// The scheme of a repository's name.
const SCHEME: &str = "hf://";
/// What a name with the scheme looks like, for messages.
const FORM: &str = "hf://ORG/NAME or hf://ORG/NAME@REVISION";
/// The longest name of a user, organization or model.
const MAX_NAME: usize = 96;

impl Repository {
    /// Reads `hf://ORG/NAME`, `ORG/NAME`, or one of them with `@REVISION`. `None` for any other text, such as a path of a
    /// folder that is neither.
    ///
    /// # Errors
    /// A text that begins with `hf://` and is not the name of a model repository.
    pub fn parse(text: &str) -> Result<Option<Repository>, ParseError> {
        let (name, is_uri) = match text.strip_prefix(SCHEME) {
            Some(rest) => (rest.strip_prefix("models/").unwrap_or(rest), true),
            None => (text, false),
        };
        let (id, revision) = match name.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (name, None),
        };
        let is_id = id.split('/').count() == 2 && id.split('/').all(is_name) && !id.contains("--");
        if is_id && revision.is_none_or(is_revision) {
            return Ok(Some(Repository { id: id.to_string(), revision: revision.map(str::to_string) }));
        }
        if is_uri { Err(ParseError::expected(FORM, text)) } else { Ok(None) }
    }

    /// As [`parse`](Repository::parse), but `None` if the text names something on disk, or something that is missing
    /// from a folder on disk.
    ///
    /// # Errors
    /// The same.
    pub fn unless_local(text: &str) -> Result<Option<Repository>, ParseError> {
        let is_local = !text.starts_with(SCHEME) && {
            let first = text.split('/').next().filter(|first| !first.is_empty());
            files::entry_exists(Path::new(text)) || first.is_some_and(|first| Path::new(first).exists())
        };
        if is_local { Ok(None) } else { Repository::parse(text) }
    }

    /// The organization or user, and the name: `google/t5gemma-2b-2b-ul2`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit; `None` for the default branch.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// The repository whose snapshot in a cache this folder is.
    pub(crate) fn of_snapshot(folder: &Path) -> Option<Repository> {
        let folder = std::path::absolute(folder).ok()?;
        let (commit, snapshots) = (folder.file_name()?.to_str()?, folder.parent()?);
        let name = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
        let is_snapshot = snapshots.file_name()? == "snapshots" && is_commit(commit);
        let repository = Repository::parse(&name.replace("--", "/")).ok().flatten().filter(|_| is_snapshot)?;
        Some(Repository { revision: Some(commit.to_string()), ..repository })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.id),
            None => f.write_str(&self.id),
        }
    }
}

/// Whether a text is the hash of a commit.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a text can be the name of a user, organization or model.
fn is_name(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_inner = |end: Option<char>| !end.is_some_and(|end| matches!(end, '-' | '.'));
    (1..=MAX_NAME).contains(&text.len())
        && text.bytes().all(is_allowed)
        && is_inner(text.chars().next())
        && is_inner(text.chars().last())
        && !text.contains("..")
}

/// Whether a text can be a branch, tag or commit. It becomes a path in the cache.
fn is_revision(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+' | b'/');
    text.len() <= 255
        && text.bytes().all(is_allowed)
        && text.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains(".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories_are_told_from_paths() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = format!("/c/hub/models--google--t5gemma-s-s-ul2/snapshots/{commit}");
        for (text, id, revision) in [
            ("google/t5gemma-2b-2b-ul2", "google/t5gemma-2b-2b-ul2", None),
            ("google/t5gemma-2b-2b-ul2@v1.0", "google/t5gemma-2b-2b-ul2", Some("v1.0")),
            ("hf://a/b", "a/b", None),
            ("hf://models/a/b@refs/pr/1", "a/b", Some("refs/pr/1")),
            ("a_b.c/D-e.f@0123abc", "a_b.c/D-e.f", Some("0123abc")),
        ] {
            let parsed = Repository::parse(text).expect(text).expect(text);
            assert_eq!((parsed.id(), parsed.revision()), (id, revision), "{text}");
            assert_eq!(Repository::parse(&parsed.to_string()).expect("parsed").as_ref(), Some(&parsed), "{text}");
        }
        for text in ["", "a", "a/b/c", "./a", "../a", "/a/b", "a/", "/a", "~/a", "a/b@", "a/b@../c", "a/b c", "a--b/c"]
        {
            assert_eq!(Repository::parse(text).expect(text), None, "{text}");
            let found = Repository::parse(&format!("hf://{text}")).expect_err(text).to_string();
            assert!(found.contains("expected hf://ORG/NAME"), "{text}: {found}");
        }
        let found = Repository::of_snapshot(Path::new(&snapshot)).expect("a snapshot");
        assert_eq!(found.to_string(), format!("google/t5gemma-s-s-ul2@{commit}"));
        for folder in ["/c/hub/models--a--b/snapshots/main", "/c/models--a--b", &snapshot.replace("models--", "")] {
            assert_eq!(Repository::of_snapshot(Path::new(folder)), None, "{folder}");
        }
    }
}
