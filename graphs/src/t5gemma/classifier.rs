//! Classification: scores of labels for each source or for each of its tokens, from the encoder's states or from those
//! of a decoder that reads the source again. One graph without a cache, as nothing is generated.

use super::decoder::layer;
use super::root;
use crate::attention::cross_key_value;
use crate::config::{Classifier, Config};
use crate::decoder::stack;
use crate::encoder::{self, Source};
use crate::features::last_true;
use crate::interface::{self, CacheLayout};
use crate::nn::{Linear, embedding, linear, rms_norm};
use crate::onnx::{DType, Data, Definition, Graph, Value};
use crate::options::Options;
use crate::sequence::{Context, Memory, Tokens};
use crate::task::Task;
use crate::weights::Weights;

/// The graph from source tokens to the scores of labels.
pub fn classifier(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = interface::model(&config.facts(), options.dtype, &options.task);
    let [ids, mask] = interface::inputs(&graph, &ports);
    let classifier = config.classifier.as_ref().expect("a classifier's configuration describes one");

    let encoder = root(&graph, &config.encoder, options);
    let source = Source::by_row(&graph, ids, mask);
    let at = encoder.at("model.encoder");
    let hidden = encoder::states(embedding(ids, &at.at("embed_tokens.weight")), &source, options, &at);
    let (states, w) = if classifier.is_encoder_decoder {
        let decoder = root(&graph, &config.decoder, options);
        (read_again(hidden, &source, classifier, &decoder.at("model.decoder")), decoder)
    } else {
        (hidden, encoder)
    }; // [batch·source, hidden]

    let (width, labels) = (w.stack.hidden_size, classifier.labels.len());
    let scored = match options.task {
        Task::TextClassification => {
            let states = states.reshape(&[ids.dim(0), ids.dim(1), width.into()]);
            states.gather_entry(pooled_position(ids, config, classifier)) // [batch, hidden]
        }
        _ => states,
    };
    let head = Linear { input: width, output: labels, bias: true };
    let logits = linear(scored, head, &w.at("score.out_proj")).cast(DType::Float32);
    interface::outputs(&graph, &ports, [logits.reshape(&ports.outputs[0].shape)].into_iter());
    graph.finish("model")
}

/// The states of a decoder whose target is the source itself behind the start token: `hidden` and the result
/// `[batch·source, hidden]`.
fn read_again<'g>(hidden: Value<'g>, source: &Source<'g>, classifier: &Classifier, w: &Weights<'g>) -> Value<'g> {
    let ids = source.ids.shifted_right(classifier.decoder_start);
    let pad = w.graph.constant(DType::Int64, &[], Data::Ints(vec![classifier.decoder_pad]));
    let tokens = Tokens::from_start(w.graph, ids);
    // transformers finds the padding by its ids here, not by the mask.
    let target_mask = Some((!ids.equal(pad)).unsqueeze(&[1, 2, 3]));
    let hidden = hidden.reshape(&[ids.dim(0), ids.dim(1), hidden.dim(-1)]);
    let x = embedding(ids, &w.at("embed_tokens.weight"));
    let context =
        Context { tokens, source_mask: source.visible, target_mask, cross_rotary: None, cache: CacheLayout::Growing };
    let memory = |_, w: &Weights<'g>| Memory { past: None, source: cross_key_value(hidden, None, &w.at("cross_attn")) };
    let (x, _) = stack(x, &context, &[], memory, layer, w);
    rms_norm(x, &w.at("norm")).cast(w.dtype())
}

/// The position of each row that is classified by, int64 `[batch, 1]`: of the last token that is not `pad_token_id`,
/// whatever the mask says, as in transformers.
fn pooled_position<'g>(ids: Value<'g>, config: &Config, classifier: &Classifier) -> Value<'g> {
    let graph = ids.graph();
    let pad = graph.constant(DType::Int64, &[], Data::Ints(vec![config.tokens.pad.unwrap_or(0)]));
    let last = last_true(!ids.equal(pad));
    if classifier.is_encoder_decoder {
        // The target stands one to the right of the source.
        (last + 1.0).min(graph.size(&ids.dim(1)) - 1.0)
    } else {
        last
    }
}
