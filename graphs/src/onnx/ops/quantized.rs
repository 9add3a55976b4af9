//! The standard operators for quantized numbers.

use super::super::{Attribute, Blocks, Code, DType, Data, Dim, Value};

impl<'g> Value<'g> {
    /// `w · scale` for this quantized matrix `[n, k]`, in the dtype of the scales: `[n, k / size]` for blocks along a
    /// row, `[n]` for rows, `[]` for the whole matrix.
    #[track_caller]
    pub fn dequantize(self, scales: Value<'g>, blocks: Blocks) -> Value<'g> {
        let (shape, of_blocks) = (self.shape(), scales.shape());
        let fits = match (&shape[..], &of_blocks[..]) {
            ([n, k], [rows, count]) => {
                n == rows && count.as_fixed().map(|count| count * blocks.size) == k.as_fixed() && k.as_fixed().is_some()
            }
            ([n, _], [rows]) => n == rows,
            ([_, _], []) => true,
            _ => false,
        };
        let dtype = match (blocks.code, blocks.bits) {
            (Code::Float8E4M3FN, _) => DType::Float8E4M3FN,
            (Code::Integer, 4) => DType::Int4,
            (Code::Integer, _) => DType::Int8,
        };
        if !fits || self.dtype() != dtype || !scales.dtype().is_float() {
            let (of, by) = (Dim::list(&shape), Dim::list(&of_blocks));
            self.graph.mistake(format!("DequantizeLinear of {} {of} by {} {by}", self.dtype(), scales.dtype()));
        }
        let attributes = match of_blocks.len() {
            2 => vec![("axis", Attribute::Int(1)), ("block_size", Attribute::Int(blocks.size as i64))],
            1 => vec![("axis", Attribute::Int(0))],
            _ => Vec::new(),
        };
        self.graph.node("DequantizeLinear", &[self, scales], &attributes, &[(scales.dtype(), shape)])[0]
    }

    /// Quantized to int8 or fp8 with the given scale, and dequantized: numbers beyond 127 or 448 times the scale
    /// saturate.
    pub fn quantize_dequantize(self, code: Code, scale: f64) -> Value<'g> {
        let scale = self.graph.constant(self.dtype(), &[], Data::Floats(vec![scale]));
        let (dtype, zero) = match code {
            Code::Integer => (DType::Int8, Data::Ints(vec![0])),
            Code::Float8E4M3FN => (DType::Float8E4M3FN, Data::Floats(vec![0.0])),
        };
        let zero = self.graph.constant(dtype, &[], zero);
        let quantized = self.one("QuantizeLinear", &[self, scale, zero], dtype, self.shape());
        self.one("DequantizeLinear", &[quantized, scale, zero], self.dtype(), self.shape())
    }

    /// `max |x|` of a whole matrix, float32 `[1]`.
    pub fn max_abs(self) -> Value<'g> {
        self.cast(DType::Float32).unary("Abs").reduce_max(0).reduce_max(1).squeeze(0)
    }
}

#[cfg(test)]
mod tests {
    use crate::onnx::{Blocks, Code, DType, Dim, Graph};

    #[test]
    fn a_matrix_gets_the_dtype_of_its_scales() {
        let graph = Graph::new();
        let w = graph.input("w", DType::Int4, &Dim::all(&[8, 64]));
        let scales = graph.input("scales", DType::BFloat16, &Dim::all(&[8, 2]));
        let whole = w.dequantize(scales, Blocks::integer(4, 32));
        assert_eq!((whole.dtype(), whole.shape()), (DType::BFloat16, Dim::all(&[8, 64])));
    }

    #[test]
    fn fp8_has_one_scale() {
        let graph = Graph::new();
        let w = graph.input("w", DType::Float8E4M3FN, &Dim::all(&[8, 64]));
        let scale = graph.input("scale", DType::Float16, &[]);
        let whole = w.dequantize(scale, Blocks::float8());
        assert_eq!((whole.dtype(), whole.shape()), (DType::Float16, Dim::all(&[8, 64])));
        let x = graph.input("x", DType::BFloat16, &[Dim::symbol("tokens"), Dim::fixed(64)]);
        let rounded = x.quantize_dequantize(Code::Float8E4M3FN, 0.5);
        assert_eq!((rounded.dtype(), rounded.shape()), (x.dtype(), x.shape()));
    }

    #[test]
    #[should_panic(expected = "DequantizeLinear of int8 [8, 64] by float32 []")]
    fn the_dtype_is_that_of_the_code() {
        let graph = Graph::new();
        let w = graph.input("w", DType::Int8, &Dim::all(&[8, 64]));
        let _ = w.dequantize(graph.input("scale", DType::Float32, &[]), Blocks::float8());
    }

    #[test]
    #[should_panic(expected = "DequantizeLinear of int4 [8, 48] by float32 [8, 2]")]
    fn rows_are_whole_blocks() {
        let graph = Graph::new();
        let w = graph.input("w", DType::Int4, &Dim::all(&[8, 48]));
        let scales = graph.input("scales", DType::Float32, &Dim::all(&[8, 2]));
        let _ = w.dequantize(scales, Blocks::integer(4, 32));
    }
}
