//! `Limits`: how much one call may run at a time, and splitting larger batches into pieces that run one after the
//! other.
//!
//! # Design
//! A piece is consecutive rows, so that results are in order and tokens can be shown while others still wait. A source
//! that is beyond a limit by itself runs alone: a limit decides what runs side by side, never what is answered.

use std::ops::Range;

use t5gemma_graphs::facts::StackFacts;
use t5gemma_graphs::interface::DType;

use crate::batch::Batch;

/// Limits on how much of one call runs at a time. The rows of a larger call run in pieces, one after the other, with
/// the same result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Number of sources; unlimited by default.
    pub max_sources: usize,
    /// Number of source tokens including padding; unlimited by default.
    pub max_tokens: usize,
    /// Bytes of keys, values, logits, hidden states and scratch memory, estimated from shapes. By default 4 GiB on the
    /// CPU and unlimited on a device, which reports itself when its memory is exhausted.
    pub max_bytes: Option<usize>,
}

/// The default of [`Limits::max_bytes`] on the CPU.
const CPU_BYTES: usize = 4 << 30;

impl Limits {
    /// No limits: every call runs in one piece.
    pub const NONE: Limits = Limits { max_sources: usize::MAX, max_tokens: usize::MAX, max_bytes: Some(usize::MAX) };

    /// Sets [`Limits::max_sources`].
    pub const fn max_sources(self, max_sources: usize) -> Limits {
        Limits { max_sources, ..self }
    }

    /// Sets [`Limits::max_tokens`].
    pub const fn max_tokens(self, max_tokens: usize) -> Limits {
        Limits { max_tokens, ..self }
    }

    /// Sets [`Limits::max_bytes`].
    pub const fn max_bytes(self, max_bytes: usize) -> Limits {
        Limits { max_bytes: Some(max_bytes), ..self }
    }

    /// The limits with the default number of bytes filled in.
    pub(crate) fn resolved(self, on_cpu: bool) -> Limits {
        let default = if on_cpu { CPU_BYTES } else { usize::MAX };
        self.max_bytes(self.max_bytes.unwrap_or(default))
    }

    /// Whether this number of bytes is within the limits.
    pub(crate) fn holds(&self, bytes: usize) -> bool {
        self.max_bytes.is_none_or(|most| bytes <= most)
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_sources: usize::MAX, max_tokens: usize::MAX, max_bytes: None }
    }
}

/// Scratch memory of the layers of an encoder or a decoder, hidden states included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scratch {
    /// Bytes for each token.
    per_token: usize,
    /// Bytes for each token and each token that it attends to.
    per_pair: usize,
}

impl Scratch {
    pub fn of(stack: &StackFacts, dtype: DType) -> Scratch {
        let per_token = (2 * stack.intermediate_size + 5 * stack.hidden_size) * dtype.size();
        Scratch { per_token, per_pair: stack.num_attention_heads * (DType::Float32.size() + dtype.size()) }
    }

    /// Bytes for `rows` rows of `tokens` tokens, each of which attends to `attended` tokens.
    pub fn bytes(self, rows: usize, tokens: usize, attended: usize) -> usize {
        let per_token = attended.saturating_mul(self.per_pair).saturating_add(self.per_token);
        rows.saturating_mul(tokens).saturating_mul(per_token)
    }
}

/// The pieces in which an encoder runs a batch.
pub(crate) fn pieces_to_encode(batch: &Batch, stack: &StackFacts, dtype: DType, limits: &Limits) -> Vec<Range<usize>> {
    let scratch = Scratch::of(stack, dtype);
    pieces(batch, limits, |rows, longest| limits.holds(scratch.bytes(rows.len(), longest, longest)))
}

/// Splits a batch into pieces of consecutive rows, each as large as the limits allow and `fits` accepts, which is given
/// a piece and the length of its longest row.
pub(crate) fn pieces(batch: &Batch, limits: &Limits, fits: impl Fn(Range<usize>, usize) -> bool) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut longest = 0;
    for row in 0..batch.rows() {
        let own = batch.source(row).len();
        match pieces.last_mut() {
            Some(piece)
                if piece.len() < limits.max_sources
                    && (piece.len() + 1).saturating_mul(own.max(longest)) <= limits.max_tokens
                    && fits(piece.start..row + 1, own.max(longest)) =>
            {
                piece.end = row + 1;
                longest = own.max(longest);
            }
            _ => {
                pieces.push(row..row + 1);
                longest = own;
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_large_as_the_limits_allow() {
        // name, lengths of the sources, max sources, max tokens, most rows times length of a piece, the pieces
        type Case = (&'static str, &'static [usize], usize, usize, usize, &'static [(usize, usize)]);
        const ANY: usize = usize::MAX;
        let cases: &[Case] = &[
            ("no limit", &[3, 1, 2], ANY, ANY, ANY, &[(0, 3)]),
            ("one source", &[3, 1, 2], 1, ANY, ANY, &[(0, 1), (1, 2), (2, 3)]),
            ("two sources", &[3, 1, 2], 2, ANY, ANY, &[(0, 2), (2, 3)]),
            ("no source is one", &[3, 1], 0, ANY, ANY, &[(0, 1), (1, 2)]),
            ("tokens with padding", &[1, 1, 4, 1], ANY, 4, ANY, &[(0, 2), (2, 3), (3, 4)]),
            ("a source that is too long runs alone", &[1, 9, 1, 1], ANY, 4, ANY, &[(0, 1), (1, 2), (2, 4)]),
            ("bytes", &[2, 2, 2, 2, 2], ANY, ANY, 4, &[(0, 2), (2, 4), (4, 5)]),
            ("a source that takes too many bytes runs alone", &[9, 1, 1], ANY, ANY, 4, &[(0, 1), (1, 3)]),
        ];
        for &(name, lengths, max_sources, max_tokens, most, expected) in cases {
            let sources: Vec<Vec<i64>> = lengths.iter().map(|&length| vec![5; length]).collect();
            let batch = Batch::padded(&sources, 0).expect("well-formed");
            let limits = Limits { max_sources, max_tokens, max_bytes: None };
            let found = pieces(&batch, &limits, |rows, length| rows.len() * length <= most);
            let found: Vec<_> = found.into_iter().map(|rows| (rows.start, rows.end)).collect();
            assert_eq!(found, expected, "{name}");
        }
    }
}
