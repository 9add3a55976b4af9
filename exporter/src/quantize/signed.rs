//! Quantization to signed integers in blocks with positive scales, the format of the standard operator
//! `DequantizeLinear`, which TensorRT reads.

use t5gemma_graphs::onnx::Blocks;

use super::QuantizedRows;
use super::blocks::clipping_factors;

/// Quantizes `rows`, each of `k` elements, a multiple of the block size.
pub fn quantize_signed(rows: &[f32], k: usize, blocks: Blocks) -> QuantizedRows {
    debug_assert!(k.is_multiple_of(blocks.size));
    let mut quantized = QuantizedRows::default();
    let half = f32::from(1_u8 << (blocks.bits - 1));
    for block in rows.chunks_exact(blocks.size) {
        let scale = best_scale(block, half, clipping_factors(blocks.bits));
        let code = |x: f32| (x / scale).round_ties_even().clamp(-half, half - 1.0) as i8 as u8;
        if blocks.bits == 4 {
            let pairs = block.as_chunks::<2>().0.iter();
            quantized.codes.extend(pairs.map(|&[first, second]| code(first) & 0x0f | code(second) << 4));
        } else {
            quantized.codes.extend(block.iter().map(|&x| code(x)));
        }
        quantized.scales.push(scale);
    }
    quantized
}

/// The scale with the smallest squared error among those tried. Scales must be positive, even for blocks of zeros.
fn best_scale(block: &[f32], half: f32, factors: &[f32]) -> f32 {
    let (low, high) = block.iter().fold((0.0_f32, 0.0_f32), |(low, high), &x| (low.min(x), high.max(x)));
    let unclipped = (-low / half).max(high / (half - 1.0));
    // Scales may be stored in float16, where smaller ones become zero.
    if unclipped < 6e-8 {
        return 1.0;
    }
    let error = |scale: f32| -> f32 {
        let code = |x: f32| (x / scale).round_ties_even().clamp(-half, half - 1.0);
        block.iter().map(|&x| (x - code(x) * scale).powi(2)).sum()
    };
    let tried = factors.iter().map(|factor| (error(unclipped * factor), unclipped * factor));
    tried.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(unclipped, |(_, scale)| scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dequantized(quantized: &QuantizedRows, size: usize) -> Vec<f32> {
        let codes = quantized.codes.iter().flat_map(|&byte| [(byte << 4) as i8 >> 4, byte as i8 >> 4]);
        codes.enumerate().map(|(at, code)| f32::from(code) * quantized.scales[at / size]).collect()
    }

    #[test]
    fn int8_rows_have_one_scale_each() {
        let rows = [vec![1.27, -1.27, 0.01, 0.0], vec![-12.7, 0.1, 0.0, 12.6]].concat();
        let quantized = quantize_signed(&rows, 4, Blocks::integer(8, 4));
        let found =
            quantized.codes.iter().enumerate().map(|(at, &code)| f32::from(code as i8) * quantized.scales[at / 4]);
        assert_eq!((quantized.codes.len(), quantized.scales.len()), (8, 2));
        for (found, expected) in found.zip(&rows) {
            assert!((found - expected).abs() <= quantized.scales[1] / 2.0, "{found} for {expected}");
        }
    }

    #[test]
    fn int4_errors_are_within_half_a_step() {
        let size = 16;
        let blocks = Blocks::integer(4, size);
        struct Case {
            name: &'static str,
            numbers: Vec<f32>,
            within: f32,
        }
        let ramp = |from: f32, step: f32| (0..size).map(|at| from + step * at as f32).collect::<Vec<_>>();
        let cases = [
            Case { name: "integers of the range", numbers: ramp(-8.0, 1.0), within: 0.0 },
            Case { name: "zeros", numbers: vec![0.0; size], within: 0.0 },
            Case { name: "small numbers", numbers: ramp(-8e-3, 1e-3), within: 1e-9 },
            Case { name: "only above zero", numbers: ramp(0.0, 1.0), within: 1.5 },
            Case { name: "between the steps", numbers: ramp(-7.5, 1.0), within: 0.55 },
        ];
        for Case { name, numbers, within } in cases {
            let rows = [numbers.clone(), ramp(-8.0, 1.0)].concat();
            let quantized = quantize_signed(&rows, 2 * size, blocks);
            assert_eq!((quantized.codes.len(), quantized.scales.len()), (size, 2), "{name}");
            assert!(quantized.scales.iter().all(|&scale| scale > 0.0), "{name}");
            for (found, expected) in dequantized(&quantized, size).iter().zip(&rows) {
                assert!((found - expected).abs() <= within, "{name}: {found} for {expected}");
            }
        }
    }
}
