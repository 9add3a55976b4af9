//! Many rows where the processor has AMX, which multiplies sixteen columns of weights with sixteen rows of activations, 64 bytes of each,
//! by one instruction.
//!
//! # Design
//! Weights are the first operand, whose tiles are taken as they lie in memory, a pitch apart: none need be brought into another order,
//! but those of 4 bits are unpacked. Sums come column by column, and are turned before they are written. What was stored from a tile is
//! long in coming back, so a few blocks are multiplied before they are added up: as whole numbers, with the same results as those of
//! panels.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::Weights;
use super::Product;
use crate::amx::{SIDE, Tiles, WIDTH};
use crate::avx512::{mask, turned};
use crate::processor::Level;

/// From so many rows on AMX is faster than what takes weights as they lie.
pub const MANY: usize = 2;

/// Blocks that are multiplied before they are added up.
const TOGETHER: usize = 4;

/// Whether there is AMX, and it is faster for these: adding up the sums of many small blocks takes longer than anything else.
pub fn takes(level: Level, w: &Weights) -> bool {
    level >= Level::Amx && w.block_size.is_multiple_of(WIDTH)
}

/// What a tile of sums is stored as: `[columns, rows]`.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Sums {
    _numbers: [MaybeUninit<i32>; SIDE * SIDE],
}

impl Sums {
    const NONE: Sums = Sums { _numbers: [MaybeUninit::uninit(); SIDE * SIDE] };
}

/// What a tile takes at once.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; WIDTH]);

/// Computes these columns of the product's rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn multiply<const BITS: usize, const PLANES: usize>(product: &Product, columns: Range<usize>) {
    let Product { w, rows, y, .. } = product;
    assert!(columns.end <= y.n && rows.start.is_multiple_of(SIDE), "rows and columns of a product");
    if columns.is_empty() {
        return;
    }
    // SAFETY: the processor has AMX, or no one had rounded activations for it.
    let _tiles = unsafe { Tiles::configured() };
    // What is copied for some columns is read while it is copied for the next: tiles wait long for what was just stored.
    let mut rooms = [Room::of(w), Room::of(w)];
    let of_column = |first: usize| first..columns.end.min(first + SIDE);
    rooms[0].take::<BITS>(w, of_column(columns.start));
    for (at, first) in columns.clone().step_by(SIDE).enumerate() {
        if first + SIDE < columns.end {
            rooms[(at + 1) % 2].take::<BITS>(w, of_column(first + SIDE));
        }
        let columns = of_column(first);
        for row in rows.clone().step_by(SIDE) {
            let part =
                Part { rows: row..rows.end.min(row + SIDE), columns: columns.clone(), is_first: row == rows.start };
            tile::<PLANES>(product, &rooms[at % 2], part);
        }
    }
}

/// A part of the product that is computed at a time.
struct Part {
    rows: Range<usize>,
    columns: Range<usize>,
    /// Whether no other rows were computed of these columns.
    is_first: bool,
}

/// Sixteen columns of weights, codes of 8 bits; those that are not there are any.
struct Room {
    /// Of the first column, and how far apart columns are.
    codes: *const u8,
    pitch: usize,
    scales: *const f32,
    /// `[blocks, columns]`: scales times zero points, where blocks have these of their own.
    zeros: Vec<[f32; SIDE]>,
    /// The codes as they lie in memory of the next sixteen, to be asked for, which need not be there, and how far apart they are; no
    /// distance if they were asked for.
    later: *const u8,
    later_pitch: usize,
    /// What is copied that cannot be taken as it lies.
    copied: Vec<Line>,
    copied_scales: Vec<f32>,
}

impl Room {
    /// Of no columns yet.
    fn of(w: &Weights) -> Room {
        let zeros = if w.zero_points.is_some() { vec![[0.0; SIDE]; w.blocks()] } else { Vec::new() };
        let nothing = std::ptr::null();
        let (copied, copied_scales) = (Vec::new(), Vec::new());
        Room {
            codes: nothing,
            pitch: 0,
            scales: std::ptr::null(),
            zeros,
            later: nothing,
            later_pitch: 0,
            copied,
            copied_scales,
        }
    }

    /// Takes these columns, at most as many as a tile has.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn take<const BITS: usize>(&mut self, w: &Weights, columns: Range<usize>) {
        let (blocks, length, bytes) = (w.blocks(), w.blocks() * w.block_size, w.blocks() * w.block_bytes());
        assert!(w.bits == BITS && bytes * 8 == length * BITS && !columns.is_empty() && columns.len() <= SIDE);
        let numbers = &w.numbers[columns.start * bytes..columns.end * bytes];
        let scales = &w.scales[columns.start * blocks..columns.end * blocks];
        let later = w.numbers.as_ptr().wrapping_add(columns.end * bytes);
        for block in 0..self.zeros.len() {
            for at in 0..columns.len() {
                let zero = w.zero_point(columns.start + at, block) as f32;
                self.zeros[block][at] = scales[at * blocks + block] * zero;
            }
        }
        (self.codes, self.pitch, self.scales) = (numbers.as_ptr(), length, scales.as_ptr());
        (self.later, self.later_pitch) = (later, bytes);
        if BITS == 4 || columns.len() < SIDE {
            // Not all columns in the same places of the first cache.
            let lines = length.div_ceil(WIDTH) + 1;
            self.copied.resize(SIDE * lines, Line([0; WIDTH]));
            for at in 0..columns.len() {
                let (from, to) =
                    (&numbers[at * bytes..(at + 1) * bytes], &mut self.copied[at * lines..(at + 1) * lines]);
                if BITS == 4 {
                    unpack(from, to, later.wrapping_add(at * bytes));
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

/// Makes bytes of numbers of 4 bits, for which `to` has room, while what lies as far on as `later` is asked for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn unpack(numbers: &[u8], to: &mut [Line], later: *const u8) {
    /// Bytes of numbers that make a line.
    const HALF: usize = WIDTH / 2;
    let lines = numbers.len().div_ceil(HALF);
    assert!(to.len() >= lines, "room for unpacked numbers");
    let nibbles = _mm512_set1_epi8(15);
    for line in 0..lines {
        let left = numbers.len() - line * HALF;
        // SAFETY: no more than there are, and the room for it.
        unsafe {
            let from = numbers.as_ptr().add(line * HALF);
            let pairs = match left {
                HALF.. => _mm256_loadu_si256(from.cast()),
                _ => _mm256_maskz_loadu_epi8((1_u32 << left) - 1, from.cast()),
            };
            let words = _mm512_cvtepu8_epi16(pairs);
            let codes = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16::<4>(words)), nibbles);
            _mm512_store_si512(to.as_mut_ptr().add(line).cast(), codes);
            // A hint, which may name any address.
            _mm_prefetch::<_MM_HINT_T1>(later.wrapping_add(line * HALF).cast());
        }
    }
}

/// Computes the rows of a tile of these columns.
#[expect(clippy::needless_range_loop, reason = "iterators are inlined or not as the compiler likes")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const PLANES: usize>(Product { x, w, bias, y, .. }: &Product, taken: &Room, part: Part) {
    let (row, layout, size) = (part.rows.start, x.layout, w.block_size);
    let (stride, blocks, spans, span) = (layout.stride, layout.blocks, layout.spans(), layout.span());
    let room = layout.rows(x.rows);
    assert!(row.is_multiple_of(SIDE) && row + SIDE <= room && part.rows.end <= y.rows && part.columns.end <= y.n);
    assert!(x.numbers.len() == room * stride * PLANES && blocks * size <= stride && taken.pitch >= blocks * size);
    assert!(x.offsets.len() == room * blocks && x.scales.len() == room * spans && x.sums.len() == x.offsets.len());
    assert!(layout.is_for_amx && size.is_multiple_of(WIDTH));
    let numbers = x.numbers[row * stride * PLANES..].as_ptr();
    let (offsets, sums) = (x.offsets[row * blocks..].as_ptr(), x.sums[row * blocks..].as_ptr());
    let scales = x.scales[row * spans..].as_ptr();
    let mut totals = [_mm512_setzero_ps(); SIDE];
    if let Some(bias) = bias {
        for (at, column) in part.columns.clone().enumerate() {
            totals[at] = _mm512_set1_ps(bias[column]);
        }
    }
    let mut stored = [[Sums::NONE; PLANES]; TOGETHER];
    for first in (0..blocks).step_by(TOGETHER) {
        let count = TOGETHER.min(blocks - first);
        for at in 0..count {
            let start = (first + at) * size;
            // SAFETY: the block is within the columns and the rows, and there is room for its sums.
            unsafe {
                let (codes, numbers) = (taken.codes.add(start), numbers.add(start * SIDE * PLANES));
                sums_of::<PLANES>((codes, taken.pitch), numbers, size, stored[at].as_mut_ptr().cast());
            }
            if part.is_first && taken.later_pitch > 0 {
                for line in (0..size).step_by(WIDTH) {
                    for column in 0..SIDE {
                        // A hint, which may name any address.
                        let later = taken.later.wrapping_add(column * taken.later_pitch + start + line);
                        _mm_prefetch::<_MM_HINT_T1>(later.cast());
                    }
                }
            }
        }
        for at in 0..count {
            let block = first + at;
            let stored = stored[at].as_ptr().cast::<i32>();
            // SAFETY: as many rows as a tile has, of each block and span; the sums were stored above; there are as many scales as columns and blocks.
            unsafe {
                let of_rows = _mm512_loadu_ps(scales.add(block * size / span * SIDE));
                let offset = _mm512_loadu_si512(offsets.add(block * SIDE).cast());
                for column in 0..SIDE {
                    let mut sum = _mm512_load_si512(stored.add(column * SIDE).cast());
                    if PLANES == 2 {
                        let low = _mm512_load_si512(stored.add((SIDE + column) * SIDE).cast());
                        sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum), low);
                    }
                    let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, offset));
                    let scale = _mm512_mul_ps(_mm512_set1_ps(*taken.scales.add(column * blocks + block)), of_rows);
                    totals[column] = _mm512_fmadd_ps(sum, scale, totals[column]);
                }
            }
            if w.zero_points.is_some() {
                // SAFETY: as many rows as a tile has, of each block.
                let sum = unsafe { _mm512_loadu_ps(sums.add(block * SIDE)) };
                for column in 0..SIDE {
                    totals[column] = _mm512_fnmadd_ps(_mm512_set1_ps(taken.zeros[block][column]), sum, totals[column]);
                }
            }
        }
    }
    // Of each column the sums of all rows, and then the other way round.
    let mut by_columns = Sums::NONE;
    let to = (&raw mut by_columns).cast::<f32>();
    for column in 0..SIDE {
        // SAFETY: there is room for as many.
        unsafe { _mm512_store_ps(to.add(column * SIDE), totals[column]) };
    }
    for first in (0..part.rows.len()).step_by(4) {
        // SAFETY: four numbers of each column.
        let four = unsafe { turned(to.add(first).cast(), 4 * SIDE) };
        for at in 0..4.min(part.rows.len() - first) {
            // SAFETY: within the output, of which no one else has these columns of the row.
            unsafe {
                let to = y.values.add((row + first + at) * y.n + part.columns.start);
                _mm512_mask_storeu_ps(to, mask(part.columns.len()), _mm512_castsi512_ps(four[at]));
            }
        }
    }
}

/// The sums of the products of a block of `size` numbers, `[planes, columns, rows]`.
///
/// # Safety
/// Tiles are configured for it; of all columns, a pitch apart, and of the rows, as they lie for AMX, there are so many numbers; there is
/// room for the sums.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sums_of<const PLANES: usize>(
    (codes, pitch): (*const u8, usize),
    numbers: *const i8,
    size: usize,
    sums: *mut i32,
) {
    // SAFETY: the caller's.
    unsafe {
        if PLANES == 2 {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm2, [{codes} + {pitch}]",
                "tileloadd tmm3, [{numbers} + {apart}]",
                "tdpbusd tmm0, tmm2, tmm3",
                "tileloadd tmm4, [{numbers} + {apart} + 64]",
                "tdpbusd tmm1, tmm2, tmm4",
                "add {codes}, 64",
                "add {numbers}, 2048",
                "sub {left}, 64",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                codes = inout(reg) codes => _, numbers = inout(reg) numbers => _, left = inout(reg) size => _,
                pitch = in(reg) pitch, apart = in(reg) 2 * WIDTH,
                sums = in(reg) sums, line = in(reg) WIDTH,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "2:",
                "tileloadd tmm2, [{codes} + {pitch}]",
                "tileloadd tmm3, [{numbers} + {line}]",
                "tdpbusd tmm0, tmm2, tmm3",
                "add {codes}, 64",
                "add {numbers}, 1024",
                "sub {left}, 64",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                codes = inout(reg) codes => _, numbers = inout(reg) numbers => _, left = inout(reg) size => _,
                pitch = in(reg) pitch,
                sums = in(reg) sums, line = in(reg) WIDTH,
                out("tmm0") _, out("tmm2") _, out("tmm3") _, options(nostack),
            );
        }
    }
}
