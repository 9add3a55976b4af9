//! Classification: scores of labels for each source or for each of its tokens, from the encoder's states or from those of
//! a decoder that reads the source again. One graph without a cache, as nothing is generated.

use crate::attention::{Tokens, cross_key_value};
use crate::config::{Classifier, Config};
use crate::decoder::{Context, Memory, layer};
use crate::encoder::{self, Source};
use crate::features::last;
use crate::interface::CacheLayout;
use crate::nn::{Weights, embedding, linear, rms_norm};
use crate::onnx::{DType, Data, Definition, Graph, Value};
use crate::task::Task;
use crate::{Options, interface};

/// The graph from source tokens to the scores of labels.
pub(crate) fn classifier(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = interface::model(config, options.dtype, &options.task);
    let [ids, mask] = interface::inputs(&graph, &ports);
    let classifier = config.classifier.as_ref().expect("a classifier's configuration describes one");

    let w = Weights::root(&graph, &config.encoder, options);
    let source = Source::of(&graph, ids, mask);
    let hidden = encoder::states(&source, config.encoder.layers.len(), config, options, &w.at("model.encoder"));
    let w = match classifier.is_encoder_decoder {
        false => w,
        true => Weights::root(&graph, &config.decoder, options),
    };
    let states = match classifier.is_encoder_decoder {
        false => hidden,
        true => read_again(hidden, &source, config, classifier, &w.at("model.decoder")),
    }; // [batch·source, hidden]

    let (width, labels) = (w.side.hidden_size, classifier.labels.len());
    let scored = match options.task {
        Task::TextClassification => {
            let states = states.reshape(&[ids.dim(0), ids.dim(1), width.into()]);
            states.entry(pooled_position(ids, config, classifier)) // [batch, hidden]
        }
        _ => states,
    };
    let logits = linear(scored, [width, labels], true, &w.at("score.out_proj")).cast(DType::Float32);
    interface::outputs(&graph, &ports, [logits.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("model")
}

/// The states of a decoder whose target is the source itself behind the start token, `[batch·source, hidden]`.
fn read_again<'g>(
    hidden: Value<'g>,
    source: &Source<'g>,
    config: &Config,
    classifier: &Classifier,
    w: &Weights<'g>,
) -> Value<'g> {
    let ids = source.ids.shifted_right(classifier.decoder_start);
    let pad = w.graph.constant(DType::Int64, &[], Data::Ints(vec![classifier.decoder_pad]));
    let tokens = Tokens::from(w.graph, ids, None);
    // The reference hides padding by the ids here, not by the mask.
    let target = (!ids.equals(pad)).unsqueeze(&[1, 2, 3]);
    let hidden = hidden.reshape(&[ids.dim(0), ids.dim(1), config.encoder.hidden_size.into()]);
    let mut x = embedding(ids, &w.at("embed_tokens.weight"));
    for (i, &kind) in config.decoder.layers.iter().enumerate() {
        let w = w.at(&format!("layers.{i}"));
        let memory = Memory { past: None, source: cross_key_value(hidden, &w.at("cross_attn")) };
        let (tokens, target, cache) = (tokens.clone(), Some(target), CacheLayout::Growing);
        let context = Context { tokens, visible: source.visible, target, kind, cache, is_aligned: false };
        x = layer(x, &context, memory, &w).output;
    }
    rms_norm(x, &w.at("norm")).cast(w.dtype())
}

/// The position of each row that is classified by, int64 `[batch, 1]`: of the last token that is not `pad_token_id`,
/// whatever the mask says, as in the reference.
fn pooled_position<'g>(ids: Value<'g>, config: &Config, classifier: &Classifier) -> Value<'g> {
    let graph = ids.graph();
    let pad = graph.constant(DType::Int64, &[], Data::Ints(vec![config.tokens.pad.unwrap_or(0)]));
    let last = last(!ids.equals(pad));
    match classifier.is_encoder_decoder {
        false => last,
        // The target stands one to the right of the source.
        true => (last + 1.0).min(graph.size(&ids.dim(1)) - 1.0),
    }
}
