//! `/openapi.json`: the paths with the fields that their requests need. Every path takes more: generation options and the
//! fields of its API.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};

const DOOR: Door = Door::open("openapi", Form::Plain);

/// Adds the route.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    DOOR.route(router, MethodFilter::GET, "/openapi.json", answer)
}

async fn answer(call: Call) -> Result<Response, Failure> {
    Ok(json_response(&document(&call.app)))
}

/// The body of a path's request.
#[derive(Clone, Copy)]
enum Body {
    /// None: it is a GET.
    None,
    /// An object with these fields, all needed, each of a form of `form`.
    Fields(&'static [(&'static str, &'static str)]),
    /// Lines of JSON.
    Lines,
}

/// Path, whether a key is needed where keys are used, whether the answer may be events, summary, body.
type Entry = (&'static str, bool, bool, &'static str, Body);

const DOORS: &[Entry] = &[
    ("/health", false, false, "Whether requests are answered", Body::None),
    ("/ping", false, false, "Whether requests are answered", Body::None),
    ("/v2/health/live", false, false, "Whether the process works", Body::None),
    ("/v2/health/ready", false, false, "Whether requests are answered", Body::None),
    ("/v1/models", true, false, "The models", Body::None),
    ("/v1/models/{model}", true, false, "A model", Body::None),
    ("/v1/completions", true, true, "OpenAI: targets of texts", Body::Fields(&[("prompt", "texts or ids")])),
    (
        "/v1/chat/completions",
        true,
        true,
        "OpenAI: answers to a conversation",
        Body::Fields(&[("messages", "messages")]),
    ),
    ("/v1/embeddings", true, false, "OpenAI: vectors of texts", Body::Fields(&[("input", "texts or ids")])),
    ("/v1/t5gemma", true, true, "JSON lines of `t5gemma generate --jsonl`", Body::Lines),
    ("/v1/t5gemma/{model}", true, true, "JSON lines of `t5gemma generate --jsonl`", Body::Lines),
    ("/", true, true, "Hugging Face's tasks", Body::Fields(&[("inputs", "any")])),
    ("/generate", true, false, "TGI: the target of a text", Body::Fields(&[("inputs", "text")])),
    ("/generate_stream", true, true, "TGI: the target of a text, token by token", Body::Fields(&[("inputs", "text")])),
    ("/info", true, false, "TGI and TEI: the first model", Body::None),
    ("/embed", true, false, "TEI: vectors of texts", Body::Fields(&[("inputs", "texts or ids")])),
    ("/embed_all", true, false, "TEI: a vector for each token", Body::Fields(&[("inputs", "texts or ids")])),
    ("/similarity", true, false, "TEI: similarities of a text to others", Body::Fields(&[("inputs", "object")])),
    ("/predict", true, false, "TEI: labels of texts", Body::Fields(&[("inputs", "any")])),
    (
        "/rerank",
        true,
        false,
        "TEI: texts by how well they answer",
        Body::Fields(&[("query", "text"), ("texts", "texts")]),
    ),
    ("/tokenize", true, false, "TEI: tokens of texts", Body::Fields(&[("inputs", "texts")])),
    ("/decode", true, false, "TEI: texts of tokens", Body::Fields(&[("ids", "any")])),
    ("/v2", true, false, "Open Inference Protocol: the server", Body::None),
    ("/v2/models", true, false, "KServe: the names of the models", Body::None),
    ("/v2/models/stats", true, false, "Triton: statistics of all models", Body::None),
    ("/v2/models/{model}", true, false, "Open Inference Protocol: a model", Body::None),
    ("/v2/models/{model}/ready", false, false, "Open Inference Protocol: whether a model is open", Body::None),
    ("/v2/models/{model}/config", true, false, "Triton: a model", Body::None),
    ("/v2/models/{model}/stats", true, false, "Triton: statistics of a model", Body::None),
    (
        "/v2/models/{model}/infer",
        true,
        false,
        "Open Inference Protocol: tensors",
        Body::Fields(&[("inputs", "tensors")]),
    ),
    ("/v2/models/{model}/generate", true, false, "Triton: targets of a text", Body::Fields(&[("text_input", "text")])),
    (
        "/v2/models/{model}/generate_stream",
        true,
        true,
        "Triton: a target, piece by piece",
        Body::Fields(&[("text_input", "text")]),
    ),
];

const OPERATOR: &[Entry] = &[
    ("/metrics", false, false, "Prometheus", Body::None),
    ("/v2/repository/index", true, false, "Triton: the models and their states", Body::Fields(&[])),
    ("/v2/repository/models/{model}/load", true, false, "Triton: open a model, anew if it is open", Body::Fields(&[])),
    ("/v2/repository/models/{model}/unload", true, false, "Triton: close a model", Body::Fields(&[])),
];

fn form(name: &str) -> Value {
    let text = json!({"type": "string"});
    let ids = json!({"type": "array", "items": {"type": "integer"}});
    let list = |of: &Value| json!({"type": "array", "items": of});
    match name {
        "text" => text,
        "texts" => json!({"anyOf": [text, list(&text)]}),
        "texts or ids" => json!({"anyOf": [text, list(&text), ids, list(&ids)]}),
        "messages" | "tensors" => list(&json!({"type": "object"})),
        "object" => json!({"type": "object"}),
        _ => json!({}),
    }
}

fn document(app: &App) -> Value {
    let operator = if app.config.separate_admin { &[] } else { OPERATOR };
    let mut paths = Map::new();
    for &(path, needs_key, may_stream, summary, body) in DOORS.iter().chain(operator) {
        let mut content = json!({"application/json": {}});
        if may_stream {
            content["text/event-stream"] = json!({});
        }
        match (path, body) {
            ("/metrics", _) => content = json!({"text/plain": {}}),
            (_, Body::Lines) => content = json!({"application/x-ndjson": {}, "text/event-stream": {}}),
            _ => {}
        }
        let error = json!({"description": "an error", "content": {"application/json": {"schema": {"type": "object"}}}});
        let mut operation = json!({
            "summary": summary,
            "responses": {"200": {"description": "the answer", "content": content}, "default": error},
        });
        if !needs_key {
            operation["security"] = json!([]);
        }
        if path.contains("{model}") {
            operation["parameters"] = json!([
                {"name": "model", "in": "path", "required": true, "schema": {"type": "string"}}
            ]);
        }
        let method = match body {
            Body::None => "get",
            Body::Lines => {
                let schema = json!({"type": "object", "description": "a request, or several on lines of their own"});
                operation["requestBody"] =
                    json!({"required": true, "content": {"application/json": {"schema": schema}}});
                "post"
            }
            Body::Fields(fields) => {
                let properties: Map<String, Value> =
                    fields.iter().map(|(name, of)| (name.to_string(), form(of))).collect();
                let required: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
                let schema = json!({"type": "object", "required": required, "properties": properties});
                operation["requestBody"] =
                    json!({"required": !fields.is_empty(), "content": {"application/json": {"schema": schema}}});
                "post"
            }
        };
        let methods = paths.entry(path).or_insert_with(|| json!({}));
        methods[method] = operation;
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {"title": "t5gemma serve", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
    });
    if app.config.keys.is_some() {
        document["components"] = json!({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}});
        document["security"] = json!([{"key": []}]);
    }
    document
}
