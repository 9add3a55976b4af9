//! `/v1/t5gemma`: the requests and results of `t5gemma generate --jsonl`, with everything that the models can do. The body
//! has one request a line; the answer has one result a line, in the same order. A client that accepts
//! `text/event-stream` sends one request and gets its tokens as they come, then the result.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Value, json};
use t5gemma_protocol::{
    ErrorResult, GenerateRequest, GenerateResponse, GenerateResult, Id, RequestError, Sequence, Usage, parse_object,
};
use t5gemma_runtime::{Event, Hypothesis, Logprobs};

use crate::app::App;
use crate::call::{Call, Door};
use crate::failure::{Failure, Form, Reason};
use crate::generating::{Ask, Generating};
use crate::live_text::LiveText;
use crate::models::Purpose;
use crate::sse::{self, Out, Stop};

const DOOR: Door = Door::new("t5gemma", Form::Plain);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = DOOR.route(router, MethodFilter::POST, "/v1/t5gemma", answer);
    DOOR.route(router, MethodFilter::POST, "/v1/t5gemma/{model}", answer)
}

async fn answer(call: Call) -> Result<Response, Failure> {
    let name = Some(call.part("model")).filter(|name| !name.is_empty());
    let served = match name {
        Some(name) => call.app.models.named(name)?,
        None => call.app.models.get(None, Purpose::Generate)?,
    };
    let text = str::from_utf8(&call.body)
        .map_err(|error| Failure::new(Reason::Invalid, t5gemma_protocol::describe_invalid_utf8(&call.body, &error)))?;
    let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_string).collect();
    let limit = call.app.config.limits.max_request_sources;
    if lines.is_empty() || lines.len() > limit {
        let reason = if lines.is_empty() { Reason::Empty } else { Reason::TooLarge };
        let message = format!("expected 1 to {limit} requests, one a line, found {}", lines.len());
        return Err(Failure::new(reason, message));
    }
    let accepts = call.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accepts.contains("text/event-stream") {
        let (_, request) = read(&lines[0], 0);
        let request = request?;
        if lines.len() > 1 {
            return Err(Failure::field("body", "one request for a stream of events", lines.len()));
        }
        let id = request.id.clone();
        let generating = call.generate(served, Ask { request, ..Ask::default() }).await?;
        return Ok(sse::events(&call.app, |out| stream(out, id, generating), |failure| failure.json(Form::Plain)));
    }
    let mut begun = Vec::with_capacity(lines.len());
    for (at, line) in lines.iter().enumerate() {
        let (id, request) = read(line, at);
        let generating = match request {
            Ok(request) => call.generate(served.clone(), Ask { request, ..Ask::default() }).await,
            Err(error) => Err(error.into()),
        };
        begun.push((id, generating));
    }
    // A client that should come again later needs a status for it.
    let is_late = |failure: &Failure| matches!(failure.reason, Reason::Full | Reason::Unavailable);
    if begun.iter().all(|(_, generating)| generating.as_ref().is_err_and(is_late)) {
        return Err(begun.swap_remove(0).1.expect_err("all have failed"));
    }
    let id = begun[0].0.clone();
    let error = move |failure: &Failure| line(Err((id.clone(), failure.clone())));
    Ok(sse::lines(&call.app, |out| results(out, begun), error))
}

/// The id and the request of a line.
fn read(line: &str, number: usize) -> (Id, Result<GenerateRequest, RequestError>) {
    let mut id = Id::from(number);
    let request = parse_object(line).and_then(|mut fields| {
        if let Some(given) = Id::take(&mut fields)? {
            id = given;
        }
        let mut request = GenerateRequest::try_from(fields)?;
        request.id = Some(id.clone());
        Ok(request)
    });
    (id, request)
}

fn line(result: Result<GenerateResult, (Id, Failure)>) -> Value {
    let response = match result {
        Ok(result) => GenerateResponse::Result(result),
        Err((id, failure)) => GenerateResponse::Error(ErrorResult { id: Some(id), error: failure.message }),
    };
    serde_json::to_value(response).unwrap_or_default()
}

/// Writes the results in order.
async fn results(out: Out, begun: Vec<(Id, Result<Generating, Failure>)>) -> Result<(), Stop> {
    for (id, generating) in begun {
        let result = async {
            let mut generating = generating?;
            let rows = generating.rows().await?;
            result(Some(id.clone()), &generating, &rows)
        };
        let result = result.await.map_err(|failure| (id.clone(), failure));
        out.raw(format!("{}\n", line(result))).await?;
    }
    Ok(())
}

/// The result of a request.
fn result(id: Option<Id>, generating: &Generating, rows: &[Vec<Hypothesis>]) -> Result<GenerateResult, Failure> {
    let tokenizer = generating.tokenizer().ok();
    let of_row = |(row, &length): (&Vec<Hypothesis>, &usize)| {
        row.iter().map(|hypothesis| Sequence::generated(hypothesis, length, tokenizer)).collect()
    };
    let sequences = rows.iter().zip(&generating.source_lengths).map(of_row);
    let sequences = sequences.collect::<Result<_, t5gemma_runtime::Error>>()?;
    let usage = Usage { source_tokens: generating.source_tokens, target_tokens: generating.target_tokens };
    Ok(GenerateResult { id, sequences, seed: generating.seed, usage })
}

/// Writes the tokens of each source's first target as they come, then the result.
async fn stream(out: Out, id: Option<Id>, mut generating: Generating) -> Result<(), Stop> {
    let live = |_| generating.text_stream().ok().map(|stream| LiveText::new(stream, &[]));
    let mut live: Vec<Option<LiveText>> = (0..generating.source_lengths.len()).map(live).collect();
    let mut rows = vec![Vec::new(); generating.source_lengths.len()];
    while let Some(event) = generating.next().await? {
        match event {
            Event::Token { row, token, logprobs } => {
                let text = live[row].as_mut().map(|live| live.push(token)).transpose()?;
                let mut piece = json!({"row": row, "token": token, "text": text});
                if let Some(Logprobs { tokens, top }) = logprobs {
                    piece["logprob"] = json!(tokens.first().copied().map(f64::from));
                    if let Some(top) = top.first() {
                        let top = top.iter().map(|&(token, logprob)| json!([token, f64::from(logprob)]));
                        piece["top_logprobs"] = top.collect();
                    }
                }
                out.json(&piece).await?;
            }
            Event::Row { row, hypotheses } => rows[row] = hypotheses,
            _ => {}
        }
    }
    Ok(out.json(&line(Ok(result(id, &generating, &rows)?))).await?)
}
