//! The first decoder step: hidden states and the first target tokens → logits, the target's keys and values, and the
//! source's, which are computed here once. A graph of its own so that no past of length zero is ever passed.

use crate::attention::{Tokens, cross_key_value, padding_mask};
use crate::config::Config;
use crate::decoder::{Context, Memory, alignment, candidates, layer, logits};
use crate::interface::CacheLayout;
use crate::nn::{Weights, embedding};
use crate::onnx::{Definition, Graph};
use crate::{Options, interface};

/// The graph of the first decoder step.
pub fn decoder_init(config: &Config, options: &Options) -> Definition {
    let cache = options.cache(config);
    if let CacheLayout::Static(_) = cache {
        return cross_only(config, options);
    }
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let [mask, ids, hidden] = interface::inputs(&graph, &ports);

    let root = Weights::root(&graph, &config.decoder, options);
    let w = root.at("model.decoder");
    let (tokens, visible) = (Tokens::from(&graph, ids, None), padding_mask(mask));
    let mut x = embedding(ids, &root.at(&options.vocabulary.embedding));
    let (mut presents, mut attended) = (Vec::new(), Vec::new());
    for (i, &kind) in config.decoder.layers.iter().enumerate() {
        let w = w.at(&format!("layers.{i}"));
        let source = cross_key_value(hidden, &w.at("cross_attn"));
        let is_aligned = options.alignment_layers.contains(&i);
        let context = Context { tokens: tokens.clone(), visible, target: None, kind, cache, is_aligned };
        let made = layer(x, &context, Memory { past: None, source }, &w);
        presents.extend([made.present.key, made.present.value, source.key, source.value]);
        attended.extend(made.attended);
        x = made.output;
    }
    let head = root.at(&options.vocabulary.head).keeping(options.vocabulary.kept.as_ref());
    let logits = logits(x, &tokens, options.logits, [&w.at("norm"), &head]);
    let candidates = candidates(logits, options.logits);
    let alignment = alignment(&attended, &tokens);
    interface::outputs(&graph, &ports, [logits].into_iter().chain(presents).chain(candidates).chain(alignment));
    graph.finish("decoder")
}

/// Where the cache has room for all steps from the beginning, only the source's keys and values are left to be made once.
fn cross_only(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let [hidden] = interface::inputs(&graph, &ports);
    let w = Weights::root(&graph, &config.decoder, options).at("model.decoder");
    let source = |layer| cross_key_value(hidden, &w.at(&format!("layers.{layer}")).at("cross_attn"));
    let made = (0..config.decoder.layers.len()).map(source).flat_map(|source| [source.key, source.value]);
    interface::outputs(&graph, &ports, made.collect::<Vec<_>>().into_iter());
    graph.finish("decoder")
}
