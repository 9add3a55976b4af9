//! `grpc.health.v1.Health`, for probes of Kubernetes and load balancers. Needs no key.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tonic::Status;
use tonic_prost::ProstCodec;

use super::messages::{Health, HealthRequest, HealthResponse};
use crate::app::App;
use crate::failure::{Failure, Reason};

/// Bytes of a request.
const MOST: usize = 4096;
/// How often a watched health is looked at.
const LOOK: Duration = Duration::from_millis(500);

fn status(app: &App, service: &str) -> Health {
    match service {
        "" | "inference.GRPCInferenceService" | "grpc.health.v1.Health" => match app.is_ready() {
            true => Health::Serving,
            false => Health::NotServing,
        },
        _ => Health::ServiceUnknown,
    }
}

/// Answers a request.
pub async fn answer(State(app): State<Arc<App>>, Path(method): Path<String>, request: Request) -> Response {
    match method.as_str() {
        "Check" => {
            let app = &app;
            super::unary(MOST, request, |asked: HealthRequest, _| async move {
                match status(app, &asked.service) {
                    Health::ServiceUnknown => Err(Failure::new(Reason::NotFound, "no such service")),
                    known => Ok(HealthResponse { status: known as i32 }),
                }
            })
            .await
        }
        "Watch" => watch(app, request).await,
        _ => Status::unimplemented("no such method").into_http::<Body>().into_response(),
    }
}

async fn watch(app: Arc<App>, request: Request) -> Response {
    let service = tower::service_fn(|asked: tonic::Request<HealthRequest>| {
        let (app, service) = (app.clone(), asked.into_inner().service);
        let changes = stream::unfold(None, move |last: Option<Health>| {
            let (app, service) = (app.clone(), service.clone());
            async move {
                loop {
                    let now = status(&app, &service);
                    if last != Some(now) {
                        return Some((Ok::<_, Status>(HealthResponse { status: now as i32 }), Some(now)));
                    }
                    // A server that has ended its connections needs no more watching.
                    tokio::time::sleep(LOOK).await;
                }
            }
        });
        async move { Ok::<_, Status>(tonic::Response::new(changes)) }
    });
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<HealthResponse, HealthRequest>::default());
    grpc = grpc.apply_max_message_size_config(Some(MOST), None);
    grpc.server_streaming(service, request).await.map(Body::new)
}
