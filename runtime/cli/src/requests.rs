//! Reads requests from JSON lines, lines of text, arguments and files of hidden states. Their format is defined by the
//! protocol crate; commands decide what to do with them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use ndarray::{Ix2, Ix3};
use serde_json::{Map, Value};
use t5gemma_protocol::{
    AnyLength, EncodeRequest, ErrorResult, GenerateRequest, Id, LONGEST_LINE, RequestError, ScoreRequest, Tokenize,
    TokenizedRequest, describe_invalid_utf8, parse_object,
};
use t5gemma_runtime::Cancellation;

use crate::lines::Lines;
use crate::packing::Packing;
use crate::tensors::Tensors;

/// A request that failed: its `id` (or the line's number, if no id could be read) and the reason.
pub struct Refused {
    pub id: Id,
    pub reason: String,
}

impl From<Refused> for ErrorResult {
    fn from(refused: Refused) -> ErrorResult {
        ErrorResult { id: Some(refused.id), error: refused.reason }
    }
}

/// The kind of request that a command reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Sources only, which the command may truncate.
    Encode { truncates: bool },
    /// Sources, decoder prompts and generation options.
    Generate,
    /// Sources, decoder prompts and targets; `end` is appended to targets that are texts.
    Score { end: Option<i64> },
}

/// Reads a text from a line of stdin or an argument; `images` are the fields of its images. `number` counts texts from 0.
pub fn read_text(
    text: &[u8],
    images: &Map<String, Value>,
    number: usize,
    kind: Kind,
    model: &dyn Tokenize,
) -> Result<TokenizedRequest, Refused> {
    let refused = |reason| Refused { id: number.into(), reason };
    if text.len() > LONGEST_LINE {
        return Err(refused(too_long().to_string()));
    }
    let text = str::from_utf8(text).map_err(|error| refused(describe_invalid_utf8(text, &error)))?;
    let mut fields = images.clone();
    fields.insert("text".into(), text.into());
    // The user gave a plain text, so errors do not name the fields of a request.
    let reason = |error: RequestError| {
        let reason = error.to_string();
        reason.strip_prefix("input_ids: ").or(reason.strip_prefix("text: ")).unwrap_or(&reason).to_string()
    };
    tokenized(fields, number.into(), kind, model).map_err(|error| refused(reason(error)))
}

/// Reads a line of JSON; `images` are the fields of the images of requests without their own. `number` counts lines
/// from 0.
pub fn read_line(
    line: &[u8],
    images: &Map<String, Value>,
    number: usize,
    kind: Kind,
    model: &dyn Tokenize,
) -> Result<TokenizedRequest, Refused> {
    let mut id = number.into();
    let request = fields(line).and_then(|mut fields| {
        if !["images", "pixel_values"].iter().any(|field| fields.contains_key(*field)) {
            let given = images.iter().filter(|(field, _)| !fields.contains_key(*field));
            fields.extend(given.map(|(field, value)| (field.clone(), value.clone())).collect::<Vec<_>>());
        }
        if let Some(given) = Id::take(&mut fields)? {
            id = given;
        }
        tokenized(fields, id.clone(), kind, model)
    });
    request.map_err(|error| Refused { id, reason: error.to_string() })
}

fn fields(line: &[u8]) -> Result<Map<String, Value>, RequestError> {
    if line.len() > LONGEST_LINE {
        return Err(too_long());
    }
    let text = str::from_utf8(line).map_err(|error| RequestError::Encoding(describe_invalid_utf8(line, &error)))?;
    parse_object(text)
}

fn tokenized(
    fields: Map<String, Value>,
    id: Id,
    kind: Kind,
    model: &dyn Tokenize,
) -> Result<TokenizedRequest, RequestError> {
    match kind {
        Kind::Generate => GenerateRequest::try_from(fields)?.tokenize(id, model),
        Kind::Score { end } => ScoreRequest::try_from(fields)?.tokenize(id, model, end),
        Kind::Encode { truncates: true } => EncodeRequest::try_from(fields)?.tokenize(id, &AnyLength(model)),
        Kind::Encode { truncates: false } => EncodeRequest::try_from(fields)?.tokenize(id, model),
    }
}

fn too_long() -> RequestError {
    RequestError::form("", format!("a line of at most {} MiB", LONGEST_LINE >> 20), "a longer one")
}

/// Reads requests with their hidden states from a file written by `t5gemma encode`, sorted by id: integers first, by
/// value.
pub fn read_encoder_outputs(path: &Path) -> Result<Vec<TokenizedRequest>> {
    let file = Tensors::read(path)?;
    let names = file.names()?;
    let mut ids: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(".last_hidden_state")).collect();
    if ids.is_empty() {
        bail!("{}: expected tensors ID.last_hidden_state, found {}", path.display(), names.join(", "));
    }
    ids.sort_by_key(|id| (id.parse::<u64>().map_or((1, 0), |number| (0, number)), id.to_string()));
    let request = |id: &str| {
        let wrong = |what: &str, expected: &str| format!("{}: {id}.{what}: expected {expected}", path.display());
        let states = file.floats(&format!("{id}.last_hidden_state"))?;
        let states = states.and_then(|states| states.into_dimensionality::<Ix3>().ok());
        let states = states.with_context(|| wrong("last_hidden_state", "[rows, tokens, hidden size]"))?;
        let rectangle = |what: &str| -> Result<Vec<Vec<i64>>> {
            let numbers = file.whole(&format!("{id}.{what}"))?.and_then(|ids| ids.into_dimensionality::<Ix2>().ok());
            let numbers = numbers.filter(|numbers| numbers.shape() == &states.shape()[..2]);
            let expected = format!("int64 of shape {:?}, as in its last_hidden_state", &states.shape()[..2]);
            let numbers = numbers.with_context(|| wrong(what, &expected))?;
            Ok(numbers.outer_iter().map(|row| row.to_vec()).collect())
        };
        // The tokens are not encoded again, but some generation options use them.
        let (sources, mask) = (rectangle("input_ids")?, rectangle("attention_mask")?);
        let id = id.parse::<u64>().map_or_else(|_| Id::Text(id.to_string()), |number| Id::Number(number.into()));
        let encoder_outputs = Some(states);
        Ok(TokenizedRequest { encoder_outputs, ..TokenizedRequest::new(id, sources, mask) })
    };
    ids.into_iter().map(request).collect()
}

/// Requests from arguments or stdin, for commands that do not stream.
pub struct Requests<'a> {
    texts: std::iter::Enumerate<std::slice::Iter<'a, String>>,
    /// Set if no texts are given as arguments.
    lines: Option<Lines>,
    jsonl: bool,
    /// The fields of the images of every request that has none of its own.
    images: Map<String, Value>,
    kind: Kind,
    model: &'a dyn Tokenize,
}

impl<'a> Requests<'a> {
    /// Reads `texts`, or stdin if there are none.
    pub fn open(texts: &'a [String], jsonl: bool, kind: Kind, model: &'a dyn Tokenize) -> Requests<'a> {
        let lines = match (texts.is_empty(), jsonl) {
            (false, _) => None,
            (true, true) => Some(Lines::requests()),
            (true, false) => Some(Lines::texts()),
        };
        Requests { texts: texts.iter().enumerate(), lines, jsonl, images: Map::new(), kind, model }
    }

    /// Gives every request without images of its own these fields of its images.
    pub fn with_images(self, images: Map<String, Value>) -> Requests<'a> {
        Requests { images, ..self }
    }

    /// Waits for a request and takes it with those already waiting behind it, up to the window of `packing`; empty at
    /// the end of the input.
    pub fn next_group(
        &mut self,
        packing: &Packing,
        cancel: &Cancellation,
    ) -> Result<Vec<Result<TokenizedRequest, Refused>>> {
        let mut group = Vec::new();
        let mut taken = 0;
        while taken < packing.window()
            && (group.is_empty() || self.lines.as_mut().map_or(Ok(true), |lines| lines.is_ready(packing.patience()))?)
        {
            let read = match &mut self.lines {
                None => self.texts.next().map(|(number, text)| (number, text.as_bytes().to_vec())),
                Some(lines) => lines.next(cancel)?,
            };
            let Some((number, line)) = read else { break };
            let request = if self.jsonl {
                read_line(&line, &self.images, number, self.kind, self.model)
            } else {
                read_text(&line, &self.images, number, self.kind, self.model)
            };
            taken += request.as_ref().map_or(1, |request| request.sources.len());
            group.push(request);
        }
        Ok(group)
    }
}
