//! What a decoder step returns: logits and cross-attentions of its rows.

use ort::value::{DynValue, Tensor};
use t5gemma_kernels::{LogitsStats, LogitsStatsView};

use crate::error::Error;
use crate::state::Returned;

/// What a failure to read outputs says was being done.
pub(crate) const READING_LOGITS: &str = "reading the logits";

/// What a step says of the last target position of each row, or of each position of a row: the scores before any processing,
/// and what it attends to.
pub(crate) struct Logits {
    /// `[rows, 1, tokens]`: of the vocabulary, or those that are kept of it; or of those that the summary lists.
    pub value: DynValue,
    /// `[rows, 1, source]`, of models that tell it.
    pub attended: Option<DynValue>,
    /// What is known of the scores.
    pub summary: Option<LogitsStats>,
}

/// What a step says of some rows.
pub(crate) struct Said<'a> {
    /// Their scores, row after row.
    pub scores: &'a mut [f32],
    /// What is known of these.
    pub known: Option<LogitsStatsView<'a>>,
    /// What they attend to, row after row; empty of models that do not tell it.
    pub attended: &'a [f32],
    /// Scores in a row.
    pub tokens: usize,
    source: usize,
}

impl Said<'_> {
    /// `count` of the rows, from `first` on.
    pub fn rows(&mut self, first: usize, count: usize) -> Said<'_> {
        let Said { tokens, source, .. } = *self;
        Said {
            scores: &mut self.scores[first * tokens..][..count * tokens],
            known: self.known.map(|known| known.rows(first, count)),
            attended: &self.attended[first * source..][..count * source],
            tokens,
            source,
        }
    }
}

impl Logits {
    /// The scores, row after row.
    pub fn rows_mut(&mut self) -> Result<&mut [f32], Error> {
        let (_, scores) = self.value.try_extract_tensor_mut().map_err(Error::onnxruntime(READING_LOGITS))?;
        Ok(scores)
    }

    /// All of it.
    pub fn said(&mut self) -> Result<Said<'_>, Error> {
        let (tokens, mut source) = (self.value.shape()[2] as usize, 0);
        let (_, scores) = self.value.try_extract_tensor_mut().map_err(Error::onnxruntime(READING_LOGITS))?;
        let mut attended: &[f32] = &[];
        if let Some(value) = &self.attended {
            source = value.shape()[2] as usize;
            attended = value.try_extract_tensor().map_err(Error::onnxruntime(READING_LOGITS))?.1;
        }
        let known = self.summary.as_ref().map(LogitsStats::view);
        Ok(Said { scores, known, attended, tokens, source })
    }

    /// The last position of each of `rows` rows.
    pub fn last(returned: Returned, rows: usize, summary: Option<LogitsStats>) -> ort::Result<Logits> {
        let attended = returned.attended.map(|attended| last_position(attended, rows)).transpose()?;
        let value = last_position(returned.logits, rows)?;
        let summary = match summary {
            Some(summary) if summary.is_sparse() => {
                let (shape, listed) = value.try_extract_tensor::<f32>()?;
                Some(
                    summary
                        .checked_against(listed, rows)
                        .ok_or_else(|| ort::Error::new(format!("a list of logits {shape}")))?,
                )
            }
            // A summary of more rows is of all positions.
            summary => summary.filter(|summary| summary.rows() == rows),
        };
        Ok(Logits { value, attended, summary })
    }
}

/// Of `[rows, positions, width]` the last position of each row. What opening could not verify, the number of rows, is checked
/// here.
fn last_position(value: DynValue, rows: usize) -> ort::Result<DynValue> {
    let (shape, numbers) = value.try_extract_tensor::<f32>()?;
    if shape[0] != rows as i64 || shape[1] < 1 {
        return Err(ort::Error::new(format!("{rows} rows gave an output of shape {shape}")));
    }
    let (positions, width) = (shape[1] as usize, shape[2] as usize);
    if positions == 1 {
        return Ok(value);
    }
    let rows_of_all = numbers.chunks_exact(positions * width);
    let last: Vec<f32> = rows_of_all.flat_map(|row| &row[(positions - 1) * width..]).copied().collect();
    Ok(Tensor::from_array(([rows, 1, width], last))?.into_dyn())
}
