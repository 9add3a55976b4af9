//! The doors: each turns the requests of some client's API into asks, and the results into its answers. No door knows
//! another, and none has logic beyond its wire types.

mod grpc;
mod health;
mod hugging_face;
mod json_lines;
mod oip;
mod openai;
mod openapi;
mod operator;
mod page;
mod tei;
mod tgi;
mod triton;

mod sampling;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use t5gemma_runtime::{SpecialTokens, Tokenizer};

use crate::app::App;
use crate::failure::{Failure, Form, Reason};

/// The names of the doors in metrics.
pub const NAMES: &[&str] = &[
    "none",
    "health",
    "models",
    "completions",
    "chat",
    "embeddings",
    "generate",
    "embed",
    "predict",
    "rerank",
    "tokenize",
    "root",
    "info",
    "metadata",
    "infer",
    "triton_generate",
    "t5gemma",
    "grpc",
    "openapi",
    "page",
    "metrics",
    "repository",
];

/// All doors; those of the operator only where they have no port of their own.
pub fn router(app: &Arc<App>) -> Router {
    let mut router = Router::new();
    for routes in [
        health::routes,
        openai::routes,
        tgi::routes,
        tei::routes,
        hugging_face::routes,
        oip::routes,
        triton::routes,
        json_lines::routes,
        grpc::routes,
        openapi::routes,
        page::routes,
    ] {
        router = routes(router);
    }
    if !app.config.separate_admin {
        router = operator::routes(router);
    }
    finish(router, app)
}

/// The doors of the operator.
pub fn admin_router(app: &Arc<App>) -> Router {
    finish(operator::routes(health::routes(Router::new())), app)
}

fn finish(router: Router<Arc<App>>, app: &Arc<App>) -> Router {
    router.fallback(no_such_path).method_not_allowed_fallback(other_method).with_state(app.clone())
}

/// The form of errors where no door answers.
fn form_of(path: &str) -> Form {
    match path.split('/').nth(1) {
        Some("v1") => Form::OpenAi,
        Some("v2") => Form::Plain,
        _ => Form::Tgi,
    }
}

async fn no_such_path(State(app): State<Arc<App>>, request: Request) -> Response {
    app.metrics.answered("none", 404);
    Failure::new(Reason::NotFound, "no such path").response(form_of(request.uri().path()))
}

async fn other_method(State(app): State<Arc<App>>, request: Request) -> Response {
    app.metrics.answered("none", 405);
    Failure::new(Reason::Method, "this path takes another method").response(form_of(request.uri().path()))
}

/// A token as a text of its own: a space for the vocabulary's mark of one.
pub(crate) fn token_text(tokenizer: &Tokenizer, token: i64) -> String {
    tokenizer.token(token).unwrap_or_default().replace('\u{2581}', " ")
}

/// The bytes of a token.
pub(crate) fn token_bytes(text: &str) -> Vec<u8> {
    let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => text.as_bytes().to_vec(),
    }
}

/// Whether a token is special: it stands for no text.
pub(crate) fn is_special(tokenizer: &Tokenizer, token: i64) -> bool {
    let text = |special| tokenizer.decode(&[token], special).unwrap_or_default();
    text(SpecialTokens::Skip).is_empty() && !text(SpecialTokens::Keep).is_empty()
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}
