//! `Failure`: why a request is not answered, and what each door says then. The one table from the runtime's errors to HTTP
//! statuses, the JSON forms of OpenAI, TGI, TEI and the Open Inference Protocol, and gRPC.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use t5gemma_protocol::RequestError;
use t5gemma_runtime::Error;

/// Why a request is not answered.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What kind of failure it is; decides the status.
    pub reason: Reason,
    /// One line for the caller. Names no file of the server.
    pub message: String,
    /// The field at fault, if it is one.
    pub field: Option<String>,
    /// After how many seconds to try again.
    pub retry_after: Option<u64>,
}

/// The kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A request of the wrong form or content.
    Invalid,
    /// A request without any source.
    Empty,
    /// More rows, tokens or bytes than the server takes.
    TooLarge,
    /// A body or a header that is too long.
    BodyTooLarge,
    /// A body that did not arrive in time.
    Slow,
    /// No valid key.
    Unauthorized,
    /// A page of another site asks.
    Forbidden,
    /// No such model or path.
    NotFound,
    /// A path that takes another method.
    Method,
    /// The line is full.
    Full,
    /// The model is not ready, or the server ends.
    Unavailable,
    /// The deadline has passed.
    Deadline,
    /// The request was cancelled.
    Cancelled,
    /// What this server or model does not do.
    Unsupported,
    /// A fault of the server or the model.
    Internal,
}

impl Failure {
    /// A failure without a field.
    pub fn new(reason: Reason, message: impl Into<String>) -> Failure {
        Failure { reason, message: message.into(), field: None, retry_after: None }
    }

    /// A field of the wrong form.
    pub fn field(field: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Failure {
        let message = format!("{field}: expected {expected}, found {found}");
        Failure { field: Some(field.to_string()), ..Failure::new(Reason::Invalid, message) }
    }

    /// A field that this server or model does not support.
    pub fn unsupported(field: &str, what: impl std::fmt::Display) -> Failure {
        Failure {
            field: Some(field.to_string()),
            ..Failure::new(Reason::Invalid, format!("{field}: not supported: {what}"))
        }
    }

    /// Adds when to try again.
    pub fn retry_after(self, seconds: u64) -> Failure {
        Failure { retry_after: Some(seconds), ..self }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let message = error.to_string();
        match error {
            // The runtime names the template's file.
            Error::Input { field, found, .. } if field == "messages" => {
                Failure { field: Some(field), ..Failure::new(Reason::Invalid, format!("messages: {found}")) }
            }
            Error::Input { field, .. } | Error::Requires { field, .. } => {
                Failure { field: Some(field), ..Failure::new(Reason::Invalid, message) }
            }
            Error::Options(option) => Failure { field: Some(option.option), ..Failure::new(Reason::Invalid, message) },
            Error::Constraint { .. } => Failure::new(Reason::Invalid, message),
            Error::TooLarge { .. } => Failure::new(Reason::TooLarge, message),
            Error::Full { retry_after, .. } => {
                let seconds = retry_after.as_secs_f64().ceil().clamp(1.0, 600.0);
                Failure::new(Reason::Full, message).retry_after(seconds as u64)
            }
            Error::Closed => Failure::new(Reason::Unavailable, "the model is being unloaded").retry_after(1),
            Error::Deadline => Failure::new(Reason::Deadline, message),
            Error::Cancelled => Failure::new(Reason::Cancelled, message),
            Error::Unsupported { .. } => Failure::new(Reason::Unsupported, message),
            Error::NotFinite { .. } => Failure::new(Reason::Internal, message),
            Error::Tokenizer { .. } => {
                Failure::new(Reason::Invalid, "the model has no usable tokenizer: it takes token ids only")
            }
            // These name files of the server.
            _ => {
                crate::log::note(&format!("a request failed: {message}"));
                Failure::new(Reason::Internal, "the model failed; the server's log says why")
            }
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Failure {
        let message = error.to_string();
        match error {
            RequestError::Runtime(error) => error.into(),
            RequestError::Form { field, .. } if !field.is_empty() => {
                Failure { field: Some(field), ..Failure::new(Reason::Invalid, message) }
            }
            _ => Failure::new(Reason::Invalid, message),
        }
    }
}

/// The JSON form of a door's errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `{"error": {"message", "type", "param", "code"}}`
    OpenAi,
    /// `{"error", "error_type"}` with TGI's types.
    Tgi,
    /// `{"error", "error_type"}` with TEI's types.
    Tei,
    /// `{"error"}`
    Plain,
}

impl Reason {
    /// The HTTP status.
    pub fn status(self, form: Form) -> StatusCode {
        match self {
            Reason::Invalid if matches!(form, Form::Tgi | Form::Tei) => StatusCode::UNPROCESSABLE_ENTITY,
            Reason::TooLarge if form == Form::Tei => StatusCode::PAYLOAD_TOO_LARGE,
            Reason::TooLarge if form == Form::Tgi => StatusCode::UNPROCESSABLE_ENTITY,
            Reason::Invalid | Reason::Empty | Reason::TooLarge => StatusCode::BAD_REQUEST,
            Reason::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Reason::Slow => StatusCode::REQUEST_TIMEOUT,
            Reason::Unauthorized => StatusCode::UNAUTHORIZED,
            Reason::Forbidden => StatusCode::FORBIDDEN,
            Reason::NotFound => StatusCode::NOT_FOUND,
            Reason::Method => StatusCode::METHOD_NOT_ALLOWED,
            Reason::Full => StatusCode::TOO_MANY_REQUESTS,
            Reason::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Reason::Deadline => StatusCode::GATEWAY_TIMEOUT,
            Reason::Cancelled => StatusCode::from_u16(499).expect("a status has three digits"),
            Reason::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Reason::Internal if form == Form::Tei => StatusCode::FAILED_DEPENDENCY,
            Reason::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The gRPC status.
    pub fn code(self) -> tonic::Code {
        match self {
            Reason::Invalid | Reason::Empty | Reason::TooLarge | Reason::BodyTooLarge => tonic::Code::InvalidArgument,
            Reason::Unauthorized => tonic::Code::Unauthenticated,
            Reason::Forbidden => tonic::Code::PermissionDenied,
            Reason::NotFound => tonic::Code::NotFound,
            Reason::Full => tonic::Code::ResourceExhausted,
            Reason::Unavailable => tonic::Code::Unavailable,
            Reason::Deadline | Reason::Slow => tonic::Code::DeadlineExceeded,
            Reason::Cancelled => tonic::Code::Cancelled,
            Reason::Unsupported | Reason::Method => tonic::Code::Unimplemented,
            Reason::Internal => tonic::Code::Internal,
        }
    }

    /// The name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Invalid => "invalid",
            Reason::Empty => "empty",
            Reason::TooLarge => "too_large",
            Reason::BodyTooLarge => "body_too_large",
            Reason::Slow => "slow",
            Reason::Unauthorized => "unauthorized",
            Reason::Forbidden => "forbidden",
            Reason::NotFound => "not_found",
            Reason::Method => "method",
            Reason::Full => "full",
            Reason::Unavailable => "unavailable",
            Reason::Deadline => "deadline",
            Reason::Cancelled => "cancelled",
            Reason::Unsupported => "unsupported",
            Reason::Internal => "internal",
        }
    }

    fn openai(self) -> (&'static str, Option<&'static str>) {
        match self {
            Reason::Unauthorized => ("authentication_error", Some("invalid_api_key")),
            Reason::Forbidden => ("permission_error", None),
            Reason::Full => ("rate_limit_error", Some("overloaded")),
            Reason::Unavailable => ("server_error", Some("unavailable")),
            Reason::Deadline => ("server_error", Some("timeout")),
            Reason::Cancelled => ("server_error", Some("cancelled")),
            Reason::Internal | Reason::Slow => ("server_error", None),
            _ => ("invalid_request_error", None),
        }
    }

    fn tgi(self) -> &'static str {
        match self {
            Reason::Full => "overloaded",
            Reason::Unavailable => "unhealthy",
            Reason::Internal | Reason::Deadline | Reason::Cancelled => "generation",
            _ => "validation",
        }
    }

    fn tei(self) -> &'static str {
        match self {
            Reason::Empty => "Empty",
            Reason::Full => "Overloaded",
            Reason::Unavailable => "Unhealthy",
            Reason::Internal | Reason::Deadline | Reason::Cancelled => "Backend",
            _ => "Validation",
        }
    }
}

impl Failure {
    /// The error as JSON.
    pub fn json(&self, form: Form) -> Value {
        match form {
            Form::OpenAi => {
                let (kind, code) = self.reason.openai();
                let code = match (self.reason, self.field.as_deref()) {
                    (Reason::NotFound, Some("model")) => Some("model_not_found"),
                    _ => code,
                };
                json!({"error": {"message": self.message, "type": kind, "param": self.field, "code": code}})
            }
            Form::Tgi => json!({"error": self.message, "error_type": self.reason.tgi()}),
            Form::Tei => json!({"error": self.message, "error_type": self.reason.tei()}),
            Form::Plain => json!({"error": self.message}),
        }
    }

    /// The response.
    pub fn response(&self, form: Form) -> Response {
        let body = self.json(form).to_string();
        let json = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        let mut response = (self.reason.status(form), json, body).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.reason == Reason::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self.reason);
        response
    }

    /// The gRPC status.
    pub fn grpc(&self) -> tonic::Status {
        let mut status = tonic::Status::new(self.reason.code(), &self.message);
        if let Some(seconds) = self.retry_after {
            let milliseconds = tonic::metadata::MetadataValue::from(seconds.saturating_mul(1000));
            status.metadata_mut().insert("grpc-retry-pushback-ms", milliseconds);
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_a_status_in_every_form() {
        let input = || Error::Input { field: "text".into(), expected: "text".into(), found: "x".into() };
        let retry_after = std::time::Duration::from_millis(1500);
        let full = Error::Full { what: "rows", waiting: 3, limit: 3, retry_after };
        assert_eq!(Failure::from(full.clone()).retry_after, Some(2));
        let cases = [
            (input(), 400, 422, 422, 400, tonic::Code::InvalidArgument),
            (Error::TooLarge { what: "rows", needed: 3, limit: 2 }, 400, 422, 413, 400, tonic::Code::InvalidArgument),
            (full, 429, 429, 429, 429, tonic::Code::ResourceExhausted),
            (Error::Closed, 503, 503, 503, 503, tonic::Code::Unavailable),
            (Error::Deadline, 504, 504, 504, 504, tonic::Code::DeadlineExceeded),
            (Error::Cancelled, 499, 499, 499, 499, tonic::Code::Cancelled),
            (Error::Panicked { row: 0 }, 500, 500, 424, 500, tonic::Code::Internal),
        ];
        for (error, openai, tgi, tei, plain, code) in cases {
            let failure = Failure::from(error.clone());
            let statuses =
                [Form::OpenAi, Form::Tgi, Form::Tei, Form::Plain].map(|form| failure.response(form).status());
            assert_eq!(statuses.map(|status| status.as_u16()), [openai, tgi, tei, plain], "{error}");
            assert_eq!(failure.grpc().code(), code, "{error}");
        }
    }

    #[test]
    fn files_of_the_server_stay_its_own() {
        let path = std::path::PathBuf::from("/models/secret");
        for error in [
            Error::File { path: path.clone(), problem: "x".into() },
            Error::Tokenizer { path, problem: "x".into() },
            Error::Input {
                field: "messages".into(),
                expected: "a conversation that the template in /models/secret accepts".into(),
                found: "x".into(),
            },
        ] {
            let failure = Failure::from(error);
            assert!(!failure.message.contains("secret"), "{}", failure.message);
        }
    }
}
