//! The standard operators for numbers in few bits.

use super::super::graph::{Attribute, Data, Value};
use super::super::{Blocks, DType, Dim};

impl<'g> Value<'g> {
    /// `w · scale` of this matrix `[n, k]` of int4 or int8, in the type of the scales: `[n, k / size]`, one for each block of
    /// numbers along a row, or `[n]`, one for each row.
    #[track_caller]
    pub fn dequantized(self, scales: Value<'g>, blocks: Blocks) -> Value<'g> {
        let (shape, of_blocks) = (self.shape(), scales.shape());
        let is_blocked = of_blocks.len() == 2;
        let fits = match (&shape[..], &of_blocks[..]) {
            ([n, k], [rows, count]) => {
                n == rows && count.as_fixed().map(|count| count * blocks.size) == k.as_fixed() && k.as_fixed().is_some()
            }
            ([n, _], [rows]) => n == rows,
            _ => false,
        };
        let dtype = if blocks.bits == 4 { DType::Int4 } else { DType::Int8 };
        if !fits || self.dtype() != dtype || !scales.dtype().is_float() {
            let (of, by) = (Dim::list(&shape), Dim::list(&of_blocks));
            self.graph.mistake(format!("DequantizeLinear of {} {of} by {} {by}", self.dtype(), scales.dtype()));
        }
        let attributes = match is_blocked {
            true => vec![("axis", Attribute::Int(1)), ("block_size", Attribute::Int(blocks.size as i64))],
            false => vec![("axis", Attribute::Int(0))],
        };
        self.graph.node("DequantizeLinear", &[self, scales], &attributes, &[(scales.dtype(), shape)])[0]
    }

    /// The numbers rounded to int8 with the given scale, and back: what is beyond 127 of it is cut.
    pub fn rounded_to_int8(self, scale: f64) -> Value<'g> {
        let scale = self.graph.constant(self.dtype(), &[], Data::Floats(vec![scale]));
        let zero = self.graph.constant(DType::Int8, &[], Data::Ints(vec![0]));
        let rounded = self.one("QuantizeLinear", &[self, scale, zero], DType::Int8, self.shape());
        self.one("DequantizeLinear", &[rounded, scale, zero], self.dtype(), self.shape())
    }

    /// The greatest of the absolute numbers in all of a matrix, in float32 `[1]`.
    pub fn greatest_absolute(self) -> Value<'g> {
        self.cast(DType::Float32).unary("Abs").greatest(0).greatest(1).squeeze(0)
    }
}

#[cfg(test)]
mod tests {
    use crate::onnx::{Blocks, DType, Dim, Graph};

    #[test]
    fn a_matrix_takes_the_type_of_its_scales() {
        let graph = Graph::new();
        let w = graph.input("w", DType::Int4, &Dim::all(&[8, 64]));
        let scales = graph.input("scales", DType::BFloat16, &Dim::all(&[8, 2]));
        let whole = w.dequantized(scales, Blocks { bits: 4, size: 32, symmetric: true });
        assert_eq!((whole.dtype(), whole.shape()), (DType::BFloat16, Dim::all(&[8, 64])));
    }

    #[test]
    #[should_panic(expected = "DequantizeLinear of int4 [8, 48] by float32 [8, 2]")]
    fn rows_are_whole_blocks() {
        let graph = Graph::new();
        let w = graph.input("w", DType::Int4, &Dim::all(&[8, 48]));
        let scales = graph.input("scales", DType::Float32, &Dim::all(&[8, 2]));
        let _ = w.dequantized(scales, Blocks { bits: 4, size: 32, symmetric: true });
    }
}
