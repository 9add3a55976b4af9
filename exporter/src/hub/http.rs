//! The hub's HTTP interface, as far as downloads need it: the files of a revision, the ETag of a file, and its content
//! from any byte. The only module that opens a connection.
//!
//! # Design
//! The crate hf-hub has the layout of the cache, but not these requests: version 0.5 asks for compressed ranges, which
//! the hub refuses, and does not verify a partial file before it resumes; 1.0 restarts interrupted downloads and adds a
//! hundred crates.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Timeout};

use super::{HubError, HubSettings};
use crate::repository::Repository;

/// Redirects within the hub to follow, as of a repository that was renamed.
const MAX_REDIRECTS: usize = 5;
/// The longest list of files to read, in bytes.
const MAX_LISTING: u64 = 64 << 20;

/// Why a request failed.
pub enum Failure {
    /// Another attempt may succeed, not before `after` if the server says so.
    Passing { reason: String, after: Option<Duration> },
    /// It would fail again.
    Final(HubError),
}

/// The files of a revision.
#[derive(Deserialize)]
pub struct Listing {
    /// The commit.
    pub sha: String,
    #[serde(default)]
    pub siblings: Vec<Sibling>,
}

/// A file of a repository.
#[derive(Deserialize)]
pub struct Sibling {
    /// Its path.
    pub rfilename: String,
    /// Its size in bytes.
    pub size: Option<u64>,
}

/// What the server says of a file.
pub struct Remote {
    pub etag: String,
    pub size: u64,
}

/// A client for one repository.
pub struct Client<'h> {
    repository: &'h Repository,
    settings: &'h HubSettings,
    agent: Agent,
}

impl<'h> Client<'h> {
    pub fn new(repository: &'h Repository, settings: &'h HubSettings) -> Result<Client<'h>, HubError> {
        let roots = match &settings.certificates {
            None => RootCerts::WebPki,
            Some(path) => {
                let pem = std::fs::read(path).map_err(HubError::io(path, "cannot be read"))?;
                let certificates = parse_pem(&pem).filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                });
                let certificates: Vec<Certificate<'static>> = certificates.collect();
                if certificates.is_empty() {
                    let found = format!("none in {}", path.display());
                    return Err(HubError::Variable { name: "SSL_CERT_FILE", expected: "PEM certificates", found });
                }
                RootCerts::new_with_certs(&certificates)
            }
        };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A compressed answer has no ranges, and another length.
            .accept_encoding("identity")
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(settings.timeout))
            .timeout_connect(Some(settings.timeout))
            .timeout_recv_response(Some(settings.timeout))
            .timeout_per_read(Some(settings.timeout))
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .build();
        Ok(Client { repository, settings, agent: agent.into() })
    }

    /// The files of the revision.
    pub fn listing(&self) -> Result<Listing, Failure> {
        let (id, revision) = (self.repository.id(), quoted(self.repository.revision().unwrap_or("main")));
        let url = format!("{}/api/models/{id}/revision/{revision}?blobs=true", self.settings.endpoint);
        let mut response = self.get(Method::Get, &url, None)?;
        self.check(&url, &mut response)?;
        let listing = response.body_mut().with_config().limit(MAX_LISTING).read_to_vec();
        let listing = listing.map_err(|error| self.transport(error))?;
        let invalid = |error: serde_json::Error| HubError::answer(&url, "the hub's list of files", error.to_string());
        serde_json::from_slice(&listing).map_err(|error| Failure::Final(invalid(error)))
    }

    /// The ETag and size of a file.
    pub fn remote(&self, commit: &str, file: &str) -> Result<Remote, Failure> {
        let url = self.url(commit, file);
        let mut response = self.get(Method::Head, &url, None)?;
        // A redirect to a storage server says nothing of the file, but its answer here does.
        if !response.status().is_redirection() {
            self.check(&url, &mut response)?;
        }
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let etag = header("x-linked-etag")
            .or_else(|| header("etag"))
            .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_string());
        let size = header("x-linked-size").or_else(|| header("content-length")).and_then(|size| size.parse().ok());
        // It becomes the name of a file in the cache.
        let is_name =
            |etag: &String| !etag.is_empty() && etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        match (etag.filter(is_name), size) {
            (Some(etag), Some(size)) => Ok(Remote { etag, size }),
            _ => Err(Failure::Final(HubError::answer(url, "the headers ETag and Content-Length", "others"))),
        }
    }

    /// The content of a file from a byte on, or from the first byte on if the server cannot send a part: the first byte,
    /// and a reader.
    pub fn content(&self, commit: &str, file: &str, from: u64) -> Result<(u64, impl Read + use<>), Failure> {
        let url = self.url(commit, file);
        let mut response = self.get(Method::Download, &url, Some(from).filter(|from| *from > 0))?;
        self.check(&url, &mut response)?;
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
                let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                let invalid = || HubError::answer(&url, format!("bytes from {from} on"), range.unwrap_or("no range"));
                start.filter(|start| *start == from).ok_or_else(|| Failure::Final(invalid()))?
            }
            _ => 0,
        };
        Ok((start, response.into_body().into_reader()))
    }

    /// The error for a server that does not do its part.
    pub fn unreachable(&self, failure: String) -> HubError {
        HubError::Unreachable { endpoint: self.settings.endpoint.clone(), failure }
    }

    fn url(&self, commit: &str, file: &str) -> String {
        let file: Vec<String> = file.split('/').map(quoted).collect();
        format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, self.repository.id(), file.join("/"))
    }

    /// Sends a request, and follows redirects: within the hub with the token, and for a download to anywhere without it.
    fn get(&self, method: Method, url: &str, from: Option<u64>) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let is_hub = origin(&url) == origin(&self.settings.endpoint);
            let mut request = match method {
                Method::Head => self.agent.head(&url),
                Method::Get | Method::Download => self.agent.get(&url),
            };
            if let Some(token) = self.settings.token.as_ref().filter(|_| is_hub) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.transport(error))?;
            let location = response.headers().get("location").and_then(|location| location.to_str().ok());
            let Some(location) = location.filter(|_| response.status().is_redirection()) else { return Ok(response) };
            let next = joined(&url, location);
            if method == Method::Head && origin(&next) != origin(&url) {
                return Ok(response);
            }
            url = next;
        }
        let expected = format!("at most {MAX_REDIRECTS} redirects");
        Err(Failure::Final(HubError::answer(url, expected, "more")))
    }

    /// Takes an answer that is not the file for an error.
    fn check(&self, url: &str, response: &mut Response<Body>) -> Result<(), Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let header =
            |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (code, message) = (header("x-error-code").to_string(), header("x-error-message").to_string());
        let after = header("retry-after").parse().ok().map(Duration::from_secs);
        let (repository, endpoint) = (self.repository.clone(), self.settings.endpoint.clone());
        let has_token = self.settings.token.is_some();
        let error = match (code.as_str(), status.as_u16()) {
            ("RevisionNotFound", _) => HubError::NoRevision { repository, endpoint },
            ("GatedRepo", _) | ("", 403) => HubError::Gated { repository, endpoint, has_token },
            ("RepoNotFound", _) => HubError::NoRepository { repository, endpoint, has_token },
            // The hub says so of repositories that do not exist or that others may not see.
            (_, 401) if has_token && message.to_lowercase().contains("invalid") => {
                HubError::Token { endpoint, message }
            }
            (_, 401) => HubError::NoRepository { repository, endpoint, has_token },
            (_, 408 | 429 | 500..=599) => {
                return Err(Failure::Passing { reason: format!("{url}: {status}"), after });
            }
            _ => {
                let message = if message.is_empty() { String::new() } else { format!(" ({message})") };
                HubError::answer(url, "a file or listing", format!("{status}{message}"))
            }
        };
        Err(Failure::Final(error))
    }

    /// A request that was not answered.
    fn transport(&self, error: ureq::Error) -> Failure {
        use ureq::Error;
        match error {
            // A connection that breaks; others were never made.
            Error::Io(error) if is_passing(error.kind()) => Failure::Passing { reason: error.to_string(), after: None },
            Error::Protocol(_) | Error::Timeout(Timeout::RecvResponse | Timeout::PerRead) => {
                Failure::Passing { reason: error.to_string(), after: None }
            }
            Error::Io(error) => Failure::Final(self.unreachable(error.to_string())),
            error => Failure::Final(self.unreachable(error.to_string())),
        }
    }
}

fn is_passing(kind: ErrorKind) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, Interrupted, TimedOut, UnexpectedEof, WouldBlock};
    matches!(
        kind,
        BrokenPipe | ConnectionAborted | ConnectionReset | Interrupted | TimedOut | UnexpectedEof | WouldBlock
    )
}

/// A request that ends with an answer of the hub, or for a download, of a storage server.
#[derive(Clone, Copy, PartialEq)]
enum Method {
    Head,
    Get,
    Download,
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    &url[..url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at)]
}

/// The target of a redirect.
fn joined(url: &str, location: &str) -> String {
    if location.starts_with("//") {
        let scheme = url.split("//").next().unwrap_or_default();
        return format!("{scheme}{location}");
    }
    match location.strip_prefix('/') {
        Some(path) => format!("{}/{path}", origin(url)),
        None => location.to_string(),
    }
}

/// A part of a URL's path with everything encoded that could have a meaning there.
fn quoted(part: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    part.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_from_their_url() {
        for (url, location, target) in [
            ("https://h/a/b?c", "/d/e?f", "https://h/d/e?f"),
            ("https://h:1/a", "//other/b", "https://other/b"),
            ("http://h", "https://cdn.h/x", "https://cdn.h/x"),
        ] {
            assert_eq!(joined(url, location), target);
        }
        for (url, expected) in
            [("https://h/a", "https://h"), ("https://h:1?a", "https://h:1"), ("http://h", "http://h")]
        {
            assert_eq!(origin(url), expected);
        }
        assert_eq!(quoted("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(quoted("a b#?ä~"), "a%20b%23%3F%C3%A4~");
    }
}
