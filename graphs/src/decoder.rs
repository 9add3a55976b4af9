//! The decoder, shared by its two graphs: the layer, and the way from the last layer to logits.

use crate::attention::{KeyValue, Tokens, causal, cross};
use crate::config::{LayerType, Side};
use crate::interface::{BEAMS, Logits};
use crate::nn::{Weights, gated_mlp, residual, rms_norm, softcap};
use crate::onnx::{DType, Dim, Graph, Value};

/// What a decoder layer is given besides its input.
pub struct Context<'g> {
    /// The target tokens.
    pub tokens: Tokens<'g>,
    /// Which source tokens they see: bool `[batch, 1, 1, 1, source]`.
    pub visible: Value<'g>,
}

/// What a layer remembers: the target so far (nothing at the first step), and the source.
pub struct Memory<'g> {
    pub past: Option<KeyValue<'g>>,
    pub source: KeyValue<'g>,
}

/// h = x + norm(self_attention(norm(x)))
/// h = h + norm(cross_attention(norm(h)))
/// y = h + norm(mlp(norm(h)))
///
/// Returns y and the keys and values of past and new target tokens.
pub fn layer<'g>(
    graph: &'g Graph,
    x: Value<'g>,
    context: &Context<'g>,
    memory: Memory<'g>,
    (c, kind): (&Side, LayerType),
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let tokens = &context.tokens;
    let normed = rms_norm(x, c, &w.at("pre_self_attn_layernorm"));
    let (attended, present) = causal(graph, normed, tokens, memory.past, (c, kind), &w.at("self_attn"));
    let h = residual(x, attended, c, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, c, &w.at("pre_cross_attn_layernorm"));
    let source = (memory.source, context.visible);
    let attended = cross(normed, tokens, source, c, &Dim::symbol(BEAMS), &w.at("cross_attn"));
    let h = residual(h, attended, c, &w.at("post_cross_attn_layernorm"));

    let normed = rms_norm(h, c, &w.at("pre_feedforward_layernorm"));
    let y = residual(h, gated_mlp(normed, c, &w.at("mlp")), c, &w.at("post_feedforward_layernorm"));
    (y, present)
}

/// `softcap(head · norm(x))` in float32, `[rows, positions, vocab_size]`, of x `[rows·length, hidden]`.
pub fn logits<'g>(
    x: Value<'g>,
    tokens: &Tokens<'g>,
    which: Logits,
    c: &Side,
    norm: &Weights<'g>,
    head: &Weights<'g>,
) -> Value<'g> {
    let (rows, hidden) = (&tokens.rows, Dim::fixed(c.hidden_size));
    let (x, positions) = match which {
        Logits::All => (x, tokens.length.clone()),
        Logits::Last => {
            let last = x.reshape(&[rows.clone(), tokens.length.clone(), hidden.clone()]).last(1);
            (last.reshape(&[rows.clone(), hidden]), Dim::fixed(1))
        }
    };
    let normed = rms_norm(x, c, norm);
    let _scope = head.scope();
    let table = head.tensor(&[c.vocab_size, c.hidden_size]);
    let scores = head.lowering.linear(normed.cast(head.dtype()), table, None).cast(DType::Float32);
    softcap(scores, c.final_logit_softcapping).reshape(&[rows.clone(), positions, c.vocab_size.into()])
}
