//! The product with AVX-512 and VNNI, which multiplies bytes, four a lane, as fast as anything else is added. Activations of 16 bits
//! are two bytes each, `256 · high + low`, both with signs, so that nothing need be unpacked; those of 8 bits are one.
//!
//! # Design
//! Weights stay the codes that they are, without signs; what their zero point takes off the sums, these begin with. Of weights of 4
//! bits, 64 bytes hold 128 numbers: those at even places lie in the lower halves, and activations are kept in that order.
//! Activations have a scale for each span of 64 or 128 numbers, so that a few large ones cost the others no bits. Where rows are many,
//! as many of them as are computed at a time lie four bytes by four beside each other. Where the processor has AMX too, many rows are for
//! that.

mod amx;
mod panels;
mod rows;

use std::arch::x86_64::*;
use std::num::NonZeroUsize;
use std::ops::Range;

use super::rough::along;
use super::{Columns, Output, Weights};
use crate::aligned::Aligned;
use crate::amx::SIDE;
use crate::avx512::mask;
use crate::processor::Level;

/// Bytes of activations that each number is rounded to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Planes {
    /// 8 bits.
    One = 1,
    /// 16 bits.
    #[default]
    Two = 2,
}

impl Planes {
    /// The greatest whole number that an activation is rounded to.
    fn greatest(self) -> f32 {
        match self {
            Planes::One => 127.0,
            // 127 · 256 + 127: more would not fit into two bytes with signs.
            Planes::Two => 32_639.0,
        }
    }
}

/// Numbers of weights in 64 bytes.
const fn step(bits: usize) -> usize {
    64 * 8 / bits
}

/// Numbers of activations that have a scale together.
const fn span(bits: usize, block_size: usize) -> usize {
    if bits == 8 && block_size < 128 { 64 } else { 128 }
}

/// In which order the numbers of a plane lie.
#[derive(Clone, Copy)]
enum Order {
    Plain,
    /// Those at even places before those at odd ones, 128 by 128: as weights of 4 bits come out of a register.
    Halves,
}

impl Order {
    const fn of(bits: usize) -> Order {
        if bits == 8 { Order::Plain } else { Order::Halves }
    }

    /// Where a number lies.
    const fn place(self, at: usize) -> usize {
        match self {
            Order::Plain => at,
            Order::Halves => at / 128 * 128 + at % 2 * 64 + at % 128 / 2,
        }
    }
}

/// Whether AMX is for so many rows.
pub fn is_by_amx(level: Level, rows: usize, w: &Weights) -> bool {
    amx::takes(level, w) && rows >= amx::MANY
}

/// From how many rows on it pays to bring them, or the weights, into another order first.
pub fn panels_from(level: Level, w: &Weights) -> usize {
    if amx::takes(level, w) { amx::MANY } else { panels::MANY }
}

/// How a matrix's rows are met by activations.
#[derive(Clone, Copy, Default)]
struct Layout {
    bits: usize,
    block_size: usize,
    blocks: usize,
    /// Numbers of a row's plane: whole spans.
    stride: usize,
    planes: Planes,
    /// Rows that lie beside each other, `[stride / 4, rows, planes, 4]`; none if each lies by itself, `[planes, stride]`.
    tile: Option<NonZeroUsize>,
    /// Whether these are for AMX: `[stride / 4, planes, rows, 4]`.
    is_for_amx: bool,
}

impl Layout {
    /// Of so many rows, which are to lie beside each other or not.
    fn of(level: Level, rows: usize, w: &Weights, planes: Planes, in_tiles: bool) -> Layout {
        let (blocks, span) = (w.blocks(), span(w.bits, w.block_size));
        let stride = (blocks * w.block_size).next_multiple_of(span);
        let is_for_amx = in_tiles && amx::takes(level, w);
        let tile = match in_tiles {
            true if is_for_amx => NonZeroUsize::new(SIDE),
            true => panels::tile_of(rows, planes),
            false => None,
        };
        Layout { bits: w.bits, block_size: w.block_size, blocks, stride, planes, tile, is_for_amx }
    }

    /// For AMX weights of 4 bits are unpacked in their order.
    fn order(self) -> Order {
        if self.is_for_amx { Order::Plain } else { Order::of(self.bits) }
    }

    /// Where a row's first plane begins, and how far apart its fours of numbers and its planes are.
    fn place(self, row: usize) -> [usize; 3] {
        let (planes, bytes) = (self.planes as usize, self.bytes());
        match self.tile.map(NonZeroUsize::get) {
            None => [row * bytes, 4, self.stride],
            Some(tile) if self.is_for_amx => [row / tile * tile * bytes + row % tile * 4, tile * planes * 4, tile * 4],
            Some(tile) => [row / tile * tile * bytes + row % tile * planes * 4, tile * planes * 4, 4],
        }
    }

    /// Where the first of a row's `count` scales, sums or offsets is, and how far apart they are: rows of a tile lie beside each other.
    fn item(self, row: usize, count: usize) -> [usize; 2] {
        match self.tile.map(NonZeroUsize::get) {
            None => [row * count, 1],
            Some(tile) => [row / tile * tile * count + row % tile, tile],
        }
    }

    #[inline]
    fn span(self) -> usize {
        span(self.bits, self.block_size)
    }

    #[inline]
    fn spans(self) -> usize {
        self.stride / self.span()
    }

    /// Rows that there is to be room for.
    #[inline]
    fn rows(self, rows: usize) -> usize {
        rows.next_multiple_of(self.tile.map_or(1, NonZeroUsize::get))
    }

    /// Bytes of a row of activations.
    #[inline]
    fn bytes(self) -> usize {
        self.stride * self.planes as usize
    }
}

/// The rows of activations, rounded.
#[derive(Default)]
pub struct Rounded {
    rows: usize,
    layout: Layout,
    /// See [`Layout::tile`]: the high bytes first, then the low ones.
    numbers: Aligned<i8>,
    /// `[rows, spans]`: what the zero point that all blocks have in common takes off the sums of a span, in each block's first lane; of
    /// rows by themselves alone.
    starts: Aligned<[i32; 16]>,
    /// `[rows, blocks]`, or `[blocks, rows]` of each tile: the same, by blocks.
    offsets: Vec<i32>,
    /// In the same order: the sums of the activations as rounded, for zero points of the blocks' own.
    sums: Vec<f32>,
    /// `[rows, spans]`, or `[spans, rows]` of each tile.
    scales: Vec<f32>,
    /// `[rows]`: the Euclidean lengths of what the rows lost.
    errors: Vec<f32>,
}

impl Rounded {
    /// Makes room. From `panels_from` rows on, which [`panels_from()`] makes worth while, whole panels of columns are computed.
    pub fn prepare(&mut self, level: Level, rows: usize, w: &Weights, planes: Planes, panels_from: usize) {
        let layout = Layout::of(level, rows, w, planes, rows >= panels_from);
        (self.rows, self.layout) = (rows, layout);
        let rows = layout.rows(rows);
        self.numbers.resize(rows * layout.bytes(), 0);
        self.starts.resize(if layout.tile.is_none() { rows * layout.spans() } else { 0 }, [0; 16]);
        self.offsets.resize(rows * layout.blocks, 0);
        self.sums.resize(rows * layout.blocks, 0.0);
        self.scales.resize(rows * layout.spans(), 0.0);
        self.errors.resize(rows, 0.0);
    }

    /// Rows that lie beside each other.
    pub fn rows_in_a_tile(&self) -> usize {
        self.layout.tile.map_or(1, NonZeroUsize::get)
    }

    /// Where rows are rounded into, from several threads.
    pub fn target(&mut self) -> Target {
        Target {
            layout: self.layout,
            numbers: self.numbers.as_mut_ptr(),
            starts: self.starts.as_mut_ptr(),
            offsets: self.offsets.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            errors: self.errors.as_mut_ptr(),
        }
    }

    /// How much of each row was lost: the Euclidean length of it.
    pub fn errors(&self) -> &[f32] {
        &self.errors
    }

    /// An activation as it was rounded, without its scale; for [`super::Product::at`].
    #[cfg(test)]
    pub fn number(&self, row: usize, at: usize) -> i32 {
        let place = self.layout.order().place(at);
        let [first, fours, planes] = self.layout.place(row);
        let first = first + place / 4 * fours + place % 4;
        match self.layout.planes {
            Planes::One => self.numbers[first].into(),
            Planes::Two => i32::from(self.numbers[first]) * 256 + i32::from(self.numbers[first + planes]),
        }
    }

    /// The scale of an activation.
    #[cfg(test)]
    pub fn scale(&self, row: usize, at: usize) -> f32 {
        let [first, apart] = self.layout.item(row, self.layout.spans());
        self.scales[first + at / self.layout.span() * apart]
    }
}

/// The memory of [`Rounded`].
#[derive(Clone, Copy)]
pub struct Target {
    layout: Layout,
    numbers: *mut i8,
    starts: *mut [i32; 16],
    offsets: *mut i32,
    sums: *mut f32,
    scales: *mut f32,
    errors: *mut f32,
}

// SAFETY: plain memory; who writes where is what `Target::round` asks its callers to see to.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// Rounds one row.
    ///
    /// # Safety
    /// The processor has AVX-512 and VNNI, what this came from lives and has room for the row, which no one else reads or writes
    /// meanwhile, and was prepared for these weights.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub unsafe fn round(self, row: usize, x: &[f32], w: &Weights) {
        // SAFETY: the caller's.
        unsafe {
            match self.layout.planes {
                Planes::One => self.round_to::<1>(row, x, w),
                Planes::Two => self.round_to::<2>(row, x, w),
            }
        }
    }

    /// # Safety
    /// As for [`Target::round`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn round_to<const PLANES: usize>(self, row: usize, x: &[f32], w: &Weights) {
        let Layout { bits, block_size, blocks, stride, planes, .. } = self.layout;
        let (span, spans, order) = (self.layout.span(), self.layout.spans(), self.layout.order());
        assert!(
            x.len() == w.k && w.k <= stride && blocks == w.blocks() && bits == w.bits && block_size == w.block_size
        );
        let [start, fours, apart] = self.layout.place(row);
        let ([first_block, next_block], [first_span, next_span]) =
            (self.layout.item(row, blocks), self.layout.item(row, spans));
        // SAFETY: the row's part of each, which the caller has to itself.
        let (numbers, starts, error) = unsafe {
            let starts = match self.layout.tile {
                None => std::slice::from_raw_parts_mut(self.starts.add(row * spans), spans),
                Some(_) => &mut [][..],
            };
            (self.numbers.add(start), starts, &mut *self.errors.add(row))
        };
        starts.fill([0; 16]);
        let zero = w.same_zero_point().unwrap_or(0);
        // Anything times zero is zero, but for what is not finite.
        let mut finite = _mm512_setzero_ps();
        let mut lost = _mm512_setzero_ps();
        // The products of the row with itself, and with what it is rounded to.
        let (mut square, mut met) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for at_span in 0..spans {
            let end = (at_span + 1) * span;
            let mut largest = _mm512_setzero_ps();
            let mut at = at_span * span;
            while at < end {
                let x = sixteen(x, at);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
                finite = _mm512_fmadd_ps(x, _mm512_setzero_ps(), finite);
                at += 16;
            }
            let largest = _mm512_reduce_max_ps(largest);
            let inverse = planes.greatest() / largest;
            // Nothing, or too little to be told from it.
            let (inverse, of_one) =
                if inverse.is_finite() { (inverse, largest / planes.greatest()) } else { (0.0, 0.0) };
            // SAFETY: one for each span.
            unsafe { *self.scales.add(first_span + at_span * next_span) = of_one };
            let mut at = at_span * span;
            let mut of_block = _mm512_setzero_si512();
            while at < end {
                let x = sixteen(x, at);
                let scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
                // What is not finite is no number here; the row's scales say so below.
                let within = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(scaled), _mm512_set1_ps(32_768.0));
                let whole = _mm512_maskz_cvtps_epi32(within, scaled);
                let off = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(of_one), x);
                lost = _mm512_fmadd_ps(off, off, lost);
                if PLANES == 1 {
                    square = _mm512_fmadd_ps(x, x, square);
                    met = _mm512_fmadd_ps(x, _mm512_sub_ps(x, off), met);
                }
                of_block = _mm512_add_epi32(of_block, whole);
                // SAFETY: sixteen numbers of a span, in the order for the weights.
                unsafe {
                    if PLANES == 1 {
                        store(order, numbers, fours, at, _mm512_cvtepi32_epi8(whole));
                    } else {
                        let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(whole));
                        let high = _mm512_srai_epi32::<8>(_mm512_sub_epi32(whole, low));
                        store(order, numbers, fours, at, _mm512_cvtepi32_epi8(high));
                        store(order, numbers.add(apart), fours, at, _mm512_cvtepi32_epi8(low));
                    }
                }
                at += 16;
                // Sizes of blocks are powers of two; beyond the last one there are zeros alone.
                if at & (block_size - 1) == 0 && at <= blocks * block_size {
                    let block = (at >> block_size.trailing_zeros()) - 1;
                    let sum = _mm512_reduce_add_epi32(of_block);
                    of_block = _mm512_setzero_si512();
                    // SAFETY: one for each block.
                    unsafe {
                        *self.sums.add(first_block + block * next_block) = sum as f32 * of_one;
                        *self.offsets.add(first_block + block * next_block) = -zero * sum;
                    }
                    // Lanes hold four bytes: of 4 bits eight numbers.
                    if let Some(start) = starts.get_mut(at_span) {
                        start[block * block_size % span % step(bits) / (step(bits) / 16)] -= zero * sum;
                    }
                }
            }
        }
        let lost = _mm512_reduce_add_ps(lost).sqrt() * 1.001;
        let (longer, more) = match PLANES {
            1 => along(_mm512_reduce_add_ps(square), _mm512_reduce_add_ps(met)),
            _ => (1.0, 0.0),
        };
        *error = lost + more;
        // All products of a row that is not finite are NaN, as in float32.
        let factor = if _mm512_reduce_add_ps(finite) == 0.0 { longer } else { f32::NAN };
        if factor != 1.0 {
            // SAFETY: one for each span and block.
            unsafe {
                for at_span in 0..spans {
                    *self.scales.add(first_span + at_span * next_span) *= factor;
                }
                for block in 0..blocks {
                    *self.sums.add(first_block + block * next_block) *= factor;
                }
            }
        }
    }
}

/// The sixteen numbers from `at` on, with zeros for those that are not there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sixteen(x: &[f32], at: usize) -> __m512 {
    // SAFETY: no more than there is.
    unsafe {
        if at + 16 <= x.len() {
            return _mm512_loadu_ps(x.as_ptr().add(at));
        }
        _mm512_maskz_loadu_ps(mask(x.len().saturating_sub(at)), x.as_ptr().wrapping_add(at))
    }
}

/// Stores sixteen numbers of a plane from `at` on, four by four `fours` bytes apart.
///
/// # Safety
/// The plane has room for whole spans, `at` is within it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn store(order: Order, plane: *mut i8, fours: usize, at: usize, numbers: __m128i) {
    let halves = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    let first = order.place(at);
    let (numbers, second) = match order {
        Order::Plain => (numbers, first + 8),
        Order::Halves => (_mm_shuffle_epi8(numbers, halves), first + 64),
    };
    // SAFETY: the caller's.
    unsafe {
        let [first, second] = [plane.add(first / 4 * fours), plane.add(second / 4 * fours)];
        if fours == 4 {
            _mm_storel_epi64(first.cast(), numbers);
            _mm_storel_epi64(second.cast(), _mm_unpackhi_epi64(numbers, numbers));
            return;
        }
        first.cast::<i32>().write_unaligned(_mm_extract_epi32::<0>(numbers));
        first.add(fours).cast::<i32>().write_unaligned(_mm_extract_epi32::<1>(numbers));
        second.cast::<i32>().write_unaligned(_mm_extract_epi32::<2>(numbers));
        second.add(fours).cast::<i32>().write_unaligned(_mm_extract_epi32::<3>(numbers));
    }
}

/// Computes these rows of these columns of the product.
///
/// # Safety
/// The processor has AVX-512 and VNNI, `x` was rounded for `w`, no one else writes these results meanwhile, and what `y` was made
/// from lives.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub unsafe fn multiply(
    x: &Rounded,
    w: &Weights,
    bias: Option<&[f32]>,
    (rows, columns): (Range<usize>, Columns),
    y: &Output,
) {
    let Layout { bits, block_size, blocks, .. } = x.layout;
    assert!(rows.end <= y.rows && x.rows == y.rows && bias.is_none_or(|bias| bias.len() == y.n), "sizes of a product");
    assert!(w.is_of(y.n) && (bits, block_size, blocks) == (w.bits, w.block_size, w.blocks()), "weights of a product");
    let product = Product { x, w, bias, rows, y };
    match (bits, block_size) {
        (8, 128) => product.of_span::<8, 128>(columns),
        (8, _) => product.of_span::<8, 64>(columns),
        _ => product.of_span::<4, 128>(columns),
    }
}

/// What is to be computed.
struct Product<'p> {
    x: &'p Rounded,
    w: &'p Weights<'p>,
    bias: Option<&'p [f32]>,
    rows: Range<usize>,
    /// To be written, in these rows, by no one else.
    y: &'p Output,
}

impl Product<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn of_span<const BITS: usize, const SPAN: usize>(&self, columns: Columns) {
        let Layout { planes, tile, is_for_amx, .. } = self.x.layout;
        match (columns, planes, tile.map_or(0, NonZeroUsize::get)) {
            (Columns::All(columns), Planes::One, _) if is_for_amx => amx::multiply::<BITS, 1>(self, columns),
            (Columns::All(columns), Planes::Two, _) if is_for_amx => amx::multiply::<BITS, 2>(self, columns),
            (columns, Planes::One, 0) => rows::multiply::<BITS, SPAN, 1>(self, columns),
            (columns, Planes::Two, 0) => rows::multiply::<BITS, SPAN, 2>(self, columns),
            (Columns::All(columns), Planes::One, 12) => panels::multiply::<BITS, 1, 12>(self, columns),
            (Columns::All(columns), Planes::One, 10) => panels::multiply::<BITS, 1, 10>(self, columns),
            (Columns::All(columns), Planes::One, 8) => panels::multiply::<BITS, 1, 8>(self, columns),
            (Columns::All(columns), Planes::One, 6) => panels::multiply::<BITS, 1, 6>(self, columns),
            (Columns::All(columns), Planes::Two, 6) => panels::multiply::<BITS, 2, 6>(self, columns),
            (Columns::All(columns), Planes::Two, 5) => panels::multiply::<BITS, 2, 5>(self, columns),
            (Columns::All(columns), Planes::Two, 4) => panels::multiply::<BITS, 2, 4>(self, columns),
            (_, planes, tile) => unreachable!("tiles of {tile} rows of {planes:?}"),
        }
    }
}
