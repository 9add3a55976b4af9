//! `Layout`: how rows of int8 activations are arranged in memory for the kernel that will multiply them.

use std::num::NonZeroUsize;

use super::super::Weights;
use super::{amx, panels};
use crate::amx::SIDE;
use crate::isa::AmxToken;

/// The planes of int8 that an activation is quantized to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Planes {
    /// 8 bits.
    One = 1,
    /// 16 bits: high bytes, then low bytes.
    #[default]
    Two = 2,
}

impl Planes {
    /// The greatest integer that an activation is rounded to.
    pub fn greatest(self) -> f32 {
        match self {
            Planes::One => 127.0,
            // 127 · 256 + 127: more would not fit into two signed bytes.
            Planes::Two => 32_639.0,
        }
    }
}

/// Weights in 64 bytes.
pub const fn step(bits: usize) -> usize {
    64 * 8 / bits
}

/// Activations that share a scale.
const fn span(bits: usize, block_size: usize) -> usize {
    if bits == 8 && block_size < 128 { 64 } else { 128 }
}

/// The order of the activations of a plane.
#[derive(Clone, Copy)]
pub enum Order {
    Plain,
    /// In each 128, the even ones before the odd ones: as 4-bit weights come out of a register.
    EvenOdd,
}

impl Order {
    pub const fn of(bits: usize) -> Order {
        if bits == 8 { Order::Plain } else { Order::EvenOdd }
    }

    /// Where the activation at `at` is kept.
    pub const fn place(self, at: usize) -> usize {
        match self {
            Order::Plain => at,
            Order::EvenOdd => at / 128 * 128 + at % 2 * 64 + at % 128 / 2,
        }
    }
}

/// The arrangement of rows of activations.
#[derive(Clone, Copy, Default)]
pub struct Layout {
    pub bits: usize,
    pub block_size: usize,
    pub blocks: usize,
    /// Length of a row of a plane: whole spans.
    pub stride: usize,
    pub planes: Planes,
    /// Rows that are interleaved, `[stride / 4, rows, planes, 4]`; without it each row is `[planes, stride]`.
    pub tile: Option<NonZeroUsize>,
    /// For AMX, tiles are `[stride / 4, planes, rows, 4]`.
    pub amx: Option<AmxToken>,
}

/// Where a row's activations are.
pub struct RowPlace {
    /// The first of its first plane.
    pub first: usize,
    /// From four activations to the next four.
    pub four_stride: usize,
    /// From a plane to the next.
    pub plane_stride: usize,
}

/// Where a row's scales, sums or offsets are.
pub struct ItemPlace {
    pub first: usize,
    pub stride: usize,
}

impl Layout {
    /// Rows that are not interleaved.
    pub fn row_by_row(w: &Weights, planes: Planes) -> Layout {
        let (blocks, span) = (w.blocks(), span(w.bits, w.block_size));
        let stride = (blocks * w.block_size).next_multiple_of(span);
        Layout { bits: w.bits, block_size: w.block_size, blocks, stride, planes, tile: None, amx: None }
    }

    /// Interleaved rows, in tiles that suit `rows` rows.
    pub fn tiled(rows: usize, w: &Weights, planes: Planes) -> Layout {
        let amx = amx::token_for(w);
        let tile = match amx {
            Some(_) => NonZeroUsize::new(SIDE),
            None => panels::tile_height(rows, planes),
        };
        Layout { tile, amx, ..Layout::row_by_row(w, planes) }
    }

    /// AMX unpacks 4-bit weights in their order.
    pub fn order(self) -> Order {
        if self.amx.is_some() { Order::Plain } else { Order::of(self.bits) }
    }

    pub fn row_place(self, row: usize) -> RowPlace {
        let (planes, bytes) = (self.planes as usize, self.row_bytes());
        match self.tile.map(NonZeroUsize::get) {
            None => RowPlace { first: row * bytes, four_stride: 4, plane_stride: self.stride },
            Some(tile) if self.amx.is_some() => {
                let first = row / tile * tile * bytes + row % tile * 4;
                RowPlace { first, four_stride: tile * planes * 4, plane_stride: tile * 4 }
            }
            Some(tile) => {
                let first = row / tile * tile * bytes + row % tile * planes * 4;
                RowPlace { first, four_stride: tile * planes * 4, plane_stride: 4 }
            }
        }
    }

    /// Where the `count` items of a row are: those of a tile's rows are interleaved.
    pub fn item_place(self, row: usize, count: usize) -> ItemPlace {
        match self.tile.map(NonZeroUsize::get) {
            None => ItemPlace { first: row * count, stride: 1 },
            Some(tile) => ItemPlace { first: row / tile * tile * count + row % tile, stride: tile },
        }
    }

    #[inline]
    pub fn span(self) -> usize {
        span(self.bits, self.block_size)
    }

    #[inline]
    pub fn spans(self) -> usize {
        self.stride / self.span()
    }

    /// `rows`, rounded up to whole tiles.
    #[inline]
    pub fn padded_rows(self, rows: usize) -> usize {
        rows.next_multiple_of(self.tile.map_or(1, NonZeroUsize::get))
    }

    /// Bytes of a row of activations.
    #[inline]
    pub fn row_bytes(self) -> usize {
        self.stride * self.planes as usize
    }
}
