//! The encoder, shared by the graphs that have one: what it reads, the layer, and the stack of layers.

use crate::attention::{
    attends_in_windows, bidirectional, bidirectional_in_windows, padding_mask, takes_windows, window_mask,
};
use crate::config::{Config, LayerType};
use crate::manifest::EncoderWindow;
use crate::nn::{gated_mlp, residual, rms_norm};
use crate::onnx::{DType, Graph, Value};
use crate::options::Options;
use crate::sequence::Tokens;
use crate::weights::Weights;

/// What the encoder reads.
pub struct Source<'g> {
    /// Ids int64 `[batch, source]`, or vectors `[batch, source, hidden]`.
    pub ids: Value<'g>,
    pub tokens: Tokens<'g>,
    /// Which tokens take part, bool `[batch, 1, 1, 1, source]`; or which tokens see each other, bool
    /// `[batch, 1, 1, source, source]`.
    pub visible: Value<'g>,
    /// The number of each token's source, from 1 on, or 0 for padding: int64 `[batch, source]`.
    pub numbers: Value<'g>,
}

impl<'g> Source<'g> {
    /// One source per row: `mask` int64 `[batch, source]` is 0 for padding.
    pub fn by_row(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> Source<'g> {
        let numbers = mask.cast(DType::Bool).cast(DType::Int64);
        Source { ids, tokens: Tokens::from_start(graph, ids), visible: padding_mask(mask), numbers }
    }

    /// As [`Source::by_row`], for graphs that return the state of every token: where the options allow it, several
    /// sources can lie side by side in a row. `rotary` are float positions, if there are any.
    pub fn by_token(
        graph: &'g Graph,
        [ids, mask]: [Value<'g>; 2],
        rotary: Option<Value<'g>>,
        config: &Config,
        options: &Options,
    ) -> Source<'g> {
        if !options.reads_side_by_side(config) {
            let source = Source::by_row(graph, ids, mask);
            return Source { tokens: source.tokens.rotated_by(rotary), ..source };
        }
        let (tokens, visible) = Tokens::side_by_side(graph, ids, mask);
        let in_windows = takes_windows(options.target.capabilities(), &config.encoder);
        let tokens = if in_windows { Tokens::in_sources(graph, ids, mask) } else { tokens };
        Source { ids, tokens, visible, numbers: mask }
    }
}

/// The output of all layers over the embedded source, `[batch·source, hidden]`, normed.
pub fn states<'g>(embedded: Value<'g>, source: &Source<'g>, options: &Options, w: &Weights<'g>) -> Value<'g> {
    let layers = w.stack.layers.len();
    all_states(embedded, source, layers, options, w).pop().expect("there is the embedding").cast(w.dtype())
}

/// The embedding and the outputs of the first `layers` layers, `[batch·source, hidden]` each, in the dtype of the
/// residual stream; the last layer's output is normed.
pub fn all_states<'g>(
    embedded: Value<'g>,
    source: &Source<'g>,
    layers: usize,
    options: &Options,
    w: &Weights<'g>,
) -> Vec<Value<'g>> {
    let mut all = vec![embedded];
    for (i, &kind) in w.stack.layers[..layers].iter().enumerate() {
        let y = layer(all[i], source, (kind, options.encoder_window), &w.at(&format!("layers.{i}")));
        let is_last = i + 1 == w.stack.layers.len();
        all.push(if is_last { rms_norm(y, &w.at("norm")) } else { y });
    }
    all
}

/// h = x + norm(attention(norm(x)))
/// y = h + norm(mlp(norm(h)))
fn layer<'g>(
    x: Value<'g>,
    source: &Source<'g>,
    (kind, rule): (LayerType, EncoderWindow),
    w: &Weights<'g>,
) -> Value<'g> {
    let normed = rms_norm(x, &w.at("pre_self_attn_layernorm"));
    let (tokens, at) = (&source.tokens, w.at("self_attn"));
    let attended = if attends_in_windows(tokens, &at) {
        bidirectional_in_windows(normed, tokens, source.numbers, (kind, rule), &at)
    } else {
        let visible = match window_mask(tokens, kind, rule) {
            Some(window) => source.visible & window, // [batch, 1, 1, source, source]
            None => source.visible,
        };
        bidirectional(normed, tokens, visible, kind, &at)
    };
    let h = residual(x, attended, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_feedforward_layernorm"));
    residual(h, gated_mlp(normed, &w.at("mlp")), &w.at("post_feedforward_layernorm"))
}
