//! `TwoPass`: the coarse pass over all columns, and the exact one over those that may be among the top k.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::bounds::{Shift, Slack, greatest_of_best_chunks};
use super::exact::{ExactMatMul, ROWS_TOGETHER};
use super::pass::CoarsePass;
use super::prepared::{Prepared, rows_per_task};
use super::scratch::{Candidates, Scratch, lock};
use super::{CHUNK, HeadCall, HeadWeights, TRIED, kth_greatest};
use crate::error::Error;
use crate::isa::Avx2Token;
use crate::matmul::quantized::{self, Columns, Format, coarse};
use crate::matmul::{Output, Shape, float};
use crate::parallel::{SharedSlice, part};

/// The rounding error of a sum in float32, relative to the product of the norms: 512 roundings of 2⁻²⁴ each would be a
/// third of it.
const ROUNDING: f32 = 1e-4;

/// A multiplication in two passes.
pub struct TwoPass<'p> {
    pub token: Avx2Token,
    pub prepared: &'p Prepared,
    pub pass: CoarsePass,
    /// How many results of each row are computed exactly, at least.
    pub k: usize,
    /// The approximate factor from results to logits.
    pub factor: f32,
}

impl TwoPass<'_> {
    /// Computes `y [rows, n] = x · wᵀ`, the top k of each row exactly. Returns false if too many columns would have to
    /// be.
    pub fn multiply(&self, call: HeadCall, scratch: &mut Scratch, y: &mut [f32]) -> Result<bool, Error> {
        let &TwoPass { token, prepared, pass, k: count, factor } = self;
        let HeadCall { x, w, shape, parallel_for, .. } = call;
        let Shape { rows, n, k } = shape;
        let Scratch { activations, coarse, lower, upper, candidates, .. } = scratch;
        let copied = prepared.copy.as_ref().map(|copy| copy.weights(k));
        let (weights, quantized) = match (w, &copied) {
            (HeadWeights::Quantized(w), Some(copied)) => (copied, Some(w)),
            (HeadWeights::Quantized(w), None) => (w, Some(w)),
            (HeadWeights::Float(_), Some(copied)) => (copied, None),
            (HeadWeights::Float(_), None) => return Ok(false),
        };
        // 16-bit activations are for the coarse pass, or for the exact one over quantized weights.
        if pass == CoarsePass::LogSumExpInt16 {
            activations.quantize(x, weights, Format::Int16);
        } else {
            if let Some(quantized) = quantized {
                activations.quantize(x, quantized, Format::Int16Listed);
            }
            coarse.quantize(x, weights);
        }
        let (activations, coarse) = (&*activations, &*coarse);
        // Errors of either sign raise the sum of exponentials by e^(σ²/2). Each error of one operand meets a number of
        // the other one, so that σ² is the product of their squared norms, divided by k.
        let shift = |square: f32| factor * square / (2 * k) as f32;
        let (shifts, shift_norms): (Vec<f32>, &[f32]) = match (pass, &prepared.copy) {
            (CoarsePass::LogSumExpInt16, Some(copy)) => {
                (x.chunks_exact(k).map(|x| shift(squared_norm(x))).collect(), &copy.errors)
            }
            (CoarsePass::LogSumExpInt8, _) => {
                (coarse.errors().iter().map(|error| shift(error * error)).collect(), &prepared.norms)
            }
            _ => (Vec::new(), &[]),
        };
        let slack: Vec<Slack> = (x.chunks_exact(k).enumerate())
            .map(|(row, x)| {
                let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                let norm = squared_norm(x).sqrt();
                let int16_error = (k as f32).sqrt() * largest / 32767.0 * 0.5;
                let error = match (pass, quantized) {
                    (CoarsePass::LogSumExpInt16, _) => int16_error,
                    (_, Some(_)) => coarse.errors()[row] + int16_error,
                    (_, None) => coarse.errors()[row],
                };
                let shift = shifts.get(row).copied().unwrap_or(0.0);
                let of_norm = error * 1.01 + norm * ROUNDING;
                if prepared.copy.is_some() {
                    let error = (norm + error) * 1.0001 + shift * prepared.greatest.error;
                    Slack { error, norm: of_norm }
                } else {
                    Slack { error: 0.0, norm: of_norm + shift * prepared.greatest.weights }
                }
            })
            .collect();

        let size = rows_per_task(k);
        let tasks = n.div_ceil(size);
        let chunks = n.div_ceil(CHUNK);
        lower.resize(rows * chunks, 0.0);
        upper.resize(rows * chunks, 0.0);
        let (lower, upper) = (SharedSlice::new(lower), SharedSlice::new(upper));
        // All that is written to `y` and read from it below goes through this.
        let y = SharedSlice::new(y);
        let output = Output::new(y, rows, n);
        parallel_for(tasks, &|task| {
            let columns = part(task, size, n);
            // SAFETY: the columns of tasks do not overlap, nor do their chunks, since tasks have whole ones; the token
            // proves AVX2 and FMA.
            unsafe {
                if pass == CoarsePass::LogSumExpInt16 {
                    let columns = Columns::Range(columns.clone());
                    quantized::multiply(activations, weights, None, 0..rows, columns, &output);
                } else {
                    coarse::multiply(coarse, weights, columns.clone(), &output);
                }
                for (row, slack) in slack.iter().enumerate() {
                    let results = y.slice_mut(row * n + columns.start..row * n + columns.end);
                    let here = row * chunks + columns.start / CHUNK..row * chunks + columns.end.div_ceil(CHUNK);
                    let shift = shifts.get(row).map(|&factor| Shift { factor, norms: &shift_norms[columns.clone()] });
                    let (lower, upper) = (lower.slice_mut(here.clone()), upper.slice_mut(here));
                    prepared.bound_chunks(columns.start, results, *slack, shift, lower, upper);
                }
            }
        })?;

        let exact = match w {
            HeadWeights::Float(w) => ExactMatMul::Float { token, operands: float::Operands::new(x, w, output, shape) },
            HeadWeights::Quantized(w) => ExactMatMul::Quantized { x: activations, w, y: output },
        };
        let mut limits = vec![0.0; rows];
        let to_limits = SharedSlice::new(&mut limits);
        parallel_for(rows, &|row| {
            // SAFETY: every row is taken by one task.
            unsafe {
                // Each of the chunks with the greatest lower bounds has a result as great as its bound.
                let mut limit = kth_greatest(count, lower.slice_mut(row * chunks..(row + 1) * chunks));
                if pass == CoarsePass::Int4 {
                    let upper = upper.slice(row * chunks..(row + 1) * chunks);
                    let results = y.slice(row * n..(row + 1) * n);
                    let mut tried = greatest_of_best_chunks(upper, results, TRIED.max(2 * count));
                    for (column, result) in &mut tried {
                        exact.compute(row..row + 1, &[*column]);
                        *result = y.slice(row * n + *column..row * n + *column + 1)[0];
                    }
                    let mut tried: Vec<f32> = tried.into_iter().map(|(_, result)| result).collect();
                    tried.iter_mut().filter(|result| result.is_nan()).for_each(|result| *result = f32::NEG_INFINITY);
                    limit = limit.max(kth_greatest(count, &mut tried));
                }
                to_limits.slice_mut(row..row + 1)[0] = limit;
            }
        })?;

        candidates.resize_with(tasks, Mutex::default);
        let count = AtomicUsize::new(0);
        parallel_for(tasks, &|task| {
            let columns = part(task, size, n);
            let Candidates { columns: listed, ends, found } = &mut *lock(&candidates[task]);
            listed.clear();
            ends.clear();
            for first in (0..rows).step_by(ROWS_TOGETHER) {
                for row in first..rows.min(first + ROWS_TOGETHER) {
                    let here = row * chunks + columns.start / CHUNK..row * chunks + columns.end.div_ceil(CHUNK);
                    // SAFETY: nobody writes results or bounds now; the token proves AVX2 and FMA.
                    unsafe {
                        let results = y.slice(row * n + columns.start..row * n + columns.end);
                        let upper = upper.slice(here);
                        prepared.find_candidates(columns.start, results, upper, slack[row], limits[row], found);
                    }
                }
                if rows > 1 {
                    found.sort_unstable();
                    found.dedup();
                }
                listed.append(found);
                ends.push(listed.len());
            }
            count.fetch_add(listed.len(), Ordering::Relaxed);
        })?;
        let (count, all) = (count.into_inner(), n * rows.div_ceil(ROWS_TOGETHER));
        if pass == CoarsePass::Int4 {
            if count > all / 8 {
                prepared.count_int4_miss();
            } else {
                prepared.count_int4_hit();
            }
        }
        if count > all / 3 {
            return Ok(false);
        }
        parallel_for(tasks, &|task| {
            let Candidates { columns, ends, .. } = &*lock(&candidates[task]);
            let mut start = 0;
            for (first, &end) in (0..rows).step_by(ROWS_TOGETHER).zip(ends) {
                // SAFETY: the columns of tasks do not overlap.
                unsafe { exact.compute(first..rows.min(first + ROWS_TOGETHER), &columns[start..end]) };
                start = end;
            }
        })?;
        Ok(true)
    }
}

fn squared_norm(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum()
}
