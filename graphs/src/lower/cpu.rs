//! For ONNX Runtime on a CPU, where a decoder step is bound by the bytes of the weights and then by the number of operators:
//! one operator for a norm and the sum before it, one for the whole of self-attention with rotary positions and a cache that
//! is written in place, one for cross-attention.

use super::{Attention, Lowering, Matrix};
use crate::attention::{KeyValue, Tokens, angles, rotary_tables};
use crate::config::Side;
use crate::decoder::Context;
use crate::interface::{CacheLayout, PRESENT};
use crate::nn::{Weights, linear, stacked};
use crate::onnx::{DType, Data, Dim, Heads, Value};

/// `GroupQueryAttention` rotates heads of multiples of this width only; other models keep a growing cache.
pub const HEAD_DIM: usize = 16;

pub struct Cpu;

impl Lowering for Cpu {
    fn linear<'g>(&self, x: Value<'g>, weight: Matrix<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        match (weight, bias) {
            (Matrix::Packed(weight), bias) => x.matmul_nbits(weight, bias),
            (Matrix::Plain(weight), None) => x.transpose_matmul(weight),
            (Matrix::Plain(weight), Some(bias)) => x.transpose_matmul(weight) + bias,
        }
    }

    /// What can be done to the few numbers of x is not done to the very many scores.
    fn logits<'g>(&self, x: Value<'g>, table: Matrix<'g>, cap: Option<f64>, [rows, positions]: [Dim; 2]) -> Value<'g> {
        let x = x.reshape(&[rows, positions, x.dim(-1)]);
        match cap {
            None => self.linear(x, table, None).cast(DType::Float32),
            Some(cap) => self.linear(x * (1.0 / cap), table, None).cast(DType::Float32).tanh() * cap,
        }
    }

    fn rms_norm<'g>(&self, x: Value<'g>, factor: Value<'g>, eps: f64) -> Value<'g> {
        x.simplified_layer_norm(factor, eps)
    }

    fn rotary<'g>(&self, x: Value<'g>, tables: [Value<'g>; 2]) -> Value<'g> {
        let [rows, length, heads, head_dim] = [0, 1, 2, 3].map(|axis| x.dim(axis));
        let flat = x.reshape(&[rows, length, heads.times(&head_dim)]);
        flat.rotary_embedding(None, tables.map(|table| table.squeeze(1))).reshape(&x.shape())
    }

    /// Heads stay side by side, as they come out of their products.
    fn bidirectional<'g>(&self, x: Value<'g>, tokens: &Tokens<'g>, visible: Value<'g>, w: &Weights<'g>) -> Value<'g> {
        let (side, length) = (w.side, &tokens.length);
        let project = |name: &str, count: usize| {
            let projected = linear(x, [side.hidden_size, count * side.head_dim], side.attention_bias, &w.at(name));
            projected.reshape(&[tokens.rows.clone(), length.clone(), (count * side.head_dim).into()])
        };
        let heads = heads(side, None);
        let [query, key, value] = [("q_proj", heads.count), ("k_proj", heads.kv_count), ("v_proj", heads.kv_count)]
            .map(|(name, count)| project(name, count));
        let (places, positions) = match tokens.positions.shape().len() {
            1 => (None, tokens.positions),
            _ => (Some(tokens.positions), w.graph.range(w.graph.size(&0.into()), w.graph.size(length), length)),
        };
        let angles = angles(positions, &[1], w); // [length, head_dim / 2]
        let tables = [angles.cos(), angles.sin()].map(|table| table.cast(x.dtype()));
        let [query, key] = [query, key].map(|x| x.rotary_embedding(places, tables));
        let attended = query.attention_of_rows([key, value], by_row(visible, &query.dim(1)), heads);
        w.output_projection(attended.reshape(&[tokens.rows.times(length), attended.dim(-1)]))
    }

    fn causal<'g>(
        &self,
        x: Value<'g>,
        context: &Context<'g>,
        past: Option<KeyValue<'g>>,
        w: &Weights<'g>,
    ) -> (Value<'g>, KeyValue<'g>) {
        if context.cache == CacheLayout::Growing {
            return crate::attention::growing(x, context, past, w);
        }
        let positions = &context.tokens.positions;
        let rows = std::slice::from_ref(&context.tokens.rows);
        let last = match past {
            None => positions.last(0).cast(DType::Int32).expand(rows),
            Some(_) => positions.last(1).cast(DType::Int32).reshape(rows),
        };
        let most = last.greatest(0) + w.graph.constant(DType::Int32, &[1], Data::Ints(vec![1]));
        group_query(x, context, past, [last, most], w)
    }

    fn attention<'g>(&self, a: Attention<'g>) -> Value<'g> {
        let query = a.query.transpose(&[0, 2, 1, 3]); // [batch, heads, queries, head_dim]
        let visible = by_row(a.visible, &query.dim(2));
        query.attention([a.key_value.key, a.key_value.value], visible, a.scale, a.cap).transpose(&[0, 2, 1, 3])
    }
}

/// What is visible to each of so many queries, of rank 4 at most.
fn by_row<'g>(visible: Value<'g>, queries: &Dim) -> Value<'g> {
    let visible = if visible.shape().len() == 5 { visible.squeeze(1) } else { visible };
    let mut shape = visible.shape();
    let at = shape.len() - 2;
    shape[at] = queries.clone();
    visible.expand(&shape)
}

/// The heads of this side.
fn heads(side: &Side, window: Option<usize>) -> Heads {
    Heads {
        count: side.num_attention_heads,
        kv_count: side.num_key_value_heads,
        dim: side.head_dim,
        scale: side.query_pre_attn_scalar.powf(-0.5),
        cap: side.attn_logit_softcapping,
        window,
    }
}

/// Self-attention by one operator, over a cache that is written in place: x and what is returned as in
/// [`crate::attention::causal`]. `last` int32 `[rows]` is the place of each row's last token in the cache, `most` int32 `[1]`
/// no less than the tokens of the longest row.
pub fn group_query<'g>(
    x: Value<'g>,
    context: &Context<'g>,
    past: Option<KeyValue<'g>>,
    [last, most]: [Value<'g>; 2],
    w: &Weights<'g>,
) -> (Value<'g>, KeyValue<'g>) {
    let (tokens, side) = (&context.tokens, w.side);
    let [q, kv] = [side.num_attention_heads, side.num_key_value_heads].map(|count| count * side.head_dim);
    let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
    let projected = stacked(x, side.hidden_size, ("qkv_proj", &parts), side.attention_bias, w);
    let packed = projected.reshape(&[tokens.rows.clone(), tokens.length.clone(), (q + 2 * kv).into()]);
    let heads = heads(side, context.kind.window());
    let tables = rotary_tables(w).map(|table| table.cast(projected.dtype()));
    let present = if past.is_some() { Dim::symbol(PRESENT) } else { tokens.length.clone() };
    let past = past.map(|past| [past.key, past.value]);
    let [attended, key, value] = packed.group_query_attention(past, [last, most], tables, heads, &present);
    let attended = attended.reshape(&[tokens.rows.times(&tokens.length), q.into()]);
    (w.output_projection(attended), KeyValue { key, value })
}
