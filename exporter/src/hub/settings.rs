//! [`HubSettings`]: server, token, cache and offline mode, from the environment variables of huggingface_hub with its
//! meaning of their values.

use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::HubError;

/// Values of a variable that mean yes; any other means no.
const TRUE: [&str; 4] = ["1", "ON", "YES", "TRUE"];

/// The timeout unless HF_HUB_DOWNLOAD_TIMEOUT is set.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How the hub and its cache are used.
#[derive(Clone)]
#[non_exhaustive]
pub struct HubSettings {
    /// The server.
    pub endpoint: String,
    /// The token that is sent to it.
    pub token: Option<String>,
    /// The folder of the cache.
    pub cache: PathBuf,
    /// Whether only the cache is used.
    pub offline: bool,
    /// How long the server may take to be connected, to answer, and from one piece of data to the next.
    pub timeout: Duration,
    /// A PEM file with the certificates to trust, instead of Mozilla's.
    pub certificates: Option<PathBuf>,
}

/// Without the token.
impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("HubSettings");
        shown.field("endpoint", &self.endpoint).field("cache", &self.cache).field("offline", &self.offline);
        shown.finish_non_exhaustive()
    }
}

impl HubSettings {
    /// The settings of the environment: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`, `HF_HUB_CACHE`,
    /// `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT`, `SSL_CERT_FILE`, and the others that huggingface_hub reads for these.
    ///
    /// # Errors
    /// A variable with an invalid value.
    pub fn from_env() -> Result<HubSettings, HubError> {
        HubSettings::of(&|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<HubSettings, HubError> {
        let is_true = |name| variable(name).is_some_and(|value| TRUE.contains(&value.to_uppercase().as_str()));
        let path = |value: String| PathBuf::from(expand(&value, variable));
        let home = match variable("HF_HOME") {
            Some(home) => path(home),
            None => path(variable("XDG_CACHE_HOME").unwrap_or_else(|| "~/.cache".into())).join("huggingface"),
        };
        let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.map_or_else(|| home.join("hub"), path);
        let cache = std::path::absolute(&cache).map_err(HubError::io(&cache, "cannot be made absolute"))?;

        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(HubError::Variable { name: "HF_ENDPOINT", expected: "a URL", found: endpoint });
        }
        let offline = variable("HF_HUB_OFFLINE").map_or("TRANSFORMERS_OFFLINE", |_| "HF_HUB_OFFLINE");
        Ok(HubSettings {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token: if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token(variable, home)? },
            cache,
            offline: is_true(offline),
            timeout: timeout(variable("HF_HUB_DOWNLOAD_TIMEOUT"))?,
            certificates: variable("SSL_CERT_FILE").map(PathBuf::from),
        })
    }
}

/// A number of seconds.
fn timeout(value: Option<String>) -> Result<Duration, HubError> {
    let Some(value) = value else { return Ok(TIMEOUT) };
    let seconds = value.trim().parse().ok().filter(|seconds: &u32| *seconds > 0);
    let seconds =
        seconds.ok_or(HubError::Variable { name: "HF_HUB_DOWNLOAD_TIMEOUT", expected: "seconds", found: value })?;
    Ok(Duration::from_secs(seconds.into()))
}

/// The token of the environment, or of the file that `hf auth login` writes.
fn token(variable: &dyn Fn(&str) -> Option<String>, home: PathBuf) -> Result<Option<String>, HubError> {
    let clean = |text: String| Some(text.replace(['\r', '\n'], "").trim().to_string()).filter(|text| !text.is_empty());
    let of_variable =
        variable("HF_TOKEN").and_then(clean).or_else(|| variable("HUGGING_FACE_HUB_TOKEN").and_then(clean));
    let token = of_variable.or_else(|| {
        let file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), |path| expand(&path, variable).into());
        fs::read_to_string(file).ok().and_then(clean)
    });
    match token {
        // Becomes a header. The message does not show it.
        Some(token) if !token.bytes().all(|byte| byte.is_ascii_graphic()) => {
            let (expected, found) = ("a token", "a text with other characters than a token has".to_string());
            Err(HubError::Variable { name: "HF_TOKEN", expected, found })
        }
        token => Ok(token),
    }
}

/// Expands a leading `~`, and `$NAME` and `${NAME}` of variables that are set.
fn expand(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let home = variable("HOME").or_else(|| variable("USERPROFILE")).unwrap_or_else(|| ".".into());
    let mut rest = path;
    let mut expanded = String::new();
    if let Some(below) = path.strip_prefix('~').filter(|below| below.is_empty() || below.starts_with('/')) {
        expanded += &home;
        rest = below;
    }
    while let Some(dollar) = rest.find('$') {
        expanded += &rest[..dollar];
        let after = &rest[dollar + 1..];
        let in_braces = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let (name, end) = match in_braces {
            Some((name, end)) => (name, end),
            None => {
                let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
                after.split_at(after.find(|c| !is_of_name(c)).unwrap_or(after.len()))
            }
        };
        match variable(name) {
            Some(value) => expanded += &value,
            None => expanded += &rest[dollar..rest.len() - end.len()],
        }
        rest = end;
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<HubSettings, HubError> {
        let variables = [&[("HOME", "/home/u")], variables].concat();
        HubSettings::of(&|name| variables.iter().rfind(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        for (variables, cache) in [
            (&[][..], "/home/u/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/x")], "/home/u/hf/hub"),
            (&[("HF_HOME", "$DATA/${SUB}/$NONE"), ("DATA", "/d"), ("SUB", "s")], "/d/s/$NONE/hub"),
            (&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HF_HUB_CACHE", "~"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/home/u"),
            (&[("HF_HUB_CACHE", "/c/~x${")], "/c/~x${"),
        ] {
            assert_eq!(of(variables).expect("valid").cache, PathBuf::from(cache), "{variables:?}");
        }
    }

    #[test]
    fn variables_mean_what_they_mean_to_huggingface_hub() {
        for (variables, offline) in [
            (&[][..], false),
            (&[("HF_HUB_OFFLINE", "1")], true),
            (&[("HF_HUB_OFFLINE", "Yes")], true),
            (&[("HF_HUB_OFFLINE", "on")], true),
            (&[("HF_HUB_OFFLINE", "0")], false),
            (&[("HF_HUB_OFFLINE", "y")], false),
            (&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")], false),
            (&[("TRANSFORMERS_OFFLINE", "true")], true),
        ] {
            assert_eq!(of(variables).expect("valid").offline, offline, "{variables:?}");
        }
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let (home, file) = (folder.path().display().to_string(), folder.path().join("other").display().to_string());
        fs::write(folder.path().join("token"), "hf_home\n").expect("writable");
        fs::write(&file, " hf_file \r\n").expect("writable");
        for (variables, token) in [
            (&[][..], Some("hf_home")),
            (&[("HF_TOKEN", "hf_a\n"), ("HUGGING_FACE_HUB_TOKEN", "hf_b")], Some("hf_a")),
            (&[("HF_TOKEN", " \n"), ("HUGGING_FACE_HUB_TOKEN", "hf_b")], Some("hf_b")),
            (&[("HF_TOKEN_PATH", &file)], Some("hf_file")),
            (&[("HF_TOKEN_PATH", "/none")], None),
            (&[("HF_TOKEN", "hf_a"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
        ] {
            let settings = of(&[&[("HF_HOME", &*home)], variables].concat()).expect("valid");
            assert_eq!(settings.token.as_deref(), token, "{variables:?}");
            assert!(!format!("{settings:?}").contains("hf_a"), "a token is not shown");
        }
        for (variables, says) in [
            (&[("HF_ENDPOINT", "hub.example")], "HF_ENDPOINT: expected a URL, found hub.example"),
            (&[("HF_HUB_DOWNLOAD_TIMEOUT", "1m")], "HF_HUB_DOWNLOAD_TIMEOUT: expected seconds, found 1m"),
            (&[("HF_TOKEN", "secret token")], "HF_TOKEN: expected a token, found a text with other characters"),
        ] {
            let message = of(variables).expect_err(says).to_string();
            assert!(message.starts_with(says) && !message.contains("secret"), "{message}");
        }
        assert_eq!(of(&[("HF_ENDPOINT", "http://h:1/")]).expect("valid").endpoint, "http://h:1");
    }
}
