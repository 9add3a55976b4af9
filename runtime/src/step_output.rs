//! The outputs of a decoder step: logits and cross-attentions of its rows, as tensors and as slices.

use ort::value::{DynValue, Tensor};
use t5gemma_kernels::{LogitsStats, LogitsStatsView};

use crate::error::Error;
use crate::state::DecoderOutputs;

/// The operation that errors in reading outputs name.
pub(crate) const READING_LOGITS: &str = "reading the logits";

/// The outputs of a decoder step at the last target position of each row, or at each position of one row.
pub(crate) struct StepTensors {
    /// `[rows, 1, tokens]`, before any processing: tokens of the vocabulary or of its kept subset, or those of sparse
    /// rows.
    pub logits: DynValue,
    /// `[rows, 1, source]`, of models that were exported with them.
    pub cross_attentions: Option<DynValue>,
    /// Per-row statistics of the logits, if the kernels computed some.
    pub stats: Option<LogitsStats>,
}

/// The outputs of a decoder step for a range of rows.
pub(crate) struct StepOutput<'a> {
    /// The logits, row after row.
    pub logits: &'a mut [f32],
    /// Their statistics.
    pub stats: Option<LogitsStatsView<'a>>,
    /// Cross-attention probabilities, row after row; empty for models without them.
    pub cross_attentions: &'a [f32],
    /// The length of a row of logits.
    pub row_length: usize,
    source: usize,
}

impl StepOutput<'_> {
    /// `count` of the rows, from `first` on.
    pub fn rows(&mut self, first: usize, count: usize) -> StepOutput<'_> {
        let StepOutput { row_length, source, .. } = *self;
        StepOutput {
            logits: &mut self.logits[first * row_length..][..count * row_length],
            stats: self.stats.map(|stats| stats.rows(first, count)),
            cross_attentions: &self.cross_attentions[first * source..][..count * source],
            row_length,
            source,
        }
    }
}

impl StepTensors {
    /// The last position of each of `rows` rows.
    pub fn last_positions(
        outputs: DecoderOutputs,
        rows: usize,
        stats: Option<LogitsStats>,
    ) -> ort::Result<StepTensors> {
        let cross_attentions = outputs.cross_attentions.map(|value| last_position(value, rows)).transpose()?;
        let logits = last_position(outputs.logits, rows)?;
        let stats = match stats {
            Some(stats) if stats.is_sparse() => {
                let (shape, listed) = logits.try_extract_tensor::<f32>()?;
                let checked = stats.checked_against(listed, rows);
                Some(checked.ok_or_else(|| ort::Error::new(format!("sparse logits of shape {shape}")))?)
            }
            // Statistics of more rows are of all positions.
            stats => stats.filter(|stats| stats.rows() == rows),
        };
        Ok(StepTensors { logits, cross_attentions, stats })
    }

    /// The logits, row after row.
    pub fn logits_mut(&mut self) -> Result<&mut [f32], Error> {
        let (_, logits) = self.logits.try_extract_tensor_mut().map_err(Error::onnxruntime(READING_LOGITS))?;
        Ok(logits)
    }

    /// All rows.
    pub fn output(&mut self) -> Result<StepOutput<'_>, Error> {
        let (row_length, mut source) = (self.logits.shape()[2] as usize, 0);
        let (_, logits) = self.logits.try_extract_tensor_mut().map_err(Error::onnxruntime(READING_LOGITS))?;
        let mut cross_attentions: &[f32] = &[];
        if let Some(value) = &self.cross_attentions {
            source = value.shape()[2] as usize;
            cross_attentions = value.try_extract_tensor().map_err(Error::onnxruntime(READING_LOGITS))?.1;
        }
        let stats = self.stats.as_ref().map(LogitsStats::view);
        Ok(StepOutput { logits, stats, cross_attentions, row_length, source })
    }
}

/// The last position of each row of `value`, `[rows, positions, width]`. The number of rows is checked here, because
/// opening could not.
fn last_position(value: DynValue, rows: usize) -> ort::Result<DynValue> {
    let (shape, numbers) = value.try_extract_tensor::<f32>()?;
    if shape[0] != rows as i64 || shape[1] < 1 {
        return Err(ort::Error::new(format!("expected an output of {rows} rows, found shape {shape}")));
    }
    let (positions, width) = (shape[1] as usize, shape[2] as usize);
    if positions == 1 {
        return Ok(value);
    }
    let rows_of_all = numbers.chunks_exact(positions * width);
    let last: Vec<f32> = rows_of_all.flat_map(|row| &row[(positions - 1) * width..]).copied().collect();
    Ok(Tensor::from_array(([rows, 1, width], last))?.into_dyn())
}
