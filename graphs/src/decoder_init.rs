//! The first decoder step: hidden states and the first target tokens → logits, the target's keys and values, and the
//! source's, which are computed here once. A graph of its own so that no past of length zero is ever passed.

use crate::attention::{Tokens, cross_key_value, padding_mask};
use crate::config::Config;
use crate::decoder::{Context, Memory, layer, logits};
use crate::nn::{Weights, embedding};
use crate::onnx::{Definition, Graph};
use crate::{Options, interface};

/// The graph of the first decoder step.
pub fn decoder_init(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder;
    let [mask, ids, hidden] = interface::inputs(&graph, &ports);

    let c = &config.decoder;
    let root = Weights::root(&graph, options.dtype, options.target.lowering());
    let w = root.at("model.decoder");
    let context = Context { tokens: Tokens::from(&graph, ids, None), visible: padding_mask(mask) };
    let mut x = embedding(ids, c.vocab_size, c.hidden_size, &root.at(&options.vocabulary.embedding));
    let mut presents = Vec::new();
    for (i, &kind) in c.layers.iter().enumerate() {
        let w = w.at(&format!("layers.{i}"));
        let source = cross_key_value(hidden, c, &w.at("cross_attn"));
        let (y, own) = layer(&graph, x, &context, Memory { past: None, source }, (c, kind), &w);
        presents.extend([own.key, own.value, source.key, source.value]);
        x = y;
    }
    let head = root.at(&options.vocabulary.head);
    let logits = logits(x, &context.tokens, options.logits, c, &w.at("norm"), &head);
    interface::outputs(&graph, &ports, [logits].into_iter().chain(presents));
    graph.finish("decoder")
}
