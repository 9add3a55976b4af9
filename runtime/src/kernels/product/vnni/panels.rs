//! Many rows: 32 columns of weights at a time are brought into an order in which no sum has to be taken across a register.

use std::arch::x86_64::*;
use std::num::NonZeroUsize;
use std::ops::Range;

use super::super::Weights;
use super::{Planes, Product, place};
use crate::kernels::avx512::{turn, write};

/// Columns of a panel, two registers of sums.
const WIDTH: usize = 32;
/// Numbers of each column in a panel: it stays in the first cache, beside some rows of activations.
const DEPTH: usize = 512;

/// A part of 32 columns.
#[repr(align(64))]
struct Panel {
    /// `[places / 4, columns, 4]`, places in the order of activations.
    codes: [u8; WIDTH * DEPTH],
    /// `[blocks, columns]`
    scales: [[f32; WIDTH]; DEPTH / 16],
    /// `[blocks, columns]`: scales times zero points, where blocks have these of their own.
    zeros: [[f32; WIDTH]; DEPTH / 16],
}

/// A part of the product that is computed at a time.
struct Part {
    /// Those of a tile that are there.
    rows: Range<usize>,
    columns: Range<usize>,
    /// Numbers of each.
    depth: Range<usize>,
}

/// From so many rows on it pays to bring the weights into another order first.
pub const MANY: usize = 4;

/// How many rows are computed at a time of so many, so that registers are used best.
pub fn tile_of(rows: usize, planes: Planes) -> Option<NonZeroUsize> {
    let tiles: &[usize] = match planes {
        Planes::One => &[12, 10, 8, 6],
        Planes::Two => &[6, 5, 4],
    };
    // Loading a panel's numbers takes about as long as one more row.
    let tile = tiles.iter().min_by_key(|&&tile| rows.div_ceil(tile) * (tile + 1));
    tile.copied().and_then(NonZeroUsize::new)
}

/// `R` rows are computed at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn multiply<const BITS: usize, const PLANES: usize, const R: usize>(product: &Product, columns: Range<usize>) {
    let Product { w, rows, y, .. } = product;
    assert!(columns.end <= y.n && rows.start.is_multiple_of(R), "rows and columns of a product");
    let length = w.blocks() * w.block_size;
    let mut panel =
        Panel { codes: [0; WIDTH * DEPTH], scales: [[0.0; WIDTH]; DEPTH / 16], zeros: [[0.0; WIDTH]; DEPTH / 16] };
    for first in columns.clone().step_by(WIDTH) {
        let columns = first..columns.end.min(first + WIDTH);
        for from in (0..length).step_by(DEPTH) {
            let depth = from..length.min(from + DEPTH);
            panel.fill::<BITS>(w, columns.clone(), depth.clone());
            let next = if depth.end < length { (first, depth.end) } else { (first + WIDTH, 0) };
            let mut ahead = Ahead::of::<BITS>(w, next, rows.len().div_ceil(R));
            for row in rows.clone().step_by(R) {
                let part = Part { rows: row..rows.end.min(row + R), columns: columns.clone(), depth: depth.clone() };
                tile::<BITS, PLANES, R>(product, &panel, part, &mut ahead);
            }
        }
    }
}

/// What the next panel will be filled with, which the memory is to send while this one is computed.
struct Ahead {
    next: *const u8,
    /// Lines of the column that are still to be asked for, and of each.
    lines: [usize; 2],
    /// Bytes between the columns' lines.
    apart: usize,
    /// Lines of all columns that are still to be asked for.
    left: usize,
    /// How many at a time.
    count: usize,
}

/// Bytes that the memory sends at a time.
const LINE: usize = 64;
/// Numbers of each column that are multiplied from one asking to the next.
const ASKED_EVERY: usize = 16;

impl Ahead {
    /// Of a panel of columns from `column` and numbers from `from` on, all of it while `tiles` are computed.
    fn of<const BITS: usize>(w: &Weights, (column, from): (usize, usize), tiles: usize) -> Ahead {
        let (pitch, lines) = (w.blocks() * w.block_bytes(), const { DEPTH * BITS / 8 / LINE });
        let next = w.numbers.as_ptr().wrapping_add(column * pitch + from * BITS / 8);
        let (apart, times) = (pitch.wrapping_sub(lines * LINE), tiles * const { DEPTH / ASKED_EVERY });
        Ahead { next, lines: [lines; 2], apart, left: WIDTH * lines, count: (WIDTH * lines).div_ceil(times) }
    }

    /// Asks for some of it.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn ask(&mut self) {
        let count = self.count.min(self.left);
        self.left -= count;
        for _ in 0..count {
            // A hint, which may name any address.
            _mm_prefetch::<_MM_HINT_T1>(self.next.cast());
            self.next = self.next.wrapping_add(LINE);
            self.lines[0] -= 1;
            if self.lines[0] == 0 {
                self.lines[0] = self.lines[1];
                self.next = self.next.wrapping_add(self.apart);
            }
        }
    }
}

impl Panel {
    /// Takes these numbers of the columns. Columns that are not there are as the last; no one reads them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn fill<const BITS: usize>(&mut self, w: &Weights, columns: Range<usize>, depth: Range<usize>) {
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.blocks() * w.block_bytes());
        assert!(columns.end * bytes <= w.numbers.len() && columns.end * blocks <= w.scales.len());
        assert!(depth.end * BITS <= bytes * 8 && depth.len() <= DEPTH && depth.start.is_multiple_of(DEPTH));
        let of_panel = depth.start / size..depth.end / size;
        let column = |at: usize| (columns.start + at).min(columns.end - 1);
        for half in 0..2 {
            let mut from: [*const u8; 16] = [std::ptr::null(); 16];
            for (at, from) in from.iter_mut().enumerate() {
                *from = w.scales[column(half * 16 + at) * blocks + of_panel.start..].as_ptr().cast();
            }
            // Four blocks of all columns at a time, as far as there are so many.
            let fours = of_panel.len() / 4;
            for four in 0..fours {
                // SAFETY: four scales of each column, and sixteen places for each of them.
                unsafe {
                    for (at, scales) in turn(&from, four).into_iter().enumerate() {
                        let to = self.scales.as_mut_ptr().add(four * 4 + at).cast::<f32>().add(half * 16);
                        _mm512_store_si512(to.cast(), scales);
                    }
                }
            }
            for block in fours * 4..of_panel.len() {
                for (at, from) in from.iter().enumerate() {
                    // SAFETY: a scale of the column.
                    self.scales[block][half * 16 + at] = unsafe { *from.cast::<f32>().add(block) };
                }
            }
        }
        if w.zero_points.is_some() {
            for at in 0..WIDTH {
                for (zeros, (scales, block)) in self.zeros.iter_mut().zip(self.scales.iter().zip(of_panel.clone())) {
                    zeros[at] = scales[at] * w.zero_point(column(at), block) as f32;
                }
            }
        }
        let all = depth.start * BITS / 8..depth.end * BITS / 8;
        for half in 0..2 {
            let mut from: [*const u8; 16] = [std::ptr::null(); 16];
            for (at, from) in from.iter_mut().enumerate() {
                *from = w.numbers[column(half * 16 + at) * bytes..].as_ptr();
            }
            for first in all.clone().step_by(64) {
                let mut here = from;
                here.iter_mut().for_each(|column| *column = column.wrapping_add(first));
                let place = (first - all.start) * 8 / BITS;
                // SAFETY: within the columns, of which the last bytes are copied where there are not 64, and the panel.
                unsafe {
                    let to = self.codes.as_mut_ptr().add(place * WIDTH + half * 64);
                    if first + 64 <= bytes {
                        take::<BITS>(&here, to);
                    } else {
                        let mut ends = [[0_u8; 64]; 16];
                        for (end, here) in ends.iter_mut().zip(&mut here) {
                            std::ptr::copy_nonoverlapping(*here, end.as_mut_ptr(), bytes - first);
                            *here = end.as_ptr();
                        }
                        take::<BITS>(&here, to);
                    }
                }
            }
        }
    }
}

/// Brings 64 bytes of sixteen columns each into the order of a panel, of which `to` is where their first four numbers go.
///
/// # Safety
/// There are so many bytes, and a panel has room.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn take<const BITS: usize>(columns: &[*const u8; 16], to: *mut u8) {
    let nibbles = _mm512_set1_epi8(15);
    for quarter in 0..4 {
        // SAFETY: the caller's; all goes into the panel.
        unsafe {
            for (at, word) in turn(columns, quarter).into_iter().enumerate() {
                let to = to.add((quarter * 4 + at) * 4 * WIDTH);
                if BITS == 8 {
                    _mm512_store_si512(to.cast(), word);
                } else {
                    _mm512_store_si512(to.cast(), _mm512_and_si512(word, nibbles));
                    let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(word), nibbles);
                    _mm512_store_si512(to.add(16 * 4 * WIDTH).cast(), odd);
                }
            }
        }
    }
}

/// Where the numbers of a block lie in a plane: so many from each place on.
const fn places(bits: usize, size: usize, block: usize) -> [(usize, usize); 2] {
    let first = place(bits, block * size);
    match bits {
        8 => [(first, size), (first, 0)],
        _ => [(first, size / 2), (first + 64, size / 2)],
    }
}

/// Computes `R` rows of the panel's columns, or adds to them what its depth brings.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const BITS: usize, const PLANES: usize, const R: usize>(
    Product { x, w, bias, y, .. }: &Product,
    panel: &Panel,
    Part { rows, columns, depth }: Part,
    ahead: &mut Ahead,
) {
    const { assert!(R * PLANES <= 12) };
    let (row, stride, blocks, spans) = (rows.start, x.layout.stride, x.layout.blocks, x.layout.spans());
    let (room, size, span) = (x.layout.rows(x.rows), w.block_size, x.layout.span());
    assert!(row + R <= room && rows.end <= y.rows && x.numbers.len() == room * stride * PLANES);
    assert!(x.offsets.len() == room * blocks && x.scales.len() == room * spans && x.sums.len() == x.offsets.len());
    assert!(depth.len() <= DEPTH && depth.end.next_multiple_of(span) <= stride && columns.end <= y.n);
    assert!(x.layout.tile.is_some_and(|tile| tile.get() == R) && row.is_multiple_of(R), "a tile of {R} rows");
    // Four numbers of all rows and planes lie beside the next four of them, and so do the rows' offsets, sums and scales.
    let pitch = const { R * PLANES };
    let numbers = x.numbers[row * stride * PLANES + depth.start * pitch..].as_ptr();
    let (offsets, sums) = (x.offsets[row * blocks..].as_ptr(), x.sums[row * blocks..].as_ptr());
    let scales = x.scales[row * spans..].as_ptr();
    let mut totals = [[_mm512_setzero_ps(); 2]; R];
    for block in 0..depth.len() / size {
        let of_block = (depth.start / size + block) * R;
        let mut low = [[_mm512_setzero_si512(); 2]; R];
        let mut high = [[_mm512_setzero_si512(); 2]; R];
        for (at, low) in low.iter_mut().enumerate() {
            // What zero is off, before anything is added.
            // SAFETY: as many as rows and blocks.
            *low = [_mm512_set1_epi32(unsafe { *offsets.add(of_block + at) }); 2];
        }
        for (first, count) in places(BITS, size, block) {
            // SAFETY: the places are within the panel and the rows.
            let (mut codes, mut fours) =
                unsafe { (panel.codes.as_ptr().add(first * WIDTH), numbers.add(first * pitch).cast::<i32>()) };
            for at in (0..count).step_by(ASKED_EVERY) {
                ahead.ask();
                for _ in 0..(count - at).min(ASKED_EVERY) / 4 {
                    // SAFETY: as above.
                    unsafe {
                        let here = [_mm512_load_si512(codes.cast()), _mm512_load_si512(codes.add(64).cast())];
                        for row in 0..R {
                            if PLANES == 2 {
                                let four = _mm512_set1_epi32(fours.add(row * PLANES).read_unaligned());
                                high[row][0] = _mm512_dpbusd_epi32(high[row][0], here[0], four);
                                high[row][1] = _mm512_dpbusd_epi32(high[row][1], here[1], four);
                            }
                            let four = _mm512_set1_epi32(fours.add(row * PLANES + PLANES - 1).read_unaligned());
                            low[row][0] = _mm512_dpbusd_epi32(low[row][0], here[0], four);
                            low[row][1] = _mm512_dpbusd_epi32(low[row][1], here[1], four);
                        }
                        (codes, fours) = (codes.add(4 * WIDTH), fours.add(pitch));
                    }
                }
            }
        }
        let of_columns = &panel.scales[block];
        // SAFETY: two times sixteen scales.
        let of_columns = unsafe { [_mm512_loadu_ps(of_columns.as_ptr()), _mm512_loadu_ps(of_columns[16..].as_ptr())] };
        let of_span = (depth.start + block * size) / span * R;
        for at in 0..R {
            // SAFETY: as many as rows and spans.
            let of_row = _mm512_set1_ps(unsafe { *scales.add(of_span + at) });
            for half in 0..2 {
                let sum = match PLANES {
                    2 => _mm512_add_epi32(low[at][half], _mm512_slli_epi32::<8>(high[at][half])),
                    _ => low[at][half],
                };
                let scale = _mm512_mul_ps(of_columns[half], of_row);
                totals[at][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[at][half]);
            }
        }
        if w.zero_points.is_some() {
            for (at, totals) in totals.iter_mut().enumerate() {
                // SAFETY: as many as rows and blocks.
                let sum = _mm512_set1_ps(unsafe { *sums.add(of_block + at) });
                for (half, total) in totals.iter_mut().enumerate() {
                    // SAFETY: sixteen numbers.
                    let zeros = unsafe { _mm512_loadu_ps(panel.zeros[block][half * 16..].as_ptr()) };
                    *total = _mm512_fnmadd_ps(zeros, sum, *total);
                }
            }
        }
    }
    for (at, totals) in totals.into_iter().enumerate().take(rows.len()) {
        // SAFETY: within the output, and no one else has these columns of the row.
        unsafe {
            let to = y.values.add((row + at) * y.n + columns.start);
            let before = match depth.start {
                0 => bias.map(|bias| bias[columns.clone()].as_ptr()),
                _ => Some(to.cast_const()),
            };
            write(totals, before, to, columns.len());
        }
    }
}
