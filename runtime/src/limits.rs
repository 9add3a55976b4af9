//! `Limits`: what one call may run side by side, and the consecutive rows of a batch that are within them. Rows of a larger call
//! run in pieces, one after the other.
//!
//! # Design
//! A piece is consecutive rows, so that answers are in order and tokens can be shown while others still wait. A source that
//! is beyond a limit by itself runs alone: a limit decides what runs side by side, never what is answered.

use std::ops::Range;

use t5gemma_graphs::config::Stack;
use t5gemma_graphs::interface::DType;

use crate::batch::Batch;

/// What may run side by side in one call. The rows of a call that is larger run in pieces, one after the other, and its
/// answer is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sources at most; any number by default.
    pub max_sources: usize,
    /// Source tokens at most, each source counted with the length of the longest; any number by default.
    pub max_tokens: usize,
    /// Bytes of keys, values, logits, hidden states and scratch memory at most, estimated from shapes. By default 4 GiB where the
    /// processor computes, and no limit on a device, which refuses by itself what it has no memory for.
    pub max_bytes: Option<usize>,
}

impl Limits {
    /// Whole calls, whatever they take.
    pub const NONE: Limits = Limits { max_sources: usize::MAX, max_tokens: usize::MAX, max_bytes: Some(usize::MAX) };

    pub(crate) fn bytes(&self, on_cpu: bool) -> usize {
        self.max_bytes.unwrap_or(if on_cpu { 4 << 30 } else { usize::MAX })
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_sources: usize::MAX, max_tokens: usize::MAX, max_bytes: None }
    }
}

/// What the layers of an encoder or a decoder take while they run, hidden states included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scratch {
    of_token: usize,
    /// Of a token and one that it attends to.
    of_pair: usize,
}

impl Scratch {
    pub(crate) fn of(stack: &Stack, dtype: DType) -> Scratch {
        let of_token = (2 * stack.intermediate_size + 5 * stack.hidden_size) * dtype.size();
        Scratch { of_token, of_pair: stack.num_attention_heads * (DType::Float32.size() + dtype.size()) }
    }

    /// Bytes for rows of so many tokens, each of which attends to so many.
    pub(crate) fn bytes(self, rows: usize, tokens: usize, attended: usize) -> usize {
        let of_token = attended.saturating_mul(self.of_pair).saturating_add(self.of_token);
        rows.saturating_mul(tokens).saturating_mul(of_token)
    }
}

/// The pieces in which an encoder takes a batch.
pub(crate) fn pieces_to_encode(
    batch: &Batch,
    (stack, dtype): (&Stack, DType),
    limits: &Limits,
    on_cpu: bool,
) -> Vec<Range<usize>> {
    let (scratch, most) = (Scratch::of(stack, dtype), limits.bytes(on_cpu));
    pieces(batch, limits, |rows, length| scratch.bytes(rows.len(), length, length) <= most)
}

/// Consecutive rows of a batch, as many in each piece as are within the limits and `fit`, of which the length of the longest
/// is known.
pub(crate) fn pieces(batch: &Batch, limits: &Limits, fit: impl Fn(Range<usize>, usize) -> bool) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut longest = 0;
    for row in 0..batch.rows() {
        let own = batch.source(row).len();
        match pieces.last_mut() {
            Some(piece)
                if piece.len() < limits.max_sources
                    && (piece.len() + 1).saturating_mul(own.max(longest)) <= limits.max_tokens
                    && fit(piece.start..row + 1, own.max(longest)) =>
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
    fn pieces_hold_as_many_rows_as_the_limits_let() {
        // name, lengths of the sources, sources, tokens, what a piece may have of rows times length, the pieces
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
