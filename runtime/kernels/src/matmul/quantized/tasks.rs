//! `QuantizedMatMul`: a whole matrix multiplication, divided into tasks for several threads.

use super::{Activations, Columns, Format, Output, Weights, multiply};
use crate::error::Error;
use crate::parallel::{ParallelFor, SharedSlice, part};
use crate::source_mask::{self, SourceMask};

/// Weights of fewer bytes are not worth waking another thread for.
const SHARED_FROM: usize = 96 << 10;
/// Bytes of weights in a task: at least, and where there are many.
const TASK_BYTES: usize = 128 << 10;
const TASK_BYTES_OF_MANY: usize = 512 << 10;
/// Minimum number of rows for which arithmetic dominates, so that all threads should get equal shares of it.
const MANY_ROWS: usize = 8;
/// Minimum bytes of weights per task, with that many rows.
const TASK_BYTES_WITH_MANY_ROWS: usize = 32 << 10;

/// A matrix multiplication, with its scratch buffers.
pub struct QuantizedMatMul {
    format: Format,
    activations: Activations,
}

impl QuantizedMatMul {
    pub fn new(format: Format) -> QuantizedMatMul {
        QuantizedMatMul { format, activations: Activations::default() }
    }

    /// Computes `y [rows, n] = x · wᵀ + bias`. With a mask of as many tokens as there are rows, rows of padding are
    /// zero.
    pub fn run(
        &mut self,
        x: &[f32],
        w: &Weights,
        bias: Option<&[f32]>,
        mask: Option<&SourceMask>,
        y: &mut [f32],
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let rows = x.len() / w.k;
        let n = y.len() / rows.max(1);
        self.activations.prepare(rows, w, self.format);
        let together = self.activations.rows_together();
        let spans = SourceMask::spans(mask, rows, together);
        source_mask::clear_outside(&spans, y, n);
        let tiles = source_mask::tiles(&spans, together);
        let writer = self.activations.writer();
        parallel_for(tiles.len(), &|task| {
            for row in part(tiles[task], together, rows) {
                // SAFETY: tiles do not overlap, so that each row is quantized by one task.
                unsafe { writer.quantize_row(row, &x[row * w.k..][..w.k], w) };
            }
        })?;

        let size = columns_per_task(w, rows, n);
        let y = Output::new(SharedSlice::new(y), rows, n);
        let activations = &self.activations;
        parallel_for(n.div_ceil(size), &|task| {
            for span in &spans {
                let columns = Columns::Range(part(task, size, n));
                // SAFETY: the columns of tasks do not overlap.
                unsafe { multiply(activations, w, bias, span.clone(), columns, &y) };
            }
        })
    }
}

/// Columns of a task: whole panels.
fn columns_per_task(w: &Weights, rows: usize, n: usize) -> usize {
    let all = w.row_bytes() * n;
    let bytes = match rows {
        0..MANY_ROWS => (all / 16).clamp(TASK_BYTES, TASK_BYTES_OF_MANY),
        _ => (all / 16).clamp(TASK_BYTES_WITH_MANY_ROWS, TASK_BYTES),
    };
    let size = bytes / w.row_bytes();
    let size = if all < SHARED_FROM && rows < MANY_ROWS { n } else { size.clamp(8, n.max(8)) };
    size.next_multiple_of(32)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::weights::testing::{Quantization, RandomWeights};
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;
    use crate::parallel::sequential;

    #[test]
    fn tasks_have_columns_for_about_the_same_bytes() {
        let weights = |k| Weights { codes: &[], scales: &[], zero_points: None, k, bits: 8, block_size: 128 };
        // name, k, rows, n, columns of a task
        let cases = [
            ("small: one task", 512, 1, 100, 128),
            ("few rows of a layer", 1024, 1, 1024, 128),
            ("few rows of a head", 512, 4, 256_000, 1024),
            ("many rows of a layer", 1024, 8, 1024, 64),
            ("many rows of a small layer", 512, 8, 100, 64),
            ("long rows", 100_000, 1, 64, 32),
        ];
        for (name, k, rows, n, expected) in cases {
            assert_eq!(columns_per_task(&weights(k), rows, n), expected, "{name}");
        }
    }

    /// The tasks of all threads, last first.
    fn reversed(count: usize, task: &(dyn Fn(usize) + Send + Sync)) -> Result<(), Error> {
        (0..count).rev().for_each(task);
        Ok(())
    }

    #[test]
    fn tasks_compute_the_whole_product_in_any_order_but_for_padding() {
        at_each_level(Level::Generic, |level| {
            for (rows, n, k) in [(1, 700, 256), (40, 300, 136)] {
                let weights = RandomWeights::new(n, k, Quantization { bits: 8, block_size: 64, symmetric: false }, 5);
                let (weights, x) = (weights.view(), noise(rows * k, 7));
                let mask = SourceMask::default();
                mask.set(&(0..rows as i64).map(|row| i64::from(!(3..39).contains(&row))).collect::<Vec<_>>());
                let tasks = Mutex::new(0);
                let counted: ParallelFor = &|count, task| {
                    *tasks.lock().expect("no task panicked") += count;
                    sequential(count, task)
                };
                let run = |mask, parallel_for| {
                    let mut y = vec![f32::NAN; rows * n];
                    let mut matmul = QuantizedMatMul::new(Format::Int8);
                    matmul.run(&x, &weights, None, mask, &mut y, parallel_for).map(|()| y)
                };
                let (all, back) = (run(None, counted), run(None, &reversed));
                assert!(*tasks.lock().expect("no task panicked") > 2, "{level:?}, {rows} rows");
                assert_eq!(all, back, "{level:?}, {rows} rows");
                let (all, masked) = (all.expect("it runs"), run(Some(&mask), counted).expect("it runs"));
                let mut zeros = 0;
                for (row, (all, masked)) in all.chunks(n).zip(masked.chunks(n)).enumerate() {
                    // Rows of padding are computed where their tile has a real token.
                    let is_zero = (3..39).contains(&row) && masked.iter().all(|&y| y == 0.0);
                    assert!(is_zero || masked == all, "{level:?}: row {row}");
                    zeros += usize::from(is_zero);
                }
                assert!(zeros == 16 || rows == 1 || level >= Level::Vnni, "{level:?}: {zeros} rows left out");
            }
        });
    }
}
