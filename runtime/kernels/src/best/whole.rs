//! The product with the head in full, of which only what is among the greatest leaves the cache. Where the processor multiplies as fast
//! as the memory sends, nothing is won by computing results roughly first.
//!
//! # Design
//! A thread takes some columns at a time, and what is wanted of their results is found while they are in its cache: written to memory and
//! read again they would take as long as the weights. Which are among the greatest is not known before the end; but the `m`-th greatest
//! of the columns so far is a limit that no other one of the `m` greatest is below. It is found anew after a few columns, four times as
//! many, and so on, so that what is kept is little.

use std::arch::x86_64::*;
use std::sync::Mutex;

use super::super::product::{self, Activations, Columns, Output, Purpose, Weights};
use super::super::tanh::{Share, Told};
use super::super::{Parts, Spread};
use super::{CHUNK, List, greatest, held};
use crate::aligned::Aligned;
use crate::log_softmax::LogSumExp;
use crate::logits::LogitsStats;

/// Results of all rows that a thread computes at a time: a part of its second cache.
const AT_A_TIME: usize = 16 << 10;
/// The columns at first, at least, for each of the results that are wanted.
const FIRST: usize = 4 * CHUNK;
/// By so much the columns become more from one time to the next.
const GROWTH: usize = 4;
/// No more than this part of the columns is worth a list.
const LISTED: usize = 8;

/// Kept for its allocations.
#[derive(Default)]
pub(in super::super) struct Room {
    activations: Activations,
    /// By shares of the columns.
    kept: Vec<Mutex<Vec<Kept>>>,
    /// `[rows, columns]` of a share; one for each thread that asked for it.
    results: Mutex<Vec<Aligned<f32>>>,
}

/// Results of a row, of which one at least may be among the greatest.
struct Kept {
    row: usize,
    /// The first one's column.
    column: usize,
    /// −∞ for those that are not there.
    results: [f32; CHUNK],
}

/// Whether there are columns enough for the greatest so many to be worth a list.
pub(super) fn lists(count: usize, n: usize) -> bool {
    count * FIRST <= n / LISTED
}

/// Lists the greatest `count` results, at least, of each row of `x · wᵀ`, with the norms of all results if there is someone to tell them;
/// nothing if those were too many.
///
/// # Safety
/// The processor has AVX2 and FMA.
pub(in super::super) unsafe fn list(
    (count, told): (usize, Option<&Told>),
    room: &mut Room,
    (x, w): (&[f32], &Weights),
    [rows, n, _]: [usize; 3],
    spread: Spread,
) -> ort::Result<Option<List>> {
    let Room { activations, kept, results } = room;
    activations.round(x, w, Purpose::Whole);
    let (activations, results) = (&*activations, &*results);
    let share = share(rows);
    let shares = n.div_ceil(share);
    kept.resize_with(shares, Mutex::default);
    let mut sums = vec![Share::default(); if told.is_some() { rows * shares } else { 0 }];
    let of_sums = Parts::new(&mut sums);
    let mut limits = vec![f32::NEG_INFINITY; rows];
    // The greatest result of each chunk that reached the limit so far.
    let mut reaching = vec![Vec::new(); rows];
    let (mut done, mut next) = (0, (count * FIRST).div_ceil(share).clamp(1, shares));
    while done < shares {
        spread(next - done, &|part| {
            let part = done + part;
            let columns = part * share..n.min((part + 1) * share);
            let mut room = held(results).pop().unwrap_or_default();
            room.resize(rows * share, 0.0);
            let here = &mut room[..rows * columns.len()];
            let output = Output::new(here, rows, columns.len());
            let all = (0..rows, Columns::All(0..columns.len()));
            // SAFETY: every share has its own room.
            unsafe { product::multiply(activations, &w.rows(columns.clone()), None, all, &output) };
            let kept = &mut *held(&kept[part]);
            kept.clear();
            for (row, results) in here.chunks_exact(columns.len()).enumerate() {
                // SAFETY: the features are the caller's.
                unsafe { keep(row, columns.start, results, limits[row], kept) };
                if let Some(told) = told {
                    let at = row * shares + part;
                    // SAFETY: every place is written by one call only.
                    unsafe { of_sums.of(at..at + 1)[0] = told.part(results) };
                }
            }
            held(results).push(room);
        })?;
        for part in &kept[done..next] {
            for Kept { row, results, .. } in &*held(part) {
                reaching[*row].push(results.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
        for (limit, reaching) in limits.iter_mut().zip(&mut reaching) {
            // In each of so many chunks there is a result as great.
            if reaching.len() >= count {
                *limit = greatest(count, reaching);
                reaching.retain(|result| result >= limit);
            }
        }
        if kept[done..next].iter().map(|part| held(part).len()).sum::<usize>() * CHUNK > (rows * n).div_ceil(LISTED) {
            return Ok(None);
        }
        (done, next) = (next, shares.min(next * GROWTH));
    }
    let norms = match told {
        Some(told) => sums.chunks_exact(shares).map(|sums| told.norm(sums)).collect(),
        None => vec![LogSumExp::ZERO; rows],
    };
    Ok(listed(kept, &limits, norms, n))
}

/// Columns that a thread takes at a time of so many rows: whole chunks, whose lines of all rows do not meet in the same places of the
/// first cache.
fn share(rows: usize) -> usize {
    (AT_A_TIME / rows / CHUNK).clamp(2, 32).next_multiple_of(2).saturating_sub(1) * CHUNK
}

/// Keeps the chunks of which a result is not less than the limit.
#[target_feature(enable = "avx2,fma")]
fn keep(row: usize, first: usize, results: &[f32], limit: f32, kept: &mut Vec<Kept>) {
    let limit = _mm256_set1_ps(limit);
    for (at, results) in results.chunks(CHUNK).enumerate() {
        let mut here = [f32::NEG_INFINITY; CHUNK];
        here[..results.len()].copy_from_slice(results);
        let mut there = 0;
        for eight in 0..CHUNK / 8 {
            // SAFETY: eight numbers.
            let eight = unsafe { _mm256_loadu_ps(here.as_ptr().add(eight * 8)) };
            // Not less: what is not a number reaches everything.
            there |= _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(eight, limit));
        }
        if there != 0 {
            kept.push(Kept { row, column: first + at * CHUNK, results: here });
        }
    }
}

/// The results of each row that are not less than its limit; nothing if they are too many.
fn listed(kept: &[Mutex<Vec<Kept>>], limits: &[f32], norms: Vec<LogSumExp>, n: usize) -> Option<List> {
    let mut of_rows = vec![Vec::new(); limits.len()];
    for part in kept {
        for Kept { row, column, results } in &*held(part) {
            let columns = *column..n.min(column + CHUNK);
            for (column, &result) in columns.zip(results) {
                // What is not a number reaches everything.
                if result >= limits[*row] || result.is_nan() {
                    of_rows[*row].push((column as u32, result));
                }
            }
        }
    }
    let width = of_rows.iter().map(Vec::len).max().unwrap_or(0);
    if width > n / LISTED {
        return None;
    }
    of_rows.iter_mut().for_each(|row| row.resize(width, (LogitsStats::NO_TOKEN, f32::NEG_INFINITY)));
    let (tokens, results) = of_rows.into_iter().flatten().unzip();
    Some(List { tokens, width, results, norms })
}

#[cfg(test)]
mod tests {
    use super::super::super::{alone, float};
    use super::super::tests::{noise, plain_of};
    use super::*;

    #[test]
    fn what_is_listed_are_the_greatest_of_the_plain_product() {
        if !float::is_here() {
            return;
        }
        for (bits, block_size, rows, n, k, count) in [
            (8, 128, 3, 65_600, 136_usize, 1),
            (8, 64, 33, 33_001, 250, 8),
            (4, 128, 9, 36_000, 256, 9),
            (8, 64, 2, 33_000, 64, 17),
        ] {
            let blocks = k.div_ceil(block_size);
            let numbers: Vec<u8> =
                noise(n * blocks * block_size * bits / 8, 13).iter().map(|x| ((x + 1.0) * 127.9) as u8).collect();
            let scales: Vec<f32> = noise(n * blocks, 17).iter().map(|x| x.abs() * 0.01 + 0.001).collect();
            let weights = Weights { numbers: &numbers, scales: &scales, zero_points: None, k, bits, block_size };
            let mut x = noise(rows * k, 7);
            let plain = plain_of(&x, &weights, n, Purpose::Whole);
            let (told, mut room) = (Told::new(n, Some(30.0)), Room::default());
            let mut list = |x: &[f32], told| {
                // SAFETY: the features are there.
                unsafe { list((count, told), &mut room, (x, &weights), [rows, n, k], &alone) }
            };
            for told in [Some(&told), None, Some(&told)] {
                let Ok(Some(List { tokens, width, results, norms })) = list(&x, told) else { panic!("no list") };
                assert!(width >= count && width < n / LISTED, "{width} of {n}");
                for (row, plain) in plain.chunks(n).enumerate() {
                    let (tokens, results) = (&tokens[row * width..][..width], &results[row * width..][..width]);
                    let there = tokens.partition_point(|&token| token != LogitsStats::NO_TOKEN);
                    assert!(tokens[..there].is_sorted_by(|a, b| a < b));
                    assert!(results[there..].iter().all(|&result| result == f32::NEG_INFINITY));
                    for (&token, result) in tokens[..there].iter().zip(results) {
                        assert_eq!(result.to_bits(), plain[token as usize].to_bits(), "{rows} rows, {row}");
                    }
                    let mut order: Vec<u32> = (0..n as u32).collect();
                    order.sort_by(|&a, &b| plain[b as usize].total_cmp(&plain[a as usize]));
                    assert!(order[..count].iter().all(|token| tokens[..there].binary_search(token).is_ok()));
                    if told.is_some() {
                        let logits = plain.iter().map(|&x| 30.0 * f64::from(x).tanh());
                        let greatest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
                        let sum = logits.map(|logit| (logit - greatest).exp()).sum::<f64>().ln();
                        let LogSumExp { max, log_sum } = norms[row];
                        let (max, log_sum) = (f64::from(max), f64::from(log_sum));
                        let apart = (max - greatest).abs() + (log_sum - sum).abs();
                        assert!(apart < 1e-4, "{rows} rows, {row}: {max} for {greatest}, {log_sum} for {sum}");
                    }
                }
            }
            // What is not finite, or all the same, is for the plain product.
            x[..k].fill(0.0);
            assert!(matches!(list(&x, None), Ok(None)));
            x[0] = f32::NAN;
            assert!(matches!(list(&x, None), Ok(None)));
        }
    }
}
