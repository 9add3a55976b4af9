//! Limits far beyond any real model, so that corrupt numbers are rejected before anything of their size is allocated.

/// Of any size. Every product of two sizes stays below 2^62, so that shape arithmetic cannot overflow.
pub(crate) const MOST_SIZE: usize = i32::MAX as usize;
/// Of `num_hidden_layers`.
pub(crate) const MOST_LAYERS: usize = 4096;
/// Of `head_dim`; the rotary frequencies of a head are written into the graph.
pub(crate) const MOST_HEAD_DIM: usize = 65536;
/// Of `num_labels`; each label has a name.
pub(crate) const MOST_LABELS: usize = 65536;
