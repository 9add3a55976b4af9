//! The decoder, shared by the graphs that have one: the layer, and the stack of layers.

use crate::attention::{causal, cross, cross_with_weights};
use crate::config::LayerType;
use crate::nn::{gated_mlp, residual, rms_norm};
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
/// layer, whose weights are at the given path. The layers in `alignment_layers` return their cross-attention weights.
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
        let output = layer(
            x,
            context,
            Layer { kind, memory: memory(i, &w), returns_weights: alignment_layers.contains(&i) },
            &w,
        );
        x = output.x;
        outputs.push(output);
    }
    (x, outputs)
}

/// h = x + norm(self_attention(norm(x)))
/// h = h + norm(cross_attention(norm(h)))
/// y = h + norm(mlp(norm(h)))
fn layer<'g>(x: Value<'g>, context: &Context<'g>, layer: Layer<'g>, w: &Weights<'g>) -> LayerOutput<'g> {
    let Layer { kind, memory: Memory { past, source }, returns_weights } = layer;
    let normed = rms_norm(x, &w.at("pre_self_attn_layernorm"));
    let (attended, present) = causal(normed, context, kind, past, &w.at("self_attn"));
    let h = residual(x, attended, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_cross_attn_layernorm"));
    let at = w.at("cross_attn");
    let (read, weights) = if returns_weights {
        let (read, weights) = cross_with_weights(normed, context, source, &at);
        (read, Some(weights))
    } else {
        (cross(normed, context, source, &at), None)
    };
    let h = residual(h, read, &w.at("post_cross_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_feedforward_layernorm"));
    let y = residual(h, gated_mlp(normed, &w.at("mlp")), &w.at("post_feedforward_layernorm"));
    LayerOutput { x: y, present, source, weights }
}
