//! Whether the server lives and is ready, in everyone's form. None of these computes or needs a key.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::MethodFilter;
use serde_json::{Value, json};

use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};

const HEALTH: Door = Door::open("health", Form::Plain);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = HEALTH.route(router, MethodFilter::GET, "/health", ready);
    let router = HEALTH.route(router, MethodFilter::GET, "/ping", ready);
    let router = HEALTH.route(router, MethodFilter::GET, "/v2/health/ready", ready);
    HEALTH.route(router, MethodFilter::GET, "/v2/health/live", live)
}

async fn live(_: Call) -> Result<Response, Failure> {
    Ok(json_response(&json!({"live": true})))
}

async fn ready(call: Call) -> Result<Response, Failure> {
    let is_ready = call.app.is_ready();
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body: Value = json!({"ready": is_ready});
    Ok((status, json_response(&body)).into_response())
}
