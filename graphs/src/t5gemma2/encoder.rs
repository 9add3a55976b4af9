//! The encoder's graphs: source tokens and the features of images → hidden states.

use super::embedding::{Side, embedding, with_images};
use super::root;
use crate::config::Config;
use crate::encoder::{Source, all_states, states};
use crate::features;
use crate::interface;
use crate::onnx::{Definition, Graph, Value};
use crate::options::Options;
use crate::task::{Features, Task};
use crate::weights::Weights;

/// The graph from source tokens to hidden states, `[batch, source, hidden]`.
pub fn encoder(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).encoder;
    let inputs = interface::all_inputs(&graph, &ports);
    let root = root(&graph, &config.encoder, options);
    let (embedded, source) = read(&inputs, config, options, &root);
    let hidden = states(embedded, &source, options, &root.at("model.encoder").taking_adapters(None));
    interface::outputs(&graph, &ports, [hidden.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("encoder")
}

/// The graph from source tokens to the states of a layer, or to the vector of each source.
pub fn features(config: &Config, options: &Options, wanted: &Features) -> Definition {
    let graph = Graph::new();
    let ports = interface::model(&config.facts(), options.dtype, &Task::FeatureExtraction(*wanted));
    let inputs = interface::all_inputs(&graph, &ports);
    let root = root(&graph, &config.encoder, options);
    let (embedded, source) = read(&inputs, config, options, &root);
    let w = root.at("model.encoder");
    let layers = wanted.layers(config.encoder.layers.len()).expect("the exporter has checked the number of the layer");
    let all = all_states(embedded, &source, layers, options, &w);
    features::outputs(&ports, all, inputs[1], wanted, options, &w);
    graph.finish("model")
}

/// The embedded source, `[batch·source, hidden]`, and its tokens: `inputs` are ids, mask and, if the model reads images,
/// their features.
pub fn read<'g>(
    inputs: &[Value<'g>],
    config: &Config,
    options: &Options,
    root: &Weights<'g>,
) -> (Value<'g>, Source<'g>) {
    let (&[ids, mask], images) = inputs.split_first_chunk().expect("ids and a mask come first");
    let source = Source::by_token(root.graph, [ids, mask], None, config, options);
    let x = embedding(ids, Side::Source, config, options, root);
    let x = match (images.first(), &config.vision) {
        (Some(&features), Some(vision)) => with_images(x, ids, features, vision),
        _ => x,
    };
    (x, source)
}
