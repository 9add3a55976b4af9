//! Triton's generate extension: `/v2/models/MODEL/generate` and `/generate_stream`, one text in, texts out.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Value, json};

use super::oip::infer::{Request, generate};
use super::oip::tensor::{Data, Tensor};
use super::oip::{VERSION, named};
use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};
use crate::generating::Generating;
use crate::live_text::LiveText;
use crate::sse::{self, Out, Stop};
use t5gemma_runtime::Event;

const GENERATE: Door = Door::new("triton_generate", Form::Plain);

/// Adds the routes.
pub fn routes(mut router: Router<Arc<App>>) -> Router<Arc<App>> {
    for path in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        router = GENERATE.route(router, MethodFilter::POST, &format!("{path}/generate"), whole);
        router = GENERATE.route(router, MethodFilter::POST, &format!("{path}/generate_stream"), stream);
    }
    router
}

async fn begin(call: &mut Call) -> Result<(String, Generating), Failure> {
    let served = named(call)?;
    let mut fields = call.fields()?;
    let id = fields.text("id")?.unwrap_or_default();
    let text = fields.texts("text_input")?.ok_or_else(|| Failure::field("text_input", "a text", "none"))?;
    let images = fields.texts("images")?;
    // Some clients say by which path they came.
    fields.flag("stream")?;
    let mut parameters = fields.object("parameters")?.map(crate::fields::Fields::into_rest).unwrap_or_default();
    parameters.extend(fields.into_rest());
    let shape = vec![text.len() as i64];
    let data = Data::Bytes(text.into_iter().map(String::into_bytes).collect());
    let mut inputs = vec![Tensor { name: "text_input".into(), shape, data }];
    if let Some(uris) = images {
        let data = Data::Bytes(uris.into_iter().map(String::into_bytes).collect::<Vec<_>>());
        inputs.push(Tensor { name: "images".into(), shape: vec![data.len() as i64], data });
    }
    let generating = generate(call, served, Request { parameters, inputs, ..Request::default() }).await?;
    Ok((id, generating))
}

fn answer(id: &str, generating: &Generating, text: Value) -> Value {
    let mut answer = json!({"model_name": generating.served.name, "model_version": VERSION, "text_output": text});
    if !id.is_empty() {
        answer["id"] = id.into();
    }
    answer
}

async fn whole(mut call: Call) -> Result<Response, Failure> {
    let (id, mut generating) = begin(&mut call).await?;
    let rows = generating.rows().await?;
    let texts = rows.iter().flatten().map(|hypothesis| generating.text(&hypothesis.tokens));
    let mut texts = texts.collect::<Result<Vec<_>, Failure>>()?;
    let text = match texts.len() {
        1 => texts.swap_remove(0).into(),
        _ => json!(texts),
    };
    Ok(json_response(&answer(&id, &generating, text)))
}

async fn stream(mut call: Call) -> Result<Response, Failure> {
    let (id, generating) = begin(&mut call).await?;
    let targets = generating.source_lengths.len() * generating.config.num_return_sequences;
    if targets != 1 {
        return Err(Failure::field("text_input", "one text with one target for a stream", targets));
    }
    Ok(sse::events(&call.app, |out| pieces(out, id, generating), |failure| failure.json(Form::Plain)))
}

async fn pieces(out: Out, id: String, mut generating: Generating) -> Result<(), Stop> {
    let mut live = LiveText::new(generating.text_stream()?, &[]);
    while let Some(event) = generating.next().await? {
        let piece = match event {
            Event::Token { token, .. } => live.push(token)?,
            Event::Row { hypotheses, .. } => match hypotheses.first() {
                Some(hypothesis) => live.rest(&generating.text(&hypothesis.tokens)?),
                None => continue,
            },
            _ => continue,
        };
        if !piece.is_empty() {
            out.json(&answer(&id, &generating, piece.into())).await?;
        }
    }
    Ok(())
}
