//! The product of rounded activations with weights of few bits: whole numbers within a block, float32 from block to block.
//!
//! `y = sx · Σ_blocks sw · (Σ q·w − zero · Σ q)`, where `q` are a row's activations as 16-bit numbers of scale `sx`. The sums
//! in the brackets are exact: they wrap in 32 bits, but their difference fits, `128 · 255 · 32767 < 2³¹`.

use std::ops::Range;

/// A weight matrix `[n, k]` in blocks of few bits.
pub struct Weights<'w> {
    /// `[n, blocks, bytes of a block]`; of two 4-bit numbers in a byte the first is the lower.
    pub numbers: &'w [u8],
    /// `[n, blocks]`.
    pub scales: &'w [f32],
    /// `[n, bytes of a row's zero points]`; none if zero is in the middle.
    pub zero_points: Option<&'w [u8]>,
    /// Numbers in a row.
    pub k: usize,
    /// 4 or 8.
    pub bits: usize,
    /// Numbers in a block.
    pub block_size: usize,
}

impl Weights<'_> {
    fn blocks(&self) -> usize {
        self.k.div_ceil(self.block_size)
    }

    fn block_bytes(&self) -> usize {
        self.block_size * self.bits / 8
    }

    fn zero_point_bytes(&self) -> usize {
        (self.blocks() * self.bits).div_ceil(8)
    }

    /// Whether the parts are as long as a matrix of `n` rows needs them.
    pub fn is_of(&self, n: usize) -> bool {
        self.numbers.len() == n * self.blocks() * self.block_bytes()
            && self.scales.len() == n * self.blocks()
            && self.zero_points.is_none_or(|zeros| zeros.len() == n * self.zero_point_bytes())
    }

    fn zero_point(&self, row: usize, block: usize) -> i32 {
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

/// The rows of activations, rounded.
#[derive(Default)]
pub struct Activations {
    rows: usize,
    /// `[rows, blocks · block_size]`, filled up with zeros. For 4-bit weights the even ones of each 32 come before the odd
    /// ones, as they lie in the weights' bytes.
    numbers: Vec<i16>,
    /// `[rows, blocks]`: the sums of the numbers.
    sums: Vec<i32>,
    /// `[rows]`
    scales: Vec<f32>,
}

impl Activations {
    /// Makes room.
    pub fn prepare(&mut self, rows: usize, weights: &Weights) {
        self.rows = rows;
        self.numbers.resize(rows * weights.blocks() * weights.block_size, 0);
        self.sums.resize(rows * weights.blocks(), 0);
        self.scales.resize(rows, 0.0);
    }

    /// Where rows are rounded into, from several threads.
    pub fn target(&mut self) -> Target {
        Target { numbers: self.numbers.as_mut_ptr(), sums: self.sums.as_mut_ptr(), scales: self.scales.as_mut_ptr() }
    }
}

/// 1.5 · 2²³: added to a small number it leaves the nearest whole one in the low bits of the sum, ties to even.
const SHIFT: f32 = 12_582_912.0;

/// The memory of [`Activations`].
#[derive(Clone, Copy)]
pub struct Target {
    numbers: *mut i16,
    sums: *mut i32,
    scales: *mut f32,
}

// SAFETY: plain memory; who writes where is what `Target::round` asks its callers to see to.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// Rounds one row.
    ///
    /// # Safety
    /// The activations this came from live, have room for the row, and no one else reads or writes the row meanwhile.
    pub unsafe fn round(self, row: usize, x: &[f32], weights: &Weights) {
        let (blocks, size) = (weights.blocks(), weights.block_size);
        // SAFETY: the row's part of each, which the caller has to itself.
        let (numbers, sums, scale) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.numbers.add(row * blocks * size), blocks * size),
                std::slice::from_raw_parts_mut(self.sums.add(row * blocks), blocks),
                &mut *self.scales.add(row),
            )
        };
        let mut lanes = [0.0_f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane = lane.max(x.abs());
            }
        }
        let largest = lanes.iter().copied().chain(rest.iter().map(|x| x.abs())).fold(0.0, f32::max);
        *scale = largest / 32767.0;
        let inverse = if largest > 0.0 { 32767.0 / largest } else { 0.0 };
        // A NaN or an infinity in the row makes all of its products NaN, as it would in float32.
        if x.iter().any(|x| !x.is_finite()) {
            *scale = f32::NAN;
        }
        let (filled, padding) = numbers.split_at_mut(x.len());
        for (number, x) in filled.iter_mut().zip(x) {
            *number = (x * inverse + SHIFT).to_bits() as i16;
        }
        padding.fill(0);
        for (sum, block) in sums.iter_mut().zip(numbers.chunks_exact(size)) {
            *sum = block.iter().map(|&number| i32::from(number)).sum();
        }
        if weights.bits == 4 && size >= 32 {
            for chunk in numbers.as_chunks_mut::<32>().0 {
                let old = *chunk;
                for (at, pair) in old.as_chunks::<2>().0.iter().enumerate() {
                    [chunk[at], chunk[16 + at]] = *pair;
                }
            }
        }
    }
}

/// The result `[rows, n]`, written column by column from several threads.
pub struct Output {
    values: *mut f32,
    rows: usize,
    n: usize,
}

// SAFETY: plain memory; who writes where is what `multiply` asks its callers to see to.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// Over `values`, `[rows, n]`, which must outlive it.
    pub fn new(values: &mut [f32], rows: usize, n: usize) -> Output {
        assert_eq!(values.len(), rows * n, "the output of a product");
        Output { values: values.as_mut_ptr(), rows, n }
    }
}

/// Rows of activations that are multiplied with a row of weights at a time.
const TILE: usize = 4;

/// Computes the columns `columns` of the product.
///
/// # Safety
/// No one else writes these columns of `y` meanwhile, and what `y` was made from lives.
pub unsafe fn multiply(x: &Activations, w: &Weights, bias: Option<&[f32]>, columns: Range<usize>, y: &Output) {
    let dots = dots(w);
    let put = |row: usize, column: usize, sum: f32| {
        let value = sum * x.scales[row] + bias.map_or(0.0, |bias| bias[column]);
        debug_assert!(row < y.rows && column < y.n);
        // SAFETY: within the output, and no one else writes the column.
        unsafe { *y.values.add(row * y.n + column) = value };
    };
    let whole = x.rows / TILE * TILE;
    for first in (0..whole).step_by(TILE) {
        for column in columns.clone() {
            let sums = (dots.of_tile)(x, w, first, column);
            (0..TILE).for_each(|at| put(first + at, column, sums[at]));
        }
    }
    for row in whole..x.rows {
        for column in columns.clone() {
            put(row, column, (dots.of_one)(x, w, row, column)[0]);
        }
    }
}

/// Products of rows of activations, from a first one on, with a row of weights, without the activations' scale.
struct Dots {
    of_tile: fn(&Activations, &Weights, usize, usize) -> [f32; TILE],
    of_one: fn(&Activations, &Weights, usize, usize) -> [f32; 1],
}

/// The best way on this machine.
fn dots(w: &Weights) -> Dots {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return match w.bits {
            8 => Dots {
                // SAFETY: the features are there.
                of_tile: |x, w, row, column| unsafe { avx2::dots_8(x, w, row, column) },
                // SAFETY: as above.
                of_one: |x, w, row, column| unsafe { avx2::dots_8(x, w, row, column) },
            },
            _ if w.block_size >= 32 => Dots {
                // SAFETY: the features are there.
                of_tile: |x, w, row, column| unsafe { avx2::dots_4(x, w, row, column) },
                // SAFETY: as above.
                of_one: |x, w, row, column| unsafe { avx2::dots_4(x, w, row, column) },
            },
            _ => Dots { of_tile: portable, of_one: portable },
        };
    }
    let _ = w;
    Dots { of_tile: portable, of_one: portable }
}

/// For any machine.
fn portable<const ROWS: usize>(x: &Activations, w: &Weights, first: usize, column: usize) -> [f32; ROWS] {
    let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
    let mut codes = [0_i16; 128];
    let mut totals = [0.0; ROWS];
    for block in 0..blocks {
        let packed = &w.numbers[(column * blocks + block) * bytes..][..bytes];
        let codes = &mut codes[..size];
        match (w.bits, size) {
            (8, _) => codes.iter_mut().zip(packed).for_each(|(code, &byte)| *code = byte.into()),
            (_, 16) => {
                for (pair, &byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
                    *pair = [(byte & 15).into(), (byte >> 4).into()];
                }
            }
            _ => {
                for (codes, packed) in codes.as_chunks_mut::<32>().0.iter_mut().zip(packed.as_chunks::<16>().0) {
                    for (at, &byte) in packed.iter().enumerate() {
                        (codes[at], codes[16 + at]) = ((byte & 15).into(), (byte >> 4).into());
                    }
                }
            }
        }
        let (scale, zero) = (w.scales[column * blocks + block], w.zero_point(column, block));
        for (row, total) in totals.iter_mut().enumerate() {
            let numbers = &x.numbers[((first + row) * blocks + block) * size..][..size];
            let product = numbers.iter().zip(&*codes).map(|(&x, &w)| i32::from(x) * i32::from(w));
            let sum = product.fold(0_i32, i32::wrapping_add);
            let zeros = zero.wrapping_mul(x.sums[(first + row) * blocks + block]);
            *total += sum.wrapping_sub(zeros) as f32 * scale;
        }
    }
    totals
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Activations, Weights};

    /// With weights of 8 bits.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dots_8<const ROWS: usize>(x: &Activations, w: &Weights, first: usize, column: usize) -> [f32; ROWS] {
        let size = w.block_size;
        // SAFETY: `Weights::is_of` and `Activations::prepare` have seen to the lengths.
        unsafe {
            dots(x, w, first, column, |packed, numbers, sums: &mut [__m256i; ROWS]| {
                for at in (0..size).step_by(16) {
                    let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(packed.add(at).cast()));
                    for row in 0..ROWS {
                        let x = _mm256_loadu_si256(numbers[row].add(at).cast());
                        sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(codes, x));
                    }
                }
            })
        }
    }

    /// With weights of 4 bits, in blocks of at least 32.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dots_4<const ROWS: usize>(x: &Activations, w: &Weights, first: usize, column: usize) -> [f32; ROWS] {
        let size = w.block_size;
        let low = _mm_set1_epi8(15);
        // SAFETY: as above.
        unsafe {
            dots(x, w, first, column, |packed, numbers, sums: &mut [__m256i; ROWS]| {
                for at in (0..size).step_by(32) {
                    let pairs = _mm_loadu_si128(packed.add(at / 2).cast());
                    let even = _mm256_cvtepu8_epi16(_mm_and_si128(pairs, low));
                    let odd = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16::<4>(pairs), low));
                    for row in 0..ROWS {
                        let x = numbers[row].add(at);
                        let evens = _mm256_madd_epi16(even, _mm256_loadu_si256(x.cast()));
                        let odds = _mm256_madd_epi16(odd, _mm256_loadu_si256(x.add(16).cast()));
                        sums[row] = _mm256_add_epi32(sums[row], _mm256_add_epi32(evens, odds));
                    }
                }
            })
        }
    }

    /// Goes through the blocks; `block` adds the products of one to the sums.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn dots<const ROWS: usize>(
        x: &Activations,
        w: &Weights,
        first: usize,
        column: usize,
        block: impl Fn(*const u8, [*const i16; ROWS], &mut [__m256i; ROWS]),
    ) -> [f32; ROWS] {
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
        debug_assert!((column + 1) * blocks * bytes <= w.numbers.len());
        debug_assert!((first + ROWS) * blocks * size <= x.numbers.len());
        let packed = w.numbers[column * blocks * bytes..].as_ptr();
        let scales = &w.scales[column * blocks..][..blocks];
        let middle = 1 << (w.bits - 1);
        let mut totals = [_mm256_setzero_ps(); ROWS];
        for (at, &scale) in scales.iter().enumerate() {
            let zero = if w.zero_points.is_none() { middle } else { w.zero_point(column, at) };
            let mut sums = [_mm256_setzero_si256(); ROWS];
            let mut numbers = [std::ptr::null(); ROWS];
            for row in 0..ROWS {
                let of_zero = zero * x.sums[(first + row) * blocks + at];
                sums[row] = _mm256_zextsi128_si256(_mm_cvtsi32_si128(of_zero.wrapping_neg()));
                // SAFETY: within the activations, as asserted.
                numbers[row] = unsafe { x.numbers.as_ptr().add(((first + row) * blocks + at) * size) };
            }
            // SAFETY: within the weights, as asserted.
            block(unsafe { packed.add(at * bytes) }, numbers, &mut sums);
            let scale = _mm256_set1_ps(scale);
            for row in 0..ROWS {
                totals[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[row]), scale, totals[row]);
            }
        }
        totals.map(|total| {
            let half = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps::<1>(total));
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        }
    }

    /// The product in float64, number by number.
    fn reference(x: &[f32], w: &Weights, n: usize) -> Vec<f64> {
        let weight = |row: usize, column: usize| {
            let (block, at) = (column / w.block_size, column % w.block_size);
            let bytes = &w.numbers[(row * w.blocks() + block) * w.block_bytes()..];
            let code = match w.bits {
                8 => bytes[at],
                _ => bytes[at / 2] >> (at % 2 * 4) & 15,
            };
            f64::from(i32::from(code) - w.zero_point(row, block)) * f64::from(w.scales[row * w.blocks() + block])
        };
        x.chunks(w.k)
            .flat_map(|x| {
                (0..n).map(move |row| (0..w.k).map(|column| f64::from(x[column]) * weight(row, column)).sum::<f64>())
            })
            .collect()
    }

    #[test]
    fn products_are_those_of_float64() {
        for (bits, block_size, symmetric) in [
            (8, 128, true),
            (8, 32, false),
            (8, 16, true),
            (4, 32, true),
            (4, 128, false),
            (4, 16, true),
            (4, 64, true),
        ] {
            for (rows, n, k) in [(1, 5, 64), (3, 7, 200), (4, 3, 128), (9, 33, 136)] {
                let mut next = noise((bits * block_size * rows + k) as u64);
                let mut weights = Weights { numbers: &[], scales: &[], zero_points: None, k, bits, block_size };
                let numbers: Vec<u8> =
                    (0..n * weights.blocks() * weights.block_bytes()).map(|_| next() as u8).collect();
                let scales: Vec<f32> =
                    (0..n * weights.blocks()).map(|_| (next() % 100) as f32 / 1000.0 - 0.02).collect();
                let zeros: Vec<u8> = (0..n * weights.zero_point_bytes()).map(|_| next() as u8).collect();
                (weights.numbers, weights.scales) = (&numbers, &scales);
                weights.zero_points = (!symmetric).then_some(&zeros);
                assert!(weights.is_of(n));
                let x: Vec<f32> = (0..rows * k).map(|_| (next() % 2001) as f32 / 1000.0 - 1.0).collect();

                let mut activations = Activations::default();
                activations.prepare(rows, &weights);
                let target = activations.target();
                for row in 0..rows {
                    // SAFETY: room was made, and there is one thread.
                    unsafe { target.round(row, &x[row * k..][..k], &weights) };
                }
                let bias: Vec<f32> = (0..n).map(|column| column as f32).collect();
                let mut y = vec![f32::NAN; rows * n];
                let output = Output::new(&mut y, rows, n);
                // SAFETY: there is one thread.
                unsafe { multiply(&activations, &weights, Some(&bias), 0..n, &output) };

                let norm =
                    |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
                let expected: Vec<f64> =
                    reference(&x, &weights, n).iter().enumerate().map(|(at, y)| y + (at % n) as f64).collect();
                let apart = norm(&mut expected.iter().zip(&y).map(|(a, &b)| a - f64::from(b)));
                let apart = apart / norm(&mut expected.iter().copied());
                let case = format!("{bits} bits, {block_size}, {symmetric}: {rows}, {n}, {k}");
                assert!(apart < 1e-4, "{case}: {apart}");

                // What this machine computes is what any computes.
                for row in 0..rows {
                    for column in 0..n {
                        let [any] = portable::<1>(&activations, &weights, row, column);
                        let any = f64::from(any * activations.scales[row] + bias[column]);
                        let here = f64::from(y[row * n + column]);
                        assert!((any - here).abs() < 1e-4 * (1.0 + any.abs()), "{case}: {any} and {here}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let (numbers, scales) = ([200_u8; 32], [1.0_f32; 2]);
        let weights = Weights { numbers: &numbers, scales: &scales, zero_points: None, k: 16, bits: 8, block_size: 16 };
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; 16];
            x[3] = bad;
            let mut activations = Activations::default();
            activations.prepare(1, &weights);
            // SAFETY: room was made, and there is one thread.
            unsafe { activations.target().round(0, &x, &weights) };
            let mut y = [0.0; 2];
            let output = Output::new(&mut y, 1, 2);
            // SAFETY: there is one thread.
            unsafe { multiply(&activations, &weights, None, 0..2, &output) };
            assert!(y.iter().all(|y| y.is_nan()), "{bad}: {y:?}");
        }
    }
}
