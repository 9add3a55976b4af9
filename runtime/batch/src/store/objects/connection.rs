//! The HTTP client of object_store: the one that the rest of the project has, ureq.
//!
//! # Design
//! An answer is read whole before it is handed on, so that one that breaks off is asked for again like any other that
//! fails. None is larger than the blocks that inputs are read in.

use std::error::Error as StdError;
use std::fmt;
use std::io::ErrorKind;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use ureq::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Timeout};

use super::bucket::STATUS;

/// The address where machines of AWS find their role.
const METADATA: &str = "169.254.169.254";

/// What it means that there is no role.
const NO_CREDENTIALS: &str = "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true \
                              for public objects";

/// How long a connection, an answer, or a piece of either may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The same where there may be nobody.
const METADATA_PATIENCE: Duration = Duration::from_secs(1);

/// The most bytes of an answer.
const MAX_ANSWER: u64 = 64 << 20;

/// Makes clients.
#[derive(Debug)]
pub struct Connector {
    /// Certificates to trust instead of those that the program has.
    certificates: Option<Vec<Certificate<'static>>>,
}

impl Connector {
    /// With the certificates of `AWS_CA_BUNDLE` or `SSL_CERT_FILE`, if one is set.
    pub fn new() -> Result<Connector, String> {
        let names = ["AWS_CA_BUNDLE", "SSL_CERT_FILE"];
        let set =
            names.into_iter().find_map(|name| Some((name, std::env::var_os(name).filter(|path| !path.is_empty())?)));
        let Some((name, path)) = set else { return Ok(Connector { certificates: None }) };
        let path = std::path::PathBuf::from(path);
        let pem = std::fs::read(&path).map_err(|error| format!("{name}: {}: {error}", path.display()))?;
        let certificates = parse_pem(&pem).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let certificates: Vec<_> = certificates.collect();
        if certificates.is_empty() {
            return Err(format!("{name}: expected PEM certificates, found none in {}", path.display()));
        }
        Ok(Connector { certificates: Some(certificates) })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let allows_http = options.get_config_value(&ClientConfigKey::AllowHttp).is_some_and(|value| value == "true");
        let roots = match &self.certificates {
            None => RootCerts::WebPki,
            Some(certificates) => RootCerts::new_with_certs(certificates),
        };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .accept_encoding("identity")
            .user_agent(concat!("t5gemma/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(PATIENCE))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .timeout_per_write(Some(PATIENCE))
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .build();
        Ok(HttpClient::new(Connection { agent: agent.into(), allows_http }))
    }
}

#[derive(Clone, Debug)]
struct Connection {
    agent: Agent,
    allows_http: bool,
}

#[async_trait]
impl HttpService for Connection {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let connection = self.clone();
        let request = Request::from_parts(parts, body);
        let answered = tokio::task::spawn_blocking(move || connection.send(request)).await;
        answered.unwrap_or_else(|error| Err(HttpError::new(HttpErrorKind::Unknown, error)))
    }
}

impl Connection {
    fn send(&self, request: Request<Bytes>) -> Result<HttpResponse, HttpError> {
        let (mut parts, body) = request.into_parts();
        let host = parts.uri.host().unwrap_or_default().to_string();
        let is_metadata = host == METADATA;
        if parts.uri.scheme_str() == Some("http") && !self.allows_http && !is_metadata {
            let problem = format!("http://{host} is not encrypted; set AWS_ALLOW_HTTP=true if that is wanted");
            return Err(HttpError::new(HttpErrorKind::Unknown, Failure(problem)));
        }
        // What completes a multipart upload. object_store's own call replaces an object that is there.
        let completes = parts.uri.query().is_some_and(|query| query.starts_with("uploadId="));
        if parts.method == Method::POST && completes {
            parts.headers.insert(header::IF_NONE_MATCH, HeaderValue::from_static("*"));
        }
        let failed = |error: ureq::Error| failure(error, &host);
        let has_body = !body.is_empty() || [Method::PUT, Method::POST].contains(&parts.method);
        let sent = match has_body {
            true => self.agent.run(self.with_patience(Request::from_parts(parts, &body[..]), is_metadata)),
            false => self.agent.run(self.with_patience(Request::from_parts(parts, ()), is_metadata)),
        };
        let (parts, mut body) = sent.map_err(failed)?.into_parts();
        let bytes = body.with_config().limit(MAX_ANSWER).read_to_vec().map_err(failed)?;
        if is_metadata && !parts.status.is_success() {
            return Err(HttpError::new(HttpErrorKind::Unknown, Failure(NO_CREDENTIALS.into())));
        }
        // It would be asked again like any error of a server.
        if parts.status == StatusCode::NOT_IMPLEMENTED {
            let problem = format!("{STATUS}{}: {}", parts.status, String::from_utf8_lossy(&bytes));
            return Err(HttpError::new(HttpErrorKind::Unknown, Failure(problem)));
        }
        Ok(Response::from_parts(parts, HttpResponseBody::from(bytes)))
    }

    fn with_patience<B: ureq::AsSendBody>(&self, request: Request<B>, is_metadata: bool) -> Request<B> {
        match is_metadata {
            true => self.agent.configure_request(request).timeout_global(Some(METADATA_PATIENCE)).build(),
            false => request,
        }
    }
}

/// Why there is no answer, and whether to ask again. Every request is safe to repeat: a put is conditional or overwrites,
/// and a part of an upload is identified by its number.
fn failure(error: ureq::Error, host: &str) -> HttpError {
    use ureq::Error;
    if host == METADATA {
        return HttpError::new(HttpErrorKind::Unknown, Failure(NO_CREDENTIALS.into()));
    }
    let kind = match &error {
        Error::Io(error) => match error.kind() {
            ErrorKind::InvalidData | ErrorKind::InvalidInput => HttpErrorKind::Unknown,
            _ => HttpErrorKind::Request,
        },
        Error::Timeout(Timeout::Resolve) | Error::HostNotFound | Error::ConnectionFailed => HttpErrorKind::Connect,
        Error::Timeout(_) | Error::Protocol(_) => HttpErrorKind::Request,
        _ => HttpErrorKind::Unknown,
    };
    HttpError::new(kind, Failure(format!("{host}: {error}")))
}

/// Why there is no answer, in a line.
#[derive(Debug)]
struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Failure {}
