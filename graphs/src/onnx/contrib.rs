//! Operators of ONNX Runtime's own domain, and those of the standard one that only its newer versions have: what the
//! targets that are written for ONNX Runtime are lowered to.

use super::graph::{Attribute, Value};
use super::{Blocks, DType, Data, Dim};

/// A matrix `[n, k]` packed in blocks.
#[derive(Clone, Copy)]
pub struct Packed<'g> {
    /// uint8 `[n, blocks, bytes of a block]`; for standard operators `[n, k]` of a type of few bits.
    pub numbers: Value<'g>,
    /// `[n, blocks]`, in the type of what is multiplied with the matrix; for standard operators also `[n]` or `[]`.
    pub scales: Value<'g>,
    /// uint8 `[n, bytes of a row's zero points]`, for blocks that are not symmetric.
    pub zero_points: Option<Value<'g>>,
    /// How it is packed.
    pub blocks: Blocks,
    /// Rows and columns.
    pub shape: [usize; 2],
}

/// What `GroupQueryAttention` is told of its heads.
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
    /// Positions that a query sees, itself included; all before it if none.
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
    /// `x / √(mean(x²) + ε) · factor`, of a sum also the sum itself from one operator.
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

    /// `x · wᵀ`: x `[…, k]`, w `[n, k]`. The name that ONNX Runtime had for it before `FusedMatMul`, which its optimizers
    /// write for products of other ranks, too: under this one a runtime can have a kernel of its own for weights alone.
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

    /// `x · wᵀ (+ b)` with a packed weight: x `[…, k]`, b `[n]`.
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
            // Products of int8 with int8: the fast way where this machine has no better one.
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

    /// The rows of a packed matrix `[n, k]` that `ids` name, `[…ids, k]` in the type of its scales. Its numbers here are `[n, bytes of k]`.
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

    /// Heads side by side, `[rows, length, heads·dim]`, turned by the angles of which `tables` `[positions, dim / 2]` are cosines
    /// and sines, the halves of each head against each other. `places`, int64 `[rows, length]`, are those of the tokens in the
    /// tables; without them the first of a row is at 0.
    #[track_caller]
    pub fn rotary_embedding(self, places: Option<Value<'g>>, tables: [Value<'g>; 2]) -> Value<'g> {
        // One number is the place of the first token.
        let places = places.unwrap_or_else(|| self.graph.constant(DType::Int64, &[1], Data::Ints(vec![0])));
        let output = (self.dtype(), self.shape());
        self.graph.node("com.microsoft.RotaryEmbedding", &[self, places, tables[0], tables[1]], &[], &[output])[0]
    }

    /// Causal attention of queries, keys and values that lie side by side, `[rows, length, (count + 2·kv_count)·dim]`, with
    /// rotary positions, over a past that it is written into in place if the present is given the same memory. Returns the
    /// attended values `[rows, length, count·dim]` and the present keys and values `[rows, kv_count, present, dim]`.
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

    /// `softmax(softcap(q·kᵀ·scale) + (visible ? 0 : −∞)) · v`: queries `[batch, heads, queries, dim]`, keys and values
    /// `[batch, kv_heads, keys, dim]`, visible bool, or what is added to the scores, broadcast against
    /// `[batch, heads, queries, keys]`.
    pub fn attention(
        self,
        [key, value]: [Value<'g>; 2],
        visible: Value<'g>,
        scale: f64,
        cap: Option<f64>,
    ) -> Value<'g> {
        let attributes = scores(scale, cap);
        let output = (self.dtype(), self.shape());
        self.graph.node("Attention", &[self, key, value, visible], &attributes, &[output])[0]
    }

    /// The same of heads side by side, in `heads.kv_count` of keys and values: queries `[batch, queries, count·dim]`, keys and
    /// values `[batch, keys, kv_count·dim]`. A window is what `visible` says.
    #[track_caller]
    pub fn attention_of_rows(self, [key, value]: [Value<'g>; 2], visible: Value<'g>, heads: Heads) -> Value<'g> {
        if self.dim(-1) != (heads.count * heads.dim).into() || key.dim(-1) != (heads.kv_count * heads.dim).into() {
            let (q, k) = (self.shape(), key.shape());
            self.graph.mistake(format!("Attention of {} over {}", Dim::list(&q), Dim::list(&k)));
        }
        let mut attributes = scores(heads.scale, heads.cap);
        attributes.push(("q_num_heads", Attribute::Int(heads.count as i64)));
        attributes.push(("kv_num_heads", Attribute::Int(heads.kv_count as i64)));
        let output = (self.dtype(), self.shape());
        self.graph.node("Attention", &[self, key, value, visible], &attributes, &[output])[0]
    }
}

/// The attributes that say what scores are.
fn scores(scale: f64, cap: Option<f64>) -> Vec<(&'static str, Attribute)> {
    let cap = cap.map(|cap| ("softcap", Attribute::float(cap)));
    [("scale", Attribute::float(scale))].into_iter().chain(cap).collect()
}
