//! The matrix multiplication with AVX-512 VNNI, which multiplies int8, four per lane, at the throughput of an addition.
//! 16-bit activations are two planes of int8, `256 · high + low`, both signed, so that nothing has to be unpacked;
//! 8-bit activations are one plane.
//!
//! # Design
//! Weights stay the unsigned codes that they are; accumulators start at what the zero point subtracts. Of 4-bit
//! weights, 64 bytes hold 128 codes: those at even places in the low halves, and activations are kept in that order.
//! Activations have a scale per span of 64 or 128, so that a few large ones cost the others no precision. Where rows
//! are many, the rows of a tile are interleaved, four bytes of each. Where the processor has AMX too, that takes many
//! rows.

mod activations;
mod amx;
mod layout;
mod panels;
mod rows;

use std::num::NonZeroUsize;
use std::ops::Range;

pub use activations::{Activations, LengthCorrection, RowWriter};
pub use layout::Planes;

use super::{Columns, Output, Weights};
use layout::Layout;

/// Whether AMX is used for this many rows.
pub fn uses_amx(rows: usize, w: &Weights) -> bool {
    amx::token_for(w).is_some() && rows >= amx::MANY
}

/// From how many rows on it pays to interleave them, for AMX or for panels of weights.
pub fn panels_from(w: &Weights) -> usize {
    if amx::token_for(w).is_some() { amx::MANY } else { panels::MANY }
}

/// Computes these rows of these columns of `y = x · wᵀ + bias`.
///
/// # Safety
/// The processor has AVX-512 VNNI, and no other thread reads or writes these results meanwhile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub unsafe fn multiply(
    x: &Activations,
    w: &Weights,
    bias: Option<&[f32]>,
    rows: Range<usize>,
    columns: Columns,
    y: &Output,
) {
    let Layout { bits, block_size, blocks, .. } = x.layout;
    let fits = rows.end <= y.rows && x.rows == y.rows && bias.is_none_or(|bias| bias.len() == y.n);
    assert!(fits, "sizes of a matrix multiplication");
    let is_prepared = (bits, block_size, blocks) == (w.bits, w.block_size, w.blocks());
    assert!(w.has_rows(y.n) && is_prepared, "weights like those that the activations were prepared for");
    let operands = Operands { x, w, bias, rows, y };
    match (bits, block_size) {
        (8, 128) => operands.multiply_spans::<8, 128>(columns),
        (8, _) => operands.multiply_spans::<8, 64>(columns),
        _ => operands.multiply_spans::<4, 128>(columns),
    }
}

/// The part to compute: some rows of a product.
struct Operands<'p> {
    x: &'p Activations,
    w: &'p Weights<'p>,
    bias: Option<&'p [f32]>,
    rows: Range<usize>,
    y: &'p Output<'p>,
}

impl Operands<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn multiply_spans<const BITS: usize, const SPAN: usize>(&self, columns: Columns) {
        let Layout { planes, tile, amx, .. } = self.x.layout;
        match (columns, planes, tile.map_or(0, NonZeroUsize::get), amx) {
            (Columns::Range(columns), Planes::One, _, Some(token)) => amx::multiply::<BITS, 1>(self, columns, token),
            (Columns::Range(columns), Planes::Two, _, Some(token)) => amx::multiply::<BITS, 2>(self, columns, token),
            (columns, Planes::One, 0, _) => rows::multiply::<BITS, SPAN, 1>(self, columns),
            (columns, Planes::Two, 0, _) => rows::multiply::<BITS, SPAN, 2>(self, columns),
            (Columns::Range(columns), Planes::One, 12, _) => panels::multiply::<BITS, 1, 12>(self, columns),
            (Columns::Range(columns), Planes::One, 10, _) => panels::multiply::<BITS, 1, 10>(self, columns),
            (Columns::Range(columns), Planes::One, 8, _) => panels::multiply::<BITS, 1, 8>(self, columns),
            (Columns::Range(columns), Planes::One, 6, _) => panels::multiply::<BITS, 1, 6>(self, columns),
            (Columns::Range(columns), Planes::Two, 6, _) => panels::multiply::<BITS, 2, 6>(self, columns),
            (Columns::Range(columns), Planes::Two, 5, _) => panels::multiply::<BITS, 2, 5>(self, columns),
            (Columns::Range(columns), Planes::Two, 4, _) => panels::multiply::<BITS, 2, 4>(self, columns),
            (_, planes, tile, _) => unreachable!("tiles of {tile} rows of {planes:?}"),
        }
    }
}
