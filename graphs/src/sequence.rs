//! What attention works on besides the residual stream: tokens with their positions, the keys and values of a layer, and what the
//! layers of a decoder share.

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

    /// Tokens of several sources side by side in a row: `mask`, int64 `[rows, length]`, has the number of a token's source, from 1
    /// on, or 0 for padding. Also which tokens see each other, bool `[rows, 1, 1, length, length]`; padding sees the first source, as
    /// it does where a row is one source.
    pub fn side_by_side(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> (Tokens<'g>, Value<'g>) {
        let tokens = Tokens::from_start(graph, ids);
        let visible = mask.at_least(1.0).unsqueeze(&[2]).equals(mask.unsqueeze(&[1])); // [rows, length, length]
        // Every source has the positions that it has alone, so that its states are the same numbers.
        let positions = (tokens.positions.unsqueeze(&[0]) - visible.first_true()).at_least(0.0);
        (Tokens { positions, ..tokens }, visible.unsqueeze(&[1, 2]))
    }
}

/// What the layers of a decoder share in a run.
pub struct Context<'g> {
    /// The target tokens.
    pub tokens: Tokens<'g>,
    /// Which source tokens they see: bool `[batch, 1, 1, 1, source]`.
    pub source_mask: Value<'g>,
    /// Which target tokens are seen at all, bool `[batch, 1, 1, 1, target]`; none if there is no padding among them.
    pub target_mask: Option<Value<'g>>,
    /// How their keys and values pass to the next step.
    pub cache: CacheLayout,
}
