//! Quantizes matrices row by row, in the three formats that the targets read.

mod blocks;
mod float8;
mod signed;

pub use blocks::quantize;
pub use float8::{float8_code, float8_scale, quantize_float8};
pub use signed::quantize_signed;

/// Quantized rows of a matrix.
#[derive(Default)]
pub struct QuantizedRows {
    /// The codes, `[rows, blocks, bytes of a block]`.
    pub codes: Vec<u8>,
    /// `[rows, blocks]`.
    pub scales: Vec<f32>,
    /// `[rows, bytes of a row's zero points]`; empty for symmetric blocks.
    pub zero_points: Vec<u8>,
}

impl QuantizedRows {
    /// Appends the rows of another.
    pub fn append(&mut self, mut other: QuantizedRows) {
        self.codes.append(&mut other.codes);
        self.scales.append(&mut other.scales);
        self.zero_points.append(&mut other.zero_points);
    }
}
