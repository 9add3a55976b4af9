//! `SinglePass`: the exact product with the head, of which only the top k leave the cache. If the processor multiplies
//! as fast as memory delivers, a coarse pass gains nothing.
//!
//! # Design
//! A thread takes some columns at a time and looks for the largest results while they are in its cache: writing them to
//! memory and reading them again would take as long as reading the weights. The top k are only known at the end, but
//! the `k`-th largest of the columns so far is a lower bound of the top k. It is updated after a few columns, after
//! four times as many, and so on, so that few results are kept.

use std::arch::x86_64::*;
use std::sync::Mutex;

use super::scratch::lock;
use super::{CHUNK, SparseRows, kth_greatest};
use crate::aligned::AlignedVec;
use crate::error::Error;
use crate::isa::Avx2Token;
use crate::log_softmax::LogSumExp;
use crate::logits::LogitsStats;
use crate::matmul::quantized::{self, Activations, Columns, Format, Weights};
use crate::matmul::{Output, Shape};
use crate::parallel::{ParallelFor, SharedSlice, part};
use crate::stats::{PartialLogSumExp, Softcap};

/// Results of all rows in a task: a part of a thread's L2 cache.
const TASK_RESULTS: usize = 16 << 10;
/// The columns of the first round, at least, for each of the top k.
const FIRST: usize = 4 * CHUNK;
/// How many times as many columns have been looked at after each further round.
const GROWTH: usize = 4;
/// No more than this fraction of the columns is worth sparse rows.
const SPARSE: usize = 8;

/// The scratch buffers of a single pass, kept for their allocations.
#[derive(Default)]
pub struct Scratch {
    activations: Activations,
    /// Of each task.
    kept: Vec<Mutex<Vec<KeptChunk>>>,
    /// `[rows, columns of a task]`, for each thread that has needed it.
    results: Mutex<Vec<AlignedVec<f32>>>,
}

/// A chunk of a row's results, at least one of which may be in the top k.
struct KeptChunk {
    row: usize,
    /// The first column.
    column: usize,
    /// Padded with −∞.
    results: [f32; CHUNK],
}

/// Whether the top k are few enough of `n` columns for sparse rows.
pub fn is_sparse(k: usize, n: usize) -> bool {
    k * FIRST <= n / SPARSE
}

/// A multiplication in a single pass.
pub struct SinglePass<'p> {
    pub token: Avx2Token,
    /// `[rows, k]`
    pub x: &'p [f32],
    pub w: &'p Weights<'p>,
    pub shape: Shape,
    /// How many results of each row are wanted.
    pub k: usize,
    /// Computes the log-sum-exp of all results, if it is wanted.
    pub softcap: Option<&'p Softcap>,
    pub parallel_for: ParallelFor<'p>,
}

impl SinglePass<'_> {
    /// The top k of each row, among others; `None` if those would be too many.
    pub fn sparse_rows(
        self,
        Scratch { activations, kept, results }: &mut Scratch,
    ) -> Result<Option<SparseRows>, Error> {
        let SinglePass { token, x, w, shape: Shape { rows, n, .. }, k, softcap, parallel_for } = self;
        activations.quantize(x, w, Format::Int16);
        let (activations, results) = (&*activations, &*results);
        let size = columns_per_task(rows);
        let tasks = n.div_ceil(size);
        kept.resize_with(tasks, Mutex::default);
        let mut partials = vec![PartialLogSumExp::default(); if softcap.is_some() { rows * tasks } else { 0 }];
        let to_partials = SharedSlice::new(&mut partials);
        let mut limits = vec![f32::NEG_INFINITY; rows];
        // The greatest result of each chunk that has reached the limit so far.
        let mut maxima = vec![Vec::new(); rows];
        let (mut done, mut next) = (0, (k * FIRST).div_ceil(size).clamp(1, tasks));
        while done < tasks {
            parallel_for(next - done, &|task| {
                let task = done + task;
                let columns = part(task, size, n);
                let mut buffer = lock(results).pop().unwrap_or_default();
                buffer.resize(rows * size, 0.0);
                let here = &mut buffer[..rows * columns.len()];
                let output = Output::new(SharedSlice::new(here), rows, columns.len());
                let all = Columns::Range(0..columns.len());
                // SAFETY: no other task has this buffer.
                unsafe { quantized::multiply(activations, &w.rows(columns.clone()), None, 0..rows, all, &output) };
                let kept = &mut *lock(&kept[task]);
                kept.clear();
                for (row, results) in here.chunks_exact(columns.len()).enumerate() {
                    keep_chunks(token, row, columns.start, results, limits[row], kept);
                    if let Some(softcap) = softcap {
                        let at = row * tasks + task;
                        // SAFETY: every row of a task is summed up by that task.
                        unsafe { to_partials.slice_mut(at..at + 1)[0] = softcap.partial(results) };
                    }
                }
                lock(results).push(buffer);
            })?;
            for task in &kept[done..next] {
                for KeptChunk { row, results, .. } in &*lock(task) {
                    maxima[*row].push(results.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                }
            }
            for (limit, maxima) in limits.iter_mut().zip(&mut maxima) {
                // Each of these chunks has a result as great as its maximum.
                if maxima.len() >= k {
                    *limit = kth_greatest(k, maxima);
                    maxima.retain(|result| result >= limit);
                }
            }
            let count = kept[done..next].iter().map(|task| lock(task).len()).sum::<usize>();
            if count * CHUNK > (rows * n).div_ceil(SPARSE) {
                return Ok(None);
            }
            (done, next) = (next, tasks.min(next * GROWTH));
        }
        let log_sum_exps = match softcap {
            Some(softcap) => partials.chunks_exact(tasks).map(|partials| softcap.combine(partials)).collect(),
            None => vec![LogSumExp::ZERO; rows],
        };
        Ok(results_above(kept, &limits, log_sum_exps, n))
    }
}

/// Columns of a task: whole chunks, an odd number of them, so that rows do not compete for the same sets of the L1
/// cache.
fn columns_per_task(rows: usize) -> usize {
    (TASK_RESULTS / rows / CHUNK).clamp(2, 32).next_multiple_of(2).saturating_sub(1) * CHUNK
}

/// Keeps the chunks of a row, from column `first` on, that have a result which is not below the limit.
fn keep_chunks(_: Avx2Token, row: usize, first: usize, results: &[f32], limit: f32, kept: &mut Vec<KeptChunk>) {
    // SAFETY: the token proves AVX2 and FMA.
    unsafe { keep_chunks_with_avx2(row, first, results, limit, kept) };
}

#[target_feature(enable = "avx2,fma")]
fn keep_chunks_with_avx2(row: usize, first: usize, results: &[f32], limit: f32, kept: &mut Vec<KeptChunk>) {
    let limit = _mm256_set1_ps(limit);
    for (at, results) in results.chunks(CHUNK).enumerate() {
        let mut here = [f32::NEG_INFINITY; CHUNK];
        here[..results.len()].copy_from_slice(results);
        let mut mask = 0;
        for eight in 0..CHUNK / 8 {
            // SAFETY: a chunk is four times eight numbers.
            let eight = unsafe { _mm256_loadu_ps(here.as_ptr().add(eight * 8)) };
            // Not less than: NaN is kept too.
            mask |= _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(eight, limit));
        }
        if mask != 0 {
            kept.push(KeptChunk { row, column: first + at * CHUNK, results: here });
        }
    }
}

/// The results of each row that are not below its limit; `None` if these are too many.
fn results_above(
    kept: &[Mutex<Vec<KeptChunk>>],
    limits: &[f32],
    log_sum_exps: Vec<LogSumExp>,
    n: usize,
) -> Option<SparseRows> {
    let mut rows = vec![Vec::new(); limits.len()];
    for task in kept {
        for KeptChunk { row, column, results } in &*lock(task) {
            let columns = *column..n.min(column + CHUNK);
            for (column, &result) in columns.zip(results) {
                if result >= limits[*row] || result.is_nan() {
                    rows[*row].push((column as u32, result));
                }
            }
        }
    }
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    if width > n / SPARSE {
        return None;
    }
    rows.iter_mut().for_each(|row| row.resize(width, (LogitsStats::NO_TOKEN, f32::NEG_INFINITY)));
    let (tokens, results) = rows.into_iter().flatten().unzip();
    Some(SparseRows { tokens, width, results, log_sum_exps })
}
