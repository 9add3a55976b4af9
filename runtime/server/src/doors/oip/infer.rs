//! Inference: tensors in, tensors out, whether they came over HTTP or gRPC.

use std::sync::Arc;

use serde_json::{Map, Value};
use t5gemma_protocol::{GENERATION_OPTIONS, ImageFields, Images, OptionValue, TensorFile, Texts};
use t5gemma_runtime::Task;

use super::tensor::{Data, Tensor};
use crate::call::Call;
use crate::doors::sampling::samples;
use crate::failure::{Failure, Reason};
use crate::generating::{Ask, Generating};
use crate::served::Served;
use crate::uploads::Uploads;
use crate::vectors::{Inputs, Row, Sources, Wanted};

/// A request.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Returned with the answer.
    pub id: String,
    /// Its parameters: generation options by their Hugging Face names, and `timeout`.
    pub parameters: Map<String, Value>,
    /// Its tensors.
    pub inputs: Vec<Tensor>,
    /// The names of the wanted outputs; all if empty.
    pub outputs: Vec<String>,
}

/// The inputs of a request: its sources, and the tensors of images.
struct Given {
    sources: Sources,
    images: Option<Tensor>,
    pixel_values: Option<Tensor>,
}

fn given(inputs: Vec<Tensor>) -> Result<Given, Failure> {
    let (mut texts, mut ids, mut mask, mut images, mut pixel_values) = (None, None, None, None, None);
    for tensor in inputs {
        match (tensor.name.as_str(), &tensor.data) {
            ("text_input", Data::Bytes(elements)) => {
                let text = |bytes: &Vec<u8>| {
                    String::from_utf8(bytes.clone()).map_err(|_| Failure::field("text_input", "UTF-8", "other bytes"))
                };
                texts = Some(elements.iter().map(text).collect::<Result<Vec<_>, Failure>>()?);
            }
            ("input_ids", Data::Integers(_)) => ids = Some(tensor),
            ("attention_mask", Data::Integers(_)) => mask = Some(tensor),
            ("images", Data::Bytes(_)) => images = Some(tensor),
            ("pixel_values", Data::Floats(_)) => pixel_values = Some(tensor),
            (name @ ("text_input" | "input_ids" | "attention_mask" | "images" | "pixel_values"), data) => {
                return Err(Failure::field(
                    &format!("inputs.{name}"),
                    "BYTES for texts and images, INT64 for ids, FP32 for pixel_values",
                    data.datatype(),
                ));
            }
            (name, _) => {
                let message = format!(
                    "inputs: expected text_input, or input_ids and attention_mask, and images or pixel_values beside them, \
                     found {name:?}"
                );
                return Err(Failure::new(Reason::Invalid, message));
            }
        }
    }
    let sources = match (texts, ids) {
        (Some(texts), None) if mask.is_none() => Sources::Texts(texts),
        (None, Some(ids)) => Sources::Tokens(rows(&ids, mask.as_ref())?),
        (None, None) => {
            return Err(Failure::new(Reason::Invalid, "inputs: expected text_input or input_ids, found neither"));
        }
        _ => return Err(Failure::new(Reason::Invalid, "inputs: expected text_input or input_ids, found both")),
    };
    Ok(Given { sources, images, pixel_values })
}

/// Tensors of images as fields of a request: files, or data URIs where elements are texts, `[images]` for one source or
/// `[sources, images]`, in which empty elements are no images; or numbers of all sources in order.
fn pictures(images: Option<Tensor>, pixel_values: Option<Tensor>) -> (ImageFields, Uploads) {
    let (mut fields, mut uploads) = (ImageFields::default(), Uploads::default());
    if let Some(tensor) = images {
        let (width, is_of_one) = (tensor.row_length(), tensor.shape.len() < 2);
        let Data::Bytes(elements) = tensor.data else { unreachable!("looked at above") };
        let width = if is_of_one { elements.len() } else { width };
        // No image is a text: JPEG, PNG and WebP have bytes that UTF-8 has not, or zeros.
        let name = |bytes: &Vec<u8>| match str::from_utf8(bytes) {
            Ok(text) if !bytes.contains(&0) && text.parse::<usize>().is_err() => text.to_string(),
            _ => {
                uploads.files.push(bytes.clone());
                (uploads.files.len() - 1).to_string()
            }
        };
        let names: Vec<String> = elements.iter().filter(|bytes| !bytes.is_empty()).map(name).collect();
        let mut names = names.into_iter();
        let counts = elements.chunks(width.max(1)).map(|row| row.iter().filter(|bytes| !bytes.is_empty()).count());
        fields.images = Some(Images::Several(counts.map(|count| names.by_ref().take(count).collect()).collect()));
    }
    if let Some(tensor) = pixel_values {
        let Data::Floats(numbers) = tensor.data else { unreachable!("looked at above") };
        let shape = tensor.shape.iter().map(|&size| size as usize).collect();
        uploads.pixel_values = Some((shape, numbers));
        fields.pixel_values = Some(TensorFile { file: String::new(), tensor: String::new() });
    }
    (fields, uploads)
}

/// Takes the parameter `pan_and_scan`.
fn pan_and_scan(parameters: &mut Map<String, Value>) -> Result<Option<bool>, Failure> {
    let read = |value: Value| {
        value.as_bool().ok_or_else(|| Failure::field("parameters.pan_and_scan", "true or false", &value))
    };
    parameters.remove("pan_and_scan").map(read).transpose()
}

/// The ids of each row that are not padding.
fn rows(ids: &Tensor, mask: Option<&Tensor>) -> Result<Vec<Vec<i64>>, Failure> {
    if let Some(mask) = mask.filter(|mask| mask.shape != ids.shape) {
        let expected = format!("the shape {:?} of input_ids", ids.shape);
        return Err(Failure::field("inputs.attention_mask", expected, format_args!("{:?}", mask.shape)));
    }
    let Data::Integers(numbers) = &ids.data else { unreachable!("looked at above") };
    let length = match ids.shape.len() {
        1 => numbers.len(),
        _ => ids.row_length(),
    };
    let mask = mask.map(|mask| match &mask.data {
        Data::Integers(mask) => mask.as_slice(),
        _ => &[],
    });
    let row = |(at, row): (usize, &[i64])| {
        let is_seen = |column: usize| mask.is_none_or(|mask| mask[at * length + column] != 0);
        let seen = row.iter().enumerate().filter(|(column, _)| is_seen(*column));
        seen.map(|(_, &id)| id).collect()
    };
    Ok(numbers.chunks(length.max(1)).enumerate().map(row).collect())
}

/// Parameters as generation options. Values that parameters cannot hold, such as lists, are JSON in a text.
fn options(parameters: Map<String, Value>) -> Result<Map<String, Value>, Failure> {
    let mut options = Map::new();
    for (name, value) in parameters {
        let Some(option) = GENERATION_OPTIONS.iter().find(|option| option.name == name) else {
            let message = format!("parameters.{name}: expected the name of a generation option");
            return Err(Failure { field: Some(name), ..Failure::new(Reason::Invalid, message) });
        };
        let is_text = matches!(option.value, OptionValue::Text | OptionValue::EarlyStopping);
        let value = match &value {
            Value::String(text) if !is_text => match serde_json::from_str(text) {
                Ok(parsed) => parsed,
                Err(_) => value,
            },
            _ => value,
        };
        options.insert(name, value);
    }
    samples(&mut options);
    Ok(options)
}

/// Begins to generate.
///
/// # Errors
/// Why the request is not begun.
pub async fn generate(call: &mut Call, served: Arc<Served>, mut request: Request) -> Result<Generating, Failure> {
    let timeout = request.parameters.remove("timeout");
    call.limit(timeout.as_ref().and_then(Value::as_f64))?;
    let mut ask = Ask { is_lenient: true, ..Ask::default() };
    let given = given(std::mem::take(&mut request.inputs))?;
    match given.sources {
        Sources::Texts(texts) => ask.request.text = Some(Texts::Several(texts)),
        Sources::Tokens(rows) => ask.tokens = Some(rows),
    }
    (ask.request.images, ask.uploads) = pictures(given.images, given.pixel_values);
    ask.request.images.pan_and_scan = pan_and_scan(&mut request.parameters)?;
    ask.request.options = options(request.parameters)?;
    call.generate(served, ask).await
}

/// Answers a request.
///
/// # Errors
/// Why the request failed.
pub async fn infer(call: &mut Call, served: Arc<Served>, request: Request) -> Result<Vec<Tensor>, Failure> {
    let outputs = request.outputs.clone();
    let all = match served.task() {
        Task::Text2TextGeneration => generated(call, served, request).await?,
        Task::FeatureExtraction(_) | Task::TextClassification => encoded(call, served, request).await?,
        Task::TokenClassification => {
            let message = "labels of tokens are not tensors of this protocol; ask /predict";
            return Err(Failure::new(Reason::Unsupported, message));
        }
    };
    select(all, &outputs)
}

/// The wanted outputs, in order.
fn select(all: Vec<Tensor>, wanted: &[String]) -> Result<Vec<Tensor>, Failure> {
    if wanted.is_empty() {
        return Ok(all);
    }
    let find = |name: &String| {
        let known = all.iter().find(|tensor| tensor.name == *name);
        known.cloned().ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|tensor| tensor.name.as_str()).collect();
            Failure::field("outputs", names.join(", "), format_args!("{name:?}"))
        })
    };
    wanted.iter().map(find).collect()
}

async fn generated(call: &mut Call, served: Arc<Served>, request: Request) -> Result<Vec<Tensor>, Failure> {
    let mut generating = generate(call, served, request).await?;
    let rows = generating.rows().await?;
    let targets = rows.first().map_or(1, Vec::len);
    let shape = match targets {
        1 => vec![rows.len() as i64],
        several => vec![rows.len() as i64, several as i64],
    };
    let all: Vec<_> = rows.iter().flatten().collect();
    let mut tensors = Vec::new();
    if generating.tokenizer().is_ok() {
        let texts = all.iter().map(|hypothesis| Ok(generating.text(&hypothesis.tokens)?.into_bytes()));
        let data = Data::Bytes(texts.collect::<Result<_, Failure>>()?);
        tensors.push(Tensor { name: "text_output".into(), shape: shape.clone(), data });
    }
    let longest = all.iter().map(|hypothesis| hypothesis.tokens.len()).max().unwrap_or(0);
    let pad = generating.config.pad_token_id;
    let padded = all.iter().flat_map(|hypothesis| {
        let padding = longest - hypothesis.tokens.len();
        hypothesis.tokens.iter().copied().chain(std::iter::repeat_n(pad, padding))
    });
    let ids = Data::Integers(padded.collect());
    tensors.push(Tensor { name: "output_ids".into(), shape: [&shape[..], &[longest as i64]].concat(), data: ids });
    let reasons = all.iter().map(|hypothesis| hypothesis.finish_reason.as_str().as_bytes().to_vec()).collect();
    tensors.push(Tensor { name: "finish_reason".into(), shape, data: Data::Bytes(reasons) });
    Ok(tensors)
}

async fn encoded(call: &mut Call, served: Arc<Served>, mut request: Request) -> Result<Vec<Tensor>, Failure> {
    let timeout = request.parameters.remove("timeout");
    call.limit(timeout.as_ref().and_then(Value::as_f64))?;
    let is_classifier = *served.task() == Task::TextClassification;
    let mut flag = |name: &str, default: bool| match request.parameters.remove(name) {
        None => Ok(default),
        Some(value) => value.as_bool().ok_or_else(|| Failure::field(name, "true or false", value)),
    };
    let wanted = match is_classifier {
        true => Wanted::Labels { raw: flag("raw_scores", false)? },
        false => Wanted::Vectors { normalize: flag("normalize", true)? },
    };
    let crops = pan_and_scan(&mut request.parameters)?;
    if let Some(name) = request.parameters.keys().next() {
        let message = format!("parameters.{name}: no such parameter");
        return Err(Failure::new(Reason::Invalid, message));
    }
    let given = given(request.inputs)?;
    let (images, uploads) = pictures(given.images, given.pixel_values);
    let inputs = Inputs { sources: given.sources, images: ImageFields { pan_and_scan: crops, ..images }, uploads };
    let rows = call.encode(served.clone(), inputs, None, wanted).await?.rows;
    let count = rows.len() as i64;
    let numbers: Vec<Vec<f32>> = rows
        .into_iter()
        .map(|row| match row {
            Row::Source(numbers) => numbers,
            Row::Tokens(_) => Vec::new(),
        })
        .collect();
    let width = numbers.first().map_or(0, Vec::len) as i64;
    let flat = Data::Floats(numbers.iter().flatten().copied().collect());
    let name = if is_classifier { "scores" } else { "embedding" };
    let mut tensors = vec![Tensor { name: name.into(), shape: vec![count, width], data: flat }];
    if is_classifier {
        let labels = &served.encoder()?.encoder.classifier()?.labels;
        let best = |scores: &Vec<f32>| {
            let at = (0..scores.len()).fold(0, |at, other| if scores[other] > scores[at] { other } else { at });
            labels.get(at).cloned().unwrap_or_default().into_bytes()
        };
        let data = Data::Bytes(numbers.iter().map(best).collect());
        tensors.push(Tensor { name: "label".into(), shape: vec![count], data });
    }
    Ok(tensors)
}
