//! OpenAI's API: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/v1/embeddings`.

mod chat;
mod completions;
mod embeddings;
mod options;

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Value, json};
use t5gemma_runtime::{FinishReason, Hypothesis, Logprobs};

use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};
use crate::generating::Generating;
use crate::served::Served;

const MODELS: Door = Door::new("models", Form::OpenAi);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = MODELS.route(router, MethodFilter::GET, "/v1/models", models);
    let router = MODELS.route(router, MethodFilter::GET, "/v1/models/{model}", model);
    let router = completions::DOOR.route(router, MethodFilter::POST, "/v1/completions", completions::answer);
    let router = chat::DOOR.route(router, MethodFilter::POST, "/v1/chat/completions", chat::answer);
    embeddings::DOOR.route(router, MethodFilter::POST, "/v1/embeddings", embeddings::answer)
}

async fn models(call: Call) -> Result<Response, Failure> {
    let listed: Vec<Value> = call.app.models.ready().iter().map(|served| served.listed()).collect();
    Ok(json_response(&json!({"object": "list", "data": listed})))
}

async fn model(call: Call) -> Result<Response, Failure> {
    Ok(json_response(&call.app.models.named(call.part("model"))?.listed()))
}

/// Why a choice ended, in OpenAI's words.
fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length | FinishReason::Time | FinishReason::ConstraintIncomplete => "length",
        _ => "stop",
    }
}

/// Tokens of a target with their log-probabilities.
#[derive(Default)]
struct Scored {
    tokens: Vec<i64>,
    logprobs: Logprobs,
}

impl Scored {
    /// Those of a whole target; `None` if its log-probabilities were not asked for.
    fn of(hypothesis: &Hypothesis) -> Option<Scored> {
        let logprobs = hypothesis.logprobs.clone()?;
        Some(Scored { tokens: hypothesis.tokens.clone(), logprobs })
    }

    fn push(&mut self, token: i64, logprobs: Option<Logprobs>) {
        if let Some(Logprobs { tokens, top }) = logprobs {
            self.tokens.push(token);
            self.logprobs.tokens.extend(tokens);
            self.logprobs.top.extend(top);
        }
    }

    /// What was pushed since the last call, if anything was.
    fn take(&mut self) -> Option<Scored> {
        (!self.tokens.is_empty()).then(|| std::mem::take(self))
    }
}

fn usage(generating: &Generating) -> Value {
    let (source, target) = (generating.source_tokens, generating.target_tokens);
    json!({"prompt_tokens": source, "completion_tokens": target, "total_tokens": source + target})
}

/// Tells models and their weights apart.
fn fingerprint(served: &Served) -> String {
    format!("t5gemma-{}", served.sha256().get(..12).unwrap_or_default())
}

/// An error in the middle of a stream.
fn error_event(failure: &Failure) -> Value {
    failure.json(Form::OpenAi)
}
