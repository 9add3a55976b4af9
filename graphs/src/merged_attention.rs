//! Attention to the target so far and to the source in one softmax, by one set of projections. The query is rotated for
//! both; the keys of the source are not.

use crate::attention::{cross_key_value, heads, output_projection, projection, projections};
use crate::config::LayerType;
use crate::interface::{CacheLayout, PRESENT_LENGTH};
use crate::lower::{MergedAttention, Read, Rotation, by_source, merged_attention_with_weights, read_both, rotated};
use crate::nn::{Stacked, head_norm, linear, stacked};
use crate::onnx::{Attribute, DType, Dim, Graph, Heads, Value};
use crate::rotary;
use crate::sequence::{Context, KeyValue, Memory};
use crate::weights::{StackedPart, Weights};

/// The decoder's attention: x and the result `[rows·length, hidden]`. Every token sees itself, what came before it within
/// the window of its layer, and the whole source. Also returns the present: the keys and values of past and new tokens.
pub fn merged<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    memory: Memory<'g>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let _scope = w.scope();
    if context.cache == CacheLayout::InPlace {
        let InPlace { read, present, .. } = in_place(x, context, layer, memory, w);
        return (read, present);
    }
    let (attention, present) = attention(x, context, layer, memory, w);
    (projected(w.lowering.merged_attention(attention), w), present)
}

/// The keys and values of the source that [`merged`] attends to, from the encoder's hidden states `[batch, source,
/// width]`.
pub fn source_key_value<'g>(hidden: Value<'g>, cache: CacheLayout, w: &Weights<'g>) -> KeyValue<'g> {
    if cache != CacheLayout::InPlace {
        return cross_key_value(hidden, None, w);
    }
    let _scope = w.scope();
    let [batch, source, width] = [0, 1, 2].map(|axis| hidden.dim(axis));
    let (heads, head_dim) = (w.stack.num_key_value_heads, w.stack.head_dim);
    let flat = hidden.reshape(&[batch.times(&source), width]);
    let (key, value) = key_value(flat, w).split_halves();
    let shape = [batch, source, heads.into(), head_dim.into()];
    let key = head_norm(key.reshape(&shape), &w.at("k_norm"));
    KeyValue { key: key.transpose(&[0, 2, 1, 3]), value: value.reshape(&shape).transpose(&[0, 2, 1, 3]) }
}

/// Keys and values by one product, `[tokens, 2·kv_heads·head_dim]`, before the norm of keys.
fn key_value<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let rows = w.stack.num_key_value_heads * w.stack.head_dim;
    let parts = ["k_proj", "v_proj"].map(|name| StackedPart { name, rows });
    let linear = projection(w.stack.hidden_size, 2 * rows, w.stack);
    stacked(x, &Stacked { name: "kv_proj", parts: &parts, linear }, w)
}

/// The operator of [`in_place`]. Its inputs, in the order of the body's:
///
/// | input | shape |
/// |---|---|
/// | query | `[rows, length, heads·head_dim]` |
/// | key_value | `[rows, length, 2·kv_heads·head_dim]` |
/// | query_norm, key_norm: factors of the norms | `[head_dim]` |
/// | cos, sin: float32 | `[rows, length, head_dim / 2]` |
/// | positions: int64 | `[rows, length]` |
/// | source_key, source_value | `[batch, kv_heads, source, head_dim]` |
/// | source_mask: bool | `[batch, source]` |
/// | past_key, past_value: none at the first step | `[rows, kv_heads, capacity, head_dim]` |
///
/// It returns what was read, of the shape of the query, the present, and the log-sum-exp of the scores, float32 `[rows,
/// length, heads]`.
const MERGED: &str = "ai.t5gemma.MergedAttention";
/// The attribute with the number of target tokens that a query sees.
const WINDOW: &str = "local_window_size";

/// What [`in_place`] returns.
struct InPlace<'g> {
    /// `[rows·length, hidden]`
    read: Value<'g>,
    present: KeyValue<'g>,
    /// The log-sum-exp of the scores, float32 `[rows, length, heads]`.
    log_sum: Value<'g>,
}

/// [`merged`] by one operator, over a cache that is written in place; it norms and rotates heads, too.
fn in_place<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    Memory { past, source }: Memory<'g>,
    w: &Weights<'g>,
) -> InPlace<'g> {
    let (stack, tokens) = (w.stack, &context.tokens);
    let (rows, length) = (tokens.rows.clone(), tokens.length.clone());
    let Heads { count, kv_count, dim, scale, .. } = heads(stack, None);
    let by_token = |x: Value<'g>| x.reshape(&[rows.clone(), length.clone(), x.dim(-1)]);
    let query = by_token(linear(x, projection(stack.hidden_size, count * dim, stack), &w.at("q_proj")));
    let key_value = by_token(key_value(x, w));
    let norms = ["q_norm", "k_norm"].map(|name| w.at(name).at("weight").one_plus(dim));
    let positions = match tokens.positions.shape().len() {
        1 => tokens.positions.unsqueeze(&[0]).expand(&[rows.clone(), length.clone()]),
        _ => tokens.positions,
    };
    let angles = rotary::angles(positions, &[2], stack.rope(layer), w); // [rows, length, head_dim / 2]
    let [batch, _, source_length, _] = [0, 1, 2, 3].map(|axis| source.key.dim(axis));
    let source_mask = context.source_mask.reshape(&[batch, source_length]);
    let mut inputs = vec![
        ("query", query),
        ("key_value", key_value),
        ("query_norm", norms[0]),
        ("key_norm", norms[1]),
        ("cos", angles.cos()),
        ("sin", angles.sin()),
        ("positions", positions),
        ("source_key", source.key),
        ("source_value", source.value),
        ("source_mask", source_mask),
    ];
    if let Some(past) = past {
        inputs.extend([("past_key", past.key), ("past_value", past.value)]);
    }
    let number = |number: usize| Attribute::Int(number as i64);
    let attributes = [
        ("num_heads", number(count)),
        ("kv_num_heads", number(kv_count)),
        ("scale", Attribute::float(scale)),
        ("epsilon", Attribute::float(stack.rms_norm_eps)),
        (WINDOW, number(layer.window().unwrap_or(MOST_POSITIONS))),
    ];
    let capacity = if past.is_some() { Dim::symbol(PRESENT_LENGTH) } else { length.clone() };
    let present = vec![rows.clone(), kv_count.into(), capacity, dim.into()];
    let dtype = query.dtype();
    let log_sums = (DType::Float32, vec![rows.clone(), length.clone(), count.into()]);
    let outputs = [(dtype, query.shape()), (dtype, present.clone()), (dtype, present), log_sums];
    let body = Body { heads: [count, kv_count], dim, scale, epsilon: stack.rms_norm_eps };
    let made = w.graph.call(MERGED, &inputs, &attributes, &outputs, |graph, inputs| body.write(graph, inputs));
    let read = made[0].reshape(&[rows.times(&length), (count * dim).into()]);
    let present = KeyValue { key: made[1], value: made[2] };
    InPlace { read: output_projection(read, w), present, log_sum: made[3] }
}

/// The softmax over the source, float32 `[batch, kv_heads, beams, group·length, source]`: of rotated queries `[rows,
/// length, heads, head_dim]` whose scores have this log-sum-exp.
fn source_weights<'g>(
    query: Value<'g>,
    source: KeyValue<'g>,
    visible: Value<'g>,
    log_sum: Value<'g>,
    scale: f64,
) -> Value<'g> {
    let [batch, kv_heads, length] = [source.key.dim(0), source.key.dim(1), source.key.dim(2)];
    let by_source = by_source(query * scale, &batch, &kv_heads); // [batch, kv_heads, beams, group·length, head_dim]
    let [beams, queries, head_dim] = [2, 3, 4].map(|axis| by_source.dim(axis));
    let flat = by_source.reshape(&[batch.clone(), kv_heads.clone(), beams.times(&queries), head_dim]);
    let scores = flat.matmul(source.key.transpose(&[0, 1, 3, 2])).cast(DType::Float32);
    let scores = scores.reshape(&[batch.clone(), kv_heads.clone(), beams, queries, length]);
    let log_sum = self::by_source(log_sum.unsqueeze(&[3]), &batch, &kv_heads);
    (scores - log_sum).exp().zero_unless(visible)
}

/// A window that everything is within.
const MOST_POSITIONS: usize = i32::MAX as usize;

/// What defines [`MERGED`] by standard operators.
struct Body {
    /// Of queries, and of keys and values.
    heads: [usize; 2],
    dim: usize,
    scale: f64,
    epsilon: f64,
}

impl Body {
    fn write<'b>(&self, graph: &'b Graph, inputs: &[Value<'b>]) -> Vec<Value<'b>> {
        let &[query, key_value, query_norm, key_norm, cos, sin, positions, source_key, source_value, mask] =
            inputs.first_chunk().expect("ten inputs come before the past");
        let (rows, length, [heads, kv_heads]) = (query.dim(0), query.dim(1), self.heads);
        let split =
            |x: Value<'b>, heads: usize| x.reshape(&[rows.clone(), length.clone(), heads.into(), self.dim.into()]);
        let angles = Rotation { cos: cos.unsqueeze(&[2]), sin: sin.unsqueeze(&[2]) };
        let turned = |x: Value<'b>, norm: Value<'b>| {
            let normed = x / ((x * x).mean() + self.epsilon).sqrt() * norm;
            rotated(normed, angles)
        };
        let (key, value) = key_value.split_halves();
        let query = turned(split(query, heads), query_norm);
        let new = KeyValue {
            key: turned(split(key, kv_heads), key_norm).transpose(&[0, 2, 1, 3]),
            value: split(value, kv_heads).transpose(&[0, 2, 1, 3]),
        };
        let present = match inputs[10..] {
            [key, value] => written(KeyValue { key, value }, new, positions),
            _ => new,
        };
        let keys = present.key.dim(2);
        let key = graph.range(graph.size(&Dim::fixed(0)), graph.size(&keys), &keys).unsqueeze(&[0, 1, 2, 3]);
        let query_position = positions.unsqueeze(&[1, 2, 4]);
        let is_near = key.greater(query_position - graph.attribute(WINDOW));
        let own_visible = key.less_or_equal(query_position) & is_near;
        let attention = MergedAttention {
            query,
            own: present,
            own_visible,
            source: KeyValue { key: source_key, value: source_value },
            source_visible: mask.unsqueeze(&[1, 2, 3]),
            scale: self.scale,
        };
        let Read { read, log_sum, .. } = read_both(attention);
        let log_sum = log_sum.reshape(&[rows.clone(), length.clone(), heads.into()]);
        vec![read.reshape(&[rows, length, (heads * self.dim).into()]), present.key, present.value, log_sum]
    }
}

/// [`merged`], and its attention weights of the source, the mean over heads: float32 `[batch, queries, source]`, the
/// beams of a source row along the queries.
pub fn merged_with_weights<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    memory: Memory<'g>,
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>, Value<'g>) {
    let _scope = w.scope();
    let (read, present, weights) = if context.cache == CacheLayout::InPlace {
        let InPlace { read, present, log_sum } = in_place(x, context, layer, memory, w);
        let (query, _) = projections(x, &context.tokens, w.stack.rope(layer), w);
        let weights = source_weights(query, memory.source, context.source_mask, log_sum, heads(w.stack, None).scale);
        (read, present, weights)
    } else {
        let (attention, present) = attention(x, context, layer, memory, w);
        let (read, weights) = merged_attention_with_weights(attention);
        (projected(read, w), present, weights)
    };
    let length = &context.tokens.length;
    // [batch, kv_heads, beams, group·length, source]
    let [batch, kv_heads, beams, queries, source] = [0, 1, 2, 3, 4].map(|axis| weights.dim(axis));
    let group = Dim::fixed(w.stack.num_attention_heads / w.stack.num_key_value_heads);
    debug_assert_eq!(queries, group.times(length));
    let by_head = weights.reshape(&[batch.clone(), kv_heads, beams.clone(), group, length.clone(), source.clone()]);
    let mean = by_head.reduce_mean(&[1, 3]).reshape(&[batch, beams.times(length), source]);
    (read, present, mean)
}

/// The operands of [`merged`]'s attention, and the present.
fn attention<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    layer: LayerType,
    Memory { past, source }: Memory<'g>,
    w: &Weights<'g>,
) -> (MergedAttention<'g>, KeyValue<'g>) {
    let (query, new) = projections(x, &context.tokens, w.stack.rope(layer), w);
    let present = match (past, context.cache) {
        (None, _) => new,
        (Some(past), CacheLayout::Growing) => {
            KeyValue { key: Value::concat(&[past.key, new.key], 2), value: Value::concat(&[past.value, new.value], 2) }
        }
        (Some(past), CacheLayout::InPlace | CacheLayout::Static(_)) => written(past, new, context.tokens.positions),
    };
    let own_visible = visible(context, &present.key.dim(2), layer);
    let scale = heads(w.stack, None).scale;
    let source_visible = context.source_mask;
    (MergedAttention { query, own: present, own_visible, source, source_visible, scale }, present)
}

/// `o(x)` of all heads' `[rows, length, heads, head_dim]`.
fn projected<'g>(x: Value<'g>, w: &Weights<'g>) -> Value<'g> {
    let (tokens, width) = (x.dim(0).times(&x.dim(1)), w.stack.num_attention_heads * w.stack.head_dim);
    output_projection(x.reshape_to_known(&[tokens, width.into()]), w)
}

/// The past, a buffer with room for more tokens, with the new ones at their positions.
fn written<'g>(past: KeyValue<'g>, new: KeyValue<'g>, positions: Value<'g>) -> KeyValue<'g> {
    let at = if positions.shape().len() == 1 { positions.unsqueeze(&[0, 1, 3]) } else { positions.unsqueeze(&[1, 3]) };
    let at = at.expand(&new.key.shape());
    KeyValue { key: past.key.scatter_elements(at, new.key, 2), value: past.value.scatter_elements(at, new.value, 2) }
}

/// The target tokens that each token sees: bool `[rows or 1, 1, 1, length, keys]`.
fn visible<'g>(context: &Context<'g>, keys: &Dim, layer: LayerType) -> Value<'g> {
    let positions = context.tokens.positions;
    let graph = positions.graph();
    let key = graph.range(graph.size(&Dim::fixed(0)), graph.size(keys), keys).unsqueeze(&[0, 1, 2, 3]);
    let query =
        if positions.shape().len() == 1 { positions.unsqueeze(&[0, 1, 2, 4]) } else { positions.unsqueeze(&[1, 2, 4]) };
    let window = match layer {
        // Nothing ever leaves a window as wide as the cache.
        LayerType::Sliding(window) if keys.as_fixed().is_some_and(|keys| window >= keys) => None,
        layer => layer.window(),
    };
    match window {
        None => key.less_or_equal(query),
        Some(window) => key.less_or_equal(query) & key.greater(query - window as f64),
    }
}
