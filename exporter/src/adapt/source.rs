//! [`Source`]: a Gemma 2 checkpoint, opened and checked, so that a plan of its tensors cannot fail.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use t5gemma_graphs::json::cut;

use super::Side;
use super::config::{FieldError, Gemma2Config};
use super::tensors::{Renamed, renamed};
use crate::checkpoint::{Checkpoint, GENERATION_CONFIG, Tensor};
use crate::error::{Error, Result};
use crate::files;

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const HEAD: &str = "lm_head.weight";

/// Bytes that are compared at a time.
const CHUNK: usize = 8 << 20;

/// A Gemma 2 checkpoint, with or without a head.
pub struct Source {
    side: Side,
    checkpoint: Checkpoint,
    pub config: Gemma2Config,
}

impl Source {
    /// Opens a folder.
    ///
    /// # Errors
    /// Not a Gemma 2 checkpoint, or one that T5Gemma cannot be made of; with the side.
    pub fn open(folder: &Path, side: Side) -> Result<Source> {
        let (checkpoint, Configs { path, config, generation }) = open(folder, side)?;
        let config =
            Gemma2Config::read(&config, generation.as_ref()).map_err(|error| field_error(&path, side, error))?;
        let source = Source { side, checkpoint, config };
        source.check_tensors()?;
        Ok(source)
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// An error of the source as the decoder's, or of both.
    pub fn error(&self, side: Side, error: FieldError) -> Error {
        field_error(&self.checkpoint.config_path(), side, error)
    }

    /// A tensor by its name in a Gemma 2 with a head; without, names are stored without `model.`.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let without = || self.checkpoint.tensor(name.strip_prefix("model.")?);
        self.checkpoint.tensor(name).or_else(without)
    }

    /// What the decoder must have besides.
    pub fn check_decoder(&self) -> Result<()> {
        if let Some(value) = &self.config.bidirectional {
            let field = "use_bidirectional_attention".to_string();
            let expected = "false or null (a decoder predicts the next token)".to_string();
            return Err(self.error(Side::Decoder, FieldError { field, expected, found: value.to_string() }));
        }
        let shape = self.tensor(EMBEDDING).expect("it was checked").shape;
        match self.tensor(HEAD) {
            None if self.config.tie_word_embeddings => Ok(()),
            None => {
                let mismatch = format!("{HEAD}: missing (tie_word_embeddings is false; expected shape {shape:?})");
                Err(self.mismatches(Side::Decoder, vec![mismatch]))
            }
            Some(head) if head.shape != shape => {
                let mismatch = format!("{HEAD}: expected shape {shape:?}, found {:?}", head.shape);
                Err(self.mismatches(Side::Decoder, vec![mismatch]))
            }
            Some(head) => self.check_dtype(Side::Decoder, HEAD, head),
        }
    }

    fn check_tensors(&self) -> Result<()> {
        let (expected, mut mismatches) = (renamed(&self.config.sizes), Vec::new());
        for Renamed { from, shape, .. } in &expected {
            let name = format!("model.{from}");
            match self.tensor(&name) {
                Some(tensor) if tensor.shape == *shape => self.check_dtype(self.side, &name, tensor)?,
                tensor => mismatches.extend(mismatch(&name, shape, tensor)),
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|tensor| tensor.from.as_str()).collect();
        // With both forms of a name, the one without `model.` is another tensor.
        let is_other = |name: &str| self.checkpoint.tensor(&format!("model.{name}")).is_some();
        let is_unexpected = |name: &&str| match name.strip_prefix("model.") {
            _ if *name == HEAD || is_ignored(name) => false,
            Some(rest) => !known.contains(rest),
            None => !known.contains(name) || is_other(name),
        };
        for name in self.checkpoint.names().filter(is_unexpected) {
            let shape = self.checkpoint.tensor(name).map(|tensor| tensor.shape).unwrap_or_default();
            mismatches.push(format!("{}: expected no tensor of this name, found one of shape {shape:?}", cut(name)));
        }
        if mismatches.is_empty() { Ok(()) } else { Err(self.mismatches(self.side, mismatches)) }
    }

    fn check_dtype(&self, side: Side, name: &str, tensor: Tensor<'_>) -> Result<()> {
        if tensor.float().is_some() {
            return Ok(());
        }
        let file = self.checkpoint.file_of(name).unwrap_or_else(|| self.checkpoint.folder().to_path_buf());
        let found = format!("{:?}", tensor.dtype);
        Err(Error::invalid(file.display(), "F32, BF16 or F16", found).of(name).on(side))
    }

    fn mismatches(&self, side: Side, mismatches: Vec<String>) -> Error {
        let checkpoint = self.checkpoint.path().to_path_buf();
        Error::Tensors { checkpoint, mismatches, hint: String::new() }.on(side)
    }
}

/// The configurations of a checkpoint.
pub struct Configs {
    /// Of `config.json`.
    pub path: PathBuf,
    pub config: Map<String, Value>,
    pub generation: Option<Map<String, Value>>,
}

/// Opens a folder and reads its configurations.
pub fn open(folder: &Path, side: Side) -> Result<(Checkpoint, Configs)> {
    let checkpoint = Checkpoint::open(folder).map_err(|error| error.on(side))?;
    checkpoint.check_present(|tensor| !is_ignored(tensor)).map_err(|error| error.on(side))?;
    let read = |path: &Path| -> Result<Map<String, Value>> {
        let (_, value) = files::read_json_object(path).map_err(|error| error.on(side))?;
        Ok(value.as_object().expect("it was read as an object").clone())
    };
    let (path, generation_path) = (checkpoint.config_path(), checkpoint.folder().join(GENERATION_CONFIG));
    let config = read(&path)?;
    let generation = if files::entry_exists(&generation_path) { Some(read(&generation_path)?) } else { None };
    Ok((checkpoint, Configs { path, config, generation }))
}

/// Whether two tensors, or parts of them, are the same bytes.
pub fn same_bytes((of_a, a): (&Checkpoint, &[u8]), (of_b, b): (&Checkpoint, &[u8])) -> bool {
    let is_same = |(a, b): (&[u8], &[u8])| {
        let is_same = a == b;
        of_a.release(a);
        of_b.release(b);
        is_same
    };
    a.len() == b.len() && a.chunks(CHUNK).zip(b.chunks(CHUNK)).all(is_same)
}

/// What is wrong with a tensor that has to have a shape, if anything is.
pub fn mismatch(name: &str, shape: &[usize], tensor: Option<Tensor>) -> Option<String> {
    match tensor {
        None => Some(format!("{name}: missing (expected shape {shape:?})")),
        Some(tensor) if tensor.shape != shape => {
            Some(format!("{name}: expected shape {shape:?}, found {:?}", tensor.shape))
        }
        Some(_) => None,
    }
}

/// Whether a tensor is of no use: a classifier's head, rotary frequencies that older versions stored.
pub fn is_ignored(name: &str) -> bool {
    name.starts_with("score.") || name.ends_with(".rotary_emb.inv_freq")
}

pub fn field_error(path: &Path, side: Side, FieldError { field, expected, found }: FieldError) -> Error {
    Error::invalid(path.display(), expected, found).of(field).on(side)
}
