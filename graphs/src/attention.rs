//! Attention: rotary positions, what each layer sees, and the three uses of the one soft-capped operator (the encoder over
//! its source, the decoder over its past, the decoder over the source). The operator itself is in `lower.rs`.

use crate::config::LayerType;
use crate::decoder::Context;
use crate::interface::BEAMS;
use crate::lower::{Attention, with_weights};
use crate::manifest::EncoderWindow;
use crate::nn::{Weights, linear};
use crate::onnx::{DType, Data, Dim, Graph, Value};

/// Keys and values of one layer, `[rows, kv_heads, length, head_dim]` each.
#[derive(Clone, Copy)]
pub struct KeyValue<'g> {
    pub key: Value<'g>,
    pub value: Value<'g>,
}

/// The tokens that a graph is run on: `rows × length` of them, and where in their sequence they stand.
#[derive(Clone)]
pub struct Tokens<'g> {
    pub rows: Dim,
    pub length: Dim,
    /// int64 `[length]`; `[rows, length]` where a cache of fixed capacity is written, or where sources lie side by side
    pub positions: Value<'g>,
}

impl<'g> Tokens<'g> {
    /// Tokens given as `[rows, length]` ids from position `first` on.
    pub fn from(graph: &'g Graph, ids: Value<'g>, first: Option<&Dim>) -> Tokens<'g> {
        let (rows, length) = (ids.dim(0), ids.dim(1));
        let (start, end) = match first {
            None => (graph.size(&Dim::fixed(0)), graph.size(&length)),
            Some(past) => (graph.size(past), graph.size(past) + graph.size(&length)),
        };
        let positions = graph.range(start, end, &length);
        Tokens { rows, length, positions }
    }

    /// Tokens of which those with the same number in `mask`, int64 `[rows, length]`, are one source, and those with 0 are padding. Also
    /// which of them see each other, bool `[rows, 1, 1, length, length]`: padding sees the first source, as it does where there is
    /// one.
    pub fn side_by_side(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> (Tokens<'g>, Value<'g>) {
        let tokens = Tokens::from(graph, ids, None);
        let visible = mask.at_least(1.0).unsqueeze(&[2]).equals(mask.unsqueeze(&[1])); // [rows, length, length]
        // Every source has the positions that it has alone, so that its numbers are the same ones, too.
        let positions = (tokens.positions.unsqueeze(&[0]) - visible.first_true()).at_least(0.0);
        (Tokens { positions, ..tokens }, visible.unsqueeze(&[1, 2]))
    }
}

/// The angles of positions `[length]`, float32 `[length, head_dim / 2]`, with the axes `axes` of length 1 but for the last, which is
/// that of the angles.
pub fn angles<'g>(positions: Value<'g>, axes: &[isize], w: &Weights<'g>) -> Value<'g> {
    let mut shape = vec![1; axes.len()];
    shape.push(w.side.head_dim / 2);
    let frequencies = Data::Floats(frequencies(w).map(f64::from).collect());
    let frequencies = w.graph.constant(DType::Float32, &shape, frequencies);
    positions.cast(DType::Float32).unsqueeze(axes) * frequencies
}

/// The angles' frequencies `f_j = θ^(−2j/head_dim)`: powers and quotients in float32, as the reference computes them.
fn frequencies(w: &Weights<'_>) -> impl Iterator<Item = f32> {
    let (theta, head_dim) = (w.side.rope_theta as f32, w.side.head_dim);
    (0..head_dim / 2).map(move |j| 1.0 / theta.powf((2 * j) as f32 / head_dim as f32))
}

/// `cos(pos·f)` and `sin(pos·f)` of every position there can be: float32 `[max_position_embeddings, head_dim / 2]` each.
pub fn rotary_tables<'g>(w: &Weights<'g>) -> [Value<'g>; 2] {
    let shape = [w.side.max_position_embeddings, w.side.head_dim / 2];
    let table = |name, function: fn(f32) -> f32| {
        w.graph.table(name, &shape, || {
            let of = |position: usize| frequencies(w).map(move |f| f64::from(function(position as f32 * f)));
            (0..shape[0]).flat_map(of).collect()
        })
    };
    [table("rotary_cos", f32::cos), table("rotary_sin", f32::sin)]
}

/// x turned by the angles `pos·f`: x `[rows, length, heads, head_dim]`. The angles are float32 whatever x is.
fn rotary<'g>(x: Value<'g>, tokens: &Tokens<'g>, w: &Weights<'g>) -> Value<'g> {
    let angles = angles(tokens.positions, &[1, 2], w); // [length, 1, head_dim / 2]
    w.lowering.rotary(x, [angles.cos().cast(x.dtype()), angles.sin().cast(x.dtype())])
}

/// A projection of x `[rows·length, in]` into `count` heads, `[rows, length, count, head_dim]`.
fn heads<'g>(x: Value<'g>, [rows, length]: [&Dim; 2], count: usize, w: &Weights<'g>) -> Value<'g> {
    let input = x.dim(-1).as_fixed().expect("the width of the residual stream is fixed");
    let head_dim = w.side.head_dim;
    let projected = linear(x, [input, count * head_dim], w.side.attention_bias, w);
    projected.reshape(&[rows.clone(), length.clone(), count.into(), head_dim.into()])
}

/// `o(attention(q, k, v))`, back on the residual stream `[rows·length, hidden]`.
fn attend<'g>(query: Value<'g>, key_value: KeyValue<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    merged(w.lowering.attention(attention(query, key_value, visible, w)), w)
}

fn attention<'g>(query: Value<'g>, key_value: KeyValue<'g>, visible: Value<'g>, w: &Weights<'g>) -> Attention<'g> {
    let scale = w.side.query_pre_attn_scalar.powf(-0.5);
    Attention { query, key_value, visible, scale, cap: w.side.attn_logit_softcapping }
}

/// `o(x)` of all heads' `[batch, queries, heads, head_dim]`.
fn merged<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let (tokens, width) = (x.dim(0).times(&x.dim(1)), w.side.num_attention_heads * w.side.head_dim);
    // TensorRT bounds what it has to infer by quotients, so that after the quotient of beams each layer would be as many times
    // larger than the one before as there are sources at most.
    w.output_projection(x.reshape_to_known(&[tokens, width.into()]))
}

/// Rotated queries, and the rotated keys and the values of the given tokens.
fn projections<'g>(x: Value<'g>, tokens: &Tokens<'g>, w: &Weights<'g>) -> (Value<'g>, KeyValue<'g>) {
    let project = |name: &str, count| heads(x, [&tokens.rows, &tokens.length], count, &w.at(name));
    let query = rotary(project("q_proj", w.side.num_attention_heads), tokens, w);
    let key = rotary(project("k_proj", w.side.num_key_value_heads), tokens, w);
    let value = project("v_proj", w.side.num_key_value_heads);
    let key_value = KeyValue { key: key.transpose(&[0, 2, 1, 3]), value: value.transpose(&[0, 2, 1, 3]) };
    (query, key_value) // [rows, length, heads, head_dim], [rows, kv_heads, length, head_dim]
}

/// The encoder's self-attention: every token sees what is `visible` to it, before and after it.
pub fn bidirectional<'g>(x: Value<'g>, tokens: &Tokens<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    w.lowering.bidirectional(x, tokens, visible, w)
}

/// [`bidirectional`] by heads that stand apart.
pub fn over_source<'g>(x: Value<'g>, tokens: &Tokens<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let (query, key_value) = projections(x, tokens, w);
    attend(query, key_value, visible, w)
}

/// The decoder's self-attention: every token sees itself and what came before it within its layer's window. Returns the
/// keys and values of past and new tokens too.
pub fn causal<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    past: Option<KeyValue<'g>>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let _scope = w.scope();
    w.lowering.causal(x, context, past, w)
}

/// [`causal`] with a present that is a new tensor, one step longer than the past.
pub fn growing<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    past: Option<KeyValue<'g>>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let (query, new) = projections(x, &context.tokens, w);
    let present = match past {
        None => new,
        Some(past) => {
            KeyValue { key: Value::concat(&[past.key, new.key], 2), value: Value::concat(&[past.value, new.value], 2) }
        }
    };
    let causal = causal_mask(w.graph, &context.tokens, &present.key.dim(2), context.kind);
    let visible = match context.target {
        None => causal,
        Some(target) => target & causal, // [batch, 1, 1, length, keys]
    };
    (attend(query, present, visible, w), present)
}

/// [`causal`] with a past that has room for `capacity` tokens, into which the new ones are written at their positions. What
/// lies behind them is not seen, but must be numbers.
pub fn fixed<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    past: Option<KeyValue<'g>>,
    capacity: usize,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let past = past.expect("a cache of fixed capacity is there from the first token on");
    let (query, new) = projections(x, &context.tokens, w);
    let at = context.tokens.positions.unsqueeze(&[0, 1, 3]).expand(&new.key.shape());
    let present = KeyValue { key: past.key.scattered(at, new.key, 2), value: past.value.scattered(at, new.value, 2) };
    let kind = match context.kind {
        // Nothing ever leaves a window as wide as the cache.
        LayerType::Sliding(window) if window >= capacity => LayerType::Full,
        kind => kind,
    };
    let visible = causal_mask(w.graph, &context.tokens, &Dim::fixed(capacity), kind);
    (attend(query, present, visible, w), present)
}

/// The decoder's attention to the source, without rotary positions and without a window. `source` is at batch size; the
/// beams of a source row lie along its query axis, so that keys and values are not repeated for them. Where the context asks
/// for it, also how much every query attends to the source, the mean over heads: float32 `[batch, queries, source]`.
pub fn cross<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    source: KeyValue<'g>,
    w: &Weights<'g>,
) -> (Value<'g>, Option<Value<'g>>) {
    let _scope = w.scope();
    let batch = source.key.dim(0);
    let queries = match context.tokens.rows == batch {
        true => context.tokens.length.clone(),
        false => Dim::symbol(BEAMS).times(&context.tokens.length),
    };
    let shape = [&batch, &queries];
    let query = heads(x, shape, w.side.num_attention_heads, &w.at("q_proj"));
    if !context.is_aligned {
        return (attend(query, source, context.visible, w), None);
    }
    let (read, weights) = with_weights(attention(query, source, context.visible, w));
    (merged(read, w), Some(weights.mean_along(&[1, 2]).squeeze(1).squeeze(1)))
}

/// The keys and values that [`cross`] attends to, of the encoder's hidden states `[batch, source, width]`.
pub fn cross_key_value<'g>(hidden: Value<'g>, w: &Weights<'g>) -> KeyValue<'g> {
    let _scope = w.scope();
    let [batch, source, width] = [0, 1, 2].map(|axis| hidden.dim(axis));
    let flat = hidden.reshape(&[batch.times(&source), width]);
    let project =
        |name: &str| heads(flat, [&batch, &source], w.side.num_key_value_heads, &w.at(name)).transpose(&[0, 2, 1, 3]);
    KeyValue { key: project("k_proj"), value: project("v_proj") }
}

/// The source tokens that `attention_mask` (int64 `[batch, source]`, 0 for padding) lets through:
/// bool `[batch, 1, 1, 1, source]`.
pub fn padding_mask(attention_mask: Value<'_>) -> Value<'_> {
    attention_mask.cast(DType::Bool).unsqueeze(&[1, 2, 3])
}

/// The pairs of positions within a bidirectional window: bool `[length, length]`, `[rows, 1, 1, length, length]` where rows have
/// positions of their own, or nothing for a layer that sees all.
pub fn window_mask<'g>(tokens: &Tokens<'g>, layer: LayerType, rule: EncoderWindow) -> Option<Value<'g>> {
    let LayerType::Sliding(window) = layer else { return None };
    let reach = match rule {
        EncoderWindow::Inclusive => window,
        EncoderWindow::Exclusive => window - 1,
    } as f64;
    let (query, key) = match tokens.positions.shape().len() {
        1 => (tokens.positions.unsqueeze(&[1]), tokens.positions.unsqueeze(&[0])),
        _ => (tokens.positions.unsqueeze(&[1, 2, 4]), tokens.positions.unsqueeze(&[1, 2, 3])),
    };
    Some(key.at_most(query + reach) & query.at_most(key + reach))
}

/// `key <= query`, and `key > query − window` in a sliding layer: bool `[length, keys]`.
fn causal_mask<'g>(graph: &'g Graph, tokens: &Tokens<'g>, keys: &Dim, layer: LayerType) -> Value<'g> {
    let key = graph.range(graph.size(&Dim::fixed(0)), graph.size(keys), keys).unsqueeze(&[0]);
    let query = tokens.positions.unsqueeze(&[1]);
    match layer {
        LayerType::Full => key.at_most(query),
        LayerType::Sliding(window) => key.at_most(query) & key.above(query - window as f64),
    }
}
