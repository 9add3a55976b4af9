//! `Weights`: a block-quantized matrix in the layout of ONNX Runtime's `MatMulNBits`.

#[cfg(target_arch = "x86_64")]
use std::ops::Range;

/// A weight matrix `[n, k]` of 4- or 8-bit codes in blocks that share a scale and a zero point.
pub struct Weights<'w> {
    /// `[n, blocks, bytes of a block]`; of two 4-bit codes in a byte, the first is the low half.
    pub codes: &'w [u8],
    /// `[n, blocks]`.
    pub scales: &'w [f32],
    /// `[n, bytes of a row's zero points]`; without them, zero is the middle of the codes.
    pub zero_points: Option<&'w [u8]>,
    /// Length of a row.
    pub k: usize,
    /// 4 or 8.
    pub bits: usize,
    /// Codes in a block.
    pub block_size: usize,
}

impl Weights<'_> {
    pub fn blocks(&self) -> usize {
        self.k.div_ceil(self.block_size)
    }

    /// Some of the rows.
    #[cfg(target_arch = "x86_64")]
    pub fn rows(&self, rows: Range<usize>) -> Weights<'_> {
        let of = |width: usize| rows.start * width..rows.end * width;
        Weights {
            codes: &self.codes[of(self.row_bytes())],
            scales: &self.scales[of(self.blocks())],
            zero_points: self.zero_points.map(|zeros| &zeros[of(self.zero_point_bytes())]),
            ..*self
        }
    }

    pub fn block_bytes(&self) -> usize {
        self.block_size * self.bits / 8
    }

    /// Bytes of a row's codes.
    pub fn row_bytes(&self) -> usize {
        self.blocks() * self.block_bytes()
    }

    /// Codes whose products are added up as integers: a block, or two adjacent ones where these are short.
    pub fn span(&self) -> usize {
        if self.bits == 4 && self.block_size == 32 { 64 } else { self.block_size }
    }

    fn zero_point_bytes(&self) -> usize {
        (self.blocks() * self.bits).div_ceil(8)
    }

    /// Whether codes, scales and zero points have the lengths of a matrix with `n` rows.
    pub fn has_rows(&self, n: usize) -> bool {
        self.codes.len() == n * self.row_bytes()
            && self.scales.len() == n * self.blocks()
            && self.zero_points.is_none_or(|zeros| zeros.len() == n * self.zero_point_bytes())
    }

    /// The Euclidean norm of a row, rounded up.
    #[cfg(target_arch = "x86_64")]
    pub fn row_norm(&self, row: usize) -> f32 {
        let (blocks, bytes) = (self.blocks(), self.block_bytes());
        let (mut left, mut sum) = (self.k, 0.0);
        for block in 0..blocks {
            let codes = &self.codes[(row * blocks + block) * bytes..][..bytes];
            let zero = self.zero_point(row, block);
            let square = |code: u8| (i32::from(code) - zero).pow(2);
            let count = left.min(self.block_size);
            let squares: i32 = match self.bits {
                8 => codes[..count].iter().map(|&code| square(code)).sum(),
                _ => {
                    let pairs = codes[..count / 2].iter().map(|&pair| square(pair & 15) + square(pair >> 4));
                    pairs.sum::<i32>() + if count % 2 == 1 { square(codes[count / 2] & 15) } else { 0 }
                }
            };
            sum += squares as f32 * self.scales[row * blocks + block].powi(2);
            left -= count;
        }
        sum.sqrt() * 1.0001
    }

    /// Dequantizes a row into `to`, which has the row's length.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn dequantize_row(&self, row: usize, to: &mut [f32]) {
        let (blocks, bytes) = (self.blocks(), self.block_bytes());
        for (block, to) in to.chunks_mut(self.block_size).enumerate() {
            let codes = &self.codes[(row * blocks + block) * bytes..][..bytes];
            let (zero, scale) = (self.zero_point(row, block), self.scales[row * blocks + block]);
            let value = |code: u8| (i32::from(code) - zero) as f32 * scale;
            match self.bits {
                8 => to.iter_mut().zip(codes).for_each(|(to, &code)| *to = value(code)),
                _ => {
                    for (pair, &codes) in to.chunks_mut(2).zip(codes) {
                        pair.iter_mut().zip([codes & 15, codes >> 4]).for_each(|(to, code)| *to = value(code));
                    }
                }
            }
        }
    }

    /// The zero point of all blocks, if they share one.
    pub fn shared_zero_point(&self) -> Option<i32> {
        self.zero_points.is_none().then_some(1 << (self.bits - 1))
    }

    /// What the blocks' own zero points subtract from the product of a row with activations whose sums by blocks are
    /// `sums`.
    #[cfg(target_arch = "x86_64")]
    pub fn zero_point_correction(&self, row: usize, sums: &[f32]) -> f32 {
        let mut zeros = 0.0;
        for (block, sum) in sums.iter().enumerate() {
            zeros += self.scales[row * self.blocks() + block] * self.zero_point(row, block) as f32 * sum;
        }
        zeros
    }

    pub fn zero_point(&self, row: usize, block: usize) -> i32 {
        match (self.zero_points, self.bits) {
            (None, bits) => 1 << (bits - 1),
            (Some(zeros), 8) => zeros[row * self.zero_point_bytes() + block].into(),
            (Some(zeros), _) => {
                let pair = zeros[row * self.zero_point_bytes() + block / 2];
                i32::from(if block.is_multiple_of(2) { pair & 15 } else { pair >> 4 })
            }
        }
    }
}

/// Random weights for tests.
#[cfg(test)]
pub mod testing {
    use super::Weights;
    use crate::noise::Noise;

    /// A random matrix that owns its memory.
    pub struct RandomWeights {
        codes: Vec<u8>,
        scales: Vec<f32>,
        zero_points: Option<Vec<u8>>,
        k: usize,
        bits: usize,
        block_size: usize,
    }

    /// How random weights are quantized.
    #[derive(Clone, Copy, Debug)]
    pub struct Quantization {
        pub bits: usize,
        pub block_size: usize,
        /// Whether zero is the middle of the codes.
        pub symmetric: bool,
    }

    impl RandomWeights {
        pub fn new(n: usize, k: usize, Quantization { bits, block_size, symmetric }: Quantization, seed: u32) -> Self {
            let mut noise = Noise::new(seed);
            let shape = Weights { codes: &[], scales: &[], zero_points: None, k, bits, block_size };
            let mut bytes = |count: usize| (0..count).map(|_| noise.next_bits() as u8).collect::<Vec<u8>>();
            let (codes, zeros) = (bytes(n * shape.row_bytes()), bytes(n * shape.zero_point_bytes()));
            let scales = (0..n * shape.blocks()).map(|_| noise.next_f32() * 0.05 + 0.03).collect();
            RandomWeights { codes, scales, zero_points: (!symmetric).then_some(zeros), k, bits, block_size }
        }

        pub fn view(&self) -> Weights<'_> {
            let RandomWeights { codes, scales, zero_points, k, bits, block_size } = self;
            Weights { codes, scales, zero_points: zero_points.as_deref(), k: *k, bits: *bits, block_size: *block_size }
        }
    }

    impl Weights<'_> {
        /// One weight in float64.
        pub fn value(&self, row: usize, column: usize) -> f64 {
            let (block, at) = (column / self.block_size, column % self.block_size);
            let bytes = &self.codes[(row * self.blocks() + block) * self.block_bytes()..];
            let code = match self.bits {
                8 => bytes[at],
                _ => bytes[at / 2] >> (at % 2 * 4) & 15,
            };
            let scale = self.scales[row * self.blocks() + block];
            f64::from(i32::from(code) - self.zero_point(row, block)) * f64::from(scale)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Quantization, RandomWeights};

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn rows_are_dequantized_and_measured() {
        for (bits, block_size, symmetric, k) in
            [(8, 32, false, 70), (8, 16, true, 48), (4, 32, false, 71), (4, 16, true, 3)]
        {
            let weights = RandomWeights::new(5, k, Quantization { bits, block_size, symmetric }, 3);
            let weights = weights.view();
            assert!(weights.has_rows(5) && !weights.has_rows(4));
            let last = weights.rows(4..5);
            for row in 0..5 {
                let expected: Vec<f64> = (0..k).map(|column| weights.value(row, column)).collect();
                let mut found = vec![f32::NAN; k];
                weights.dequantize_row(row, &mut found);
                let is_same = expected.iter().zip(&found).all(|(a, &b)| (a - f64::from(b)).abs() <= 1e-6 * a.abs());
                assert!(is_same, "{bits} bits, {block_size}: row {row}");
                let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
                let (found, apart) = (f64::from(weights.row_norm(row)), 1.0 + 3e-4);
                assert!(found >= norm && found <= norm * apart, "{bits} bits, {block_size}: {found} for {norm}");
            }
            assert_eq!(last.row_norm(0), weights.row_norm(4));
        }
    }
}
