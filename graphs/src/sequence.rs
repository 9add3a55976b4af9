//! The inputs of attention besides the residual stream: tokens with their positions, keys and values, and the context
//! that the layers of a decoder share.

use crate::interface::CacheLayout;
use crate::onnx::{Dim, Graph, Value};

/// Keys and values of one layer, `[rows, kv_heads, length, head_dim]` each.
#[derive(Clone, Copy)]
pub struct KeyValue<'g> {
    pub key: Value<'g>,
    pub value: Value<'g>,
}

/// The tokens that a graph runs on, `rows × length` of them, and their positions in their sequences.
#[derive(Clone)]
pub struct Tokens<'g> {
    pub rows: Dim,
    pub length: Dim,
    /// int64 `[length]`; `[rows, length]` where a cache is written in place and where sources lie side by side.
    pub positions: Value<'g>,
}

impl<'g> Tokens<'g> {
    /// The tokens of `[rows, length]` ids, at positions from 0 on.
    pub fn from_start(graph: &'g Graph, ids: Value<'g>) -> Tokens<'g> {
        let (rows, length) = (ids.dim(0), ids.dim(1));
        let (start, end) = (graph.size(&Dim::fixed(0)), graph.size(&length));
        let positions = graph.range(start, end, &length);
        Tokens { rows, length, positions }
    }

    /// The tokens of `[rows, length]` ids that follow `past` others.
    pub fn after(graph: &'g Graph, past: &Dim, ids: Value<'g>) -> Tokens<'g> {
        let (rows, length) = (ids.dim(0), ids.dim(1));
        let (start, end) = (graph.size(past), graph.size(past) + graph.size(&length));
        let positions = graph.range(start, end, &length);
        Tokens { rows, length, positions }
    }

    /// The tokens of several sources side by side in a row, and which of them see each other, bool `[rows, 1, 1,
    /// length, length]`. `mask`, int64 `[rows, length]`, has the number of a token's source, from 1 on, or 0 for
    /// padding, which sees the first source, as in a row with one source.
    pub fn side_by_side(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> (Tokens<'g>, Value<'g>) {
        let tokens = Tokens::from_start(graph, ids);
        let visible = mask.clamp_min(1.0).unsqueeze(&[2]).equal(mask.unsqueeze(&[1])); // [rows, length, length]
        // Each source has the positions that it would have alone, so that its states are the same numbers.
        let positions = (tokens.positions.unsqueeze(&[0]) - visible.first_true()).clamp_min(0.0);
        (Tokens { positions, ..tokens }, visible.unsqueeze(&[1, 2]))
    }
}

/// The inputs that the layers of a decoder share.
pub struct Context<'g> {
    /// The target tokens.
    pub tokens: Tokens<'g>,
    /// Which source tokens they see: bool `[batch, 1, 1, 1, source]`.
    pub source_mask: Value<'g>,
    /// Which target tokens are not padding, bool `[batch, 1, 1, 1, target]`; none if all of them.
    pub target_mask: Option<Value<'g>>,
    /// How their keys and values pass to the next step.
    pub cache: CacheLayout,
}
