//! Element types and symbolic dimensions: the part of a tensor's type that is known before anything runs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The element type of a tensor, under the name that ONNX and Hugging Face write in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 binary32.
    Float32,
    /// IEEE 754 binary16.
    Float16,
    /// The upper half of a binary32: 8 bits of exponent, 7 of mantissa.
    BFloat16,
    /// Signed 64-bit integer: token ids, masks at the interface, shapes.
    Int64,
    /// Signed 32-bit integer: lengths, for operators that take them so.
    Int32,
    /// Unsigned byte: packed numbers of quantized matrices.
    UInt8,
    /// Signed 8-bit integer: quantized numbers.
    Int8,
    /// Signed 4-bit integer: quantized numbers, two in a byte, the first in its lower half.
    Int4,
    /// 8-bit float (fp8): 4 bits of exponent, 3 of mantissa, the greatest number 448, no infinities.
    Float8E4M3FN,
    /// One byte, 0 or 1: masks inside a graph.
    Bool,
}

impl DType {
    /// Every type.
    pub const ALL: [DType; 10] = [
        DType::Float32,
        DType::Float16,
        DType::BFloat16,
        DType::Int64,
        DType::Int32,
        DType::UInt8,
        DType::Int8,
        DType::Int4,
        DType::Float8E4M3FN,
        DType::Bool,
    ];

    /// The bytes of `count` elements; none on overflow.
    pub fn bytes(self, count: usize) -> Option<usize> {
        if self == DType::Int4 { Some(count.div_ceil(2)) } else { count.checked_mul(self.size()) }
    }

    /// The bytes of one element; of int4, of two.
    pub fn size(self) -> usize {
        match self {
            DType::Int64 => 8,
            DType::Float32 | DType::Int32 => 4,
            DType::Float16 | DType::BFloat16 => 2,
            DType::Bool | DType::UInt8 | DType::Int8 | DType::Int4 | DType::Float8E4M3FN => 1,
        }
    }

    /// Whether graphs compute in this type's floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, DType::Float32 | DType::Float16 | DType::BFloat16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::Float32 => "float32",
            DType::Float16 => "float16",
            DType::BFloat16 => "bfloat16",
            DType::Int64 => "int64",
            DType::Int32 => "int32",
            DType::UInt8 => "uint8",
            DType::Int8 => "int8",
            DType::Int4 => "int4",
            DType::Float8E4M3FN => "float8e4m3fn",
            DType::Bool => "bool",
        })
    }
}

/// One dimension of a shape: a number times a product of named sizes, such as `8`, `batch_size` or
/// `batch_size * num_beams`.
///
/// Products are kept as sorted factors so that two spellings of one size compare equal; a sum of unlike terms is a
/// name of its own (`past_decoder_sequence_length + decoder_sequence_length`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dim {
    factor: usize,
    symbols: Vec<String>,
}

impl Dim {
    /// A size that is known when the graph is written.
    pub fn fixed(size: usize) -> Dim {
        Dim { factor: size, symbols: Vec::new() }
    }

    /// A size that is known at run time.
    pub fn symbol(name: &str) -> Dim {
        Dim { factor: 1, symbols: vec![name.to_string()] }
    }

    /// Sizes that are known when the graph is written.
    pub fn all(sizes: &[usize]) -> Vec<Dim> {
        sizes.iter().copied().map(Dim::fixed).collect()
    }

    /// A shape as text: `[2, batch_size]`.
    pub fn list(shape: &[Dim]) -> String {
        let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
        format!("[{}]", dims.join(", "))
    }

    /// The number, if the size is known when the graph is written.
    pub fn as_fixed(&self) -> Option<usize> {
        self.symbols.is_empty().then_some(self.factor)
    }

    /// The size, if `of` knows the size of each symbol; saturates on overflow.
    pub fn size(&self, of: impl Fn(&str) -> Option<usize>) -> Option<usize> {
        self.symbols.iter().try_fold(self.factor, |product, symbol| Some(product.saturating_mul(of(symbol)?)))
    }

    /// This size times another.
    pub fn times(&self, other: &Dim) -> Dim {
        let mut symbols = [self.symbols.clone(), other.symbols.clone()].concat();
        symbols.sort();
        Dim { factor: self.factor * other.factor, symbols }
    }

    /// This size plus another.
    pub fn plus(&self, other: &Dim) -> Dim {
        match (self.as_fixed(), other.as_fixed()) {
            (Some(a), Some(b)) => Dim::fixed(a + b),
            _ => Dim::symbol(&format!("{self} + {other}")),
        }
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Dim {
        Dim::fixed(size)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.factor != 1 || self.symbols.is_empty() {
            write!(f, "{}", self.factor)?;
            if !self.symbols.is_empty() {
                f.write_str(" * ")?;
            }
        }
        f.write_str(&self.symbols.join(" * "))
    }
}

/// Serialized as ONNX writes it: a number, or the name of a symbolic dimension.
impl Serialize for Dim {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.as_fixed() {
            Some(size) => serializer.serialize_u64(size as u64),
            None => serializer.collect_str(self),
        }
    }
}

/// Reads what [`Serialize`] writes; a product is split at ` * `.
impl<'de> Deserialize<'de> for Dim {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Dim, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(usize),
            Name(String),
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Number(size) => Dim::fixed(size),
            Written::Name(name) => name.split(" * ").fold(Dim::fixed(1), |product, part| {
                product.times(&part.parse().map_or_else(|_| Dim::symbol(part), Dim::fixed))
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_compare_by_their_factors() {
        let (batch, beams) = (Dim::symbol("batch_size"), Dim::symbol("num_beams"));
        assert_eq!(batch.times(&beams), beams.times(&batch));
        assert_eq!(batch.times(&Dim::fixed(4)).times(&Dim::fixed(2)).to_string(), "8 * batch_size");
        assert_eq!(Dim::fixed(2).plus(&Dim::fixed(3)), Dim::fixed(5));
    }

    #[test]
    fn dimensions_survive_json() {
        for dim in [Dim::fixed(7), Dim::symbol("past + new"), Dim::symbol("a").times(&Dim::symbol("b"))] {
            let text = serde_json::to_string(&dim).expect("a dimension is a number or a string");
            assert_eq!(serde_json::from_str::<Dim>(&text).expect("reads what was written"), dim);
        }
    }
}
