//! The product of rounded activations with weights of few bits: whole numbers within a block, float32 from block to block.
//!
//! `y = sx · Σ_blocks sw · (Σ q·w − zero · Σ q)`, where `q` are a row's activations as 16-bit numbers of scale `sx`. The sums
//! in the brackets are exact, `128 · 255 · 32767 < 2³¹`; those of `q` are taken off last, all blocks at a time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub use avx2::across;
#[cfg(target_arch = "x86_64")]
mod panels;
#[cfg(target_arch = "x86_64")]
pub mod rough;
#[cfg(target_arch = "x86_64")]
pub mod vnni;

use std::ops::Range;

use super::aligned::Aligned;
use super::processor::{Level, level};

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

    /// These rows alone.
    #[cfg(target_arch = "x86_64")]
    pub fn rows(&self, rows: Range<usize>) -> Weights<'_> {
        let of = |width: usize| rows.start * width..rows.end * width;
        Weights {
            numbers: &self.numbers[of(self.blocks() * self.block_bytes())],
            scales: &self.scales[of(self.blocks())],
            zero_points: self.zero_points.map(|zeros| &zeros[of(self.zero_point_bytes())]),
            ..*self
        }
    }

    fn block_bytes(&self) -> usize {
        self.block_size * self.bits / 8
    }

    /// Numbers whose products are summed up as whole numbers: a block, or where these are short two of them side by side.
    fn span(&self) -> usize {
        if self.bits == 4 && self.block_size == 32 { 64 } else { self.block_size }
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

    /// The Euclidean length of a row.
    #[cfg(target_arch = "x86_64")]
    pub fn length_of(&self, row: usize) -> f32 {
        let (blocks, bytes) = (self.blocks(), self.block_bytes());
        let (mut left, mut sum) = (self.k, 0.0);
        for block in 0..blocks {
            let numbers = &self.numbers[(row * blocks + block) * bytes..][..bytes];
            let zero = self.zero_point(row, block);
            let square = |code: u8| (i32::from(code) - zero).pow(2);
            let there = left.min(self.block_size);
            let squares: i32 = match self.bits {
                8 => numbers[..there].iter().map(|&code| square(code)).sum(),
                _ => {
                    let pairs = numbers[..there / 2].iter().map(|&pair| square(pair & 15) + square(pair >> 4));
                    pairs.sum::<i32>() + if there % 2 == 1 { square(numbers[there / 2] & 15) } else { 0 }
                }
            };
            sum += squares as f32 * self.scales[row * blocks + block].powi(2);
            left -= there;
        }
        sum.sqrt() * 1.0001
    }

    /// The numbers of a row, as float32 into `to`, which has room for them.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn unpack(&self, row: usize, to: &mut [f32]) {
        let (blocks, bytes) = (self.blocks(), self.block_bytes());
        for (block, to) in to.chunks_mut(self.block_size).enumerate() {
            let numbers = &self.numbers[(row * blocks + block) * bytes..][..bytes];
            let (zero, scale) = (self.zero_point(row, block), self.scales[row * blocks + block]);
            let number = |code: u8| (i32::from(code) - zero) as f32 * scale;
            match self.bits {
                8 => to.iter_mut().zip(numbers).for_each(|(to, &code)| *to = number(code)),
                _ => {
                    for (pair, &codes) in to.chunks_mut(2).zip(numbers) {
                        pair.iter_mut().zip([codes & 15, codes >> 4]).for_each(|(to, code)| *to = number(code));
                    }
                }
            }
        }
    }

    /// The zero point of every block, if they all have the same.
    fn same_zero_point(&self) -> Option<i32> {
        self.zero_points.is_none().then_some(1 << (self.bits - 1))
    }

    /// What zero points of the blocks' own take off a row's product with activations of these sums.
    #[cfg(target_arch = "x86_64")]
    fn taken_off(&self, row: usize, sums: &[f32]) -> f32 {
        let mut zeros = 0.0;
        for (block, sum) in sums.iter().enumerate() {
            zeros += self.scales[row * self.blocks() + block] * self.zero_point(row, block) as f32 * sum;
        }
        zeros
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
    /// Whether whole panels of columns are computed.
    in_panels: bool,
    /// `[rows, blocks · block_size]`, filled up with zeros.
    numbers: Aligned<i16>,
    /// `[rows, blocks]`: the sums of the numbers, times the zero point where all blocks have the same.
    sums: Vec<f32>,
    /// `[rows, spans]`: what the zero point that all blocks have in common takes off the sums of a span, in the first lane of
    /// each block; zeros where blocks have zero points of their own.
    starts: Aligned<[i32; 8]>,
    /// `[rows]`
    scales: Vec<f32>,
    /// Instead of all this, where the processor has VNNI.
    #[cfg(target_arch = "x86_64")]
    bytes: vnni::Rounded,
    level: Level,
}

/// What activations are rounded for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Products with many columns at a time.
    Whole,
    /// The same, where 8 bits are enough if those are faster. Results of a row are the same whatever rows are beside it: with so few
    /// bits, what is lost in the last place of float32 would come out as other numbers altogether.
    Coarse,
    /// Products with columns here and there.
    Scattered,
}

impl Activations {
    /// Makes room.
    pub fn prepare(&mut self, rows: usize, weights: &Weights, purpose: Purpose) {
        self.prepare_for(level(), rows, weights, purpose);
    }

    /// The same, for a processor of this level.
    fn prepare_for(&mut self, level: Level, rows: usize, weights: &Weights, purpose: Purpose) {
        let length = weights.blocks() * weights.block_size;
        (self.rows, self.level) = (rows, level);
        #[cfg(target_arch = "x86_64")]
        if level >= Level::Vnni {
            let (planes, panels_from) = match purpose {
                Purpose::Coarse => (vnni::Planes::One, 1),
                Purpose::Whole => (vnni::Planes::Two, vnni::panels_from(level, weights)),
                Purpose::Scattered => (vnni::Planes::Two, usize::MAX),
            };
            return self.bytes.prepare(level, rows, weights, planes, panels_from);
        }
        // Many rows make it worth while to bring the weights into another order first.
        let panels_from = match purpose {
            Purpose::Coarse => 1,
            Purpose::Whole => 8,
            Purpose::Scattered => usize::MAX,
        };
        self.in_panels = level >= Level::Avx2 && rows >= panels_from;
        self.order = if level == Level::Generic || self.in_panels { Order::Plain } else { Order::of(weights) };
        self.numbers.resize(rows * length, 0);
        self.sums.resize(rows * weights.blocks(), 0.0);
        self.starts.resize(rows * length.div_ceil(weights.span()), [0; 8]);
        self.scales.resize(rows, 0.0);
    }

    /// Makes room for the rows `x [rows, k]`, and rounds them, on one thread.
    pub fn round(&mut self, x: &[f32], weights: &Weights, purpose: Purpose) {
        self.prepare(x.len() / weights.k, weights, purpose);
        let target = self.target();
        for (row, x) in x.chunks_exact(weights.k).enumerate() {
            // SAFETY: room was made, and there is one thread.
            unsafe { target.round(row, x, weights) };
        }
    }

    /// How many rows one thread should round at a time: those that lie in the same lines of the cache.
    pub fn rounded_together(&self) -> usize {
        const FEW: usize = 16;
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Vnni {
            return FEW.next_multiple_of(self.bytes.rows_in_a_tile());
        }
        FEW
    }

    /// Where rows are rounded into, from several threads.
    pub fn target(&mut self) -> Target {
        Target {
            order: self.order,
            numbers: self.numbers.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            starts: self.starts.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            level: self.level,
            #[cfg(target_arch = "x86_64")]
            bytes: self.bytes.target(),
        }
    }

    /// An activation as it was rounded, without its scale.
    #[cfg(test)]
    fn number(&self, row: usize, at: usize, length: usize) -> i32 {
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Vnni {
            return self.bytes.number(row, at);
        }
        self.numbers[row * length + self.order.place(at)].into()
    }

    /// Its scale.
    #[cfg(test)]
    fn scale(&self, row: usize, _at: usize) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Vnni {
            return self.bytes.scale(row, _at);
        }
        self.scales[row]
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
    /// That for few rows of activations.
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
    order: Order,
    numbers: *mut i16,
    sums: *mut f32,
    starts: *mut [i32; 8],
    scales: *mut f32,
    level: Level,
    #[cfg(target_arch = "x86_64")]
    bytes: vnni::Target,
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
        #[cfg(target_arch = "x86_64")]
        match self.level {
            // SAFETY: the caller's, and the level is no higher than the processor's.
            Level::Vnni | Level::Amx => return unsafe { self.bytes.round(row, x, weights) },
            // SAFETY: as above.
            Level::Avx2 => return unsafe { self.round_with_avx2(row, x, weights) },
            Level::Generic => {}
        }
        // SAFETY: the caller's.
        unsafe { self.round_anywhere(row, x, weights) };
    }

    /// # Safety
    /// As for [`Target::round`]; the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn round_with_avx2(self, row: usize, x: &[f32], weights: &Weights) {
        // SAFETY: the caller's.
        unsafe { self.round_anywhere(row, x, weights) };
    }

    /// # Safety
    /// As for [`Target::round`].
    #[inline(always)]
    unsafe fn round_anywhere(self, row: usize, x: &[f32], weights: &Weights) {
        let (blocks, size, span) = (weights.blocks(), weights.block_size, weights.span());
        let spans = (blocks * size).div_ceil(span);
        // SAFETY: the row's part of each, which the caller has to itself.
        let (numbers, sums, starts, scale) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.numbers.add(row * blocks * size), blocks * size),
                std::slice::from_raw_parts_mut(self.sums.add(row * blocks), blocks),
                std::slice::from_raw_parts_mut(self.starts.add(row * spans), spans),
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
        let zero = weights.same_zero_point();
        starts.fill([0; 8]);
        for (at, (sum, block)) in sums.iter_mut().zip(numbers.chunks_exact(size)).enumerate() {
            let exact = block.iter().map(|&number| i32::from(number)).sum::<i32>();
            *sum = exact as f32 * zero.unwrap_or(1) as f32;
            starts[at * size / span][at * size % span / size * 4] = -exact * zero.unwrap_or(0);
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

/// Computes these rows of these columns of the product.
///
/// # Safety
/// No one else writes them meanwhile, and what `y` was made from lives.
pub unsafe fn multiply(
    x: &Activations,
    w: &Weights,
    bias: Option<&[f32]>,
    (rows, columns): (Range<usize>, Columns),
    y: &Output,
) {
    let within = match &columns {
        Columns::All(columns) => columns.end <= y.n,
        Columns::Listed(columns) => !x.in_panels && columns.iter().all(|&column| column < y.n),
    };
    let fits = rows.end <= y.rows && within && x.rows == y.rows;
    assert!(fits && bias.is_none_or(|bias| bias.len() == y.n), "sizes of a product");
    #[cfg(target_arch = "x86_64")]
    if x.level >= Level::Vnni {
        // SAFETY: the level is no higher than the processor's; the rest is the caller's.
        return unsafe { vnni::multiply(&x.bytes, w, bias, (rows, columns), y) };
    }
    let product = Product { x, w, bias, rows, columns, y };
    #[cfg(target_arch = "x86_64")]
    if x.level == Level::Avx2 {
        match (w.bits, x.order) {
            // SAFETY: the features are there.
            (8, _) if x.in_panels => return unsafe { panels::multiply::<8>(&product) },
            // SAFETY: as above.
            (_, Order::Plain) if x.in_panels => return unsafe { panels::multiply::<4>(&product) },
            // SAFETY: as above.
            (8, _) => return unsafe { avx2::multiply::<8>(&product) },
            // SAFETY: as above.
            (_, Order::Fours) => return unsafe { avx2::multiply::<4>(&product) },
            _ => {}
        }
    }
    product.portable();
}

/// Whether products of so many rows in full wait for the memory, however few bits of activations would do.
#[cfg(target_arch = "x86_64")]
pub fn waits_for_memory(rows: usize, w: &Weights) -> bool {
    vnni::is_by_amx(level(), rows, w)
}

/// Which columns of a product are to be computed.
#[derive(Clone)]
pub enum Columns<'c> {
    All(Range<usize>),
    /// Of activations that are for scattered ones.
    Listed(&'c [usize]),
}

/// What is to be computed.
struct Product<'p> {
    x: &'p Activations,
    w: &'p Weights<'p>,
    bias: Option<&'p [f32]>,
    rows: Range<usize>,
    columns: Columns<'p>,
    /// To be written, in these rows and columns, by no one else.
    y: &'p Output,
}

impl Product<'_> {
    /// For any processor: a row of weights is unpacked once for all rows of activations, into 16-bit integers whose products compilers
    /// sum up in vector registers.
    fn portable(&self) {
        let Product { x, w, bias, y, .. } = self;
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
        let mut unpacked = vec![0_i16; blocks * size];
        let mut column = |column: usize| {
            for (block, unpacked) in unpacked.chunks_exact_mut(size).enumerate() {
                let packed = &w.numbers[(column * blocks + block) * bytes..][..bytes];
                let zero = w.zero_point(column, block) as i16;
                match w.bits {
                    8 => unpacked.iter_mut().zip(packed).for_each(|(to, &code)| *to = i16::from(code) - zero),
                    _ => {
                        for (pair, &codes) in unpacked.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
                            *pair = [i16::from(codes & 15) - zero, i16::from(codes >> 4) - zero];
                        }
                    }
                }
            }
            let scales = &w.scales[column * blocks..][..blocks];
            for row in self.rows.clone() {
                let numbers = &x.numbers[row * blocks * size..][..blocks * size];
                let of_blocks = numbers.chunks_exact(size).zip(unpacked.chunks_exact(size)).zip(scales);
                let mut sum = 0.0;
                for ((numbers, weights), scale) in of_blocks {
                    let products = numbers.iter().zip(weights).map(|(&x, &w)| i32::from(x) * i32::from(w));
                    sum += products.sum::<i32>() as f32 * (scale * x.scales[row]);
                }
                // SAFETY: within the output, and no one else writes there.
                unsafe { *y.values.add(row * y.n + column) = sum + bias.map_or(0.0, |bias| bias[column]) };
            }
        };
        match &self.columns {
            Columns::All(columns) => columns.clone().for_each(column),
            Columns::Listed(columns) => columns.iter().copied().for_each(&mut column),
        }
    }

    /// One result, number by number.
    #[cfg(test)]
    fn at(&self, row: usize, column: usize) -> f32 {
        let Product { x, w, bias, .. } = self;
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
        let mut sum = 0.0;
        for block in 0..blocks {
            let packed = &w.numbers[(column * blocks + block) * bytes..][..bytes];
            let zero = w.zero_point(column, block);
            let weight = |at: usize| match w.bits {
                8 => i32::from(packed[at]) - zero,
                _ => i32::from(packed[at / 2] >> (at % 2 * 4) & 15) - zero,
            };
            let number = |at: usize| x.number(row, block * size + at, blocks * size);
            let products = (0..size).map(|at| number(at) * weight(at)).sum::<i32>();
            sum += products as f32 * (w.scales[column * blocks + block] * x.scale(row, block * size));
        }
        sum + bias.map_or(0.0, |bias| bias[column])
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

    /// All that this processor can do.
    fn levels() -> impl Iterator<Item = Level> {
        let found = super::super::processor::found();
        [Level::Generic, Level::Avx2, Level::Vnni, Level::Amx].into_iter().filter(move |&level| level <= found)
    }

    #[test]
    fn products_are_those_of_float64() {
        for (bits, block_size, symmetric) in [
            (8, 128, true),
            (8, 128, false),
            (8, 32, false),
            (8, 16, true),
            (8, 64, true),
            (4, 32, true),
            (4, 128, false),
            (4, 16, true),
            (4, 64, true),
            (4, 32, false),
        ] {
            for (rows, n, k, purpose) in [
                (1, 5, 64, Purpose::Whole),
                (1, 13, 512, Purpose::Whole),
                (2, 9, 192, Purpose::Whole),
                (3, 7, 200, Purpose::Whole),
                (4, 3, 128, Purpose::Whole),
                (9, 33, 136, Purpose::Whole),
                (9, 33, 136, Purpose::Scattered),
                (8, 16, 512, Purpose::Whole),
                (20, 41, 1160, Purpose::Whole),
                (2, 9, 192, Purpose::Coarse),
                (23, 70, 200, Purpose::Coarse),
                (45, 32, 640, Purpose::Coarse),
            ] {
                let of_level = |level| product_of_float64(level, (bits, block_size, symmetric), [rows, n, k], purpose);
                let products: Vec<_> = levels().map(|level| (level, of_level(level))).collect();
                // Where both take many rows the newest gives the numbers of the one before.
                let are_many = purpose == Purpose::Coarse || purpose == Purpose::Whole && rows >= 5;
                if let Some([(Level::Vnni, vnni), (Level::Amx, amx)]) = products.last_chunk().filter(|_| are_many) {
                    let is_same = vnni.iter().zip(amx).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(is_same, "{bits} bits, {block_size}, {symmetric}: {rows}, {n}, {k}, {purpose:?}");
                }
            }
        }
    }

    /// The product at a level, which is that of float64.
    fn product_of_float64(
        level: Level,
        (bits, block_size, symmetric): (usize, usize, bool),
        [rows, n, k]: [usize; 3],
        purpose: Purpose,
    ) -> Vec<f32> {
        let mut next = noise((bits * block_size * rows + k) as u64);
        let mut weights = Weights { numbers: &[], scales: &[], zero_points: None, k, bits, block_size };
        let numbers: Vec<u8> = (0..n * weights.blocks() * weights.block_bytes()).map(|_| next() as u8).collect();
        let scales: Vec<f32> = (0..n * weights.blocks()).map(|_| (next() % 100) as f32 / 1000.0 - 0.02).collect();
        let zeros: Vec<u8> = (0..n * weights.zero_point_bytes()).map(|_| next() as u8).collect();
        (weights.numbers, weights.scales) = (&numbers, &scales);
        weights.zero_points = (!symmetric).then_some(&zeros);
        assert!(weights.is_of(n));
        let x: Vec<f32> = (0..rows * k).map(|_| (next() % 2001) as f32 / 1000.0 - 1.0).collect();

        let mut activations = Activations::default();
        activations.prepare_for(level, rows, &weights, purpose);
        let target = activations.target();
        for row in 0..rows {
            // SAFETY: room was made, and there is one thread.
            unsafe { target.round(row, &x[row * k..][..k], &weights) };
        }
        let bias: Vec<f32> = (0..n).map(|column| column as f32).collect();
        let mut y = vec![f32::NAN; rows * n];
        let output = Output::new(&mut y, rows, n);
        // SAFETY: there is one thread.
        unsafe {
            let columns = Columns::All(0..n / 2);
            multiply(&activations, &weights, Some(&bias), (0..rows, columns), &output);
            let listed: Vec<usize> = (n / 2..n).collect();
            let columns = if purpose == Purpose::Scattered { Columns::Listed(&listed) } else { Columns::All(n / 2..n) };
            multiply(&activations, &weights, Some(&bias), (0..rows, columns), &output);
        }

        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let biased = |(at, y): (usize, f64)| y + (at % n) as f64;
        let expected: Vec<f64> = reference(&x, &weights, n).into_iter().enumerate().map(biased).collect();
        let apart = norm(&mut expected.iter().zip(&y).map(|(a, &b)| a - f64::from(b)));
        let apart = apart / norm(&mut expected.iter().copied());
        let case = format!("{level:?}, {bits} bits, {block_size}, {symmetric}: {rows}, {n}, {k}, {purpose:?}");
        let is_coarse = level >= Level::Vnni && purpose == Purpose::Coarse;
        assert!(apart < if is_coarse { 1e-2 } else { 1e-4 }, "{case}: {apart}");

        // What this machine computes is what any computes.
        let (rows, columns) = (0..rows, Columns::All(0..n));
        let product = Product { x: &activations, w: &weights, bias: Some(&bias), rows, columns, y: &output };
        for (at, &here) in y.iter().enumerate() {
            let (any, here) = (f64::from(product.at(at / n, at % n)), f64::from(here));
            assert!((any - here).abs() < 1e-4 * (1.0 + any.abs()), "{case}: {any} and {here}");
        }
        y
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let (numbers, scales) = ([200_u8; 32], [1.0_f32; 2]);
        let weights = Weights { numbers: &numbers, scales: &scales, zero_points: None, k: 16, bits: 8, block_size: 16 };
        for (level, bad) in levels().flat_map(|level| [(level, f32::NAN), (level, f32::INFINITY)]) {
            let mut x = [1.0; 16];
            x[3] = bad;
            let mut activations = Activations::default();
            activations.prepare_for(level, 1, &weights, Purpose::Whole);
            // SAFETY: room was made, and there is one thread.
            unsafe { activations.target().round(0, &x, &weights) };
            let mut y = [0.0; 2];
            let output = Output::new(&mut y, 1, 2);
            // SAFETY: there is one thread.
            unsafe { multiply(&activations, &weights, None, (0..1, Columns::All(0..2)), &output) };
            assert!(y.iter().all(|y| y.is_nan()), "{level:?}, {bad}: {y:?}");
        }
    }
}
