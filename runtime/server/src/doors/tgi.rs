//! The API of Text Generation Inference: `/generate` and `/generate_stream`, and what `/` and `/info` say for models that
//! generate.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Map, Value, json};
use t5gemma_protocol::{GENERATION_OPTIONS, Images, Texts};
use t5gemma_runtime::{Event, FinishReason, Hypothesis, Tokenizer};

use super::sampling::samples;
use super::{is_special, token_text};
use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};
use crate::fields::Fields;
use crate::generating::{Ask, Generating};
use crate::live_text::LiveText;
use crate::models::Purpose;
use crate::pictures;
use crate::served::Served;
use crate::sse::{self, Out, Stop};

const GENERATE: Door = Door::new("generate", Form::Tgi);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = GENERATE.route(router, MethodFilter::POST, "/generate", generate);
    GENERATE.route(router, MethodFilter::POST, "/generate_stream", generate_stream)
}

async fn generate(call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    fields.take("stream");
    let asked = Asked::take(&mut fields)?;
    let served = call.app.models.get(asked.model.as_deref(), Purpose::Generate)?;
    let answers = asked.answers(call, served).await?;
    Ok(json_response(&answers.into_iter().next().unwrap_or_default()))
}

async fn generate_stream(call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    fields.take("stream");
    let asked = Asked::take(&mut fields)?;
    let served = call.app.models.get(asked.model.as_deref(), Purpose::Generate)?;
    asked.stream(call, served).await
}

/// A request.
#[derive(Debug)]
pub struct Asked {
    /// The model that it names, if it does.
    pub model: Option<String>,
    ask: Ask,
    timeout: Option<f64>,
    details: bool,
    best_of: bool,
    top_tokens: bool,
}

impl Asked {
    /// Takes all fields.
    ///
    /// # Errors
    /// A field of the wrong form, or one that does not exist.
    pub fn take(fields: &mut Fields) -> Result<Asked, Failure> {
        let model = fields.text("model")?;
        let texts = match fields.texts("inputs")? {
            Some(texts) if !texts.is_empty() => texts,
            _ => return Err(Failure::field("inputs", "a text", "none")),
        };
        let timeout = fields.number("timeout")?;
        let mut parameters = fields.object("parameters")?.unwrap_or_else(|| Fields::of(Map::new()));
        if let Some(name) = fields.left().find(|name| !["options", "adapter_id"].contains(&name.as_str())) {
            let message = format!("{name}: no such field");
            return Err(Failure {
                field: Some(name.clone()),
                ..Failure::new(crate::failure::Reason::Invalid, message)
            });
        }
        let mut options = Map::new();
        let mut set = |name: &str, value: Value| options.insert(name.to_string(), value);
        // Each of its own name, except these.
        if let Some(stops) = parameters.texts("stop")?.filter(|stops| !stops.is_empty()) {
            set("stop_strings", json!(stops));
        }
        if let Some(grammar) = parameters.object("grammar")? {
            let (name, value) = constraint(grammar)?;
            set(name, value);
        }
        if let Some(adapter) = parameters.text("adapter_id")?.or(fields.text("adapter_id")?) {
            set("adapter", adapter.into());
        }
        let best_of = parameters.count("best_of")?.filter(|&best_of| best_of > 1);
        if let Some(best_of) = best_of {
            set("num_return_sequences", best_of.into());
        }
        let top_n = parameters.count("top_n_tokens")?.filter(|&top_n| top_n > 0);
        if let Some(top_n) = top_n {
            set("top_logprobs", top_n.into());
        }
        let details = parameters.flag("details")?.unwrap_or(false);
        if details || best_of.is_some() || top_n.is_some() {
            set("output_logprobs", true.into());
        }
        if parameters.flag("watermark")?.unwrap_or(false) {
            return Err(Failure::unsupported("parameters.watermark", "no text is marked"));
        }
        let truncate = parameters.count("truncate")?;
        let mut nested = parameters.object("generate_parameters")?;
        for option in GENERATION_OPTIONS {
            let inner = nested.as_mut().and_then(|nested| nested.take(option.name));
            if let Some(value) = parameters.take(option.name).or(inner) {
                options.entry(option.name).or_insert(value);
            }
        }
        for name in WITHOUT_EFFECT {
            parameters.take(name);
        }
        parameters.end()?;
        nested.map_or(Ok(()), Fields::end)?;
        samples(&mut options);
        let mut ask = Ask { is_lenient: true, ..Ask::default() };
        ask.request.text = Some(Texts::Several(texts));
        ask.request.options = options;
        ask.keep_last = truncate.map(|most| most.max(1) as usize);
        Ok(Asked { model, ask, timeout, details, best_of: best_of.is_some(), top_tokens: top_n.is_some() })
    }

    /// Generates, and returns an answer for each text, or for each of its targets.
    ///
    /// # Errors
    /// Why the request failed.
    pub async fn answers(mut self, mut call: Call, served: Arc<Served>) -> Result<Vec<Value>, Failure> {
        call.limit(self.timeout)?;
        self.find_images(&served);
        let mut generating = call.generate(served, self.ask.clone()).await?;
        let rows = generating.rows().await?;
        let mut answers = Vec::new();
        for row in &rows {
            if !self.best_of {
                for hypothesis in row {
                    answers.push(self.answer(&generating, hypothesis)?);
                }
                continue;
            }
            let of = |hypothesis: &Hypothesis| hypothesis.logprobs.as_ref().map_or(0.0, |found| found.sum());
            let mut sorted: Vec<&Hypothesis> = row.iter().collect();
            sorted.sort_by(|a, b| of(b).total_cmp(&of(a)));
            let mut answer = self.answer(&generating, sorted[0])?;
            if self.details {
                let others = sorted[1..].iter().map(|it| {
                    let mut other = details(&generating, it, self.top_tokens)?;
                    other["generated_text"] = generating.text(&it.tokens)?.into();
                    Ok(other)
                });
                answer["details"]["best_of_sequences"] = others.collect::<Result<Vec<_>, Failure>>()?.into();
            }
            answers.push(answer);
        }
        Ok(answers)
    }

    /// Takes the images out of the texts, where the model reads some.
    fn find_images(&mut self, served: &Served) {
        let Some(start) = served.generator().and_then(|generator| generator.start_of_image().ok()) else { return };
        let Some(texts) = &self.ask.request.text else { return };
        let found = texts.rows().iter().map(|text| pictures::in_markdown(text, &start));
        let (texts, images): (Vec<String>, Vec<Vec<String>>) = found.unzip();
        if images.iter().any(|images| !images.is_empty()) {
            self.ask.request.text = Some(Texts::Several(texts));
            self.ask.request.images.images = Some(Images::Several(images));
        }
    }

    fn answer(&self, generating: &Generating, hypothesis: &Hypothesis) -> Result<Value, Failure> {
        let mut answer = json!({"generated_text": generating.text(&hypothesis.tokens)?});
        if self.details {
            answer["details"] = details(generating, hypothesis, self.top_tokens)?;
        }
        Ok(answer)
    }

    /// Generates a stream of tokens.
    ///
    /// # Errors
    /// Why the request is not begun.
    pub async fn stream(mut self, mut call: Call, served: Arc<Served>) -> Result<Response, Failure> {
        call.limit(self.timeout)?;
        self.find_images(&served);
        if self.best_of {
            return Err(Failure::unsupported("parameters.best_of", "a stream has one target"));
        }
        let generating = call.generate(served, self.ask).await?;
        if generating.source_lengths.len() > 1 {
            return Err(Failure::field("inputs", "one text for a stream", generating.source_lengths.len()));
        }
        Ok(sse::events(&call.app, |out| stream(out, generating), |failure| failure.json(Form::Tgi)))
    }
}

/// Parameters without an effect on a result of an encoder-decoder model.
const WITHOUT_EFFECT: [&str; 7] = [
    "clean_up_tokenization_spaces",
    "decoder_input_details",
    "return_full_text",
    "src_lang",
    "tgt_lang",
    "truncation",
    "watermark",
];

/// The option that a grammar sets.
fn constraint(mut grammar: Fields) -> Result<(&'static str, Value), Failure> {
    let kind = grammar.text("type")?;
    let value = grammar.take("value").unwrap_or_default();
    // A schema may be text.
    let schema = |value: Value| match &value {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| Failure::field("parameters.grammar.value", "a JSON Schema", error)),
        _ => Ok(value),
    };
    match kind.as_deref() {
        Some("regex") => Ok(("regex", value)),
        Some("json") => Ok(("json_schema", schema(value)?)),
        Some("json_schema") => {
            let inner = value.get("schema").cloned().unwrap_or(value);
            Ok(("json_schema", schema(inner)?))
        }
        other => {
            let found = other.map_or("none".to_string(), |other| format!("{other:?}"));
            Err(Failure::field("parameters.grammar.type", "regex, json or json_schema", found))
        }
    }
}

/// Why a target ended, in TGI's words.
fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::StopString => "stop_sequence",
        FinishReason::Eos | FinishReason::Constraint => "eos_token",
        _ => "length",
    }
}

fn details(generating: &Generating, hypothesis: &Hypothesis, top_tokens: bool) -> Result<Value, Failure> {
    let tokenizer = generating.tokenizer()?;
    let logprobs = hypothesis.logprobs.as_ref();
    let token = |(at, &token): (usize, &i64)| {
        entry(tokenizer, token, &token_text(tokenizer, token), logprobs.and_then(|found| found.tokens.get(at).copied()))
    };
    let tokens: Vec<Value> = hypothesis.tokens.iter().enumerate().map(token).collect();
    let mut details = json!({
        "finish_reason": finish_reason(hypothesis.finish_reason),
        "generated_tokens": hypothesis.tokens.len(),
        "seed": generating.seed,
        "prefill": [],
        "tokens": tokens,
    });
    if let Some(found) = logprobs.filter(|_| top_tokens) {
        details["top_tokens"] = found.top.iter().map(|top| entries(tokenizer, top)).collect();
    }
    Ok(details)
}

/// The likeliest tokens in one place.
fn entries(tokenizer: &Tokenizer, top: &[(i64, f32)]) -> Value {
    let one = |&(token, logprob): &(i64, f32)| entry(tokenizer, token, &token_text(tokenizer, token), Some(logprob));
    top.iter().map(one).collect()
}

fn entry(tokenizer: &Tokenizer, token: i64, text: &str, logprob: Option<f32>) -> Value {
    json!({"id": token, "text": text, "logprob": logprob, "special": is_special(tokenizer, token)})
}

/// Writes an event for each token. The last one has the whole text, so a token that may be the last waits for the next.
async fn stream(out: Out, mut generating: Generating) -> Result<(), Stop> {
    let tokenizer = generating.tokenizer()?.clone();
    let mut live = LiveText::new(generating.text_stream()?, &[]);
    let config = generating.config.clone();
    let most = config.max_length(1).saturating_sub(1);
    let may_end_anywhere = config.max_time.is_some()
        || config.json_schema.is_some()
        || config.regex.is_some()
        || config.grammar.is_some()
        || !config.allowed_sequences.is_empty()
        || !config.required_phrases.is_empty();
    let (mut waiting, mut count, mut text) = (None, 0, String::new());
    while let Some(event) = generating.next().await? {
        match event {
            Event::Token { token, logprobs, .. } => {
                if let Some(before) = waiting.take() {
                    out.json(&before).await?;
                }
                count += 1;
                let piece = live.push(token)?;
                text.push_str(&piece);
                // A special token has no text, so that the texts of all events make the whole one.
                let shown = if is_special(&tokenizer, token) { String::new() } else { piece };
                let logprob = logprobs.as_ref().and_then(|found| found.tokens.first().copied());
                let mut event = json!({
                    "index": count,
                    "token": entry(&tokenizer, token, &shown, logprob),
                    "generated_text": null,
                    "details": null,
                });
                if let Some(top) = logprobs.as_ref().and_then(|found| found.top.first()) {
                    event["top_tokens"] = entries(&tokenizer, top);
                }
                let may_be_last = may_end_anywhere
                    || config.eos_token_id.contains(&token)
                    || count >= most
                    || config.stop_strings.iter().any(|stop| text.contains(stop.as_str()));
                match may_be_last {
                    true => waiting = Some(event),
                    false => out.json(&event).await?,
                }
            }
            Event::Row { hypotheses, .. } => {
                let Some(hypothesis) = hypotheses.first() else { continue };
                let token = hypothesis.tokens.last().copied().unwrap_or(config.pad_token_id);
                let mut last = waiting.take().unwrap_or_else(|| {
                    let logprob = hypothesis.logprobs.as_ref().and_then(|found| found.tokens.last().copied());
                    json!({"index": count, "token": entry(&tokenizer, token, "", logprob)})
                });
                let whole = generating.text(&hypothesis.tokens)?;
                // Bytes of a character that the target ended in.
                let rest = live.rest(&whole);
                if !rest.is_empty() {
                    last["token"]["text"] = rest.into();
                }
                last["generated_text"] = whole.into();
                last["details"] = json!({
                    "finish_reason": finish_reason(hypothesis.finish_reason),
                    "generated_tokens": hypothesis.tokens.len(),
                    "seed": generating.seed,
                    "input_length": generating.source_tokens,
                });
                out.json(&last).await?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// What `/info` says.
pub fn info(app: &App, served: &Served) -> Value {
    let limits = &app.config.limits;
    let facts = &served.manifest().facts;
    json!({
        "model_id": served.name,
        "model_sha": served.sha256(),
        "model_dtype": served.manifest().dtype.to_string(),
        "model_device_type": app.config.open.provider.kind.name(),
        "model_pipeline_tag": app.config.pipeline_tag.as_deref().unwrap_or("text2text-generation"),
        "max_concurrent_requests": limits.max_requests,
        "max_best_of": limits.max_request_rows,
        "max_stop_sequences": 4,
        "max_input_tokens": facts.encoder.max_position_embeddings,
        "max_total_tokens": facts.encoder.max_position_embeddings + facts.decoder.max_position_embeddings,
        "max_client_batch_size": limits.max_request_sources,
        "validation_workers": 1,
        "router": "t5gemma",
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
    })
}
