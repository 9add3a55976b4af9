//! What a cache on a device knows when its model is opened, and the outputs with the logits that a step needs.

use std::sync::Arc;

use ort::session::Session;
use ort::value::{DynValue, Tensor};
use t5gemma_graphs::interface::{CacheLayout, DType, LOG_SUM_EXP, TOP_IDS, TOP_SCORES};
use t5gemma_kernels::LogitsRequest;

use super::super::fixed_buffers::BufferPool;
use super::super::top_logits::{TopLogits, expand};
use crate::device::Device;
use crate::session::GraphSession;

/// The initial capacity, in target tokens, of a cache that can grow.
const INITIAL_CAPACITY: usize = 64;

/// The properties of a model's cache that are known when the model is opened.
#[derive(Clone)]
pub(crate) struct DeviceCacheConfig {
    /// How it passes from step to step.
    pub layout: CacheLayout,
    /// Where it is.
    pub device: Device,
    /// Its element type.
    pub dtype: DType,
    /// For each cached tensor, in the order of the graphs, whether it is of cross-attention.
    pub is_cross: Vec<bool>,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// The width of a head.
    pub head_dim: usize,
    /// Target tokens that the model has positions for.
    pub max_positions: usize,
    /// The graph that changes rows.
    pub reorder: Arc<GraphSession>,
    /// How many of the greatest logits the graphs return besides all of them.
    pub top_logits: Option<usize>,
    /// Buffers for steps at fixed addresses, if steps use them; only with [`CacheLayout::InPlace`].
    pub buffers: Option<Arc<BufferPool>>,
}

impl DeviceCacheConfig {
    /// The capacity for `needed` target tokens.
    pub fn capacity(&self, needed: usize) -> usize {
        // The attention operator refuses a capacity beyond the model's positions.
        needed.next_power_of_two().max(INITIAL_CAPACITY).min(self.max_positions).max(needed)
    }

    /// The outputs that satisfy the request; `logits` is the one with all. An output that is not bound is not copied
    /// from the device.
    pub fn logits_outputs(&self, logits: String, request: LogitsRequest) -> Vec<String> {
        match (request, self.top_logits) {
            (LogitsRequest::TopK { k, .. }, Some(most)) if k <= most => {
                [TOP_SCORES, TOP_IDS, LOG_SUM_EXP].map(String::from).to_vec()
            }
            _ => vec![logits],
        }
    }
}

/// Full rows of logits, from the outputs named by [`DeviceCacheConfig::logits_outputs`].
pub fn full_rows(mut outputs: Vec<DynValue>, vocab_size: usize) -> ort::Result<DynValue> {
    let [scores, tokens, sums] = &outputs[..] else { return Ok(outputs.swap_remove(0)) };
    let (shape, scores) = scores.try_extract_tensor::<f32>()?;
    let (tokens, sums) = (tokens.try_extract_tensor::<i64>()?.1, sums.try_extract_tensor::<f32>()?.1);
    let (rows, count) = (shape[0] as usize, shape[1] as usize);
    let mut logits = vec![0.0_f32; rows * vocab_size];
    let top = scores.chunks_exact(count).zip(tokens.chunks_exact(count)).zip(sums);
    for (((scores, tokens), &log_sum_exp), row) in top.zip(logits.chunks_exact_mut(vocab_size)) {
        expand(&TopLogits { scores, tokens, log_sum_exp }, row);
    }
    Ok(Tensor::from_array(([rows, 1, vocab_size], logits))?.into_dyn())
}

/// The length of a row of logits.
pub fn vocab_size(session: &Session) -> usize {
    let shape = session.outputs().first().and_then(|port| port.dtype().tensor_shape());
    shape.and_then(|shape| shape.last().copied()).map_or(0, |size| size.max(0) as usize)
}
