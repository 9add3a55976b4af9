//! Many rows: 32 columns of weights at a time are brought into an order in which no sum has to be taken across a register.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ops::Range;

use super::super::Weights;
use super::{Order, Planes, Product};
use crate::avx512::{read, turn, turned, write};

/// Columns of a panel, two registers of sums.
const WIDTH: usize = 32;
/// The most numbers of each column in a panel: it stays in the first cache, beside some rows of activations.
const DEPTH: usize = 512;
/// The same where both the panel that is filled and the one that is multiplied are to stay there: filling one takes long beside the
/// products of so few tiles of rows.
const DEPTH_OF_FEW: usize = 256;
const FEW_TILES: usize = 3;

/// A part of 32 columns, as far as it was filled: most calls are over before they have filled it so many times that writing zeros
/// first would not count.
#[repr(align(64))]
struct Panel {
    /// `[places / 4, columns, 4]`, places in the order of activations.
    codes: [MaybeUninit<u8>; WIDTH * DEPTH],
    /// `[blocks, columns]`
    scales: [[MaybeUninit<f32>; WIDTH]; DEPTH / 16],
    /// `[blocks, columns]`: scales times zero points, where blocks have these of their own.
    zeros: [[MaybeUninit<f32>; WIDTH]; DEPTH / 16],
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
pub const MANY: usize = 5;

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
    let tiles = rows.len().div_ceil(R);
    let places = Places::of(w, columns, if tiles <= FEW_TILES { DEPTH_OF_FEW } else { DEPTH });
    let (mut panels, mut edge) = ([Panel::EMPTY; 2], Vec::new());
    let (mut filled, mut next) = (None, places.first());
    for at in 0.. {
        // One is computed while the other one is filled.
        let [first, second] = &mut panels;
        let (panel, other) = if at % 2 == 0 { (&*first, second) } else { (&*second, first) };
        let later = next.as_ref().and_then(|next| places.after(next));
        let mut filling = match &next {
            Some(next) => other.begin::<BITS>(w, next, later.as_ref().unwrap_or(&places.beyond()), &mut edge),
            None => Filling::NONE,
        };
        if let Some(Place { columns, depth }) = filled {
            filling.share(tiles * (depth.len() / FILLED_EVERY));
            for row in rows.clone().step_by(R) {
                let part = Part { rows: row..rows.end.min(row + R), columns: columns.clone(), depth: depth.clone() };
                match filling.left {
                    0 => tile::<BITS, PLANES, R, false>(product, panel, part, &mut filling),
                    _ => tile::<BITS, PLANES, R, true>(product, panel, part, &mut filling),
                }
            }
        }
        filling.finish::<BITS>();
        if next.is_none() {
            return;
        }
        (filled, next) = (next, later);
    }
}

/// What a panel is of.
#[derive(Clone)]
struct Place {
    columns: Range<usize>,
    /// Numbers of each.
    depth: Range<usize>,
}

/// The panels of some columns, one after the other.
struct Places {
    columns: Range<usize>,
    /// Numbers of a column, and in a panel.
    length: usize,
    depth: usize,
}

impl Places {
    /// No deeper than `most`, and all about as deep as each other.
    fn of(w: &Weights, columns: Range<usize>, most: usize) -> Places {
        let length = w.blocks() * w.block_size;
        let depth = length.div_ceil(length.div_ceil(most).max(1)).next_multiple_of(128);
        Places { columns, length, depth }
    }

    fn first(&self) -> Option<Place> {
        self.at(self.columns.start, 0)
    }

    fn after(&self, Place { columns, depth }: &Place) -> Option<Place> {
        if depth.end < self.length { self.at(columns.start, depth.end) } else { self.at(columns.end, 0) }
    }

    /// The first one after the last, which is no one's yet, or the other thread's.
    fn beyond(&self) -> Place {
        Place { columns: self.columns.end..self.columns.end + WIDTH, depth: 0..self.depth }
    }

    fn at(&self, column: usize, from: usize) -> Option<Place> {
        let columns = column..self.columns.end.min(column + WIDTH);
        (!columns.is_empty()).then(|| Place { columns, depth: from..self.length.min(from + self.depth) })
    }
}

/// Numbers of each column that are multiplied from one step of filling to the next.
const FILLED_EVERY: usize = 16;

/// The filling of a panel, sixteen bytes of sixteen columns at each step: what brings them into order and what multiplies others
/// takes turns, so that the processor does both at once, and the memory sends what the next panel will be filled with meanwhile.
struct Filling {
    /// Where the next sixteen bytes of the first column are, where they go, and, of what the next panel will be filled with, the next
    /// line of the first of four columns.
    from: *const u8,
    to: *mut u8,
    later: *const u8,
    /// The same for the second sixteen columns.
    second: (*const u8, *mut u8, *const u8),
    /// Bytes between the columns.
    pitch: usize,
    /// Steps that are still to be done, of each half, and at a time.
    left: usize,
    half: usize,
    share: usize,
}

impl Filling {
    /// Of nothing.
    const NONE: Filling = {
        let (from, to) = (std::ptr::null(), std::ptr::null_mut());
        Filling { from, to, later: from, second: (from, to, from), pitch: 0, left: 0, half: 0, share: 0 }
    };

    /// It is to be done in so many times.
    fn share(&mut self, times: usize) {
        self.share = self.left.div_ceil(times.max(1));
    }

    /// What is left.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn finish<const BITS: usize>(&mut self) {
        self.share = self.left;
        self.go_on::<BITS>();
    }

    /// As much as is to be done at a time.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn go_on<const BITS: usize>(&mut self) {
        for _ in 0..self.share.min(self.left) {
            // SAFETY: so many steps are left, for which there are the bytes and the room.
            unsafe {
                for (at, word) in turned(self.from, self.pitch).into_iter().enumerate() {
                    let to = self.to.add(at * 4 * WIDTH);
                    if BITS == 8 {
                        _mm512_store_si512(to.cast(), word);
                    } else {
                        let nibbles = _mm512_set1_epi8(15);
                        _mm512_store_si512(to.cast(), _mm512_and_si512(word, nibbles));
                        let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(word), nibbles);
                        _mm512_store_si512(to.add(16 * 4 * WIDTH).cast(), odd);
                    }
                }
                for column in 0..4 {
                    // A hint, which may name any address.
                    _mm_prefetch::<_MM_HINT_T1>(self.later.wrapping_add(column * self.pitch).cast());
                }
                self.left -= 1;
                self.from = self.from.add(16);
                self.to = self.to.wrapping_add(4 * 4 * WIDTH);
                self.later = self.later.wrapping_add(4 * self.pitch);
                // Of all columns a line is done.
                if self.left.is_multiple_of(4) {
                    self.later = self.later.wrapping_sub(16 * self.pitch).wrapping_add(64);
                    if BITS == 4 {
                        self.to = self.to.wrapping_add(16 * 4 * WIDTH);
                    }
                    if self.left == self.half {
                        (self.from, self.to, self.later) = self.second;
                    }
                }
            }
        }
    }
}

impl Panel {
    const EMPTY: Panel = {
        let of_blocks = [[MaybeUninit::uninit(); WIDTH]; DEPTH / 16];
        Panel { codes: [MaybeUninit::uninit(); WIDTH * DEPTH], scales: of_blocks, zeros: of_blocks }
    };

    /// Takes the scales of what is at a place, and says how its numbers are taken, while those `later` are asked for. Columns that are
    /// not there are any; no one reads them. What ends amid a line, or has fewer columns, is copied to the `edge` first.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn begin<const BITS: usize>(
        &mut self,
        w: &Weights,
        Place { columns, depth }: &Place,
        later: &Place,
        edge: &mut Vec<u8>,
    ) -> Filling {
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.blocks() * w.block_bytes());
        assert!(columns.end * bytes <= w.numbers.len() && columns.end * blocks <= w.scales.len());
        assert!(depth.end * BITS <= bytes * 8 && depth.len() <= DEPTH && depth.start.is_multiple_of(128));
        assert!(columns.len() <= WIDTH && !columns.is_empty());
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
                    self.scales[block][half * 16 + at].write(unsafe { *from.cast::<f32>().add(block) });
                }
            }
        }
        if w.zero_points.is_some() {
            for at in 0..WIDTH {
                for (zeros, (scales, block)) in self.zeros.iter_mut().zip(self.scales.iter().zip(of_panel.clone())) {
                    // SAFETY: written above.
                    let scale = unsafe { scales[at].assume_init() };
                    zeros[at].write(scale * w.zero_point(column(at), block) as f32);
                }
            }
        }
        let scales = w.scales.as_ptr().wrapping_add(later.columns.start * blocks + later.depth.start / size);
        for at in 0..WIDTH {
            // A hint, which may name any address.
            _mm_prefetch::<_MM_HINT_T1>(scales.wrapping_add(at * blocks).cast());
        }

        let lines = (depth.len() * BITS / 8).div_ceil(64);
        let numbers = w.numbers.as_ptr();
        let (mut from, mut pitch) = (numbers.wrapping_add(columns.start * bytes + depth.start * BITS / 8), bytes);
        if columns.len() < WIDTH || !(depth.len() * BITS / 8).is_multiple_of(64) {
            const ROOM: usize = DEPTH;
            edge.resize(WIDTH * ROOM, 0);
            for (edge, column) in edge.chunks_exact_mut(ROOM).zip(columns.clone()) {
                let numbers = &w.numbers[column * bytes..][depth.start * BITS / 8..depth.end * BITS / 8];
                edge[..numbers.len()].copy_from_slice(numbers);
            }
            (from, pitch) = (edge.as_ptr(), ROOM);
        }
        let later = numbers.wrapping_add(later.columns.start * bytes + later.depth.start * BITS / 8);
        let (to, half) = (self.codes.as_mut_ptr().cast::<u8>(), 4 * lines);
        let second = (from.wrapping_add(16 * pitch), to.wrapping_add(64), later.wrapping_add(16 * pitch));
        Filling { from, to, later, second, pitch, left: 2 * half, half, share: 0 }
    }
}

/// Where the numbers of a block lie in a plane: so many from each place on.
const fn places(bits: usize, size: usize, block: usize) -> [(usize, usize); 2] {
    let first = Order::of(bits).place(block * size);
    match bits {
        8 => [(first, size), (first, 0)],
        _ => [(first, size / 2), (first + 64, size / 2)],
    }
}

/// Computes `R` rows of the panel's columns, or adds to them what its depth brings; if it `FILLS`, another panel goes on to be filled.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const BITS: usize, const PLANES: usize, const R: usize, const FILLS: bool>(
    Product { x, w, bias, y, .. }: &Product,
    panel: &Panel,
    Part { rows, columns, depth }: Part,
    filling: &mut Filling,
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
    // Sums go on from panel to panel, so that they are the same however deep these are.
    for (at, totals) in totals.iter_mut().enumerate().take(rows.len()) {
        let before = match depth.start {
            0 => bias.map(|bias| bias[columns.clone()].as_ptr()),
            // SAFETY: within the output, of which no one else has these columns of the row.
            _ => Some(unsafe { y.values.add((row + at) * y.n + columns.start).cast_const() }),
        };
        if let Some(before) = before {
            // SAFETY: as many as columns.
            *totals = unsafe { read(before, columns.len()) };
        }
    }
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
            let (mut codes, mut fours) = unsafe {
                (panel.codes.as_ptr().cast::<u8>().add(first * WIDTH), numbers.add(first * pitch).cast::<i32>())
            };
            for at in (0..count).step_by(FILLED_EVERY) {
                if FILLS {
                    filling.go_on::<BITS>();
                }
                for _ in 0..(count - at).min(FILLED_EVERY) / 4 {
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
        let of_columns =
            unsafe { [_mm512_loadu_ps(of_columns.as_ptr().cast()), _mm512_loadu_ps(of_columns[16..].as_ptr().cast())] };
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
                    let zeros = unsafe { _mm512_loadu_ps(panel.zeros[block][half * 16..].as_ptr().cast()) };
                    *total = _mm512_fnmadd_ps(zeros, sum, *total);
                }
            }
        }
    }
    for (at, totals) in totals.into_iter().enumerate().take(rows.len()) {
        // SAFETY: as above.
        unsafe { write(totals, y.values.add((row + at) * y.n + columns.start), columns.len()) };
    }
}
