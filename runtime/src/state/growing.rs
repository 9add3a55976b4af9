//! `GrowingCache`: every step returns new self-attention tensors, one token longer, which are fed to the next step as
//! they are. Only a change of rows copies them.

use ort::value::DynValue;

use super::{Selection, keep_rows, keep_tokens};

/// The inputs of the cached decoder step apart from its tokens.
pub(crate) struct GrowingCache {
    /// `[items, source]`.
    mask: DynValue,
    /// In the order of the graph's inputs.
    past: Vec<DynValue>,
    /// For each of `past`, whether it is of cross-attention, with source items on its first axis, or of self-attention,
    /// with target rows.
    is_cross: Vec<bool>,
}

impl GrowingCache {
    pub(super) fn new(mask: DynValue, past: Vec<DynValue>, is_cross: Vec<bool>) -> GrowingCache {
        GrowingCache { mask, past, is_cross }
    }

    /// The mask of the sources.
    pub fn mask(&self) -> &DynValue {
        &self.mask
    }

    /// All keys and values, in the order of the graph's inputs.
    pub fn past(&self) -> &[DynValue] {
        &self.past
    }

    /// Stores a step's self-attention keys and values, which come in the order of the graph's outputs.
    pub fn grow(&mut self, present: impl IntoIterator<Item = DynValue>) {
        self.of_self_attention().zip(present).for_each(|(past, present)| *past = present);
    }

    pub(super) fn truncate(&mut self, length: usize) -> ort::Result<()> {
        self.of_self_attention().try_for_each(|past| keep_tokens(past, length))
    }

    pub(super) fn select(&mut self, selection: &Selection) -> ort::Result<()> {
        let &Selection { items, parents, items_before, rows_before } = selection;
        keep_rows(&mut self.mask, items, items_before)?;
        for (past, &is_cross) in self.past.iter_mut().zip(&self.is_cross) {
            if is_cross {
                keep_rows(past, items, items_before)?;
            } else {
                keep_rows(past, parents, rows_before)?;
            }
        }
        Ok(())
    }

    fn of_self_attention(&mut self) -> impl Iterator<Item = &mut DynValue> {
        self.past.iter_mut().zip(&self.is_cross).filter(|(_, is_cross)| !**is_cross).map(|(past, _)| past)
    }
}
