//! `FloatMatMul`: a whole matrix multiplication, divided into tasks for several threads.

use std::ops::Range;

use super::{Operands, Output, PackedRows, Shape, columns_together, multiply, packs_rows};
use crate::error::Error;
use crate::isa::Avx2Token;
use crate::parallel::{ParallelFor, SharedSlice, even_part, part};
use crate::source_mask::{self, SourceMask};

/// Weights of fewer than twice as many bytes are not worth waking another thread for.
const SHARED_FROM: usize = 96 << 10;
/// Bytes of weights in a task: a part of a thread's L2 cache, where all rows then find them.
const TASK_BYTES: usize = 192 << 10;
/// Bytes of weights in a task where few rows read them once.
const TASK_BYTES_WITH_FEW_ROWS: usize = 1 << 20;
/// The most rows in a task: larger caches keep these.
const TASK_ROWS: usize = 512;

/// A matrix multiplication, with its scratch buffers.
pub struct FloatMatMul {
    token: Avx2Token,
    packed: PackedRows,
}

impl FloatMatMul {
    pub fn new(token: Avx2Token) -> FloatMatMul {
        FloatMatMul { token, packed: PackedRows::default() }
    }

    /// Computes `y [rows, n] = x · wᵀ`. With a mask of as many tokens as there are rows, rows of padding are zero.
    pub fn run(
        &mut self,
        x: &[f32],
        w: &[f32],
        mask: Option<&SourceMask>,
        y: &mut [f32],
        shape: Shape,
        parallel_for: ParallelFor,
    ) -> Result<(), Error> {
        let Shape { rows, n, k } = shape;
        let mut tile = 1;
        if packs_rows(rows) {
            self.packed.prepare(rows, k);
            tile = self.packed.height();
        }
        let spans = SourceMask::spans(mask, rows, tile);
        source_mask::clear_outside(&spans, y, n);
        let mut operands = Operands::new(x, w, Output::new(SharedSlice::new(y), rows, n), shape);
        if packs_rows(rows) {
            let tiles = source_mask::tiles(&spans, tile);
            let writer = self.packed.writer();
            // SAFETY: rows are packed only where the processor has AVX-512, and each tile by one task.
            parallel_for(tiles.len(), &|task| unsafe { writer.pack(tiles[task], x) })?;
            operands = operands.with_packed(&self.packed);
        }
        let parts = row_parts(&spans, even_part(rows, TASK_ROWS).next_multiple_of(tile));
        // Of several spans, all take the same columns one after the other, whose weights the cache then has.
        let [outer, inner] = if spans.len() > 1 { [1, parts.len()] } else { [parts.len(), 1] };
        let size = columns_per_task(shape, columns_together(rows));
        let count = n.div_ceil(size);
        parallel_for(count * outer, &|task| {
            let (first, task) = (task / count * inner, task % count);
            for rows in &parts[first..first + inner] {
                // SAFETY: the columns of tasks do not overlap, nor do the rows of those with the same columns.
                unsafe { multiply(self.token, &operands, rows.clone(), part(task, size, n)) };
            }
        })
    }
}

/// The rows of tasks: `height` of a span, or what is left of it.
fn row_parts(spans: &[Range<usize>], height: usize) -> Vec<Range<usize>> {
    let of_span = |span: &Range<usize>| {
        let end = span.end;
        (span.start..end).step_by(height).map(move |first| first..end.min(first + height)).collect::<Vec<_>>()
    };
    spans.iter().flat_map(of_span).collect()
}

/// Columns of a task: a multiple of those that are computed together.
fn columns_per_task(Shape { rows, n, k }: Shape, together: usize) -> usize {
    let all = n * k * 4;
    let bytes = match rows {
        0..8 if all < 2 * SHARED_FROM => all,
        // As many tasks as keep every thread of a large machine busy.
        0..8 => (all / 16).clamp(TASK_BYTES, TASK_BYTES_WITH_FEW_ROWS),
        _ => (all / 16).clamp(TASK_BYTES / 4, TASK_BYTES),
    };
    (bytes / 4 / k / together * together).clamp(together, n.max(together))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;
    use crate::parallel::sequential;

    #[test]
    fn tasks_have_columns_for_about_the_same_bytes() {
        // name, shape, columns together, columns of a task
        let cases = [
            ("few columns", [1, 40, 1024], 12, 36),
            ("few rows of a layer", [1, 1024, 1024], 12, 60),
            ("few rows of a head", [4, 256_000, 512], 12, 504),
            ("many rows of a layer", [8, 1024, 1024], 32, 32),
            ("fewer columns than are computed together", [8, 5, 64], 32, 32),
        ];
        for (name, [rows, n, k], together, expected) in cases {
            assert_eq!(columns_per_task(Shape { rows, n, k }, together), expected, "{name}");
        }
    }

    #[test]
    fn rows_are_divided_within_their_spans() {
        assert!(row_parts(&[], 4).is_empty());
        assert_eq!(row_parts(&[0..4, 8..13], 4), [0..4, 8..12, 12..13]);
        assert_eq!(row_parts(&[3..5, 7..8], 512), [3..5, 7..8]);
    }

    #[test]
    fn tasks_compute_the_whole_product_but_for_padding() {
        at_each_level(Level::Avx2, |level| {
            let token = Avx2Token::new().expect("the level has AVX2");
            for [rows, n, k] in [[1, 400, 256], [40, 300, 136], [600, 40, 64]] {
                let (x, w) = (noise(rows * k, 3), noise(n * k, 5));
                let mask = SourceMask::default();
                mask.set(&(0..rows as i64).map(|row| i64::from(!(3..39).contains(&row))).collect::<Vec<_>>());
                for mask in [None, Some(&mask)] {
                    let mut y = vec![f32::NAN; rows * n];
                    let shape = Shape { rows, n, k };
                    FloatMatMul::new(token).run(&x, &w, mask, &mut y, shape, &sequential).expect("it runs");
                    for (row, y) in y.chunks(n).enumerate() {
                        let is_zero = (3..39).contains(&row) && mask.is_some() && y.iter().all(|&y| y == 0.0);
                        for (column, &y) in y.iter().enumerate().filter(|_| !is_zero) {
                            let terms = x[row * k..][..k].iter().zip(&w[column * k..][..k]);
                            let expected: f64 = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                            assert!((expected - f64::from(y)).abs() < 1e-4, "{level:?}: row {row}, column {column}");
                        }
                    }
                }
            }
        });
    }
}
