//! The product with AVX-512 and VNNI, which multiplies bytes, four a lane, as fast as anything else is added. Activations of 16 bits
//! are two bytes each, `256 · high + low`, both with signs, so that nothing need be unpacked; those of 8 bits are one.
//!
//! # Design
//! Weights stay the codes that they are, without signs; what their zero point takes off the sums, these begin with. Of weights of 4
//! bits, 64 bytes hold 128 numbers: those at even places lie in the lower halves, and activations are kept in that order.
//! Activations have a scale for each span of 64 or 128 numbers, so that a few large ones cost the others no bits.

mod panels;
mod rows;

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Columns, Output, Weights};
use crate::kernels::aligned::Aligned;

/// From so many rows on the weights are brought into another order first.
const MANY: usize = 5;

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

/// How a matrix's rows are met by activations.
#[derive(Clone, Copy, Default)]
struct Layout {
    bits: usize,
    block_size: usize,
    blocks: usize,
    /// Numbers of a row's plane: whole spans.
    stride: usize,
    planes: Planes,
}

impl Layout {
    fn of(w: &Weights, planes: Planes) -> Layout {
        let (blocks, span) = (w.blocks(), span(w.bits, w.block_size));
        let stride = (blocks * w.block_size).next_multiple_of(span);
        Layout { bits: w.bits, block_size: w.block_size, blocks, stride, planes }
    }

    fn span(self) -> usize {
        span(self.bits, self.block_size)
    }

    fn spans(self) -> usize {
        self.stride / self.span()
    }

    /// Bytes of a row of activations.
    fn bytes(self) -> usize {
        self.stride * self.planes as usize
    }
}

/// The rows of activations, rounded.
#[derive(Default)]
pub struct Rounded {
    rows: usize,
    layout: Layout,
    /// `[rows, planes, stride]`: the high bytes first, then the low ones.
    numbers: Aligned<i8>,
    /// `[rows, spans]`: what the zero point that all blocks have in common takes off the sums of a span, in each block's first lane.
    starts: Aligned<[i32; 16]>,
    /// `[rows, blocks]`: the same, by blocks.
    offsets: Vec<i32>,
    /// `[rows, blocks]`: the sums of the activations as rounded, for zero points of the blocks' own.
    sums: Vec<f32>,
    /// `[rows, spans]`
    scales: Vec<f32>,
    /// `[rows]`: the Euclidean lengths of what the rows lost.
    errors: Vec<f32>,
}

impl Rounded {
    /// Makes room.
    pub fn prepare(&mut self, rows: usize, w: &Weights, planes: Planes) {
        let layout = Layout::of(w, planes);
        (self.rows, self.layout) = (rows, layout);
        self.numbers.resize(rows * layout.bytes(), 0);
        self.starts.resize(rows * layout.spans(), [0; 16]);
        self.offsets.resize(rows * layout.blocks, 0);
        self.sums.resize(rows * layout.blocks, 0.0);
        self.scales.resize(rows * layout.spans(), 0.0);
        self.errors.resize(rows, 0.0);
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
    pub fn number(&self, row: usize, at: usize) -> i32 {
        let Layout { stride, planes, bits, .. } = self.layout;
        let place = if bits == 4 { at / 128 * 128 + at % 2 * 64 + at % 128 / 2 } else { at };
        let planes = &self.numbers[row * self.layout.bytes()..][..stride * planes as usize];
        match planes.get(stride + place) {
            Some(&low) => i32::from(planes[place]) * 256 + i32::from(low),
            None => planes[place].into(),
        }
    }

    /// The scale of an activation.
    pub fn scale(&self, row: usize, at: usize) -> f32 {
        self.scales[row * self.layout.spans() + at / self.layout.span()]
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
        let Layout { bits, block_size, blocks, stride, planes } = self.layout;
        let (span, spans) = (self.layout.span(), self.layout.spans());
        assert!(
            x.len() == w.k && w.k <= stride && blocks == w.blocks() && bits == w.bits && block_size == w.block_size
        );
        // SAFETY: the row's part of each, which the caller has to itself.
        let (numbers, starts, offsets, sums, scales, error) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.numbers.add(row * self.layout.bytes()), self.layout.bytes()),
                std::slice::from_raw_parts_mut(self.starts.add(row * spans), spans),
                std::slice::from_raw_parts_mut(self.offsets.add(row * blocks), blocks),
                std::slice::from_raw_parts_mut(self.sums.add(row * blocks), blocks),
                std::slice::from_raw_parts_mut(self.scales.add(row * spans), spans),
                &mut *self.errors.add(row),
            )
        };
        let zero = w.same_zero_point().unwrap_or(0);
        starts.fill([0; 16]);
        offsets.fill(0);
        // Anything times zero is zero, but for what is not finite.
        let mut finite = _mm512_setzero_ps();
        let mut lost = _mm512_setzero_ps();
        for (at_span, scale) in scales.iter_mut().enumerate() {
            let all = at_span * span..(at_span + 1) * span;
            let sixteen = |at: usize| {
                let there = x.len().saturating_sub(at).min(16);
                // SAFETY: no more than there is.
                unsafe { _mm512_maskz_loadu_ps(((1_u32 << there) - 1) as u16, x.as_ptr().wrapping_add(at)) }
            };
            let mut largest = _mm512_setzero_ps();
            for at in all.clone().step_by(16) {
                let x = sixteen(at);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
                finite = _mm512_fmadd_ps(x, _mm512_setzero_ps(), finite);
            }
            let largest = _mm512_reduce_max_ps(largest);
            let inverse = planes.greatest() / largest;
            // Nothing, or too little to be told from it.
            let (inverse, of_one) =
                if inverse.is_finite() { (inverse, largest / planes.greatest()) } else { (0.0, 0.0) };
            *scale = of_one;
            for at in all.step_by(16) {
                let x = sixteen(at);
                let whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
                let off = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(of_one), x);
                lost = _mm512_fmadd_ps(off, off, lost);
                let sum = _mm512_reduce_add_epi32(whole);
                if let Some(offset) = offsets.get_mut(at / block_size) {
                    *offset += sum;
                }
                let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(whole));
                let high = _mm512_srai_epi32::<8>(_mm512_sub_epi32(whole, low));
                let to = numbers.as_mut_ptr();
                // SAFETY: sixteen numbers of a span, in the order for the weights.
                unsafe {
                    match planes {
                        Planes::One => store(bits, to, at, _mm512_cvtepi32_epi8(whole)),
                        Planes::Two => {
                            store(bits, to, at, _mm512_cvtepi32_epi8(high));
                            store(bits, to.add(stride), at, _mm512_cvtepi32_epi8(low));
                        }
                    }
                }
            }
        }
        for (block, (offset, sum)) in offsets.iter_mut().zip(sums).enumerate() {
            let at = block * block_size;
            *sum = *offset as f32 * scales[at / span];
            *offset *= -zero;
            // Lanes hold four bytes: of 4 bits eight numbers.
            starts[at / span][at % span % step(bits) / (step(bits) / 16)] += *offset;
        }
        *error = _mm512_reduce_add_ps(lost).sqrt() * 1.001;
        // As in float32, where all products of such a row are NaN.
        if _mm512_reduce_add_ps(finite) != 0.0 {
            scales.fill(f32::NAN);
        }
    }
}

/// Stores sixteen numbers of a plane from `at` on.
///
/// # Safety
/// The plane has room for whole spans, `at` is within it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn store(bits: usize, plane: *mut i8, at: usize, numbers: __m128i) {
    // SAFETY: the caller's.
    unsafe {
        if bits == 8 {
            return _mm_storeu_si128(plane.add(at).cast(), numbers);
        }
        // Even places, then odd ones.
        let order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        let parted = _mm_shuffle_epi8(numbers, order);
        let to = plane.add(at / 128 * 128 + at % 128 / 2);
        _mm_storel_epi64(to.cast(), parted);
        _mm_storel_epi64(to.add(64).cast(), _mm_unpackhi_epi64(parted, parted));
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
    macro_rules! of_size {
        ($($bits:literal, $size:literal;)*) => {
            match (bits, block_size) {
                $(($bits, $size) => product.of_size::<$bits, $size>(columns),)*
                other => unreachable!("weights of {other:?}"),
            }
        };
    }
    of_size!(8, 128; 8, 64; 8, 32; 8, 16; 4, 128; 4, 64; 4, 32; 4, 16;);
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
    fn of_size<const BITS: usize, const SIZE: usize>(&self, columns: Columns) {
        match (columns, self.x.layout.planes) {
            (Columns::All(columns), Planes::One) if self.rows.len() >= MANY => {
                panels::multiply::<BITS, SIZE, 1, 12, 8>(self, columns)
            }
            (Columns::All(columns), Planes::Two) if self.rows.len() >= MANY => {
                panels::multiply::<BITS, SIZE, 2, 6, 6>(self, columns)
            }
            (columns, Planes::One) => rows::multiply::<BITS, SIZE, 1>(self, columns),
            (columns, Planes::Two) => rows::multiply::<BITS, SIZE, 2>(self, columns),
        }
    }
}
