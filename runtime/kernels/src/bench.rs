//! Single-threaded entry points to the kernels for `benches/kernels.rs`: each function makes operands of a shape and
//! returns a closure that runs the kernel once.

use std::hint::black_box;
use std::ops::Range;

use crate::aligned::AlignedVec;
use crate::attention::single_head::{Head, KeyMask, Scratch, attend, pack_keys, packed_length};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx2Token;
use crate::matmul::Output;
#[cfg(target_arch = "x86_64")]
use crate::matmul::quantized::coarse;
use crate::matmul::quantized::{self, Activations, Columns, Format, Weights};
#[cfg(target_arch = "x86_64")]
use crate::matmul::{Shape, float};
use crate::noise::noise;
use crate::parallel::SharedSlice;

/// Random numbers before they repeat: generating as many as a head has would take longer than the benchmark.
const PERIOD: usize = 1 << 20;

/// Numbers between −1 and 1, aligned as those of ONNX Runtime and of the mapped file are.
fn repeated_noise(count: usize) -> AlignedVec<f32> {
    repeated(count, noise(count.min(PERIOD), 1))
}

fn repeated<T: Copy>(count: usize, values: Vec<T>) -> AlignedVec<T> {
    let mut all = AlignedVec::default();
    while all.len() < count {
        let left = count - all.len();
        all.extend_from_slice(&values[..values.len().min(left)]);
    }
    all
}

/// A matrix `[n, k]` of block-quantized weights.
struct RandomWeights {
    codes: AlignedVec<u8>,
    scales: Vec<f32>,
    k: usize,
    bits: usize,
    block_size: usize,
}

impl RandomWeights {
    fn new(n: usize, k: usize, bits: usize, block_size: usize) -> RandomWeights {
        let blocks = k.div_ceil(block_size);
        let count = n * blocks * block_size * bits / 8;
        let codes = noise(count.min(PERIOD), 1).iter().map(|x| (x.abs() * 256.0) as u8).collect();
        RandomWeights { codes: repeated(count, codes), scales: vec![0.01; n * blocks], k, bits, block_size }
    }

    fn weights(&self) -> Weights<'_> {
        let RandomWeights { codes, scales, k, bits, block_size } = self;
        Weights { codes, scales, zero_points: None, k: *k, bits: *bits, block_size: *block_size }
    }
}

/// `MatMulNBits` of `[rows, k]` by `[n, k]` in a decoder.
pub fn quantized_int16([rows, n, k]: [usize; 3], bits: usize, block_size: usize) -> impl FnMut() {
    quantized([rows, n, k], bits, block_size, Format::Int16)
}

/// `MatMulNBits` of `[rows, k]` by `[n, k]` in an encoder.
pub fn quantized_int8([rows, n, k]: [usize; 3], bits: usize, block_size: usize) -> impl FnMut() {
    quantized([rows, n, k], bits, block_size, Format::Int8)
}

fn quantized([rows, n, k]: [usize; 3], bits: usize, block_size: usize, format: Format) -> impl FnMut() {
    let (weights, x) = (RandomWeights::new(n, k, bits, block_size), repeated_noise(rows * k));
    let (mut activations, mut y) = (Activations::default(), vec![0.0; rows * n]);
    move || {
        let weights = weights.weights();
        activations.quantize(&x, &weights, format);
        let output = Output::new(SharedSlice::new(&mut y), rows, n);
        // SAFETY: there is one thread.
        unsafe { quantized::multiply(&activations, &weights, None, 0..rows, Columns::Range(0..n), &output) };
        black_box(&y);
    }
}

/// The coarse pass over the head of a vocabulary, where this processor has one.
#[cfg(target_arch = "x86_64")]
pub fn coarse([rows, n, k]: [usize; 3], bits: usize, block_size: usize) -> Option<impl FnMut()> {
    let (weights, x) = (RandomWeights::new(n, k, bits, block_size), repeated_noise(rows * k));
    let (mut activations, mut y) = (coarse::CoarseActivations::default(), vec![0.0; rows * n]);
    Avx2Token::new().map(|_| {
        move || {
            let weights = weights.weights();
            activations.quantize(&x, &weights);
            let output = Output::new(SharedSlice::new(&mut y), rows, n);
            // SAFETY: the token proves AVX2 and FMA, and there is one thread.
            unsafe { coarse::multiply(&activations, &weights, 0..n, &output) };
            black_box(&y);
        }
    })
}

/// `TransposeMatMul` of `[rows, k]` by `[n, k]`, where this processor has a kernel for it.
#[cfg(target_arch = "x86_64")]
pub fn float32([rows, n, k]: [usize; 3]) -> Option<impl FnMut()> {
    let (x, w, mut y) = (repeated_noise(rows * k), repeated_noise(n * k), vec![0.0; rows * n]);
    Avx2Token::new().map(|token| {
        move || {
            let output = Output::new(SharedSlice::new(&mut y), rows, n);
            let operands = float::Operands::new(&x, &w, output, Shape { rows, n, k });
            // SAFETY: there is one thread.
            unsafe { float::multiply(token, &operands, 0..rows, 0..n) };
            black_box(&y);
        }
    })
}

/// Keys at most `reach` positions from the query, before and after it.
struct Window {
    keys: usize,
    reach: usize,
}

impl KeyMask for Window {
    fn range(&self, query: usize) -> Range<usize> {
        query.saturating_sub(self.reach)..self.keys.min(query + self.reach + 1)
    }

    fn mask(&self, _: usize, _: Range<usize>) -> Option<&[bool]> {
        None
    }
}

/// One head of an encoder's attention over `length` tokens, with soft-cap.
pub fn attention(length: usize, dim: usize, window: Option<usize>) -> impl FnMut() {
    let [queries, keys, values] = [(); 3].map(|()| repeated_noise(length * dim));
    let (mut packed, mut to) = (vec![0.0; packed_length(length, dim)], vec![0.0; length * dim]);
    let mut scratch = Scratch::default();
    move || {
        pack_keys(&keys, dim, dim, &mut packed);
        let (queries, keys, values) = (&queries[..], &keys[..], &values[..]);
        let head = Head { queries, keys, values, packed_keys: Some(&packed), dim, scale: 0.1, cap: Some(50.0) };
        let mask = Window { keys: length, reach: window.unwrap_or(length) };
        attend(head, &mask, 0..length, &mut scratch, &mut to);
        black_box(&to);
    }
}
