//! The formats of quantized matrices.

use serde::{Deserialize, Serialize};

/// How the rows of a matrix `[n, k]` are quantized, as ONNX Runtime's `MatMulNBits` reads them: in blocks of `size`
/// numbers along `k`, the last one padded, with `w = scale · (packed − zero_point)`. A target may have whole rows, or
/// the whole matrix, as one block of 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blocks {
    /// Bits of a packed number, 4 or 8; the first of two in a byte is the lower half.
    pub bits: u8,
    /// Numbers in a block: a power of two from 16 to 128.
    pub size: usize,
    /// Whether the zero point of every block is the middle, `2^(bits − 1)`, and not stored.
    pub symmetric: bool,
    /// What a packed number stands for.
    #[serde(default, skip_serializing_if = "Code::is_integer")]
    pub code: Code,
}

/// What the bits of a packed number stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// An integer.
    #[default]
    #[serde(alias = "whole")]
    Integer,
    /// A floating-point number, see [`DType::Float8E4M3FN`](super::DType::Float8E4M3FN).
    Float8E4M3FN,
}

impl Code {
    fn is_integer(&self) -> bool {
        *self == Code::Integer
    }
}

impl Blocks {
    /// Symmetric integers.
    pub fn integer(bits: u8, size: usize) -> Blocks {
        Blocks { bits, size, symmetric: true, code: Code::Integer }
    }

    /// Floating-point numbers of 8 bits.
    pub fn float8() -> Blocks {
        Blocks { code: Code::Float8E4M3FN, ..Blocks::integer(8, 128) }
    }

    /// The same for a table that is only looked up: reading a few rows costs nothing, so it keeps 8 bits.
    pub fn for_embedding(self) -> Blocks {
        Blocks { bits: 8, code: Code::Integer, ..self }
    }

    /// The name of the format: `int4`, `int8` or `fp8`.
    pub fn name(self) -> &'static str {
        match (self.code, self.bits) {
            (Code::Float8E4M3FN, _) => "fp8",
            (Code::Integer, 4) => "int4",
            (Code::Integer, _) => "int8",
        }
    }

    /// Blocks in a row of `k` numbers.
    pub fn of_row(self, k: usize) -> usize {
        k.div_ceil(self.size)
    }

    /// Bytes of a packed block.
    pub fn bytes(self) -> usize {
        self.size * usize::from(self.bits) / 8
    }

    /// Bytes of a row's zero points.
    pub fn zero_point_bytes(self, k: usize) -> usize {
        (self.of_row(k) * usize::from(self.bits)).div_ceil(8)
    }
}
