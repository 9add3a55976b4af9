//! The first decoder step: hidden states and the first target tokens → logits, the target's keys and values, and the
//! source's, which are computed here once. A graph of its own so that no past of length zero is ever passed.

use super::decoder::layer;
use super::root;
use crate::attention::{cross_key_value, padding_mask};
use crate::config::{Config, Positions};
use crate::decoder::stack;
use crate::interface::{self, CacheLayout};
use crate::nn::embedding;
use crate::onnx::{Definition, Graph, Value};
use crate::options::Options;
use crate::outputs::{mask_by_token, outputs};
use crate::sequence::{Context, Memory, Tokens};

/// The graph of the first decoder step. With a cache of fixed capacity the first step is a cached one, and only the
/// source's keys and values are left to be computed here.
pub fn decoder_init(config: &Config, options: &Options) -> Definition {
    match options.cache(config) {
        CacheLayout::Static(_) => source_only(config, options),
        cache => first_step(config, options, cache),
    }
}

fn first_step(config: &Config, options: &Options, cache: CacheLayout) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let inputs = interface::all_inputs(&graph, &ports);
    let (&[mask, ids, hidden], rest) = inputs.split_first_chunk().expect("mask, ids and hidden states come first");
    let has_target_positions = config.custom.target_positions == Positions::Float;
    let (of_target, of_source) = rest.split_at(usize::from(has_target_positions));

    let adapter_masks = options.takes_adapters.then(|| {
        [interface::adapter_mask(options.dtype), interface::encoder_adapter_mask(options.dtype)]
            .map(|port| interface::input(&graph, &port))
    });
    let root = root(&graph, &config.decoder, options);
    let tokens = Tokens::from_start(&graph, ids).rotated_by(of_target.first().copied());
    let cross_rotary = config.custom.cross_rope.then_some(tokens.rotary);
    let of_source = source_rotary(config, hidden, of_source.first().copied());
    let context = Context { tokens, source_mask: padding_mask(mask), target_mask: None, cross_rotary, cache };
    let adapter_mask = adapter_masks.map(|[target, _]| mask_by_token(target, &context.tokens.length));
    let source_adapter_mask = adapter_masks.map(|[_, source]| mask_by_token(source, &hidden.dim(1)));
    let x = embedding(ids, &root.at(&options.vocabulary.embedding));
    let (x, layers) = stack(
        x,
        &context,
        &options.alignment_layers,
        |_, w| {
            let at = w.at("cross_attn").taking_adapters(source_adapter_mask);
            Memory { past: None, source: cross_key_value(hidden, of_source, &at) }
        },
        layer,
        &root.at("model.decoder").taking_adapters(adapter_mask),
    );
    let cached = layers.iter().flat_map(|layer| [layer.present, layer.source]).flat_map(|pair| [pair.key, pair.value]);
    let weights = layers.iter().filter_map(|layer| layer.weights).collect();
    outputs(&ports, x, weights, cached.collect(), &context.tokens, options, &root);
    graph.finish("decoder")
}

fn source_only(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let inputs = interface::all_inputs(&graph, &ports);
    let (&hidden, of_source) = inputs.split_first().expect("hidden states come first");
    let of_source = source_rotary(config, hidden, of_source.first().copied());
    let w = root(&graph, &config.decoder, options).at("model.decoder");
    let source = |layer| cross_key_value(hidden, of_source, &w.at(&format!("layers.{layer}")).at("cross_attn"));
    let made = (0..config.decoder.layers.len()).map(source).flat_map(|source| [source.key, source.value]);
    interface::outputs(&graph, &ports, made.collect::<Vec<_>>().into_iter());
    graph.finish("decoder")
}

/// What the keys of cross-attention are rotated by, if they are: the float positions, or the indices of the source's
/// tokens.
fn source_rotary<'g>(config: &Config, hidden: Value<'g>, floats: Option<Value<'g>>) -> Option<Value<'g>> {
    config.custom.cross_rope.then(|| floats.unwrap_or_else(|| Tokens::from_start(hidden.graph(), hidden).positions))
}
