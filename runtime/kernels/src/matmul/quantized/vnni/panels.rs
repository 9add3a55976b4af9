//! Many rows: 32 columns of weights at a time are packed into a panel, in an order that needs no horizontal sums.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ops::Range;

use super::super::super::Tile;
use super::super::Weights;
use super::Operands;
use super::layout::{Order, Planes};
use crate::avx512::{load_up_to_32, store_up_to_32, transpose_pitched, transpose_rows};

/// Columns of a panel: two registers of sums.
const WIDTH: usize = 32;
/// Maximum number of weights per column in a panel: it stays in the L1 cache, together with some rows of activations.
const DEPTH: usize = 512;
/// The same for few tiles of rows, where both the panel that is packed and the one that is multiplied are to stay
/// there: packing takes long compared to so few products.
const DEPTH_FOR_FEW_TILES: usize = 256;
const FEW_TILES: usize = 3;

/// Weights of 32 columns. Only what was packed is initialized: most calls end before they have packed so many panels
/// that zeroing them first would not count.
#[repr(align(64))]
struct Panel {
    /// `[places / 4, columns, 4]`, places in the order of the activations.
    codes: [MaybeUninit<u8>; WIDTH * DEPTH],
    /// `[blocks, columns]`
    scales: [[MaybeUninit<f32>; WIDTH]; DEPTH / 16],
    /// `[blocks, columns]`: scales times zero points, where blocks have these of their own.
    zeros: [[MaybeUninit<f32>; WIDTH]; DEPTH / 16],
}

/// Minimum number of rows for which packing the weights pays.
pub const MANY: usize = 5;

/// The tile height that uses the registers best for this many rows.
pub fn tile_height(rows: usize, planes: Planes) -> Option<NonZeroUsize> {
    let heights: &[usize] = match planes {
        Planes::One => &[12, 10, 8, 6],
        Planes::Two => &[6, 5, 4],
    };
    // Loading a panel takes about as long as one more row.
    let height = heights.iter().min_by_key(|&&height| rows.div_ceil(height) * (height + 1));
    height.copied().and_then(NonZeroUsize::new)
}

/// Multiplies tiles of `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn multiply<const BITS: usize, const PLANES: usize, const R: usize>(operands: &Operands, columns: Range<usize>) {
    let Operands { w, rows, y, .. } = operands;
    assert!(columns.end <= y.n && rows.start.is_multiple_of(R), "rows and columns of a matrix multiplication");
    let tiles = rows.len().div_ceil(R);
    let walk = PanelWalk::new(w, columns, if tiles <= FEW_TILES { DEPTH_FOR_FEW_TILES } else { DEPTH });
    let (mut panels, mut edge) = ([Panel::UNINIT; 2], Vec::new());
    let (mut packed, mut next) = (None, walk.first());
    for at in 0.. {
        // One panel is multiplied while the other one is packed.
        let [first, second] = &mut panels;
        let (panel, other) = if at % 2 == 0 { (&*first, second) } else { (&*second, first) };
        let later = next.as_ref().and_then(|next| walk.after(next));
        let mut packer = match &next {
            Some(next) => other.begin::<BITS>(w, next, later.as_ref().unwrap_or(&walk.beyond()), &mut edge),
            None => Packer::DONE,
        };
        if let Some(PanelArea { columns, depth }) = packed {
            packer.divide(tiles * (depth.len() / PACK_EVERY));
            for row in rows.clone().step_by(R) {
                let rows = row..rows.end.min(row + R);
                let tile = Tile { rows, columns: columns.clone(), depth: depth.clone() };
                if packer.left == 0 {
                    multiply_tile::<BITS, PLANES, R, false>(operands, panel, tile, &mut packer);
                } else {
                    multiply_tile::<BITS, PLANES, R, true>(operands, panel, tile, &mut packer);
                }
            }
        }
        packer.finish::<BITS>();
        if next.is_none() {
            return;
        }
        (packed, next) = (next, later);
    }
}

/// The contents of a panel.
#[derive(Clone)]
struct PanelArea {
    columns: Range<usize>,
    /// Weights of each column.
    depth: Range<usize>,
}

/// The panels of some columns, one after the other.
struct PanelWalk {
    columns: Range<usize>,
    /// Weights of a column, and of a column in a panel.
    length: usize,
    depth: usize,
}

impl PanelWalk {
    /// Panels of about equal depth, none deeper than `most`.
    fn new(w: &Weights, columns: Range<usize>, most: usize) -> PanelWalk {
        let length = w.blocks() * w.block_size;
        let depth = length.div_ceil(length.div_ceil(most).max(1)).next_multiple_of(128);
        PanelWalk { columns, length, depth }
    }

    fn first(&self) -> Option<PanelArea> {
        self.at(self.columns.start, 0)
    }

    fn after(&self, PanelArea { columns, depth }: &PanelArea) -> Option<PanelArea> {
        if depth.end < self.length { self.at(columns.start, depth.end) } else { self.at(columns.end, 0) }
    }

    /// The panel behind the last: of another thread, or of nobody.
    fn beyond(&self) -> PanelArea {
        PanelArea { columns: self.columns.end..self.columns.end + WIDTH, depth: 0..self.depth }
    }

    fn at(&self, column: usize, from: usize) -> Option<PanelArea> {
        let columns = column..self.columns.end.min(column + WIDTH);
        (!columns.is_empty()).then(|| PanelArea { columns, depth: from..self.length.min(from + self.depth) })
    }
}

/// Weights of each column that are multiplied from one packing step to the next.
const PACK_EVERY: usize = 16;

/// The packing of a panel, in steps of sixteen bytes of sixteen columns. Steps alternate with products of another
/// panel, so that the processor does both at once, and prefetch what the next panel is packed from.
struct Packer {
    /// The next sixteen bytes of the first column, and where they go.
    from: *const u8,
    to: *mut u8,
    /// The next line to prefetch, of the first of four columns.
    later: *const u8,
    /// The places for the second sixteen columns.
    second: Places,
    /// Bytes from one column to the next.
    pitch: usize,
    /// Steps left, those of each half of the columns, and those that [`Packer::advance`] does.
    left: usize,
    half: usize,
    per_advance: usize,
}

/// Values of the fields of [`Packer`] with these names.
struct Places {
    from: *const u8,
    to: *mut u8,
    later: *const u8,
}

impl Packer {
    /// Nothing is left.
    const DONE: Packer = {
        let (from, to) = (std::ptr::null(), std::ptr::null_mut());
        let second = Places { from, to, later: from };
        Packer { from, to, later: from, second, pitch: 0, left: 0, half: 0, per_advance: 0 }
    };

    /// Divides the rest among this many calls of [`Packer::advance`].
    fn divide(&mut self, calls: usize) {
        self.per_advance = self.left.div_ceil(calls.max(1));
    }

    /// Packs the rest.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn finish<const BITS: usize>(&mut self) {
        self.per_advance = self.left;
        self.advance::<BITS>();
    }

    /// Does the steps of a call.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn advance<const BITS: usize>(&mut self) {
        for _ in 0..self.per_advance.min(self.left) {
            // SAFETY: `Panel::begin` counts as many steps as there are codes in the columns, and room for them in the
            // panel.
            unsafe {
                for (at, word) in transpose_pitched(self.from, self.pitch).into_iter().enumerate() {
                    let to = self.to.add(at * 4 * WIDTH);
                    if BITS == 8 {
                        _mm512_store_si512(to.cast(), word);
                    } else {
                        let low_nibbles = _mm512_set1_epi8(15);
                        _mm512_store_si512(to.cast(), _mm512_and_si512(word, low_nibbles));
                        let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(word), low_nibbles);
                        _mm512_store_si512(to.add(16 * 4 * WIDTH).cast(), odd);
                    }
                }
                for column in 0..4 {
                    // A hint, for which any address will do.
                    _mm_prefetch::<_MM_HINT_T1>(self.later.wrapping_add(column * self.pitch).cast());
                }
                self.left -= 1;
                self.from = self.from.add(16);
                self.to = self.to.wrapping_add(4 * 4 * WIDTH);
                self.later = self.later.wrapping_add(4 * self.pitch);
                // A line of all columns is done.
                if self.left.is_multiple_of(4) {
                    self.later = self.later.wrapping_sub(16 * self.pitch).wrapping_add(64);
                    if BITS == 4 {
                        self.to = self.to.wrapping_add(16 * 4 * WIDTH);
                    }
                    if self.left == self.half {
                        (self.from, self.to, self.later) = (self.second.from, self.second.to, self.second.later);
                    }
                }
            }
        }
    }
}

impl Panel {
    const UNINIT: Panel = {
        let items = [[MaybeUninit::uninit(); WIDTH]; DEPTH / 16];
        Panel { codes: [MaybeUninit::uninit(); WIDTH * DEPTH], scales: items, zeros: items }
    };

    /// Packs the scales of an area and returns what packs its codes, which prefetches those of `later` meanwhile. An
    /// area that ends within a line, or has fewer columns, is copied to `edge` first. Columns beyond the last hold
    /// arbitrary values that nobody reads.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn begin<const BITS: usize>(
        &mut self,
        w: &Weights,
        PanelArea { columns, depth }: &PanelArea,
        later: &PanelArea,
        edge: &mut Vec<u8>,
    ) -> Packer {
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.row_bytes());
        assert!(columns.end * bytes <= w.codes.len() && columns.end * blocks <= w.scales.len());
        assert!(depth.end * BITS <= bytes * 8 && depth.len() <= DEPTH && depth.start.is_multiple_of(128));
        assert!(columns.len() <= WIDTH && !columns.is_empty());
        let panel_blocks = depth.start / size..depth.end / size;
        let column = |at: usize| (columns.start + at).min(columns.end - 1);
        for half in 0..2 {
            let mut from: [*const u8; 16] = [std::ptr::null(); 16];
            for (at, from) in from.iter_mut().enumerate() {
                *from = w.scales[column(half * 16 + at) * blocks + panel_blocks.start..].as_ptr().cast();
            }
            // Four blocks of all columns at a time, as long as there are four.
            let fours = panel_blocks.len() / 4;
            for four in 0..fours {
                // SAFETY: each column has four scales there, and the panel room for sixteen columns of each.
                unsafe {
                    for (at, scales) in transpose_rows(&from, four).into_iter().enumerate() {
                        let to = self.scales.as_mut_ptr().add(four * 4 + at).cast::<f32>().add(half * 16);
                        _mm512_store_si512(to.cast(), scales);
                    }
                }
            }
            for block in fours * 4..panel_blocks.len() {
                for (at, from) in from.iter().enumerate() {
                    // SAFETY: the column has a scale for each block of the panel.
                    self.scales[block][half * 16 + at].write(unsafe { *from.cast::<f32>().add(block) });
                }
            }
        }
        if w.zero_points.is_some() {
            for at in 0..WIDTH {
                for (zeros, (scales, block)) in self.zeros.iter_mut().zip(self.scales.iter().zip(panel_blocks.clone()))
                {
                    // SAFETY: the scales of these blocks were written above.
                    let scale = unsafe { scales[at].assume_init() };
                    zeros[at].write(scale * w.zero_point(column(at), block) as f32);
                }
            }
        }
        let scales = w.scales.as_ptr().wrapping_add(later.columns.start * blocks + later.depth.start / size);
        for at in 0..WIDTH {
            // A hint, for which any address will do.
            _mm_prefetch::<_MM_HINT_T1>(scales.wrapping_add(at * blocks).cast());
        }

        let lines = (depth.len() * BITS / 8).div_ceil(64);
        let codes = w.codes.as_ptr();
        let (mut from, mut pitch) = (codes.wrapping_add(columns.start * bytes + depth.start * BITS / 8), bytes);
        if columns.len() < WIDTH || !(depth.len() * BITS / 8).is_multiple_of(64) {
            const EDGE_PITCH: usize = DEPTH;
            edge.resize(WIDTH * EDGE_PITCH, 0);
            for (edge, column) in edge.chunks_exact_mut(EDGE_PITCH).zip(columns.clone()) {
                let codes = &w.codes[column * bytes..][depth.start * BITS / 8..depth.end * BITS / 8];
                edge[..codes.len()].copy_from_slice(codes);
            }
            (from, pitch) = (edge.as_ptr(), EDGE_PITCH);
        }
        let later = codes.wrapping_add(later.columns.start * bytes + later.depth.start * BITS / 8);
        let (to, half) = (self.codes.as_mut_ptr().cast::<u8>(), 4 * lines);
        let second = Places {
            from: from.wrapping_add(16 * pitch),
            to: to.wrapping_add(64),
            later: later.wrapping_add(16 * pitch),
        };
        Packer { from, to, later, second, pitch, left: 2 * half, half, per_advance: 0 }
    }
}

/// Where the activations that meet a block begin in a plane, and how many follow there.
const fn block_places(bits: usize, size: usize, block: usize) -> [(usize, usize); 2] {
    let first = Order::of(bits).place(block * size);
    match bits {
        8 => [(first, size), (first, 0)],
        _ => [(first, size / 2), (first + 64, size / 2)],
    }
}

/// Computes a tile of `R` rows from a panel, or adds to it if the panel is not the first of its columns; with `PACKS`,
/// another panel is packed meanwhile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply_tile<const BITS: usize, const PLANES: usize, const R: usize, const PACKS: bool>(
    Operands { x, w, bias, y, .. }: &Operands,
    panel: &Panel,
    Tile { rows, columns, depth }: Tile,
    packer: &mut Packer,
) {
    const { assert!(R * PLANES <= 12) };
    let (row, stride, blocks, spans) = (rows.start, x.layout.stride, x.layout.blocks, x.layout.spans());
    let (padded_rows, size, span) = (x.layout.padded_rows(x.rows), w.block_size, x.layout.span());
    // All unchecked accesses below stay within these bounds.
    assert!(row + R <= padded_rows && rows.end <= y.rows && x.values.len() == padded_rows * stride * PLANES);
    assert!(x.offsets.len() == padded_rows * blocks && x.scales.len() == padded_rows * spans);
    assert!(x.sums.len() == x.offsets.len());
    assert!(depth.len() <= DEPTH && depth.end.next_multiple_of(span) <= stride && columns.end <= y.n);
    assert!(x.layout.tile.is_some_and(|tile| tile.get() == R) && row.is_multiple_of(R), "a tile of {R} rows");
    // Four activations of all rows and planes lie beside the next four of them, and so do the rows' offsets, sums and
    // scales.
    let pitch = const { R * PLANES };
    let values = x.values[row * stride * PLANES + depth.start * pitch..].as_ptr();
    let (offsets, sums) = (x.offsets[row * blocks..].as_ptr(), x.sums[row * blocks..].as_ptr());
    let scales = x.scales[row * spans..].as_ptr();
    let mut totals = [[_mm512_setzero_ps(); 2]; R];
    // Sums are carried from panel to panel, so that they do not depend on the depth of panels.
    for (at, totals) in totals.iter_mut().enumerate().take(rows.len()) {
        let before = match depth.start {
            0 => bias.map(|bias| bias[columns.clone()].as_ptr()),
            // SAFETY: rows and columns are within the output.
            _ => Some(unsafe { y.at(row + at, columns.start).cast_const() }),
        };
        if let Some(before) = before {
            // SAFETY: as many numbers as columns follow; no other thread has those of the output.
            *totals = unsafe { load_up_to_32(before, columns.len()) };
        }
    }
    for block in 0..depth.len() / size {
        let first_of_block = (depth.start / size + block) * R;
        let mut low = [[_mm512_setzero_si512(); 2]; R];
        let mut high = [[_mm512_setzero_si512(); 2]; R];
        for (at, low) in low.iter_mut().enumerate() {
            // SAFETY: the tile has an offset for each row of each block.
            *low = [_mm512_set1_epi32(unsafe { *offsets.add(first_of_block + at) }); 2];
        }
        for (first, count) in block_places(BITS, size, block) {
            // SAFETY: the places are within the panel and the rows.
            let (mut codes, mut fours) = unsafe {
                (panel.codes.as_ptr().cast::<u8>().add(first * WIDTH), values.add(first * pitch).cast::<i32>())
            };
            for at in (0..count).step_by(PACK_EVERY) {
                if PACKS {
                    packer.advance::<BITS>();
                }
                for _ in 0..(count - at).min(PACK_EVERY) / 4 {
                    // SAFETY: `count` places follow the first one in the panel and in the rows; the panel was packed
                    // for them.
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
        let column_scales = &panel.scales[block];
        // SAFETY: 32 scales are two times sixteen; those of the block were packed.
        let column_scales = unsafe {
            let second = column_scales[16..].as_ptr();
            [_mm512_loadu_ps(column_scales.as_ptr().cast()), _mm512_loadu_ps(second.cast())]
        };
        let first_of_span = (depth.start + block * size) / span * R;
        for at in 0..R {
            // SAFETY: the tile has a scale for each row of each span.
            let row_scale = _mm512_set1_ps(unsafe { *scales.add(first_of_span + at) });
            for half in 0..2 {
                let sum = match PLANES {
                    2 => _mm512_add_epi32(low[at][half], _mm512_slli_epi32::<8>(high[at][half])),
                    _ => low[at][half],
                };
                let scale = _mm512_mul_ps(column_scales[half], row_scale);
                totals[at][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[at][half]);
            }
        }
        if w.zero_points.is_some() {
            for (at, totals) in totals.iter_mut().enumerate() {
                // SAFETY: the tile has a sum for each row of each block.
                let sum = _mm512_set1_ps(unsafe { *sums.add(first_of_block + at) });
                for (half, total) in totals.iter_mut().enumerate() {
                    // SAFETY: sixteen numbers follow; those of the block were packed.
                    let zeros = unsafe { _mm512_loadu_ps(panel.zeros[block][half * 16..].as_ptr().cast()) };
                    *total = _mm512_fnmadd_ps(zeros, sum, *total);
                }
            }
        }
    }
    for (at, totals) in totals.into_iter().enumerate().take(rows.len()) {
        // SAFETY: rows and columns are within the output, and no other thread has them.
        unsafe { store_up_to_32(totals, y.at(row + at, columns.start), columns.len()) };
    }
}
