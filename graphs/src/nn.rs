//! The blocks that both stacks are made of: one equation each, over a residual stream `[tokens, hidden]`. Also the cursor
//! by which a block reaches its weights.

use std::sync::Arc;

use crate::Options;
use crate::config::Side;
use crate::lower::{Lowering, Matrix};
use crate::onnx::{Adjust, Blocks, Code, DType, Data, Graph, Packed, Part, Scope, Value};
use crate::quantization::Activations;

/// A place in one side of the checkpoint: step into a name with [`at`](Weights::at), ask for a tensor with the shape it must
/// have. It carries what every block needs with its weights: the side's configuration, and how operators are lowered.
#[derive(Clone)]
pub struct Weights<'g> {
    pub graph: &'g Graph,
    pub side: &'g Side,
    pub lowering: &'g dyn Lowering,
    options: &'g Options,
    path: String,
    /// Of the head, which rows are taken; all if none.
    kept: Option<Arc<[usize]>>,
}

impl<'g> Weights<'g> {
    /// The root of the checkpoint, for the blocks of `side`.
    pub fn root(graph: &'g Graph, side: &'g Side, options: &'g Options) -> Weights<'g> {
        Weights { graph, side, lowering: options.target.lowering(), options, path: String::new(), kept: None }
    }

    /// The place called `name` under this one.
    pub fn at(&self, name: &str) -> Weights<'g> {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Weights { path, ..self.clone() }
    }

    /// The same place, of whose rows `[vocab_size, …]` only some are taken.
    pub fn keeping(&self, rows: Option<&Arc<[usize]>>) -> Weights<'g> {
        Weights { kept: rows.cloned(), ..self.clone() }
    }

    /// How many rows are taken, if not all.
    pub fn kept(&self) -> Option<usize> {
        self.kept.as_ref().map(|kept| kept.len())
    }

    /// What the weight at this place is called: the whole one may be there too.
    fn name(&self) -> String {
        format!("{}{}", self.path, if self.kept.is_some() { ".kept" } else { "" })
    }

    /// Names nodes by this place until the scope is dropped.
    pub fn scope(&self) -> Scope<'g> {
        self.graph.scope(&self.path)
    }

    /// The matrix or bias at this place.
    pub fn tensor(&self, shape: &[usize]) -> Value<'g> {
        self.graph.parameter(&self.name(), &self.whole(shape), self.dtype(), shape, Adjust::AsIs)
    }

    /// The matrix `[out, in]` at this place, to be multiplied with.
    pub fn matrix(&self, shape: [usize; 2]) -> Matrix<'g> {
        match self.options.quantization.of(&self.path) {
            Some(blocks) => Matrix::Packed(self.packed(&self.whole(&shape), shape, blocks)),
            None => Matrix::Plain(self.tensor(&shape)),
        }
    }

    /// What the matrix at this place is multiplied with: x as it is, noted where that is asked for, or rounded as the matrix
    /// is.
    ///
    /// # Panics
    /// If the matrix has 8 bits for a target that computes in them and nothing is known of x.
    pub fn multiplied(&self, x: Value<'g>) -> Value<'g> {
        match (&self.options.activations, self.options.quantization.of(&self.path)) {
            (Activations::Observed, _) => {
                self.graph.observe(&self.path, x);
                x
            }
            (Activations::Ranges(ranges), Some(Blocks { bits: 8, code, .. })) => {
                let range = *ranges.get(&self.path).expect("the ranges were held to the matrices");
                // What was always zero has a scale all the same, in every type, and so has its inverse.
                let scale = match code {
                    Code::Whole => f64::from(range.max(2e-3)) / 127.0,
                    Code::Float8E4M3FN => f64::from(range.max(0.03)) / 448.0,
                };
                x.rounded(code, scale)
            }
            _ => x,
        }
    }

    /// The tensor that the checkpoint has at this place.
    fn whole(&self, shape: &[usize]) -> [Part; 1] {
        let mut shape = shape.to_vec();
        if self.kept.is_some() {
            shape[0] = self.side.vocab_size;
        }
        [Part { tensor: self.path.clone(), shape, kept: self.kept.clone() }]
    }

    /// The matrix `[out, in]` of `parts` one above the other, in few bits, under the name of this place.
    fn packed(&self, parts: &[Part], [n, k]: [usize; 2], blocks: Blocks) -> Packed<'g> {
        if self.options.target.signs_packed() {
            return self.packed_signed(parts, [n, k], blocks);
        }
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

    /// The matrix in signed numbers: of 4 bits with a scale for each block, whole ones of 8 bits with one for each row, real
    /// ones with one for all, which a builder can apply within the product. What those of rows are applied to afterwards is
    /// beyond float16 for real numbers, whose rows gain nothing by scales of their own either.
    fn packed_signed(&self, parts: &[Part], [n, k]: [usize; 2], blocks: Blocks) -> Packed<'g> {
        let (dtype, size, scales) = match (blocks.code, blocks.bits) {
            (Code::Whole, 4) => (DType::Int4, blocks.size, vec![n, blocks.of_row(k)]),
            (Code::Whole, _) => (DType::Int8, k, vec![n]),
            (Code::Float8E4M3FN, _) => (DType::Float8E4M3FN, n.saturating_mul(k), Vec::new()),
        };
        let blocks = Blocks { size, ..blocks };
        let parameter =
            |dtype, shape: &[usize], adjust| self.graph.parameter(&self.name(), parts, dtype, shape, adjust);
        Packed {
            numbers: parameter(dtype, &[n, k], Adjust::Signed(blocks)),
            scales: parameter(self.factor_dtype(), &scales, Adjust::Scales(blocks)),
            zero_points: None,
            blocks,
            shape: [n, k],
        }
    }

    /// `1 +` the vector at this place, in float32 whatever the matrices are in.
    pub fn one_plus(&self, size: usize) -> Value<'g> {
        self.graph.parameter(&self.path, &self.whole(&[size]), DType::Float32, &[size], Adjust::OnePlus)
    }

    /// The table `[n, k]` at this place in few bits, to be looked up in. What is also the head has been packed for it, and is
    /// read under a second name in the shape that fits here; rows must be whole blocks.
    fn packed_table(&self, [n, k]: [usize; 2]) -> Option<Packed<'g>> {
        let quantization = &self.options.quantization;
        let is_head = self.path == self.options.vocabulary.head;
        let blocks = if is_head { quantization.of(&self.path) } else { quantization.of_embedding(&self.path) };
        // Standard operators would have to unpack the whole table.
        let blocks = blocks.filter(|blocks| k.is_multiple_of(blocks.size) && !self.options.target.signs_packed())?;
        let (name, shape) = (format!("{}.rows", self.path), [n, k * usize::from(blocks.bits) / 8]);
        let parts = self.whole(&[n, k]);
        let numbers = self.graph.parameter(&name, &parts, DType::UInt8, &shape, Adjust::Packed(blocks));
        Some(Packed { numbers, ..self.packed(&parts, [n, k], blocks) })
    }

    /// `context · o_projᵀ (+ b)`, the last step of the attention at this place.
    pub fn output_projection(&self, context: Value<'g>) -> Value<'g> {
        let width = self.side.num_attention_heads * self.side.head_dim;
        linear(context, [width, self.side.hidden_size], self.side.attention_bias, &self.at("o_proj"))
    }

    /// The type of the matrices, and of what is multiplied with them.
    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    /// The type that the matrix at this place is multiplied in. Of whole numbers of 8 bits with a scale for each row, builders
    /// write the sums as they are and scale them afterwards: float16 would hold few of them.
    pub fn factor_dtype(&self) -> DType {
        match self.options.quantization.of(&self.path) {
            Some(Blocks { bits: 8, code: Code::Whole, .. }) if self.options.target.signs_packed() => self.residual(),
            _ => self.dtype(),
        }
    }

    /// The type of the residual stream. A float16 stream would overflow: Gemma 2's residuals are known to pass 65504.
    pub fn residual(&self) -> DType {
        if self.dtype() == DType::Float16 { DType::Float32 } else { self.dtype() }
    }
}

/// `Embed[ids] · √hidden`, with the factor rounded to the weights' type as the reference rounds it.
pub fn embedding<'g>(ids: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (vocab_size, hidden_size) = (w.side.vocab_size, w.side.hidden_size);
    let factor = w.graph.constant(w.dtype(), &[], Data::Floats(vec![(hidden_size as f64).sqrt()]));
    let [rows, length] = [0, 1].map(|axis| ids.dim(axis));
    let shape = [vocab_size, hidden_size];
    let looked_up = match w.packed_table(shape) {
        Some(table) => ids.gather_packed(table),
        None => w.tensor(&shape).gather(ids),
    };
    let x = looked_up.reshape(&[rows.times(&length), hidden_size.into()]); // [tokens, hidden]
    x.cast(w.residual()) * factor.cast(w.residual())
}

/// `x · Wᵀ (+ b)`, computed and returned in the weights' type.
pub fn linear<'g>(x: Value<'g>, [input, output]: [usize; 2], bias: bool, w: &Weights<'g>) -> Value<'g> {
    let at = w.at("weight");
    let weight = at.matrix([output, input]);
    let factor = at.factor_dtype();
    let bias = bias.then(|| w.at("bias").tensor(&[output]).cast(factor));
    w.lowering.linear(at.multiplied(x.cast(factor)), weight, bias).cast(w.dtype())
}

/// Several [`linear`]s of one input, side by side, as one product: `(name, outputs)` of each under the place `w`. Held in few
/// bits only if all of them are, in one way.
pub fn stacked<'g>(
    x: Value<'g>,
    input: usize,
    (name, parts): (&str, &[(&str, usize)]),
    bias: bool,
    w: &Weights<'g>,
) -> Value<'g> {
    let part = |&(part, output): &(&str, usize), what: &str| {
        let shape = if what == "bias" { vec![output] } else { vec![output, input] };
        Part { tensor: w.at(part).at(what).path, shape, kept: None }
    };
    let all = |what: &str| -> Vec<Part> { parts.iter().map(|named| part(named, what)).collect() };
    let output = parts.iter().map(|(_, outputs)| outputs).sum();
    let (weights, at) = (all("weight"), w.at(name).at("weight"));
    let held: Vec<Option<Blocks>> = weights.iter().map(|part| w.options.quantization.of(&part.tensor)).collect();
    let weight = match held[0] {
        Some(blocks) if held.iter().all(|held| *held == Some(blocks)) => {
            Matrix::Packed(at.packed(&weights, [output, input], blocks))
        }
        _ => Matrix::Plain(w.graph.parameter(&at.path, &weights, w.dtype(), &[output, input], Adjust::AsIs)),
    };
    let bias =
        bias.then(|| w.graph.parameter(&w.at(name).at("bias").path, &all("bias"), w.dtype(), &[output], Adjust::AsIs));
    w.lowering.linear(x.cast(w.dtype()), weight, bias)
}

/// `x / √(mean(x²) + ε) · (1 + w)`, computed and returned in float32.
pub fn rms_norm<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let factor = w.at("weight").one_plus(w.side.hidden_size);
    w.lowering.rms_norm(x.cast(DType::Float32), factor, w.side.rms_norm_eps)
}

/// `cap · tanh(x / cap)`, or `x` where there is no cap.
pub fn softcap(x: Value<'_>, cap: Option<f64>) -> Value<'_> {
    match cap {
        Some(cap) => (x * (1.0 / cap)).tanh() * cap,
        None => x,
    }
}

/// `down(gelu(gate(x)) ⊙ up(x))`
pub fn gated_mlp<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (hidden, wide) = (w.side.hidden_size, w.side.intermediate_size);
    let gate = linear(x, [hidden, wide], false, &w.at("gate_proj"));
    let up = linear(x, [hidden, wide], false, &w.at("up_proj"));
    linear(gate.gelu_tanh() * up, [wide, hidden], false, &w.at("down_proj"))
}

/// `x + norm(branch)`: the sandwich norm acts on the branch before the sum.
pub fn residual<'g>(x: Value<'g>, branch: Value<'g>, norm: &Weights<'g>) -> Value<'g> {
    x + rms_norm(branch, norm).cast(x.dtype())
}
