//! `Columns`: which columns of a product are computed; and in which order kernels for few rows walk through them.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::Weights;
#[cfg(target_arch = "x86_64")]
use crate::avx2::SUMS;

/// The columns to compute.
#[derive(Clone)]
pub enum Columns<'c> {
    Range(Range<usize>),
    /// For activations in [`Format::Int16Listed`](super::Format::Int16Listed).
    Listed(&'c [usize]),
}

/// Prefetch distance in bytes.
#[cfg(target_arch = "x86_64")]
pub const PREFETCH_DISTANCE: usize = 2048;
/// Columns that all rows are multiplied with before the next ones: their weights stay in the L1 cache.
#[cfg(target_arch = "x86_64")]
pub const COLUMN_GROUP: usize = 32;

/// Columns one after the other: a range, or those of a list.
#[cfg(target_arch = "x86_64")]
pub struct ColumnWalk<'c> {
    listed: Option<&'c [usize]>,
    /// The codes of column 0.
    codes: *const u8,
    column_bytes: usize,
}

#[cfg(target_arch = "x86_64")]
impl<'c> ColumnWalk<'c> {
    /// The walk, the positions in it, and how many of them all rows are multiplied by before the next ones.
    pub fn new(columns: &Columns<'c>, w: &Weights) -> (ColumnWalk<'c>, Range<usize>, usize) {
        let (codes, column_bytes) = (w.codes.as_ptr(), w.row_bytes());
        match *columns {
            Columns::Range(ref columns) => {
                (ColumnWalk { listed: None, codes, column_bytes }, columns.clone(), COLUMN_GROUP)
            }
            Columns::Listed(listed) => {
                let walk = ColumnWalk { listed: Some(listed), codes, column_bytes };
                (walk, 0..listed.len(), listed.len().max(1))
            }
        }
    }

    /// The column at a position.
    #[inline(always)]
    pub fn column(&self, position: usize) -> usize {
        self.listed.map_or(position, |columns| columns[position])
    }

    /// What to prefetch while the column at a position is multiplied: an address that need not be valid.
    #[inline(always)]
    pub fn later(&self, position: usize) -> *const u8 {
        match self.listed {
            None => self.codes.wrapping_add(position * self.column_bytes + PREFETCH_DISTANCE),
            Some(columns) => {
                let column = columns.get(position + SUMS);
                self.codes.wrapping_add(column.map_or(0, |column| column * self.column_bytes))
            }
        }
    }
}

/// How many rows are multiplied together where `rows` are left: each number instantiates all kernels once more.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn rows_at_a_time(rows: usize) -> usize {
    match rows {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}
