//! Numbers in few bits, block by block, as `t5gemma_graphs::onnx::Blocks` describes them.
//!
//! # Design
//! The scale of a block is searched: between clipping its largest numbers and rounding the many small ones coarsely lies a
//! smallest squared error, which for 4 bits is well below that of the scale which just holds the largest number.

use t5gemma_graphs::onnx::Blocks;

/// The packed rows of a matrix, or of some rows of one.
#[derive(Default)]
pub struct PackedRows {
    /// `[rows, blocks, bytes of a block]`.
    pub numbers: Vec<u8>,
    /// `[rows, blocks]`.
    pub scales: Vec<f32>,
    /// `[rows, bytes of a row's zero points]`; empty for symmetric blocks.
    pub zero_points: Vec<u8>,
}

impl PackedRows {
    /// Adds the rows of another.
    pub fn append(&mut self, mut other: PackedRows) {
        self.numbers.append(&mut other.numbers);
        self.scales.append(&mut other.scales);
        self.zero_points.append(&mut other.zero_points);
    }
}

/// Packs `rows`, row after row of `k` numbers.
pub fn pack(rows: &[f32], k: usize, blocks: Blocks) -> PackedRows {
    let mut packed = PackedRows::default();
    let mut padded = vec![0.0; blocks.size];
    let mut codes = vec![0; blocks.size];
    for row in rows.chunks_exact(k) {
        let mut zeros = Vec::with_capacity(blocks.of_row(k));
        for block in row.chunks(blocks.size) {
            padded[..block.len()].copy_from_slice(block);
            padded[block.len()..].fill(0.0);
            let Grid { scale, zero } = best_grid(&padded, blocks);
            encode(&padded, Grid { scale, zero }, blocks, &mut codes);
            put(&codes, blocks.bits, &mut packed.numbers);
            packed.scales.push(scale);
            zeros.push(zero as u8);
        }
        if !blocks.symmetric {
            zeros.resize(zeros.len().next_multiple_of(8 / usize::from(blocks.bits)), 0);
            put(&zeros, blocks.bits, &mut packed.zero_points);
        }
    }
    packed
}

/// Where the codes of a block lie: `scale · (code − zero)`.
#[derive(Clone, Copy, Debug)]
struct Grid {
    scale: f32,
    zero: f32,
}

/// The grid of least squared error among those tried.
fn best_grid(block: &[f32], blocks: Blocks) -> Grid {
    let levels = (1_u32 << blocks.bits) as f32;
    let (low, high) = block.iter().fold((0.0_f32, 0.0_f32), |(low, high), &x| (low.min(x), high.max(x)));
    if low == 0.0 && high == 0.0 {
        return Grid { scale: 0.0, zero: levels / 2.0 };
    }
    let mut best = (f32::INFINITY, Grid { scale: 0.0, zero: 0.0 });
    let mut consider = |grid: Grid| {
        let error = squared_error(block, grid, levels - 1.0);
        if error < best.0 {
            best = (error, grid);
        }
    };
    for share in shares(blocks.bits) {
        if blocks.symmetric {
            let zero = levels / 2.0;
            // One side has a code more than the other; the sign of the scale says which.
            let upright = (-low / zero).max(high / (zero - 1.0));
            let flipped = (-low / (zero - 1.0)).max(high / zero);
            consider(Grid { scale: upright * share, zero });
            consider(Grid { scale: -flipped * share, zero });
        } else {
            let scale = (high - low) / (levels - 1.0) * share;
            consider(Grid { scale, zero: nearest(-low / scale).clamp(0.0, levels - 1.0) });
            consider(Grid { scale, zero: nearest(-low * share / scale).clamp(0.0, levels - 1.0) });
        }
    }
    refined(block, best, levels - 1.0)
}

/// How much of the range that holds all numbers is tried for scales.
pub fn shares(bits: u8) -> &'static [f32] {
    // 8 bits are fine enough that a search would gain nothing.
    if bits == 8 { &SHARES[..1] } else { &SHARES }
}

const SHARES: [f32; 12] = [1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.7];

/// The scale that fits the codes of `grid` best, where that is better than the grid's own.
fn refined(block: &[f32], (error, grid): (f32, Grid), most: f32) -> Grid {
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

/// The nearest whole number of one below 2^22 in magnitude, ties to even: without the call that `f32::round` is on
/// processors that any x86-64 program must run on.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: the last bit of its neighbourhood is worth 1
    (x + SHIFT) - SHIFT
}

fn encode(block: &[f32], grid: Grid, blocks: Blocks, codes: &mut [u8]) {
    let most = ((1_u32 << blocks.bits) - 1) as f32;
    let inverse = if grid.scale == 0.0 { 0.0 } else { 1.0 / grid.scale };
    for (code, &x) in codes.iter_mut().zip(block) {
        *code = nearest(x * inverse + grid.zero).clamp(0.0, most) as u8;
    }
}

/// Adds codes of 8 or 4 bits; of two in a byte the first is the lower.
fn put(codes: &[u8], bits: u8, out: &mut Vec<u8>) {
    match bits {
        8 => out.extend_from_slice(codes),
        _ => out.extend(codes.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(packed: &PackedRows, k: usize, blocks: Blocks) -> Vec<f32> {
        let per_byte = 8 / usize::from(blocks.bits);
        let mask = ((1_u32 << blocks.bits) - 1) as u8;
        let code = |bytes: &[u8], at: usize| bytes[at / per_byte] >> (at % per_byte * usize::from(blocks.bits)) & mask;
        let of_row = blocks.of_row(k);
        let number = |row: usize, column: usize| {
            let block = row * of_row + column / blocks.size;
            let bytes = &packed.numbers[block * blocks.bytes()..][..blocks.bytes()];
            let zero = match blocks.symmetric {
                true => 1 << (blocks.bits - 1),
                false => code(&packed.zero_points[row * blocks.zero_point_bytes(k)..], column / blocks.size),
            };
            packed.scales[block] * (i32::from(code(bytes, column % blocks.size)) - i32::from(zero)) as f32
        };
        (0..packed.scales.len() / of_row * k).map(|at| number(at / k, at % k)).collect()
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
        let packed = pack(numbers, k, blocks);
        let back = unpacked(&packed, k, blocks);
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let error = squares(&mut numbers.iter().zip(&back).map(|(a, b)| a - b));
        (error / squares(&mut numbers.iter().copied())).sqrt()
    }

    #[test]
    fn packed_numbers_are_near_the_numbers() {
        let numbers = noise(64 * 96);
        // bits, block, symmetric, relative error allowed
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
            let error = relative_error(&numbers, 96, Blocks { symmetric, ..Blocks::whole(bits, size) });
            assert!(error < most, "{bits} bits, {size}, {symmetric}: {error}");
        }
    }

    #[test]
    fn the_search_beats_the_scale_that_holds_the_largest_number() {
        let numbers = noise(128 * 64);
        let searched = relative_error(&numbers, 128, Blocks::whole(4, 128));
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
    fn blocks_of_zeros_and_of_one_number_are_exact() {
        for (bits, symmetric) in [(8, true), (8, false), (4, true), (4, false)] {
            let blocks = Blocks { symmetric, ..Blocks::whole(bits, 16) };
            let mut numbers = vec![0.0; 40];
            assert_eq!(unpacked(&pack(&numbers, 40, blocks), 40, blocks), numbers, "{blocks:?}");
            numbers[37] = -3.5;
            let back = unpacked(&pack(&numbers, 40, blocks), 40, blocks);
            let close = numbers.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close, "{blocks:?}: {back:?}");
        }
    }
}
