//! `Scratch`: the scratch buffers of a head, and which columns of it have been computed exactly.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::exact::ROWS_TOGETHER;
use super::single_pass;
use crate::aligned::AlignedVec;
use crate::logits::LogitsStats;
use crate::matmul::quantized::Activations;
use crate::matmul::quantized::coarse::CoarseActivations;

/// The scratch buffers of a head, kept for their allocations.
#[derive(Default)]
pub struct Scratch {
    pub(super) activations: Activations,
    pub(super) coarse: CoarseActivations,
    /// `[rows, chunks]`: see [`Prepared::bound_chunks`](super::prepared::Prepared::bound_chunks).
    pub(super) lower: Vec<f32>,
    pub(super) upper: Vec<f32>,
    /// Of each task.
    pub(super) candidates: Vec<Mutex<Candidates>>,
    /// `[rows, n]`, where these are not the output.
    pub(super) results: AlignedVec<f32>,
    pub(super) single_pass: single_pass::Scratch,
}

/// The columns of a task that have to be computed exactly.
#[derive(Default)]
pub struct Candidates {
    /// A list of columns for every [`ROWS_TOGETHER`] rows, one after the other.
    pub columns: Vec<usize>,
    /// Where each ends.
    pub ends: Vec<usize>,
    /// Kept for its allocation.
    pub found: Vec<usize>,
}

impl Scratch {
    /// The columns that were computed exactly for each row, `[rows, width]`, and the width.
    pub(super) fn exact_columns(&self, rows: usize) -> (Vec<u32>, usize) {
        let mut groups = vec![Vec::new(); rows.div_ceil(ROWS_TOGETHER)];
        for task in &self.candidates {
            let Candidates { columns, ends, .. } = &*lock(task);
            let mut start = 0;
            for (group, &end) in groups.iter_mut().zip(ends) {
                group.extend(columns[start..end].iter().map(|&column| column as u32));
                start = end;
            }
        }
        let width = groups.iter().map(Vec::len).max().unwrap_or(0);
        groups.iter_mut().for_each(|group| group.resize(width, LogitsStats::NO_TOKEN));
        ((0..rows).flat_map(|row| &groups[row / ROWS_TOGETHER]).copied().collect(), width)
    }
}

/// Locks data that belongs to one task at a time.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
