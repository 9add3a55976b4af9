//! The encoder: source tokens → hidden states, `[batch, source, hidden]`.

use crate::attention::{Tokens, bidirectional, padding_mask, window_mask};
use crate::config::Config;
use crate::nn::{Weights, embedding, gated_mlp, residual, rms_norm};
use crate::onnx::{Definition, Graph, Value};
use crate::{Options, interface};

/// The graph from source tokens to hidden states.
pub fn encoder(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).encoder;
    let [ids, mask] = interface::inputs(&graph, &ports);

    let w = Weights::root(&graph, &config.encoder, options).at("model.encoder");
    let source = Source::of_each(&graph, ids, mask, options);
    let hidden = states(&source, config.encoder.layers.len(), config, options, &w);
    interface::outputs(&graph, &ports, [hidden.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("encoder")
}

/// What the encoder reads.
pub struct Source<'g> {
    /// int64 `[batch, source]`
    pub ids: Value<'g>,
    pub tokens: Tokens<'g>,
    /// Which of the tokens take part: bool `[batch, 1, 1, 1, source]`, or `[batch, 1, 1, source, source]` which of them see each
    /// other.
    pub visible: Value<'g>,
}

impl<'g> Source<'g> {
    pub fn of(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> Source<'g> {
        Source { ids, tokens: Tokens::from(graph, ids, None), visible: padding_mask(mask) }
    }

    /// As [`Source::of`], but for graphs whose states are those of each token, so that several sources may lie side by side in a row.
    pub fn of_each(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>, options: &Options) -> Source<'g> {
        if !options.reads_side_by_side() {
            return Source::of(graph, ids, mask);
        }
        let (tokens, visible) = Tokens::side_by_side(graph, ids, mask);
        Source { ids, tokens, visible }
    }
}

/// What the first `layers` layers return, `[batch·source, hidden]`; behind the last of all, normed.
pub fn states<'g>(
    source: &Source<'g>,
    layers: usize,
    config: &Config,
    options: &Options,
    w: &Weights<'g>,
) -> Value<'g> {
    let mut x = embedding(source.ids, &w.at("embed_tokens.weight"));
    for (i, &kind) in config.encoder.layers[..layers].iter().enumerate() {
        let visible = match window_mask(&source.tokens, kind, options.encoder_window) {
            Some(window) => source.visible & window, // [batch, 1, 1, source, source]
            None => source.visible,
        };
        x = layer(x, &source.tokens, visible, &w.at(&format!("layers.{i}")));
    }
    match layers == config.encoder.layers.len() {
        true => rms_norm(x, &w.at("norm")).cast(w.dtype()),
        false => x.cast(w.dtype()),
    }
}

/// h = x + norm(attention(norm(x)))
/// y = h + norm(mlp(norm(h)))
fn layer<'g>(x: Value<'g>, tokens: &Tokens<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let normed = rms_norm(x, &w.at("pre_self_attn_layernorm"));
    let attended = bidirectional(normed, tokens, visible, &w.at("self_attn"));
    let h = residual(x, attended, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_feedforward_layernorm"));
    residual(h, gated_mlp(normed, &w.at("mlp")), &w.at("post_feedforward_layernorm"))
}
