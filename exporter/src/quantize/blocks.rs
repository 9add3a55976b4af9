//! Quantization to unsigned integers in blocks, the format of ONNX Runtime's `MatMulNBits`, as
//! `t5gemma_graphs::onnx::Blocks` describes it.
//!
//! # Design
//! The scale of each block is searched for. Between clipping its largest elements and rounding the many small ones
//! coarsely lies a minimum of the squared error, which for 4 bits is well below the error of the scale that just fits
//! the largest element.

use t5gemma_graphs::onnx::Blocks;

use super::QuantizedRows;

/// Quantizes `rows`, each of `k` elements.
pub fn quantize(rows: &[f32], k: usize, blocks: Blocks) -> QuantizedRows {
    let mut quantized = QuantizedRows::default();
    let mut padded = vec![0.0; blocks.size];
    let mut codes = vec![0; blocks.size];
    for row in rows.chunks_exact(k) {
        let mut zeros = Vec::with_capacity(blocks.of_row(k));
        for block in row.chunks(blocks.size) {
            padded[..block.len()].copy_from_slice(block);
            padded[block.len()..].fill(0.0);
            let grid = best_grid(&padded, blocks);
            encode(&padded, grid, blocks, &mut codes);
            pack(&codes, blocks.bits, &mut quantized.codes);
            quantized.scales.push(grid.scale);
            zeros.push(grid.zero as u8);
        }
        if !blocks.symmetric {
            zeros.resize(zeros.len().next_multiple_of(8 / usize::from(blocks.bits)), 0);
            pack(&zeros, blocks.bits, &mut quantized.zero_points);
        }
    }
    quantized
}

/// The values that the codes of a block stand for: `scale · (code − zero)`.
#[derive(Clone, Copy, Debug)]
struct Grid {
    scale: f32,
    zero: f32,
}

/// A grid and its squared error.
#[derive(Clone, Copy)]
struct Candidate {
    grid: Grid,
    error: f32,
}

/// The grid with the smallest squared error among those tried.
fn best_grid(block: &[f32], blocks: Blocks) -> Grid {
    let levels = (1_u32 << blocks.bits) as f32;
    let (low, high) = block.iter().fold((0.0_f32, 0.0_f32), |(low, high), &x| (low.min(x), high.max(x)));
    if low == 0.0 && high == 0.0 {
        return Grid { scale: 0.0, zero: levels / 2.0 };
    }
    let mut best = Candidate { grid: Grid { scale: 0.0, zero: 0.0 }, error: f32::INFINITY };
    let mut consider = |grid: Grid| {
        let error = squared_error(block, grid, levels - 1.0);
        if error < best.error {
            best = Candidate { grid, error };
        }
    };
    for factor in clipping_factors(blocks.bits) {
        if blocks.symmetric {
            let zero = levels / 2.0;
            // One side of zero has one code more than the other; the sign of the scale chooses the side.
            let upright = (-low / zero).max(high / (zero - 1.0));
            let flipped = (-low / (zero - 1.0)).max(high / zero);
            consider(Grid { scale: upright * factor, zero });
            consider(Grid { scale: -flipped * factor, zero });
        } else {
            let scale = (high - low) / (levels - 1.0) * factor;
            consider(Grid { scale, zero: nearest(-low / scale).clamp(0.0, levels - 1.0) });
            consider(Grid { scale, zero: nearest(-low * factor / scale).clamp(0.0, levels - 1.0) });
        }
    }
    refined(block, best, levels - 1.0)
}

/// The factors that are tried on the scale that fits all elements.
pub(super) fn clipping_factors(bits: u8) -> &'static [f32] {
    // 8 bits are so fine that a search would gain nothing.
    if bits == 8 { &FACTORS[..1] } else { &FACTORS }
}

const FACTORS: [f32; 12] = [1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.7];

/// The grid with the least-squares scale for the codes of `best`, if its error is smaller.
fn refined(block: &[f32], best: Candidate, most: f32) -> Grid {
    let Candidate { grid, error } = best;
    let (mut products, mut squares) = (0.0_f32, 0.0_f32);
    let inverse = 1.0 / grid.scale;
    for &x in block {
        let code = (nearest(x * inverse + grid.zero)).clamp(0.0, most) - grid.zero;
        products += code * x;
        squares += code * code;
    }
    let fitted = Grid { scale: products / squares, ..grid };
    if squares > 0.0 && fitted.scale != 0.0 && squared_error(block, fitted, most) < error { fitted } else { grid }
}

fn squared_error(block: &[f32], grid: Grid, most: f32) -> f32 {
    let inverse = 1.0 / grid.scale;
    if !inverse.is_finite() {
        return f32::INFINITY;
    }
    let mut lanes = [0.0_f32; 8];
    for eight in block.as_chunks::<8>().0 {
        for (sum, &x) in lanes.iter_mut().zip(eight) {
            let code = nearest(x * inverse + grid.zero).clamp(0.0, most);
            let error = x - (code - grid.zero) * grid.scale;
            *sum += error * error;
        }
    }
    lanes.iter().sum()
}

/// Rounds a magnitude below 2^22 to the nearest integer, ties to even. Baseline x86-64 has no instruction for
/// `f32::round`, which is a function call there.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: floats near it are 1 apart
    (x + SHIFT) - SHIFT
}

fn encode(block: &[f32], grid: Grid, blocks: Blocks, codes: &mut [u8]) {
    let most = ((1_u32 << blocks.bits) - 1) as f32;
    let inverse = if grid.scale == 0.0 { 0.0 } else { 1.0 / grid.scale };
    for (code, &x) in codes.iter_mut().zip(block) {
        *code = nearest(x * inverse + grid.zero).clamp(0.0, most) as u8;
    }
}

/// Appends codes of 8 or 4 bits; of two codes in a byte, the first is in the lower half.
fn pack(codes: &[u8], bits: u8, out: &mut Vec<u8>) {
    if bits == 8 {
        out.extend_from_slice(codes);
    } else {
        out.extend(codes.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dequantized(quantized: &QuantizedRows, k: usize, blocks: Blocks) -> Vec<f32> {
        let per_byte = 8 / usize::from(blocks.bits);
        let mask = ((1_u32 << blocks.bits) - 1) as u8;
        let code = |bytes: &[u8], at: usize| bytes[at / per_byte] >> (at % per_byte * usize::from(blocks.bits)) & mask;
        let of_row = blocks.of_row(k);
        let number = |row: usize, column: usize| {
            let block = row * of_row + column / blocks.size;
            let bytes = &quantized.codes[block * blocks.bytes()..][..blocks.bytes()];
            let zero = if blocks.symmetric {
                1 << (blocks.bits - 1)
            } else {
                code(&quantized.zero_points[row * blocks.zero_point_bytes(k)..], column / blocks.size)
            };
            quantized.scales[block] * (i32::from(code(bytes, column % blocks.size)) - i32::from(zero)) as f32
        };
        (0..quantized.scales.len() / of_row * k).map(|at| number(at / k, at % k)).collect()
    }

    fn noise(count: usize) -> Vec<f32> {
        let mut state = 1_u64;
        let mut unit = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| unit()).sum()).collect()
    }

    fn relative_error(numbers: &[f32], k: usize, blocks: Blocks) -> f32 {
        let quantized = quantize(numbers, k, blocks);
        let back = dequantized(&quantized, k, blocks);
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let error = squares(&mut numbers.iter().zip(&back).map(|(a, b)| a - b));
        (error / squares(&mut numbers.iter().copied())).sqrt()
    }

    #[test]
    fn errors_are_within_the_bounds_of_each_format() {
        let numbers = noise(64 * 96);
        // bits, block size, symmetric, maximum relative error
        let cases = [
            (8, 32, true, 0.005),
            (8, 128, true, 0.007),
            (8, 32, false, 0.005),
            (4, 32, true, 0.085),
            (4, 128, true, 0.11),
            (4, 32, false, 0.085),
            (4, 16, false, 0.07),
        ];
        for (bits, size, symmetric, most) in cases {
            let error = relative_error(&numbers, 96, Blocks { symmetric, ..Blocks::integer(bits, size) });
            assert!(error < most, "{bits} bits, {size}, {symmetric}: {error}");
        }
    }

    #[test]
    fn the_search_beats_the_scale_that_fits_the_largest_element() {
        let numbers = noise(128 * 64);
        let searched = relative_error(&numbers, 128, Blocks::integer(4, 128));
        let plain: f32 = (numbers.chunks(128))
            .map(|block| {
                let largest = block.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                squared_error(block, Grid { scale: largest / 7.0, zero: 8.0 }, 15.0)
            })
            .sum();
        let plain = (plain / numbers.iter().map(|x| x * x).sum::<f32>()).sqrt();
        assert!(searched < 0.93 * plain, "{searched} against {plain}");
    }

    #[test]
    fn blocks_with_at_most_one_nonzero_element_are_exact() {
        for (bits, symmetric) in [(8, true), (8, false), (4, true), (4, false)] {
            let blocks = Blocks { symmetric, ..Blocks::integer(bits, 16) };
            let mut numbers = vec![0.0; 40];
            assert_eq!(dequantized(&quantize(&numbers, 40, blocks), 40, blocks), numbers, "{blocks:?}");
            numbers[37] = -3.5;
            let back = dequantized(&quantize(&numbers, 40, blocks), 40, blocks);
            let close = numbers.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close, "{blocks:?}: {back:?}");
        }
    }
}
