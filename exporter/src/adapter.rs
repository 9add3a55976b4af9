//! The rows of a tensor with the changes of its LoRA adapters, computed in float32 while they are streamed. Which adapter
//! changes which tensor is [`t5gemma_graphs::adapter`]'s; the files of an adapter are opened by `checkpoint`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;

use t5gemma_graphs::onnx::DType;

use crate::convert::to_float32;

/// A change of a tensor by an adapter, with its numbers in float32.
#[derive(Clone, Debug)]
pub enum Change {
    /// `W + scale·(B·A)`; with DoRA each row is then scaled to the length of `magnitude`.
    Matrix { a: Vec<f32>, b: Vec<f32>, scale: f32, magnitude: Option<Vec<f32>> },
    /// `E + scale·(B·A)ᵀ`, of an embedding; with DoRA each column is then scaled to the length of `magnitude`.
    Embedding { a: Vec<f32>, b: Vec<f32>, scale: f32, magnitude: Option<Vec<f32>> },
    /// `b + scale·x`, of a bias.
    Bias { values: Vec<f32>, scale: f32 },
    /// Rows in the place of those of the tensor, by their index.
    Rows { rows: BTreeMap<usize, Vec<f32>> },
}

/// A tensor that adapters change.
pub struct MergedTensor<'c> {
    dtype: DType,
    bytes: &'c [u8],
    /// Elements in a row.
    width: usize,
    rows: usize,
    changes: Vec<Change>,
    /// For each change of an embedding with DoRA, the factors of the columns.
    column_factors: Vec<Option<Vec<f32>>>,
}

impl<'c> MergedTensor<'c> {
    /// A tensor of a shape, whose unchanged elements are `bytes`.
    pub fn new(dtype: DType, bytes: &'c [u8], shape: &[usize], changes: Vec<Change>) -> MergedTensor<'c> {
        let width = if shape.len() > 1 { shape[1..].iter().product() } else { 1 };
        let rows = shape.first().copied().unwrap_or(1);
        let mut merged = MergedTensor { dtype, bytes, width, rows, changes, column_factors: Vec::new() };
        merged.column_factors = merged.changes.iter().map(|change| merged.factors_of_columns(change)).collect();
        merged
    }

    /// Fills `out` with the elements from `first` on.
    pub fn fill(&self, first: usize, out: &mut [f32]) {
        let range = first..first + out.len();
        let threads = thread::available_parallelism().map_or(1, Into::into);
        let rows = range.start / self.width..range.end.div_ceil(self.width);
        let share = rows.len().div_ceil(threads).max(1);
        thread::scope(|scope| {
            let mut out = out;
            for first_row in rows.clone().step_by(share) {
                let of_share = first_row * self.width..((first_row + share).min(rows.end)) * self.width;
                let of_share = of_share.start.max(range.start)..of_share.end.min(range.end);
                let (here, rest) = out.split_at_mut(of_share.len());
                out = rest;
                scope.spawn(move || self.fill_range(of_share, here));
            }
        });
    }

    fn fill_range(&self, range: Range<usize>, mut out: &mut [f32]) {
        let (mut base, mut row) = (vec![0.0; self.width], vec![0.0; self.width]);
        let mut changed = vec![0.0; self.width];
        let mut at = range.start;
        while at < range.end {
            let index = at / self.width;
            self.base_row(index, &mut base);
            self.merge_row(index, &base, &mut changed, &mut row);
            let within = at - index * self.width;
            let count = (self.width - within).min(range.end - at);
            let (here, rest) = out.split_at_mut(count);
            here.copy_from_slice(&row[within..within + count]);
            out = rest;
            at += count;
        }
    }

    /// A row before products and biases: the stored one, or the one in its place.
    fn base_row(&self, index: usize, row: &mut [f32]) {
        let replaced = self.changes.iter().rev().find_map(|change| match change {
            Change::Rows { rows } => rows.get(&index),
            _ => None,
        });
        match replaced {
            Some(replaced) => row.copy_from_slice(replaced),
            None => {
                let size = self.width * self.dtype.size();
                to_float32(&self.bytes[index * size..][..size], self.dtype, row);
            }
        }
    }

    /// The sum of a row and what each change adds to it.
    fn merge_row(&self, index: usize, base: &[f32], changed: &mut [f32], row: &mut [f32]) {
        row.copy_from_slice(base);
        let mut is_first = true;
        for (change, factors) in self.changes.iter().zip(&self.column_factors) {
            if matches!(change, Change::Rows { .. }) {
                continue;
            }
            self.change_row(index, change, factors.as_deref(), base, changed);
            if is_first {
                row.copy_from_slice(changed);
            } else {
                // Each change is one of the original row.
                row.iter_mut().zip(base).zip(changed.iter()).for_each(|((x, base), changed)| *x += changed - base);
            }
            is_first = false;
        }
    }

    /// A row with one change.
    fn change_row(&self, index: usize, change: &Change, factors: Option<&[f32]>, base: &[f32], changed: &mut [f32]) {
        match change {
            Change::Matrix { a, b, scale, magnitude } => {
                let rank = a.len() / self.width;
                add_product(base, &b[index * rank..][..rank], a, *scale, changed);
                if let Some(magnitude) = magnitude {
                    let norm = changed.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt() as f32;
                    let factor = magnitude[index] / norm;
                    changed.iter_mut().for_each(|x| *x *= factor);
                }
            }
            Change::Embedding { a, b, scale, .. } => {
                self.add_embedding(index, base, a, b, *scale, changed);
                if let Some(factors) = factors {
                    changed.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
                }
            }
            Change::Bias { values, scale } => changed[0] = base[0] + scale * values[index],
            Change::Rows { .. } => changed.copy_from_slice(base),
        }
    }

    /// `base + scale·(B·A)ᵀ`, one row: `a` is `[rank, rows]` and `b` is `[width, rank]`.
    fn add_embedding(&self, index: usize, base: &[f32], a: &[f32], b: &[f32], scale: f32, changed: &mut [f32]) {
        let rank = a.len() / self.rows;
        for ((x, &base), b) in changed.iter_mut().zip(base).zip(b.chunks_exact(rank)) {
            let sum: f32 = b.iter().enumerate().map(|(k, b)| b * a[k * self.rows + index]).sum();
            *x = base + scale * sum;
        }
    }

    /// DoRA's factors for the columns of an embedding: their magnitudes divided by their lengths.
    fn factors_of_columns(&self, change: &Change) -> Option<Vec<f32>> {
        let Change::Embedding { a, b, scale, magnitude: Some(magnitude) } = change else { return None };
        let threads = thread::available_parallelism().map_or(1, Into::into);
        let share = self.rows.div_ceil(threads).max(1);
        let squares: Vec<Vec<f64>> = thread::scope(|scope| {
            let of_share = |first: usize| {
                let rows = first..(first + share).min(self.rows);
                scope.spawn(move || {
                    let (mut base, mut row) = (vec![0.0; self.width], vec![0.0; self.width]);
                    let mut squares = vec![0.0; self.width];
                    for index in rows {
                        self.base_row(index, &mut base);
                        self.add_embedding(index, &base, a, b, *scale, &mut row);
                        squares.iter_mut().zip(&row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
                    }
                    squares
                })
            };
            let shares: Vec<_> = (0..self.rows).step_by(share).map(of_share).collect();
            shares.into_iter().map(|share| share.join().expect("sums do not panic")).collect()
        });
        let norm = |column: usize| squares.iter().map(|squares| squares[column]).sum::<f64>().sqrt() as f32;
        Some(magnitude.iter().enumerate().map(|(column, magnitude)| magnitude / norm(column)).collect())
    }
}

/// `base + scale·(b·A)`, where `b` is `[rank]` and `a` is `[rank, width]`.
fn add_product(base: &[f32], b: &[f32], a: &[f32], scale: f32, out: &mut [f32]) {
    out.fill(0.0);
    for (&b, a) in b.iter().zip(a.chunks_exact(base.len())) {
        out.iter_mut().zip(a).for_each(|(x, a)| *x += b * a);
    }
    out.iter_mut().zip(base).for_each(|(x, base)| *x = base + scale * *x);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tensor of `[rows, 2]` with the numbers 1, 2, 3, …
    fn merged(rows: usize, changes: Vec<Change>) -> Vec<f32> {
        let numbers: Vec<f32> = (1..=2 * rows).map(|x| x as f32).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = MergedTensor::new(DType::Float32, &bytes, &[rows, 2], changes);
        let mut whole = vec![0.0; 2 * rows];
        tensor.fill(0, &mut whole);
        // Any part is the same part of the whole.
        for first in 0..whole.len() {
            for end in first..=whole.len() {
                let mut part = vec![0.0; end - first];
                tensor.fill(first, &mut part);
                assert_eq!(part, whole[first..end], "{first}..{end}");
            }
        }
        whole
    }

    fn matrix(scale: f32, magnitude: Option<Vec<f32>>) -> Change {
        // B·A = [[1, -1], [2, -2], [0, 0]]
        Change::Matrix { a: vec![1.0, -1.0], b: vec![1.0, 2.0, 0.0], scale, magnitude }
    }

    #[test]
    fn products_are_added_row_by_row() {
        assert_eq!(merged(3, vec![matrix(0.5, None)]), [1.5, 1.5, 4.0, 3.0, 5.0, 6.0]);
        let rank_2 = Change::Matrix { a: vec![1.0, 0.0, 0.0, 1.0], b: vec![1.0, 10.0], scale: 1.0, magnitude: None };
        assert_eq!(merged(1, vec![rank_2]), [2.0, 12.0]);
    }

    #[test]
    fn several_changes_are_each_of_the_original() {
        assert_eq!(merged(3, vec![matrix(0.5, None), matrix(1.0, None)]), [2.5, 0.5, 6.0, 1.0, 5.0, 6.0]);
        // (3, 4) of length 5 becomes 10 long, beside (0.5, -0.5) more.
        let half = Change::Matrix { a: vec![0.5, -0.5], b: vec![0.0, 1.0], scale: 1.0, magnitude: None };
        let doubled =
            Change::Matrix { a: vec![0.0, 0.0], b: vec![1.0, 1.0], scale: 1.0, magnitude: Some(vec![0.0, 10.0]) };
        assert_eq!(merged(2, vec![doubled, half])[2..], [6.5, 7.5]);
    }

    #[test]
    fn magnitudes_are_lengths_of_rows_or_of_columns_of_embeddings() {
        // The rows (1.5, 1.5) and (4, 3) and (5, 6).
        let rows = merged(3, vec![matrix(0.5, Some(vec![3.0, 10.0, 61.0_f32.sqrt()]))]);
        let expected = [2.121_320_3, 2.121_320_3, 8.0, 6.0, 5.0, 6.0];
        assert!(rows.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{rows:?}");
        // The columns (1, 3) and (2, 4) with (0, 1) and (0, 0) added: (1, 4) and (2, 4).
        let change = |magnitude| Change::Embedding { a: vec![0.0, 1.0], b: vec![1.0, 0.0], scale: 1.0, magnitude };
        assert_eq!(merged(2, vec![change(None)]), [1.0, 2.0, 4.0, 4.0]);
        let columns = merged(2, vec![change(Some(vec![2.0 * 17.0_f32.sqrt(), 20.0_f32.sqrt()]))]);
        assert!(columns.iter().zip([2.0, 2.0, 8.0, 4.0]).all(|(x, y)| (x - y).abs() < 1e-5), "{columns:?}");
    }

    #[test]
    fn rows_are_replaced_before_products_are_added() {
        let rows = Change::Rows { rows: BTreeMap::from([(1, vec![10.0, 20.0])]) };
        assert_eq!(merged(2, vec![rows.clone()]), [1.0, 2.0, 10.0, 20.0]);
        assert_eq!(merged(2, vec![matrix(1.0, None), rows]), [2.0, 1.0, 12.0, 18.0]);
    }

    #[test]
    fn biases_are_vectors() {
        let bytes: Vec<u8> = [1.0_f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let bias = Change::Bias { values: vec![10.0, 20.0], scale: 0.5 };
        let tensor = MergedTensor::new(DType::Float32, &bytes, &[2], vec![bias]);
        let mut out = [0.0; 2];
        tensor.fill(0, &mut out);
        assert_eq!(out, [6.0, 12.0]);
    }
}
