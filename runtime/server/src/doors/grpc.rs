//! gRPC on the port of HTTP: `inference.GRPCInferenceService` with Triton's streams and repository calls, and
//! `grpc.health.v1.Health`, and reflection.

mod health;
mod messages;
mod reflection;
mod stream;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use prost::Message;
use serde_json::{Map, Value};
use tonic::Status;
use tonic::codec::CompressionEncoding;
use tonic_prost::ProstCodec;

use self::messages::{
    Choice, Empty, Index, IndexEntry, InferRequest, InferResponse, IsSo, LoadRequest, ModelMetadata, ModelRequest,
    Parameter, ServerMetadata, TensorMessage, TensorMetadata,
};
use super::oip::infer::{self, Request as Infer};
use super::oip::tensor::{Data, Tensor, other_type};
use super::oip::{self, VERSION};
use crate::app::App;
use crate::call::{Call, Door};
use crate::failure::{Failure, Form, Reason};
use crate::models::{LoadError, State as ModelState};
use crate::served::Served;

const GRPC: Door = Door::new("grpc", Form::Plain);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    reflection::routes(router)
        .route("/inference.GRPCInferenceService/{method}", post(inference))
        .route("/grpc.health.v1.Health/{method}", post(health::answer))
}

async fn inference(State(app): State<Arc<App>>, Path(method): Path<String>, request: Request) -> Response {
    let response = answer(app.clone(), method, request).await;
    // A status that is not in the headers comes after the messages.
    let code = response.headers().get("grpc-status").and_then(|code| code.to_str().ok()?.parse().ok());
    app.metrics.answered(GRPC.name, code.unwrap_or(0));
    response
}

async fn answer(app: Arc<App>, method: String, request: Request) -> Response {
    let (app, most) = (&app, app.config.limits.max_body_bytes);
    match method.as_str() {
        "ServerLive" => unary(most, request, |_: Empty, _| async move { Ok(IsSo { is_so: true }) }).await,
        "ServerReady" => unary(most, request, |_: Empty, _| async move { Ok(IsSo { is_so: app.is_ready() }) }).await,
        "ModelReady" => {
            unary(most, request, |asked: ModelRequest, _| async move {
                let state = app.models.states().find(|(name, _)| *name == asked.name).map(|(_, state)| state);
                let is_so = matches!(state, Some(ModelState::Ready(_))) && is_version(&asked.version);
                Ok(IsSo { is_so })
            })
            .await
        }
        "ServerMetadata" => {
            unary(most, request, |_: Empty, headers| async move {
                begin(app, GRPC, headers)?;
                let (name, version, extensions) = oip::server_metadata();
                let extensions = extensions.map(str::to_string).to_vec();
                Ok(ServerMetadata { name: name.into(), version: version.into(), extensions })
            })
            .await
        }
        "ModelMetadata" => {
            unary(most, request, |asked: ModelRequest, headers| async move {
                begin(app, GRPC, headers)?;
                metadata(&*model(app, &asked.name, &asked.version)?)
            })
            .await
        }
        "ModelInfer" => {
            unary(most, request, |asked: InferRequest, headers| async move {
                let mut call = begin(app, GRPC, headers)?;
                model_infer(&mut call, asked).await
            })
            .await
        }
        "ModelStreamInfer" => stream::answer(app.clone(), request).await,
        "RepositoryIndex" if !app.config.separate_admin => {
            unary(most, request, |_: Empty, headers| async move {
                begin(app, GRPC, headers)?;
                Ok(index(app))
            })
            .await
        }
        "RepositoryModelLoad" | "RepositoryModelUnload" if !app.config.separate_admin => {
            let is_load = method == "RepositoryModelLoad";
            unary(most, request, |asked: LoadRequest, headers| async move {
                begin(app, GRPC, headers)?;
                let name = if asked.second.is_empty() { asked.first } else { asked.second };
                load(app, name, is_load).await
            })
            .await
        }
        _ => Status::unimplemented("no such method").into_http::<Body>().into_response(),
    }
}

/// Answers a request with one message.
async fn unary<Q, A, F, R>(most: usize, request: Request, answer: F) -> Response
where
    Q: Message + Default + Send + 'static,
    A: Message + Default + Send + 'static,
    F: Fn(Q, HeaderMap) -> R,
    R: Future<Output = Result<A, Failure>> + Send,
{
    let headers = request.headers().clone();
    let service = tower::service_fn(|asked: tonic::Request<Q>| {
        let answered = answer(asked.into_inner(), headers.clone());
        async move {
            match answered.await {
                Ok(answer) => Ok(tonic::Response::new(answer)),
                Err(failure) => Err(failure.grpc()),
            }
        }
    });
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<A, Q>::default());
    grpc = grpc.apply_max_message_size_config(Some(most), None).accept_compressed(CompressionEncoding::Gzip);
    grpc.unary(service, request).await.map(Body::new)
}

/// Checks the key and reads the deadline of a request.
fn begin(app: &Arc<App>, door: Door, headers: HeaderMap) -> Result<Call, Failure> {
    let mut call = Call::begin(app.clone(), door, headers, Vec::new(), Instant::now())?;
    if let Some(traces) = &app.config.traces {
        call.trace = traces.begin(door.name, "", &call.headers);
    }
    if let Some(timeout) = call.headers.get("grpc-timeout").and_then(|value| value.to_str().ok()) {
        let timeout = timeout_of(timeout).ok_or_else(|| Failure::field("grpc-timeout", "a time", timeout))?;
        call.deadline = call.deadline.min(Instant::now() + timeout);
    }
    Ok(call)
}

/// A number of at most eight digits and a unit.
fn timeout_of(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok().filter(|_| number.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

fn is_version(version: &str) -> bool {
    version.is_empty() || version == VERSION
}

fn model(app: &App, name: &str, version: &str) -> Result<Arc<Served>, Failure> {
    match is_version(version) {
        true => app.models.named(name),
        false => {
            let message = format!("{name} has the version {VERSION} only, found {version:?}");
            Err(Failure::new(Reason::NotFound, message))
        }
    }
}

fn metadata(served: &Served) -> Result<ModelMetadata, Failure> {
    let (inputs, outputs) = oip::ports(served);
    let port =
        |(name, datatype, shape): oip::Port| TensorMetadata { name: name.into(), datatype: datatype.into(), shape };
    Ok(ModelMetadata {
        name: served.name.clone(),
        versions: vec![VERSION.into()],
        platform: "t5gemma".into(),
        inputs: inputs.into_iter().map(port).collect(),
        outputs: outputs.into_iter().map(port).collect(),
    })
}

fn index(app: &App) -> Index {
    let entry = |(name, state): (&str, ModelState)| {
        let state = match state {
            ModelState::Ready(_) => "READY",
            ModelState::Loading => "LOADING",
            ModelState::Unloaded(_) => "UNAVAILABLE",
        };
        IndexEntry { name: name.into(), version: VERSION.into(), state: state.into() }
    };
    Index { models: app.models.states().map(entry).collect() }
}

async fn load(app: &Arc<App>, name: String, is_load: bool) -> Result<Empty, Failure> {
    let (of_task, asked) = (app.clone(), name.clone());
    let change = move || match is_load {
        true => of_task.models.load(&asked, &of_task.config),
        false => of_task.models.unload(&asked),
    };
    match tokio::task::spawn_blocking(change).await {
        Ok(Ok(())) => Ok(Empty {}),
        Ok(Err(LoadError::NoSuchModel)) => {
            Err(Failure::new(Reason::NotFound, format!("no model of the name {name:?} is configured")))
        }
        Ok(Err(LoadError::Runtime(error))) => {
            crate::log::note(&format!("model {name}: {error}"));
            Err(Failure::new(Reason::Internal, format!("{name} does not open; the server's log says why")))
        }
        Err(_) => Err(Failure::new(Reason::Internal, format!("{name} could not be opened"))),
    }
}

async fn model_infer(call: &mut Call, asked: InferRequest) -> Result<InferResponse, Failure> {
    let served = model(&call.app, &asked.model_name, &asked.model_version)?;
    let (name, id) = (served.name.clone(), asked.id.clone());
    let outputs = infer::infer(call, served, read(asked)?).await?;
    Ok(write(name, id, outputs))
}

/// The request as other doors have it.
fn read(asked: InferRequest) -> Result<Infer, Failure> {
    let value = |parameter: Parameter| match parameter.choice {
        None => Value::Null,
        Some(Choice::Bool(flag)) => flag.into(),
        Some(Choice::Integer(integer)) => integer.into(),
        Some(Choice::Text(text)) => text.into(),
        Some(Choice::Number(number)) => number.into(),
        Some(Choice::Count(count)) => count.into(),
    };
    let parameters = asked.parameters.into_iter();
    // Triton's own are not generation options.
    let parameters = parameters.filter(|(name, _)| !name.starts_with("triton_"));
    let mut sorted: Vec<(String, Parameter)> = parameters.collect();
    sorted.sort_by(|(a, _), (b, _)| a.cmp(b));
    let parameters: Map<String, Value> = sorted.into_iter().map(|(name, it)| (name, value(it))).collect();
    let raw = &asked.raw_input_contents;
    if !raw.is_empty() && raw.len() != asked.inputs.len() {
        return Err(Failure::field("raw_input_contents", format_args!("{} tensors", asked.inputs.len()), raw.len()));
    }
    let tensor = |(at, input): (usize, TensorMessage)| {
        let data = match (raw.get(at), input.contents) {
            (Some(bytes), _) => Data::from_bytes(&input.name, &input.datatype, bytes)?,
            (None, contents) => {
                let contents = contents.unwrap_or_default();
                match input.datatype.as_str() {
                    "BYTES" => Data::Bytes(contents.bytes),
                    "INT64" => Data::Integers(contents.int64s),
                    "INT32" => Data::Integers(contents.ints.into_iter().map(i64::from).collect()),
                    "FP32" => Data::Floats(contents.floats),
                    other => return Err(other_type(&input.name, other)),
                }
            }
        };
        Tensor { name: input.name, shape: input.shape, data }.checked()
    };
    let inputs = asked.inputs.into_iter().enumerate().map(tensor).collect::<Result<_, Failure>>()?;
    let outputs = asked.outputs.into_iter().map(|output| output.name).collect();
    Ok(Infer { id: asked.id, parameters, inputs, outputs })
}

/// The answer, with raw elements.
fn write(model_name: String, id: String, outputs: Vec<Tensor>) -> InferResponse {
    let raw_output_contents = outputs.iter().map(|tensor| tensor.data.to_bytes()).collect();
    let message = |tensor: Tensor| TensorMessage {
        datatype: tensor.data.datatype().into(),
        name: tensor.name,
        shape: tensor.shape,
        contents: None,
    };
    InferResponse {
        model_name,
        model_version: VERSION.into(),
        id,
        parameters: Default::default(),
        outputs: outputs.into_iter().map(message).collect(),
        raw_output_contents,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_a_number_and_a_unit() {
        let cases = [
            ("5S", Some(Duration::from_secs(5))),
            ("100m", Some(Duration::from_millis(100))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1é", None),
        ];
        for (text, expected) in cases {
            assert_eq!(timeout_of(text), expected, "{text}");
        }
    }
}
