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
    /// `[rows, blocks · block_size]`, filled up with zeros, in the order of [`Order::of`].
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

/// In which order activations are kept, so that the numbers which lie in one word of the weights meet theirs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As they come.
    Plain,
    /// Of each 64 every fourth, from the first, the second, …: four weights in two bytes.
    Fours,
}

impl Order {
    fn of(w: &Weights) -> Order {
        match (w.bits, w.block_size) {
            (4, 32..) if (w.blocks() * w.block_size).is_multiple_of(64) => Order::Fours,
            _ => Order::Plain,
        }
    }

    /// Where the number at `at` is kept.
    fn place(self, at: usize) -> usize {
        match self {
            Order::Plain => at,
            Order::Fours => at / 64 * 64 + at % 4 * 16 + at % 64 / 4,
        }
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
        match Order::of(weights) {
            Order::Plain => {}
            Order::Fours => {
                for chunk in numbers.as_chunks_mut::<64>().0 {
                    let old = *chunk;
                    (0..64).for_each(|at| chunk[Order::Fours.place(at)] = old[at]);
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

/// Rows of activations, or columns of a single row, that are computed at a time: the one shares what is read of the weights,
/// the other keeps several reads of them under way.
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
            let [sums] = (dots.of_rows)(x, w, first, column);
            (0..TILE).for_each(|at| put(first + at, column, sums[at]));
        }
    }
    let tiles = columns.start..columns.start + columns.len() / TILE * TILE;
    for row in whole..x.rows {
        for first in tiles.clone().step_by(TILE) {
            let sums = (dots.of_columns)(x, w, row, first);
            (0..TILE).for_each(|at| put(row, first + at, sums[at][0]));
        }
        for column in tiles.end..columns.end {
            put(row, column, (dots.of_one)(x, w, row, column)[0][0]);
        }
    }
}

/// Products of rows of activations from one on with columns from one on, without the activations' scale.
struct Dots {
    of_rows: fn(&Activations, &Weights, usize, usize) -> [[f32; TILE]; 1],
    of_columns: fn(&Activations, &Weights, usize, usize) -> [[f32; 1]; TILE],
    of_one: fn(&Activations, &Weights, usize, usize) -> [[f32; 1]; 1],
}

/// The best way on this machine.
fn dots(w: &Weights) -> Dots {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        if w.bits == 8 {
            return Dots {
                // SAFETY: the features are there.
                of_rows: |x, w, row, column| unsafe { avx2::dots_8(x, w, row, column) },
                // SAFETY: as above.
                of_columns: |x, w, row, column| unsafe { avx2::dots_8(x, w, row, column) },
                // SAFETY: as above.
                of_one: |x, w, row, column| unsafe { avx2::dots_8(x, w, row, column) },
            };
        }
        if Order::of(w) == Order::Fours {
            return Dots {
                // SAFETY: the features are there.
                of_rows: |x, w, row, column| unsafe { avx2::dots_4(x, w, row, column) },
                // SAFETY: as above.
                of_columns: |x, w, row, column| unsafe { avx2::dots_4(x, w, row, column) },
                // SAFETY: as above.
                of_one: |x, w, row, column| unsafe { avx2::dots_4(x, w, row, column) },
            };
        }
    }
    let _ = w;
    Dots { of_rows: portable, of_columns: portable, of_one: portable }
}

/// For any machine.
fn portable<const ROWS: usize, const COLUMNS: usize>(
    x: &Activations,
    w: &Weights,
    row: usize,
    column: usize,
) -> [[f32; ROWS]; COLUMNS] {
    std::array::from_fn(|at| portable_column(x, w, row, column + at))
}

fn portable_column<const ROWS: usize>(x: &Activations, w: &Weights, first: usize, column: usize) -> [f32; ROWS] {
    let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
    let order = Order::of(w);
    let mut codes = [0_i16; 128];
    let mut totals = [0.0; ROWS];
    for block in 0..blocks {
        let packed = &w.numbers[(column * blocks + block) * bytes..][..bytes];
        let codes = &mut codes[..size];
        match w.bits {
            8 => codes.iter_mut().zip(packed).for_each(|(code, &byte)| *code = byte.into()),
            _ => {
                for (pair, &byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
                    *pair = [(byte & 15).into(), (byte >> 4).into()];
                }
            }
        }
        let (scale, zero) = (w.scales[column * blocks + block], w.zero_point(column, block));
        for (row, total) in totals.iter_mut().enumerate() {
            let numbers = &x.numbers[(first + row) * blocks * size..][..blocks * size];
            let number = |at: usize| numbers[order.place(block * size + at)];
            let product = codes.iter().enumerate().map(|(at, &w)| i32::from(number(at)) * i32::from(w));
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
    use std::array::from_fn;

    use super::{Activations, Weights};

    /// Bytes from what is read to what will be.
    const AHEAD: usize = 4096;

    /// Where the operands of a tile begin: rows of activations from one on, columns (rows of weights) from one on.
    struct Tile<const ROWS: usize, const COLUMNS: usize> {
        x: [*const i16; ROWS],
        packed: [*const u8; COLUMNS],
        scales: [*const f32; COLUMNS],
    }

    impl<const ROWS: usize, const COLUMNS: usize> Tile<ROWS, COLUMNS> {
        #[inline(always)]
        fn at(x: &Activations, w: &Weights, row: usize, column: usize) -> Tile<ROWS, COLUMNS> {
            let (blocks, of_row) = (w.blocks(), w.blocks() * w.block_size);
            let bytes = blocks * w.block_bytes();
            // The last of each is looked at, so that everything before it is within bounds.
            assert!((row + ROWS) * of_row <= x.numbers.len() && (row + ROWS) * blocks <= x.sums.len());
            assert!((column + COLUMNS) * bytes <= w.numbers.len() && (column + COLUMNS) * blocks <= w.scales.len());
            Tile {
                x: from_fn(|at| x.numbers[(row + at) * of_row..].as_ptr()),
                packed: from_fn(|at| w.numbers[(column + at) * bytes..].as_ptr()),
                scales: from_fn(|at| w.scales[(column + at) * blocks..].as_ptr()),
            }
        }

        /// Has the memory send what will be read a little later than `bytes` bytes of each column from `first` on: rows are
        /// too short for the processor to see by itself where they go.
        #[inline(always)]
        fn fetch(&self, first: usize, bytes: usize) {
            // Several rows of activations take longer than the memory does.
            if ROWS > 1 || !first.is_multiple_of(64) {
                return;
            }
            for packed in self.packed {
                for line in (0..bytes).step_by(64) {
                    // SAFETY: a hint, which may name any address.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(packed.wrapping_add(first + line + AHEAD).cast()) };
                }
            }
        }
    }

    /// With weights of 8 bits.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dots_8<const ROWS: usize, const COLUMNS: usize>(
        x: &Activations,
        w: &Weights,
        row: usize,
        column: usize,
    ) -> [[f32; ROWS]; COLUMNS] {
        let tile = Tile::<ROWS, COLUMNS>::at(x, w, row, column);
        let (blocks, size) = (w.blocks(), w.block_size);
        let zero = _mm256_setzero_si256();
        let mut totals = [[_mm256_setzero_ps(); ROWS]; COLUMNS];
        for block in 0..blocks {
            let mut sums: [[__m256i; ROWS]; COLUMNS] = minus_zeros(x, w, [row, column, block]);
            let first = block * size;
            tile.fetch(first, size);
            for at in (first..first + size).step_by(16) {
                // SAFETY: within the tile.
                unsafe {
                    let mut x = [zero; ROWS];
                    for (x, from) in x.iter_mut().zip(tile.x) {
                        *x = _mm256_loadu_si256(from.add(at).cast());
                    }
                    for (column, sums) in sums.iter_mut().enumerate() {
                        let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(tile.packed[column].add(at).cast()));
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(codes, x));
                        }
                    }
                }
            }
            for (column, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
                // SAFETY: within the tile.
                let scale = unsafe { _mm256_broadcast_ss(&*tile.scales[column].add(block)) };
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *total);
                }
            }
        }
        sums_of(totals)
    }

    /// With weights of 4 bits, 64 at a time: they are one block, part of one, or two.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dots_4<const ROWS: usize, const COLUMNS: usize>(
        x: &Activations,
        w: &Weights,
        row: usize,
        column: usize,
    ) -> [[f32; ROWS]; COLUMNS] {
        let tile = Tile::<ROWS, COLUMNS>::at(x, w, row, column);
        let (blocks, size) = (w.blocks(), w.block_size);
        let low = _mm256_set1_epi16(15);
        // Which of two blocks each of eight sums belongs to.
        let halves = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        let (at_once, span) = if size == 32 { (2, 64) } else { (1, size) };
        let mut totals = [[_mm256_setzero_ps(); ROWS]; COLUMNS];
        for block in (0..blocks).step_by(at_once) {
            let mut sums: [[__m256i; ROWS]; COLUMNS] = minus_zeros(x, w, [row, column, block]);
            if at_once == 2 {
                let second: [[__m256i; ROWS]; COLUMNS] = minus_zeros(x, w, [row, column, block + 1]);
                for (sums, second) in sums.iter_mut().zip(second) {
                    for (sum, second) in sums.iter_mut().zip(second) {
                        *sum = _mm256_inserti128_si256::<1>(*sum, _mm256_castsi256_si128(second));
                    }
                }
            }
            let first = block * size;
            tile.fetch(first / 2, span / 2);
            for at in (first..first + span).step_by(64) {
                for (column, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: within the tile.
                    unsafe {
                        let words = _mm256_loadu_si256(tile.packed[column].add(at / 2).cast());
                        let fours = [
                            _mm256_and_si256(words, low),
                            _mm256_and_si256(_mm256_srli_epi16::<4>(words), low),
                            _mm256_and_si256(_mm256_srli_epi16::<8>(words), low),
                            _mm256_srli_epi16::<12>(words),
                        ];
                        for (row, sum) in sums.iter_mut().enumerate() {
                            let x = tile.x[row].add(at);
                            for (i, four) in fours.into_iter().enumerate() {
                                let x = _mm256_loadu_si256(x.add(16 * i).cast());
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(four, x));
                            }
                        }
                    }
                }
            }
            for (column, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
                // SAFETY: within the tile.
                let scale = unsafe {
                    let scales = tile.scales[column].add(block);
                    match at_once {
                        2 => {
                            let two = _mm_castpd_ps(_mm_load_sd(scales.cast()));
                            _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), halves)
                        }
                        _ => _mm256_broadcast_ss(&*scales),
                    }
                };
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *total);
                }
            }
        }
        sums_of(totals)
    }

    /// What the zero points of a block take from its sums, in the first of eight lanes: the place is row, column and block.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn minus_zeros<const ROWS: usize, const COLUMNS: usize>(
        x: &Activations,
        w: &Weights,
        [row, column, block]: [usize; 3],
    ) -> [[__m256i; ROWS]; COLUMNS] {
        let blocks = w.blocks();
        let mut minus = [[_mm256_setzero_si256(); ROWS]; COLUMNS];
        for (column, minus) in (column..).zip(&mut minus) {
            let zero = if w.zero_points.is_none() { 1 << (w.bits - 1) } else { w.zero_point(column, block) };
            for (row, minus) in (row..).zip(minus) {
                // SAFETY: `Tile::at` has seen to it that the last row's sums are there.
                let sum = unsafe { *x.sums.get_unchecked(row * blocks + block) };
                *minus = _mm256_zextsi128_si256(_mm_cvtsi32_si128(sum.wrapping_mul(-zero)));
            }
        }
        minus
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn sums_of<const ROWS: usize, const COLUMNS: usize>(totals: [[__m256; ROWS]; COLUMNS]) -> [[f32; ROWS]; COLUMNS] {
        let mut sums = [[0.0; ROWS]; COLUMNS];
        for (sums, totals) in sums.iter_mut().zip(totals) {
            for (sum, lanes) in sums.iter_mut().zip(totals) {
                let half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
                let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
                *sum = _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)));
            }
        }
        sums
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
                        let [[any]] = portable::<1, 1>(&activations, &weights, row, column);
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
