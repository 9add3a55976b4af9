//! Attention as the layers use it: the encoder over its source, the decoder over its past, the decoder over the source;
//! and what each of them sees. Projections, positions and masks are here; the operator over queries, keys and values is
//! the target's ([`Lowering::attention`](crate::lower::Lowering::attention)).

use crate::config::{LayerType, MOST_SIZE, Rope, Stack};
use crate::interface::{BEAMS, CacheLayout, PRESENT_LENGTH};
use crate::lower::{Attention, Capabilities, attention_with_weights, mask_by_query};
use crate::manifest::EncoderWindow;
use crate::nn::{Linear, Stacked, head_norm, linear, stacked};
use crate::onnx::{Attribute, DType, Dim, Graph, GroupQuery, Heads, Value};
use crate::rotary::{self, rotary};
use crate::sequence::{Context, KeyValue, Tokens};
use crate::weights::{StackedPart, Weights};

/// The encoder's self-attention: x and the result `[rows·length, hidden]`; every token sees what is `visible` to it,
/// before and after it.
pub fn bidirectional<'g>(
    x: Value<'g>,
    tokens: &Tokens<'g>,
    visible: Value<'g>,
    layer: LayerType,
    w: &Weights<'g>,
) -> Value<'g> {
    let _scope = w.scope();
    let rope = w.stack.rope(layer);
    // The operator that rotates heads in a row looks angles up by integer positions.
    if w.lowering.capabilities().attends_in_rows && tokens.rotary.dtype() == DType::Int64 {
        return bidirectional_in_rows(x, tokens, visible, rope, w);
    }
    let (query, key_value) = projections(x, tokens, rope, w);
    attend(query, key_value, visible, w)
}

/// [`bidirectional`] with heads side by side, `[rows, length, heads·head_dim]`, as they come out of the projections.
fn bidirectional_in_rows<'g>(
    x: Value<'g>,
    tokens: &Tokens<'g>,
    visible: Value<'g>,
    rope: Rope,
    w: &Weights<'g>,
) -> Value<'g> {
    let [query, key, value] = heads_in_rows(x, tokens, rope, w);
    let attended = query.attention_3d([key, value], mask_by_query(visible, &query.dim(1)), heads(w.stack, None));
    output_projection(attended.reshape(&[tokens.rows.times(&tokens.length), attended.dim(-1)]), w)
}

/// Whether [`bidirectional_in_windows`] is the form of the encoder's attention.
pub fn attends_in_windows(tokens: &Tokens, w: &Weights) -> bool {
    // The operator that rotates heads in a row looks angles up by integer positions.
    takes_windows(w.lowering.capabilities(), w.stack) && tokens.rotary.dtype() == DType::Int64
}

/// Whether the target has an operator for [`bidirectional_in_windows`] that suits the stack.
pub fn takes_windows(target: &Capabilities, stack: &Stack) -> bool {
    target.attends_in_windows && stack.attn_logit_softcapping.is_none()
}

/// The operator of [`bidirectional_in_windows`]: queries, keys and values `[rows, length, heads·head_dim]`, and the number
/// of each token's source, int64 `[rows, length]`.
const WINDOW_ATTENTION: &str = "ai.t5gemma.WindowAttention";
/// How many tokens before itself a query sees.
const BACK: &str = "back";
/// How many tokens behind itself a query sees.
const AHEAD: &str = "ahead";

/// [`bidirectional`] by one operator, which needs no memory for pairs of tokens. `numbers`, int64 `[rows, length]`, are
/// those of [`Tokens::side_by_side`].
pub fn bidirectional_in_windows<'g>(
    x: Value<'g>,
    tokens: &Tokens<'g>,
    numbers: Value<'g>,
    (layer, rule): (LayerType, EncoderWindow),
    w: &Weights<'g>,
) -> Value<'g> {
    let _scope = w.scope();
    let [query, key, value] = heads_in_rows(x, tokens, w.stack.rope(layer), w);
    let heads = heads(w.stack, None);
    let (back, ahead) = layer.window().map_or((MOST_SIZE, MOST_SIZE), |window| rule.reach(window));
    let number = |number: usize| Attribute::Int(number as i64);
    let attributes = [
        ("q_num_heads", number(heads.count)),
        ("kv_num_heads", number(heads.kv_count)),
        ("scale", Attribute::float(heads.scale)),
        (BACK, number(back)),
        (AHEAD, number(ahead)),
    ];
    let inputs = [("query", query), ("key", key), ("value", value), ("sources", numbers)];
    let output = (query.dtype(), query.shape());
    let attended = w.graph.call(WINDOW_ATTENTION, &inputs, &attributes, &[output], |graph, inputs| {
        let &[query, key, value, numbers] = inputs.first_chunk().expect("there are four inputs");
        let (tokens, visible) = Tokens::side_by_side(graph, numbers, numbers);
        // Within a source, places differ as positions do.
        let place = graph.range(graph.size(&Dim::fixed(0)), graph.size(&tokens.length), &tokens.length);
        let (from, to) = (place.unsqueeze(&[1]), place.unsqueeze(&[0]));
        let near = to.less_or_equal(from + graph.attribute(AHEAD)) & from.less_or_equal(to + graph.attribute(BACK));
        vec![query.attention_3d([key, value], mask_by_query(visible & near, &query.dim(1)), heads)]
    });
    output_projection(attended[0].reshape(&[tokens.rows.times(&tokens.length), query.dim(-1)]), w)
}

/// Queries, keys and values, normed and rotated, with heads side by side: `[rows, length, heads·head_dim]` each.
fn heads_in_rows<'g>(x: Value<'g>, tokens: &Tokens<'g>, rope: Rope, w: &Weights<'g>) -> [Value<'g>; 3] {
    let (stack, length) = (w.stack, &tokens.length);
    let heads = heads(stack, None);
    let norms = [Some("q_norm"), Some("k_norm"), None].map(|norm| norm.filter(|_| stack.qk_norm));
    let parts = [("q_proj", heads.count), ("k_proj", heads.kv_count), ("v_proj", heads.kv_count)];
    let [query, key, value] = [0, 1, 2].map(|at| {
        let (name, count) = parts[at];
        let output = count * stack.head_dim;
        let projected = linear(x, projection(stack.hidden_size, output, stack), &w.at(name));
        let normed = match norms[at] {
            None => projected,
            Some(norm) => {
                let heads = [tokens.rows.clone(), length.clone(), count.into(), stack.head_dim.into()];
                head_norm(projected.reshape(&heads), &w.at(norm))
            }
        };
        normed.reshape(&[tokens.rows.clone(), length.clone(), output.into()])
    });
    // Positions of each row are looked up in tables of all positions up to the length.
    let (places, positions) = if tokens.positions.shape().len() == 1 {
        (None, tokens.positions)
    } else {
        (Some(tokens.positions), w.graph.range(w.graph.size(&0.into()), w.graph.size(length), length))
    };
    let angles = rotary::angles(positions, &[1], rope, w); // [length, head_dim / 2]
    let tables = [angles.cos(), angles.sin()].map(|table| table.cast(x.dtype()));
    let [query, key] = [query, key].map(|x| x.rotary_embedding(places, tables));
    [query, key, value]
}

/// The decoder's self-attention: x and the result `[rows·length, hidden]`; every token sees itself and what came before
/// it within the window of its layer. Also returns the present: the keys and values of past and new tokens.
pub fn causal<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    past: Option<KeyValue<'g>>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let _scope = w.scope();
    match context.cache {
        CacheLayout::Growing => causal_growing(x, context, layer, past, w),
        CacheLayout::InPlace => causal_in_place(x, context, layer, past, w),
        CacheLayout::Static(capacity) => {
            let past = past.expect("a cache of fixed capacity is there from the first token on");
            causal_static(x, context, layer, past, capacity, w)
        }
    }
}

/// [`causal`] with a present that is a new tensor, longer than the past by the new tokens.
fn causal_growing<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    past: Option<KeyValue<'g>>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let (query, new) = projections(x, &context.tokens, w.stack.rope(layer), w);
    let present = match past {
        None => new,
        Some(past) => {
            KeyValue { key: Value::concat(&[past.key, new.key], 2), value: Value::concat(&[past.value, new.value], 2) }
        }
    };
    let causal = causal_mask(w.graph, &context.tokens, &present.key.dim(2), layer);
    let visible = match context.target_mask {
        None => causal,
        Some(target) => target & causal, // [batch, 1, 1, length, keys]
    };
    (attend(query, present, visible, w), present)
}

/// [`causal`] with a past of fixed capacity, into a copy of which the new tokens are written at their positions. Tokens
/// behind them are not seen, but must be finite.
fn causal_static<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    past: KeyValue<'g>,
    capacity: usize,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let (query, new) = projections(x, &context.tokens, w.stack.rope(layer), w);
    let at = context.tokens.positions.unsqueeze(&[0, 1, 3]).expand(&new.key.shape());
    let present = KeyValue {
        key: past.key.scatter_elements(at, new.key, 2),
        value: past.value.scatter_elements(at, new.value, 2),
    };
    let layer = match layer {
        // Nothing ever leaves a window as wide as the cache.
        LayerType::Sliding(window) if window >= capacity => LayerType::Full,
        layer => layer,
    };
    let visible = causal_mask(w.graph, &context.tokens, &Dim::fixed(capacity), layer);
    (attend(query, present, visible, w), present)
}

/// [`causal`] by one operator, over a cache that is written in place.
fn causal_in_place<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    past: Option<KeyValue<'g>>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let (tokens, stack) = (&context.tokens, w.stack);
    let rows = std::slice::from_ref(&tokens.rows);
    let last = match past {
        None => tokens.positions.last(0).cast(DType::Int32).expand(rows),
        Some(_) => tokens.positions.last(1).cast(DType::Int32).reshape(rows),
    };
    let longest = w.lowering.longest_row(last, past.map(|past| past.key));
    let [q, kv] = [stack.num_attention_heads, stack.num_key_value_heads].map(|count| count * stack.head_dim);
    let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)].map(|(name, rows)| StackedPart { name, rows });
    let linear = projection(stack.hidden_size, q + 2 * kv, stack);
    let projected = stacked(x, &Stacked { name: "qkv_proj", parts: &parts, linear }, w);
    let packed = projected.reshape(&[tokens.rows.clone(), tokens.length.clone(), (q + 2 * kv).into()]);
    let heads = heads(stack, layer.window());
    let tables = rotary::tables(stack.rope(layer), w);
    let [cos, sin] = [tables.cos, tables.sin].map(|table| table.cast(projected.dtype()));
    let present = if past.is_some() { Dim::symbol(PRESENT_LENGTH) } else { tokens.length.clone() };
    let past = past.map(|past| [past.key, past.value]);
    let [attended, key, value] =
        packed.group_query_attention(GroupQuery { past, last, longest, cos, sin, heads, present });
    let attended = attended.reshape(&[tokens.rows.times(&tokens.length), q.into()]);
    (output_projection(attended, w), KeyValue { key, value })
}

/// The decoder's attention to the source, without a window, and mostly without rotary positions: x and the result
/// `[rows·length, hidden]`. `source` is at batch size; the beams of a source row lie along its query axis, so that keys
/// and values are not repeated for them.
pub fn cross<'g>(x: Value<'g>, context: &Context<'g>, source: KeyValue<'g>, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    attend(cross_query(x, context, source, w), source, context.source_mask, w)
}

/// [`cross`], and its attention weights, the mean over heads: float32 `[batch, queries, source]`.
pub fn cross_with_weights<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    source: KeyValue<'g>,
    w: &Weights<'g>,
) -> (Value<'g>, Value<'g>) {
    let _scope = w.scope();
    let query = cross_query(x, context, source, w);
    let (read, weights) = attention_with_weights(attention(query, source, context.source_mask, w));
    (merged(read, w), weights.reduce_mean(&[1, 2]).squeeze(1).squeeze(1))
}

/// The queries of [`cross`]: `[batch, beams·length, heads, head_dim]`.
fn cross_query<'g>(x: Value<'g>, context: &Context<'g>, source: KeyValue<'g>, w: &Weights<'g>) -> Value<'g> {
    let (batch, tokens) = (source.key.dim(0), &context.tokens);
    let queries = if tokens.rows == batch { tokens.length.clone() } else { Dim::symbol(BEAMS).times(&tokens.length) };
    let (heads, w) = (w.stack.num_attention_heads, w.at("q_proj"));
    match context.cross_rotary {
        None => split_heads(x, [&batch, &queries], heads, &w),
        Some(positions) => {
            let query = split_heads(x, [&tokens.rows, &tokens.length], heads, &w);
            rotary(query, positions, w.stack.full_rope, &w).reshape(&[
                batch,
                queries,
                heads.into(),
                w.stack.head_dim.into(),
            ])
        }
    }
}

/// The keys and values that [`cross`] attends to, from the encoder's hidden states `[batch, source, width]`; keys are
/// rotated by `positions`, `[source]` or `[batch, source]`, if there are any.
pub fn cross_key_value<'g>(hidden: Value<'g>, positions: Option<Value<'g>>, w: &Weights<'g>) -> KeyValue<'g> {
    let _scope = w.scope();
    let [batch, source, width] = [0, 1, 2].map(|axis| hidden.dim(axis));
    let flat = hidden.reshape(&[batch.times(&source), width]);
    let project = |name: &str| split_heads(flat, [&batch, &source], w.stack.num_key_value_heads, &w.at(name));
    let key = normed(project("k_proj"), "k_norm", w);
    let key = match positions {
        None => key,
        Some(positions) => rotary(key, positions, w.stack.full_rope, w),
    };
    KeyValue { key: key.transpose(&[0, 2, 1, 3]), value: project("v_proj").transpose(&[0, 2, 1, 3]) }
}

/// Rotated queries `[rows, length, heads, head_dim]`, and the rotated keys and the values of the given tokens.
pub fn projections<'g>(x: Value<'g>, tokens: &Tokens<'g>, rope: Rope, w: &Weights<'g>) -> (Value<'g>, KeyValue<'g>) {
    let project = |name: &str, count| split_heads(x, [&tokens.rows, &tokens.length], count, &w.at(name));
    let query = rotary(normed(project("q_proj", w.stack.num_attention_heads), "q_norm", w), tokens.rotary, rope, w);
    let key = rotary(normed(project("k_proj", w.stack.num_key_value_heads), "k_norm", w), tokens.rotary, rope, w);
    let value = project("v_proj", w.stack.num_key_value_heads);
    (query, KeyValue { key: key.transpose(&[0, 2, 1, 3]), value: value.transpose(&[0, 2, 1, 3]) })
}

/// Heads `[rows, length, heads, head_dim]`, normed if the stack norms queries and keys.
fn normed<'g>(x: Value<'g>, norm: &str, w: &Weights<'g>) -> Value<'g> {
    if w.stack.qk_norm { head_norm(x, &w.at(norm)) } else { x }
}

/// A projection of x `[rows·length, in]` into `count` heads, `[rows, length, count, head_dim]`.
fn split_heads<'g>(x: Value<'g>, [rows, length]: [&Dim; 2], count: usize, w: &Weights<'g>) -> Value<'g> {
    let input = x.dim(-1).as_fixed().expect("the width of the residual stream is fixed");
    let head_dim = w.stack.head_dim;
    let projected = linear(x, projection(input, count * head_dim, w.stack), w);
    projected.reshape(&[rows.clone(), length.clone(), count.into(), head_dim.into()])
}

/// `o(attention(q, k, v))`, back on the residual stream `[rows·length, hidden]`.
fn attend<'g>(query: Value<'g>, key_value: KeyValue<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    merged(w.lowering.attention(attention(query, key_value, visible, w)), w)
}

fn attention<'g>(query: Value<'g>, key_value: KeyValue<'g>, visible: Value<'g>, w: &Weights<'g>) -> Attention<'g> {
    let KeyValue { key, value } = key_value;
    let Heads { scale, cap, .. } = heads(w.stack, None);
    Attention { query, key, value, visible, scale, cap }
}

/// `o(x)` of all heads' `[batch, queries, heads, head_dim]`.
fn merged<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let (tokens, width) = (x.dim(0).times(&x.dim(1)), w.stack.num_attention_heads * w.stack.head_dim);
    // No inferred dimension: TensorRT bounds one by a quotient of bounds. Behind the division by the beams, the bound
    // of each layer would be that of the layer before times the maximum batch.
    output_projection(x.reshape_to_known(&[tokens, width.into()]), w)
}

/// `context · o_projᵀ (+ b)`, the last step of attention.
pub fn output_projection<'g>(context: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let width = w.stack.num_attention_heads * w.stack.head_dim;
    linear(context, projection(width, w.stack.hidden_size, w.stack), &w.at("o_proj"))
}

pub fn projection(input: usize, output: usize, stack: &Stack) -> Linear {
    Linear { input, output, bias: stack.attention_bias }
}

/// The heads of a stack, whose queries see `window` positions, themselves included, or all before them.
pub fn heads(stack: &Stack, window: Option<usize>) -> Heads {
    Heads {
        count: stack.num_attention_heads,
        kv_count: stack.num_key_value_heads,
        dim: stack.head_dim,
        scale: stack.query_pre_attn_scalar.powf(-0.5),
        cap: stack.attn_logit_softcapping,
        window,
    }
}

/// The source tokens that `attention_mask` (int64 `[batch, source]`, 0 for padding) lets through:
/// bool `[batch, 1, 1, 1, source]`.
pub fn padding_mask(attention_mask: Value<'_>) -> Value<'_> {
    attention_mask.cast(DType::Bool).unsqueeze(&[1, 2, 3])
}

/// The pairs of positions within a bidirectional window: bool `[length, length]`, `[rows, 1, 1, length, length]` where
/// rows have positions of their own, or none where every position sees all.
pub fn window_mask<'g>(tokens: &Tokens<'g>, layer: LayerType, rule: EncoderWindow) -> Option<Value<'g>> {
    let LayerType::Sliding(window) = layer else { return None };
    let (back, ahead) = rule.reach(window);
    // In sources that are no longer than the window, no two positions are farther apart.
    if tokens.length.as_fixed().is_some_and(|length| length <= back.min(ahead) + 1) {
        return None;
    }
    let (query, key) = if tokens.positions.shape().len() == 1 {
        (tokens.positions.unsqueeze(&[1]), tokens.positions.unsqueeze(&[0]))
    } else {
        (tokens.positions.unsqueeze(&[1, 2, 4]), tokens.positions.unsqueeze(&[1, 2, 3]))
    };
    Some(key.less_or_equal(query + ahead as f64) & query.less_or_equal(key + back as f64))
}

/// `key <= query`, and `key > query − window` in a sliding layer: bool `[length, keys]`.
fn causal_mask<'g>(graph: &'g Graph, tokens: &Tokens<'g>, keys: &Dim, layer: LayerType) -> Value<'g> {
    let key = graph.range(graph.size(&Dim::fixed(0)), graph.size(keys), keys).unsqueeze(&[0]);
    let query = tokens.positions.unsqueeze(&[1]);
    match layer {
        LayerType::Full => key.less_or_equal(query),
        LayerType::Sliding(window) => key.less_or_equal(query) & key.greater(query - window as f64),
    }
}
