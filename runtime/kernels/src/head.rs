//! The output head when only the top k logits matter: a coarse pass over all rows, then exact results for those that
//! may be in the top k.
//!
//! # Design
//! How coarse the first pass is depends on the request and the number of rows, see [`CoarsePass`]: fewer bits mean
//! fewer bytes to read, and more rows to compute exactly.
//!
//! A coarse result is off by at most `‖w − ŵ‖·‖x‖ + ‖w‖·‖x − x̂‖` (Cauchy and Schwarz), where `ŵ` and `x̂` are what `w`
//! and `x` were quantized to; the norms of the rows are kept. A row whose result cannot reach the `k`-th greatest lower
//! bound, even so, is not in the top k; every other is computed exactly. So the top k are those of the exact product,
//! and proven to be, whatever the weights. With 4 bits, lower bounds are low: there the rows that look greatest are
//! computed exactly first, and the `k`-th greatest of these is the limit.
//!
//! Where the log-sum-exp counts too, a few hundred of the greatest are computed exactly; the coarse results have errors
//! of either sign, and are lowered by what these add to the sum on average. For float32 weights this pass has
//! activations of 16 bits, so that only the errors of the weights' copy are left; for quantized weights, which are no
//! more exact themselves, activations of 8 bits where the processor multiplies these as fast.
//!
//! Copies and norms are made when they would be used for the second time, so that a short call does not wait for them.
//!
//! Where the processor multiplies as fast as the memory delivers, all results are computed exactly: see
//! [`single_pass`].

mod bounds;
mod exact;
mod pass;
mod prepared;
mod scratch;
mod single_pass;
mod two_pass;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::isa::Avx2Token;
use crate::log_softmax::LogSumExp;
use crate::logits::LogitsRequest;
use crate::matmul::Shape;
use crate::matmul::quantized::{self, Weights};
use crate::parallel::ParallelFor;
use crate::stats::Softcap;
use pass::{CoarsePass, PassWeights};
use prepared::Prepared;
pub use scratch::Scratch;
use single_pass::SinglePass;
use two_pass::TwoPass;

/// Matrices of fewer weights are not worth a coarse pass.
const LARGE: usize = 8 << 20;
/// With more rows of activations, the products themselves keep the processor busy.
const MOST_ROWS: usize = 64;
/// Adjacent results that share bounds.
const CHUNK: usize = 32;
/// How many results, at least, tell how great the greatest are.
const TRIED: usize = 16;
/// Number of 4-bit passes with too many exact results after which no more are tried.
const MOST_INT4_MISSES: u32 = 8;

/// The weights of a head, `[n, k]`.
#[derive(Clone, Copy)]
pub enum HeadWeights<'w> {
    Float(&'w [f32]),
    Quantized(&'w Weights<'w>),
}

impl HeadWeights<'_> {
    /// Minimum number of top results to compute exactly for a log-sum-exp: quantized weights have larger errors anyway.
    fn least_for_log_sum_exp(&self) -> usize {
        match self {
            HeadWeights::Float(_) => 256,
            HeadWeights::Quantized(_) => 64,
        }
    }
}

/// A multiplication with the head, and the requested results.
#[derive(Clone, Copy)]
pub struct HeadCall<'c> {
    pub request: LogitsRequest,
    /// `[rows, k]`
    pub x: &'c [f32],
    pub w: HeadWeights<'c>,
    pub shape: Shape,
    pub parallel_for: ParallelFor<'c>,
}

/// Rows of the logits that were computed exactly, the top k among them.
pub struct SparseRows {
    /// `[rows, width]`: the columns, ascending, padded with
    /// [`LogitsStats::NO_TOKEN`](crate::logits::LogitsStats::NO_TOKEN).
    pub tokens: Vec<u32>,
    pub width: usize,
    /// `[rows, width]`: their results, padded with −∞.
    pub results: Vec<f32>,
    /// `[rows]`: zeros if they were not requested.
    pub log_sum_exps: Vec<LogSumExp>,
}

/// The head of a model, for all of its sessions.
///
/// Prepared weights are found again by their address: as long as a `TopKHead` lives, an address must
/// stand for the same weights. It lives in the model, whose weights are mapped for as long.
pub struct TopKHead {
    token: Avx2Token,
    /// Rows of the head. Other matrices are computed in full, however large they are.
    vocab_size: usize,
    /// The approximate factor from results to logits.
    factor: f32,
    /// Weights of a matrix that is worth a coarse pass.
    large: usize,
    /// Whether all results may be computed exactly where that takes no longer.
    allows_single_pass: bool,
    prepared: Mutex<HashMap<WeightsKey, Preparation>>,
}

/// The key of a preparation.
#[derive(PartialEq, Eq, Hash)]
struct WeightsKey {
    address: usize,
    length: usize,
    pass_weights: PassWeights,
}

impl WeightsKey {
    fn of(w: HeadWeights, pass_weights: PassWeights) -> WeightsKey {
        let (address, length) = match w {
            HeadWeights::Float(w) => (w.as_ptr() as usize, w.len()),
            HeadWeights::Quantized(w) => (w.codes.as_ptr() as usize, w.codes.len()),
        };
        WeightsKey { address, length, pass_weights }
    }
}

/// How far weights have been prepared.
enum Preparation {
    /// Nothing: they were used once.
    UsedOnce,
    Ready(Arc<Prepared>),
}

/// A request for the top k that two passes are worth while for.
#[derive(Clone, Copy)]
struct TopK {
    k: usize,
    log_sum_exp: bool,
}

impl TopKHead {
    /// A head of `vocab_size` rows, whose results times about `factor` are the logits.
    pub fn new(token: Avx2Token, vocab_size: usize, factor: f32) -> TopKHead {
        TopKHead { token, vocab_size, factor, large: LARGE, allows_single_pass: true, prepared: Mutex::default() }
    }

    /// The request, if two passes are worth while.
    fn for_two_passes(&self, HeadCall { request, w, shape, .. }: HeadCall) -> Option<TopK> {
        let LogitsRequest::TopK { k, log_sum_exp, .. } = request else { return None };
        let k = if log_sum_exp { k.max(w.least_for_log_sum_exp()) } else { k };
        // Limits are taken from the bounds of chunks, of which there must be as many as results.
        let pays = self.is_head(shape) && shape.rows <= MOST_ROWS && k.max(TRIED) <= shape.n / CHUNK;
        pays.then_some(TopK { k, log_sum_exp })
    }

    /// Whether a matrix of this shape is the head, and large enough.
    pub fn is_head(&self, Shape { n, k, .. }: Shape) -> bool {
        n == self.vocab_size && n * k >= self.large
    }

    /// The weights and k, if all results are to be computed exactly however few are requested.
    fn for_single_pass<'c>(
        &self,
        HeadCall { request, w, shape, .. }: HeadCall<'c>,
    ) -> Option<(&'c Weights<'c>, usize)> {
        let (HeadWeights::Quantized(w), LogitsRequest::TopK { k, .. }) = (w, request) else { return None };
        let pays = self.allows_single_pass
            && self.is_head(shape)
            && single_pass::is_sparse(k, shape.n)
            && quantized::is_memory_bound(shape.rows, w);
        pays.then_some((w, k))
    }

    /// Whether to try [`TopKHead::sparse_rows`]; if the head is not yet prepared, [`TopKHead::multiply`] prepares it.
    pub fn may_be_sparse(&self, call: HeadCall) -> bool {
        if self.for_single_pass(call).is_some() {
            return true;
        }
        let Some(top_k) = self.for_two_passes(call) else { return false };
        let Some(pass) = CoarsePass::candidates(call.w, call.shape.rows, top_k).first() else { return false };
        let prepared = self.prepared.try_lock();
        prepared.is_ok_and(|prepared| {
            matches!(prepared.get(&WeightsKey::of(call.w, pass.weights())), Some(Preparation::Ready(_)))
        })
    }

    /// The exact results, the top k among them; `None` if that would have been too many.
    pub fn sparse_rows(
        &self,
        call: HeadCall,
        softcap: &Softcap,
        scratch: &mut Scratch,
    ) -> Result<Option<SparseRows>, Error> {
        let LogitsRequest::TopK { log_sum_exp, .. } = call.request else { return Ok(None) };
        let softcap = log_sum_exp.then_some(softcap);
        if let Some((w, k)) = self.for_single_pass(call) {
            let HeadCall { x, shape, parallel_for, .. } = call;
            let single_pass = SinglePass { token: self.token, x, w, shape, k, softcap, parallel_for };
            return single_pass.sparse_rows(&mut scratch.single_pass);
        }
        let Shape { rows, n, .. } = call.shape;
        let mut results = std::mem::take(&mut scratch.results);
        results.resize(rows * n, 0.0);
        let is_done = self.multiply(call, scratch, &mut results);
        scratch.results = results;
        if !is_done? {
            return Ok(None);
        }
        let log_sum_exps = match softcap {
            Some(softcap) => softcap.log_sum_exps(&scratch.results, n, call.parallel_for)?,
            None => vec![LogSumExp::ZERO; rows],
        };
        let (tokens, width) = scratch.exact_columns(rows);
        let mut results = Vec::with_capacity(tokens.len());
        for (tokens, of_row) in tokens.chunks_exact(width).zip(scratch.results.chunks_exact(n)) {
            let result = |&token: &u32| of_row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
            results.extend(tokens.iter().map(result));
        }
        Ok(Some(SparseRows { tokens, width, results, log_sum_exps }))
    }

    /// Computes `y [rows, n] = x · wᵀ` as far as is requested, and returns whether it did: otherwise all of it has to
    /// be computed.
    pub fn multiply(&self, call: HeadCall, scratch: &mut Scratch, y: &mut [f32]) -> Result<bool, Error> {
        let Some(top_k) = self.for_two_passes(call) else { return Ok(false) };
        if self.for_single_pass(call).is_some() {
            return Ok(false);
        }
        for &pass in CoarsePass::candidates(call.w, call.shape.rows, top_k) {
            let Some(prepared) = self.prepared(call, pass.weights())? else { return Ok(false) };
            if pass == CoarsePass::Int4 && prepared.int4_misses() >= MOST_INT4_MISSES {
                continue;
            }
            let two_pass = TwoPass { token: self.token, prepared: &prepared, pass, k: top_k.k, factor: self.factor };
            if two_pass.multiply(call, scratch, y)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The prepared weights; `None` at their first use, or while another session prepares them.
    fn prepared(&self, call: HeadCall, pass_weights: PassWeights) -> Result<Option<Arc<Prepared>>, Error> {
        let Ok(mut all) = self.prepared.try_lock() else { return Ok(None) };
        let key = WeightsKey::of(call.w, pass_weights);
        match all.get(&key) {
            Some(Preparation::Ready(prepared)) => Ok(Some(prepared.clone())),
            None => {
                all.insert(key, Preparation::UsedOnce);
                Ok(None)
            }
            Some(Preparation::UsedOnce) => {
                let prepared = Prepared::new(self.token, call.w, pass_weights, call.shape, call.parallel_for)?;
                let prepared = Arc::new(prepared);
                all.insert(key, Preparation::Ready(prepared.clone()));
                Ok(Some(prepared))
            }
        }
    }
}

/// The `k`-th greatest of the values, which are reordered.
fn kth_greatest(k: usize, values: &mut [f32]) -> f32 {
    *values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::logits::LogitsStats;
    use crate::matmul::quantized::{Activations, Columns, Format};
    use crate::matmul::{Output, float};
    use crate::noise::long_tailed_noise;
    use crate::parallel::{SharedSlice, sequential};

    fn token() -> Avx2Token {
        Avx2Token::new().expect("the level has AVX2")
    }

    /// A head that is always computed in two passes.
    fn two_pass_head(vocab_size: usize, factor: f32) -> TopKHead {
        TopKHead { allows_single_pass: false, ..TopKHead::new(token(), vocab_size, factor) }
    }

    fn top_k(k: usize) -> LogitsRequest {
        LogitsRequest::TopK { k, log_sum_exp: false, sparse: false }
    }

    fn call<'c>(x: &'c [f32], w: HeadWeights<'c>, shape: Shape, k: usize) -> HeadCall<'c> {
        HeadCall { request: top_k(k), x, w, shape, parallel_for: &sequential }
    }

    /// The exact product.
    fn exact_product(x: &[f32], w: HeadWeights, shape: Shape, format: Format) -> Vec<f32> {
        let Shape { rows, n, .. } = shape;
        let mut y = vec![0.0; rows * n];
        let output = Output::new(SharedSlice::new(&mut y), rows, n);
        match w {
            HeadWeights::Float(w) => {
                let operands = float::Operands::new(x, w, output, shape);
                // SAFETY: there is one thread.
                unsafe { float::multiply(token(), &operands, 0..rows, 0..n) };
            }
            HeadWeights::Quantized(w) => {
                let mut activations = Activations::default();
                activations.quantize(x, w, format);
                // SAFETY: there is one thread.
                unsafe { quantized::multiply(&activations, w, None, 0..rows, Columns::Range(0..n), &output) };
            }
        }
        y
    }

    /// The columns of the top k in order, and the bits of their results.
    fn top_of(results: &[f32], k: usize) -> Vec<(usize, u32)> {
        let mut order: Vec<usize> = (0..results.len()).collect();
        order.sort_by(|&a, &b| results[b].total_cmp(&results[a]).then(a.cmp(&b)));
        order[..k].iter().map(|&at| (at, results[at].to_bits())).collect()
    }

    /// Checks that the tokens of sparse rows ascend, and that the top k of `results` are among them with their bits.
    fn check_sparse_rows(sparse: &SparseRows, results: &[f32], n: usize, k: usize) {
        let SparseRows { tokens, width, results: values, .. } = sparse;
        for ((tokens, values), results) in tokens.chunks(*width).zip(values.chunks(*width)).zip(results.chunks(n)) {
            let count = tokens.partition_point(|&token| token != LogitsStats::NO_TOKEN);
            assert!(tokens[..count].is_sorted_by(|a, b| a < b) && count < n / 2, "{count} of {n}");
            assert!(tokens[count..].iter().all(|&token| token == LogitsStats::NO_TOKEN));
            assert!(values[count..].iter().all(|&value| value == f32::NEG_INFINITY));
            for (&token, value) in tokens.iter().zip(&values[..count]) {
                assert_eq!(value.to_bits(), results[token as usize].to_bits(), "token {token}");
            }
            for (column, _) in top_of(results, k) {
                assert!(tokens[..count].binary_search(&(column as u32)).is_ok(), "column {column}");
            }
        }
    }

    #[test]
    fn the_top_k_are_those_of_the_exact_product() {
        at_each_level(Level::Avx2, |level| {
            let with_sum = LogitsRequest::TopK { k: 8, log_sum_exp: true, sparse: false };
            for (rows, n, k, request) in [
                (1, 65_600, 136, top_k(1)),
                (3, 40_001, 256, top_k(60)),
                (4, 40_001, 256, top_k(60)),
                (9, 40_001, 256, top_k(30)),
                (2, 70_000, 130, with_sum),
            ] {
                let case = format!("{level:?}: {rows} rows, {request:?}");
                let LogitsRequest::TopK { k: count, log_sum_exp, .. } = request else { unreachable!("see above") };
                let shape = Shape { rows, n, k };
                let (x, weights) = (long_tailed_noise(rows * k, 7), long_tailed_noise(n * k, 11));
                let w = HeadWeights::Float(&weights);
                let exact = exact_product(&x, w, shape, Format::Int16);

                let (head, mut scratch) = (two_pass_head(n, 1.0), Scratch::default());
                let mut y = vec![f32::NAN; rows * n];
                for (request, expected) in [(request, false), (LogitsRequest::All, false), (request, true)] {
                    let call = HeadCall { request, x: &x, w, shape, parallel_for: &sequential };
                    assert_eq!(head.multiply(call, &mut scratch, &mut y), Ok(expected), "{case}");
                }
                for (exact, y) in exact.chunks(n).zip(y.chunks(n)) {
                    // Many rows are summed up in another order where they are computed all at once.
                    let top = |results: &[f32]| -> Vec<(usize, u32)> {
                        let bits = |bits| if rows > exact::ROWS_TOGETHER { 0 } else { bits };
                        top_of(results, count).into_iter().map(|(at, of)| (at, bits(of))).collect()
                    };
                    assert_eq!(top(y), top(exact), "{case}");
                    let log_sum = |results: &[f32]| results.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                    let apart = (log_sum(y) - log_sum(exact)).abs();
                    assert!(exact.iter().zip(y).filter(|(a, b)| a != b).count() > n / 2, "{case}: mostly coarse");
                    assert!(!log_sum_exp || apart < 1e-5, "{case}: {apart}");
                }
                let call = HeadCall { request, x: &x, w, shape, parallel_for: &sequential };
                assert!(head.may_be_sparse(call));
                let sparse = head.sparse_rows(call, &Softcap::new(n, None), &mut scratch);
                check_sparse_rows(&sparse.expect("it runs").expect("sparse rows"), &y, n, count);
            }
        });
    }

    /// Small enough for Miri.
    #[test]
    fn small_heads_are_computed_in_every_pass() {
        at_each_level(Level::Avx2, |level| {
            let (n, k) = (520, 64);
            let weights = long_tailed_noise(n * k, 11);
            let codes: Vec<u8> = weights.iter().map(|w| (w * 100.0 + 128.0) as u8).collect();
            let scales = vec![0.01; n];
            let of_int8 = Weights { codes: &codes, scales: &scales, zero_points: None, k, bits: 8, block_size: 64 };
            for (rows, count) in [(1, 1), (5, 2)] {
                let (x, shape) = (long_tailed_noise(rows * k, 7), Shape { rows, n, k });
                for w in [HeadWeights::Float(&weights), HeadWeights::Quantized(&of_int8)] {
                    let head = TopKHead { large: 0, ..two_pass_head(n, 1.0) };
                    let (mut scratch, mut y) = (Scratch::default(), vec![f32::NAN; rows * n]);
                    for expected in [false, true] {
                        let call = call(&x, w, shape, count);
                        assert_eq!(head.multiply(call, &mut scratch, &mut y), Ok(expected), "{level:?}, {rows} rows");
                    }
                    let exact = exact_product(&x, w, shape, Format::Int16Listed);
                    for (exact, y) in exact.chunks(n).zip(y.chunks(n)) {
                        let columns = |results| top_of(results, count).into_iter().map(|(at, _)| at);
                        assert!(columns(y).eq(columns(exact)), "{level:?}, {rows} rows");
                    }
                }
            }
        });
    }

    #[test]
    fn the_log_sum_exp_is_right_where_errors_would_raise_it() {
        at_each_level(Level::Avx2, |level| {
            // Logits of about 1, and errors of about a hundredth, of either sign.
            let (rows, n, k, factor) = (48, 70_000, 128, 30.0_f32);
            let shape = Shape { rows, n, k };
            let bell = |count: usize, seed: u32| -> Vec<f32> {
                long_tailed_noise(4 * count, seed).chunks_exact(4).map(|four| four.iter().sum()).collect()
            };
            let (x, w) = (bell(rows * k, 7).iter().map(|x| x * 0.02).collect::<Vec<f32>>(), bell(n * k, 11));
            let codes: Vec<u8> = w.iter().map(|w| (w * 31.0 + 128.5) as u8).collect();
            let pairs: Vec<u8> = (w.chunks_exact(2))
                .map(|pair| {
                    let [low, high] = [pair[0], pair[1]].map(|w| (w * 2.5 + 8.5).clamp(0.0, 15.0) as u8);
                    low | high << 4
                })
                .collect();
            let (scales, int4_scales) = (vec![1.0 / 31.0; n], vec![1.0 / 2.5; n]);
            let of = |codes, scales, bits| Weights { codes, scales, zero_points: None, k, bits, block_size: k };
            let (int8, int4) = (of(&codes, &scales, 8), of(&pairs, &int4_scales, 4));
            for w in [HeadWeights::Float(&w), HeadWeights::Quantized(&int8), HeadWeights::Quantized(&int4)] {
                let is_supported =
                    !CoarsePass::candidates(w, rows, TopK { k: w.least_for_log_sum_exp(), log_sum_exp: true })
                        .is_empty();
                let (head, mut scratch) = (two_pass_head(n, factor), Scratch::default());
                let mut y = vec![f32::NAN; rows * n];
                for is_prepared in [false, true] {
                    let request = LogitsRequest::TopK { k: 8, log_sum_exp: true, sparse: false };
                    let call = HeadCall { request, x: &x, w, shape, parallel_for: &sequential };
                    assert_eq!(head.multiply(call, &mut scratch, &mut y), Ok(is_prepared && is_supported), "{level:?}");
                }
                if !is_supported {
                    continue;
                }
                let exact = exact_product(&x, w, shape, Format::Int16);
                let log_sum = |results: &[f32]| results.iter().map(|&x| f64::from(x * factor).exp()).sum::<f64>().ln();
                let apart = exact.chunks(n).zip(y.chunks(n)).map(|(exact, y)| log_sum(y) - log_sum(exact));
                let apart = apart.sum::<f64>() / rows as f64;
                let squares = exact.iter().zip(&y).map(|(a, b)| f64::from(factor * (a - b)).powi(2)).sum::<f64>();
                let raised = squares / (rows * n) as f64 / 2.0;
                assert!(apart.abs() < raised / 2.0, "{level:?}: {apart:e}; errors alone would make {raised:e}");
            }
        });
    }

    #[test]
    fn the_top_k_of_quantized_weights_are_those_of_the_exact_product() {
        at_each_level(Level::Avx2, |level| {
            for (bits, block_size, symmetric, rows, n, k, count) in [
                (8, 128, true, 1, 65_600, 136_usize, 1),
                (8, 32, false, 1, 65_600, 136, 3),
                (8, 64, true, 3, 40_001, 250, 30),
                (4, 32, true, 1, 80_000, 120, 2),
                (4, 64, true, 2, 66_000, 128, 9),
                (4, 128, true, 9, 36_000, 256, 4),
            ] {
                let case = format!("{level:?}: {bits} bits, {block_size}, {rows} rows");
                let shape = Shape { rows, n, k };
                let blocks = k.div_ceil(block_size);
                let code = |x: &f32| ((x + 1.0) * 127.9) as u8;
                let codes: Vec<u8> =
                    long_tailed_noise(n * blocks * block_size * bits / 8, 13).iter().map(code).collect();
                let scales: Vec<f32> =
                    long_tailed_noise(n * blocks, 17).iter().map(|x| x.abs() * 0.01 + 0.001).collect();
                let zeros: Vec<u8> =
                    long_tailed_noise(n * blocks, 19).iter().map(|x| (x * 40.0 + 128.0) as u8).collect();
                let zero_points = (!symmetric).then_some(&zeros[..]);
                let weights = Weights { codes: &codes, scales: &scales, zero_points, k, bits, block_size };
                let w = HeadWeights::Quantized(&weights);
                let mut x = long_tailed_noise(rows * k, 7);
                // One activation far above the others of its row, as models have them.
                x[k / 3] = 5.0;
                let exact = exact_product(&x, w, shape, Format::Int16Listed);

                let (head, mut scratch) = (two_pass_head(n, 1.0), Scratch::default());
                let mut y = vec![f32::NAN; rows * n];
                for expected in [false, true] {
                    assert_eq!(head.multiply(call(&x, w, shape, count), &mut scratch, &mut y), Ok(expected), "{case}");
                }
                for (row, (exact, y)) in exact.chunks(n).zip(y.chunks(n)).enumerate() {
                    assert_eq!(top_of(y, count), top_of(exact, count), "{case}");
                    assert!(exact.iter().zip(y).filter(|(a, b)| a != b).count() > n / 2, "{case}: mostly coarse");
                    // The premise of the proof: no result exceeds its error bound.
                    let pass_weights =
                        CoarsePass::candidates(w, rows, TopK { k: count, log_sum_exp: false })[0].weights();
                    let prepared =
                        head.prepared(call(&x, w, shape, count), pass_weights).ok().flatten().expect("it was prepared");
                    let norm = x[row * k..][..k].iter().map(|x| x * x).sum::<f32>().sqrt();
                    let error = scratch.coarse.errors()[row];
                    for (column, (a, b)) in exact.iter().zip(y).enumerate() {
                        let weights_error = prepared.copy.as_ref().map_or(0.0, |copy| copy.errors[column]);
                        let possible = prepared.norms[column] * (error + 1e-3) + weights_error * (norm + error);
                        assert!((a - b).abs() <= possible, "{case}: {a} and {b}, {possible}");
                    }
                }
                // A row with infinity has no finite result: the caller computes all.
                x[0] = f32::INFINITY;
                assert_eq!(head.multiply(call(&x, w, shape, count), &mut scratch, &mut y), Ok(false), "{case}");
                // Another matrix than the head is never prepared, however large.
                let (head, x) = (TopKHead::new(token(), n + 1, 1.0), long_tailed_noise(rows * k, 7));
                for _ in 0..3 {
                    assert_eq!(head.multiply(call(&x, w, shape, count), &mut scratch, &mut y), Ok(false), "{case}");
                }
            }
        });
    }

    #[test]
    fn results_that_cannot_be_told_apart_are_left_to_the_caller() {
        at_each_level(Level::Avx2, |_| {
            // All rows but one are the same, and that one is greater by less than 8 bits can tell.
            let (n, k) = (65_536, 128);
            let mut w: Vec<f32> = long_tailed_noise(k, 3).into_iter().cycle().take(n * k).collect();
            let x = long_tailed_noise(k, 5);
            let at = (0..k).max_by(|&a, &b| x[a].abs().total_cmp(&x[b].abs())).unwrap_or(0);
            w[40_000 * k + at] += 1e-4 * x[at].signum();
            let (head, mut scratch) = (TopKHead::new(token(), n, 1.0), Scratch::default());
            let mut y = vec![0.0; n];
            for _ in 0..MOST_INT4_MISSES + 3 {
                let call = call(&x, HeadWeights::Float(&w), Shape { rows: 1, n, k }, 1);
                assert_eq!(head.multiply(call, &mut scratch, &mut y), Ok(false));
            }
        });
    }

    #[test]
    fn a_single_pass_finds_the_top_k_of_the_exact_product() {
        at_each_level(Level::Avx2, |level| {
            for (bits, block_size, rows, n, k, count) in [
                (8, 128, 3, 65_600, 136_usize, 1),
                (8, 64, 33, 33_001, 250, 8),
                (4, 128, 9, 36_000, 256, 9),
                (8, 64, 2, 33_000, 64, 17),
            ] {
                let case = format!("{level:?}: {bits} bits, {block_size}, {rows} rows");
                let shape = Shape { rows, n, k };
                let blocks = k.div_ceil(block_size);
                let codes = long_tailed_noise(n * blocks * block_size * bits / 8, 13);
                let codes: Vec<u8> = codes.iter().map(|x| ((x + 1.0) * 127.9) as u8).collect();
                let scales: Vec<f32> =
                    long_tailed_noise(n * blocks, 17).iter().map(|x| x.abs() * 0.01 + 0.001).collect();
                let w = Weights { codes: &codes, scales: &scales, zero_points: None, k, bits, block_size };
                let mut x = long_tailed_noise(rows * k, 7);
                let exact = exact_product(&x, HeadWeights::Quantized(&w), shape, Format::Int16);
                let (softcap, mut scratch) = (Softcap::new(n, Some(30.0)), single_pass::Scratch::default());
                let mut sparse_rows = |x: &[f32], softcap| {
                    let single_pass =
                        SinglePass { token: token(), x, w: &w, shape, k: count, softcap, parallel_for: &sequential };
                    single_pass.sparse_rows(&mut scratch).expect("it runs")
                };
                for softcap in [Some(&softcap), None, Some(&softcap)] {
                    let sparse = sparse_rows(&x, softcap).expect("sparse rows");
                    assert!(sparse.width >= count && sparse.width < n / 8, "{case}: {} of {n}", sparse.width);
                    check_sparse_rows(&sparse, &exact, n, count);
                    for (row, exact) in exact.chunks(n).enumerate().filter(|_| softcap.is_some()) {
                        let logits = exact.iter().map(|&x| 30.0 * f64::from(x).tanh());
                        let greatest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
                        let sum = logits.map(|logit| (logit - greatest).exp()).sum::<f64>().ln();
                        let LogSumExp { max, log_sum } = sparse.log_sum_exps[row];
                        let apart = (f64::from(max) - greatest).abs() + (f64::from(log_sum) - sum).abs();
                        assert!(apart < 1e-4, "{case}, {row}: {max} for {greatest}, {log_sum} for {sum}");
                    }
                }
                // NaN, or results that are all the same, are left to the caller.
                x[..k].fill(0.0);
                assert!(sparse_rows(&x, None).is_none(), "{case}");
                x[0] = f32::NAN;
                assert!(sparse_rows(&x, None).is_none(), "{case}");
            }
        });
    }
}
