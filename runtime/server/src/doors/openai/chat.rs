//! `/v1/chat/completions`.

use axum::response::Response;
use serde_json::{Value, json};
use t5gemma_protocol::Images;
use t5gemma_runtime::{Event, Tokenizer};

use super::options::{self, Asked};
use super::{Scored, error_event, fingerprint, finish_reason, usage};
use crate::call::{Call, Door, json_response};
use crate::doors::{now, token_bytes, token_text};
use crate::failure::{Failure, Form};
use crate::generating::{Ask, Generating};
use crate::live_text::LiveText;
use crate::models::Purpose;
use crate::pictures;
use crate::sse::{self, Out, Stop};
use crate::stop_text::cut;

/// The door.
pub const DOOR: Door = Door::new("chat", Form::OpenAi);

/// Generated tokens of an answer, if nobody says.
const NEW_TOKENS: usize = 1024;

/// Answers a request.
pub async fn answer(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let name = fields.text("model")?;
    let served = call.app.models.get(name.as_deref(), Purpose::Generate)?;
    call.limit(fields.number("timeout")?)?;
    let messages = match fields.take("messages") {
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(fields.refused("messages", "a list of messages", &other)),
        None => return Err(Failure::field("messages", "a list of messages", "none")),
    };
    let reads_images = served.generator().is_some_and(|generator| generator.start_of_image().is_ok());
    let mut images = Vec::new();
    let messages = messages.into_iter().enumerate().map(|(at, message)| read(at, message, reads_images, &mut images));
    let messages = messages.collect::<Result<Vec<_>, Failure>>()?;
    let asked = options::take(fields, true)?;
    let mut ask = Ask { is_lenient: true, default_new_tokens: Some(NEW_TOKENS), ..Ask::default() };
    if images.is_empty() {
        ask.request.messages = Some(pictures::flattened(&messages, ""));
    } else {
        ask.request.messages = Some(messages);
        ask.request.images.images = Some(Images::One(images));
        ask.request.images.pan_and_scan = asked.pan_and_scan;
    }
    ask.request.options = asked.options.clone();
    let mut generating = call.generate(served, ask).await?;
    let head = Head { id: format!("chatcmpl-{}", call.id), created: now() };
    if asked.stream {
        let app = call.app.clone();
        return Ok(sse::events(&app, |out| stream(out, generating, asked, head), error_event));
    }
    let rows = generating.rows().await?;
    let mut choices = Vec::new();
    for (index, hypothesis) in rows.iter().flatten().enumerate() {
        let text = cut(&generating.text(&hypothesis.tokens)?, &asked.stops);
        choices.push(json!({
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": null},
            "logprobs": logprobs(&generating, Scored::of(hypothesis))?,
            "finish_reason": finish_reason(hypothesis.finish_reason),
        }));
    }
    let mut body = head.object("chat.completion", &generating, choices);
    body["usage"] = usage(&generating);
    Ok(json_response(&body))
}

/// The message with the parts of its content as chat templates read them. The URIs of its images go to `images`.
fn read(at: usize, mut message: Value, reads_images: bool, images: &mut Vec<String>) -> Result<Value, Failure> {
    let Some(parts) = message.get("content").and_then(Value::as_array) else { return Ok(message) };
    let mut read = Vec::with_capacity(parts.len());
    for (part_at, part) in parts.iter().enumerate() {
        let field = format!("messages[{at}].content[{part_at}]");
        match part.get("type").and_then(Value::as_str) {
            Some("text") => match part.get("text").and_then(Value::as_str) {
                Some(text) => read.push(json!({"type": "text", "text": text})),
                None => return Err(Failure::field(&field, "a part with a text", "none")),
            },
            Some("image_url") if reads_images => {
                images.push(pictures::of_part(&field, part)?);
                read.push(json!({"type": "image"}));
            }
            Some(other) => return Err(Failure::unsupported(&field, format_args!("the model reads no {other}"))),
            None => return Err(Failure::field(&field, "a part with a type", "none")),
        }
    }
    message["content"] = read.into();
    Ok(message)
}

struct Head {
    id: String,
    created: u64,
}

impl Head {
    fn object(&self, object: &str, generating: &Generating, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": generating.served.name,
            "system_fingerprint": fingerprint(&generating.served),
            "choices": choices,
        })
    }
}

fn logprobs(generating: &Generating, scored: Option<Scored>) -> Result<Value, Failure> {
    let Some(Scored { tokens, logprobs }) = scored else { return Ok(Value::Null) };
    let tokenizer = generating.tokenizer()?;
    let entry = |tokenizer: &Tokenizer, token: i64, logprob: f32| {
        let text = token_text(tokenizer, token);
        json!({"token": text, "logprob": logprob, "bytes": token_bytes(&text)})
    };
    let content = tokens.iter().zip(&logprobs.tokens).enumerate().map(|(at, (&token, &logprob))| {
        let top = logprobs.top.get(at).map(Vec::as_slice).unwrap_or_default().iter();
        let mut one = entry(tokenizer, token, logprob);
        one["top_logprobs"] = top.map(|&(token, logprob)| entry(tokenizer, token, logprob)).collect();
        one
    });
    Ok(json!({"content": content.collect::<Vec<_>>(), "refusal": null}))
}

async fn stream(out: Out, mut generating: Generating, asked: Asked, head: Head) -> Result<(), Stop> {
    let mut live = LiveText::new(generating.text_stream()?, &asked.stops);
    // The tokens of the text that was not sent yet.
    let mut unsent = Scored::default();
    let chunk = |generating: &Generating, index: usize, delta: Value, logprobs: Value, reason: Option<&str>| {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
        let mut chunk = head.object("chat.completion.chunk", generating, vec![choice]);
        if asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    };
    for index in 0..asked.n {
        let delta = json!({"role": "assistant", "content": ""});
        out.json(&chunk(&generating, index, delta, Value::Null, None)).await?;
    }
    while let Some(event) = generating.next().await? {
        match event {
            Event::Token { token, logprobs: of_token, .. } => {
                unsent.push(token, of_token);
                let piece = live.push(token)?;
                if !piece.is_empty() {
                    let logprobs = logprobs(&generating, unsent.take())?;
                    out.json(&chunk(&generating, 0, json!({"content": piece}), logprobs, None)).await?;
                }
            }
            Event::Row { hypotheses, .. } => {
                for (index, hypothesis) in hypotheses.iter().enumerate() {
                    let text = generating.text(&hypothesis.tokens)?;
                    let (rest, scored) = match index {
                        0 => (live.rest(&text), unsent.take()),
                        _ => (cut(&text, &asked.stops), Scored::of(hypothesis)),
                    };
                    let logprobs = logprobs(&generating, scored)?;
                    if !rest.is_empty() || !logprobs.is_null() {
                        out.json(&chunk(&generating, index, json!({"content": rest}), logprobs, None)).await?;
                    }
                    let reason = finish_reason(hypothesis.finish_reason);
                    out.json(&chunk(&generating, index, json!({}), Value::Null, Some(reason))).await?;
                }
            }
            _ => {}
        }
    }
    if asked.include_usage {
        let mut last = head.object("chat.completion.chunk", &generating, Vec::new());
        last["usage"] = usage(&generating);
        out.json(&last).await?;
    }
    Ok(out.data("[DONE]").await?)
}
