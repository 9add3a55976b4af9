//! Matrix multiplication of quantized activations with block-quantized weights: integers within a block, float32 from
//! block to block.
//!
//! `y = sx · Σ_blocks sw · (Σ q·w − zero · Σ q)`, where `q` are a row's activations in int16 with the scale `sx`. The
//! sums in the brackets are exact, `128 · 255 · 32767 < 2³¹`; those of `q` are subtracted last, for all blocks at once.

pub mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_panels;
#[cfg(target_arch = "x86_64")]
pub mod coarse;
mod columns;
mod portable;
mod tasks;
#[cfg(target_arch = "x86_64")]
pub mod vnni;
pub mod weights;

use std::ops::Range;

pub use activations::{Activations, Format};
pub use columns::Columns;
pub use tasks::QuantizedMatMul;
pub use weights::Weights;

use super::Output;
#[cfg(target_arch = "x86_64")]
use crate::isa::Level;

/// The part to compute: some rows of some columns of a product.
struct Operands<'p> {
    x: &'p Activations,
    w: &'p Weights<'p>,
    bias: Option<&'p [f32]>,
    rows: Range<usize>,
    columns: Columns<'p>,
    y: &'p Output<'p>,
}

/// Computes these rows of these columns of `y = x · wᵀ + bias`.
///
/// # Safety
/// No other thread reads or writes them meanwhile.
pub unsafe fn multiply(
    x: &Activations,
    w: &Weights,
    bias: Option<&[f32]>,
    rows: Range<usize>,
    columns: Columns,
    y: &Output,
) {
    let within = match &columns {
        Columns::Range(columns) => columns.end <= y.n,
        Columns::Listed(columns) => !x.in_panels && columns.iter().all(|&column| column < y.n),
    };
    let fits = rows.end <= y.rows && within && x.rows == y.rows;
    assert!(fits && bias.is_none_or(|bias| bias.len() == y.n), "sizes of a matrix multiplication");
    #[cfg(target_arch = "x86_64")]
    if x.level >= Level::Vnni {
        // SAFETY: the processor supports the level that `x` was quantized at; the caller promises that no other thread
        // has the results.
        return unsafe { vnni::multiply(&x.int8, w, bias, rows, columns, y) };
    }
    let operands = Operands { x, w, bias, rows, columns, y };
    #[cfg(target_arch = "x86_64")]
    if x.level == Level::Avx2 {
        use activations::Order;
        // SAFETY: the processor supports the level that `x` was quantized at.
        unsafe {
            match (w.bits, x.order) {
                (8, _) if x.in_panels => return avx2_panels::multiply::<8>(&operands),
                (_, Order::Plain) if x.in_panels => return avx2_panels::multiply::<4>(&operands),
                (8, _) => return avx2::multiply::<8>(&operands),
                (_, Order::EveryFourth) => return avx2::multiply::<4>(&operands),
                _ => {}
            }
        }
    }
    portable::multiply(&operands);
}

/// Whether full-precision products of this many rows are memory-bound.
#[cfg(target_arch = "x86_64")]
pub fn is_memory_bound(rows: usize, w: &Weights) -> bool {
    vnni::uses_amx(rows, w)
}

#[cfg(test)]
mod tests {
    use super::weights::testing::{Quantization, RandomWeights};
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::Noise;
    use crate::parallel::SharedSlice;

    /// The product in float64.
    fn reference(x: &[f32], w: &Weights, n: usize) -> Vec<f64> {
        let product = |x: &[f32], row: usize| -> f64 {
            x.iter().enumerate().map(|(column, &x)| f64::from(x) * w.value(row, column)).sum()
        };
        x.chunks(w.k).flat_map(|x| (0..n).map(move |row| product(x, row))).collect()
    }

    /// One result from the quantized operands, number by number.
    fn result_at(operands: &Operands, row: usize, column: usize) -> f32 {
        let Operands { x, w, bias, .. } = operands;
        let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
        let mut sum = 0.0;
        for block in 0..blocks {
            let codes = &w.codes[(column * blocks + block) * bytes..][..bytes];
            let zero = w.zero_point(column, block);
            let weight = |at: usize| match w.bits {
                8 => i32::from(codes[at]) - zero,
                _ => i32::from(codes[at / 2] >> (at % 2 * 4) & 15) - zero,
            };
            let value = |at: usize| x.value(row, block * size + at, blocks * size);
            let products = (0..size).map(|at| value(at) * weight(at)).sum::<i32>();
            sum += products as f32 * (w.scales[column * blocks + block] * x.scale(row, block * size));
        }
        sum + bias.map_or(0.0, |bias| bias[column])
    }

    #[derive(Clone, Copy, Debug)]
    struct Case {
        quantization: Quantization,
        rows: usize,
        n: usize,
        k: usize,
        format: Format,
    }

    fn cases() -> Vec<Case> {
        const QUANTIZATIONS: [(usize, usize, bool); 10] = [
            (8, 128, true),
            (8, 128, false),
            (8, 32, false),
            (8, 16, true),
            (8, 64, true),
            (4, 32, true),
            (4, 128, false),
            (4, 16, true),
            (4, 64, true),
            (4, 32, false),
        ];
        const SHAPES: [(usize, usize, usize, Format); 13] = [
            (1, 5, 64, Format::Int16),
            (1, 13, 512, Format::Int16),
            (2, 9, 192, Format::Int16),
            (3, 7, 200, Format::Int16),
            (4, 3, 128, Format::Int16),
            (9, 33, 136, Format::Int16),
            (9, 33, 136, Format::Int16Listed),
            (8, 16, 512, Format::Int16),
            (20, 41, 1160, Format::Int16),
            (2, 9, 192, Format::Int8),
            (23, 70, 200, Format::Int8),
            (45, 32, 640, Format::Int8),
            (263, 24, 640, Format::Int8),
        ];
        let of = |(bits, block_size, symmetric)| {
            let quantization = Quantization { bits, block_size, symmetric };
            SHAPES.map(|(rows, n, k, format)| Case { quantization, rows, n, k, format })
        };
        QUANTIZATIONS.into_iter().flat_map(of).collect()
    }

    /// Computes the product in two halves of the columns, and compares it with float64 and with the quantized operands.
    fn checked_product(case: Case) -> Vec<f32> {
        let Case { quantization, rows, n, k, format } = case;
        let seed = (quantization.bits * quantization.block_size * rows + k) as u32;
        let weights = RandomWeights::new(n, k, quantization, seed);
        let weights = weights.view();
        let mut noise = Noise::new(seed + 1);
        let x: Vec<f32> = (0..rows * k).map(|_| noise.next_f32()).collect();

        let mut activations = Activations::default();
        activations.quantize(&x, &weights, format);
        let bias: Vec<f32> = (0..n).map(|column| column as f32).collect();
        let mut y = vec![f32::NAN; rows * n];
        let output = Output::new(SharedSlice::new(&mut y), rows, n);
        let listed: Vec<usize> = (n / 2..n).collect();
        let second = if format == Format::Int16Listed { Columns::Listed(&listed) } else { Columns::Range(n / 2..n) };
        for columns in [Columns::Range(0..n / 2), second] {
            // SAFETY: there is one thread.
            unsafe { multiply(&activations, &weights, Some(&bias), 0..rows, columns, &output) };
        }
        let columns = Columns::Range(0..n);
        let operands = Operands { x: &activations, w: &weights, bias: Some(&bias), rows: 0..rows, columns, y: &output };
        let quantized: Vec<f32> = (0..rows * n).map(|at| result_at(&operands, at / n, at % n)).collect();

        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let biased = |(at, y): (usize, f64)| y + (at % n) as f64;
        let expected: Vec<f64> = reference(&x, &weights, n).into_iter().enumerate().map(biased).collect();
        let apart = norm(&mut expected.iter().zip(&y).map(|(a, &b)| a - f64::from(b)));
        let apart = apart / norm(&mut expected.iter().copied());
        let is_int8 = activations.level >= Level::Vnni && format == Format::Int8;
        assert!(apart < if is_int8 { 1e-2 } else { 1e-4 }, "{case:?}: {apart}");
        for (&quantized, &found) in quantized.iter().zip(&y) {
            let (quantized, found) = (f64::from(quantized), f64::from(found));
            assert!((quantized - found).abs() < 1e-4 * (1.0 + quantized.abs()), "{case:?}: {quantized} and {found}");
        }
        y
    }

    #[test]
    fn products_are_those_of_float64() {
        let of_vnni = std::cell::RefCell::new(Vec::new());
        at_each_level(Level::Generic, |level| {
            let products: Vec<(Case, Vec<f32>)> =
                cases().into_iter().map(|case| (case, checked_product(case))).collect();
            if level == Level::Vnni {
                *of_vnni.borrow_mut() = products;
                return;
            }
            // With many rows, AMX and panels add up the same integers in the same order.
            for ((case, vnni), (_, amx)) in of_vnni.borrow().iter().zip(products).filter(|_| level == Level::Amx) {
                let is_same = vnni.iter().zip(&amx).all(|(a, b)| a.to_bits() == b.to_bits());
                let are_many = case.format == Format::Int8 || case.format == Format::Int16 && case.rows >= 5;
                assert!(is_same || !are_many, "{case:?}");
            }
        });
    }

    #[test]
    fn nan_and_infinity_are_not_hidden() {
        at_each_level(Level::Generic, |level| {
            let (codes, scales) = ([200_u8; 32], [1.0_f32; 2]);
            let weights = Weights { codes: &codes, scales: &scales, zero_points: None, k: 16, bits: 8, block_size: 16 };
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = [1.0; 16];
                x[3] = bad;
                let mut activations = Activations::default();
                activations.quantize(&x, &weights, Format::Int16);
                let mut y = [0.0; 2];
                let output = Output::new(SharedSlice::new(&mut y), 1, 2);
                // SAFETY: there is one thread.
                unsafe { multiply(&activations, &weights, None, 0..1, Columns::Range(0..2), &output) };
                assert!(y.iter().all(|y| y.is_nan()), "{level:?}, {bad}: {y:?}");
            }
        });
    }
}
