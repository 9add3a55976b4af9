//! The product with the head of a vocabulary, of which only the greatest results count: first roughly for all of its rows, then as it
//! should be for those whose results may be among the greatest.
//!
//! # Design
//! How roughly depends on what is wanted of how many rows, see [`Pass`]. The fewer bits the fewer bytes are read, and the more
//! rows are to be computed in full.
//!
//! A result of the first pass is off by at most `‖w − ŵ‖·‖x‖ + ‖w‖·‖x − x̂‖` (Cauchy and Schwarz), where `ŵ` and `x̂` are what `w`
//! and `x` were rounded to; the norms of the rows are kept. A row whose result could not reach the `m`-th greatest lower bound,
//! even so, is not among the `m` greatest; every other is computed in full. So the `m` greatest results are those of the plain
//! product, and proven to be, whatever the weights. With very few bits lower bounds are low: there the rows that look greatest
//! are computed first, and the `m`-th greatest of these is the limit.
//!
//! Where the sum of all exponentials counts too (log-softmax), a few hundred of the greatest are computed in full: what is left of
//! the first pass has errors of either sign, and is moved by what these add to the sum on average. For a matrix in float32 the pass
//! takes activations of 16 bits, so that only the errors of its copy are left; for one in few bits, which is itself no more exact,
//! activations of 8 bits, where the processor multiplies so many as fast.
//!
//! Copies and norms are made when they would be used for the second time, so that a short call need not wait for them.
//!
//! Where the processor multiplies as fast as the memory sends, all results are computed as they should be: see [`whole`].

mod copy;
mod whole;

use std::arch::x86_64::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::aligned::Aligned;
use super::product::rough::{self, Rough};
use super::product::{self, Activations, Columns, Output, Purpose, Weights};
use super::tanh::Told;
use super::{Parts, Spread, float};
use crate::log_softmax::LogSumExp;
use crate::logits::{LogitsRequest, LogitsStats};
use copy::Known;

/// Matrices of fewer numbers are not worth it.
const LARGE: usize = 8 << 20;
/// More rows of activations keep the processor busy with the products themselves.
const MOST_ROWS: usize = 64;
/// Results that are looked at together.
const CHUNK: usize = 32;
/// Rows that are computed in full together, where one of them may be among the greatest.
const TOGETHER: usize = 4;
/// The most results that a first pass with weights of 4 bits is for.
const FEW_RESULTS: usize = 8;
/// How many results are tried, at least, for how great the greatest are.
const TRIED: usize = 16;
/// So many passes in 4 bits that told too little are the last.
const TOO_BLUNT: u32 = 8;
/// The error of a sum in float32, of so many times the product of the norms: 512 roundings of 2⁻²⁴ each would be a third of it.
const ROUNDING: f32 = 1e-4;

/// What is known of a model's head, wherever it lies, for all of its sessions.
pub(crate) struct Copies {
    /// Rows of the head. Of other matrices all results count, however large they are.
    rows: usize,
    /// What results are multiplied by before their exponentials are summed up, about.
    factor: f32,
    /// Whether all results of some rows may be computed in full where that takes no longer.
    whole: bool,
    /// By the matrix's place and length, and by what of it the pass reads.
    known: Mutex<HashMap<(usize, usize, Reads), Use>>,
}

enum Use {
    Once,
    Known(Arc<Known>),
}

/// How the first pass is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pass {
    /// With a copy in 4 bits of a matrix in more, and activations of 8.
    Blunt,
    /// With 8 bits, a copy if the matrix is in float32, or with the few bits it has, and activations of 6, which halves the work.
    Rough,
    /// With a copy in 8 bits and activations of 16, where the sum counts.
    Sum,
    /// With the few bits it has and activations of 8, where the sum counts.
    RoughSum,
}

/// What a first pass reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Reads {
    FourBits,
    /// Of a matrix in float32; one in few bits is read itself.
    EightBits,
}

impl Pass {
    /// Those to try one after the other, the fastest first.
    fn of(w: Table, rows: usize, count: usize, sum: bool) -> &'static [Pass] {
        // One row waits for the memory; the more rows, and the more results of each, the more is to be computed in full.
        let is_few = rows == 1 && count <= FEW_RESULTS;
        match w {
            Table::Float(_) if sum => &[Pass::Sum],
            Table::Packed(w) if sum => match rough::takes(w) && rough::in_8_bits(w) {
                true => &[Pass::RoughSum],
                false => &[],
            },
            Table::Float(_) if is_few => &[Pass::Blunt, Pass::Rough],
            Table::Packed(w) if is_few && w.bits > 4 => match rough::takes(w) {
                true => &[Pass::Blunt, Pass::Rough],
                false => &[Pass::Blunt],
            },
            Table::Packed(w) if !rough::takes(w) => &[],
            _ => &[Pass::Rough],
        }
    }

    fn reads(self) -> Reads {
        match self {
            Pass::Blunt => Reads::FourBits,
            Pass::Rough | Pass::Sum | Pass::RoughSum => Reads::EightBits,
        }
    }
}

/// A matrix `[n, k]`, as it is held.
#[derive(Clone, Copy)]
pub(super) enum Table<'t> {
    Float(&'t [f32]),
    Packed(&'t Weights<'t>),
}

impl Table<'_> {
    /// Where it is, how long it is, and what of it is read.
    fn place(&self, reads: Reads) -> (usize, usize, Reads) {
        match self {
            Table::Float(w) => (w.as_ptr() as usize, w.len(), reads),
            Table::Packed(w) => (w.numbers.as_ptr() as usize, w.numbers.len(), reads),
        }
    }

    /// How many of the greatest results, at least, are computed in full where the sum of all counts: a matrix in few bits has greater
    /// errors of its own.
    fn for_the_sum(&self) -> usize {
        match self {
            Table::Float(_) => 256,
            Table::Packed(_) => 64,
        }
    }
}

/// Kept for its allocations.
#[derive(Default)]
pub(super) struct Room {
    activations: Activations,
    rough: Rough,
    /// `[rows, chunks]`: see [`Known::bounds`].
    least: Vec<f32>,
    most: Vec<f32>,
    /// By parts of the columns.
    reached: Vec<Mutex<Reached>>,
    /// `[rows, n]`, where these are not the output.
    results: Aligned<f32>,
    whole: whole::Room,
}

/// What was computed in full, and may be among the greatest.
pub(super) struct List {
    /// `[rows, width]`: the columns, in order, [`LogitsStats::NO_TOKEN`] where a row has fewer.
    pub tokens: Vec<u32>,
    pub width: usize,
    /// `[rows, width]`: their results, −∞ where a row has fewer.
    pub results: Vec<f32>,
    /// `[rows]`: see [`Told::norms`]; zeros where the sum of all exponentials was not wanted.
    pub norms: Vec<LogSumExp>,
}

/// What is to be computed in full of a part of the columns.
#[derive(Default)]
struct Reached {
    /// One list of columns behind the other for some rows each.
    columns: Vec<usize>,
    /// Where each ends.
    ends: Vec<usize>,
    /// Kept for its allocation.
    found: Vec<usize>,
}

impl Copies {
    /// Nothing yet, for a head of so many rows, whose results are about `factor` times smaller than what their exponentials
    /// are taken of.
    pub fn new(rows: usize, factor: f32) -> Copies {
        Copies { rows, factor, whole: true, known: Mutex::default() }
    }

    /// How many of the greatest results are wanted, and whether the sum of all is, of a product that it is worth while for.
    fn takes(&self, wanted: LogitsRequest, w: Table, [rows, n, k]: [usize; 3]) -> Option<(usize, bool)> {
        let LogitsRequest::TopK { k: count, log_sum_exp: sum, .. } = wanted else { return None };
        let count = if sum { count.max(w.for_the_sum()) } else { count };
        // Bounds are looked at by chunks: there have to be as many as results that are wanted.
        let is_worth_it = self.is_head(n, k) && rows <= MOST_ROWS && count.max(TRIED) <= n / CHUNK;
        is_worth_it.then_some((count, sum))
    }

    /// Whether a matrix `[n, k]` is the head, and large enough to be looked at.
    fn is_head(&self, n: usize, k: usize) -> bool {
        n == self.rows && n * k >= LARGE
    }

    /// The weights, if all results are to be computed in full however few are wanted.
    fn in_full<'t>(&self, wanted: LogitsRequest, w: Table<'t>, [rows, n, k]: [usize; 3]) -> Option<&'t Weights<'t>> {
        let (Table::Packed(w), LogitsRequest::TopK { k: count, .. }) = (w, wanted) else { return None };
        (self.whole && self.is_head(n, k) && whole::lists(count, n) && product::waits_for_memory(rows, w)).then_some(w)
    }

    /// Whether [`Copies::list`] is worth while: what is still to be found out of the matrix, [`Copies::multiply`] finds out.
    pub fn may_list(&self, wanted: LogitsRequest, w: Table, sizes: [usize; 3]) -> bool {
        if self.in_full(wanted, w, sizes).is_some() {
            return true;
        }
        let Some((count, sum)) = self.takes(wanted, w, sizes) else { return false };
        let Some(pass) = Pass::of(w, sizes[0], count, sum).first() else { return false };
        let copies = self.known.try_lock();
        copies.is_ok_and(|copies| matches!(copies.get(&w.place(pass.reads())), Some(Use::Known(_))))
    }

    /// [`Copies::multiply`], which keeps the results and lists what it has computed in full; nothing if that would have been too much.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn list(
        &self,
        (wanted, told): (LogitsRequest, &Told),
        room: &mut Room,
        (x, w): (&[f32], Table),
        sizes: [usize; 3],
        spread: Spread,
    ) -> ort::Result<Option<List>> {
        let LogitsRequest::TopK { k: count, log_sum_exp: sum, .. } = wanted else { return Ok(None) };
        if let Some(w) = self.in_full(wanted, w, sizes) {
            // SAFETY: such weights wait for the memory with the newest instructions alone.
            return unsafe { whole::list((count, sum.then_some(told)), &mut room.whole, (x, w), sizes, spread) };
        }
        let [rows, n, _] = sizes;
        let mut results = std::mem::take(&mut room.results);
        results.resize(rows * n, 0.0);
        // SAFETY: the caller's.
        let is_done = unsafe { self.multiply(wanted, room, (x, w, &mut results), sizes, spread) };
        room.results = results;
        if !is_done? {
            return Ok(None);
        }
        let norms = if sum { told.norms(&room.results, n, spread)? } else { vec![LogSumExp::ZERO; rows] };
        let (tokens, width) = listed(&room.reached, rows);
        let mut results = Vec::with_capacity(tokens.len());
        for (tokens, of_row) in tokens.chunks_exact(width).zip(room.results.chunks_exact(n)) {
            let result = |&token: &u32| of_row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
            results.extend(tokens.iter().map(result));
        }
        Ok(Some(List { tokens, width, results, norms }))
    }

    /// Computes the product `y = x · wᵀ` as far as it is wanted, and tells whether it did: otherwise all of it is to be
    /// computed.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA, and `w` is the same at this place for as long as these copies live.
    pub unsafe fn multiply(
        &self,
        wanted: LogitsRequest,
        room: &mut Room,
        (x, w, y): (&[f32], Table, &mut [f32]),
        [rows, n, k]: [usize; 3],
        spread: Spread,
    ) -> ort::Result<bool> {
        let Some((count, sum)) = self.takes(wanted, w, [rows, n, k]) else { return Ok(false) };
        if self.in_full(wanted, w, [rows, n, k]).is_some() {
            return Ok(false);
        }
        for &pass in Pass::of(w, rows, count, sum) {
            // SAFETY: the caller's.
            let Some(known) = (unsafe { self.of(w, pass.reads(), [n, k], spread)? }) else { return Ok(false) };
            if pass == Pass::Blunt && known.blunt.load(Ordering::Relaxed) >= TOO_BLUNT {
                continue;
            }
            let wanted = Want { pass, count, factor: self.factor };
            // SAFETY: the caller's.
            if unsafe { known.multiply(room, (x, w, &mut *y), [rows, n, k], wanted, spread)? } {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What is known of a matrix; nothing at its first use, or while another session finds it out.
    ///
    /// # Safety
    /// As for [`Copies::multiply`].
    unsafe fn of(&self, w: Table, reads: Reads, [n, k]: [usize; 2], spread: Spread) -> ort::Result<Option<Arc<Known>>> {
        let Ok(mut copies) = self.known.try_lock() else { return Ok(None) };
        let place = w.place(reads);
        match copies.get(&place) {
            Some(Use::Known(known)) => Ok(Some(known.clone())),
            None => {
                copies.insert(place, Use::Once);
                Ok(None)
            }
            Some(Use::Once) => {
                // SAFETY: the caller's.
                let known = Arc::new(unsafe { Known::new(w, reads, [n, k], spread)? });
                copies.insert(place, Use::Known(known.clone()));
                Ok(Some(known))
            }
        }
    }
}

/// What a first pass is for.
#[derive(Clone, Copy)]
struct Want {
    pass: Pass,
    count: usize,
    /// See [`Copies`].
    factor: f32,
}

/// Rows of a matrix that one thread takes at a time: about 1 MiB of float32.
fn share(k: usize) -> usize {
    ((256 << 10) / k).clamp(1, 4096).next_multiple_of(CHUNK)
}

impl Known {
    /// The product, with the greatest `count` results of each row as they should be; false if that would have been too many.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    unsafe fn multiply(
        &self,
        Room { activations, rough, least, most, reached, .. }: &mut Room,
        (x, w, y): (&[f32], Table, &mut [f32]),
        [rows, n, k]: [usize; 3],
        Want { pass, count, factor }: Want,
        spread: Spread,
    ) -> ort::Result<bool> {
        let copied = self.copy.as_ref().map(|copy| copy.weights(k));
        let (weights, in_few_bits) = match (w, &copied) {
            (Table::Packed(w), Some(copied)) => (copied, Some(w)),
            (Table::Packed(w), None) => (w, Some(w)),
            (Table::Float(_), Some(copied)) => (copied, None),
            (Table::Float(_), None) => return Ok(false),
        };
        // Activations of 16 bits are for the first pass, or for what is computed in full of few bits.
        if let Some(weights) = if pass == Pass::Sum { Some(weights) } else { in_few_bits } {
            let purpose = if pass == Pass::Sum { Purpose::Whole } else { Purpose::Scattered };
            activations.round(x, weights, purpose);
        }
        if pass != Pass::Sum {
            rough.round(x, weights);
        }
        let (activations, rough) = (&*activations, &*rough);
        // Errors of either sign raise the sum of exponentials, by e^(σ²/2): each number of one is met by one of the other operand,
        // so that σ² is the product of their lengths' squares, divided by k.
        let shift = |square: f32| factor * square / (2 * k) as f32;
        let (shifts, met): (Vec<f32>, &[f32]) = match (pass, &self.copy) {
            (Pass::Sum, Some(copy)) => (x.chunks_exact(k).map(|x| shift(square(x))).collect(), &copy.errors),
            (Pass::RoughSum, _) => (rough.errors().iter().map(|error| shift(error * error)).collect(), &self.lengths),
            _ => (Vec::new(), &[]),
        };
        let [longest_error, longest] = self.longest;
        // How far the lengths of the errors and those of the rows themselves move a result.
        let slack: Vec<[f32; 2]> = (x.chunks_exact(k).enumerate())
            .map(|(row, x)| {
                let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                let length = square(x).sqrt();
                let in_16_bits = (k as f32).sqrt() * largest / 32767.0 * 0.5;
                let error = match (pass, in_few_bits) {
                    (Pass::Sum, _) => in_16_bits,
                    (_, Some(_)) => rough.errors()[row] + in_16_bits,
                    (_, None) => rough.errors()[row],
                };
                // What the shift takes off.
                let shift = shifts.get(row).copied().unwrap_or(0.0);
                let of_rows = error * 1.01 + length * ROUNDING;
                match self.copy {
                    Some(_) => [(length + error) * 1.0001 + shift * longest_error, of_rows],
                    None => [0.0, of_rows + shift * longest],
                }
            })
            .collect();

        let share = share(k);
        let chunks = n.div_ceil(CHUNK);
        least.resize(rows * chunks, 0.0);
        most.resize(rows * chunks, 0.0);
        let output = Output::new(y, rows, n);
        let (of_least, of_most) = (Parts::new(least), Parts::new(most));
        let found = Parts::new(y);
        spread(n.div_ceil(share), &|part| {
            let columns = part * share..n.min((part + 1) * share);
            // SAFETY: every column is computed, and then read, by one call only; shares are whole chunks.
            unsafe {
                match pass {
                    Pass::Sum => {
                        let all = (0..rows, Columns::All(columns.clone()));
                        product::multiply(activations, weights, None, all, &output);
                    }
                    _ => rough::multiply(rough, weights, columns.clone(), &output),
                }
                for (row, slack) in slack.iter().enumerate() {
                    let results = found.of(row * n + columns.start..row * n + columns.end);
                    let here = row * chunks + columns.start / CHUNK..row * chunks + columns.end.div_ceil(CHUNK);
                    let lengths = shifts.get(row).map(|shift| (*shift, &met[columns.clone()]));
                    self.bounds(columns.start, results, *slack, lengths, [of_least.of(here.clone()), of_most.of(here)]);
                }
            }
        })?;

        let in_full = match w {
            Table::Float(w) => InFull::Float(float::Product::new(x, w, y, [rows, n, k])),
            Table::Packed(w) => InFull::Packed(activations, w, Output::new(y, rows, n)),
        };
        let mut limits = vec![0.0; rows];
        let of_rows = Parts::new(&mut limits);
        spread(rows, &|row| {
            // SAFETY: every row is taken by one call only; the features are the caller's.
            unsafe {
                // In each of the chunks with the greatest lower bounds there is a result as great.
                let mut limit = greatest(count, of_least.of(row * chunks..(row + 1) * chunks));
                if pass == Pass::Blunt {
                    let results = found.of(row * n..(row + 1) * n);
                    let mut tried = tries(&most[row * chunks..][..chunks], results, TRIED.max(2 * count));
                    for (column, result) in &mut tried {
                        in_full.compute(row..row + 1, &[*column]);
                        *result = found.of(row * n + *column..row * n + *column + 1)[0];
                    }
                    let mut tried: Vec<f32> = tried.into_iter().map(|(_, result)| result).collect();
                    tried.iter_mut().filter(|result| result.is_nan()).for_each(|result| *result = f32::NEG_INFINITY);
                    limit = limit.max(greatest(count, &mut tried));
                }
                of_rows.of(row..row + 1)[0] = limit;
            }
        })?;
        reached.resize_with(n.div_ceil(share), Mutex::default);
        let count = AtomicUsize::new(0);
        spread(reached.len(), &|part| {
            let columns = part * share..n.min((part + 1) * share);
            let Reached { columns: reach, ends, found: here } = &mut *held(&reached[part]);
            reach.clear();
            ends.clear();
            for first in (0..rows).step_by(TOGETHER) {
                for row in first..rows.min(first + TOGETHER) {
                    let most = &most[row * chunks..][columns.start / CHUNK..columns.end.div_ceil(CHUNK)];
                    // SAFETY: no one writes now; the features are the caller's.
                    unsafe {
                        let results = found.of(row * n + columns.start..row * n + columns.end);
                        self.reaching(columns.start, (results, most), slack[row], limits[row], here);
                    }
                }
                if rows > 1 {
                    here.sort_unstable();
                    here.dedup();
                }
                reach.append(here);
                ends.push(reach.len());
            }
            count.fetch_add(reach.len(), Ordering::Relaxed);
        })?;
        let (count, all) = (count.into_inner(), n * rows.div_ceil(TOGETHER));
        if pass == Pass::Blunt {
            let change = |blunt: u32| Some(if count > all / 8 { blunt + 1 } else { blunt.saturating_sub(1) });
            // What was there before is of no use.
            let _ = self.blunt.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
        }
        if count > all / 3 {
            return Ok(false);
        }
        spread(reached.len(), &|part| {
            let Reached { columns, ends, .. } = &*held(&reached[part]);
            let mut start = 0;
            for (first, &end) in (0..rows).step_by(TOGETHER).zip(ends) {
                // SAFETY: every place is computed by one call only; the features are the caller's.
                unsafe { in_full.compute(first..rows.min(first + TOGETHER), &columns[start..end]) };
                start = end;
            }
        })?;
        Ok(true)
    }

    /// A lower bound of the greatest of each [`CHUNK`] of results, and an upper one of all of them, NaN if one of these is; results are
    /// moved down thereafter by so many times the squares of these lengths.
    #[target_feature(enable = "avx2,fma")]
    fn bounds(
        &self,
        first: usize,
        results: &mut [f32],
        slack: [f32; 2],
        shift: Option<(f32, &[f32])>,
        [least, most]: [&mut [f32]; 2],
    ) {
        for (at, results) in results.chunks_mut(CHUNK).enumerate() {
            let [error, length] = self.longest_of_chunks[first / CHUNK + at];
            let off = slack[0] * error + slack[1] * length;
            let greatest = greatest_of(results);
            [least[at], most[at]] = [greatest - off, greatest + off];
            if let Some((shift, lengths)) = shift {
                for (result, length) in results.iter_mut().zip(&lengths[at * CHUNK..]) {
                    *result -= shift * length * length;
                }
            }
        }
    }

    /// The columns whose results may be `limit` or greater, or are not numbers, by the greatest bounds of each chunk.
    #[target_feature(enable = "avx2,fma")]
    fn reaching(
        &self,
        first: usize,
        (results, most): (&[f32], &[f32]),
        slack: [f32; 2],
        limit: f32,
        reach: &mut Vec<usize>,
    ) {
        for (at, (results, most)) in results.chunks(CHUNK).zip(most).enumerate() {
            if *most < limit {
                continue;
            }
            let (column, moved) = (first + at * CHUNK, self.moves(first + at * CHUNK, results, slack));
            for (eight, moved) in (0..).zip(moved.as_chunks::<8>().0) {
                // SAFETY: eight numbers.
                let moved = unsafe { _mm256_loadu_ps(moved.as_ptr()) };
                // Not less: what is not a number reaches everything.
                let mut there = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(moved, _mm256_set1_ps(limit)));
                while there != 0 {
                    let lane = there.trailing_zeros() as usize;
                    there &= there - 1;
                    if eight * 8 + lane < results.len() {
                        reach.push(column + eight * 8 + lane);
                    }
                }
            }
        }
    }

    /// A chunk's results, moved by so much of the lengths of the errors and of the rows themselves; nothing is −∞.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn moves(&self, first: usize, results: &[f32], slack: [f32; 2]) -> [f32; CHUNK] {
        let mut moved = [f32::NEG_INFINITY; CHUNK];
        let lengths = &self.lengths[first..][..results.len()];
        // Weights in few bits are themselves.
        let errors = self.copy.as_ref().map_or(lengths, |copy| &copy.errors[first..][..results.len()]);
        for (((moved, result), error), length) in moved.iter_mut().zip(results).zip(errors).zip(lengths) {
            *moved = result + slack[0] * error + slack[1] * length;
        }
        moved
    }
}

/// The square of the Euclidean length.
fn square(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum()
}

/// The greatest of at most [`CHUNK`] numbers, NaN if one of these is.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn greatest_of(results: &[f32]) -> f32 {
    let mut greatest = f32::NEG_INFINITY;
    if let Ok(results) = <&[f32; CHUNK]>::try_from(results) {
        // SAFETY: eight numbers each.
        unsafe {
            let [a, b, c, d] = [0, 8, 16, 24].map(|at| _mm256_loadu_ps(results.as_ptr().add(at)));
            // Of two the second where one is NaN, which the sum is then too.
            let sums = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
            if _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(sums, sums)) == 0 {
                let most = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
                let most = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
                let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
                return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
            }
        }
    }
    for &result in results {
        greatest = if result.is_nan() || greatest.is_nan() { f32::NAN } else { greatest.max(result) };
    }
    greatest
}

/// The product as it should be.
enum InFull<'p> {
    Float(float::Product<'p>),
    Packed(&'p Activations, &'p Weights<'p>, Output),
}

impl InFull<'_> {
    /// # Safety
    /// The processor has AVX2 and FMA, and no one else computes these rows of these columns.
    unsafe fn compute(&self, rows: Range<usize>, columns: &[usize]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                InFull::Float(product) => {
                    for (at, &column) in columns.iter().enumerate() {
                        columns.get(at + 2).inspect(|&&later| product.fetch(later));
                        float::multiply(product, [rows.clone(), column..column + 1]);
                    }
                }
                InFull::Packed(x, w, y) => product::multiply(x, w, None, (rows, Columns::Listed(columns)), y),
            }
        }
    }
}

/// The columns that were computed in full of each of so many rows, `[rows, width]`, and the width.
fn listed(reached: &[Mutex<Reached>], rows: usize) -> (Vec<u32>, usize) {
    let groups = rows.div_ceil(TOGETHER);
    let mut of_groups = vec![Vec::new(); groups];
    for part in reached {
        let Reached { columns, ends, .. } = &*held(part);
        let mut start = 0;
        for (group, &end) in of_groups.iter_mut().zip(ends) {
            group.extend(columns[start..end].iter().map(|&column| column as u32));
            start = end;
        }
    }
    let width = of_groups.iter().map(Vec::len).max().unwrap_or(0);
    of_groups.iter_mut().for_each(|group| group.resize(width, LogitsStats::NO_TOKEN));
    ((0..rows).flat_map(|row| &of_groups[row / TOGETHER]).copied().collect(), width)
}

/// What a part of the columns' mutex holds, of which each is locked by one thread at a time.
fn held<T>(part: &Mutex<T>) -> MutexGuard<'_, T> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The `count`-th greatest of the values, of which there are as many, and which are put in another order.
fn greatest(count: usize, values: &mut [f32]) -> f32 {
    *values.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
}

/// The greatest results of those `count` chunks that have the greatest upper bounds, and their columns.
fn tries(most: &[f32], results: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut chunks: Vec<usize> = (0..most.len()).collect();
    chunks.select_nth_unstable_by(count.min(most.len()) - 1, |&a, &b| most[b].total_cmp(&most[a]));
    chunks.truncate(count);
    let columns = chunks.into_iter().map(|chunk| chunk * CHUNK..results.len().min((chunk + 1) * CHUNK));
    columns.filter_map(|columns| columns.map(|at| (at, results[at])).max_by(|a, b| a.1.total_cmp(&b.1))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::alone;
    use super::*;

    /// Those of a head that is multiplied roughly first, of whatever rows.
    fn roughly(rows: usize, factor: f32) -> Copies {
        Copies { whole: false, ..Copies::new(rows, factor) }
    }

    /// The product of `x` with all of `w`.
    pub fn plain_of(x: &[f32], w: &Weights, n: usize, purpose: Purpose) -> Vec<f32> {
        let rows = x.len() / w.k;
        let (mut activations, mut plain) = (Activations::default(), vec![0.0; rows * n]);
        activations.round(x, w, purpose);
        let output = Output::new(&mut plain, rows, n);
        // SAFETY: there is one thread.
        unsafe { product::multiply(&activations, w, None, (0..rows, Columns::All(0..n)), &output) };
        plain
    }

    /// Numbers about as they come from a model: most small, some large.
    pub fn noise(count: usize, seed: u32) -> Vec<f32> {
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
            (1, 65_600, 136, LogitsRequest::TopK { k: 1, log_sum_exp: false, sparse: false }),
            (3, 40_001, 256, LogitsRequest::TopK { k: 60, log_sum_exp: false, sparse: false }),
            (4, 40_001, 256, LogitsRequest::TopK { k: 60, log_sum_exp: false, sparse: false }),
            (9, 40_001, 256, LogitsRequest::TopK { k: 30, log_sum_exp: false, sparse: false }),
            (2, 70_000, 130, LogitsRequest::TopK { k: 8, log_sum_exp: true, sparse: false }),
        ] {
            let (x, w) = (noise(rows * k, 7), noise(n * k, 11));
            let mut plain = vec![0.0; rows * n];
            // SAFETY: the features are there, and there is one thread.
            unsafe { float::multiply(&float::Product::new(&x, &w, &mut plain, [rows, n, k]), [0..rows, 0..n]) };

            let (copies, mut room) = (roughly(n, 1.0), Room::default());
            let mut y = vec![f32::NAN; rows * n];
            let mut multiply = |wanted, y: &mut [f32]| {
                // SAFETY: as above.
                unsafe { copies.multiply(wanted, &mut room, (&x, Table::Float(&w), y), [rows, n, k], &alone) }
            };
            for (wanted, expected) in [(wanted, false), (LogitsRequest::All, false), (wanted, true)] {
                assert_eq!(multiply(wanted, &mut y).ok(), Some(expected), "{wanted:?}");
            }
            let LogitsRequest::TopK { k: count, log_sum_exp: sum, .. } = wanted else { unreachable!("see above") };
            for (plain, y) in plain.chunks(n).zip(y.chunks(n)) {
                let best = |results: &[f32]| {
                    let mut order: Vec<usize> = (0..n).collect();
                    order.sort_by(|&a, &b| results[b].total_cmp(&results[a]).then(a.cmp(&b)));
                    // Many rows are summed up in another order where they are computed all at once.
                    let bits = |at: usize| if rows > TOGETHER { 0 } else { results[at].to_bits() };
                    order[..count].iter().map(|&at| (at, bits(at))).collect::<Vec<_>>()
                };
                assert_eq!(best(y), best(plain), "{rows} rows, {wanted:?}");
                let log_sum = |results: &[f32]| results.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                let (apart, rest) = ((log_sum(y) - log_sum(plain)).abs(), plain.iter().zip(y).filter(|(a, b)| a != b));
                assert!(rest.count() > n / 2, "only the first pass for most");
                assert!(!sum || apart < 1e-5, "{apart}");
            }
            let told = Told::default();
            // SAFETY: as above.
            let list = unsafe { copies.list((wanted, &told), &mut room, (&x, Table::Float(&w)), [rows, n, k], &alone) };
            let Ok(Some(List { tokens, width, results: listed, .. })) = list else { panic!("{wanted:?}: no list") };
            for ((tokens, listed), results) in tokens.chunks(width).zip(listed.chunks(width)).zip(y.chunks(n)) {
                let there = tokens.partition_point(|&token| token != LogitsStats::NO_TOKEN);
                let of_tokens = tokens[..there].iter().map(|&token| results[token as usize]);
                assert!(of_tokens.eq(listed[..there].iter().copied()), "{wanted:?}");
                assert!(tokens[..there].is_sorted_by(|a, b| a < b) && there < n / 2, "{there} of {n}");
                assert!(tokens[there..].iter().all(|&token| token == LogitsStats::NO_TOKEN));
                let mut order: Vec<u32> = (0..n as u32).collect();
                order.sort_by(|&a, &b| results[b as usize].total_cmp(&results[a as usize]));
                assert!(order[..count].iter().all(|token| tokens[..there].binary_search(token).is_ok()), "{wanted:?}");
            }
        }
    }

    #[test]
    fn the_sum_of_exponentials_is_right_where_errors_would_raise_it() {
        if !float::is_here() {
            return;
        }
        // Logits of about 1, and errors of about a hundredth, of either sign.
        let (rows, n, k, factor) = (48, 70_000, 128, 30.0_f32);
        let bell = |count: usize, seed: u32| -> Vec<f32> {
            noise(4 * count, seed).chunks_exact(4).map(|four| four.iter().sum()).collect()
        };
        let (x, w) = (bell(rows * k, 7).iter().map(|x| x * 0.02).collect::<Vec<f32>>(), bell(n * k, 11));
        let codes: Vec<u8> = w.iter().map(|w| (w * 31.0 + 128.5) as u8).collect();
        let scales = vec![1.0 / 31.0; n];
        let packed = Weights { numbers: &codes, scales: &scales, zero_points: None, k, bits: 8, block_size: k };
        let pairs: Vec<u8> = (w.chunks_exact(2))
            .map(|pair| {
                let [low, high] = [pair[0], pair[1]].map(|w| (w * 2.5 + 8.5).clamp(0.0, 15.0) as u8);
                low | high << 4
            })
            .collect();
        let wide_scales = vec![1.0 / 2.5; n];
        let of_four = Weights { numbers: &pairs, scales: &wide_scales, zero_points: None, k, bits: 4, block_size: k };
        for table in [Table::Float(&w), Table::Packed(&packed), Table::Packed(&of_four)] {
            let is_taken = !Pass::of(table, rows, table.for_the_sum(), true).is_empty();
            let (copies, mut room) = (roughly(n, factor), Room::default());
            let mut y = vec![f32::NAN; rows * n];
            for is_known in [false, true] {
                let (wanted, operands) =
                    (LogitsRequest::TopK { k: 8, log_sum_exp: true, sparse: false }, (&x[..], table, &mut y[..]));
                // SAFETY: the features are there, and there is one thread.
                let done = unsafe { copies.multiply(wanted, &mut room, operands, [rows, n, k], &alone) };
                assert_eq!(done.ok(), Some(is_known && is_taken));
            }
            if !is_taken {
                continue;
            }
            let plain = match table {
                Table::Float(w) => {
                    let mut plain = vec![0.0; rows * n];
                    let product = float::Product::new(&x, w, &mut plain, [rows, n, k]);
                    // SAFETY: the features are there, and there is one thread.
                    unsafe { float::multiply(&product, [0..rows, 0..n]) };
                    plain
                }
                Table::Packed(w) => plain_of(&x, w, n, Purpose::Whole),
            };
            let log_sum = |results: &[f32]| results.iter().map(|&x| f64::from(x * factor).exp()).sum::<f64>().ln();
            let apart = plain.chunks(n).zip(y.chunks(n)).map(|(plain, y)| log_sum(y) - log_sum(plain));
            let apart = apart.sum::<f64>() / rows as f64;
            let squares = plain.iter().zip(&y).map(|(a, b)| f64::from(factor * (a - b)).powi(2)).sum::<f64>();
            let raised = squares / (rows * n) as f64 / 2.0;
            assert!(apart.abs() < raised / 2.0, "{apart:e}, where errors alone would make {raised:e}");
        }
    }

    #[test]
    fn the_greatest_of_few_bits_are_those_of_the_plain_product() {
        if !float::is_here() {
            return;
        }
        for (bits, block_size, symmetric, rows, n, k, count) in [
            (8, 128, true, 1, 65_600, 136_usize, 1),
            (8, 32, false, 1, 65_600, 136, 3),
            (8, 64, true, 3, 40_001, 250, 30),
            (4, 32, true, 1, 80_000, 120, 2),
            (4, 64, true, 2, 66_000, 128, 9),
            (4, 128, true, 9, 36_000, 256, 4),
        ] {
            let blocks = k.div_ceil(block_size);
            let code = |x: &f32| ((x + 1.0) * 127.9) as u8;
            let numbers: Vec<u8> = noise(n * blocks * block_size * bits / 8, 13).iter().map(code).collect();
            let scales: Vec<f32> = noise(n * blocks, 17).iter().map(|x| x.abs() * 0.01 + 0.001).collect();
            let zeros: Vec<u8> = noise(n * blocks, 19).iter().map(|x| (x * 40.0 + 128.0) as u8).collect();
            let zero_points = (!symmetric).then_some(&zeros[..]);
            let weights = Weights { numbers: &numbers, scales: &scales, zero_points, k, bits, block_size };
            let mut x = noise(rows * k, 7);
            // One activation far above the others of its row, as models have them.
            x[k / 3] = 5.0;
            let plain = plain_of(&x, &weights, n, Purpose::Scattered);

            let (copies, mut room) = (roughly(n, 1.0), Room::default());
            let mut y = vec![f32::NAN; rows * n];
            for expected in [false, true] {
                let operands = (&x[..], Table::Packed(&weights), &mut y[..]);
                let wanted = LogitsRequest::TopK { k: count, log_sum_exp: false, sparse: false };
                // SAFETY: the features are there, and the weights stay.
                let done = unsafe { copies.multiply(wanted, &mut room, operands, [rows, n, k], &alone) };
                assert_eq!(done.ok(), Some(expected), "{bits} bits, {block_size}");
            }
            for (row, (plain, y)) in plain.chunks(n).zip(y.chunks(n)).enumerate() {
                let best = |results: &[f32]| {
                    let mut order: Vec<usize> = (0..n).collect();
                    order.sort_by(|&a, &b| results[b].total_cmp(&results[a]).then(a.cmp(&b)));
                    order[..count].iter().map(|&at| (at, results[at].to_bits())).collect::<Vec<_>>()
                };
                assert_eq!(best(y), best(plain), "{bits} bits, {block_size}, {rows} rows");
                assert!(plain.iter().zip(y).filter(|(a, b)| a != b).count() > n / 2, "only roughly for most");
                // What the choice rests on: no result is further off than is held to be possible.
                let reads = Pass::of(Table::Packed(&weights), rows, count, false)[0].reads();
                // SAFETY: as above.
                let known = unsafe { copies.of(Table::Packed(&weights), reads, [n, k], &alone) };
                let known = known.ok().flatten().expect("was made for the product");
                let (length, error) = (square(&x[row * k..][..k]).sqrt(), room.rough.errors()[row]);
                for (column, (a, b)) in plain.iter().zip(y).enumerate() {
                    let of_weights = known.copy.as_ref().map_or(0.0, |copy| copy.errors[column]);
                    let possible = known.lengths[column] * (error + 1e-3) + of_weights * (length + error);
                    assert!((a - b).abs() <= possible, "{bits} bits, {block_size}: {a} and {b}, {possible}");
                }
            }
            // Of a row with what is not finite nothing is: that is for the plain product to tell.
            x[0] = f32::INFINITY;
            let operands = (&x[..], Table::Packed(&weights), &mut y[..]);
            let wanted = LogitsRequest::TopK { k: count, log_sum_exp: false, sparse: false };
            // SAFETY: as above.
            let done = unsafe { copies.multiply(wanted, &mut room, operands, [rows, n, k], &alone) };
            assert_eq!(done.ok(), Some(false), "{bits} bits, {block_size}");
            // Nor is another matrix than the head looked at, however large.
            let (copies, x) = (Copies::new(n + 1, 1.0), noise(rows * k, 7));
            for _ in 0..3 {
                let operands = (&x[..], Table::Packed(&weights), &mut y[..]);
                // SAFETY: as above.
                let done = unsafe { copies.multiply(wanted, &mut room, operands, [rows, n, k], &alone) };
                assert_eq!(done.ok(), Some(false));
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
        let (copies, mut room) = (Copies::new(n, 1.0), Room::default());
        let wanted = LogitsRequest::TopK { k: 1, log_sum_exp: false, sparse: false };
        let mut y = vec![0.0; n];
        for _ in 0..TOO_BLUNT + 3 {
            let operands = (&x[..], Table::Float(&w), &mut y[..]);
            // SAFETY: the features are there, and there is one thread.
            let done = unsafe { copies.multiply(wanted, &mut room, operands, [1, n, k], &alone) };
            // Too many to be worth it: the caller has to compute all.
            assert_eq!(done.ok(), Some(false));
        }
    }
}
