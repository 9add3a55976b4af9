//! Matrix multiplication `y [rows, n] = x [rows, k] · wᵀ`, with weights `w [n, k]` in place in the mapped file.
//!
//! "Rows" always means rows of activations, "columns" columns of the result: column `j` is the product with row `j` of
//! the weights.

#[cfg(target_arch = "x86_64")]
pub mod float;
pub mod quantized;

use std::ops::Range;

use crate::parallel::SharedSlice;

/// The sizes of a matrix multiplication.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Rows of activations.
    pub rows: usize,
    /// Rows of the weights, columns of the result.
    pub n: usize,
    /// Length of a row of either operand.
    pub k: usize,
}

/// The result `[rows, n]`, different parts of which several threads write.
#[derive(Clone, Copy)]
pub struct Output<'y> {
    values: SharedSlice<'y, f32>,
    rows: usize,
    n: usize,
}

impl<'y> Output<'y> {
    pub fn new(values: SharedSlice<'y, f32>, rows: usize, n: usize) -> Output<'y> {
        assert_eq!(values.len(), rows * n, "elements of a [{rows}, {n}] output");
        Output { values, rows, n }
    }

    /// The address of an element.
    ///
    /// # Safety
    /// The element is within the output; whoever writes there follows the rules of [`SharedSlice::slice_mut`].
    #[inline(always)]
    unsafe fn at(&self, row: usize, column: usize) -> *mut f32 {
        // SAFETY: the caller promises an element within the output.
        unsafe { self.values.as_mut_ptr().add(row * self.n + column) }
    }
}

/// A part of a result that is computed in one go, from `depth` of the operands' rows.
#[derive(Clone)]
struct Tile {
    rows: Range<usize>,
    columns: Range<usize>,
    depth: Range<usize>,
}
