//! The product of rounded activations with weights of few bits: whole numbers within a block, float32 from block to block.
//!
//! `y = sx · Σ_blocks sw · (Σ q·w − zero · Σ q)`, where `q` are a row's activations as 16-bit numbers of scale `sx`. The sums
//! in the brackets are exact, `128 · 255 · 32767 < 2³¹`; those of `q` are taken off last, all blocks at a time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod panels;

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

    /// The zero point of every block, if they all have the same.
    fn same_zero_point(&self) -> Option<i32> {
        self.zero_points.is_none().then_some(1 << (self.bits - 1))
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
    order: Order,
    /// `[rows, blocks · block_size]`, filled up with zeros.
    numbers: Vec<i16>,
    /// `[rows, blocks]`: the sums of the numbers, times the zero point where all blocks have the same.
    sums: Vec<f32>,
    /// `[rows]`
    scales: Vec<f32>,
}

impl Activations {
    /// Makes room.
    pub fn prepare(&mut self, rows: usize, weights: &Weights) {
        self.rows = rows;
        self.order = Order::of(weights, rows);
        self.numbers.resize(rows * weights.blocks() * weights.block_size, 0);
        self.sums.resize(rows * weights.blocks(), 0.0);
        self.scales.resize(rows, 0.0);
    }

    /// Where rows are rounded into, from several threads.
    pub fn target(&mut self) -> Target {
        Target {
            order: self.order,
            numbers: self.numbers.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
        }
    }
}

/// In which order activations are kept, so that the numbers which lie in one word of the weights meet theirs.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Order {
    /// As they come.
    #[default]
    Plain,
    /// Of each 64 every fourth, from the first, the second, …: four weights in two bytes.
    Fours,
}

impl Order {
    /// That for `rows` rows of activations.
    fn of(w: &Weights, rows: usize) -> Order {
        match (w.bits, w.block_size) {
            (4, 32..) if (w.blocks() * w.block_size).is_multiple_of(64) && !is_of_many(rows) => Order::Fours,
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

/// Whether so many rows make it worth while to bring the weights into another order first, see [`panels`].
fn is_of_many(rows: usize) -> bool {
    cfg!(target_arch = "x86_64") && rows >= 8
}

/// 1.5 · 2²³: added to a small number it leaves the nearest whole one in the low bits of the sum, ties to even.
const SHIFT: f32 = 12_582_912.0;

/// The memory of [`Activations`].
#[derive(Clone, Copy)]
pub struct Target {
    order: Order,
    numbers: *mut i16,
    sums: *mut f32,
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
        let zero = weights.same_zero_point().unwrap_or(1) as f32;
        for (sum, block) in sums.iter_mut().zip(numbers.chunks_exact(size)) {
            *sum = block.iter().map(|&number| i32::from(number)).sum::<i32>() as f32 * zero;
        }
        match self.order {
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

/// The most rows of activations that are computed at a time: the processor has registers for them.
const ROWS: usize = 4;
/// The most columns that are computed at a time.
const COLUMNS: usize = 4;

/// Computes the columns `columns` of the product.
///
/// # Safety
/// No one else writes these columns of `y` meanwhile, and what `y` was made from lives.
pub unsafe fn multiply(x: &Activations, w: &Weights, bias: Option<&[f32]>, columns: Range<usize>, y: &Output) {
    assert!(columns.end <= y.n && x.rows == y.rows && bias.is_none_or(|bias| bias.len() == y.n), "sizes of a product");
    let product = Product { x, w, bias, columns, y };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        match (w.bits, x.order) {
            // SAFETY: the features are there.
            (8, _) if is_of_many(x.rows) => return unsafe { panels::multiply::<8>(&product) },
            // SAFETY: as above.
            (_, Order::Plain) if is_of_many(x.rows) => return unsafe { panels::multiply::<4>(&product) },
            // SAFETY: as above.
            (8, _) => return unsafe { avx2::multiply::<8>(&product) },
            // SAFETY: as above.
            (_, Order::Fours) => return unsafe { avx2::multiply::<4>(&product) },
            _ => {}
        }
    }
    product.in_tiles(portable);
}

/// What is to be computed.
struct Product<'p> {
    x: &'p Activations,
    w: &'p Weights<'p>,
    bias: Option<&'p [f32]>,
    columns: Range<usize>,
    /// To be written, in these columns, by no one else.
    y: &'p Output,
}

impl Product<'_> {
    /// Computes it tile by tile. `tile` is given activations and weights, first row and number of rows, first column and
    /// number of columns, and the scales of the columns times their zero points, `[columns, blocks]`, or only the scales
    /// where all zero points are the same.
    #[inline(always)]
    fn in_tiles(&self, tile: impl Fn(&Activations, &Weights, [usize; 2], [usize; 2], &[f32]) -> Sums) {
        let Product { x, w, bias, columns, y } = self;
        let blocks = w.blocks();
        // A single row keeps several reads of the weights under way; more rows share what is read.
        let width = if x.rows == 1 { COLUMNS } else { COLUMNS / 2 };
        let mut own_zeros = Vec::new();
        for row in (0..x.rows).step_by(ROWS) {
            let rows = ROWS.min(x.rows - row);
            for column in columns.clone().step_by(width) {
                let width = width.min(columns.end - column);
                let scales = &w.scales[column * blocks..(column + width) * blocks];
                let zeros = match w.zero_points {
                    None => scales,
                    Some(_) => {
                        let zero = |at: usize| w.zero_point(column + at / blocks, at % blocks) as f32;
                        own_zeros.clear();
                        own_zeros.extend(scales.iter().enumerate().map(|(at, scale)| scale * zero(at)));
                        &own_zeros[..]
                    }
                };
                let sums = tile(x, w, [row, rows], [column, width], zeros);
                for (column, sums) in (column..column + width).zip(sums) {
                    let bias = bias.map_or(0.0, |bias| bias[column]);
                    for (row, sum) in (row..row + rows).zip(sums) {
                        // SAFETY: within the output, and no one else writes the column.
                        unsafe { *y.values.add(row * y.n + column) = sum * x.scales[row] + bias };
                    }
                }
            }
        }
    }
}

/// The products of some rows of activations with some columns, without the activations' scales; those of rows and columns
/// that a tile has not are 0.
type Sums = [[f32; ROWS]; COLUMNS];

/// For any machine.
fn portable(
    x: &Activations,
    w: &Weights,
    [row, rows]: [usize; 2],
    [column, columns]: [usize; 2],
    zeros: &[f32],
) -> Sums {
    let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
    let mut codes = [0_i16; 128];
    let mut sums = Sums::default();
    for (at, sums) in sums.iter_mut().enumerate().take(columns) {
        for (block, zero) in zeros[at * blocks..][..blocks].iter().enumerate() {
            let packed = &w.numbers[((column + at) * blocks + block) * bytes..][..bytes];
            for (at, code) in codes[..size].iter_mut().enumerate() {
                *code = match w.bits {
                    8 => packed[at].into(),
                    _ => (packed[at / 2] >> (at % 2 * 4) & 15).into(),
                };
            }
            let scale = w.scales[(column + at) * blocks + block];
            for (row, sum) in (row..row + rows).zip(&mut *sums) {
                let number = |at: usize| x.numbers[row * blocks * size + x.order.place(block * size + at)];
                let products = codes[..size].iter().enumerate().map(|(at, &w)| i32::from(number(at)) * i32::from(w));
                *sum += products.sum::<i32>() as f32 * scale - x.sums[row * blocks + block] * zero;
            }
        }
    }
    sums
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
            for (rows, n, k) in [(1, 5, 64), (3, 7, 200), (4, 3, 128), (9, 33, 136), (8, 16, 512), (20, 41, 1160)] {
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
                for (at, &here) in y.iter().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let blocks = weights.blocks();
                    let scales = &scales[column * blocks..][..blocks];
                    let zero = |block: usize| weights.zero_point(column, block) as f32;
                    let zeros: Vec<f32> = match symmetric {
                        true => scales.to_vec(),
                        false => scales.iter().enumerate().map(|(block, scale)| scale * zero(block)).collect(),
                    };
                    let sums = portable(&activations, &weights, [row, 1], [column, 1], &zeros);
                    let any = f64::from(sums[0][0] * activations.scales[row] + bias[column]);
                    let here = f64::from(here);
                    assert!((any - here).abs() < 1e-4 * (1.0 + any.abs()), "{case}: {any} and {here}");
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
