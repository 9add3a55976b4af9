//! `ExactMatMul`: the second pass, which computes the listed columns exactly.

use std::ops::Range;

use crate::isa::Avx2Token;
use crate::matmul::quantized::{self, Activations, Columns, Weights};
use crate::matmul::{Output, float};

/// Rows whose candidates are computed for all of them.
pub const ROWS_TOGETHER: usize = 4;

/// The exact matrix multiplication.
pub enum ExactMatMul<'p> {
    Float { token: Avx2Token, operands: float::Operands<'p> },
    Quantized { x: &'p Activations, w: &'p Weights<'p>, y: Output<'p> },
}

impl ExactMatMul<'_> {
    /// Computes these rows of these columns.
    ///
    /// # Safety
    /// No other thread reads or writes them meanwhile.
    pub unsafe fn compute(&self, rows: Range<usize>, columns: &[usize]) {
        match self {
            ExactMatMul::Float { token, operands } => {
                for (at, &column) in columns.iter().enumerate() {
                    columns.get(at + 2).inspect(|&&later| operands.prefetch(later));
                    // SAFETY: the caller promises that no other thread has the results.
                    unsafe { float::multiply(*token, operands, rows.clone(), column..column + 1) };
                }
            }
            ExactMatMul::Quantized { x, w, y } => {
                // SAFETY: the caller promises that no other thread has the results.
                unsafe { quantized::multiply(x, w, None, rows, Columns::Listed(columns), y) };
            }
        }
    }
}
