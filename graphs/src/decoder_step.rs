//! The cached decoder steps: next target tokens, past, and the source's keys and values → logits and the present. Any
//! number of new tokens, so that a draft can be verified or a prefix appended in one run.

use crate::attention::{KeyValue, Tokens, padding_mask};
use crate::config::Config;
use crate::decoder::{Context, Memory, alignment, candidates, layer, logits};
use crate::interface::{CacheLayout, PAST};
use crate::nn::{Weights, embedding};
use crate::onnx::{Definition, Dim, Graph};
use crate::{Options, interface};

/// The graph of the cached decoder steps.
pub fn decoder_step(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder_with_past;
    let inputs = interface::all_inputs(&graph, &ports);
    let (&[mask, ids], cached) = inputs.split_first_chunk().expect("a mask and ids come before the cache");
    let cache = options.cache(config);

    let root = Weights::root(&graph, &config.decoder, options);
    let w = root.at("model.decoder");
    let (tokens, cached) = match cache {
        CacheLayout::Growing => (Tokens::from(&graph, ids, Some(&Dim::symbol(PAST))), cached),
        CacheLayout::InPlace | CacheLayout::Static(_) => {
            let (&positions, cached) = cached.split_first().expect("positions come before a cache of fixed capacity");
            (Tokens { rows: ids.dim(0), length: ids.dim(1), positions }, cached)
        }
    };
    let visible = padding_mask(mask);
    let mut x = embedding(ids, &root.at(&options.vocabulary.embedding));
    let (mut presents, mut attended) = (Vec::new(), Vec::new());
    for ((i, &kind), cached) in config.decoder.layers.iter().enumerate().zip(cached.chunks_exact(4)) {
        let past = Some(KeyValue { key: cached[0], value: cached[1] });
        let source = KeyValue { key: cached[2], value: cached[3] };
        let w = w.at(&format!("layers.{i}"));
        let is_aligned = options.alignment_layers.contains(&i);
        let context = Context { tokens: tokens.clone(), visible, target: None, kind, cache, is_aligned };
        let made = layer(x, &context, Memory { past, source }, &w);
        presents.extend([made.present.key, made.present.value]);
        attended.extend(made.attended);
        x = made.output;
    }
    let head = root.at(&options.vocabulary.head).keeping(options.vocabulary.kept.as_ref());
    let logits = logits(x, &tokens, options.logits, [&w.at("norm"), &head]);
    let candidates = candidates(logits, options.logits);
    let alignment = alignment(&attended, &tokens);
    interface::outputs(&graph, &ports, [logits].into_iter().chain(presents).chain(candidates).chain(alignment));
    graph.finish("decoder_with_past")
}
