//! `Activations`: rows quantized to one or two planes of int8, with a scale for each span.

use std::arch::x86_64::*;
use std::num::NonZeroUsize;

use super::super::Weights;
use super::layout::{Layout, Order, Planes, RowPlace, step};
use crate::aligned::AlignedVec;
use crate::avx512::first_lanes;
use crate::parallel::SharedSlice;

/// Quantized rows of activations.
#[derive(Default)]
pub struct Activations {
    pub(super) rows: usize,
    pub(super) layout: Layout,
    /// See [`Layout::tile`].
    pub(super) values: AlignedVec<i8>,
    /// `[rows, spans]`: the initial accumulators of a span, in the first lane of each block what the zero point that
    /// all blocks share subtracts; only for rows that are not interleaved.
    pub(super) initial: AlignedVec<[i32; 16]>,
    /// `[rows, blocks]`, or `[blocks, rows]` of each tile: the same by blocks.
    pub(super) offsets: Vec<i32>,
    /// In the same order: the sums of the quantized activations, for blocks with zero points of their own.
    pub(super) sums: Vec<f32>,
    /// `[rows, spans]`, or `[spans, rows]` of each tile.
    pub(super) scales: Vec<f32>,
    /// `[rows]`: the Euclidean norms of the quantization errors.
    errors: Vec<f32>,
}

impl Activations {
    /// Makes room for `rows` rows. From `panels_from` rows on, see [`panels_from()`](super::panels_from), they are
    /// interleaved, and products are computed in whole panels of columns.
    pub fn prepare(&mut self, rows: usize, w: &Weights, planes: Planes, panels_from: usize) {
        let layout = if rows >= panels_from { Layout::tiled(rows, w, planes) } else { Layout::row_by_row(w, planes) };
        (self.rows, self.layout) = (rows, layout);
        let rows = layout.padded_rows(rows);
        self.values.resize(rows * layout.row_bytes(), 0);
        self.initial.resize(if layout.tile.is_none() { rows * layout.spans() } else { 0 }, [0; 16]);
        self.offsets.resize(rows * layout.blocks, 0);
        self.sums.resize(rows * layout.blocks, 0.0);
        self.scales.resize(rows * layout.spans(), 0.0);
        self.errors.resize(rows, 0.0);
    }

    /// Rows that are interleaved.
    pub fn rows_in_a_tile(&self) -> usize {
        self.layout.tile.map_or(1, NonZeroUsize::get)
    }

    /// Quantizes rows from several threads.
    pub fn writer(&mut self) -> RowWriter<'_> {
        RowWriter {
            layout: self.layout,
            values: SharedSlice::new(&mut self.values),
            initial: SharedSlice::new(&mut self.initial),
            offsets: SharedSlice::new(&mut self.offsets),
            sums: SharedSlice::new(&mut self.sums),
            scales: SharedSlice::new(&mut self.scales),
            errors: SharedSlice::new(&mut self.errors),
        }
    }

    /// `[rows]`: the Euclidean norms of the quantization errors.
    pub fn errors(&self) -> &[f32] {
        &self.errors
    }

    /// An activation as quantized, without its scale.
    #[cfg(test)]
    pub fn value(&self, row: usize, at: usize) -> i32 {
        let place = self.layout.order().place(at);
        let RowPlace { first, four_stride, plane_stride } = self.layout.row_place(row);
        let first = first + place / 4 * four_stride + place % 4;
        match self.layout.planes {
            Planes::One => self.values[first].into(),
            Planes::Two => i32::from(self.values[first]) * 256 + i32::from(self.values[first + plane_stride]),
        }
    }

    /// The scale of an activation.
    #[cfg(test)]
    pub fn scale(&self, row: usize, at: usize) -> f32 {
        let place = self.layout.item_place(row, self.layout.spans());
        self.scales[place.first + at / self.layout.span() * place.stride]
    }
}

/// Makes up for a row that quantization has made longer or shorter. 8 bits are so few that this happens, and it moves
/// all great results the same way, and the sum of their exponentials with them.
pub struct LengthCorrection {
    /// Multiplies the row's scales.
    pub factor: f32,
    /// How much further the corrected row may be from the original.
    pub error: f32,
}

impl LengthCorrection {
    /// For a row with this squared norm and this dot product with its quantized self.
    #[inline(always)]
    pub fn of(square: f32, dot: f32) -> LengthCorrection {
        let factor = square / dot;
        // Zeros, NaN and infinities are not corrected.
        if (0.9..1.1).contains(&factor) {
            LengthCorrection { factor, error: (factor - 1.0).abs() * square.sqrt() * 1.1 }
        } else {
            LengthCorrection { factor: 1.0, error: 0.0 }
        }
    }
}

/// Writes rows of [`Activations`] from several threads.
#[derive(Clone, Copy)]
pub struct RowWriter<'a> {
    layout: Layout,
    values: SharedSlice<'a, i8>,
    initial: SharedSlice<'a, [i32; 16]>,
    offsets: SharedSlice<'a, i32>,
    sums: SharedSlice<'a, f32>,
    scales: SharedSlice<'a, f32>,
    errors: SharedSlice<'a, f32>,
}

impl RowWriter<'_> {
    /// Quantizes the row `x` for weights like those that the activations were prepared for.
    ///
    /// # Safety
    /// The processor has AVX-512 VNNI, and no other thread quantizes this row.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub unsafe fn quantize_row(self, row: usize, x: &[f32], w: &Weights) {
        // SAFETY: the caller promises that no other thread has the row.
        unsafe {
            match self.layout.planes {
                Planes::One => self.quantize_row_to::<1>(row, x, w),
                Planes::Two => self.quantize_row_to::<2>(row, x, w),
            }
        }
    }

    /// # Safety
    /// As for [`RowWriter::quantize_row`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn quantize_row_to<const PLANES: usize>(self, row: usize, x: &[f32], w: &Weights) {
        let Layout { bits, block_size, blocks, stride, planes, .. } = self.layout;
        let (span, spans, order) = (self.layout.span(), self.layout.spans(), self.layout.order());
        assert!(
            x.len() == w.k && w.k <= stride && blocks == w.blocks() && bits == w.bits && block_size == w.block_size
        );
        let RowPlace { first, four_stride, plane_stride } = self.layout.row_place(row);
        let blocks_of_row = self.layout.item_place(row, blocks);
        let spans_of_row = self.layout.item_place(row, spans);
        // SAFETY: the caller promises that no other thread has the row. That it is there, the range of its error is
        // checked for, and with it there are all the places of `layout`.
        let (values, offsets, sums, scales, initial, error) = unsafe {
            let error = &mut self.errors.slice_mut(row..row + 1)[0];
            let initial = match self.layout.tile {
                None => self.initial.slice_mut(row * spans..(row + 1) * spans),
                Some(_) => &mut [][..],
            };
            let offsets = self.offsets.as_mut_ptr().add(blocks_of_row.first);
            let sums = self.sums.as_mut_ptr().add(blocks_of_row.first);
            let scales = self.scales.as_mut_ptr().add(spans_of_row.first);
            (self.values.as_mut_ptr().add(first), offsets, sums, scales, initial, error)
        };
        initial.fill([0; 16]);
        let zero = w.shared_zero_point().unwrap_or(0);
        // x · 0 is 0 unless x is NaN or infinite.
        let mut not_finite = _mm512_setzero_ps();
        let mut squared_error = _mm512_setzero_ps();
        // The dot products of the row with itself, and with its quantized self.
        let (mut square, mut dot) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for at_span in 0..spans {
            let end = (at_span + 1) * span;
            let mut largest = _mm512_setzero_ps();
            let mut at = at_span * span;
            while at < end {
                let x = load_padded(x, at);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
                not_finite = _mm512_fmadd_ps(x, _mm512_setzero_ps(), not_finite);
                at += 16;
            }
            let largest = _mm512_reduce_max_ps(largest);
            let inverse = planes.greatest() / largest;
            // The span is zero, or too small for its inverse.
            let (inverse, scale) =
                if inverse.is_finite() { (inverse, largest / planes.greatest()) } else { (0.0, 0.0) };
            // SAFETY: the row has a scale for each span.
            unsafe { *scales.add(at_span * spans_of_row.stride) = scale };
            let mut at = at_span * span;
            let mut block_sum = _mm512_setzero_si512();
            while at < end {
                let x = load_padded(x, at);
                let scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
                // NaN and infinity become 0 here; the row's scales become NaN below.
                let in_range = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(scaled), _mm512_set1_ps(32_768.0));
                let rounded = _mm512_maskz_cvtps_epi32(in_range, scaled);
                let lost = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), _mm512_set1_ps(scale), x);
                squared_error = _mm512_fmadd_ps(lost, lost, squared_error);
                if PLANES == 1 {
                    square = _mm512_fmadd_ps(x, x, square);
                    dot = _mm512_fmadd_ps(x, _mm512_sub_ps(x, lost), dot);
                }
                block_sum = _mm512_add_epi32(block_sum, rounded);
                // SAFETY: the planes have room for whole spans.
                unsafe {
                    if PLANES == 1 {
                        store(order, values, four_stride, at, _mm512_cvtepi32_epi8(rounded));
                    } else {
                        let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(rounded));
                        let high = _mm512_srai_epi32::<8>(_mm512_sub_epi32(rounded, low));
                        store(order, values, four_stride, at, _mm512_cvtepi32_epi8(high));
                        store(order, values.add(plane_stride), four_stride, at, _mm512_cvtepi32_epi8(low));
                    }
                }
                at += 16;
                // Block sizes are powers of two; behind the last block there are only zeros.
                if at & (block_size - 1) == 0 && at <= blocks * block_size {
                    let block = (at >> block_size.trailing_zeros()) - 1;
                    let sum = _mm512_reduce_add_epi32(block_sum);
                    block_sum = _mm512_setzero_si512();
                    // SAFETY: the row has a sum and an offset for each block.
                    unsafe {
                        *sums.add(block * blocks_of_row.stride) = sum as f32 * scale;
                        *offsets.add(block * blocks_of_row.stride) = -zero * sum;
                    }
                    // A lane holds four bytes: eight 4-bit codes.
                    if let Some(initial) = initial.get_mut(at_span) {
                        initial[block * block_size % span % step(bits) / (step(bits) / 16)] -= zero * sum;
                    }
                }
            }
        }
        let norm_of_error = _mm512_reduce_add_ps(squared_error).sqrt() * 1.001;
        let correction = match PLANES {
            1 => LengthCorrection::of(_mm512_reduce_add_ps(square), _mm512_reduce_add_ps(dot)),
            _ => LengthCorrection { factor: 1.0, error: 0.0 },
        };
        *error = norm_of_error + correction.error;
        // NaN or infinity anywhere in the row makes all of its products NaN, as in float32.
        let factor = if _mm512_reduce_add_ps(not_finite) == 0.0 { correction.factor } else { f32::NAN };
        if factor != 1.0 {
            // SAFETY: the row has a scale for each span and a sum for each block.
            unsafe {
                for at_span in 0..spans {
                    *scales.add(at_span * spans_of_row.stride) *= factor;
                }
                for block in 0..blocks {
                    *sums.add(block * blocks_of_row.stride) *= factor;
                }
            }
        }
    }
}

/// Sixteen activations from `at` on, padded with zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn load_padded(x: &[f32], at: usize) -> __m512 {
    // SAFETY: sixteen numbers are there, or the mask leaves out those that are not.
    unsafe {
        if at + 16 <= x.len() {
            return _mm512_loadu_ps(x.as_ptr().add(at));
        }
        _mm512_maskz_loadu_ps(first_lanes(x.len().saturating_sub(at)), x.as_ptr().wrapping_add(at))
    }
}

/// Stores the sixteen activations at `at` of a plane, in which fours are `four_stride` bytes apart.
///
/// # Safety
/// The plane has room for whole spans, and `at` is within it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn store(order: Order, plane: *mut i8, four_stride: usize, at: usize, values: __m128i) {
    let even_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    let first = order.place(at);
    let (values, second) = match order {
        Order::Plain => (values, first + 8),
        Order::EvenOdd => (_mm_shuffle_epi8(values, even_odd), first + 64),
    };
    // SAFETY: the caller promises room for the span that `at` is in.
    unsafe {
        let [first, second] = [plane.add(first / 4 * four_stride), plane.add(second / 4 * four_stride)];
        if four_stride == 4 {
            _mm_storel_epi64(first.cast(), values);
            _mm_storel_epi64(second.cast(), _mm_unpackhi_epi64(values, values));
            return;
        }
        first.cast::<i32>().write_unaligned(_mm_extract_epi32::<0>(values));
        first.add(four_stride).cast::<i32>().write_unaligned(_mm_extract_epi32::<1>(values));
        second.cast::<i32>().write_unaligned(_mm_extract_epi32::<2>(values));
        second.add(four_stride).cast::<i32>().write_unaligned(_mm_extract_epi32::<3>(values));
    }
}
