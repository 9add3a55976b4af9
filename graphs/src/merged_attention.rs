//! Attention to the target so far and to the source in one softmax, by one set of projections. The query is rotated for
//! both; the keys of the source are not.

use crate::attention::{heads, output_projection, projections};
use crate::config::LayerType;
use crate::interface::CacheLayout;
use crate::lower::{MergedAttention, merged_attention_with_weights};
use crate::onnx::{Dim, Value};
use crate::sequence::{Context, KeyValue, Memory};
use crate::weights::Weights;

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
    let (attention, present) = attention(x, context, layer, memory, w);
    (projected(w.lowering.merged_attention(attention), w), present)
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
    let (attention, present) = attention(x, context, layer, memory, w);
    let length = &context.tokens.length;
    let (read, weights) = merged_attention_with_weights(attention); // […], [batch, kv_heads, beams, group·length, source]
    let [batch, kv_heads, beams, queries, source] = [0, 1, 2, 3, 4].map(|axis| weights.dim(axis));
    let group = Dim::fixed(w.stack.num_attention_heads / w.stack.num_key_value_heads);
    debug_assert_eq!(queries, group.times(length));
    let by_head = weights.reshape(&[batch.clone(), kv_heads, beams.clone(), group, length.clone(), source.clone()]);
    let mean = by_head.reduce_mean(&[1, 3]).reshape(&[batch, beams.times(length), source]);
    (projected(read, w), present, mean)
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
        (Some(past), CacheLayout::InPlace | CacheLayout::Static(_)) => written(past, new, context),
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
fn written<'g>(past: KeyValue<'g>, new: KeyValue<'g>, context: &Context<'g>) -> KeyValue<'g> {
    let positions = context.tokens.positions;
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
