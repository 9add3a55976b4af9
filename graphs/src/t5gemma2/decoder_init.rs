//! The first decoder step: hidden states and the first target tokens → logits, the target's keys and values, and the
//! source's, which are computed here once. A graph of its own so that no past of length zero is ever passed.

use super::decoder::layer;
use super::embedding::{Side, embedding};
use super::root;
use crate::attention::padding_mask;
use crate::config::Config;
use crate::decoder::stack;
use crate::interface::{self, CacheLayout};
use crate::merged_attention::source_key_value;
use crate::onnx::{Definition, Graph};
use crate::options::Options;
use crate::outputs::{mask_by_token, outputs};
use crate::sequence::{Context, Memory, Tokens};

/// The graph of the first decoder step. With a cache of fixed capacity the first step is a cached one, and only the
/// source's keys and values are left to be computed here.
pub fn decoder_init(config: &Config, options: &Options) -> Definition {
    match options.cache(config) {
        cache @ CacheLayout::Static(_) => source_only(config, options, cache),
        cache => first_step(config, options, cache),
    }
}

fn first_step(config: &Config, options: &Options, cache: CacheLayout) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let [mask, ids, hidden] = interface::inputs(&graph, &ports);
    let adapter_masks = options.takes_adapters.then(|| {
        [interface::adapter_mask(options.dtype), interface::encoder_adapter_mask(options.dtype)]
            .map(|port| interface::input(&graph, &port))
    });
    let root = root(&graph, &config.decoder, options);
    let tokens = Tokens::from_start(&graph, ids);
    let source_mask = padding_mask(mask);
    let context = Context { tokens, source_mask, target_mask: None, cross_rotary: None, cache };
    let adapter_mask = adapter_masks.map(|[target, _]| mask_by_token(target, &context.tokens.length));
    let source_adapter_mask = adapter_masks.map(|[_, source]| mask_by_token(source, &hidden.dim(1)));
    let x = embedding(ids, Side::Target, config, options, &root);
    let (x, layers) = stack(
        x,
        &context,
        &options.alignment_layers,
        |_, w| {
            let at = w.at("self_attn").taking_adapters(source_adapter_mask);
            Memory { past: None, source: source_key_value(hidden, cache, &at) }
        },
        layer,
        &root.at("model.decoder").taking_adapters(adapter_mask),
    );
    let cached = layers.iter().flat_map(|layer| [layer.present, layer.source]).flat_map(|pair| [pair.key, pair.value]);
    let weights = layers.iter().filter_map(|layer| layer.weights).collect();
    outputs(&ports, x, weights, cached.collect(), &context.tokens, options, &root);
    graph.finish("decoder")
}

fn source_only(config: &Config, options: &Options, cache: CacheLayout) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let [hidden] = interface::inputs(&graph, &ports);
    let w = root(&graph, &config.decoder, options).at("model.decoder");
    let source = |layer| source_key_value(hidden, cache, &w.at(&format!("layers.{layer}")).at("self_attn"));
    let made = (0..config.decoder.layers.len()).map(source).flat_map(|source| [source.key, source.value]);
    interface::outputs(&graph, &ports, made.collect::<Vec<_>>().into_iter());
    graph.finish("decoder")
}
