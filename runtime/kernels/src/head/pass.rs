//! `CoarsePass`: how the first of two passes is computed.

use super::HeadWeights;
use crate::matmul::quantized::coarse;

/// The most results that a pass in 4 bits is for.
const FEW_RESULTS: usize = 8;

/// The number formats of a coarse pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CoarsePass {
    /// A 4-bit copy of weights with more bits, and activations of 8.
    Int4,
    /// 8-bit weights, copied from float32, or quantized weights as they are; activations of 6 bits, which halves the
    /// work.
    Int8,
    /// For a log-sum-exp: an 8-bit copy of float32 weights, and activations of 16 bits.
    LogSumExpInt16,
    /// For a log-sum-exp: quantized weights as they are, and activations of 8 bits.
    LogSumExpInt8,
}

/// What a coarse pass reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PassWeights {
    Int4Copy,
    /// A copy of float32 weights; quantized weights as they are.
    Int8,
}

impl CoarsePass {
    /// The passes to try one after the other, the fastest first.
    pub fn candidates(w: HeadWeights, rows: usize, k: usize, log_sum_exp: bool) -> &'static [CoarsePass] {
        // A single row waits for the memory; more rows, and more results of each, leave more to be computed exactly.
        let are_few = rows == 1 && k <= FEW_RESULTS;
        match w {
            HeadWeights::Float(_) if log_sum_exp => &[CoarsePass::LogSumExpInt16],
            HeadWeights::Quantized(w) if log_sum_exp => {
                if coarse::supports(w) && coarse::uses_int8(w) {
                    &[CoarsePass::LogSumExpInt8]
                } else {
                    &[]
                }
            }
            HeadWeights::Float(_) if are_few => &[CoarsePass::Int4, CoarsePass::Int8],
            HeadWeights::Quantized(w) if are_few && w.bits > 4 => {
                if coarse::supports(w) {
                    &[CoarsePass::Int4, CoarsePass::Int8]
                } else {
                    &[CoarsePass::Int4]
                }
            }
            HeadWeights::Quantized(w) if !coarse::supports(w) => &[],
            _ => &[CoarsePass::Int8],
        }
    }

    pub fn weights(self) -> PassWeights {
        match self {
            CoarsePass::Int4 => PassWeights::Int4Copy,
            CoarsePass::Int8 | CoarsePass::LogSumExpInt16 | CoarsePass::LogSumExpInt8 => PassWeights::Int8,
        }
    }
}
