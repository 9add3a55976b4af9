//! What clients of Hugging Face's inference API send to `/`, whatever the model is for, and `/info`.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Value, json};
use t5gemma_runtime::Task;

use super::{tei, tgi};
use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};
use crate::fields::Fields;
use crate::models::Purpose;

const ROOT: Door = Door::new("root", Form::Tgi);
const INFO: Door = Door::new("info", Form::Tgi);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = ROOT.route(router, MethodFilter::POST, "/", root);
    INFO.route(router, MethodFilter::GET, "/info", info)
}

async fn root(call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    // Some clients ask the first model for what another one does.
    let is_object = fields.has_object("inputs");
    let purpose = if is_object { Purpose::Embed } else { Purpose::Any };
    let served = call.app.models.get(model.as_deref(), purpose)?;
    match served.task() {
        _ if is_object => tei::similar(call, fields, served).await,
        Task::Text2TextGeneration => generated(call, fields, served).await,
        Task::FeatureExtraction(_) => tei::embedded(call, fields, served).await,
        _ => tei::predicted(call, fields, served).await,
    }
}

async fn generated(call: Call, mut fields: Fields, served: Arc<crate::served::Served>) -> Result<Response, Failure> {
    let is_stream = fields.flag("stream")?.unwrap_or(false);
    let asked = tgi::Asked::take(&mut fields)?;
    if is_stream {
        return asked.stream(call, served).await;
    }
    let tag = call.app.config.pipeline_tag.clone();
    let mut answers = asked.answers(call, served).await?;
    for answer in &mut answers {
        let text = answer["generated_text"].clone();
        // Without a task, all names: clients read the one that they know.
        match tag.as_deref() {
            Some("text-generation") => {}
            Some("summarization") => *answer = json!({"summary_text": text}),
            Some("translation") => *answer = json!({"translation_text": text}),
            _ => {
                answer["summary_text"] = text.clone();
                answer["translation_text"] = text;
            }
        }
    }
    Ok(json_response(&Value::from(answers)))
}

async fn info(call: Call) -> Result<Response, Failure> {
    let served = call.app.models.get(None, Purpose::Any)?;
    Ok(json_response(&match served.task() {
        Task::Text2TextGeneration => tgi::info(&call.app, &served),
        _ => tei::info(&call.app, &served),
    }))
}
