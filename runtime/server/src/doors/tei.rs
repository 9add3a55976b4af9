//! The API of Text Embeddings Inference: `/embed`, `/embed_all`, `/predict`, `/rerank`, `/similarity`, `/tokenize` and
//! `/decode`, and what `/` and `/info` say for models that embed or classify.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::MethodFilter;
use serde_json::{Map, Value, json};
use t5gemma_protocol::Tokenize;
use t5gemma_runtime::{SpecialTokens, Task};

use super::is_special;
use crate::app::App;
use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form, Reason};
use crate::fields::{Fields, texts, tokens};
use crate::models::Purpose;
use crate::served::Served;
use crate::truncation::Side;
use crate::vectors::{Inputs, Row, Sources, Wanted, cosine};

const EMBED: Door = Door::new("embed", Form::Tei);
const PREDICT: Door = Door::new("predict", Form::Tei);
const RERANK: Door = Door::new("rerank", Form::Tei);
const TOKENIZE: Door = Door::new("tokenize", Form::Tei);

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = EMBED.route(router, MethodFilter::POST, "/embed", embed);
    let router = EMBED.route(router, MethodFilter::POST, "/embed_all", embed_all);
    let router = EMBED.route(router, MethodFilter::POST, "/similarity", similarity);
    let router = PREDICT.route(router, MethodFilter::POST, "/predict", predict);
    let router = RERANK.route(router, MethodFilter::POST, "/rerank", rerank);
    let router = TOKENIZE.route(router, MethodFilter::POST, "/tokenize", tokenize);
    TOKENIZE.route(router, MethodFilter::POST, "/decode", decode)
}

/// How texts are shortened; takes the fields that say so.
fn truncation(fields: &mut Fields) -> Result<Option<Side>, Failure> {
    let is_on = fields.flag("truncate")?.unwrap_or(false);
    let side = match fields.text("truncation_direction")?.as_deref() {
        None | Some("Right" | "right") => Side::Right,
        Some("Left" | "left") => Side::Left,
        Some(other) => {
            return Err(Failure::field("truncation_direction", "Right or Left", format_args!("{other:?}")));
        }
    };
    if let Some(name) = fields.text("prompt_name")? {
        return Err(Failure::unsupported("prompt_name", format_args!("the model has no prompt {name:?}")));
    }
    Ok(is_on.then_some(side))
}

fn sources(fields: &mut Fields) -> Result<Sources, Failure> {
    let expected = "a text, a list of texts, token ids or a list of those";
    let Some(given) = fields.take("inputs") else { return Err(Failure::field("inputs", expected, "none")) };
    match (texts(&given), tokens(&given)) {
        (Some(texts), _) if texts.iter().all(|text| !text.is_empty()) => Ok(Sources::Texts(texts)),
        (Some(_), _) => Err(Failure::new(Reason::Empty, "inputs: expected texts, found an empty one")),
        (_, Some(rows)) => Ok(Sources::Tokens(rows)),
        _ => Err(fields.refused("inputs", expected, &given)),
    }
}

/// Takes what all requests may have, and refuses what is left.
fn finish(call: &mut Call, mut fields: Fields) -> Result<(), Failure> {
    call.limit(fields.number("timeout")?)?;
    fields.take("options");
    fields.take("parameters");
    fields.end()
}

async fn embed(call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let served = call.app.models.get(model.as_deref(), Purpose::Embed)?;
    embedded(call, fields, served).await
}

/// `/embed`, or `/` of a model that embeds.
///
/// # Errors
/// Why the request failed.
pub async fn embedded(mut call: Call, mut fields: Fields, served: Arc<Served>) -> Result<Response, Failure> {
    let inputs = Inputs { images: fields.image_fields()?, ..sources(&mut fields)?.into() };
    let normalize = fields.flag("normalize")?.unwrap_or(true);
    let truncate = truncation(&mut fields)?;
    finish(&mut call, fields)?;
    let rows = call.encode(served, inputs, truncate, Wanted::Vectors { normalize }).await?;
    Ok(json_response(&json!(rows.of_sources())))
}

async fn embed_all(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let served = call.app.models.get(model.as_deref(), Purpose::Embed)?;
    let inputs = Inputs { images: fields.image_fields()?, ..sources(&mut fields)?.into() };
    let truncate = truncation(&mut fields)?;
    finish(&mut call, fields)?;
    let rows = call.encode(served, inputs, truncate, Wanted::TokenVectors).await?;
    let of_row = |row: Row| match row {
        Row::Tokens(tokens) => tokens.into_iter().map(|(_, numbers)| numbers).collect::<Vec<_>>(),
        Row::Source(numbers) => vec![numbers],
    };
    Ok(json_response(&json!(rows.rows.into_iter().map(of_row).collect::<Vec<_>>())))
}

async fn similarity(call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let served = call.app.models.get(model.as_deref(), Purpose::Embed)?;
    similar(call, fields, served).await
}

/// `/similarity`, or `/` of a model that embeds with a sentence and others.
///
/// # Errors
/// Why the request failed.
pub async fn similar(mut call: Call, mut fields: Fields, served: Arc<Served>) -> Result<Response, Failure> {
    let Some(mut given) = fields.object("inputs")? else {
        return Err(Failure::field("inputs", "an object with source_sentence and sentences", "none"));
    };
    let (source, sentences) = (given.text("source_sentence")?, given.texts("sentences")?.unwrap_or_default());
    given.end()?;
    let mut parameters = fields.object("parameters")?.unwrap_or_else(|| Fields::of(Map::new()));
    let truncate = truncation(&mut parameters)?;
    parameters.end()?;
    finish(&mut call, fields)?;
    let Some(source) = source.filter(|_| !sentences.is_empty()) else {
        return Err(Failure::new(Reason::Empty, "inputs: expected source_sentence and at least one of sentences"));
    };
    let scores = scores(&call, served, source, sentences, truncate).await?;
    Ok(json_response(&json!(scores)))
}

/// The cosine similarity of a text to each of others.
async fn scores(
    call: &Call,
    served: Arc<Served>,
    text: String,
    others: Vec<String>,
    truncate: Option<Side>,
) -> Result<Vec<f32>, Failure> {
    let all = std::iter::once(text).chain(others).collect();
    let rows = call.encode(served, Sources::Texts(all).into(), truncate, Wanted::Vectors { normalize: true }).await?;
    let vectors = rows.of_sources();
    Ok(vectors[1..].iter().map(|vector| cosine(&vectors[0], vector)).collect())
}

async fn predict(call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let served = call.app.models.get(model.as_deref(), Purpose::Classify)?;
    predicted(call, fields, served).await
}

/// `/predict`, or `/` of a classifier.
///
/// # Errors
/// Why the request failed.
pub async fn predicted(mut call: Call, mut fields: Fields, served: Arc<Served>) -> Result<Response, Failure> {
    let expected = "a text, a pair of texts, or a list of lists of one or two texts";
    let Some(given) = fields.take("inputs") else { return Err(Failure::field("inputs", expected, "none")) };
    let row = |value: &Value| texts(value).filter(|texts| (1..=2).contains(&texts.len()));
    let (rows, is_one) = match &given {
        Value::Array(list) if list.first().is_some_and(Value::is_array) => (list.iter().map(row).collect(), false),
        one => (row(one).map(|row| vec![row]), true),
    };
    let Some(rows): Option<Vec<Vec<String>>> = rows else { return Err(fields.refused("inputs", expected, &given)) };
    let mut parameters = fields.object("parameters")?.unwrap_or_else(|| Fields::of(Map::new()));
    let raw = fields.flag("raw_scores")?.or(parameters.flag("raw_scores")?).unwrap_or(false);
    let top_k = parameters.count("top_k")?;
    parameters.end()?;
    let truncate = truncation(&mut fields)?;
    let images = fields.image_fields()?;
    finish(&mut call, fields)?;
    let of_tokens = *served.task() == Task::TokenClassification;
    let (sources, truncate) = match images.is_given() {
        true if rows.iter().any(|row| row.len() > 1) => {
            return Err(Failure::field("images", "single texts beside them", "a pair of texts"));
        }
        true => (Sources::Texts(rows.into_iter().flatten().collect()), truncate),
        false => {
            let pairs = rows.iter().map(|row| (row[0].clone(), row.get(1).cloned())).collect();
            (Sources::Tokens(encoded_pairs(served.clone(), pairs, truncate).await?), None)
        }
    };
    let inputs = Inputs { images, ..sources.into() };
    let labels = served.encoder()?.encoder.classifier()?.labels.clone();
    let found = call.encode(served.clone(), inputs, truncate, Wanted::Labels { raw }).await?;
    let best = |scores: &[f32]| -> Value {
        let mut pairs: Vec<(&String, f32)> = labels.iter().zip(scores.iter().copied()).collect();
        pairs.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        pairs.truncate(top_k.map_or(usize::MAX, |top_k| top_k as usize));
        pairs.iter().map(|(label, score)| json!({"label": label, "score": score})).collect()
    };
    let answer = |row: &Row| -> Value {
        match row {
            Row::Source(scores) => best(scores),
            Row::Tokens(tokens) => {
                let model = served.tokenize();
                let one = |(token, scores): &(i64, Vec<f32>)| {
                    let at = (0..scores.len()).fold(0, |at, other| if scores[other] > scores[at] { other } else { at });
                    let word = model.tokenizer().ok().and_then(|tokenizer| tokenizer.token(*token));
                    json!({"entity": labels[at], "entity_group": labels[at], "score": scores[at], "word": word})
                };
                tokens.iter().map(one).collect()
            }
        }
    };
    let answers: Vec<Value> = found.rows.iter().map(answer).collect();
    // One text: its labels. Several: a list of them.
    Ok(json_response(&match (is_one || of_tokens) && answers.len() == 1 {
        true => answers.into_iter().next().unwrap_or_default(),
        false => Value::from(answers),
    }))
}

/// The token ids of texts, some of them with a second one.
async fn encoded_pairs(
    served: Arc<Served>,
    pairs: Vec<(String, Option<String>)>,
    truncate: Option<Side>,
) -> Result<Vec<Vec<i64>>, Failure> {
    let encode = move || {
        let model = served.tokenize();
        let longest = served.longest_source();
        let one = |(text, second): &(String, Option<String>)| {
            let mut tokens = match second {
                None => {
                    return crate::vectors::tokens(&served, Sources::Texts(vec![text.clone()]), truncate)
                        .map(|mut rows| rows.swap_remove(0));
                }
                Some(second) => model.tokenizer()?.encode_pair(text, second)?,
            };
            if tokens.len() > longest && truncate.is_none() {
                let message = format!("the texts have {} tokens, but the model takes at most {longest}", tokens.len());
                return Err(Failure::new(Reason::TooLarge, message));
            }
            tokens.truncate(longest);
            Ok(tokens)
        };
        pairs.iter().map(one).collect()
    };
    let done = tokio::task::spawn_blocking(encode).await;
    done.map_err(|_| Failure::new(Reason::Internal, "the texts could not be tokenized"))?
}

/// Texts by how well they answer a query: by a classifier with one label, or by the similarity of vectors.
async fn rerank(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let classifier = call.app.models.get(model.as_deref(), Purpose::Classify).ok();
    let is_reranker =
        |served: &Arc<Served>| served.manifest().facts.classifier.as_ref().is_some_and(|it| it.labels.len() == 1);
    let served = match classifier.filter(is_reranker) {
        Some(served) => served,
        None => call.app.models.get(model.as_deref(), Purpose::Embed)?,
    };
    let query = fields.text("query")?.ok_or_else(|| Failure::field("query", "a text", "none"))?;
    let others = fields.texts("texts")?.unwrap_or_default();
    let raw = fields.flag("raw_scores")?.unwrap_or(false);
    let return_text = fields.flag("return_text")?.unwrap_or(false);
    let truncate = truncation(&mut fields)?;
    finish(&mut call, fields)?;
    if others.is_empty() {
        return Err(Failure::new(Reason::Empty, "texts: expected at least one text, found none"));
    }
    let scores = match is_reranker(&served) {
        true => {
            let pairs = others.iter().map(|text| (query.clone(), Some(text.clone()))).collect();
            let inputs = Sources::Tokens(encoded_pairs(served.clone(), pairs, truncate).await?).into();
            let rows = call.encode(served, inputs, None, Wanted::Labels { raw }).await?;
            rows.of_sources().into_iter().map(|scores| scores[0]).collect()
        }
        false => scores(&call, served, query, others.clone(), truncate).await?,
    };
    let mut ranks: Vec<(usize, f32)> = scores.into_iter().enumerate().collect();
    ranks.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let rank = |(index, score): (usize, f32)| match return_text {
        true => json!({"index": index, "score": score, "text": others[index]}),
        false => json!({"index": index, "score": score}),
    };
    Ok(json_response(&ranks.into_iter().map(rank).collect()))
}

async fn tokenize(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let served = call.app.models.get(model.as_deref(), Purpose::Any)?;
    let given = fields.texts("inputs")?.unwrap_or_default();
    let special = fields.flag("add_special_tokens")?.unwrap_or(true);
    fields.text("prompt_name")?;
    finish(&mut call, fields)?;
    let work = move || {
        let tokenizer = served.tokenize().tokenizer()?;
        let one = |text: &String| -> Result<Value, Failure> {
            let ids = if special { tokenizer.encode(text)? } else { tokenizer.encode_target(text)? };
            let token = |&id: &i64| {
                let is_special = is_special(tokenizer, id);
                json!({"id": id, "text": tokenizer.token(id), "special": is_special, "start": null, "stop": null})
            };
            Ok(ids.iter().map(token).collect())
        };
        given.iter().map(one).collect::<Result<Vec<_>, Failure>>()
    };
    let _permit = call.app.admission.enter(call.tenant.as_ref())?;
    let rows = tokio::task::spawn_blocking(work).await;
    let rows = rows.map_err(|_| Failure::new(Reason::Internal, "the texts could not be tokenized"))??;
    Ok(json_response(&json!(rows)))
}

async fn decode(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let model = fields.text("model")?;
    let served = call.app.models.get(model.as_deref(), Purpose::Any)?;
    let expected = "token ids or a list of those";
    let given = fields.take("ids").ok_or_else(|| Failure::field("ids", expected, "none"))?;
    let rows = tokens(&given).ok_or_else(|| fields.refused("ids", expected, &given))?;
    let special = match fields.flag("skip_special_tokens")?.unwrap_or(true) {
        true => SpecialTokens::Skip,
        false => SpecialTokens::Keep,
    };
    finish(&mut call, fields)?;
    let tokenizer = match served.generator() {
        Some(generator) => generator.target_tokenizer()?,
        None => served.tokenize().tokenizer()?,
    };
    let texts = rows.iter().map(|row| Ok(tokenizer.decode(row, special)?));
    Ok(json_response(&json!(texts.collect::<Result<Vec<String>, Failure>>()?)))
}

/// What `/info` says.
pub fn info(app: &App, served: &Served) -> Value {
    let limits = &app.config.limits;
    let manifest = served.manifest();
    let kind = match (&manifest.facts.classifier, &manifest.task) {
        (Some(classifier), _) => {
            let labels = classifier.labels.iter().enumerate();
            let id2label: Map<String, Value> = labels.clone().map(|(id, name)| (id.to_string(), json!(name))).collect();
            let label2id: Map<String, Value> = labels.map(|(id, name)| (name.clone(), json!(id))).collect();
            let name = if classifier.labels.len() == 1 { "reranker" } else { "classifier" };
            json!({name: {"id2label": id2label, "label2id": label2id}})
        }
        (None, Task::FeatureExtraction(features)) => json!({"embedding": {"pooling": features.pooling.name()}}),
        _ => json!({"embedding": {"pooling": "mean"}}),
    };
    json!({
        "model_id": served.name,
        "model_sha": served.sha256(),
        "model_dtype": manifest.dtype.to_string(),
        "model_type": kind,
        "max_concurrent_requests": limits.max_requests,
        "max_input_length": served.longest_source(),
        "max_batch_tokens": limits.max_source_tokens,
        "max_batch_requests": null,
        "max_client_batch_size": limits.max_request_sources,
        "auto_truncate": false,
        "tokenization_workers": 1,
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
    })
}
