//! `ModelStreamInfer`: requests on a stream, each answered by several messages as its tokens come. The parameter
//! `triton_final_response` marks the last one.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use futures_util::stream;
use t5gemma_runtime::{Event, Task};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Sender, channel};
use tonic::codec::CompressionEncoding;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::messages::{Choice, InferRequest, InferResponse, Parameter, StreamResponse};
use super::{GRPC, begin, model, read, write};
use crate::app::App;
use crate::call::Call;
use crate::doors::oip::infer;
use crate::doors::oip::tensor::{Data, Tensor};
use crate::failure::{Failure, Reason};
use crate::live_text::LiveText;

/// Requests of one stream that are answered at once.
const AT_ONCE: usize = 64;
/// Messages that wait for a slow reader.
const BUFFERED: usize = 16;
/// Set by clients that want a last message without outputs.
const EMPTY_FINAL: &str = "triton_enable_empty_final_response";
const FINAL: &str = "triton_final_response";

type Out = Sender<Result<StreamResponse, Status>>;

/// Answers a stream.
pub async fn answer(app: Arc<App>, request: Request) -> Response {
    let headers = request.headers().clone();
    let most = app.config.limits.max_body_bytes;
    let service = tower::service_fn(|asked: tonic::Request<Streaming<InferRequest>>| {
        let (app, headers) = (app.clone(), headers.clone());
        async move {
            // The key is checked before anything is read.
            begin(&app, GRPC, headers.clone()).map_err(|failure| failure.grpc())?;
            let (send, receive) = channel(BUFFERED);
            tokio::spawn(requests(app, headers, asked.into_inner(), send));
            let messages = stream::unfold(receive, async |mut receive| Some((receive.recv().await?, receive)));
            Ok::<_, Status>(tonic::Response::new(Box::pin(messages)))
        }
    });
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<StreamResponse, InferRequest>::default());
    grpc = grpc.apply_max_message_size_config(Some(most), None).accept_compressed(CompressionEncoding::Gzip);
    grpc.streaming(service, request).await.map(Body::new)
}

/// Reads requests and answers each in a task of its own, until the client ends or leaves.
async fn requests(app: Arc<App>, headers: HeaderMap, mut asked: Streaming<InferRequest>, out: Out) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place.expect("nobody closes it"),
            () = out.closed() => return,
        };
        let next = tokio::select! {
            next = asked.message() => next,
            () = out.closed() => return,
        };
        let Ok(Some(request)) = next else { return };
        let (app, headers, out) = (app.clone(), headers.clone(), out.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = out.closed() => {}
                () = one(app, headers, request, &out) => {}
            }
            drop(place);
        });
    }
}

async fn one(app: Arc<App>, headers: HeaderMap, request: InferRequest, out: &Out) {
    let (model_name, id) = (request.model_name.clone(), request.id.clone());
    let answered = async {
        let mut call = begin(&app, GRPC, headers)?;
        parts(&mut call, request, out).await
    };
    if let Err(failure) = answered.await {
        app.metrics.refused(failure.reason.name());
        let failed = InferResponse { parameters: marked(true), ..write(model_name, id, Vec::new()) };
        let _ = out.send(Ok(StreamResponse { error_message: failure.message, infer_response: Some(failed) })).await;
    }
}

fn marked(is_final: bool) -> HashMap<String, Parameter> {
    HashMap::from([(FINAL.to_string(), Parameter { choice: Some(Choice::Bool(is_final)) })])
}

async fn parts(call: &mut Call, request: InferRequest, out: &Out) -> Result<(), Failure> {
    let has_empty_final =
        matches!(request.parameters.get(EMPTY_FINAL), Some(Parameter { choice: Some(Choice::Bool(true)) }));
    let served = model(&call.app, &request.model_name, &request.model_version)?;
    let patience = call.app.config.limits.read_timeout;
    let (name, id) = (served.name.clone(), request.id.clone());
    let send = async |outputs: Vec<Tensor>, is_final: bool| {
        let response = InferResponse { parameters: marked(is_final), ..write(name.clone(), id.clone(), outputs) };
        // If the client has left, this task ends anyway; it ends as well if the client reads nothing.
        let message = Ok(StreamResponse { error_message: String::new(), infer_response: Some(response) });
        let sent = tokio::time::timeout(patience, out.send(message)).await;
        sent.map(drop).map_err(|_| Failure::new(Reason::Slow, "the client reads nothing"))
    };
    let asked = read(request)?;
    if *served.task() != Task::Text2TextGeneration {
        let outputs = infer::infer(call, served, asked).await?;
        send(outputs, !has_empty_final).await?;
    } else {
        let mut generating = infer::generate(call, served, asked).await?;
        let targets = generating.source_lengths.len() * generating.config.num_return_sequences;
        if targets != 1 {
            return Err(Failure::field("text_input", "one text with one target for a stream", targets));
        }
        let mut live = LiveText::new(generating.text_stream()?, &[]);
        let tensor = |name: &str, text: &str| {
            let data = Data::Bytes(vec![text.as_bytes().to_vec()]);
            Tensor { name: name.into(), shape: vec![1], data }
        };
        while let Some(event) = generating.next().await? {
            match event {
                Event::Token { token, .. } => {
                    let piece = live.push(token)?;
                    if !piece.is_empty() {
                        send(vec![tensor("text_output", &piece)], false).await?;
                    }
                }
                Event::Row { hypotheses, .. } => {
                    let Some(hypothesis) = hypotheses.first() else { continue };
                    let rest = live.rest(&generating.text(&hypothesis.tokens)?);
                    let reason = hypothesis.finish_reason.as_str();
                    let outputs = vec![tensor("text_output", &rest), tensor("finish_reason", reason)];
                    send(outputs, !has_empty_final).await?;
                }
                _ => {}
            }
        }
    }
    if has_empty_final {
        send(Vec::new(), true).await?;
    }
    Ok(())
}
