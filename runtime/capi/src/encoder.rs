//! Encoders and classifiers, and results written into the caller's buffers.

use std::path::PathBuf;
use std::ptr;

use serde_json::{Value, json};
use t5gemma_runtime::{Batch, Encoder, Error, Pooling, ScoreFunction, Task};

use crate::boundary::{fallible, free};
use crate::call::{Call, Role, t5g_call};
use crate::error::t5g_error;
use crate::handle::{Handle, Object};
use crate::input::{Buffer, Fields, Out, Record, Text, flag};
use crate::onnxruntime;
use crate::options::{open_options, t5g_open_options};
use crate::sources::{Reader, t5g_sources};
use crate::tokenizer::{t5g_text, t5g_tokenizer};

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

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
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

/// Writes the result of `compute`, whose shape is known, into the caller's buffers, or only the shape if there are
/// none.
pub fn put_states(
    record: Record<t5g_states>,
    given: t5g_states,
    shape: Shape,
    batch: &Batch,
    compute: impl FnOnce() -> Result<Vec<f32>, t5g_error>,
) -> Result<(), t5g_error> {
    let Shape { rows, length, width } = shape;
    let mask = if given.attention_mask.is_null() {
        None
    } else {
        Some(given.attention_mask.room(given.mask_capacity, batch.mask().len(), "states.attention_mask")?)
    };
    if !given.values.is_null() {
        let place = given.values.room(given.capacity, rows * length * width, "states.values")?;
        let values = compute()?;
        if values.len() != rows * length * width {
            let message = format!("expected {rows} x {length} x {width} numbers, found {}", values.len());
            return Err(t5g_error::new(crate::error::t5g_code::Model, message));
        }
        place.put_all(values.into_iter());
    }
    if let Some(mask) = mask {
        mask.put_all(batch.mask().iter().copied());
    }
    record.put(t5g_states { rows, length, width, mask_length: batch.length(), ..given }, "states")
}

/// A `t5g_encoder`.
pub struct t5g_encoder {
    inner: Encoder,
    path: PathBuf,
}

impl Object for t5g_encoder {
    const NAME: &'static str = "t5g_encoder";
}

impl t5g_encoder {
    fn batch(&self, sources: Record<t5g_sources>) -> Result<Batch, t5g_error> {
        let reader = Reader {
            tokenizer: &|| self.inner.tokenizer(),
            target_tokenizer: &|| self.inner.tokenizer(),
            chat: &|| Err(t5g_error::argument("sources.messages", "NULL (conversations require a t5g_model)", "text")),
            pad_token_id: self.inner.pad_token_id(),
            facts: self.inner.facts(),
            image_settings: &|| self.inner.image_settings(),
            adapter: &|name| {
                let expected = "NULL (adapters require a t5g_model)".to_string();
                Err(Error::Input { field: "sources.adapter".into(), expected, found: format!("{name:?}") })
            },
        };
        reader.batch(sources)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_open(
    path: Text,
    options: Record<t5g_open_options>,
    encoder: Out<Handle<t5g_encoder>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let place = encoder.check("encoder")?;
        let (path, options) = (PathBuf::from(path.required("path")?), open_options(options)?);
        onnxruntime::prepare();
        let inner = Encoder::open_with(&path, &options)?;
        place.put(Handle::new(t5g_encoder { inner, path }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_describe(encoder: Handle<t5g_encoder>, json: Out<Handle<t5g_text>>) -> Handle<t5g_error> {
    fallible(|| {
        let (place, encoder) = (json.check("json")?, encoder.get("encoder")?);
        let (manifest, facts) = (encoder.inner.manifest(), encoder.inner.facts());
        let labels = match &facts.classifier {
            Some(classifier) => json!(classifier.labels),
            None => Value::Null,
        };
        let described = json!({
            "path": encoder.path.to_string_lossy(),
            "task": manifest.task.name(),
            "target": manifest.target,
            "dtype": manifest.dtype.to_string(),
            "parameters": manifest.parameters,
            "exporter": manifest.exporter,
            "source_vocab_size": facts.encoder.vocab_size,
            "hidden_size": facts.encoder.hidden_size,
            "max_source_length": facts.encoder.max_position_embeddings,
            "pad_token_id": encoder.inner.pad_token_id(),
            "pooling": encoder.inner.features().ok().map(|features| features.pooling.name()),
            "labels": labels,
        });
        place.put(t5g_text::handle(described.to_string()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_tokenizer(
    encoder: Handle<t5g_encoder>,
    tokenizer: Out<Handle<t5g_tokenizer>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, encoder) = (tokenizer.check("tokenizer")?, encoder.get("encoder")?);
        place.put(Handle::new(t5g_tokenizer(encoder.inner.tokenizer()?.clone())));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_encode(
    encoder: Handle<t5g_encoder>,
    sources: Record<t5g_sources>,
    pooling: i32,
    normalize: i32,
    call: Record<t5g_call>,
    states: Record<t5g_states>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (given, encoder) = (states.get("states")?, encoder.get("encoder")?);
        let (call, normalize) = (Call::read(call)?.of(Role::Encodes)?, flag(normalize.into(), "normalize")?);
        let pooling = usize::try_from(pooling).ok().and_then(|at| Pooling::ALL.get(at).copied()).ok_or_else(|| {
            t5g_error::argument("pooling", "T5G_POOLING_NONE to T5G_POOLING_LAST", pooling.to_string())
        })?;
        if normalize && pooling == Pooling::None {
            return Err(t5g_error::argument("normalize", "0 without pooling", "1"));
        }
        let (batch, encoder) = (encoder.batch(sources)?, &encoder.inner);
        encoder.features()?;
        let batch = encoder.pad(&batch);
        let length = if pooling == Pooling::None { batch.length() } else { 1 };
        let shape = Shape::of(&batch, length, encoder.facts().encoder.hidden_size);
        put_states(states, given, shape, &batch, || {
            call.run_in_one_step(|cancel| match pooling {
                Pooling::None => Ok(encoder.encode(&batch, cancel)?.into_iter().collect()),
                _ if normalize => Ok(encoder.embed_normalized(&batch, pooling, cancel)?.into_iter().collect()),
                _ => Ok(encoder.embed(&batch, pooling, cancel)?.into_iter().collect()),
            })
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_classify(
    encoder: Handle<t5g_encoder>,
    sources: Record<t5g_sources>,
    function: i32,
    call: Record<t5g_call>,
    scores: Record<t5g_states>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (given, encoder) = (scores.get("scores")?, encoder.get("encoder")?);
        let call = Call::read(call)?.of(Role::Encodes)?;
        let classifier = encoder.inner.classifier()?;
        let function = match function {
            0 => ScoreFunction::of(classifier),
            1 => ScoreFunction::None,
            2 => ScoreFunction::Sigmoid,
            3 => ScoreFunction::Softmax,
            other => {
                let expected = "T5G_SCORES_DEFAULT to T5G_SCORES_SOFTMAX";
                return Err(t5g_error::argument("function", expected, other.to_string()));
            }
        };
        let (batch, labels) = (encoder.batch(sources)?, classifier.labels.len());
        let of_tokens = encoder.inner.manifest().task == Task::TokenClassification;
        let shape = Shape::of(&batch, if of_tokens { batch.length() } else { 1 }, labels);
        put_states(scores, given, shape, &batch, || {
            let logits: Vec<f32> = call.run_in_one_step(|cancel| {
                if of_tokens {
                    Ok(encoder.inner.classify_tokens(&batch, cancel)?.into_iter().collect())
                } else {
                    Ok(encoder.inner.classify(&batch, cancel)?.into_iter().collect())
                }
            })?;
            Ok(logits.chunks(labels.max(1)).flat_map(|logits| function.scores(logits)).collect())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_encoder_free(encoder: Handle<t5g_encoder>) -> i32 {
    free(encoder, "encoder")
}
