//! The kernels by themselves, on one thread, for `benches/kernels.rs`: each function makes operands of a shape and returns what
//! computes them once.

use std::hint::black_box;
use std::ops::Range;

use super::aligned::Aligned;
use super::attention::head::{Head, Room, Visible, attend, length_of_turned, turned};
#[cfg(target_arch = "x86_64")]
use super::float;
#[cfg(target_arch = "x86_64")]
use super::product::rough;
use super::product::{self, Activations, Columns, Output, Purpose, Weights};

/// Numbers that are there before they come again: to make as many as a head has would take longer than what is timed.
const PERIOD: usize = 1 << 20;

/// Numbers of either sign, which lie as those of ONNX Runtime and of the mapped file do.
fn noise(count: usize) -> Aligned<f32> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    repeated(count, (0..count.min(PERIOD)).map(|_| next()).collect())
}

/// So many numbers: these, again and again.
fn repeated<T: Copy>(count: usize, numbers: Vec<T>) -> Aligned<T> {
    let mut all = Aligned::default();
    while all.len() < count {
        let left = count - all.len();
        all.extend_from_slice(&numbers[..numbers.len().min(left)]);
    }
    all
}

/// A matrix `[n, k]` of `bits` bits in blocks.
struct Packed {
    numbers: Aligned<u8>,
    scales: Vec<f32>,
    k: usize,
    bits: usize,
    block_size: usize,
}

impl Packed {
    fn new([n, k]: [usize; 2], bits: usize, block_size: usize) -> Packed {
        let blocks = k.div_ceil(block_size);
        let count = n * blocks * block_size * bits / 8;
        let codes = noise(count.min(PERIOD)).iter().map(|x| (x.abs() * 256.0) as u8).collect();
        Packed { numbers: repeated(count, codes), scales: vec![0.01; n * blocks], k, bits, block_size }
    }

    fn weights(&self) -> Weights<'_> {
        let Packed { numbers, scales, k, bits, block_size } = self;
        Weights { numbers, scales, zero_points: None, k: *k, bits: *bits, block_size: *block_size }
    }
}

/// `MatMulNBits` of `[rows, k]` by `[n, k]`; `coarse` as in an encoder.
pub fn few_bits([rows, n, k]: [usize; 3], bits: usize, block_size: usize, coarse: bool) -> impl FnMut() {
    let purpose = if coarse { Purpose::Coarse } else { Purpose::Whole };
    let (packed, x, mut y) = (Packed::new([n, k], bits, block_size), noise(rows * k), vec![0.0; rows * n]);
    let mut activations = Activations::default();
    move || {
        let weights = packed.weights();
        activations.round(&x, &weights, purpose);
        let output = Output::new(&mut y, rows, n);
        // SAFETY: there is one thread.
        unsafe { product::multiply(&activations, &weights, None, (0..rows, Columns::All(0..n)), &output) };
        black_box(&y);
    }
}

/// The first pass over the head of a vocabulary, where this processor has one.
#[cfg(target_arch = "x86_64")]
pub fn roughly([rows, n, k]: [usize; 3], bits: usize, block_size: usize) -> Option<impl FnMut()> {
    let (packed, x, mut y) = (Packed::new([n, k], bits, block_size), noise(rows * k), vec![0.0; rows * n]);
    let mut rounded = rough::Rough::default();
    float::is_here().then_some(move || {
        let weights = packed.weights();
        rounded.round(&x, &weights);
        let output = Output::new(&mut y, rows, n);
        // SAFETY: the features are there, and there is one thread.
        unsafe { rough::multiply(&rounded, &weights, 0..n, &output) };
        black_box(&y);
    })
}

/// `TransposeMatMul` of `[rows, k]` by `[n, k]`, where this processor has a kernel for it.
#[cfg(target_arch = "x86_64")]
pub fn float32([rows, n, k]: [usize; 3]) -> Option<impl FnMut()> {
    let (x, w, mut y) = (noise(rows * k), noise(n * k), vec![0.0; rows * n]);
    float::is_here().then_some(move || {
        let product = float::Product::new(&x, &w, &mut y, [rows, n, k]);
        // SAFETY: the features are there, and there is one thread.
        unsafe { float::multiply(&product, [0..rows, 0..n]) };
        black_box(&y);
    })
}

/// Keys within so many positions of the query, before and after it.
struct Window {
    keys: usize,
    reach: usize,
}

impl Visible for Window {
    fn range(&self, query: usize) -> Range<usize> {
        query.saturating_sub(self.reach)..self.keys.min(query + self.reach + 1)
    }

    fn seen(&self, _: usize, _: Range<usize>) -> Option<&[bool]> {
        None
    }
}

/// One head of an encoder's attention over `length` tokens, with soft-cap.
pub fn attention([length, dim]: [usize; 2], window: Option<usize>) -> impl FnMut() {
    let (queries, keys, values) = (noise(length * dim), noise(length * dim), noise(length * dim));
    let (mut around, mut to) = (vec![0.0; length_of_turned(length, dim)], vec![0.0; length * dim]);
    let mut room = Room::default();
    move || {
        turned(&keys, [dim; 2], &mut around);
        let (queries, keys, values) = (&queries[..], &keys[..], &values[..]);
        let head = Head { queries, keys, values, turned: Some(&around), dim, scale: 0.1, cap: Some(50.0) };
        let visible = Window { keys: length, reach: window.unwrap_or(length) };
        attend(head, &visible, 0..length, &mut room, &mut to);
        black_box(&to);
    }
}
