//! Computes vectors and labels with encoders and classifiers.

use std::fmt;

use serde_json::{Map, Value};
use t5gemma_protocol::{AnyLength, EncodeRequest, RequestError, Tokenize, TokenizedRequest, batch};
use t5gemma_runtime::{Cancellation, Encoder, Error, Pooling, ScoreFunction, Task as ModelTask};

use super::refused;
use crate::answer::{Answer, Cell, Kind, ResultColumn};
use crate::columns::{Columns, Task, VectorFormat};

/// Computes one vector for each row.
pub struct Encoding<'a> {
    /// The model.
    pub encoder: &'a Encoder,
    /// What rows are tokenized with.
    pub tokenize: &'a (dyn Tokenize + Sync),
    /// How states become one vector; not [`Pooling::None`].
    pub pooling: Pooling,
    /// Whether vectors are L2-normalized.
    pub normalize: bool,
    /// The most tokens of a source; longer ones are truncated if `truncation` is set, and otherwise refused.
    pub max_length: Option<usize>,
    /// See `max_length`.
    pub truncation: bool,
    /// Rows of a batch.
    pub batch_size: usize,
}

impl fmt::Debug for Encoding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoding").field("pooling", &self.pooling).finish_non_exhaustive()
    }
}

impl Encoding<'_> {
    pub(super) fn results(&self, columns: &Columns) -> Vec<ResultColumn> {
        match columns.vectors {
            VectorFormat::Column => columns.results(Task::Encode, Kind::Vector, &[]),
            VectorFormat::Npy => Vec::new(),
        }
    }

    pub(super) fn width(&self) -> usize {
        self.encoder.facts().encoder.hidden_size
    }

    pub(super) fn tokenize(&self, fields: Map<String, Value>) -> Result<TokenizedRequest, RequestError> {
        let request = EncodeRequest::try_from(fields)?;
        let Some(most) = self.max_length.filter(|_| self.truncation) else {
            let row = request.tokenize(0.into(), self.tokenize)?;
            return match self.max_length {
                Some(most) if row.sources.iter().any(|source| source.len() > most) => {
                    let expected = format!("at most {most} tokens (--max-length) or --truncation");
                    Err(refused("text", &expected, row.sources[0].len().to_string()))
                }
                _ => Ok(row),
            };
        };
        let mut row = request.tokenize(0.into(), &AnyLength(self.tokenize))?;
        row.sources.iter_mut().chain(&mut row.mask).for_each(|list| list.truncate(most));
        Ok(row)
    }

    pub(super) fn answers(&self, rows: &[&TokenizedRequest], cancel: &Cancellation) -> Result<Vec<Answer>, Error> {
        let batch = batch(rows, self.encoder.pad_token_id())?;
        let batch = self.encoder.pad(&batch);
        let vectors = match self.normalize {
            true => self.encoder.embed_normalized(&batch, self.pooling, cancel)?,
            false => self.encoder.embed(&batch, self.pooling, cancel)?,
        };
        let answer = |(row, vector): (&&TokenizedRequest, t5gemma_runtime::ndarray::ArrayView1<'_, f32>)| Answer {
            cells: vec![Cell::Vector(vector.to_vec())],
            source_tokens: row.source_tokens(),
            target_tokens: 0,
        };
        Ok(rows.iter().zip(vectors.outer_iter()).map(answer).collect())
    }
}

/// Computes the labels of each row.
pub struct Classifying<'a> {
    /// The model.
    pub encoder: &'a Encoder,
    /// What rows are tokenized with.
    pub tokenize: &'a (dyn Tokenize + Sync),
    /// How logits become scores.
    pub function: ScoreFunction,
    /// The number of labels of a text, best first; of tokens there is one.
    pub top_k: usize,
    /// Rows of a batch.
    pub batch_size: usize,
}

impl fmt::Debug for Classifying<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Classifying").field("function", &self.function).finish_non_exhaustive()
    }
}

impl Classifying<'_> {
    fn is_of_tokens(&self) -> bool {
        self.encoder.manifest().task == ModelTask::TokenClassification
    }

    pub(super) fn results(&self, columns: &Columns) -> Vec<ResultColumn> {
        match (self.is_of_tokens(), self.top_k) {
            (true, _) => {
                let others = [("score", Kind::Floats), ("token", Kind::Integers)];
                columns.results(Task::Classify, Kind::Texts, &others)
            }
            (false, 1) => columns.results(Task::Classify, Kind::Text, &[("score", Kind::Float)]),
            (false, _) => columns.results(Task::Classify, Kind::Texts, &[("score", Kind::Floats)]),
        }
    }

    pub(super) fn tokenize(&self, fields: Map<String, Value>) -> Result<TokenizedRequest, RequestError> {
        EncodeRequest::try_from(fields)?.tokenize(0.into(), self.tokenize)
    }

    pub(super) fn answers(&self, rows: &[&TokenizedRequest], cancel: &Cancellation) -> Result<Vec<Answer>, Error> {
        let batch = batch(rows, self.encoder.pad_token_id())?;
        let answer = |row: &TokenizedRequest, cells: Vec<Cell>| Answer {
            cells,
            source_tokens: row.source_tokens(),
            target_tokens: 0,
        };
        if !self.is_of_tokens() {
            let logits = self.encoder.classify(&batch, cancel)?;
            let of_row = |(row, logits): (&&TokenizedRequest, t5gemma_runtime::ndarray::ArrayView1<'_, f32>)| {
                let (labels, scores): (Vec<String>, Vec<f64>) =
                    self.best(&logits.to_vec(), self.top_k)?.into_iter().unzip();
                Ok(match self.top_k {
                    1 => answer(row, vec![Cell::Text(labels.concat()), Cell::Float(scores[0])]),
                    _ => answer(row, vec![Cell::Texts(labels), Cell::Floats(scores)]),
                })
            };
            return rows.iter().zip(logits.outer_iter()).map(of_row).collect();
        }
        let logits = self.encoder.classify_tokens(&batch, cancel)?;
        let of_row = |(at, row): (usize, &&TokenizedRequest)| {
            let seen = batch.source(at).iter().zip(batch.row_mask(at)).enumerate().filter(|(_, (_, mask))| **mask != 0);
            let (mut labels, mut scores, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
            for (place, (&token, _)) in seen {
                let logits = logits.slice(t5gemma_runtime::ndarray::s![at, place, ..]);
                let (label, score) = self.best(&logits.to_vec(), 1)?.remove(0);
                labels.push(label);
                scores.push(score);
                tokens.push(token);
            }
            Ok(answer(row, vec![Cell::Texts(labels), Cell::Floats(scores), Cell::Integers(tokens)]))
        };
        rows.iter().enumerate().map(of_row).collect()
    }

    /// The best labels with their scores; ties keep the model's order.
    fn best(&self, logits: &[f32], count: usize) -> Result<Vec<(String, f64)>, Error> {
        let names = &self.encoder.classifier()?.labels;
        let scores = self.function.scores(logits);
        let mut labels: Vec<(&String, f32)> = names.iter().zip(scores).collect();
        labels.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        labels.truncate(count.max(1));
        Ok(labels.into_iter().map(|(label, score)| (label.clone(), f64::from(score))).collect())
    }
}
