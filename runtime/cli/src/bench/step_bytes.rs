//! `StepBytes`: how much memory a decoder step must read.

use std::collections::BTreeMap;

use t5gemma_runtime::{Model, Role};

use super::Case;

/// Bytes that every step after the first must read.
pub struct StepBytes {
    pub weights: u64,
    /// Keys and values of the sources, and of the targets at half their length.
    pub caches: u64,
}

impl StepBytes {
    pub fn of(model: &Model, case: &Case) -> StepBytes {
        let (manifest, decoder) = (model.manifest(), &model.facts().decoder);
        let used: Vec<&str> = manifest.graphs["decoder_with_past"].weights.iter().map(String::as_str).collect();
        // A step reads only a few rows of an embedding that is not also the output head. Keyed by offset: a tied
        // embedding and head are read once.
        let weights: BTreeMap<u64, u64> = (manifest.weights.tensors.iter())
            .filter(|tensor| used.contains(&tensor.name.as_str()) && tensor.role != Role::DecoderEmbedding)
            .map(|tensor| (tensor.offset, tensor.bytes))
            .collect();

        let position =
            2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * manifest.dtype.size();
        let targets = case.batch.rows() * case.options.num_beams * case.tokens / 2;
        let sources = case.batch.rows() * case.batch.length();
        StepBytes { weights: weights.values().sum(), caches: (position * (targets + sources)) as u64 }
    }

    pub fn total(&self) -> u64 {
        self.weights + self.caches
    }
}
