//! What is for who runs the server: metrics, and loading and unloading models by Triton's repository API.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodFilter;
use serde_json::{Value, json};

use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form, Reason};
use crate::models::{LoadError, Models, State};

const METRICS: Door = Door::open("metrics", Form::Plain);
const REPOSITORY: Door = Door::new("repository", Form::Plain);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = METRICS.route(router, MethodFilter::GET, "/metrics", metrics);
    let router = REPOSITORY.route(router, MethodFilter::POST, "/v2/repository/index", index);
    let router = REPOSITORY.route(router, MethodFilter::POST, "/v2/repository/models/{model}/load", load);
    REPOSITORY.route(router, MethodFilter::POST, "/v2/repository/models/{model}/unload", unload)
}

async fn metrics(call: Call) -> Result<Response, Failure> {
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, text)], call.app.metrics_text()).into_response())
}

async fn index(call: Call) -> Result<Response, Failure> {
    let ready_only = match call.body.is_empty() {
        true => false,
        false => call.fields()?.flag("ready")?.unwrap_or(false),
    };
    let entry = |(name, state): (&str, State)| {
        let (state, reason) = match state {
            State::Ready(_) => ("READY", String::new()),
            State::Loading => ("LOADING", String::new()),
            State::Unloaded(reason) => ("UNAVAILABLE", if reason.is_empty() { "unloaded".into() } else { reason }),
        };
        let is_listed = !ready_only || state == "READY";
        is_listed.then(|| json!({"name": name, "version": super::oip::VERSION, "state": state, "reason": reason}))
    };
    let entries: Vec<Value> = call.app.models.states().filter_map(entry).collect();
    Ok(json_response(&Value::from(entries)))
}

async fn load(call: Call) -> Result<Response, Failure> {
    changed(call, |models, name, config| models.load(name, config)).await
}

async fn unload(call: Call) -> Result<Response, Failure> {
    changed(call, |models, name, _| models.unload(name)).await
}

async fn changed(
    call: Call,
    change: fn(&Models, &str, &crate::config::Config) -> Result<(), LoadError>,
) -> Result<Response, Failure> {
    let (app, name) = (call.app.clone(), call.part("model").to_string());
    let of_task = name.clone();
    let done = tokio::task::spawn_blocking(move || change(&app.models, &of_task, &app.config)).await;
    match done {
        Ok(Ok(())) => Ok(json_response(&json!({}))),
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
