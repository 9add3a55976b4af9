//! The product with a very large matrix of float32 of which only the greatest results count: first with a copy of the matrix
//! in 8 bits, a quarter of the bytes; then, in float32, with those of its rows whose results may be among the greatest.
//!
//! # Design
//! A result of the first pass is off by at most `‖w − ŵ‖·‖x‖ + ‖w‖·‖x − x̂‖` (Cauchy and Schwarz), where `ŵ` and `x̂` are what `w`
//! and `x` were rounded to; the norms of the rows are kept with the copy. A row whose result could not reach the `m`-th greatest
//! lower bound, even so, is not among the `m` greatest; every other is computed in float32. So the `m` greatest results are
//! those of the plain product, and proven to be, whatever the weights.
//!
//! Where the sum of all exponentials counts too (log-softmax), a few thousand of the greatest are computed in float32: what is
//! left of the first pass has a small share in that sum, and errors of either sign.
//!
//! The copy is made when a matrix is used for the second time, so that a short call need not wait for it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::float;
use super::product::{self, Activations, Output, Weights};
use crate::scores::Wanted;

/// Matrices of fewer numbers are not worth a copy.
const LARGE: usize = 8 << 20;
/// More rows of activations keep the processor busy with the products themselves.
const MOST_ROWS: usize = 64;
/// How many of the greatest results, at least, are computed in float32 where the sum of all counts.
const FOR_THE_SUM: usize = 2048;
/// Results that are looked at together.
const CHUNK: usize = 32;
/// Numbers of the copy with one scale.
const BLOCK: usize = 128;
/// The error of a sum in float32, of so many times the product of the norms: 512 roundings of 2⁻²⁴ each would be a third of it.
const ROUNDING: f32 = 1e-4;

/// The copies of a model's matrices, for all of its sessions.
#[derive(Default)]
pub(crate) struct Copies(Mutex<HashMap<(usize, usize), Use>>);

enum Use {
    Once,
    Copied(Arc<Copy>),
}

/// A matrix `[n, k]` in 8 bits.
struct Copy {
    k: usize,
    numbers: Vec<u8>,
    scales: Vec<f32>,
    /// `[n]`: the Euclidean lengths of the rows' errors.
    errors: Vec<f32>,
    /// `[n]`: the Euclidean lengths of the rows.
    lengths: Vec<f32>,
}

/// Does the parts `0..count` of some work, on several threads.
pub(super) type Spread<'s> = &'s dyn Fn(usize, &(dyn Fn(usize) + Send + Sync)) -> ort::Result<()>;

impl Copies {
    /// Computes the product as far as it is wanted, and tells whether it did: otherwise all of it is to be computed.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA, and `w` is the same at this place for as long as these copies live.
    pub unsafe fn multiply(
        &self,
        wanted: Wanted,
        activations: &mut Activations,
        (x, w, y): (&[f32], &[f32], &mut [f32]),
        [rows, n, k]: [usize; 3],
        spread: Spread,
    ) -> ort::Result<bool> {
        let Wanted::Best { count, sum } = wanted else { return Ok(false) };
        let count = if sum { count.max(FOR_THE_SUM) } else { count };
        if n * k < LARGE || rows > MOST_ROWS || rows * count > n / 8 {
            return Ok(false);
        }
        // SAFETY: the caller's.
        let Some(copy) = (unsafe { self.of(w, [n, k], spread)? }) else { return Ok(false) };
        // SAFETY: the caller's.
        unsafe { copy.multiply(activations, (x, w, y), [rows, n, k], count, spread) }
    }

    /// The copy of a matrix; none at its first use, or while another session makes it.
    ///
    /// # Safety
    /// As for [`Copies::multiply`].
    unsafe fn of(&self, w: &[f32], [n, k]: [usize; 2], spread: Spread) -> ort::Result<Option<Arc<Copy>>> {
        let Ok(mut copies) = self.0.try_lock() else { return Ok(None) };
        let place = (w.as_ptr() as usize, w.len());
        match copies.get(&place) {
            Some(Use::Copied(copy)) => Ok(Some(copy.clone())),
            None => {
                copies.insert(place, Use::Once);
                Ok(None)
            }
            Some(Use::Once) => {
                // SAFETY: the caller's.
                let copy = Arc::new(unsafe { Copy::new(w, [n, k], spread)? });
                copies.insert(place, Use::Copied(copy.clone()));
                Ok(Some(copy))
            }
        }
    }
}

/// Memory that several threads write different parts of.
struct Parts<T>(*mut T);

// SAFETY: plain memory; who writes where is what `Parts::of` asks its callers to see to.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// # Safety
    /// Within the memory that this was made of, which lives, and no one else reads or writes it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn of(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// Rows of a matrix that one thread takes at a time: about 1 MiB of float32.
fn share(k: usize) -> usize {
    ((256 << 10) / k).clamp(1, 4096).next_multiple_of(CHUNK)
}

impl Copy {
    /// # Safety
    /// The processor has AVX2 and FMA.
    unsafe fn new(w: &[f32], [n, k]: [usize; 2], spread: Spread) -> ort::Result<Copy> {
        let blocks = k.div_ceil(BLOCK);
        let mut copy = Copy {
            k,
            numbers: vec![0; n * blocks * BLOCK],
            scales: vec![0.0; n * blocks],
            errors: vec![0.0; n],
            lengths: vec![0.0; n],
        };
        let (numbers, scales) = (Parts(copy.numbers.as_mut_ptr()), Parts(copy.scales.as_mut_ptr()));
        let (errors, lengths) = (Parts(copy.errors.as_mut_ptr()), Parts(copy.lengths.as_mut_ptr()));
        let share = share(k);
        spread(n.div_ceil(share), &|part| {
            for row in part * share..n.min((part + 1) * share) {
                // SAFETY: every row is taken by one call only; the features are the caller's.
                unsafe {
                    let numbers = numbers.of(row * blocks * BLOCK..(row + 1) * blocks * BLOCK);
                    let scales = scales.of(row * blocks..(row + 1) * blocks);
                    let [error, length] = rounded(&w[row * k..][..k], numbers, scales);
                    errors.of(row..row + 1)[0] = error;
                    lengths.of(row..row + 1)[0] = length;
                }
            }
        })?;
        Ok(copy)
    }

    fn weights(&self) -> Weights<'_> {
        let Copy { k, numbers, scales, .. } = self;
        Weights { numbers, scales, zero_points: None, k: *k, bits: 8, block_size: BLOCK }
    }

    /// The product, with the greatest `count` results of each row in float32; false if that would have been too many.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    unsafe fn multiply(
        &self,
        activations: &mut Activations,
        (x, w, y): (&[f32], &[f32], &mut [f32]),
        [rows, n, k]: [usize; 3],
        count: usize,
        spread: Spread,
    ) -> ort::Result<bool> {
        let weights = self.weights();
        activations.prepare(rows, &weights);
        let target = activations.target();
        // How far the lengths of the errors and those of the rows themselves move a result.
        let mut slack = vec![[0.0_f32; 2]; rows];
        for (row, (x, slack)) in x.chunks_exact(k).zip(&mut slack).enumerate() {
            // SAFETY: room was made, and there is one thread.
            unsafe { target.round(row, x, &weights) };
            let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            let length = x.iter().map(|x| x * x).sum::<f32>().sqrt();
            let error = (k as f32).sqrt() * largest / 32767.0 * 0.5;
            *slack = [length * 1.0001, error * 1.01 + length * ROUNDING];
        }

        let share = share(k);
        let chunks = n.div_ceil(CHUNK);
        let mut least = vec![f32::NEG_INFINITY; rows * chunks];
        let (output, bounds) = (Output::new(y, rows, n), Parts(least.as_mut_ptr()));
        let found = Parts(y.as_mut_ptr());
        let activations = &*activations;
        spread(n.div_ceil(share), &|part| {
            let columns = part * share..n.min((part + 1) * share);
            // SAFETY: every column is computed, and then read, by one call only; shares are whole chunks.
            unsafe {
                product::multiply(activations, &weights, None, columns.clone(), &output);
                for (row, slack) in slack.iter().enumerate() {
                    let results = found.of(row * n + columns.start..row * n + columns.end);
                    let of_row = columns.start / CHUNK..columns.end.div_ceil(CHUNK);
                    let bounds = bounds.of(row * chunks + of_row.start..row * chunks + of_row.end);
                    self.lower_bounds(columns.start, results, *slack, bounds);
                }
            }
        })?;

        // In each of the chunks with the greatest lower bounds there is a result as great.
        let mut limits = Vec::with_capacity(rows);
        for bounds in least.chunks_exact_mut(chunks) {
            let place = count.min(chunks) - 1;
            limits.push(*bounds.select_nth_unstable_by(place, |a, b| b.total_cmp(a)).1);
        }
        let of_parts: Vec<Mutex<Vec<usize>>> = (0..n.div_ceil(share)).map(|_| Mutex::default()).collect();
        let results: &[f32] = y;
        spread(of_parts.len(), &|part| {
            let columns = part * share..n.min((part + 1) * share);
            let mut reach = Vec::new();
            for (row, (slack, limit)) in slack.iter().zip(&limits).enumerate() {
                // SAFETY: the features are the caller's.
                unsafe {
                    self.reaching(columns.start, &results[row * n..][columns.clone()], *slack, *limit, &mut reach)
                };
            }
            reach.sort_unstable();
            reach.dedup();
            if let Ok(mut of_part) = of_parts[part].lock() {
                *of_part = reach;
            }
        })?;
        let columns: Vec<usize> =
            of_parts.into_iter().flat_map(|part| part.into_inner().unwrap_or_else(|part| part.into_inner())).collect();
        if columns.len() > n / 3 {
            return Ok(false);
        }
        let product = float::Product::new(x, w, y, [rows, n, k]);
        const AT_ONCE: usize = 64;
        spread(columns.len().div_ceil(AT_ONCE), &|part| {
            for &column in &columns[part * AT_ONCE..columns.len().min((part + 1) * AT_ONCE)] {
                // SAFETY: every column is computed by one call only; the features are the caller's.
                unsafe { float::multiply(&product, column..column + 1) };
            }
        })?;
        Ok(true)
    }

    /// The greatest lower bound among each [`CHUNK`] of results.
    #[target_feature(enable = "avx2,fma")]
    fn lower_bounds(&self, first: usize, results: &[f32], slack: [f32; 2], bounds: &mut [f32]) {
        let errors = self.errors[first..][..results.len()].chunks(CHUNK);
        let lengths = self.lengths[first..][..results.len()].chunks(CHUNK);
        for (((results, errors), lengths), bound) in results.chunks(CHUNK).zip(errors).zip(lengths).zip(bounds) {
            let mut lanes = [f32::NEG_INFINITY; 8];
            for (at, ((result, error), length)) in results.iter().zip(errors).zip(lengths).enumerate() {
                let lane = &mut lanes[at % 8];
                *lane = lane.max(result - slack[0] * error - slack[1] * length);
            }
            *bound = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        }
    }

    /// The columns whose results may be `limit` or greater.
    #[target_feature(enable = "avx2,fma")]
    fn reaching(&self, first: usize, results: &[f32], slack: [f32; 2], limit: f32, reach: &mut Vec<usize>) {
        let upper = |at: usize| results[at] + slack[0] * self.errors[first + at] + slack[1] * self.lengths[first + at];
        for from in (0..results.len()).step_by(CHUNK) {
            let to = results.len().min(from + CHUNK);
            if (from..to).fold(false, |any, at| any | (upper(at) >= limit)) {
                reach.extend((from..to).filter(|&at| upper(at) >= limit).map(|at| first + at));
            }
        }
    }
}

/// Rounds a row to 8 bits, and returns the lengths of its error and of itself.
#[target_feature(enable = "avx2,fma")]
fn rounded(row: &[f32], numbers: &mut [u8], scales: &mut [f32]) -> [f32; 2] {
    let (mut errors, mut lengths) = ([0.0_f32; 8], [0.0_f32; 8]);
    let mut padded;
    for ((block, numbers), scale) in row.chunks(BLOCK).zip(numbers.chunks_exact_mut(BLOCK)).zip(scales) {
        let block: &[f32; BLOCK] = match block.try_into() {
            Ok(block) => block,
            Err(_) => {
                padded = [0.0; BLOCK];
                padded[..block.len()].copy_from_slice(block);
                &padded
            }
        };
        let mut largest = [0.0_f32; 8];
        for eight in block.as_chunks::<8>().0 {
            for (largest, x) in largest.iter_mut().zip(eight) {
                *largest = largest.max(x.abs());
            }
        }
        let largest = largest.into_iter().fold(0.0, f32::max);
        *scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let eights = block.as_chunks::<8>().0.iter().zip(numbers.as_chunks_mut::<8>().0);
        for (eight, numbers) in eights {
            for at in 0..8 {
                let x = eight[at];
                // 1.5 · 2²³ leaves the nearest whole number in the low bits.
                let shifted = x * inverse + 12_582_912.0;
                let error = x - (shifted - 12_582_912.0) * *scale;
                numbers[at] = (shifted.to_bits() as u8).wrapping_add(128);
                errors[at] += error * error;
                lengths[at] += x * x;
            }
        }
    }
    [errors, lengths].map(|lanes| lanes.into_iter().sum::<f32>().sqrt() * 1.0001)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(parts: usize, work: &(dyn Fn(usize) + Send + Sync)) -> ort::Result<()> {
        (0..parts).for_each(work);
        Ok(())
    }

    /// Numbers about as they come from a model: most small, some large.
    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next() * next() * next()).collect()
    }

    #[test]
    fn the_greatest_are_those_of_the_plain_product() {
        if !float::is_here() {
            return;
        }
        for (rows, n, k, wanted) in [
            (1, 65_600, 136, Wanted::Best { count: 1, sum: false }),
            (3, 40_001, 256, Wanted::Best { count: 60, sum: false }),
            (2, 70_000, 130, Wanted::Best { count: 8, sum: true }),
        ] {
            let (x, w) = (noise(rows * k, 7), noise(n * k, 11));
            let mut plain = vec![0.0; rows * n];
            // SAFETY: the features are there, and there is one thread.
            unsafe { float::multiply(&float::Product::new(&x, &w, &mut plain, [rows, n, k]), 0..n) };

            let (copies, mut activations) = (Copies::default(), Activations::default());
            let mut y = vec![f32::NAN; rows * n];
            let mut multiply = |wanted, y: &mut [f32]| {
                // SAFETY: as above.
                unsafe { copies.multiply(wanted, &mut activations, (&x, &w, y), [rows, n, k], &alone) }
            };
            for (wanted, expected) in [(wanted, false), (Wanted::All, false), (wanted, true)] {
                assert_eq!(multiply(wanted, &mut y).ok(), Some(expected), "{wanted:?}");
            }
            let Wanted::Best { count, sum } = wanted else { unreachable!("see above") };
            for (plain, y) in plain.chunks(n).zip(y.chunks(n)) {
                let best = |results: &[f32]| {
                    let mut order: Vec<usize> = (0..n).collect();
                    order.sort_by(|&a, &b| results[b].total_cmp(&results[a]).then(a.cmp(&b)));
                    order[..count].iter().map(|&at| (at, results[at].to_bits())).collect::<Vec<_>>()
                };
                assert_eq!(best(y), best(plain), "{rows} rows, {wanted:?}");
                let log_sum = |results: &[f32]| results.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                let (apart, rest) = ((log_sum(y) - log_sum(plain)).abs(), plain.iter().zip(y).filter(|(a, b)| a != b));
                assert!(rest.count() > n / 2, "only the first pass for most");
                assert!(!sum || apart < 1e-5, "{apart}");
            }
        }
    }

    #[test]
    fn what_cannot_be_told_apart_is_computed() {
        if !float::is_here() {
            return;
        }
        // All rows but one are the same, and that one is greater by less than 8 bits tell.
        let (n, k) = (65_536, 128);
        let mut w: Vec<f32> = noise(k, 3).into_iter().cycle().take(n * k).collect();
        let x = noise(k, 5);
        let at = (0..k).max_by(|&a, &b| x[a].abs().total_cmp(&x[b].abs())).unwrap_or(0);
        w[40_000 * k + at] += 1e-4 * x[at].signum();
        let (copies, mut activations) = (Copies::default(), Activations::default());
        let wanted = Wanted::Best { count: 1, sum: false };
        let mut y = vec![0.0; n];
        for _ in 0..2 {
            // SAFETY: the features are there, and there is one thread.
            let done = unsafe { copies.multiply(wanted, &mut activations, (&x, &w, &mut y), [1, n, k], &alone) };
            // Too many to be worth it: the caller has to compute all.
            assert_eq!(done.ok(), Some(false));
        }
    }
}
