//! The product with AVX2.

use std::arch::x86_64::*;
use std::array::from_fn;

use super::{Activations, COLUMNS, Product, ROWS, Sums, Weights};

/// Bytes from what is read to what will be.
const AHEAD: usize = 2048;

/// Weights of 4 bits meet activations in the order of [`Order::Fours`](super::Order::Fours).
///
/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply<const BITS: usize>(product: &Product) {
    product.in_tiles(|x, w, [row, rows], [column, columns], zeros| match (rows, columns) {
        (1, 4) => of::<BITS, 1, 4>(x, w, row, column, zeros),
        (1, 3) => of::<BITS, 1, 3>(x, w, row, column, zeros),
        (1, 2) => of::<BITS, 1, 2>(x, w, row, column, zeros),
        (1, 1) => of::<BITS, 1, 1>(x, w, row, column, zeros),
        (2, 2) => of::<BITS, 2, 2>(x, w, row, column, zeros),
        (2, 1) => of::<BITS, 2, 1>(x, w, row, column, zeros),
        (3, 2) => of::<BITS, 3, 2>(x, w, row, column, zeros),
        (3, 1) => of::<BITS, 3, 1>(x, w, row, column, zeros),
        (4, 2) => of::<BITS, 4, 2>(x, w, row, column, zeros),
        (4, 1) => of::<BITS, 4, 1>(x, w, row, column, zeros),
        other => unreachable!("a tile of {other:?}"),
    });
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn of<const BITS: usize, const R: usize, const C: usize>(
    x: &Activations,
    w: &Weights,
    row: usize,
    column: usize,
    zeros: &[f32],
) -> Sums {
    const { assert!(R <= ROWS && C <= COLUMNS) };
    let (blocks, size) = (w.blocks(), w.block_size);
    let (length, bytes) = (blocks * size, blocks * w.block_bytes());
    // Blocks of 32 numbers of 4 bits are taken two at a time: of each sixteen numbers the first eight are the first's.
    let (at_once, span) = if BITS == 4 && size == 32 { (2, 64) } else { (1, size) };
    // Everything below stays within these; `blocks` is a multiple of `at_once` in the order that 4 bits are in.
    assert!((row + R) * length <= x.numbers.len() && (row + R) * blocks <= x.sums.len());
    assert!((column + C) * bytes <= w.numbers.len() && (column + C) * blocks <= w.scales.len());
    assert!(blocks.is_multiple_of(at_once) && span.is_multiple_of(if BITS == 4 { 64 } else { 16 }));
    let numbers: [*const i16; R] = from_fn(|at| x.numbers[(row + at) * length..].as_ptr());
    let packed: [*const u8; C] = from_fn(|at| w.numbers[(column + at) * bytes..].as_ptr());
    let scales: [*const f32; C] = from_fn(|at| w.scales[(column + at) * blocks..].as_ptr());

    let mut totals = [[_mm256_setzero_ps(); R]; C];
    for block in (0..blocks).step_by(at_once) {
        let first = block * size;
        // Further rows find it in the cache.
        if row == 0 {
            fetch(&packed, first * BITS / 8, span * BITS / 8);
        }
        let mut sums = [[_mm256_setzero_si256(); R]; C];
        if BITS == 8 {
            for at in (first..first + span).step_by(16) {
                // SAFETY: within the tile.
                unsafe {
                    let codes: [__m256i; C] =
                        from_fn(|column| _mm256_cvtepu8_epi16(_mm_loadu_si128(packed[column].add(at).cast())));
                    for row in 0..R {
                        let x = _mm256_loadu_si256(numbers[row].add(at).cast());
                        for column in 0..C {
                            let product = _mm256_madd_epi16(codes[column], x);
                            sums[column][row] = _mm256_add_epi32(sums[column][row], product);
                        }
                    }
                }
            }
        } else {
            for at in (first..first + span).step_by(64) {
                for column in 0..C {
                    // SAFETY: within the tile.
                    unsafe {
                        let fours = fours(_mm256_loadu_si256(packed[column].add(at / 2).cast()));
                        for row in 0..R {
                            for (i, &four) in fours.iter().enumerate() {
                                let x = _mm256_loadu_si256(numbers[row].add(at + 16 * i).cast());
                                let product = _mm256_madd_epi16(four, x);
                                sums[column][row] = _mm256_add_epi32(sums[column][row], product);
                            }
                        }
                    }
                }
            }
        }
        for column in 0..C {
            // SAFETY: within the tile.
            let scale = unsafe {
                match at_once {
                    2 => two_scales(scales[column].add(block)),
                    _ => _mm256_broadcast_ss(&*scales[column].add(block)),
                }
            };
            for row in 0..R {
                let sum = _mm256_cvtepi32_ps(sums[column][row]);
                totals[column][row] = _mm256_fmadd_ps(sum, scale, totals[column][row]);
            }
        }
    }

    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for column in 0..C {
        let zeros = &zeros[column * blocks..][..blocks];
        for block in (0..blocks).step_by(8) {
            let there = _mm256_cmpgt_epi32(_mm256_set1_epi32((blocks - block).min(8) as i32), lanes);
            // SAFETY: only lanes that are there are read.
            unsafe {
                let zeros = _mm256_maskload_ps(zeros.as_ptr().add(block), there);
                for (row, total) in (row..).zip(&mut totals[column]) {
                    let sums = _mm256_maskload_ps(x.sums.as_ptr().add(row * blocks + block), there);
                    *total = _mm256_fnmadd_ps(zeros, sums, *total);
                }
            }
        }
    }
    // The eight lanes of four sums at a time.
    let mut flat = [_mm256_setzero_ps(); ROWS * COLUMNS];
    let mut sums = [0.0; ROWS * COLUMNS];
    for (at, total) in totals.as_flattened().iter().enumerate() {
        flat[at] = *total;
    }
    for (fours, sums) in flat.chunks_exact(4).zip(sums.chunks_exact_mut(4)).take((R * C).div_ceil(4)) {
        let all = _mm256_hadd_ps(_mm256_hadd_ps(fours[0], fours[1]), _mm256_hadd_ps(fours[2], fours[3]));
        let all = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
        // SAFETY: four numbers.
        unsafe { _mm_storeu_ps(sums.as_mut_ptr(), all) };
    }
    let mut result = Sums::default();
    for (result, sums) in result.iter_mut().zip(sums.chunks_exact(R)).take(C) {
        result[..R].copy_from_slice(sums);
    }
    result
}

/// Has the memory send what will be read a little later than `bytes` bytes of each column from `first` on: rows are too
/// short for the processor to see by itself where they go.
#[inline(always)]
fn fetch(packed: &[*const u8], first: usize, bytes: usize) {
    if !first.is_multiple_of(64) {
        return;
    }
    for packed in packed {
        for line in (0..bytes).step_by(64) {
            // SAFETY: a hint, which may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(packed.wrapping_add(first + line + AHEAD).cast()) };
        }
    }
}

/// The 64 numbers of 4 bits in 32 bytes, in the order of [`Order::Fours`](super::Order::Fours).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn fours(words: __m256i) -> [__m256i; 4] {
    let low = _mm256_set1_epi16(15);
    [
        _mm256_and_si256(words, low),
        _mm256_and_si256(_mm256_srli_epi16::<4>(words), low),
        _mm256_and_si256(_mm256_srli_epi16::<8>(words), low),
        _mm256_srli_epi16::<12>(words),
    ]
}

/// Two scales, each for four of eight sums.
///
/// # Safety
/// There are two.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn two_scales(scales: *const f32) -> __m256 {
    // SAFETY: the caller's.
    let two = _mm_castpd_ps(unsafe { _mm_load_sd(scales.cast()) });
    _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))
}
