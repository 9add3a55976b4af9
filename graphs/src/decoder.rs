//! The decoder's stack of layers, the same in every family; what a layer computes is the family's.

use crate::config::LayerType;
use crate::onnx::Value;
use crate::sequence::{Context, KeyValue, Memory};
use crate::weights::Weights;

/// A layer of the stack.
pub struct Layer<'g> {
    /// What its self-attention sees.
    pub kind: LayerType,
    /// What it attends to.
    pub memory: Memory<'g>,
    /// Whether its cross-attention weights are returned.
    pub returns_weights: bool,
}

/// What a layer returns.
pub struct LayerOutput<'g> {
    /// The residual stream behind it, `[rows·length, hidden]`.
    pub x: Value<'g>,
    /// The keys and values of past and new target tokens.
    pub present: KeyValue<'g>,
    /// The keys and values of the source, as they were given.
    pub source: KeyValue<'g>,
    /// Its cross-attention weights, if they are returned, the mean over heads: float32 `[batch, queries, source]`, the
    /// beams of a source row along the queries.
    pub weights: Option<Value<'g>>,
}

/// All layers, over the embedded target tokens x `[rows·length, hidden]`. `memory` returns the memory of the `i`-th
/// layer, whose weights are at the given path, and `layer` computes it, which is what differs between families. The layers
/// in `alignment_layers` return their cross-attention weights.
pub fn stack<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    alignment_layers: &[usize],
    memory: impl Fn(usize, &Weights<'g>) -> Memory<'g>,
    layer: impl Fn(Value<'g>, &Context<'g>, Layer<'g>, &Weights<'g>) -> LayerOutput<'g>,
    w: &Weights<'g>,
) -> (Value<'g>, Vec<LayerOutput<'g>>) {
    let (mut x, mut outputs) = (x, Vec::new());
    for (i, &kind) in w.stack.layers.iter().enumerate() {
        let w = w.at(&format!("layers.{i}"));
        let returns_weights = alignment_layers.contains(&i);
        let output = layer(x, context, Layer { kind, memory: memory(i, &w), returns_weights }, &w);
        x = output.x;
        outputs.push(output);
    }
    (x, outputs)
}
