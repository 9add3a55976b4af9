//! The blocks that both stacks are made of: one equation each, over a residual stream `[tokens, hidden]`. Also the cursor
//! by which a block reaches its weights.

use crate::Options;
use crate::config::Side;
use crate::lower::Lowering;
use crate::onnx::{Adjust, DType, Data, Graph, Scope, Value};

/// A place in one side of the checkpoint: step into a name with [`at`](Weights::at), ask for a tensor with the shape it must
/// have. It carries what every block needs with its weights: the side's configuration, and how operators are lowered.
#[derive(Clone)]
pub struct Weights<'g> {
    pub graph: &'g Graph,
    pub side: &'g Side,
    pub lowering: &'g dyn Lowering,
    dtype: DType,
    path: String,
}

impl<'g> Weights<'g> {
    /// The root of the checkpoint, for the blocks of `side`.
    pub fn root(graph: &'g Graph, side: &'g Side, options: &Options) -> Weights<'g> {
        Weights { graph, side, lowering: options.target.lowering(), dtype: options.dtype, path: String::new() }
    }

    /// The place called `name` under this one.
    pub fn at(&self, name: &str) -> Weights<'g> {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Weights { path, ..self.clone() }
    }

    /// Names nodes by this place until the scope is dropped.
    pub fn scope(&self) -> Scope<'g> {
        self.graph.scope(&self.path)
    }

    /// The matrix or bias at this place.
    pub fn tensor(&self, shape: &[usize]) -> Value<'g> {
        self.graph.parameter(&self.path, self.dtype, shape, Adjust::AsIs)
    }

    /// `1 +` the vector at this place, in float32 whatever the matrices are in.
    pub fn one_plus(&self, size: usize) -> Value<'g> {
        self.graph.parameter(&self.path, DType::Float32, &[size], Adjust::OnePlus)
    }

    /// The type of the matrices, and of what is multiplied with them.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The type of the residual stream. A float16 stream would overflow: Gemma 2's residuals are known to pass 65504.
    pub fn residual(&self) -> DType {
        if self.dtype == DType::Float16 { DType::Float32 } else { self.dtype }
    }
}

/// `Embed[ids] · √hidden`, with the factor rounded to the weights' type as the reference rounds it.
pub fn embedding<'g>(ids: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (vocab_size, hidden_size) = (w.side.vocab_size, w.side.hidden_size);
    let factor = w.graph.constant(w.dtype, &[], Data::Floats(vec![(hidden_size as f64).sqrt()]));
    let [rows, length] = [0, 1].map(|axis| ids.dim(axis));
    let table = w.tensor(&[vocab_size, hidden_size]);
    let x = table.gather(ids).reshape(&[rows.times(&length), hidden_size.into()]); // [tokens, hidden]
    x.cast(w.residual()) * factor.cast(w.residual())
}

/// `x · Wᵀ (+ b)`, computed and returned in the weights' type.
pub fn linear<'g>(x: Value<'g>, [input, output]: [usize; 2], bias: bool, w: &Weights<'g>) -> Value<'g> {
    let weight = w.at("weight").tensor(&[output, input]);
    let bias = bias.then(|| w.at("bias").tensor(&[output]));
    w.lowering.linear(x.cast(w.dtype), weight, bias)
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
