//! `/v1/completions`.

use axum::response::Response;
use serde_json::{Map, Value, json};
use t5gemma_protocol::{ImageFields, Texts};
use t5gemma_runtime::{Event, Hypothesis, Tokenizer};

use super::options::{self, Asked};
use super::{Scored, error_event, fingerprint, finish_reason, usage};
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
        choices.push(choice(index, text, logprobs_of(&generating, hypothesis)?, Some(hypothesis)));
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
fn choice(index: usize, text: String, logprobs: Option<Value>, hypothesis: Option<&Hypothesis>) -> Value {
    let reason = hypothesis.map(|hypothesis| finish_reason(hypothesis.finish_reason));
    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
}

/// The log-probabilities of some tokens. `offset` is where the first one's text begins, in characters; it becomes where
/// the last one's ends.
fn logprobs(tokenizer: &Tokenizer, Scored { tokens, logprobs }: &Scored, offset: &mut usize) -> Value {
    let (mut pieces, mut offsets) = (Vec::new(), Vec::new());
    for &token in tokens {
        let text = token_text(tokenizer, token);
        offsets.push(*offset);
        *offset += text.chars().count();
        pieces.push(text);
    }
    let top = |row: &Vec<(i64, f32)>| -> Value {
        let pair = |&(token, logprob): &(i64, f32)| (token_text(tokenizer, token), json!(logprob));
        row.iter().map(pair).collect::<Map<String, Value>>().into()
    };
    let top: Value = match logprobs.top.is_empty() {
        true => Value::Null,
        false => logprobs.top.iter().map(top).collect(),
    };
    json!({"tokens": pieces, "token_logprobs": logprobs.tokens, "top_logprobs": top, "text_offset": offsets})
}

/// The log-probabilities of a whole target, if they were asked for.
fn logprobs_of(generating: &Generating, hypothesis: &Hypothesis) -> Result<Option<Value>, Failure> {
    let scored = Scored::of(hypothesis);
    scored.map(|scored| Ok(logprobs(generating.tokenizer()?, &scored, &mut 0))).transpose()
}

/// The log-probabilities of the tokens that were not sent yet, if they were asked for.
fn unsent_logprobs(generating: &Generating, (scored, offset): &mut (Scored, usize)) -> Result<Option<Value>, Failure> {
    scored.take().map(|scored| Ok(logprobs(generating.tokenizer()?, &scored, offset))).transpose()
}

async fn stream(out: Out, mut generating: Generating, asked: Asked, head: Head) -> Result<(), Stop> {
    let live = |_| Ok(LiveText::new(generating.text_stream()?, &asked.stops));
    let mut live = (0..generating.source_lengths.len()).map(live).collect::<Result<Vec<_>, Failure>>()?;
    // The tokens of the text that was not sent yet, and where that begins.
    let mut unsent: Vec<(Scored, usize)> = live.iter().map(|_| Default::default()).collect();
    let chunk = |generating: &Generating, choices: Vec<Value>| {
        let mut chunk = head.object(generating, choices);
        if asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    };
    while let Some(event) = generating.next().await? {
        match event {
            Event::Token { row, token, logprobs } => {
                unsent[row].0.push(token, logprobs);
                let piece = live[row].push(token)?;
                if !piece.is_empty() {
                    let choice = choice(row * asked.n, piece, unsent_logprobs(&generating, &mut unsent[row])?, None);
                    out.json(&chunk(&generating, vec![choice])).await?;
                }
            }
            Event::Row { row, hypotheses } => {
                for (at, hypothesis) in hypotheses.iter().enumerate() {
                    let text = generating.text(&hypothesis.tokens)?;
                    let (rest, logprobs) = match at {
                        0 => (live[row].rest(&text), unsent_logprobs(&generating, &mut unsent[row])?),
                        _ => (cut(&text, &asked.stops), logprobs_of(&generating, hypothesis)?),
                    };
                    let choice = choice(row * asked.n + at, rest, logprobs, Some(hypothesis));
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
