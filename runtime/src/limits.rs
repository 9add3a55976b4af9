//! `Limits`: how much one call may run at a time, and splitting larger batches into pieces that run one after the
//! other; and the refusal of sources that this machine has no memory for.
//!
//! # Design
//! A piece is consecutive rows, so that results are in order and tokens can be shown while others still wait. A source
//! that is beyond a limit by itself runs alone: a limit decides what runs side by side, never what is answered.

use std::ops::Range;

use sysinfo::System;
use t5gemma_graphs::Target;
use t5gemma_graphs::facts::{StackFacts, VisionFacts};
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::manifest::{EncoderWindow, Manifest};

use crate::batch::Batch;
use crate::error::Error;

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
    /// Bytes of hidden states, keys, values and scratch memory, estimated from shapes, beyond which a source is refused
    /// before anything is computed. By default the memory of this machine, or of the control group of this process, on
    /// the CPU, and unlimited on a device.
    pub max_source_bytes: Option<usize>,
}

/// The default of [`Limits::max_bytes`] on the CPU.
const CPU_BYTES: usize = 4 << 30;

impl Limits {
    /// No limits: every call runs in one piece.
    pub const NONE: Limits = Limits {
        max_sources: usize::MAX,
        max_tokens: usize::MAX,
        max_bytes: Some(usize::MAX),
        max_source_bytes: Some(usize::MAX),
    };

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

    /// Sets [`Limits::max_source_bytes`].
    pub const fn max_source_bytes(self, max_source_bytes: usize) -> Limits {
        Limits { max_source_bytes: Some(max_source_bytes), ..self }
    }

    /// The limits with the default numbers of bytes filled in.
    pub(crate) fn resolved(self, on_cpu: bool) -> Limits {
        let default = if on_cpu { CPU_BYTES } else { usize::MAX };
        let of_source = || if on_cpu { machine_bytes() } else { usize::MAX };
        self.max_bytes(self.max_bytes.unwrap_or(default))
            .max_source_bytes(self.max_source_bytes.unwrap_or_else(of_source))
    }

    /// Checks that there is memory for a source of this many tokens.
    pub(crate) fn check_source(&self, manifest: &Manifest, tokens: usize) -> Result<(), Error> {
        let most = self.max_source_bytes.unwrap_or(usize::MAX);
        let scratch = Scratch::of_encoder(manifest);
        let bytes = |tokens: usize| scratch.bytes(1, tokens, tokens);
        if bytes(tokens) <= most {
            return Ok(());
        }
        // The longest that fits.
        let (mut fits, mut exceeds) = (0, tokens);
        while exceeds - fits > 1 {
            let middle = fits + (exceeds - fits) / 2;
            if bytes(middle) <= most { fits = middle } else { exceeds = middle }
        }
        let gib = |bytes: usize| bytes as f64 / (1_u64 << 30) as f64;
        let expected = format!("at most {fits} tokens a row, which need about {:.1} GiB of memory", gib(most));
        Err(Error::input(
            "input_ids",
            expected,
            format!("{tokens} tokens, which need about {:.1} GiB", gib(bytes(tokens))),
        ))
    }

    /// Whether this number of bytes is within the limits.
    pub(crate) fn holds(&self, bytes: usize) -> bool {
        self.max_bytes.is_none_or(|most| bytes <= most)
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_sources: usize::MAX, max_tokens: usize::MAX, max_bytes: None, max_source_bytes: None }
    }
}

/// The memory of this machine, or of this process's control group.
fn machine_bytes() -> usize {
    let mut system = System::new();
    system.refresh_memory();
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory);
    let bytes = system.total_memory().min(group);
    // Where it is not known, nothing is refused.
    if bytes == 0 { usize::MAX } else { usize::try_from(bytes).unwrap_or(usize::MAX) }
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
    pub fn of_encoder(manifest: &Manifest) -> Scratch {
        let stack = &manifest.facts.encoder;
        let scratch = Scratch::of(stack, manifest.dtype);
        let of_source = 2 * manifest.facts.decoder.num_hidden_layers * stack.num_key_value_heads * stack.head_dim;
        let per_token = scratch.per_token + of_source * manifest.dtype.size();
        let per_pair = match (manifest.target == Target::Cpu.name(), manifest.encoder_window) {
            // Windows over the numbers of sources, without a mask.
            (true, EncoderWindow::Total) => 0,
            // Two masks of bytes, and no scores.
            (true, _) => 2,
            (false, _) => scratch.per_pair,
        };
        Scratch { per_token, per_pair }
    }

    /// Of the vision tower, whose tokens are patches.
    pub fn of_tower(vision: &VisionFacts, manifest: &Manifest) -> Scratch {
        let size = manifest.dtype.size();
        let per_token = (2 * vision.intermediate_size + 5 * vision.hidden_size) * size;
        let per_pair = match manifest.target == Target::Cpu.name() {
            // Two masks of bytes, and no scores.
            true => 2,
            false => vision.num_attention_heads * (DType::Float32.size() + size),
        };
        Scratch { per_token, per_pair }
    }

    pub fn of_decoder(manifest: &Manifest) -> Scratch {
        Scratch::of(&manifest.facts.decoder, manifest.dtype)
    }

    fn of(stack: &StackFacts, dtype: DType) -> Scratch {
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
pub(crate) fn pieces_to_encode(batch: &Batch, manifest: &Manifest, limits: &Limits) -> Vec<Range<usize>> {
    let scratch = Scratch::of_encoder(manifest);
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
    fn the_memory_of_this_machine_is_known() {
        // A source of the longest usual length, and not everything, fits into it.
        assert!((1 << 28..1 << 50).contains(&machine_bytes()), "{}", machine_bytes());
    }

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
            let limits = Limits { max_sources, max_tokens, ..Limits::default() };
            let found = pieces(&batch, &limits, |rows, length| rows.len() * length <= most);
            let found: Vec<_> = found.into_iter().map(|rows| (rows.start, rows.end)).collect();
            assert_eq!(found, expected, "{name}");
        }
    }
}
