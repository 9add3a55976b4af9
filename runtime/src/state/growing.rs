//! A cache of tensors that every step makes anew: what one run returns is fed to the next as it is, and only a change of
//! rows copies it.

use ort::value::DynValue;

use super::{keep_rows, keep_tokens};

/// The inputs of the cached decoder step but for its tokens.
pub(crate) struct Growing {
    /// `[items, source]`.
    mask: DynValue,
    /// In the order of the graph's inputs.
    past: Vec<DynValue>,
    /// For each of `past`, whether its first axis is source items (cross-attention) or target rows (self-attention).
    per_item: Vec<bool>,
}

impl Growing {
    pub(super) fn new(mask: DynValue, past: Vec<DynValue>, per_item: Vec<bool>) -> Growing {
        Growing { mask, past, per_item }
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

    pub(super) fn truncate(&mut self, length: usize) -> ort::Result<()> {
        let own = self.past.iter_mut().zip(&self.per_item).filter(|(_, per_item)| !**per_item);
        own.map(|(past, _)| past).try_for_each(|past| keep_tokens(past, length))
    }

    pub(super) fn select(
        &mut self,
        items: &[usize],
        parents: &[usize],
        (items_before, rows_before): (usize, usize),
    ) -> ort::Result<()> {
        keep_rows(&mut self.mask, items, items_before)?;
        for (past, &per_item) in self.past.iter_mut().zip(&self.per_item) {
            match per_item {
                true => keep_rows(past, items, items_before)?,
                false => keep_rows(past, parents, rows_before)?,
            }
        }
        Ok(())
    }
}
