//! The decoder's layer, shared by the graphs that have one.

use crate::attention::{causal, cross, cross_with_weights};
use crate::decoder::{Layer, LayerOutput};
use crate::nn::{gated_mlp, residual, rms_norm};
use crate::onnx::Value;
use crate::sequence::{Context, Memory};
use crate::weights::Weights;

/// h = x + norm(self_attention(norm(x)))
/// h = h + norm(cross_attention(norm(h)))
/// y = h + norm(mlp(norm(h)))
pub fn layer<'g>(x: Value<'g>, context: &Context<'g>, layer: Layer<'g>, w: &Weights<'g>) -> LayerOutput<'g> {
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
