//! The inputs of attention besides the residual stream: tokens with their positions, keys and values, and the context
//! that the layers of a decoder share.

use crate::config::MOST_SIZE;
use crate::interface::CacheLayout;
use crate::onnx::{Dim, Graph, Value};

/// Keys and values of one layer, `[rows, kv_heads, length, head_dim]` each.
#[derive(Clone, Copy)]
pub struct KeyValue<'g> {
    pub key: Value<'g>,
    pub value: Value<'g>,
}

/// What a decoder's layer attends to: the target so far (none at the first step), and the source.
#[derive(Clone, Copy)]
pub struct Memory<'g> {
    pub past: Option<KeyValue<'g>>,
    pub source: KeyValue<'g>,
}

/// The tokens that a graph runs on, `rows × length` of them, and their positions in their sequences.
#[derive(Clone)]
pub struct Tokens<'g> {
    pub rows: Dim,
    pub length: Dim,
    /// int64 `[length]`; `[rows, length]` where a cache is written in place and where sources lie side by side.
    pub positions: Value<'g>,
    /// What rotary angles are computed from: the positions, or float32 `[rows, length]`.
    pub rotary: Value<'g>,
}

impl<'g> Tokens<'g> {
    /// The tokens of `[rows, length]` ids, at positions from 0 on.
    pub fn from_start(graph: &'g Graph, ids: Value<'g>) -> Tokens<'g> {
        let (rows, length) = (ids.dim(0), ids.dim(1));
        let (start, end) = (graph.size(&Dim::fixed(0)), graph.size(&length));
        let positions = graph.range(start, end, &length);
        Tokens { rows, length, positions, rotary: positions }
    }

    /// The tokens of `[rows, length]` ids that follow `past` others.
    pub fn after(graph: &'g Graph, past: &Dim, ids: Value<'g>) -> Tokens<'g> {
        let (rows, length) = (ids.dim(0), ids.dim(1));
        let (start, end) = (graph.size(past), graph.size(past) + graph.size(&length));
        let positions = graph.range(start, end, &length);
        Tokens { rows, length, positions, rotary: positions }
    }

    /// The tokens of several sources side by side in a row, and which of them see each other, bool `[rows, 1, 1,
    /// length, length]`. `mask`, int64 `[rows, length]`, has the number of a token's source, from 1 on, or 0 for
    /// padding, which sees the first source, as in a row with one source.
    pub fn side_by_side(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> (Tokens<'g>, Value<'g>) {
        let tokens = Tokens::from_start(graph, ids);
        let visible = mask.clamp_min(1.0).unsqueeze(&[2]).equal(mask.unsqueeze(&[1])); // [rows, length, length]
        // Each source has the positions that it would have alone, so that its states are the same numbers.
        let positions = (tokens.positions.unsqueeze(&[0]) - visible.first_true()).clamp_min(0.0);
        (Tokens { positions, rotary: positions, ..tokens }, visible.unsqueeze(&[1, 2]))
    }

    /// The tokens of [`Tokens::side_by_side`], without a tensor of pairs of them.
    pub fn in_sources(graph: &'g Graph, ids: Value<'g>, mask: Value<'g>) -> Tokens<'g> {
        let tokens = Tokens::from_start(graph, ids);
        let source = mask.clamp_min(1.0) - 1.0;
        let place = tokens.positions.unsqueeze(&[0]).expand(&mask.shape());
        let nowhere = mask * 0.0 + MOST_SIZE as f64;
        // Padding is no place of the first source.
        let of_tokens = place.where_else(mask.greater_than(0.0), nowhere);
        let firsts = nowhere.scatter_min(source, of_tokens, 1); // of each source
        let positions = (place - firsts.gather_elements(source, 1)).clamp_min(0.0);
        Tokens { positions, rotary: positions, ..tokens }
    }

    /// The same tokens, rotated by the float positions `[rows, length]` if there are any.
    pub fn rotated_by(self, positions: Option<Value<'g>>) -> Tokens<'g> {
        Tokens { rotary: positions.unwrap_or(self.rotary), ..self }
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
    /// What the queries of cross-attention are rotated by, as [`Tokens::rotary`]; none if they are not.
    pub cross_rotary: Option<Value<'g>>,
    /// How their keys and values pass to the next step.
    pub cache: CacheLayout,
}
