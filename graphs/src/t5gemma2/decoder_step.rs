//! The cached decoder steps: next target tokens, past, and the source's keys and values → logits and the present. Any
//! number of new tokens, so that a draft can be verified or a prefix appended in one run.

use super::decoder::layer;
use super::embedding::{Side, embedding};
use super::root;
use crate::attention::padding_mask;
use crate::config::Config;
use crate::decoder::stack;
use crate::interface::{self, CacheLayout, PAST_LENGTH};
use crate::onnx::{Definition, Dim, Graph};
use crate::options::Options;
use crate::outputs::{mask_by_token, outputs};
use crate::sequence::{Context, KeyValue, Memory, Tokens};
use crate::weights::Weights;

/// The graph of the cached decoder steps.
pub fn decoder_step(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder_with_past;
    let inputs = interface::all_inputs(&graph, &ports);
    let adapter_mask =
        options.takes_adapters.then(|| interface::input(&graph, &interface::adapter_mask(options.dtype)));
    let (&[mask, ids], cached) = inputs.split_first_chunk().expect("a mask and ids come before the cache");
    let cache = options.cache(config);

    let root = root(&graph, &config.decoder, options);
    let (tokens, cached) = match cache {
        CacheLayout::Growing => (Tokens::after(&graph, &Dim::symbol(PAST_LENGTH), ids), cached),
        CacheLayout::InPlace | CacheLayout::Static(_) => {
            let (&positions, cached) = cached.split_first().expect("positions come before a cache of fixed capacity");
            (Tokens { rows: ids.dim(0), length: ids.dim(1), positions, rotary: positions }, cached)
        }
    };
    let adapter_mask = adapter_mask.map(|mask| mask_by_token(mask, &tokens.length));
    let source_mask = padding_mask(mask);
    let context = Context { tokens, source_mask, target_mask: None, cross_rotary: None, cache };
    let x = embedding(ids, Side::Target, config, options, &root);
    let memory = |i: usize, _: &Weights<'_>| {
        let [past_key, past_value, key, value] = *cached[4 * i..].first_chunk().expect("four tensors of each layer");
        Memory { past: Some(KeyValue { key: past_key, value: past_value }), source: KeyValue { key, value } }
    };
    let (x, layers) = stack(
        x,
        &context,
        &options.alignment_layers,
        memory,
        layer,
        &root.at("model.decoder").taking_adapters(adapter_mask),
    );
    let presents = layers.iter().flat_map(|layer| [layer.present.key, layer.present.value]);
    let weights = layers.iter().filter_map(|layer| layer.weights).collect();
    outputs(&ports, x, weights, presents.collect(), &context.tokens, options, &root);
    graph.finish("decoder_with_past")
}
