//! `CoarsePass`: the method of the first of two passes.

use super::{HeadWeights, TopK};
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
    pub fn candidates(w: HeadWeights, rows: usize, TopK { k, log_sum_exp }: TopK) -> &'static [CoarsePass] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::matmul::quantized::Weights;

    #[test]
    fn passes_depend_on_the_request_and_the_weights() {
        use CoarsePass::{Int4, Int8, LogSumExpInt8, LogSumExpInt16};
        let weights =
            |bits, block_size| Weights { codes: &[], scales: &[], zero_points: None, k: 512, bits, block_size };
        let (int8, small_blocks, int4) = (weights(8, 128), weights(8, 32), weights(4, 128));
        at_each_level(Level::Avx2, |level| {
            let has_vnni = level >= Level::Vnni;
            let (float, int8) = (HeadWeights::Float(&[]), HeadWeights::Quantized(&int8));
            let (small_blocks, int4) = (HeadWeights::Quantized(&small_blocks), HeadWeights::Quantized(&int4));
            let greedy = TopK { k: 1, log_sum_exp: false };
            let beams = TopK { k: 64, log_sum_exp: true };
            // name, weights, rows, request, passes
            let cases: [(&str, HeadWeights, usize, TopK, &[CoarsePass]); 8] = [
                ("float32, one row", float, 1, greedy, &[Int4, Int8]),
                ("float32, rows", float, 2, greedy, &[Int8]),
                ("float32, many results", float, 1, TopK { k: 9, ..greedy }, &[Int8]),
                ("float32, beams", float, 4, beams, &[LogSumExpInt16]),
                ("8 bits, one row", int8, 1, greedy, &[Int4, Int8]),
                ("8 bits, beams", int8, 4, beams, if has_vnni { &[LogSumExpInt8] } else { &[] }),
                ("8 bits in small blocks, rows", small_blocks, 2, greedy, if has_vnni { &[Int8] } else { &[] }),
                ("4 bits, one row", int4, 1, greedy, &[Int8]),
            ];
            for (name, weights, rows, request, expected) in cases {
                assert_eq!(CoarsePass::candidates(weights, rows, request), expected, "{level:?}: {name}");
            }
        });
    }
}
