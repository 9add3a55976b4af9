//! Operators of ONNX Runtime's own domain, and `Attention`, which is standard from opset 23 on: what targets that run
//! in ONNX Runtime are lowered to.

use super::{Attribute, Blocks, DType, Data, Dim, Value};

/// A quantized matrix `[n, k]`.
#[derive(Clone, Copy)]
pub struct Packed<'g> {
    /// uint8 `[n, blocks, bytes of a block]`; for standard operators `[n, k]` in a dtype of 4 or 8 bits.
    pub numbers: Value<'g>,
    /// `[n, blocks]`, in the dtype of the matrix's operand; for standard operators also `[n]` or `[]`.
    pub scales: Value<'g>,
    /// uint8 `[n, bytes of a row's zero points]`; none for symmetric blocks.
    pub zero_points: Option<Value<'g>>,
    /// The format.
    pub blocks: Blocks,
    /// Rows and columns.
    pub shape: [usize; 2],
}

/// The heads of an attention operator.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub count: usize,
    /// Heads of keys and values.
    pub kv_count: usize,
    /// Width of a head.
    pub dim: usize,
    /// Factor of the scores.
    pub scale: f64,
    /// Soft-cap of the scores.
    pub cap: Option<f64>,
    /// Positions that a query of causal attention sees, its own included; none for all before it.
    pub window: Option<usize>,
}

/// What `GroupQueryAttention` takes besides queries, keys and values.
pub struct GroupQuery<'g> {
    /// Keys and values so far, `[rows, kv_count, capacity, dim]`.
    pub past: Option<[Value<'g>; 2]>,
    /// int32 `[rows]`, the position of each row's last token (`seqlens_k`).
    pub last: Value<'g>,
    /// int32 `[1]`, at least the tokens of the longest row (`total_sequence_length`).
    pub longest: Value<'g>,
    /// Cosines of the rotary angles, `[positions, dim / 2]`.
    pub cos: Value<'g>,
    /// Sines of the rotary angles, `[positions, dim / 2]`.
    pub sin: Value<'g>,
    /// The heads.
    pub heads: Heads,
    /// Length of the keys and values that are returned.
    pub present: Dim,
}

impl<'g> Value<'g> {
    /// `x / √(mean(x²) + ε) · factor`. If x is a sum, one operator computes the sum too.
    #[track_caller]
    pub fn simplified_layer_norm(self, factor: Value<'g>, eps: f64) -> Value<'g> {
        let epsilon = ("epsilon", Attribute::float(eps));
        let output = (self.dtype(), self.shape());
        let sum = self.graph.inputs_of(self, "Add").filter(|parts| parts.iter().all(|part| part.shape() == output.1));
        let Some(parts) = sum else {
            let attributes = [("axis", Attribute::Int(-1)), epsilon];
            return self.graph.node("SimplifiedLayerNormalization", &[self, factor], &attributes, &[output])[0];
        };
        let inputs = [parts[0], parts[1], factor];
        let op = "com.microsoft.SkipSimplifiedLayerNormalization";
        let outputs = self.graph.recompute(self, op, &inputs, &[epsilon], &[Some(output), None, None]);
        outputs[0].expect("the first output is asked for")
    }

    /// `x · wᵀ`: x `[…, k]`, w `[n, k]`. ONNX Runtime's name before `FusedMatMul`, which its optimizers also write for
    /// products of other ranks: under the old name a custom kernel gets the products with weights only.
    #[track_caller]
    pub fn transpose_matmul(self, weight: Value<'g>) -> Value<'g> {
        let (x, w) = (self.shape(), weight.shape());
        if x.len() < 2 || w.len() != 2 || x.last() != Some(&w[1]) || self.dtype() != weight.dtype() {
            self.graph.mistake(format!("TransposeMatMul of {} by {}", Dim::list(&x), Dim::list(&w)));
        }
        let output = (self.dtype(), [&x[..x.len() - 1], &w[..1]].concat());
        let attributes = [("transB", Attribute::Int(1))];
        self.graph.node("com.microsoft.TransposeMatMul", &[self, weight], &attributes, &[output])[0]
    }

    /// `x · wᵀ (+ b)` with a quantized weight: x `[…, k]`, b `[n]`.
    #[track_caller]
    pub fn matmul_nbits(self, weight: Packed<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        let [n, k] = weight.shape;
        let x = self.shape();
        if x.len() < 2 || x.last() != Some(&Dim::fixed(k)) || self.dtype() != weight.scales.dtype() {
            self.graph.mistake(format!("MatMulNBits of {} by [{n}, {k}]", Dim::list(&x)));
        }
        let number = |number: usize| Attribute::Int(number as i64);
        let attributes = [
            ("K", number(k)),
            ("N", number(n)),
            ("bits", Attribute::Int(weight.blocks.bits.into())),
            ("block_size", number(weight.blocks.size)),
            // int8 products, the fast path of ONNX Runtime's own kernel.
            ("accuracy_level", Attribute::Int(4)),
        ];
        let mut inputs = vec![Some(self), Some(weight.numbers), Some(weight.scales)];
        if weight.zero_points.is_some() || bias.is_some() {
            inputs.extend([weight.zero_points, None, bias]);
        }
        while matches!(inputs.last(), Some(None)) {
            inputs.pop();
        }
        let output = Some((self.dtype(), [&x[..x.len() - 1], &[Dim::fixed(n)]].concat()));
        let op = "com.microsoft.MatMulNBits";
        self.graph.node_with_options(op, &inputs, &attributes, &[output])[0].expect("asked for")
    }

    /// The rows `self`, int64 `[…]`, of a quantized matrix `[n, k]`: `[…, k]` in the dtype of its scales. The packed
    /// numbers are `[n, bytes of k]` here.
    #[track_caller]
    pub fn gather_packed(self, table: Packed<'g>) -> Value<'g> {
        let attributes = [
            ("bits", Attribute::Int(table.blocks.bits.into())),
            ("block_size", Attribute::Int(table.blocks.size as i64)),
            ("gather_axis", Attribute::Int(0)),
            ("quantize_axis", Attribute::Int(1)),
        ];
        let inputs: Vec<Value<'g>> = [table.numbers, self, table.scales].into_iter().chain(table.zero_points).collect();
        let shape = [self.shape(), vec![Dim::fixed(table.shape[1])]].concat();
        let op = "com.microsoft.GatherBlockQuantized";
        self.graph.node(op, &inputs, &attributes, &[(table.scales.dtype(), shape)])[0]
    }

    /// Rotary positions, half-split, of heads side by side `[rows, length, heads·dim]`. `tables` are cosines and sines,
    /// `[positions, dim / 2]`; `position_ids`, int64 `[rows, length]`, are the tokens' positions in them, from 0 on if
    /// none.
    #[track_caller]
    pub fn rotary_embedding(self, position_ids: Option<Value<'g>>, [cos, sin]: [Value<'g>; 2]) -> Value<'g> {
        // A single number is the position of the first token.
        let position_ids = position_ids.unwrap_or_else(|| self.graph.constant(DType::Int64, &[1], Data::Ints(vec![0])));
        let output = (self.dtype(), self.shape());
        self.graph.node("com.microsoft.RotaryEmbedding", &[self, position_ids, cos, sin], &[], &[output])[0]
    }

    /// Causal attention with rotary positions, of queries, keys and values side by side `[rows, length, (count +
    /// 2·kv_count)·dim]`. The new keys and values are written into the past in place if the present is given the same
    /// memory. Returns the attended values `[rows, length, count·dim]` and the present keys and values `[rows,
    /// kv_count, present, dim]`.
    #[track_caller]
    pub fn group_query_attention(self, with: GroupQuery<'g>) -> [Value<'g>; 3] {
        let GroupQuery { past, last, longest, cos, sin, heads, present } = with;
        let mut attributes = vec![
            ("num_heads", Attribute::Int(heads.count as i64)),
            ("kv_num_heads", Attribute::Int(heads.kv_count as i64)),
            ("scale", Attribute::float(heads.scale)),
            ("do_rotary", Attribute::Int(1)),
        ];
        attributes.extend(heads.cap.map(|cap| ("softcap", Attribute::float(cap))));
        attributes.extend(heads.window.map(|window| ("local_window_size", Attribute::Int(window as i64))));
        let [key, value] = past.map_or([None; 2], |past| past.map(Some));
        let inputs = [Some(self), None, None, key, value, Some(last), Some(longest), Some(cos), Some(sin)];
        let (rows, dtype) = (self.dim(0), self.dtype());
        let attended = vec![rows.clone(), self.dim(1), Dim::fixed(heads.count * heads.dim)];
        let cached = vec![rows, heads.kv_count.into(), present, heads.dim.into()];
        let outputs = [attended, cached.clone(), cached].map(|shape| Some((dtype, shape)));
        let op = "com.microsoft.GroupQueryAttention";
        let outputs = self.graph.node_with_options(op, &inputs, &attributes, &outputs);
        [0, 1, 2].map(|i| outputs[i].expect("asked for"))
    }

    /// `softmax(softcap(q·kᵀ·scale) + mask) · v`: queries `[batch, heads, queries, dim]`, keys and values `[batch,
    /// kv_heads, keys, dim]`. The mask, broadcast against `[batch, heads, queries, keys]`, is bool (false for −∞) or
    /// what is added to the scores.
    pub fn attention_4d(
        self,
        [key, value]: [Value<'g>; 2],
        mask: Value<'g>,
        scale: f64,
        cap: Option<f64>,
    ) -> Value<'g> {
        let attributes = score_attributes(scale, cap);
        let output = (self.dtype(), self.shape());
        self.graph.node("Attention", &[self, key, value, mask], &attributes, &[output])[0]
    }

    /// [`attention_4d`](Value::attention_4d) of heads side by side: queries `[batch, queries, count·dim]`, keys and
    /// values `[batch, keys, kv_count·dim]`. A window has to be in the mask.
    #[track_caller]
    pub fn attention_3d(self, [key, value]: [Value<'g>; 2], mask: Value<'g>, heads: Heads) -> Value<'g> {
        if self.dim(-1) != (heads.count * heads.dim).into() || key.dim(-1) != (heads.kv_count * heads.dim).into() {
            let (q, k) = (self.shape(), key.shape());
            self.graph.mistake(format!("Attention of {} over {}", Dim::list(&q), Dim::list(&k)));
        }
        let mut attributes = score_attributes(heads.scale, heads.cap);
        attributes.push(("q_num_heads", Attribute::Int(heads.count as i64)));
        attributes.push(("kv_num_heads", Attribute::Int(heads.kv_count as i64)));
        let output = (self.dtype(), self.shape());
        self.graph.node("Attention", &[self, key, value, mask], &attributes, &[output])[0]
    }
}

/// The attributes for the scores.
fn score_attributes(scale: f64, cap: Option<f64>) -> Vec<(&'static str, Attribute)> {
    let cap = cap.map(|cap| ("softcap", Attribute::float(cap)));
    [("scale", Attribute::float(scale))].into_iter().chain(cap).collect()
}
