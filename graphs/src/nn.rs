//! The blocks besides attention: one equation each, over a residual stream `[tokens, hidden]`.

use crate::onnx::{DType, Data, Value};
use crate::weights::{Adapter, StackedPart, Weights};

/// The shape of a linear layer.
#[derive(Clone, Copy)]
pub struct Linear {
    /// Columns of the weight.
    pub input: usize,
    /// Rows of the weight.
    pub output: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

/// Several linear layers of one input, stored and computed as one.
pub struct Stacked<'a> {
    /// The name of the stacked layer.
    pub name: &'a str,
    /// The single layers, in the order of the output.
    pub parts: &'a [StackedPart<'a>],
    /// The shape of the stacked layer.
    pub linear: Linear,
}

/// `Embed[ids] · √hidden`, `[tokens, hidden]`, with the factor rounded to the weights' dtype as transformers rounds it.
/// In the place of ids there may be vectors `[rows, length, hidden]`, which are not looked up.
pub fn embedding<'g>(ids: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (vocab_size, hidden_size) = (w.stack.vocab_size, w.stack.hidden_size);
    let factor = w.graph.constant(w.dtype(), &[], Data::Floats(vec![(hidden_size as f64).sqrt()]));
    let [rows, length] = [0, 1].map(|axis| ids.dim(axis));
    let shape = [vocab_size, hidden_size];
    let looked_up = if ids.shape().len() == 3 {
        ids
    } else {
        match w.packed_table(shape) {
            Some(table) => ids.gather_packed(table),
            None => w.tensor(&shape).gather(ids),
        }
    };
    let x = looked_up.reshape(&[rows.times(&length), hidden_size.into()]); // [tokens, hidden]
    x.cast(w.residual_dtype()) * factor.cast(w.residual_dtype())
}

/// `x · Wᵀ (+ b) (+ adapter(x))`, computed and returned in the weights' dtype.
pub fn linear<'g>(x: Value<'g>, Linear { input, output, bias }: Linear, w: &Weights<'g>) -> Value<'g> {
    let at = w.at("weight");
    let weight = at.matrix([output, input]);
    let dtype = at.operand_dtype();
    let bias = bias.then(|| w.at("bias").tensor(&[output]).cast(dtype));
    let y = w.lowering.linear(at.operand(x.cast(dtype)), weight, bias).cast(w.dtype());
    match w.adapter(input, output) {
        Some(adapter) => y + low_rank(x.cast(w.dtype()), adapter),
        None => y,
    }
}

/// `(x·A ∘ mask) · B`, what a LoRA adapter adds to a linear layer: `[tokens, out]`.
fn low_rank<'g>(x: Value<'g>, Adapter { a, b, mask }: Adapter<'g>) -> Value<'g> {
    let projected = x.matmul(a); // [tokens, rank]
    mask.map_or(projected, |mask| projected * mask).matmul(b)
}

/// Several [`linear`]s of one input as one product: their outputs side by side.
pub fn stacked<'g>(x: Value<'g>, stacked: &Stacked, w: &Weights<'g>) -> Value<'g> {
    let Stacked { name, parts, linear } = stacked;
    let weight = w.stacked_matrix(name, parts, linear.input);
    let bias = linear.bias.then(|| w.stacked_bias(name, parts));
    let x = x.cast(w.dtype());
    let y = w.lowering.linear(x, weight, bias);
    let adapted = parts.iter().map(|part| Some(low_rank(x, w.at(part.name).adapter(linear.input, part.rows)?)));
    match adapted.collect::<Option<Vec<_>>>() {
        Some(adapted) => y + Value::concat(&adapted, -1),
        None => y,
    }
}

/// `x / √(mean(x²) + ε) · (1 + w)`, computed and returned in float32.
pub fn rms_norm<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let factor = w.at("weight").one_plus(w.stack.hidden_size);
    w.lowering.rms_norm(x.cast(DType::Float32), factor, w.stack.rms_norm_eps)
}

/// [`rms_norm`] of each head of x, `[…, head_dim]`, returned in the dtype of x.
pub fn head_norm<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let factor = w.at("weight").one_plus(w.stack.head_dim);
    w.lowering.rms_norm(x.cast(DType::Float32), factor, w.stack.rms_norm_eps).cast(x.dtype())
}

/// `down(gelu(gate(x)) ⊙ up(x))`
pub fn gated_mlp<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (hidden, wide) = (w.stack.hidden_size, w.stack.intermediate_size);
    let widened = Linear { input: hidden, output: wide, bias: false };
    let gate = linear(x, widened, &w.at("gate_proj"));
    let up = linear(x, widened, &w.at("up_proj"));
    linear(gate.gelu_tanh() * up, Linear { input: wide, output: hidden, bias: false }, &w.at("down_proj"))
}

/// `x + norm(branch)`: the sandwich norm acts on the branch before the sum.
pub fn residual<'g>(x: Value<'g>, branch: Value<'g>, norm: &Weights<'g>) -> Value<'g> {
    x + rms_norm(branch, norm).cast(x.dtype())
}
