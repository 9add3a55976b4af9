//! Feature extraction: the encoder alone, with the hidden states of any layer.

use super::root;
use crate::config::Config;
use crate::encoder::{Source, all_states};
use crate::features;
use crate::interface;
use crate::nn::embedding;
use crate::onnx::{Definition, Graph};
use crate::options::Options;
use crate::task::{Features, Task};

/// The graph from source tokens to the states or the vector of each source.
pub fn features(config: &Config, options: &Options, wanted: &Features) -> Definition {
    let graph = Graph::new();
    let ports = interface::model(&config.facts(), options.dtype, &Task::FeatureExtraction(*wanted));
    let inputs = interface::all_inputs(&graph, &ports);
    let (&[ids, mask], positions) = inputs.split_first_chunk().expect("ids and a mask come first");

    let w = root(&graph, &config.encoder, options).at("model.encoder");
    let source = Source::by_token(&graph, [ids, mask], positions.first().copied(), config, options);
    let layers = wanted.layers(config.encoder.layers.len()).expect("the exporter has checked the number of the layer");
    let all = all_states(embedding(ids, &w.at("embed_tokens.weight")), &source, layers, options, &w);
    features::outputs(&ports, all, mask, wanted, options, &w);
    graph.finish("model")
}
