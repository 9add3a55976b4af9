//! The decoder's layer, shared by the graphs that have one.

use crate::decoder::{Layer, LayerOutput};
use crate::merged_attention::{merged, merged_with_weights};
use crate::nn::{gated_mlp, residual, rms_norm};
use crate::onnx::Value;
use crate::sequence::Context;
use crate::weights::Weights;

/// h = x + norm(attention(norm(x)))
/// y = h + norm(mlp(norm(h)))
pub fn layer<'g>(x: Value<'g>, context: &Context<'g>, layer: Layer<'g>, w: &Weights<'g>) -> LayerOutput<'g> {
    let Layer { kind, memory, returns_weights } = layer;
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
