//! Requests and results of T5Gemma models: types for the JSON that every interface reads and writes. An interface
//! parses bytes into a request, [tokenizes](Tokenize) it for a model, runs the batch, and turns the answer into a
//! result; the transport is up to it.
//!
//! In reading order: `request` has the requests, `tokenize` turns them into batches, `result` has the results; `text`
//! and `json` read bytes with errors that name the position; `schema` is the JSON Schema, committed in `schema/`.

mod error;
mod id;
mod images;
mod json;
mod options;
mod request;
mod result;
mod schema;
mod text;
mod tokenize;

pub use error::RequestError;
pub use id::Id;
pub use images::{ImageFields, Images, TensorFile};
pub use json::{abbreviated, describe_error, parse_object};
pub use options::{GENERATION_OPTIONS, GenerationOption, OptionGroup, OptionValue};
pub use request::{EncodeRequest, GenerateRequest, Integers, ScoreRequest, Texts, TokenRows};
pub use result::{
    ClassifyResponse, EncoderUsage, ErrorResult, FinishReason, GenerateResponse, GenerateResult, Label, LabelsResult,
    Score, ScoreResponse, ScoreResult, Sequence, TokenLabels, TokenLabelsResult, Usage, attention_rows,
};
pub use schema::schemas;
pub use text::{LONGEST_LINE, describe_invalid_utf8, next_line, without_byte_order_mark};
pub use tokenize::{AnyLength, Conversations, Tokenize, TokenizedRequest, batch, conversation, sources, targets};
