//! `State`: what the decoder remembers of the rows in flight between two steps. The keys and values that one run returns
//! are fed to the next as they are; only a change of rows (beams that continue another beam, items that have finished)
//! copies them. Which row continues which is decided elsewhere.

use half::{bf16, f16};
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor, TensorElementType};

use crate::error::Error;

/// The keys and values of the rows in flight, with the mask of their sources.
///
/// Target rows are ordered by source item: the beams of one item are adjacent, and every item has as many.
pub(crate) struct State {
    /// `[items, source]`.
    mask: DynValue,
    /// The inputs of the cached decoder step after mask and tokens, in its order.
    past: Vec<DynValue>,
    /// For each of `past`, whether its first axis is source items (cross-attention) or target rows (self-attention).
    per_item: Vec<bool>,
    items: usize,
    rows: usize,
}

impl State {
    /// The state after the first decoder step, which runs one target row for each source item.
    pub fn new(mask: DynValue, past: Vec<DynValue>, per_item: Vec<bool>) -> State {
        let items = mask.shape()[0] as usize;
        State { mask, past, per_item, items, rows: items }
    }

    /// The number of source items in flight.
    pub fn items(&self) -> usize {
        self.items
    }

    /// The number of target rows in flight.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The sources' mask.
    pub fn mask(&self) -> &DynValue {
        &self.mask
    }

    /// Everything cached, in the order of the graph's inputs.
    pub fn past(&self) -> &[DynValue] {
        &self.past
    }

    /// Takes a step's grown self-attention keys and values, in the order of the graph's outputs.
    pub fn grow(&mut self, present: impl IntoIterator<Item = DynValue>) {
        let grown = self.past.iter_mut().zip(&self.per_item).filter(|(_, per_item)| !**per_item);
        for ((past, _), present) in grown.zip(present) {
            *past = present;
        }
    }

    /// Keeps the source items `items`, and makes target row `r` the continuation of row `parents[r]`. Both count in the
    /// items and rows of before the call; `parents` holds as many rows for each kept item.
    pub fn select(&mut self, items: &[usize], parents: &[usize]) -> Result<(), Error> {
        let gather = |value: &mut DynValue, rows: &[usize], before: usize| -> Result<(), Error> {
            if !rows.iter().copied().eq(0..before) {
                *value = gather_rows(value, rows).map_err(Error::onnxruntime("reordering the cache"))?;
            }
            Ok(())
        };
        gather(&mut self.mask, items, self.items)?;
        for (past, &per_item) in self.past.iter_mut().zip(&self.per_item) {
            match per_item {
                true => gather(past, items, self.items)?,
                false => gather(past, parents, self.rows)?,
            }
        }
        (self.items, self.rows) = (items.len(), parents.len());
        Ok(())
    }
}

/// A tensor of the given rows (entries of the first axis) of another, whatever the element type.
fn gather_rows(value: &DynValue, rows: &[usize]) -> ort::Result<DynValue> {
    match value.data_type() {
        TensorElementType::Float32 => gather_rows_of::<f32>(value, rows),
        TensorElementType::Float16 => gather_rows_of::<f16>(value, rows),
        TensorElementType::Bfloat16 => gather_rows_of::<bf16>(value, rows),
        TensorElementType::Int64 => gather_rows_of::<i64>(value, rows),
        other => Err(ort::Error::new(format!("a cache of {other}"))),
    }
}

fn gather_rows_of<T>(value: &DynValue, rows: &[usize]) -> ort::Result<DynValue>
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Copy + 'static,
{
    let (shape, data) = value.try_extract_tensor::<T>()?;
    if rows.iter().any(|&row| row as i64 >= shape[0]) {
        return Err(ort::Error::new(format!("rows {rows:?} of a cache of shape {shape}")));
    }
    let row = shape[1..].iter().map(|&dim| dim as usize).product::<usize>();
    let mut gathered = Vec::with_capacity(rows.len() * row);
    for &parent in rows {
        gathered.extend_from_slice(&data[parent * row..][..row]);
    }
    let mut shape = shape.to_vec();
    shape[0] = rows.len() as i64;
    Ok(Tensor::from_array((shape, gathered))?.into_dyn())
}
