//! [`Adapt`]: makes a T5Gemma checkpoint from Gemma 2 checkpoints, as a start for training (arXiv 2504.06225, section 3).
//!
//! The encoder is a Gemma 2 whose self-attention becomes bidirectional. The decoder is a Gemma 2 with cross-attention in each layer,
//! behind self-attention, which is copied from self-attention if the widths allow it, and random otherwise.
//!
//! `config.rs` maps the fields and `tensors.rs` the tensors, `random.rs` generates new matrices, and `source.rs` opens and checks the
//! checkpoints.

mod config;
mod random;
mod source;
mod tensors;
mod tokenizer;
mod write;

use std::fmt;
use std::fs;
use std::path::Path;

use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::json::list;

use crate::checkpoint::GENERATION_CONFIG;
use crate::error::{Error, Result};
use crate::notes;
use crate::progress::Progress;
use crate::staging::{Existing, StagingDir};

use config::Common;
use source::Source;

/// The options of an adaptation.
#[derive(Clone, Debug)]
pub struct Adapt {
    /// The matrices of cross-attention; `None` copies them if encoder and decoder have the same width, and draws them otherwise.
    pub cross_init: Option<CrossInit>,
    /// The norms around cross-attention; `None` copies them if the matrices are copied, and is [`CrossNorms::Ones`] otherwise.
    pub cross_norms: Option<CrossNorms>,
    /// Seed of random matrices.
    pub seed: u64,
    /// Standard deviation of random matrices; `None` for the decoder's `initializer_range`.
    pub std: Option<f64>,
    /// Type of all tensors: float32, float16 or bfloat16; `None` for that of the sources, or float32 if they have several.
    pub dtype: Option<DType>,
    /// Most bytes of tensors in a weights file.
    pub max_shard_size: u64,
    /// Whose tokenizer to take; required if they differ.
    pub tokenizer_from: Option<Side>,
}

impl Default for Adapt {
    fn default() -> Adapt {
        Adapt {
            cross_init: None,
            cross_norms: None,
            seed: 0,
            std: None,
            dtype: None,
            max_shard_size: 5_000_000_000,
            tokenizer_from: None,
        }
    }
}

/// What the matrices of cross-attention are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CrossInit {
    /// Copies of self-attention.
    Copy,
    /// Copies of self-attention's queries and outputs; keys and values are random.
    CopyQo,
    /// Random.
    Random,
}

/// What the norms around cross-attention are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CrossNorms {
    /// Copies of those around self-attention.
    Copy,
    /// Factors 1, as in a new model.
    Ones,
    /// A copy before cross-attention, and factors 0 behind it: cross-attention adds nothing, and the decoder computes what its Gemma 2
    /// computes, until training changes the factors.
    Closed,
}

/// A source of the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The Gemma 2 that becomes the encoder.
    Encoder,
    /// The Gemma 2 that becomes the decoder.
    Decoder,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Encoder => "encoder",
            Side::Decoder => "decoder",
        })
    }
}

/// The choices that an adaptation made, for options that leave them open.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Resolved {
    /// The matrices of cross-attention.
    pub cross_init: CrossInit,
    /// The norms around it.
    pub cross_norms: CrossNorms,
    /// Seed of random matrices.
    pub seed: u64,
    /// Their standard deviation.
    pub std: f64,
    /// Type of all tensors.
    pub dtype: DType,
    /// Whether the head is the decoder's embedding.
    pub tied: bool,
}

/// The result of an adaptation.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Adapted {
    /// What was chosen.
    pub choices: Resolved,
    /// Parameters of the model, each tensor once.
    pub parameters: u64,
    /// Bytes of tensors.
    pub bytes: u64,
    /// Remarks for people.
    pub notes: Vec<String>,
    /// Probable mistakes, for people.
    pub warnings: Vec<String>,
}

impl Adapt {
    /// Writes the checkpoint folder `out`. It has another name until it is complete, so an adaptation that fails leaves nothing behind.
    /// The two folders may be the same.
    ///
    /// # Errors
    /// Folders that are no Gemma 2 checkpoints or do not go together, options that they do not allow, or a folder that cannot be written.
    pub fn run(&self, encoder: &Path, decoder: &Path, out: &Path) -> Result<Adapted> {
        self.run_with(encoder, decoder, out, &())
    }

    /// As [`run`](Adapt::run), followed by `progress`, which can cancel it.
    ///
    /// # Errors
    /// The same, and [`Error::Cancelled`].
    pub fn run_with(&self, encoder: &Path, decoder: &Path, out: &Path, progress: &dyn Progress) -> Result<Adapted> {
        let of_encoder = Source::open(encoder, Side::Encoder)?;
        let other = if is_same(encoder, decoder) { None } else { Some(Source::open(decoder, Side::Decoder)?) };
        let (encoder, decoder) = (&of_encoder, other.as_ref().unwrap_or(&of_encoder));
        decoder.check_decoder()?;
        check_vocabularies(encoder, decoder)?;
        let choices = self.resolve(encoder, decoder)?;
        let tokens = decoder.config.tokens.of_decoder().map_err(|error| decoder.error(Side::Decoder, error))?;
        let common = Common { dtype: choices.dtype, tied: choices.tied, tokens };
        let config = common.config(&encoder.config, &decoder.config);
        let text = text_of(&config);
        // Nothing is written that could not be exported.
        Config::parse(&text).map_err(|error| Error::config("the configuration of the new model", error))?;
        let tokenizer = tokenizer::files(encoder, decoder, self.tokenizer_from)?;
        let planned = tensors::plan(encoder, decoder, &choices);
        tensors::check_size(&planned)?;

        let folder = StagingDir::create(out, Existing::Refuse)?;
        folder.write("config.json", text.as_bytes())?;
        folder.write(GENERATION_CONFIG, text_of(&common.generation_config()).as_bytes())?;
        for (name, bytes) in &tokenizer {
            folder.write(name, bytes)?;
        }
        let written = write::write(&folder, &planned, choices.dtype, self.max_shard_size, progress)?;
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        folder.publish()?;

        let parameters = planned.iter().map(|tensor| tensor.elements() as u64).sum();
        let mut warnings = differing_tokens(encoder, &common);
        warnings.extend(overflow(choices.dtype, &written.overflows));
        let notes = notes_of(encoder, decoder, tokenizer.is_empty());
        Ok(Adapted { choices, parameters, bytes: written.bytes, notes, warnings })
    }

    fn resolve(&self, encoder: &Source, decoder: &Source) -> Result<Resolved> {
        let (of_encoder, of_decoder) = (encoder.config.hidden_size, decoder.config.hidden_size);
        let default = if of_encoder == of_decoder { CrossInit::Copy } else { CrossInit::Random };
        let cross_init = self.cross_init.unwrap_or(default);
        if cross_init == CrossInit::Copy && of_encoder != of_decoder {
            let expected =
                format!("the encoder's hidden_size ({of_encoder}), to copy cross-attention from self-attention");
            return Err(Error::invalid("decoder", expected, of_decoder.to_string()).of("hidden_size"));
        }
        let default = if cross_init == CrossInit::Copy { CrossNorms::Copy } else { CrossNorms::Ones };
        let tied = tensors::is_tied(decoder);
        Ok(Resolved {
            cross_init,
            cross_norms: self.cross_norms.unwrap_or(default),
            seed: self.seed,
            std: self.std.unwrap_or(decoder.config.initializer_range),
            dtype: self.dtype.unwrap_or_else(|| tensors::common_dtype([encoder, decoder], !tied)),
            tied,
        })
    }
}

/// Whether two paths are of one folder, which is read once.
fn is_same(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

fn text_of(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value has string keys") + "\n"
}

fn check_vocabularies(encoder: &Source, decoder: &Source) -> Result<()> {
    let (of_encoder, of_decoder) = (encoder.config.vocab_size, decoder.config.vocab_size);
    if of_encoder == of_decoder {
        return Ok(());
    }
    let expected = format!("the encoder's vocab_size ({of_encoder})");
    Err(Error::invalid("decoder", expected, of_decoder.to_string()).of("vocab_size"))
}

/// Warns of special tokens of the encoder that the model does not use.
fn differing_tokens(encoder: &Source, common: &Common) -> Vec<String> {
    let (theirs, ours) = (&encoder.config.tokens, &common.tokens);
    let pairs = [("bos_token_id", &theirs.bos, &ours.bos), ("pad_token_id", &theirs.pad, &ours.pad)];
    let differing = pairs.into_iter().filter(|(_, theirs, ours)| !theirs.is_null() && theirs != ours);
    differing
        .map(|(field, theirs, ours)| {
            format!("{field} is {theirs} in the encoder and {ours} in the decoder, whose is used")
        })
        .collect()
}

/// Warns of numbers that a narrower type does not have.
fn overflow(dtype: DType, overflows: &[(String, u64)]) -> Option<String> {
    let named: Vec<String> = overflows.iter().map(|(tensor, count)| format!("{tensor} ({count})")).collect();
    let list = list(&named);
    (!named.is_empty()).then(|| format!("numbers beyond {dtype} became infinite, by tensor: {list}"))
}

fn notes_of(encoder: &Source, decoder: &Source, has_no_tokenizer: bool) -> Vec<String> {
    let field = "query_pre_attn_scalar";
    // It was wrong for some days in a published checkpoint.
    let mut notes =
        vec![format!("{field}: {} (encoder), {} (decoder)", encoder.config.field(field), decoder.config.field(field))];
    for (side, source) in [(Side::Encoder, encoder), (Side::Decoder, decoder)] {
        if !source.config.dropped.is_empty() {
            let dropped = list(&source.config.dropped);
            notes.push(format!("config.json of the {side}: fields without a place in T5Gemma: {dropped}"));
        }
    }
    if has_no_tokenizer {
        notes.extend(notes::of_tokenizer(decoder.checkpoint().folder()));
    }
    notes
}
