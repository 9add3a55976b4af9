//! The encoder: source tokens → hidden states, `[batch, source, hidden]`.

use super::root;
use crate::config::Config;
use crate::encoder::{Source, states};
use crate::interface;
use crate::nn::embedding;
use crate::onnx::{Definition, Graph};
use crate::options::Options;

/// The graph from source tokens to hidden states.
pub fn encoder(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).encoder;
    let inputs = interface::all_inputs(&graph, &ports);
    let (&[ids, mask], positions) = inputs.split_first_chunk().expect("ids and a mask come first");

    let w = root(&graph, &config.encoder, options).at("model.encoder").taking_adapters(None);
    let source = Source::by_token(&graph, [ids, mask], positions.first().copied(), config, options);
    let hidden = states(embedding(ids, &w.at("embed_tokens.weight")), &source, options, &w);
    interface::outputs(&graph, &ports, [hidden.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("encoder")
}
