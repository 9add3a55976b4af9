//! `/v1/completions`.

use axum::response::Response;
use serde_json::{Map, Value, json};
use t5gemma_protocol::{ImageFields, Texts};
use t5gemma_runtime::{Event, Hypothesis, Tokenizer};

use super::options::{self, Asked};
use super::{error_event, fingerprint, finish_reason, usage};
use crate::call::{Call, Door, json_response};
use crate::doors::{now, token_text};
use crate::failure::{Failure, Form};
use crate::fields::{texts, tokens};
use crate::generating::{Ask, Generating};
use crate::live_text::LiveText;
use crate::models::Purpose;
use crate::sse::{self, Out, Stop};
use crate::stop_text::cut;

/// The door.
pub const DOOR: Door = Door::new("completions", Form::OpenAi);

/// Answers a request.
pub async fn answer(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let name = fields.text("model")?;
    let served = call.app.models.get(name.as_deref(), Purpose::Generate)?;
    call.limit(fields.number("timeout")?)?;
    let mut ask = Ask { is_lenient: true, ..Ask::default() };
    match fields.take("prompt") {
        None => return Err(Failure::field("prompt", "a text, a list of texts, token ids or a list of those", "none")),
        Some(prompt) => match (texts(&prompt), tokens(&prompt)) {
            (Some(texts), _) if !texts.is_empty() => ask.request.text = Some(Texts::Several(texts)),
            (_, Some(rows)) => ask.tokens = Some(rows),
            _ => {
                return Err(fields.refused("prompt", "a text, a list of texts, token ids or a list of those", &prompt));
            }
        },
    }
    let asked = options::take(fields, false)?;
    ask.request.options = asked.options.clone();
    ask.request.images =
        ImageFields { images: asked.images.clone(), pan_and_scan: asked.pan_and_scan, pixel_values: None };
    let mut generating = call.generate(served, ask).await?;
    let head = Head { id: format!("cmpl-{}", call.id), created: now() };
    if asked.stream {
        let app = call.app.clone();
        return Ok(sse::events(&app, |out| stream(out, generating, asked, head), error_event));
    }
    let rows = generating.rows().await?;
    let mut choices = Vec::new();
    for (index, hypothesis) in rows.iter().flatten().enumerate() {
        let text = cut(&generating.text(&hypothesis.tokens)?, &asked.stops);
        choices.push(choice(&generating, &asked, index, text, Some(hypothesis))?);
    }
    let mut body = head.object(&generating, choices);
    body["usage"] = usage(&generating);
    Ok(json_response(&body))
}

struct Head {
    id: String,
    created: u64,
}

impl Head {
    fn object(&self, generating: &Generating, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": generating.served.name,
            "system_fingerprint": fingerprint(&generating.served),
            "choices": choices,
        })
    }
}

/// A choice, or a piece of one; `hypothesis` if it is finished.
fn choice(
    generating: &Generating,
    asked: &Asked,
    index: usize,
    text: String,
    hypothesis: Option<&Hypothesis>,
) -> Result<Value, Failure> {
    let logprobs = match (hypothesis, asked.logprobs) {
        (Some(hypothesis), Some(_)) => logprobs(generating.tokenizer()?, hypothesis),
        _ => Value::Null,
    };
    let reason = hypothesis.map(|hypothesis| finish_reason(hypothesis.finish_reason));
    Ok(json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}))
}

fn logprobs(tokenizer: &Tokenizer, hypothesis: &Hypothesis) -> Value {
    let Some(found) = &hypothesis.logprobs else { return Value::Null };
    let mut offset = 0;
    let (mut pieces, mut offsets) = (Vec::new(), Vec::new());
    for &token in &hypothesis.tokens {
        let text = token_text(tokenizer, token);
        offsets.push(offset);
        offset += text.chars().count();
        pieces.push(text);
    }
    let top = |row: &Vec<(i64, f32)>| -> Value {
        let pair = |&(token, logprob): &(i64, f32)| (token_text(tokenizer, token), json!(logprob));
        row.iter().map(pair).collect::<Map<String, Value>>().into()
    };
    let top: Value = match found.top.is_empty() {
        true => Value::Null,
        false => found.top.iter().map(top).collect(),
    };
    json!({"tokens": pieces, "token_logprobs": found.tokens, "top_logprobs": top, "text_offset": offsets})
}

async fn stream(out: Out, mut generating: Generating, asked: Asked, head: Head) -> Result<(), Stop> {
    let live = |_| Ok(LiveText::new(generating.text_stream()?, &asked.stops));
    let mut live = (0..generating.source_lengths.len()).map(live).collect::<Result<Vec<_>, Failure>>()?;
    let chunk = |generating: &Generating, choices: Vec<Value>| {
        let mut chunk = head.object(generating, choices);
        if asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    };
    while let Some(event) = generating.next().await? {
        match event {
            // Log-probabilities come with the finished choice.
            Event::Token { row, token } if asked.logprobs.is_none() => {
                let piece = live[row].push(token)?;
                if !piece.is_empty() {
                    let choice = choice(&generating, &asked, row * asked.n, piece, None)?;
                    out.json(&chunk(&generating, vec![choice])).await?;
                }
            }
            Event::Row { row, hypotheses } => {
                for (at, hypothesis) in hypotheses.iter().enumerate() {
                    let text = generating.text(&hypothesis.tokens)?;
                    let rest = if at == 0 { live[row].rest(&text) } else { cut(&text, &asked.stops) };
                    let choice = choice(&generating, &asked, row * asked.n + at, rest, Some(hypothesis))?;
                    out.json(&chunk(&generating, vec![choice])).await?;
                }
            }
            _ => {}
        }
    }
    if asked.include_usage {
        let mut last = head.object(&generating, Vec::new());
        last["usage"] = usage(&generating);
        out.json(&last).await?;
    }
    Ok(out.data("[DONE]").await?)
}
