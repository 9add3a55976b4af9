//! The cursor by which a block reaches its weights: step into a name, ask for a tensor with the shape it must have. How
//! a matrix is stored (in a float type, or quantized in the way of the target) is decided here, so that equations do
//! not know it.

use std::sync::Arc;

use crate::config::Stack;
use crate::interface::{self, LoraModule, Port};
use crate::lower::{Lowering, Matrix, Packing};
use crate::onnx::{Adjust, Blocks, Code, DType, Graph, Packed, Part, Scope, Value};
use crate::options::Options;
use crate::quantization::Activations;
use crate::tensors::Role;

/// A path in the checkpoint, for the blocks of one stack. It carries what every block needs besides its weights: the
/// sizes of the stack and the lowering.
#[derive(Clone)]
pub struct Weights<'g> {
    pub graph: &'g Graph,
    pub stack: &'g Stack,
    pub lowering: &'g dyn Lowering,
    options: &'g Options,
    role: fn(&str) -> Option<Role>,
    path: String,
    /// The rows of the head that are taken; all if none.
    kept: Option<Arc<[usize]>>,
    /// Whether linear layers take adapters.
    takes_adapters: bool,
    /// Which columns of the adapters each token uses, `[tokens, rank]`; all if none.
    adapter_mask: Option<Value<'g>>,
}

/// The LoRA adapter of a linear layer.
#[derive(Clone, Copy)]
pub struct Adapter<'g> {
    /// `[in, rank]`
    pub a: Value<'g>,
    /// `[rank, out]`
    pub b: Value<'g>,
    /// `[tokens, rank]`, 1 in the columns that a token uses and 0 in the others; all if none.
    pub mask: Option<Value<'g>>,
}

/// One of several matrices that are stored as one, concatenated along the rows.
#[derive(Clone, Copy)]
pub struct StackedPart<'a> {
    /// The path of the matrix.
    pub name: &'a str,
    /// Its rows.
    pub rows: usize,
}

impl<'g> Weights<'g> {
    /// The root of the checkpoint, for the blocks of a stack. `role` says what a tensor is for.
    pub fn root(
        graph: &'g Graph,
        stack: &'g Stack,
        options: &'g Options,
        role: fn(&str) -> Option<Role>,
    ) -> Weights<'g> {
        let (lowering, path) = (options.target.lowering(), String::new());
        let (takes_adapters, adapter_mask) = (false, None);
        Weights { graph, stack, lowering, options, role, path, kept: None, takes_adapters, adapter_mask }
    }

    /// The same path, whose linear layers take adapters if the graph does; tokens use them by this mask, `[tokens,
    /// rank]`, or without one use them all.
    pub fn taking_adapters(&self, mask: Option<Value<'g>>) -> Weights<'g> {
        Weights { takes_adapters: self.options.takes_adapters, adapter_mask: mask, ..self.clone() }
    }

    /// The adapter of the linear layer at this path, if it takes one.
    pub fn adapter(&self, input: usize, output: usize) -> Option<Adapter<'g>> {
        if !self.takes_adapters {
            return None;
        }
        let module = LoraModule { name: self.path.clone(), input, output };
        // The same layer may be computed more than once, of other operands.
        let input =
            |port: Port| self.graph.declared_input(&port.name).unwrap_or_else(|| interface::input(self.graph, &port));
        let [a, b] = module.ports(self.dtype()).map(input);
        Some(Adapter { a, b, mask: self.adapter_mask })
    }

    /// The path extended by `name`.
    pub fn at(&self, name: &str) -> Weights<'g> {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Weights { path, ..self.clone() }
    }

    /// The same path, with only some of the `vocab_size` rows of its tensor.
    pub fn keeping(&self, rows: Option<&Arc<[usize]>>) -> Weights<'g> {
        Weights { kept: rows.cloned(), ..self.clone() }
    }

    /// The number of rows taken, if not all.
    pub fn kept(&self) -> Option<usize> {
        self.kept.as_ref().map(|kept| kept.len())
    }

    /// Puts this path before the names of nodes until the scope is dropped.
    pub fn scope(&self) -> Scope<'g> {
        self.graph.scope(&self.path)
    }

    /// The matrix or bias at this path, in a float type.
    pub fn tensor(&self, shape: &[usize]) -> Value<'g> {
        self.graph.parameter(&self.name(), &self.source(shape), self.dtype(), shape, Adjust::AsIs)
    }

    /// The vector at this path, in float32 whatever dtype the matrices have.
    pub fn float32(&self, shape: &[usize]) -> Value<'g> {
        self.graph.parameter(&self.name(), &self.source(shape), DType::Float32, shape, Adjust::AsIs)
    }

    /// `1 +` the vector at this path, in float32 whatever dtype the matrices have.
    pub fn one_plus(&self, size: usize) -> Value<'g> {
        self.graph.parameter(&self.path, &self.source(&[size]), DType::Float32, &[size], Adjust::OnePlus)
    }

    /// The matrix `[out, in]` at this path, as an operand.
    pub fn matrix(&self, shape: [usize; 2]) -> Matrix<'g> {
        match self.quantization() {
            Some(blocks) => Matrix::Packed(self.packed(&self.source(&shape), shape, blocks)),
            None => Matrix::Plain(self.tensor(&shape)),
        }
    }

    /// The matrices under this path, concatenated to one matrix `[sum of rows, input]` called `name`. It is quantized
    /// only if all of them are, in the same format.
    pub fn stacked_matrix(&self, name: &str, parts: &[StackedPart], input: usize) -> Matrix<'g> {
        let sources: Vec<Part> =
            (parts.iter()).map(|part| self.at(part.name).at("weight").part(vec![part.rows, input])).collect();
        let shape = [parts.iter().map(|part| part.rows).sum(), input];
        let at = self.at(name).at("weight");
        let quantized = parts.iter().map(|part| self.at(part.name).at("weight").quantization()).collect::<Vec<_>>();
        match quantized[0] {
            Some(blocks) if quantized.iter().all(|other| *other == Some(blocks)) => {
                Matrix::Packed(at.packed(&sources, shape, blocks))
            }
            _ => Matrix::Plain(self.graph.parameter(&at.path, &sources, self.dtype(), &shape, Adjust::AsIs)),
        }
    }

    /// The biases of the matrices of [`Weights::stacked_matrix`], concatenated.
    pub fn stacked_bias(&self, name: &str, parts: &[StackedPart]) -> Value<'g> {
        let sources: Vec<Part> = parts.iter().map(|part| self.at(part.name).at("bias").part(vec![part.rows])).collect();
        let shape = [parts.iter().map(|part| part.rows).sum()];
        self.graph.parameter(&self.at(name).at("bias").path, &sources, self.dtype(), &shape, Adjust::AsIs)
    }

    /// The quantized embedding table `[n, k]` at this path; none if it is not quantized, or cannot be looked up in
    /// because a row is not a multiple of blocks. If the table is also the head, its packed bytes get a second name
    /// with the shape that the lookup takes.
    pub fn packed_table(&self, [n, k]: [usize; 2]) -> Option<Packed<'g>> {
        let is_head = self.options.is_head(&self.path);
        let blocks = self.quantization().map(|blocks| if is_head { blocks } else { blocks.for_embedding() });
        // Standard operators would have to unpack the whole table.
        let blocks = blocks.filter(|blocks| k.is_multiple_of(blocks.size) && !self.is_signed())?;
        let (name, shape) = (format!("{}.rows", self.path), [n, k * usize::from(blocks.bits) / 8]);
        let parts = self.source(&[n, k]);
        let numbers = self.graph.parameter(&name, &parts, DType::UInt8, &shape, Adjust::Packed(blocks));
        Some(Packed { numbers, ..self.packed(&parts, [n, k], blocks) })
    }

    /// The left operand of the matrix at this path: x, marked as observed if activations are observed, or quantized if
    /// the matrix has a calibrated range.
    ///
    /// # Panics
    /// If there are calibrated ranges, and none for this matrix of 8 bits.
    pub fn operand(&self, x: Value<'g>) -> Value<'g> {
        match (&self.options.activations, self.quantization()) {
            (Activations::Observed, _) => {
                self.graph.observe(&self.path, x);
                x
            }
            (Activations::Ranges(ranges), Some(Blocks { bits: 8, code, .. })) => {
                let range = *ranges.get(&self.path).expect("the exporter has checked the ranges");
                // An operand that was always zero still gets a scale that every dtype can hold, with its inverse.
                let scale = match code {
                    Code::Integer => f64::from(range.max(2e-3)) / 127.0,
                    Code::Float8E4M3FN => f64::from(range.max(0.03)) / 448.0,
                };
                x.quantize_dequantize(code, scale)
            }
            _ => x,
        }
    }

    /// The dtype of the matrices and of their operands.
    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    /// The dtype of the operands of the matrix at this path. For int8 matrices with a scale per row, engine builders
    /// write the unscaled sums in this dtype and scale them afterwards: float16 would overflow.
    pub fn operand_dtype(&self) -> DType {
        match self.quantization() {
            Some(Blocks { bits: 8, code: Code::Integer, .. }) if self.is_signed() => self.residual_dtype(),
            _ => self.dtype(),
        }
    }

    /// The dtype of the residual stream. A float16 stream would overflow: Gemma 2's residuals are known to pass 65504.
    pub fn residual_dtype(&self) -> DType {
        if self.dtype() == DType::Float16 { DType::Float32 } else { self.dtype() }
    }

    /// The name of the initializer. One with only some rows has a name of its own, since the whole tensor may be there
    /// too.
    fn name(&self) -> String {
        format!("{}{}", self.path, if self.kept.is_some() { ".kept" } else { "" })
    }

    /// The checkpoint tensor at this path, as the source of a weight of this shape.
    fn source(&self, shape: &[usize]) -> [Part; 1] {
        let mut shape = shape.to_vec();
        if self.kept.is_some() {
            shape[0] = self.stack.vocab_size;
        }
        [self.part(shape)]
    }

    fn part(&self, shape: Vec<usize>) -> Part {
        Part { tensor: self.path.clone(), shape, kept: self.kept.clone() }
    }

    /// The format of the matrix at this path, if it is quantized.
    fn quantization(&self) -> Option<Blocks> {
        let role = self.options.role(&self.path, self.role);
        self.options.quantization.of(&self.path, role)
    }

    fn is_signed(&self) -> bool {
        self.lowering.capabilities().packing == Some(Packing::Signed)
    }

    /// The quantized matrix `[out, in]` of `parts`, concatenated, under the name of this path.
    fn packed(&self, parts: &[Part], shape: [usize; 2], blocks: Blocks) -> Packed<'g> {
        if self.is_signed() {
            self.packed_signed(parts, shape, blocks)
        } else {
            self.packed_blocks(parts, shape, blocks)
        }
    }

    /// As [`Packing::Blocks`].
    fn packed_blocks(&self, parts: &[Part], [n, k]: [usize; 2], blocks: Blocks) -> Packed<'g> {
        let parameter =
            |dtype, shape: &[usize], adjust| self.graph.parameter(&self.name(), parts, dtype, shape, adjust);
        let of_row = blocks.of_row(k);
        Packed {
            numbers: parameter(DType::UInt8, &[n, of_row, blocks.bytes()], Adjust::Packed(blocks)),
            scales: parameter(self.dtype(), &[n, of_row], Adjust::Scales(blocks)),
            zero_points: (!blocks.symmetric)
                .then(|| parameter(DType::UInt8, &[n, blocks.zero_point_bytes(k)], Adjust::ZeroPoints(blocks))),
            blocks,
            shape: [n, k],
        }
    }

    /// As [`Packing::Signed`]: int4 with a scale per block, int8 with one per row, fp8 with one per matrix,
    /// which an engine builder can apply within the product. It applies scales per row after the product, where fp8
    /// sums exceed float16; nor do rows of fp8 gain anything from scales of their own.
    fn packed_signed(&self, parts: &[Part], [n, k]: [usize; 2], blocks: Blocks) -> Packed<'g> {
        let (dtype, size, scales) = match (blocks.code, blocks.bits) {
            (Code::Integer, 4) => (DType::Int4, blocks.size, vec![n, blocks.of_row(k)]),
            (Code::Integer, _) => (DType::Int8, k, vec![n]),
            (Code::Float8E4M3FN, _) => (DType::Float8E4M3FN, n.saturating_mul(k), Vec::new()),
        };
        let blocks = Blocks { size, ..blocks };
        let parameter =
            |dtype, shape: &[usize], adjust| self.graph.parameter(&self.name(), parts, dtype, shape, adjust);
        Packed {
            numbers: parameter(dtype, &[n, k], Adjust::Signed(blocks)),
            scales: parameter(self.operand_dtype(), &scales, Adjust::Scales(blocks)),
            zero_points: None,
            blocks,
            shape: [n, k],
        }
    }
}
