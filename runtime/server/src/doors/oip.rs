//! The Open Inference Protocol, version 2, as KServe and Triton speak it over HTTP: health is elsewhere; here are
//! metadata, inference with JSON and binary tensors, and statistics. `infer` is shared with gRPC.

mod binary;
pub mod infer;
pub mod tensor;

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodFilter;
use serde_json::{Value, json};
use t5gemma_runtime::Task;

use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};
use crate::models::State;
use crate::served::Served;

const METADATA: Door = Door::new("metadata", Form::Plain);
const READY: Door = Door::open("health", Form::Plain);
const INFER: Door = Door::new("infer", Form::Plain);

/// The only version of a model.
pub const VERSION: &str = "1";
/// The size of the JSON before binary tensors.
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Adds the routes.
pub fn routes(mut router: Router<Arc<App>>) -> Router<Arc<App>> {
    router = METADATA.route(router, MethodFilter::GET, "/v2", server);
    router = METADATA.route(router, MethodFilter::GET, "/v2/models", models);
    for path in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        router = METADATA.route(router, MethodFilter::GET, path, model);
        router = READY.route(router, MethodFilter::GET, &format!("{path}/ready"), ready);
        router = METADATA.route(router, MethodFilter::GET, &format!("{path}/config"), config);
        router = METADATA.route(router, MethodFilter::GET, &format!("{path}/stats"), statistics);
        router = INFER.route(router, MethodFilter::POST, &format!("{path}/infer"), infer);
    }
    METADATA.route(router, MethodFilter::GET, "/v2/models/stats", all_statistics)
}

/// The model of a path.
pub fn named(call: &Call) -> Result<Arc<Served>, Failure> {
    let version = call.part("version");
    if !version.is_empty() && version != VERSION {
        let message = format!("{} has the version {VERSION} only, found {version:?}", call.part("model"));
        return Err(Failure::new(crate::failure::Reason::NotFound, message));
    }
    call.app.models.named(call.part("model"))
}

/// What the server says of itself: name, version, extensions.
pub fn server_metadata() -> (&'static str, &'static str, [&'static str; 4]) {
    let extensions = ["binary_tensor_data", "model_repository", "parameters", "statistics"];
    ("t5gemma", env!("CARGO_PKG_VERSION"), extensions)
}

async fn server(_: Call) -> Result<Response, Failure> {
    let (name, version, extensions) = server_metadata();
    Ok(json_response(&json!({"name": name, "version": version, "extensions": extensions})))
}

async fn models(call: Call) -> Result<Response, Failure> {
    let names: Vec<&str> = call.app.models.states().map(|(name, _)| name).collect();
    Ok(json_response(&json!({"models": names})))
}

async fn ready(call: Call) -> Result<Response, Failure> {
    let name = call.part("model");
    let state = call.app.models.states().find(|(known, _)| *known == name);
    let is_ready = matches!(state, Some((_, State::Ready(_))));
    let status = if is_ready { StatusCode::OK } else { StatusCode::BAD_REQUEST };
    Ok((status, json_response(&json!({"name": name, "ready": is_ready}))).into_response())
}

/// Name, datatype and shape of a port; -1 is any number.
pub type Port = (&'static str, &'static str, Vec<i64>);

/// The inputs and outputs of a model. Either of the inputs is given.
pub fn ports(served: &Served) -> (Vec<Port>, Vec<Port>) {
    let mut inputs = vec![("text_input", "BYTES", vec![-1]), ("input_ids", "INT64", vec![-1, -1])];
    if let Ok(settings) = served.tokenize().image_settings() {
        let size = settings.image_size as i64;
        inputs.extend([("images", "BYTES", vec![-1, -1]), ("pixel_values", "FP32", vec![-1, 3, size, size])]);
    }
    let facts = &served.manifest().facts;
    let outputs = match served.task() {
        Task::Text2TextGeneration => vec![
            ("text_output", "BYTES", vec![-1]),
            ("output_ids", "INT64", vec![-1, -1]),
            ("finish_reason", "BYTES", vec![-1]),
        ],
        Task::FeatureExtraction(_) => vec![("embedding", "FP32", vec![-1, facts.encoder.hidden_size as i64])],
        _ => {
            let labels = facts.classifier.as_ref().map_or(0, |classifier| classifier.labels.len());
            vec![("scores", "FP32", vec![-1, labels as i64]), ("label", "BYTES", vec![-1])]
        }
    };
    (inputs, outputs)
}

async fn model(call: Call) -> Result<Response, Failure> {
    let served = named(&call)?;
    let (inputs, outputs) = ports(&served);
    let port = |(name, datatype, shape): Port| json!({"name": name, "datatype": datatype, "shape": shape});
    Ok(json_response(&json!({
        "name": served.name,
        "versions": [VERSION],
        "platform": "t5gemma",
        "inputs": inputs.into_iter().map(port).collect::<Vec<_>>(),
        "outputs": outputs.into_iter().map(port).collect::<Vec<_>>(),
    })))
}

/// Triton's form of the metadata.
async fn config(call: Call) -> Result<Response, Failure> {
    let served = named(&call)?;
    let (inputs, outputs) = ports(&served);
    let port = |(name, datatype, dims): Port| {
        let datatype = if datatype == "BYTES" { "STRING" } else { datatype };
        json!({"name": name, "data_type": format!("TYPE_{datatype}"), "dims": dims})
    };
    let optional = |port: Value| {
        let mut port = port;
        port["optional"] = true.into();
        port
    };
    Ok(json_response(&json!({
        "name": served.name,
        "platform": "t5gemma",
        "backend": "t5gemma",
        "max_batch_size": 0,
        "input": inputs.into_iter().map(port).map(optional).collect::<Vec<_>>(),
        "output": outputs.into_iter().map(port).collect::<Vec<_>>(),
    })))
}

fn statistics_of(served: &Served) -> Value {
    let stats = served.generator().map(|generator| generator.engine.stats()).unwrap_or_default();
    json!({
        "name": served.name,
        "version": VERSION,
        "inference_count": stats.finished,
        "execution_count": stats.steps,
        "inference_stats": {
            "success": {"count": stats.finished, "ns": 0},
            "fail": {"count": stats.failed, "ns": 0},
        },
        "batch_stats": [],
    })
}

async fn statistics(call: Call) -> Result<Response, Failure> {
    Ok(json_response(&json!({"model_stats": [statistics_of(&*named(&call)?)]})))
}

async fn all_statistics(call: Call) -> Result<Response, Failure> {
    let stats: Vec<Value> = call.app.models.ready().iter().map(|served| statistics_of(served)).collect();
    Ok(json_response(&json!({"model_stats": stats})))
}

async fn infer(mut call: Call) -> Result<Response, Failure> {
    let served = named(&call)?;
    let length = match call.headers.get(HEADER_LENGTH) {
        None => call.body.len(),
        Some(value) => {
            let length = value.to_str().ok().and_then(|text| text.trim().parse::<usize>().ok());
            let expected = format!("a number of at most {} bytes", call.body.len());
            let found = String::from_utf8_lossy(value.as_bytes()).into_owned();
            length
                .filter(|&length| length <= call.body.len())
                .ok_or_else(|| Failure::field(HEADER_LENGTH.as_str(), expected, found))?
        }
    };
    let body = call.body.clone();
    let (request, wanted) = binary::read(&body[..length], &body[length..])?;
    let id = request.id.clone();
    let name = served.name.clone();
    let outputs = infer::infer(&mut call, served, request).await?;
    let (json, raw) = binary::write(&name, &id, &outputs, &wanted);
    if raw.is_empty() {
        return Ok(json_response(&json));
    }
    let json = json.to_string();
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (HEADER_LENGTH, HeaderValue::from(json.len())),
    ];
    let mut all = json.into_bytes();
    all.extend(raw);
    Ok((headers, all).into_response())
}
