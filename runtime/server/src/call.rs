//! `Call`: one HTTP request to a door. Reads it within the limits, checks the key, and gives every answer an id, a line in
//! the log and a place in the metrics.

use std::future::Future;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{RawPathParams, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use flate2::read::{MultiGzDecoder, ZlibDecoder};
use serde_json::{Value, json};
use t5gemma_runtime::Priority;

use crate::app::App;
use crate::auth::Tenant;
use crate::failure::{Failure, Form, Reason};
use crate::fields::Fields;
use crate::traces::Trace;

/// One request.
#[derive(Debug)]
pub struct Call {
    /// What all requests share.
    pub app: Arc<App>,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// The parts of its path that have names.
    pub path: Vec<(String, String)>,
    /// When it must have been answered.
    pub deadline: Instant,
    /// Tells it apart in logs and answers.
    pub id: String,
    /// Which of the waiting requests come first.
    pub priority: Priority,
    /// Its span.
    pub trace: Trace,
    /// Whose key it came with: those of one tenant share the models as one.
    pub tenant: Option<Arc<Tenant>>,
}

/// The header with the id of a request.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header with the seconds that a request may take.
pub const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");

/// The header with the priority of a request.
pub const PRIORITY: HeaderName = HeaderName::from_static("x-priority");

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A door: its name in metrics, the form of its errors, and who may come in.
#[derive(Clone, Copy, Debug)]
pub struct Door {
    /// The name in metrics.
    pub name: &'static str,
    /// The form of errors.
    pub form: Form,
    /// Whether a key is needed where keys are used.
    pub needs_key: bool,
}

impl Door {
    /// A door that needs a key.
    pub const fn new(name: &'static str, form: Form) -> Door {
        Door { name, form, needs_key: true }
    }

    /// A door for everyone.
    pub const fn open(name: &'static str, form: Form) -> Door {
        Door { name, form, needs_key: false }
    }

    /// Adds a handler of a path to a router.
    pub fn route<F, R>(self, router: Router<Arc<App>>, filter: MethodFilter, path: &str, run: F) -> Router<Arc<App>>
    where
        F: Fn(Call) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Result<Response, Failure>> + Send,
    {
        let handler = move |State(app): State<Arc<App>>, parts: RawPathParams, request: Request| {
            let run = run.clone();
            let path = parts.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            async move { self.answer(app, path, request, run).await }
        };
        let methods: MethodRouter<Arc<App>> = on(filter, handler);
        router.route(path, methods)
    }

    async fn answer<F, R>(self, app: Arc<App>, path: Vec<(String, String)>, request: Request, run: F) -> Response
    where
        F: Fn(Call) -> R,
        R: Future<Output = Result<Response, Failure>>,
    {
        let start = Instant::now();
        let id = request_id(request.headers());
        let mut left = Left { app: app.clone(), is_answered: false };
        let trace = match &app.config.traces {
            Some(traces) if self.needs_key => traces.begin(self.name, &id, request.headers()),
            _ => Trace::default(),
        };
        let answer = async {
            let mut call = Call::read(app.clone(), self, path, request, start).await?;
            call.id = id.clone();
            call.trace = trace.clone();
            run(call).await
        };
        let mut response = match answer.await {
            Ok(response) => response,
            Err(failure) => failure.response(self.form),
        };
        left.is_answered = true;
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        let status = response.status().as_u16();
        app.metrics.answered(self.name, status);
        trace.answered(status);
        let reason = response.extensions().get::<Reason>().map(|reason| reason.name());
        if let Some(reason) = reason {
            app.metrics.refused(reason);
        }
        let seconds = start.elapsed().as_secs_f64();
        crate::log::request(
            json!({"door": self.name, "status": status, "reason": reason, "seconds": seconds, "request_id": id}),
        );
        response
    }
}

/// Counts a request whose client left before the answer.
struct Left {
    app: Arc<App>,
    is_answered: bool,
}

impl Drop for Left {
    fn drop(&mut self) {
        if !self.is_answered {
            self.app.metrics.disconnected.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The id that the client gave, if it is short and plain, or a new one.
fn request_id(headers: &HeaderMap) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_plain = |id: &&str| !id.is_empty() && id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic());
    match given.filter(is_plain) {
        Some(id) => id.to_string(),
        None => {
            let random = t5gemma_runtime::Draws::random_seed();
            format!("{random:016x}{:04x}", NEXT.fetch_add(1, Ordering::Relaxed) & 0xffff)
        }
    }
}

impl Call {
    async fn read(
        app: Arc<App>,
        door: Door,
        path: Vec<(String, String)>,
        request: Request,
        start: Instant,
    ) -> Result<Call, Failure> {
        let (parts, body) = request.into_parts();
        let mut call = Call::begin(app, door, parts.headers, path, start)?;
        let coding = Coding::of(&call.headers)?;
        let most = call.app.config.limits.max_body_bytes;
        let body = read_body(body, most).await?;
        call.body = match coding {
            Coding::Identity => body,
            coding => {
                let decoded = tokio::task::spawn_blocking(move || coding.decode(&body, most)).await;
                decoded.map_err(|_| Failure::new(Reason::Internal, "the body could not be decompressed"))??
            }
        };
        Ok(call)
    }

    /// A request whose body is read elsewhere.
    ///
    /// # Errors
    /// No valid key, or a header of the wrong form.
    pub fn begin(
        app: Arc<App>,
        door: Door,
        headers: HeaderMap,
        path: Vec<(String, String)>,
        start: Instant,
    ) -> Result<Call, Failure> {
        check_origin(&headers)?;
        let tenant = match app.config.keys.as_ref().filter(|_| door.needs_key) {
            None => None,
            Some(keys) => match keys.find(&headers) {
                Some(tenant) => Some(tenant),
                None => {
                    let message = "expected a valid key in the header `Authorization: Bearer KEY`";
                    return Err(Failure::new(Reason::Unauthorized, message));
                }
            },
        };
        let mut priority = priority(&headers)?;
        if let Some(tenant) = &tenant {
            // Lower ones are greater.
            priority = priority.max(tenant.priority);
        }
        let deadline = start + timeout(&headers, app.config.limits.timeout)?;
        let (body, id, trace) = (Bytes::new(), String::new(), Trace::default());
        Ok(Call { app, headers, body, path, deadline, id, trace, priority, tenant })
    }

    /// The part of the path of this name.
    pub fn part(&self, name: &str) -> &str {
        self.path.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    /// The body as a JSON object.
    pub fn fields(&self) -> Result<Fields, Failure> {
        Fields::parse(&self.body)
    }

    /// Brings the deadline forward by the field `timeout` of the request.
    pub fn limit(&mut self, timeout: Option<f64>) -> Result<(), Failure> {
        if let Some(seconds) = timeout {
            self.deadline = self.deadline.min(Instant::now() + seconds_of("timeout", seconds)?);
        }
        Ok(())
    }
}

fn seconds_of(field: &str, seconds: f64) -> Result<Duration, Failure> {
    match Duration::try_from_secs_f64(seconds) {
        // Longer than any server lives.
        Ok(_) if seconds > 1e8 => Ok(Duration::from_secs(100_000_000)),
        Ok(timeout) => Ok(timeout),
        Err(_) if seconds > 0.0 => Ok(Duration::from_secs(100_000_000)),
        Err(_) => Err(Failure::field(field, "a number of seconds of at least 0", seconds)),
    }
}

fn timeout(headers: &HeaderMap, most: Duration) -> Result<Duration, Failure> {
    let Some(value) = headers.get(REQUEST_TIMEOUT) else { return Ok(most) };
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok()).unwrap_or(f64::NAN);
    Ok(seconds_of(REQUEST_TIMEOUT.as_str(), seconds)?.min(most))
}

fn priority(headers: &HeaderMap) -> Result<Priority, Failure> {
    let Some(value) = headers.get(PRIORITY) else { return Ok(Priority::Normal) };
    let name = value.to_str().unwrap_or_default();
    let refused = || Failure::field(PRIORITY.as_str(), "high, normal or low", format_args!("{name:?}"));
    Priority::from_name(name).ok_or_else(refused)
}

/// Refuses requests that a page of another site makes a browser send: keys and addresses do not protect a server on the
/// user's own machine from those.
fn check_origin(headers: &HeaderMap) -> Result<(), Failure> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    match origin.split_once("://") {
        Some((_, site)) if Some(site) == host => Ok(()),
        _ => Err(Failure::new(Reason::Forbidden, "pages of other sites may not ask this server")),
    }
}

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Identity,
    Gzip,
    /// In the format of zlib, as HTTP has it.
    Deflate,
}

impl Coding {
    fn of(headers: &HeaderMap) -> Result<Coding, Failure> {
        let Some(value) = headers.get(header::CONTENT_ENCODING) else { return Ok(Coding::Identity) };
        match value.to_str().unwrap_or_default().to_ascii_lowercase().as_str() {
            "" | "identity" => Ok(Coding::Identity),
            "gzip" | "x-gzip" => Ok(Coding::Gzip),
            "deflate" => Ok(Coding::Deflate),
            other => Err(Failure::field("content-encoding", "gzip, deflate or identity", format_args!("{other:?}"))),
        }
    }

    /// The body of at most `most` bytes.
    fn decode(self, body: &[u8], most: usize) -> Result<Bytes, Failure> {
        let decoder: Box<dyn Read> = match self {
            Coding::Identity => Box::new(body),
            Coding::Gzip => Box::new(MultiGzDecoder::new(body)),
            Coding::Deflate => Box::new(ZlibDecoder::new(body)),
        };
        let mut decoded = Vec::new();
        match decoder.take((most as u64).saturating_add(1)).read_to_end(&mut decoded) {
            Ok(_) if decoded.len() > most => Err(too_large(most)),
            Ok(_) => Ok(decoded.into()),
            Err(error) => Err(Failure::new(Reason::Invalid, format!("the body cannot be decompressed: {error}"))),
        }
    }
}

fn too_large(most: usize) -> Failure {
    Failure::new(Reason::BodyTooLarge, format!("the body is longer than {most} bytes"))
}

async fn read_body(body: Body, most: usize) -> Result<Bytes, Failure> {
    match tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, most)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) => {
            let is_length =
                std::error::Error::source(&error).is_some_and(|it| it.is::<http_body_util::LengthLimitError>());
            match is_length {
                true => Err(too_large(most)),
                false => Err(Failure::new(Reason::Invalid, "the body did not arrive in full")),
            }
        }
        Err(_) => {
            let seconds = BODY_TIMEOUT.as_secs();
            Err(Failure::new(Reason::Slow, format!("the body did not arrive within {seconds} seconds")))
        }
    }
}

/// A JSON answer.
pub fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], value.to_string()).into_response()
}
