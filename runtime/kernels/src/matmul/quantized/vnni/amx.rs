//! Many rows with AMX, whose instruction multiplies sixteen columns of weights by sixteen rows of activations, 64 bytes
//! of each.
//!
//! # Design
//! Weights are the first operand, whose tiles are loaded from memory with a stride: none have to be packed, but 4-bit
//! weights are unpacked. Sums come column by column, and are transposed before they are written. Reading back a stored
//! tile has a long latency, so a few blocks are multiplied before their sums are added up: as integers, with the same
//! results as panels have.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::Weights;
use super::Operands;
use crate::amx::{SIDE, TileConfig, WIDTH};
use crate::avx512::{first_lanes, transpose_pitched};
use crate::isa::AmxToken;

/// Minimum number of rows for which AMX is faster than the kernel for few rows.
pub const MANY: usize = 2;

/// Blocks that are multiplied before their sums are added up.
const BLOCKS_TOGETHER: usize = 4;

/// The token for AMX, if the processor has it and it is faster for these weights: adding up the sums of many small
/// blocks takes longer than anything else.
pub fn token_for(w: &Weights) -> Option<AmxToken> {
    AmxToken::new().filter(|_| w.block_size.is_multiple_of(WIDTH))
}

/// A stored tile of sums, `[columns, rows]`.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct TileSums {
    _sums: [MaybeUninit<i32>; SIDE * SIDE],
}

impl TileSums {
    const UNINIT: TileSums = TileSums { _sums: [MaybeUninit::uninit(); SIDE * SIDE] };
}

/// A row of a tile.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; WIDTH]);

/// Computes these columns of the product's rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn multiply<const BITS: usize, const PLANES: usize>(operands: &Operands, columns: Range<usize>, token: AmxToken) {
    let Operands { w, rows, y, .. } = operands;
    assert!(columns.end <= y.n && rows.start.is_multiple_of(SIDE), "rows and columns of a matrix multiplication");
    if columns.is_empty() {
        return;
    }
    let config = TileConfig::load(token);
    // While some columns are multiplied the next are copied: loading a tile stalls on what was just stored.
    let mut operand = [TileColumns::new(w), TileColumns::new(w)];
    let columns_from = |first: usize| first..columns.end.min(first + SIDE);
    operand[0].load::<BITS>(w, columns_from(columns.start));
    for (at, first) in columns.clone().step_by(SIDE).enumerate() {
        if first + SIDE < columns.end {
            operand[(at + 1) % 2].load::<BITS>(w, columns_from(first + SIDE));
        }
        let columns = columns_from(first);
        for row in rows.clone().step_by(SIDE) {
            let area =
                TileArea { rows: row..rows.end.min(row + SIDE), columns: columns.clone(), is_first: row == rows.start };
            multiply_tile::<PLANES>(operands, &operand[at % 2], area, &config);
        }
    }
}

/// A part of the result that is computed in one go.
struct TileArea {
    rows: Range<usize>,
    columns: Range<usize>,
    /// Whether these are the first rows that are computed of the columns.
    is_first: bool,
}

/// Sixteen columns of weights as 8-bit codes; columns beyond the last hold arbitrary codes.
struct TileColumns {
    /// The codes of the first column, and the bytes from one column to the next.
    codes: *const u8,
    pitch: usize,
    scales: *const f32,
    /// `[blocks, columns]`: scales times zero points, where blocks have these of their own.
    zeros: Vec<[f32; SIDE]>,
    /// The codes of the next sixteen columns, which need not exist, to be prefetched, and the bytes from one column to
    /// the next; 0 if they have been prefetched.
    later: *const u8,
    later_pitch: usize,
    /// Holds codes that cannot be loaded in place.
    copied: Vec<Line>,
    copied_scales: Vec<f32>,
}

impl TileColumns {
    /// No columns yet.
    fn new(w: &Weights) -> TileColumns {
        TileColumns {
            codes: std::ptr::null(),
            pitch: 0,
            scales: std::ptr::null(),
            zeros: if w.zero_points.is_some() { vec![[0.0; SIDE]; w.blocks()] } else { Vec::new() },
            later: std::ptr::null(),
            later_pitch: 0,
            copied: Vec::new(),
            copied_scales: Vec::new(),
        }
    }

    /// Takes these columns, at most sixteen.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn load<const BITS: usize>(&mut self, w: &Weights, columns: Range<usize>) {
        let (blocks, length, bytes) = (w.blocks(), w.blocks() * w.block_size, w.row_bytes());
        assert!(w.bits == BITS && bytes * 8 == length * BITS && !columns.is_empty() && columns.len() <= SIDE);
        let codes = &w.codes[columns.start * bytes..columns.end * bytes];
        let scales = &w.scales[columns.start * blocks..columns.end * blocks];
        let later = w.codes.as_ptr().wrapping_add(columns.end * bytes);
        for block in 0..self.zeros.len() {
            for at in 0..columns.len() {
                let zero = w.zero_point(columns.start + at, block) as f32;
                self.zeros[block][at] = scales[at * blocks + block] * zero;
            }
        }
        (self.codes, self.pitch, self.scales) = (codes.as_ptr(), length, scales.as_ptr());
        (self.later, self.later_pitch) = (later, bytes);
        if BITS == 4 || columns.len() < SIDE {
            // One line more, so that not all columns fall into the same sets of the L1 cache.
            let lines = length.div_ceil(WIDTH) + 1;
            self.copied.resize(SIDE * lines, Line([0; WIDTH]));
            for at in 0..columns.len() {
                let (from, to) = (&codes[at * bytes..(at + 1) * bytes], &mut self.copied[at * lines..(at + 1) * lines]);
                if BITS == 4 {
                    unpack_nibbles(from, to, later.wrapping_add(at * bytes));
                } else {
                    for (to, from) in to.iter_mut().zip(from.chunks(WIDTH)) {
                        to.0[..from.len()].copy_from_slice(from);
                    }
                }
            }
            (self.codes, self.pitch, self.later_pitch) = (self.copied.as_ptr().cast(), lines * WIDTH, 0);
        }
        if columns.len() < SIDE {
            self.copied_scales.resize(SIDE * blocks, 0.0);
            self.copied_scales[..scales.len()].copy_from_slice(scales);
            self.scales = self.copied_scales.as_ptr();
        }
    }
}

/// Unpacks 4-bit codes to bytes, while as many bytes from `later` on are prefetched.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn unpack_nibbles(codes: &[u8], to: &mut [Line], later: *const u8) {
    /// Bytes of codes that make a line.
    const HALF: usize = WIDTH / 2;
    let lines = codes.len().div_ceil(HALF);
    assert!(to.len() >= lines, "room for unpacked codes");
    let low_nibbles = _mm512_set1_epi8(15);
    for line in 0..lines {
        let left = codes.len() - line * HALF;
        // SAFETY: no more codes are read than there are; the assertion above keeps the lines within `to`.
        unsafe {
            let from = codes.as_ptr().add(line * HALF);
            let pairs = match left {
                HALF.. => _mm256_loadu_si256(from.cast()),
                _ => _mm256_maskz_loadu_epi8((1_u32 << left) - 1, from.cast()),
            };
            let words = _mm512_cvtepu8_epi16(pairs);
            let codes = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16::<4>(words)), low_nibbles);
            _mm512_store_si512(to.as_mut_ptr().add(line).cast(), codes);
            // A hint, for which any address will do.
            _mm_prefetch::<_MM_HINT_T1>(later.wrapping_add(line * HALF).cast());
        }
    }
}

/// Computes at most sixteen rows of sixteen columns.
#[expect(clippy::needless_range_loop, reason = "whether iterators are inlined is up to the compiler")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply_tile<const PLANES: usize>(
    Operands { x, w, bias, y, .. }: &Operands,
    operand: &TileColumns,
    area: TileArea,
    config: &TileConfig,
) {
    let (row, layout, size) = (area.rows.start, x.layout, w.block_size);
    let (stride, blocks, spans, span) = (layout.stride, layout.blocks, layout.spans(), layout.span());
    let padded_rows = layout.padded_rows(x.rows);
    // All unchecked accesses below stay within these bounds.
    assert!(
        row.is_multiple_of(SIDE) && row + SIDE <= padded_rows && area.rows.end <= y.rows && area.columns.end <= y.n
    );
    assert!(x.values.len() == padded_rows * stride * PLANES && blocks * size <= stride);
    assert!(operand.pitch >= blocks * size);
    assert!(x.offsets.len() == padded_rows * blocks && x.scales.len() == padded_rows * spans);
    assert!(x.sums.len() == x.offsets.len());
    assert!(layout.amx.is_some() && size.is_multiple_of(WIDTH));
    let values = x.values[row * stride * PLANES..].as_ptr();
    let (offsets, sums) = (x.offsets[row * blocks..].as_ptr(), x.sums[row * blocks..].as_ptr());
    let scales = x.scales[row * spans..].as_ptr();
    let mut totals = [_mm512_setzero_ps(); SIDE];
    if let Some(bias) = bias {
        for (at, column) in area.columns.clone().enumerate() {
            totals[at] = _mm512_set1_ps(bias[column]);
        }
    }
    let mut stored = [[TileSums::UNINIT; PLANES]; BLOCKS_TOGETHER];
    for first in (0..blocks).step_by(BLOCKS_TOGETHER) {
        let count = BLOCKS_TOGETHER.min(blocks - first);
        for at in 0..count {
            let start = (first + at) * size;
            // SAFETY: the assertions above keep the block within the columns and the rows; there is a stored tile for
            // each plane.
            unsafe {
                let block = BlockOperands {
                    codes: operand.codes.add(start),
                    pitch: operand.pitch,
                    values: values.add(start * SIDE * PLANES),
                    size,
                };
                multiply_block::<PLANES>(block, stored[at].as_mut_ptr().cast(), config);
            }
            if area.is_first && operand.later_pitch > 0 {
                for line in (0..size).step_by(WIDTH) {
                    for column in 0..SIDE {
                        // A hint, for which any address will do.
                        let later = operand.later.wrapping_add(column * operand.later_pitch + start + line);
                        _mm_prefetch::<_MM_HINT_T1>(later.cast());
                    }
                }
            }
        }
        for at in 0..count {
            let block = first + at;
            let stored = stored[at].as_ptr().cast::<i32>();
            // SAFETY: the tile has sixteen scales for each span and sixteen offsets for each block; its sums were
            // stored above; the columns have a scale for each block.
            unsafe {
                let row_scales = _mm512_loadu_ps(scales.add(block * size / span * SIDE));
                let offset = _mm512_loadu_si512(offsets.add(block * SIDE).cast());
                for column in 0..SIDE {
                    let mut sum = _mm512_load_si512(stored.add(column * SIDE).cast());
                    if PLANES == 2 {
                        let low = _mm512_load_si512(stored.add((SIDE + column) * SIDE).cast());
                        sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum), low);
                    }
                    let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, offset));
                    let column_scale = _mm512_set1_ps(*operand.scales.add(column * blocks + block));
                    totals[column] = _mm512_fmadd_ps(sum, _mm512_mul_ps(column_scale, row_scales), totals[column]);
                }
            }
            if w.zero_points.is_some() {
                // SAFETY: the tile has sixteen sums for each block.
                let sum = unsafe { _mm512_loadu_ps(sums.add(block * SIDE)) };
                for column in 0..SIDE {
                    totals[column] =
                        _mm512_fnmadd_ps(_mm512_set1_ps(operand.zeros[block][column]), sum, totals[column]);
                }
            }
        }
    }
    let mut by_columns = TileSums::UNINIT;
    let to = (&raw mut by_columns).cast::<f32>();
    for column in 0..SIDE {
        // SAFETY: a stored tile has room for sixteen rows of each column.
        unsafe { _mm512_store_ps(to.add(column * SIDE), totals[column]) };
    }
    for first in (0..area.rows.len()).step_by(4) {
        // SAFETY: all sixteen columns of sixteen numbers were stored above.
        let four = unsafe { transpose_pitched(to.add(first).cast(), 4 * SIDE) };
        for at in 0..4.min(area.rows.len() - first) {
            // SAFETY: the assertions above keep rows and columns within the output; no other thread has them.
            unsafe {
                let to = y.at(row + first + at, area.columns.start);
                _mm512_mask_storeu_ps(to, first_lanes(area.columns.len()), _mm512_castsi512_ps(four[at]));
            }
        }
    }
}

/// A block of sixteen columns, and the activations that meet it.
struct BlockOperands {
    /// The block of the first column, and the bytes from one column to the next.
    codes: *const u8,
    pitch: usize,
    /// `[size / 4, planes, SIDE, 4]`
    values: *const i8,
    /// Weights in a block.
    size: usize,
}

/// The sums of a block's products, `[planes, columns, rows]`.
///
/// # Safety
/// The block and its activations can be read, and `sums` has room for them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_block<const PLANES: usize>(
    BlockOperands { codes, pitch, values, size }: BlockOperands,
    sums: *mut i32,
    _config: &TileConfig,
) {
    // SAFETY: tiles are configured as long as there is a `TileConfig`; the loop advances both operands by 64 codes of
    // each column, and all planes and rows of as many activations, until the block ends; the caller promises these, and
    // room for the sums.
    unsafe {
        if PLANES == 2 {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm2, [{codes} + {pitch}]",
                "tileloadd tmm3, [{values} + {stride}]",
                "tdpbusd tmm0, tmm2, tmm3",
                "tileloadd tmm4, [{values} + {stride} + 64]",
                "tdpbusd tmm1, tmm2, tmm4",
                "add {codes}, 64",
                "add {values}, 2048",
                "sub {left}, 64",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                codes = inout(reg) codes => _, values = inout(reg) values => _, left = inout(reg) size => _,
                pitch = in(reg) pitch, stride = in(reg) 2 * WIDTH,
                sums = in(reg) sums, line = in(reg) WIDTH,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "2:",
                "tileloadd tmm2, [{codes} + {pitch}]",
                "tileloadd tmm3, [{values} + {line}]",
                "tdpbusd tmm0, tmm2, tmm3",
                "add {codes}, 64",
                "add {values}, 1024",
                "sub {left}, 64",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                codes = inout(reg) codes => _, values = inout(reg) values => _, left = inout(reg) size => _,
                pitch = in(reg) pitch,
                sums = in(reg) sums, line = in(reg) WIDTH,
                out("tmm0") _, out("tmm2") _, out("tmm3") _, options(nostack),
            );
        }
    }
}
