//! The encoder: source tokens → hidden states, `[batch, source, hidden]`.

use crate::attention::{Tokens, bidirectional, padding_mask, window_mask};
use crate::config::{Config, Side};
use crate::nn::{Weights, embedding, gated_mlp, residual, rms_norm};
use crate::onnx::{Definition, Graph, Value};
use crate::{Options, interface};

/// The graph from source tokens to hidden states.
pub fn encoder(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).encoder;
    let [ids, mask] = interface::inputs(&graph, &ports);

    let c = &config.encoder;
    let w = Weights::root(&graph, options.dtype, options.target.lowering()).at("model.encoder");
    let tokens = Tokens::from(&graph, ids, None);
    let padding = padding_mask(mask);
    let mut x = embedding(ids, c.vocab_size, c.hidden_size, &w.at("embed_tokens.weight"));
    for (i, &kind) in c.layers.iter().enumerate() {
        let visible = match window_mask(&tokens, kind, options.encoder_window) {
            Some(window) => padding & window, // [batch, 1, 1, source, source]
            None => padding,
        };
        x = layer(&graph, x, &tokens, visible, c, &w.at(&format!("layers.{i}")));
    }
    let hidden = rms_norm(x, c, &w.at("norm")).cast(w.dtype());
    interface::outputs(&graph, &ports, [hidden.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("encoder")
}

/// h = x + norm(attention(norm(x)))
/// y = h + norm(mlp(norm(h)))
fn layer<'g>(
    graph: &'g Graph,
    x: Value<'g>,
    tokens: &Tokens<'g>,
    visible: Value<'g>,
    c: &Side,
    w: &Weights<'g>,
) -> Value<'g> {
    let normed = rms_norm(x, c, &w.at("pre_self_attn_layernorm"));
    let attended = bidirectional(graph, normed, tokens, visible, c, &w.at("self_attn"));
    let h = residual(x, attended, c, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, c, &w.at("pre_feedforward_layernorm"));
    residual(h, gated_mlp(normed, c, &w.at("mlp")), c, &w.at("post_feedforward_layernorm"))
}
