//! The decoder, shared by the graphs that have one: the layer, and the stack of layers.

use crate::config::LayerType;
use crate::merged_attention::{merged, merged_with_weights};
use crate::nn::{gated_mlp, residual, rms_norm};
use crate::onnx::Value;
use crate::sequence::{Context, KeyValue, Memory};
use crate::weights::Weights;

/// What a layer returns.
pub struct LayerOutput<'g> {
    /// The residual stream behind it, `[rows·length, hidden]`.
    pub x: Value<'g>,
    /// The keys and values of past and new target tokens.
    pub present: KeyValue<'g>,
    /// The keys and values of the source, as they were given.
    pub source: KeyValue<'g>,
    /// Its attention weights of the source, if they are returned, the mean over heads: float32 `[batch, queries,
    /// source]`, the beams of a source row along the queries.
    pub weights: Option<Value<'g>>,
}

/// All layers, over the embedded target tokens x `[rows·length, hidden]`. `memory` returns the memory of the `i`-th
/// layer, whose weights are at the given path. The layers in `alignment_layers` return their attention weights.
pub fn stack<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    alignment_layers: &[usize],
    memory: impl Fn(usize, &Weights<'g>) -> Memory<'g>,
    w: &Weights<'g>,
) -> (Value<'g>, Vec<LayerOutput<'g>>) {
    let (mut x, mut outputs) = (x, Vec::new());
    for (i, &kind) in w.stack.layers.iter().enumerate() {
        let w = w.at(&format!("layers.{i}"));
        let output = layer(x, context, kind, memory(i, &w), alignment_layers.contains(&i), &w);
        x = output.x;
        outputs.push(output);
    }
    (x, outputs)
}

/// h = x + norm(attention(norm(x)))
/// y = h + norm(mlp(norm(h)))
fn layer<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    kind: LayerType,
    memory: Memory<'g>,
    returns_weights: bool,
    w: &Weights<'g>,
) -> LayerOutput<'g> {
    let normed = rms_norm(x, &w.at("pre_self_attn_layernorm"));
    let at = w.at("self_attn");
    let (attended, present, weights) = if returns_weights {
        let (attended, present, weights) = merged_with_weights(normed, context, kind, memory, &at);
        (attended, present, Some(weights))
    } else {
        let (attended, present) = merged(normed, context, kind, memory, &at);
        (attended, present, None)
    };
    let h = residual(x, attended, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_feedforward_layernorm"));
    let y = residual(h, gated_mlp(normed, &w.at("mlp")), &w.at("post_feedforward_layernorm"));
    LayerOutput { x: y, present, source: memory.source, weights }
}
