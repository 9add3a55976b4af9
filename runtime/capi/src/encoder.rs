//! Encoders and classifiers, and the numbers that go into buffers of the caller's.

use std::path::PathBuf;
use std::ptr;

use serde_json::{Value, json};
use t5gemma_runtime::{Batch, Encoder, Pooling, ScoreFunction, Task};

use crate::call::{Call, Role, t5g_call};
use crate::error::{Failure, fallible, free};
use crate::handle::{Handle, Object};
use crate::input::{Buffer, Fields, Out, Record, Text, flag};
use crate::onnxruntime;
use crate::options::{open_options, t5g_open_options};
use crate::sources::{Reader, t5g_sources};
use crate::tokenizer::{Reading, Written};

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_states {
    size: usize,
    values: Buffer<f32>,
    capacity: usize,
    attention_mask: Buffer<i64>,
    mask_capacity: usize,
    rows: usize,
    length: usize,
    width: usize,
    mask_length: usize,
}

// SAFETY: words, of which any are a value.
unsafe impl Fields for t5g_states {
    const OLDEST: usize = 72;

    fn unset() -> t5g_states {
        t5g_states {
            size: 0,
            values: Buffer(ptr::null_mut()),
            capacity: 0,
            attention_mask: Buffer(ptr::null_mut()),
            mask_capacity: 0,
            rows: 0,
            length: 0,
            width: 0,
            mask_length: 0,
        }
    }
}

/// `[rows, length, width]`.
#[derive(Clone, Copy)]
pub struct Shape {
    rows: usize,
    length: usize,
    width: usize,
}

impl Shape {
    pub fn of(batch: &Batch, length: usize, width: usize) -> Shape {
        Shape { rows: batch.rows(), length, width }
    }
}

/// Puts what `compute` gives, of a shape known before, into the caller's buffers, or tells the shape where there are none.
pub fn put_states(
    record: Record<t5g_states>,
    given: t5g_states,
    shape: Shape,
    batch: &Batch,
    compute: impl FnOnce() -> Result<Vec<f32>, Failure>,
) -> Result<(), Failure> {
    let Shape { rows, length, width } = shape;
    let mask = match given.attention_mask.is_null() {
        true => None,
        false => Some(given.attention_mask.room(given.mask_capacity, batch.mask().len(), "states.attention_mask")?),
    };
    if !given.values.is_null() {
        let place = given.values.room(given.capacity, rows * length * width, "states.values")?;
        let values = compute()?;
        if values.len() != rows * length * width {
            let message = format!("expected {rows} x {length} x {width} numbers, found {}", values.len());
            return Err(Failure::new(crate::error::Code::Model, message));
        }
        place.put_all(values.into_iter());
    }
    if let Some(mask) = mask {
        mask.put_all(batch.mask().iter().copied());
    }
    record.put(t5g_states { rows, length, width, mask_length: batch.length(), ..given }, "states")
}

/// A `t5g_encoder`.
pub struct Encoding {
    encoder: Encoder,
    path: PathBuf,
}

impl Object for Encoding {
    const NAME: &'static str = "t5g_encoder";
}

impl Encoding {
    fn batch(&self, sources: Record<t5g_sources>) -> Result<Batch, Failure> {
        let reader = Reader {
            tokenizer: &|| self.encoder.tokenizer(),
            chat: &|| Err(Failure::argument("sources.messages", "NULL (conversations are for t5g_model)", "text")),
            pad_token_id: self.encoder.pad_token_id(),
            hidden_size: self.encoder.config().encoder.hidden_size,
        };
        reader.batch(sources)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_open(
    path: Text,
    options: Record<t5g_open_options>,
    encoder: Out<Handle<Encoding>>,
) -> Handle<Failure> {
    fallible(|| {
        let place = encoder.check("encoder")?;
        let (path, options) = (PathBuf::from(path.required("path")?), open_options(options)?);
        onnxruntime::prepare();
        let encoder = Encoder::open_with(&path, &options)?;
        place.put(Handle::new(Encoding { encoder, path }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_describe(encoder: Handle<Encoding>, json: Out<Handle<Written>>) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (json.check("json")?, encoder.get("encoder")?);
        let (manifest, config) = (opened.encoder.manifest(), opened.encoder.config());
        let labels = match &config.classifier {
            Some(classifier) => json!(classifier.labels),
            None => Value::Null,
        };
        let described = json!({
            "path": opened.path.to_string_lossy(),
            "task": manifest.task.name(),
            "target": manifest.target,
            "dtype": manifest.dtype.to_string(),
            "parameters": manifest.parameters,
            "exporter": manifest.exporter,
            "source_vocab_size": config.encoder.vocab_size,
            "hidden_size": config.encoder.hidden_size,
            "max_source_length": config.encoder.max_position_embeddings,
            "pad_token_id": opened.encoder.pad_token_id(),
            "labels": labels,
        });
        place.put(Written::handle(described.to_string()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_tokenizer(encoder: Handle<Encoding>, tokenizer: Out<Handle<Reading>>) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (tokenizer.check("tokenizer")?, encoder.get("encoder")?);
        place.put(Handle::new(Reading(opened.encoder.tokenizer()?.clone())));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_encode(
    encoder: Handle<Encoding>,
    sources: Record<t5g_sources>,
    pooling: i32,
    normalize: i32,
    call: Record<t5g_call>,
    states: Record<t5g_states>,
) -> Handle<Failure> {
    fallible(|| {
        let (given, opened) = (states.get("states")?, encoder.get("encoder")?);
        let (call, normalize) = (Call::read(call)?.of(Role::Encodes)?, flag(normalize.into(), "normalize")?);
        let pooling = usize::try_from(pooling)
            .ok()
            .and_then(|at| Pooling::ALL.get(at).copied())
            .ok_or_else(|| Failure::argument("pooling", "T5G_POOLING_NONE to T5G_POOLING_LAST", pooling.to_string()))?;
        if normalize && pooling == Pooling::None {
            return Err(Failure::argument("normalize", "0 without a pooling", "1"));
        }
        let (encoder, batch) = (&opened.encoder, opened.batch(sources)?);
        encoder.features()?;
        let length = if pooling == Pooling::None { batch.length() } else { 1 };
        let shape = Shape::of(&batch, length, encoder.config().encoder.hidden_size);
        put_states(states, given, shape, &batch, || {
            call.run_in_one_step(|cancel| match pooling {
                Pooling::None => Ok(encoder.encode(&batch, cancel)?.into_iter().collect()),
                _ => Ok(encoder.embed(&batch, pooling, normalize, cancel)?.into_iter().collect()),
            })
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_classify(
    encoder: Handle<Encoding>,
    sources: Record<t5g_sources>,
    function: i32,
    call: Record<t5g_call>,
    scores: Record<t5g_states>,
) -> Handle<Failure> {
    fallible(|| {
        let (given, opened) = (scores.get("scores")?, encoder.get("encoder")?);
        let (encoder, call) = (&opened.encoder, Call::read(call)?.of(Role::Encodes)?);
        let classifier = encoder.classifier()?;
        let function = match function {
            0 => ScoreFunction::of(classifier),
            1 => ScoreFunction::None,
            2 => ScoreFunction::Sigmoid,
            3 => ScoreFunction::Softmax,
            other => {
                let expected = "T5G_SCORES_DEFAULT to T5G_SCORES_SOFTMAX";
                return Err(Failure::argument("function", expected, other.to_string()));
            }
        };
        let (batch, labels) = (opened.batch(sources)?, classifier.labels.len());
        let of_tokens = encoder.manifest().task == Task::TokenClassification;
        let shape = Shape::of(&batch, if of_tokens { batch.length() } else { 1 }, labels);
        put_states(scores, given, shape, &batch, || {
            let logits: Vec<f32> = call.run_in_one_step(|cancel| match of_tokens {
                true => Ok(encoder.classify_tokens(&batch, cancel)?.into_iter().collect()),
                false => Ok(encoder.classify(&batch, cancel)?.into_iter().collect()),
            })?;
            Ok(logits.chunks(labels.max(1)).flat_map(|logits| function.scores(logits)).collect())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_free(encoder: Handle<Encoding>) -> i32 {
    free(encoder, "encoder")
}
