//! `/v1/embeddings`. Clients ask for little-endian float32 in base64 unless told otherwise.

use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::call::{Call, Door, json_response};
use crate::failure::{Failure, Form};
use crate::fields::{texts, tokens};
use crate::models::Purpose;
use crate::vectors::{Inputs, Sources, Wanted};

/// The door.
pub const DOOR: Door = Door::new("embeddings", Form::OpenAi);

/// Answers a request.
pub async fn answer(mut call: Call) -> Result<Response, Failure> {
    let mut fields = call.fields()?;
    let name = fields.text("model")?;
    let served = call.app.models.get(name.as_deref(), Purpose::Embed)?;
    call.limit(fields.number("timeout")?)?;
    let expected = "a text, a list of texts, token ids or a list of those";
    let sources = match fields.take("input") {
        None => return Err(Failure::field("input", expected, "none")),
        Some(given) => match (texts(&given), tokens(&given)) {
            (Some(texts), _) if !texts.is_empty() => Sources::Texts(texts),
            (_, Some(rows)) if rows.iter().all(|row| !row.is_empty()) => Sources::Tokens(rows),
            _ => return Err(fields.refused("input", expected, &given)),
        },
    };
    let inputs = Inputs { images: fields.image_fields()?, ..sources.into() };
    let is_base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(Failure::field("encoding_format", "float or base64", format_args!("{other:?}")));
        }
    };
    let dimensions = fields.count("dimensions")?;
    fields.take("user");
    fields.end()?;
    let name = served.name.clone();
    let rows = call.encode(served, inputs, None, Wanted::Vectors { normalize: true }).await?;
    let tokens = rows.source_tokens;
    let mut vectors = rows.of_sources();
    if let Some(dimensions) = dimensions {
        shorten(&mut vectors, dimensions)?;
    }
    let entry = |(index, vector): (usize, &Vec<f32>)| {
        let embedding = match is_base64 {
            true => {
                let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                Value::from(BASE64_STANDARD.encode(bytes))
            }
            false => json!(vector),
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    };
    let data: Vec<Value> = vectors.iter().enumerate().map(entry).collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(json_response(&json!({"object": "list", "data": data, "model": name, "usage": usage})))
}

/// The first numbers of each vector, of length 1 again.
fn shorten(vectors: &mut [Vec<f32>], dimensions: u64) -> Result<(), Failure> {
    let own = vectors.first().map_or(0, Vec::len);
    let count = usize::try_from(dimensions).ok().filter(|count| (1..=own).contains(count));
    let Some(count) = count else {
        return Err(Failure::field("dimensions", format_args!("1 to {own}"), dimensions));
    };
    for vector in vectors {
        vector.truncate(count);
        let norm = vector.iter().map(|number| number * number).sum::<f32>().sqrt();
        if norm > 0.0 {
            vector.iter_mut().for_each(|number| *number /= norm);
        }
    }
    Ok(())
}
