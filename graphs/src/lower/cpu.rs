//! For ONNX Runtime on a CPU, where a decoder step is bound by the bytes of the weights and then by the number of operators:
//! one operator for a norm and the sum before it, one for the whole of self-attention with rotary positions and a cache that
//! is written in place, one for cross-attention.

use super::{Attention, Lowering, Matrix};
use crate::attention::{KeyValue, rotary_tables};
use crate::decoder::Context;
use crate::interface::{CacheLayout, PRESENT};
use crate::nn::{Weights, stacked};
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
        flat.rotary_embedding(tables.map(|table| table.squeeze(1))).reshape(&x.shape())
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
        let visible = if a.visible.shape().len() == 5 { a.visible.squeeze(1) } else { a.visible };
        let query = a.query.transpose(&[0, 2, 1, 3]); // [batch, heads, queries, head_dim]
        let mut shape = visible.shape();
        shape[visible.shape().len() - 2] = query.dim(2);
        let visible = visible.expand(&shape);
        query.attention([a.key_value.key, a.key_value.value], visible, a.scale, a.cap).transpose(&[0, 2, 1, 3])
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
    let heads = Heads {
        count: side.num_attention_heads,
        kv_count: side.num_key_value_heads,
        dim: side.head_dim,
        scale: side.query_pre_attn_scalar.powf(-0.5),
        cap: side.attn_logit_softcapping,
        window: context.kind.window(),
    };
    let tables = rotary_tables(w).map(|table| table.cast(projected.dtype()));
    let present = if past.is_some() { Dim::symbol(PRESENT) } else { tokens.length.clone() };
    let past = past.map(|past| [past.key, past.value]);
    let [attended, key, value] = packed.group_query_attention(past, [last, most], tables, heads, &present);
    let attended = attended.reshape(&[tokens.rows.times(&tokens.length), q.into()]);
    (w.output_projection(attended), KeyValue { key, value })
}
