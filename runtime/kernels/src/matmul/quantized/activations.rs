//! `Activations`: rows of activations quantized to int16, or with VNNI to one or two planes of int8.

use crate::aligned::AlignedVec;
use crate::isa::{Level, level};
use crate::parallel::SharedSlice;
use crate::simd::ROUND_TO_INTEGER;

#[cfg(target_arch = "x86_64")]
use super::vnni;
use super::weights::Weights;

/// The quantization of activations, and the layout of their rows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Format {
    /// 16 bits, for products with ranges of columns.
    Int16,
    /// 16 bits, for products with listed columns.
    Int16Listed,
    /// 8 bits where that is faster, for products with ranges of columns. The results of a row do not depend on the
    /// other rows: with so few bits, a difference in the last place of float32 would be amplified.
    Int8,
}

/// Quantized rows of activations.
#[derive(Default)]
pub struct Activations {
    pub(super) rows: usize,
    pub(super) order: Order,
    /// Whether products are computed in whole panels of columns.
    pub(super) in_panels: bool,
    /// `[rows, blocks · block_size]`, padded with zeros.
    pub(super) values: AlignedVec<i16>,
    /// `[rows, blocks]`: the sums of the values, times the zero point that all blocks share if they do.
    pub(super) sums: Vec<f32>,
    /// `[rows, spans]`: the initial accumulators of a span, in the first lane of each block what the zero point that
    /// all blocks share subtracts; zeros where blocks have zero points of their own.
    pub(super) initial: AlignedVec<[i32; 8]>,
    /// `[rows]`
    pub(super) scales: Vec<f32>,
    /// Replaces all this where the processor has VNNI.
    #[cfg(target_arch = "x86_64")]
    pub(super) int8: vnni::Activations,
    pub(super) level: Level,
}

impl Activations {
    /// Makes room for `rows` rows.
    pub fn prepare(&mut self, rows: usize, weights: &Weights, format: Format) {
        let length = weights.blocks() * weights.block_size;
        let level = level();
        (self.rows, self.level) = (rows, level);
        #[cfg(target_arch = "x86_64")]
        if level >= Level::Vnni {
            let (planes, panels_from) = match format {
                Format::Int8 => (vnni::Planes::One, 1),
                Format::Int16 => (vnni::Planes::Two, vnni::panels_from(weights)),
                Format::Int16Listed => (vnni::Planes::Two, usize::MAX),
            };
            return self.int8.prepare(rows, weights, planes, panels_from);
        }
        // With many rows, packing the weights into panels pays.
        let panels_from = match format {
            Format::Int8 => 1,
            Format::Int16 => 8,
            Format::Int16Listed => usize::MAX,
        };
        self.in_panels = level >= Level::Avx2 && rows >= panels_from;
        self.order = if level == Level::Generic || self.in_panels { Order::Plain } else { Order::of(weights) };
        self.values.resize(rows * length, 0);
        self.sums.resize(rows * weights.blocks(), 0.0);
        self.initial.resize(rows * length.div_ceil(weights.span()), [0; 8]);
        self.scales.resize(rows, 0.0);
    }

    /// Makes room for the rows `x [rows, k]` and quantizes them on this thread.
    pub fn quantize(&mut self, x: &[f32], weights: &Weights, format: Format) {
        self.prepare(x.len() / weights.k, weights, format);
        let writer = self.writer();
        for (row, x) in x.chunks_exact(weights.k).enumerate() {
            // SAFETY: each row is quantized once, on this thread.
            unsafe { writer.quantize_row(row, x, weights) };
        }
    }

    /// How many rows one thread should quantize: those that share cache lines.
    pub fn rows_together(&self) -> usize {
        const FEW: usize = 16;
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Vnni {
            return FEW.next_multiple_of(self.int8.rows_in_a_tile());
        }
        FEW
    }

    /// Quantizes rows from several threads.
    pub fn writer(&mut self) -> RowWriter<'_> {
        RowWriter {
            order: self.order,
            values: SharedSlice::new(&mut self.values),
            sums: SharedSlice::new(&mut self.sums),
            initial: SharedSlice::new(&mut self.initial),
            scales: SharedSlice::new(&mut self.scales),
            level: self.level,
            #[cfg(target_arch = "x86_64")]
            int8: self.int8.writer(),
        }
    }

    /// An activation as quantized, without its scale.
    #[cfg(test)]
    pub(super) fn value(&self, row: usize, at: usize, length: usize) -> i32 {
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Vnni {
            return self.int8.value(row, at);
        }
        self.values[row * length + self.order.place(at)].into()
    }

    /// The scale of an activation.
    #[cfg(test)]
    pub(super) fn scale(&self, row: usize, _at: usize) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Vnni {
            return self.int8.scale(row, _at);
        }
        self.scales[row]
    }
}

/// The order of a row's activations, in which they meet the weights that are unpacked from one word.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Order {
    #[default]
    Plain,
    /// In each 64, every fourth from the first on, every fourth from the second on, …: 4-bit weights come four to two
    /// bytes.
    EveryFourth,
}

impl Order {
    /// The order for few rows of activations.
    fn of(w: &Weights) -> Order {
        match (w.bits, w.block_size) {
            (4, 32..) if (w.blocks() * w.block_size).is_multiple_of(64) => Order::EveryFourth,
            _ => Order::Plain,
        }
    }

    /// Where the activation at `at` is kept.
    fn place(self, at: usize) -> usize {
        match self {
            Order::Plain => at,
            Order::EveryFourth => at / 64 * 64 + at % 4 * 16 + at % 64 / 4,
        }
    }
}

/// Writes rows of [`Activations`] from several threads.
#[derive(Clone, Copy)]
pub struct RowWriter<'a> {
    order: Order,
    values: SharedSlice<'a, i16>,
    sums: SharedSlice<'a, f32>,
    initial: SharedSlice<'a, [i32; 8]>,
    scales: SharedSlice<'a, f32>,
    level: Level,
    #[cfg(target_arch = "x86_64")]
    int8: vnni::RowWriter<'a>,
}

impl RowWriter<'_> {
    /// Quantizes the row `x` for weights like those that the activations were prepared for.
    ///
    /// # Safety
    /// No other thread quantizes this row.
    pub unsafe fn quantize_row(self, row: usize, x: &[f32], weights: &Weights) {
        #[cfg(target_arch = "x86_64")]
        match self.level {
            // SAFETY: the processor supports the level in use; the caller promises that no other thread has the row.
            Level::Vnni | Level::Amx => return unsafe { self.int8.quantize_row(row, x, weights) },
            // SAFETY: the processor supports the level in use; the caller promises that no other thread has the row.
            Level::Avx2 => return unsafe { self.quantize_row_with_avx2(row, x, weights) },
            Level::Generic => {}
        }
        // SAFETY: the caller promises that no other thread has the row.
        unsafe { self.quantize_row_portably(row, x, weights) };
    }

    /// # Safety
    /// As for [`RowWriter::quantize_row`]; the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn quantize_row_with_avx2(self, row: usize, x: &[f32], weights: &Weights) {
        // SAFETY: the caller promises that no other thread has the row.
        unsafe { self.quantize_row_portably(row, x, weights) };
    }

    /// # Safety
    /// As for [`RowWriter::quantize_row`].
    #[inline(always)]
    unsafe fn quantize_row_portably(self, row: usize, x: &[f32], weights: &Weights) {
        let (blocks, size, span) = (weights.blocks(), weights.block_size, weights.span());
        let spans = (blocks * size).div_ceil(span);
        // SAFETY: the caller promises that no other thread has the row.
        let (values, sums, initial, scale) = unsafe {
            (
                self.values.slice_mut(row * blocks * size..(row + 1) * blocks * size),
                self.sums.slice_mut(row * blocks..(row + 1) * blocks),
                self.initial.slice_mut(row * spans..(row + 1) * spans),
                &mut self.scales.slice_mut(row..row + 1)[0],
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
        // NaN or infinity anywhere in the row makes all of its products NaN, as in float32.
        if x.iter().any(|x| !x.is_finite()) {
            *scale = f32::NAN;
        }
        let (filled, padding) = values.split_at_mut(x.len());
        for (value, x) in filled.iter_mut().zip(x) {
            *value = (x * inverse + ROUND_TO_INTEGER).to_bits() as i16;
        }
        padding.fill(0);
        let zero = weights.shared_zero_point();
        initial.fill([0; 8]);
        for (at, (sum, block)) in sums.iter_mut().zip(values.chunks_exact(size)).enumerate() {
            let exact = block.iter().map(|&value| i32::from(value)).sum::<i32>();
            *sum = exact as f32 * zero.unwrap_or(1) as f32;
            initial[at * size / span][at * size % span / size * 4] = -exact * zero.unwrap_or(0);
        }
        match self.order {
            Order::Plain => {}
            Order::EveryFourth => {
                for chunk in values.as_chunks_mut::<64>().0 {
                    let old = *chunk;
                    (0..64).for_each(|at| chunk[Order::EveryFourth.place(at)] = old[at]);
                }
            }
        }
    }
}
