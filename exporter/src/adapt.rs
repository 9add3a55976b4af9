//! [`Adapt`]: makes a T5Gemma checkpoint from Gemma 2 checkpoints, as a start for training (arXiv 2504.06225, section 3), or a T5Gemma 2
//! checkpoint from Gemma 3 checkpoints.
//!
//! The encoder is a Gemma 2 whose self-attention becomes bidirectional. The decoder is a Gemma 2 with cross-attention in each layer,
//! behind self-attention, which is copied from self-attention if the widths allow it, and random otherwise. T5Gemma 2 merges
//! cross-attention with self-attention, so that nothing is random.
//!
//! `config.rs` maps the fields and `tensors.rs` the tensors, `random.rs` generates new matrices, and `source.rs` opens and checks the
//! checkpoints; `gemma3.rs` does all this for Gemma 3.

mod config;
mod gemma3;
mod gemma3_vision;
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
use crate::files;
use crate::images;
use crate::notes;
use crate::progress::Progress;
use crate::staging::{Existing, StagingDir};

use config::{Common, TokenIds};
use gemma3::Gemma3;
use source::Source;
use tensors::Planned;

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
    /// The Gemma that becomes the encoder.
    Encoder,
    /// The Gemma that becomes the decoder.
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
    /// Cross-attention; none in T5Gemma 2.
    pub cross_attention: Option<CrossAttention>,
    /// Type of all tensors.
    pub dtype: DType,
    /// Whether the head is the decoder's embedding.
    pub tied: bool,
}

/// What cross-attention is made of.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CrossAttention {
    /// The matrices.
    pub init: CrossInit,
    /// The norms around it.
    pub norms: CrossNorms,
    /// Seed of random matrices.
    pub seed: u64,
    /// Their standard deviation.
    pub std: f64,
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
    /// Folders that are no Gemma 2 or Gemma 3 checkpoints or do not go together, options that they do not allow, or a folder that cannot
    /// be written.
    pub fn run(&self, encoder: &Path, decoder: &Path, out: &Path) -> Result<Adapted> {
        self.run_with(encoder, decoder, out, &())
    }

    /// As [`run`](Adapt::run), followed by `progress`, which can cancel it.
    ///
    /// # Errors
    /// The same, and [`Error::Cancelled`].
    pub fn run_with(&self, encoder: &Path, decoder: &Path, out: &Path, progress: &dyn Progress) -> Result<Adapted> {
        if [encoder, decoder].into_iter().any(is_gemma3) {
            return self.run_gemma3(encoder, decoder, out, progress);
        }
        let of_encoder = Source::open(encoder, Side::Encoder)?;
        let other = if is_same(encoder, decoder) { None } else { Some(Source::open(decoder, Side::Decoder)?) };
        let (encoder, decoder) = (&of_encoder, other.as_ref().unwrap_or(&of_encoder));
        decoder.check_decoder()?;
        check_equal("vocab_size", encoder.config.sizes.vocab_size, decoder.config.sizes.vocab_size)?;
        let cross = self.resolve(encoder, decoder)?;
        let tied = tensors::is_tied(decoder);
        let dtype = self.dtype.unwrap_or_else(|| tensors::common_dtype([encoder, decoder], !tied));
        let tokens = decoder.config.tokens.of_decoder().map_err(|error| decoder.error(Side::Decoder, error))?;
        let common = Common { dtype, tied, tokens };
        let folders = [encoder, decoder].map(|source| source.checkpoint().folder());
        let files = tokenizer::files(folders, self.tokenizer_from)?;
        let mut notes = notes_of(encoder, decoder);
        if files.is_empty() {
            notes.extend(notes::of_tokenizer(folders[1]));
        }
        let planned = tensors::plan(encoder, decoder, &cross, tied);
        tensors::check_size(&planned)?;
        let choices = Resolved { cross_attention: Some(cross), dtype, tied };
        let warnings = differing_tokens(&encoder.config.tokens, &common);
        let config = common.config(&encoder.config, &decoder.config);
        let new = NewCheckpoint { config, common, files, planned, notes, warnings };
        new.write(out, self.max_shard_size, choices, progress)
    }

    fn run_gemma3(&self, encoder: &Path, decoder: &Path, out: &Path, progress: &dyn Progress) -> Result<Adapted> {
        let given = [
            ("cross_init", self.cross_init.map(|init| format!("{init:?}"))),
            ("cross_norms", self.cross_norms.map(|norms| format!("{norms:?}"))),
            ("std", self.std.map(|std| std.to_string())),
        ];
        if let Some((option, Some(found))) = given.into_iter().find(|(_, given)| given.is_some()) {
            let expected = "nothing (Gemma 3 adapts to T5Gemma 2, in which no tensor is random)";
            return Err(Error::invalid("options", expected, found).of(option));
        }
        let of_encoder = Gemma3::open(encoder, Side::Encoder)?;
        let other = if is_same(encoder, decoder) { None } else { Some(Gemma3::open(decoder, Side::Decoder)?) };
        let (encoder, decoder) = (&of_encoder, other.as_ref().unwrap_or(&of_encoder));
        decoder.check_decoder()?;
        check_equal("hidden_size", encoder.sizes.hidden_size, decoder.sizes.hidden_size)?;
        check_equal("vocab_size", encoder.sizes.vocab_size, decoder.sizes.vocab_size)?;
        let dtype = self.dtype.unwrap_or_else(|| gemma3::common_dtype(encoder, decoder));
        let tokens = decoder.tokens.of_decoder().map_err(|error| decoder.error(Side::Decoder, error))?;
        // Of tables that are stored separately, each counts.
        let common = Common { dtype, tied: true, tokens };
        let mut files = tokenizer::files([encoder.folder(), decoder.folder()], self.tokenizer_from)?;
        let mut notes = Vec::new();
        if files.is_empty() {
            notes.extend(notes::of_tokenizer(decoder.folder()));
        }
        if encoder.reads_images() {
            for name in [images::PREPROCESSOR, images::PROCESSOR] {
                files.extend(tokenizer::read(encoder.folder(), name)?.map(|bytes| (name, bytes)));
            }
        } else {
            notes.push(
                "the encoder reads no images: transformers adds a tower with random weights when it loads it".into(),
            );
        }
        let (planned, tied) = gemma3::plan(encoder, decoder);
        tensors::check_size(&planned)?;
        let choices = Resolved { cross_attention: None, dtype, tied };
        let warnings = differing_tokens(&encoder.tokens, &common);
        let config = gemma3::config(&common, encoder, decoder);
        let new = NewCheckpoint { config, common, files, planned, notes, warnings };
        new.write(out, self.max_shard_size, choices, progress)
    }

    fn resolve(&self, encoder: &Source, decoder: &Source) -> Result<CrossAttention> {
        let (of_encoder, of_decoder) = (encoder.config.sizes.hidden_size, decoder.config.sizes.hidden_size);
        let default = if of_encoder == of_decoder { CrossInit::Copy } else { CrossInit::Random };
        let init = self.cross_init.unwrap_or(default);
        if init == CrossInit::Copy && of_encoder != of_decoder {
            let expected =
                format!("the encoder's hidden_size ({of_encoder}), to copy cross-attention from self-attention");
            return Err(Error::invalid("decoder", expected, of_decoder.to_string()).of("hidden_size"));
        }
        let default = if init == CrossInit::Copy { CrossNorms::Copy } else { CrossNorms::Ones };
        Ok(CrossAttention {
            init,
            norms: self.cross_norms.unwrap_or(default),
            seed: self.seed,
            std: self.std.unwrap_or(decoder.config.initializer_range),
        })
    }
}

/// A checkpoint that is ready to be written.
struct NewCheckpoint<'s> {
    config: serde_json::Value,
    common: Common,
    /// Files beside the weights.
    files: Vec<(&'static str, Vec<u8>)>,
    planned: Vec<Planned<'s>>,
    /// See [`Adapted`].
    notes: Vec<String>,
    warnings: Vec<String>,
}

impl NewCheckpoint<'_> {
    fn write(mut self, out: &Path, shard_size: u64, choices: Resolved, progress: &dyn Progress) -> Result<Adapted> {
        let text = text_of(&self.config);
        // Nothing is written that could not be exported.
        Config::parse(&text).map_err(|error| Error::config("the configuration of the new model", error))?;
        let folder = StagingDir::create(out, Existing::Refuse)?;
        folder.write("config.json", text.as_bytes())?;
        folder.write(GENERATION_CONFIG, text_of(&self.common.generation_config()).as_bytes())?;
        for (name, bytes) in &self.files {
            folder.write(name, bytes)?;
        }
        let written = write::write(&folder, &self.planned, choices.dtype, shard_size, progress)?;
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        folder.publish()?;
        let parameters = self.planned.iter().map(|tensor| tensor.elements() as u64).sum();
        self.warnings.extend(overflow(choices.dtype, &written.overflows));
        let NewCheckpoint { notes, warnings, .. } = self;
        Ok(Adapted { choices, parameters, bytes: written.bytes, notes, warnings })
    }
}

/// Whether a folder is of a Gemma 3, as far as can be told before it is opened.
fn is_gemma3(folder: &Path) -> bool {
    files::read_json_object(&folder.join("config.json")).is_ok_and(|(_, config)| gemma3::is_gemma3(&config))
}

/// Whether two paths are of one folder, which is read once.
fn is_same(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

fn text_of(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value has string keys") + "\n"
}

/// Requires a size of the decoder to be the encoder's.
fn check_equal(field: &str, of_encoder: usize, of_decoder: usize) -> Result<()> {
    if of_encoder == of_decoder {
        return Ok(());
    }
    let expected = format!("the encoder's {field} ({of_encoder})");
    Err(Error::invalid("decoder", expected, of_decoder.to_string()).of(field))
}

/// Warns of special tokens of the encoder that the model does not use.
fn differing_tokens(theirs: &TokenIds, common: &Common) -> Vec<String> {
    let ours = &common.tokens;
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

fn notes_of(encoder: &Source, decoder: &Source) -> Vec<String> {
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
    notes
}
