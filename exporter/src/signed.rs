//! Signed numbers of few bits, block by block, with positive scales: what the standard `DequantizeLinear` reads and
//! TensorRT takes. The blocks of ONNX Runtime's own operators are in `quantize.rs`, real numbers of 8 bits in `float8.rs`.

use t5gemma_graphs::onnx::Blocks;

use crate::quantize::{PackedRows, shares};

/// Packs `rows`, row after row of `k` numbers, `k` being whole blocks.
pub fn pack_signed(rows: &[f32], k: usize, blocks: Blocks) -> PackedRows {
    debug_assert!(k.is_multiple_of(blocks.size));
    let mut packed = PackedRows::default();
    let half = f32::from(1_u8 << (blocks.bits - 1));
    for block in rows.chunks_exact(blocks.size) {
        let scale = best_scale(block, half, shares(blocks.bits));
        let code = |x: f32| (x / scale).round_ties_even().clamp(-half, half - 1.0) as i8 as u8;
        match blocks.bits {
            4 => {
                let pairs = block.as_chunks::<2>().0.iter();
                packed.numbers.extend(pairs.map(|&[first, second]| code(first) & 0x0f | code(second) << 4));
            }
            _ => packed.numbers.extend(block.iter().map(|&x| code(x))),
        }
        packed.scales.push(scale);
    }
    packed
}

/// The scale of least squared error among those tried. Scales have to be positive, also where all numbers are zero.
fn best_scale(block: &[f32], half: f32, shares: &[f32]) -> f32 {
    let (low, high) = block.iter().fold((0.0_f32, 0.0_f32), |(low, high), &x| (low.min(x), high.max(x)));
    let whole = (-low / half).max(high / (half - 1.0));
    // The least that is a number of its own in float16, where scales may go.
    if whole < 6e-8 {
        return 1.0;
    }
    let error = |scale: f32| -> f32 {
        let code = |x: f32| (x / scale).round_ties_even().clamp(-half, half - 1.0);
        block.iter().map(|&x| (x - code(x) * scale).powi(2)).sum()
    };
    let tried = shares.iter().map(|share| (error(whole * share), whole * share));
    tried.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(whole, |(_, scale)| scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(packed: &PackedRows, size: usize) -> Vec<f32> {
        let codes = packed.numbers.iter().flat_map(|&byte| [(byte << 4) as i8 >> 4, byte as i8 >> 4]);
        codes.enumerate().map(|(at, code)| f32::from(code) * packed.scales[at / size]).collect()
    }

    #[test]
    fn rows_of_8_bits_have_a_scale_each() {
        let rows = [vec![1.27, -1.27, 0.01, 0.0], vec![-12.7, 0.1, 0.0, 12.6]].concat();
        let packed = pack_signed(&rows, 4, Blocks::whole(8, 4));
        let found = packed.numbers.iter().enumerate().map(|(at, &code)| f32::from(code as i8) * packed.scales[at / 4]);
        assert_eq!((packed.numbers.len(), packed.scales.len()), (8, 2));
        for (found, expected) in found.zip(&rows) {
            assert!((found - expected).abs() <= packed.scales[1] / 2.0, "{found} for {expected}");
        }
    }

    #[test]
    fn numbers_come_back_as_near_as_their_bits_let_them() {
        let size = 16;
        let blocks = Blocks::whole(4, size);
        struct Case {
            name: &'static str,
            numbers: Vec<f32>,
            within: f32,
        }
        let ramp = |from: f32, step: f32| (0..size).map(|at| from + step * at as f32).collect::<Vec<_>>();
        let cases = [
            Case { name: "whole numbers of the range", numbers: ramp(-8.0, 1.0), within: 0.0 },
            Case { name: "nothing", numbers: vec![0.0; size], within: 0.0 },
            Case { name: "small numbers", numbers: ramp(-8e-3, 1e-3), within: 1e-9 },
            Case { name: "only above zero", numbers: ramp(0.0, 1.0), within: 1.5 },
            Case { name: "between the steps", numbers: ramp(-7.5, 1.0), within: 0.55 },
        ];
        for Case { name, numbers, within } in cases {
            let rows = [numbers.clone(), ramp(-8.0, 1.0)].concat();
            let packed = pack_signed(&rows, 2 * size, blocks);
            assert_eq!((packed.numbers.len(), packed.scales.len()), (size, 2), "{name}");
            assert!(packed.scales.iter().all(|&scale| scale > 0.0), "{name}");
            for (found, expected) in unpacked(&packed, size).iter().zip(&rows) {
                assert!((found - expected).abs() <= within, "{name}: {found} for {expected}");
            }
        }
    }
}
