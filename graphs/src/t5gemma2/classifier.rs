//! Classification: scores of labels for each source or for each of its tokens, from the states of the decoder, whose target
//! is the source itself behind the start token. One graph without a cache, as nothing is generated.

use super::decoder::layer;
use super::embedding::{Side, embedding};
use super::encoder::read;
use super::root;
use crate::config::Config;
use crate::decoder::stack;
use crate::encoder::states;
use crate::features::last_true;
use crate::interface;
use crate::merged_attention::source_key_value;
use crate::nn::{Linear, linear, rms_norm};
use crate::onnx::{DType, Data, Definition, Graph};
use crate::options::Options;
use crate::sequence::{Context, Memory, Tokens};
use crate::task::Task;

/// The graph from source tokens and the features of images to the scores of labels.
pub fn classifier(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = interface::model(&config.facts(), options.dtype, &options.task);
    let inputs = interface::all_inputs(&graph, &ports);
    let classifier = config.classifier.as_ref().expect("a classifier's configuration describes one");
    let encoder = root(&graph, &config.encoder, options);
    let (embedded, source) = read(&inputs, config, options, &encoder);
    let hidden = states(embedded, &source, options, &encoder.at("model.encoder"));

    let (w, cache) = (root(&graph, &config.decoder, options), options.cache(config));
    let [batch, length] = [0, 1].map(|axis| source.ids.dim(axis));
    let hidden = hidden.reshape(&[batch.clone(), length.clone(), hidden.dim(-1)]);
    let ids = source.ids.shifted_right(classifier.decoder_start);
    // The target is not masked: transformers makes no mask of its own in this family.
    let context = Context {
        tokens: Tokens::from_start(&graph, ids),
        source_mask: source.visible,
        target_mask: None,
        cross_rotary: None,
        cache,
    };
    let x = embedding(ids, Side::Target, config, options, &w);
    let decoder = w.at("model.decoder");
    let (x, _) = stack(
        x,
        &context,
        &[],
        |_, w| Memory { past: None, source: source_key_value(hidden, cache, &w.at("self_attn")) },
        layer,
        &decoder,
    );
    let x = rms_norm(x, &decoder.at("norm")).cast(w.dtype()); // [batch·source, hidden]

    let (width, labels) = (w.stack.hidden_size, classifier.labels.len());
    let scored = match options.task {
        Task::TextClassification => {
            // The last token of the target that is not `pad_token_id`, whatever the mask says, as in transformers.
            let pad = graph.constant(DType::Int64, &[], Data::Ints(vec![config.tokens.pad.unwrap_or(0)]));
            x.reshape(&[batch, length, width.into()]).gather_entry(last_true(!ids.equal(pad))) // [batch, hidden]
        }
        _ => x,
    };
    let head = Linear { input: width, output: labels, bias: true };
    let logits = linear(scored, head, &w.at("score.out_proj")).cast(DType::Float32);
    interface::outputs(&graph, &ports, [logits.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("model")
}
