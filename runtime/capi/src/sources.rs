//! Sources and targets of the header, converted to batches and rows of token ids.

mod images;

use ndarray::Array3;
use serde_json::Value;
use t5gemma_protocol::{Tokenize, conversation};
use t5gemma_runtime::{Adapter, Batch, ChatTemplate, Error, Facts, ImageSettings, Tokenizer};

use crate::error::{t5g_code, t5g_error};
use crate::input::{Array, Fields, Record, Text, ZERO_TERMINATED, flag};

use images::{Files, GivenImages};

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_sources {
    size: usize,
    rows: usize,
    texts: Array<Text>,
    text_sizes: Array<usize>,
    messages: Text,
    input_ids: Array<i64>,
    lengths: Array<usize>,
    length: usize,
    attention_mask: Array<i64>,
    decoder_texts: Array<Text>,
    decoder_input_ids: Array<i64>,
    decoder_length: usize,
    encoder_outputs: Array<f32>,
    decoder_text_sizes: Array<usize>,
    decoder_rows: usize,
    input_ids_size: usize,
    attention_mask_size: usize,
    encoder_rows: usize,
    encoder_length: usize,
    encoder_width: usize,
    adapter: Text,
    progress_totals: Array<i64>,
    progress_rows: usize,
    images: Files,
    image_sizes: Array<usize>,
    image_widths: Array<usize>,
    image_counts: Array<usize>,
    images_count: usize,
    pixel_values: Array<f32>,
    pixel_values_size: usize,
    pan_and_scan: i64,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_sources {
    const OLDEST: usize = 104;

    fn unset() -> t5g_sources {
        t5g_sources {
            size: 0,
            rows: 0,
            texts: Array::NULL,
            text_sizes: Array::NULL,
            messages: Text::NULL,
            input_ids: Array::NULL,
            lengths: Array::NULL,
            length: 0,
            attention_mask: Array::NULL,
            decoder_texts: Array::NULL,
            decoder_input_ids: Array::NULL,
            decoder_length: 0,
            encoder_outputs: Array::NULL,
            decoder_text_sizes: Array::NULL,
            decoder_rows: 0,
            input_ids_size: 0,
            attention_mask_size: 0,
            encoder_rows: 0,
            encoder_length: 0,
            encoder_width: 0,
            adapter: Text::NULL,
            progress_totals: Array::NULL,
            progress_rows: 0,
            images: Array::NULL,
            image_sizes: Array::NULL,
            image_widths: Array::NULL,
            image_counts: Array::NULL,
            images_count: 0,
            pixel_values: Array::NULL,
            pixel_values_size: 0,
            pan_and_scan: 0,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_targets {
    size: usize,
    texts: Array<Text>,
    text_sizes: Array<usize>,
    target_ids: Array<i64>,
    lengths: Array<usize>,
    without_end: i64,
    output_attentions: i64,
    rows: usize,
    target_ids_size: usize,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_targets {
    const OLDEST: usize = 48;

    fn unset() -> t5g_targets {
        t5g_targets {
            size: 0,
            texts: Array::NULL,
            text_sizes: Array::NULL,
            target_ids: Array::NULL,
            lengths: Array::NULL,
            without_end: 0,
            output_attentions: 0,
            rows: 0,
            target_ids_size: 0,
        }
    }
}

impl t5g_targets {
    /// Whether cross-attention is requested.
    pub fn output_attentions(&self) -> Result<bool, t5g_error> {
        flag(self.output_attentions, "targets.output_attentions")?;
        Ok(self.output_attentions == 1)
    }
}

/// What reading sources needs to know about a model.
pub struct Reader<'a> {
    pub tokenizer: &'a dyn Fn() -> Result<&'a Tokenizer, Error>,
    /// The tokenizer of targets.
    pub target_tokenizer: &'a dyn Fn() -> Result<&'a Tokenizer, Error>,
    /// The chat template.
    pub chat: &'a dyn Fn() -> Result<&'a ChatTemplate, t5g_error>,
    pub pad_token_id: i64,
    pub facts: &'a Facts,
    /// How images become pixel values and tokens.
    pub image_settings: &'a dyn Fn() -> Result<&'a ImageSettings, Error>,
    /// The loaded adapter of a name.
    pub adapter: &'a dyn Fn(&str) -> Result<Adapter, Error>,
}

impl Tokenize for Reader<'_> {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        (self.tokenizer)()
    }

    fn adapter(&self, name: &str) -> Result<Adapter, Error> {
        (self.adapter)(name)
    }

    fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        (self.target_tokenizer)()
    }
}

impl Reader<'_> {
    /// The sources as a batch, with decoder prompts and encoder outputs.
    pub fn batch(&self, sources: Record<t5g_sources>) -> Result<Batch, t5g_error> {
        let given = sources.get("sources")?;
        let texts = given.texts.optional(given.rows, "sources.texts")?;
        let messages = given.messages.optional("sources.messages")?;
        if given.rows == 0 && (texts.is_some() || messages.is_none()) {
            return Err(t5g_error::expected(t5g_code::Input, "sources.rows", "at least one row", "0"));
        }
        let images = GivenImages::read(&given, given.rows)?;
        let pan_and_scan = images::pan_and_scan(&given)?;
        let batch = match (texts, messages, given.input_ids.is_null()) {
            (Some(texts), None, true) => {
                let texts = sized(texts, given.text_sizes, "sources.texts", "sources.text_sizes")?;
                match images {
                    None => Batch::padded(&t5gemma_protocol::sources(&texts, self)?, self.pad_token_id)?,
                    Some(GivenImages::Pictures(pictures)) => {
                        let (settings, pad) = ((self.image_settings)()?, self.pad_token_id);
                        images::batch_of_texts(&texts, pictures, pan_and_scan, settings, self, pad)?
                    }
                    Some(GivenImages::Pixels(_)) => {
                        let expected = "input_ids, whose image tokens they are for";
                        return Err(t5g_error::expected(t5g_code::Input, "sources.pixel_values", expected, "texts"));
                    }
                }
            }
            (None, Some(_), true) if images.is_some() => {
                let (expected, found) = ("texts or input_ids", "messages");
                return Err(t5g_error::expected(t5g_code::Input, "sources.images", expected, found));
            }
            (None, Some(messages), true) => {
                if given.rows > 1 {
                    let expected = "1 (a conversation is one source)";
                    return Err(t5g_error::expected(t5g_code::Input, "sources.rows", expected, given.rows.to_string()));
                }
                let (template, messages) = ((self.chat)()?, list(messages, "sources.messages")?);
                Batch::padded(&[conversation(&messages, template, self)?], self.pad_token_id)?
            }
            (None, None, false) => {
                let batch = self.of_ids(&given)?;
                match images {
                    None => batch,
                    Some(GivenImages::Pictures(pictures)) => {
                        let settings = (self.image_settings)()?;
                        batch.with_images(images::pixel_values(pictures, pan_and_scan, settings))?
                    }
                    Some(GivenImages::Pixels(numbers)) => {
                        let images = images::exact(numbers, (self.image_settings)()?)?;
                        batch.with_images_in_order(self.facts, images)?
                    }
                }
            }
            (None, None, true) => {
                let (expected, found) = ("texts, messages or input_ids", "none of them");
                return Err(t5g_error::expected(t5g_code::Input, "sources", expected, found));
            }
            _ => {
                let (expected, found) = ("one of texts, messages and input_ids", "several");
                return Err(t5g_error::expected(t5g_code::Input, "sources", expected, found));
            }
        };
        let batch = self.with_prompts(batch, &given)?;
        let batch = match given.adapter.optional("sources.adapter")? {
            Some(name) => batch.with_adapter(&(self.adapter)(name)?),
            None => batch,
        };
        let totals = given.progress_totals.optional(batch.rows(), "sources.progress_totals")?;
        let batch = match totals {
            None => batch,
            Some(totals) => {
                same_size("sources.progress_rows", given.progress_rows, batch.rows(), "one for each source")?;
                batch.with_progress_totals(totals)?
            }
        };
        let shape = [batch.rows(), batch.length(), self.facts.encoder.hidden_size];
        let count = product(&shape, "sources.encoder_outputs")?;
        let [rows, length, width] = shape;
        for (name, given, expected, what) in [
            ("sources.encoder_rows", given.encoder_rows, rows, "one for each source"),
            ("sources.encoder_length", given.encoder_length, length, "the tokens of the longest source"),
            ("sources.encoder_width", given.encoder_width, width, "the model's hidden_size"),
        ] {
            same_size(name, given, expected, what)?;
        }
        match given.encoder_outputs.optional(count, "sources.encoder_outputs")? {
            None => Ok(batch),
            Some(states) => {
                let states = Array3::from_shape_vec(shape, states.to_vec());
                Ok(batch.with_encoder_outputs(
                    states.map_err(|error| t5g_error::new(t5g_code::Input, error.to_string()))?,
                )?)
            }
        }
    }

    fn of_ids(&self, given: &t5g_sources) -> Result<Batch, t5g_error> {
        let Some(lengths) = given.lengths.optional(given.rows, "sources.lengths")? else {
            let count = product(&[given.rows, given.length], "sources.input_ids")?;
            let what = "rows times length";
            same_size("sources.input_ids_size", given.input_ids_size, count, what)?;
            same_size("sources.attention_mask_size", given.attention_mask_size, count, what)?;
            let ids = given.input_ids.get(count, "sources.input_ids")?.to_vec();
            let mask = given.attention_mask.optional(count, "sources.attention_mask")?;
            let mask = mask.map_or_else(|| vec![1; count], <[i64]>::to_vec);
            return Ok(Batch::flat(given.rows, ids, mask)?);
        };
        if !given.attention_mask.is_null() || given.length > 0 {
            let name = if given.length > 0 { "sources.length" } else { "sources.attention_mask" };
            return Err(t5g_error::expected(t5g_code::Input, name, "0 or NULL when lengths is set", "another value"));
        }
        let of_size = (given.input_ids_size, "sources.input_ids_size");
        let rows = ragged(&given.input_ids, lengths, "sources.input_ids", of_size)?;
        Ok(Batch::padded(&rows, self.pad_token_id)?)
    }

    fn with_prompts(&self, batch: Batch, given: &t5g_sources) -> Result<Batch, t5g_error> {
        let rows = batch.rows();
        if !given.decoder_texts.is_null() || !given.decoder_input_ids.is_null() {
            same_size("sources.decoder_rows", given.decoder_rows, rows, "one for each source")?;
        }
        let texts = given.decoder_texts.optional(rows, "sources.decoder_texts")?;
        let count = product(&[rows, given.decoder_length], "sources.decoder_input_ids")?;
        let ids = given.decoder_input_ids.optional(count, "sources.decoder_input_ids")?;
        match (texts, ids) {
            (None, None) if given.decoder_length == 0 => Ok(batch),
            (None, None) => Err(t5g_error::argument("sources.decoder_input_ids", "a pointer", "NULL")),
            (Some(texts), None) => {
                let (name, of_sizes) = ("sources.decoder_texts", "sources.decoder_text_sizes");
                let texts = sized(texts, given.decoder_text_sizes, name, of_sizes)?;
                Ok(batch.with_decoder_input_ids(&t5gemma_protocol::targets(name, &texts, self)?)?)
            }
            (None, Some(_)) if given.decoder_length == 0 => Ok(batch),
            (None, Some(ids)) => {
                let prompts: Vec<&[i64]> = ids.chunks(given.decoder_length).collect();
                Ok(batch.with_decoder_input_ids(&prompts)?)
            }
            (Some(_), Some(_)) => {
                Err(t5g_error::expected(t5g_code::Input, "sources", "decoder_texts or decoder_input_ids", "both"))
            }
        }
    }

    /// The targets of `rows` sources; `end` is appended to texts.
    pub fn targets(
        &self,
        targets: Record<t5g_targets>,
        rows: usize,
        end: Option<i64>,
    ) -> Result<Vec<Vec<i64>>, t5g_error> {
        let given = targets.get("targets")?;
        let end = end.filter(|_| given.without_end == 0);
        flag(given.without_end, "targets.without_end")?;
        same_size("targets.rows", given.rows, rows, "one for each source")?;
        match (given.texts.optional(rows, "targets.texts")?, given.target_ids.is_null()) {
            (Some(texts), true) => {
                let texts = sized(texts, given.text_sizes, "targets.texts", "targets.text_sizes")?;
                let mut targets = t5gemma_protocol::targets("targets.texts", &texts, self)?;
                targets.iter_mut().for_each(|target| target.extend(end));
                Ok(targets)
            }
            (None, false) => {
                let lengths = given.lengths.get(rows, "targets.lengths")?;
                let of_size = (given.target_ids_size, "targets.target_ids_size");
                let rows = ragged(&given.target_ids, lengths, "targets.target_ids", of_size)?;
                Ok(rows.into_iter().map(<[i64]>::to_vec).collect())
            }
            (texts, _) => {
                let found = if texts.is_some() { "both" } else { "neither" };
                Err(t5g_error::expected(t5g_code::Input, "targets", "texts or target_ids", found))
            }
        }
    }
}

/// A JSON list.
pub fn list(json: &str, name: &str) -> Result<Vec<Value>, t5g_error> {
    let refused =
        |error: serde_json::Error| t5g_error::expected(t5g_code::Input, name, "a JSON list", error.to_string());
    serde_json::from_str(json).map_err(refused)
}

fn sized<'a>(texts: &'a [Text], sizes: Array<usize>, name: &str, of_sizes: &str) -> Result<Vec<&'a str>, t5g_error> {
    let sizes = sizes.optional(texts.len(), of_sizes)?.map(<[usize]>::to_vec);
    let sizes = sizes.unwrap_or_else(|| vec![ZERO_TERMINATED; texts.len()]);
    let text = |(row, (text, size)): (usize, (&'a Text, usize))| text.get(size, &format!("{name}[{row}]"));
    texts.iter().zip(sizes).enumerate().map(text).collect()
}

/// Rows of different lengths, concatenated. The total is compared with `size`, if the caller has set it.
fn ragged<'a>(
    ids: &'a Array<i64>,
    lengths: &[usize],
    name: &str,
    (size, of_size): (usize, &str),
) -> Result<Vec<&'a [i64]>, t5g_error> {
    let too_long = || t5g_error::argument(name, "a size that fits into memory", "more");
    let count = lengths.iter().try_fold(0usize, |sum, &length| sum.checked_add(length)).ok_or_else(too_long)?;
    same_size(of_size, size, count, "the sum of lengths")?;
    let mut rest = ids.get(count, name)?;
    let row = |&length: &usize| {
        let (row, after) = rest.split_at(length);
        rest = after;
        row
    };
    Ok(lengths.iter().map(row).collect())
}

/// Compares a size that the caller has set, 0 if not, with the expected one.
fn same_size(name: &str, given: usize, expected: usize, what: &str) -> Result<(), t5g_error> {
    if given == 0 || given == expected {
        return Ok(());
    }
    Err(t5g_error::expected(t5g_code::Input, name, format!("{expected} ({what})"), given.to_string()))
}

fn product(sizes: &[usize], name: &str) -> Result<usize, t5g_error> {
    let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    product.ok_or_else(|| t5g_error::argument(name, "a size that fits into memory", format!("{sizes:?} elements")))
}
