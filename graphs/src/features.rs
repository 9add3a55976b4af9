//! Feature extraction: the encoder alone, with the hidden states of any layer and their pooling to one vector for each
//! source. What is pooled is computed in float32, whatever the model is in.

use crate::interface::{self, Ports};
use crate::onnx::{DType, Data, Value};
use crate::options::Options;
use crate::task::{Features, PaddingRows, Pooling};
use crate::weights::Weights;

/// Declares the outputs of a graph for feature extraction. `all` are the embedding and the outputs of the layers up to
/// the wanted one, `[batch·source, hidden]` each; `mask` is int64 `[batch, source]`.
pub fn outputs<'g>(
    ports: &Ports,
    mut all: Vec<Value<'g>>,
    mask: Value<'g>,
    features: &Features,
    options: &Options,
    w: &Weights<'g>,
) {
    let [batch, source] = [0, 1].map(|axis| mask.dim(axis));
    let last = all.pop().expect("there is the embedding");
    let others = if features.output_hidden_states { all } else { Vec::new() };
    let outputs = std::iter::once(last).chain(others).zip(&ports.outputs).map(|(states, port)| {
        let states = states.cast(w.dtype()).reshape(&[batch.clone(), source.clone(), w.stack.hidden_size.into()]);
        let taken = match features.pooling {
            Pooling::None => states,
            pooling => pooled(states.cast(DType::Float32), mask, pooling),
        };
        let output = if features.normalize { normalized(taken.cast(DType::Float32)) } else { taken };
        with_padding_rows(output.cast(port.dtype), mask, features.padding_rows, options)
    });
    let outputs: Vec<Value<'_>> = outputs.collect();
    interface::outputs(w.graph, ports, outputs.into_iter());
}

/// The states `[batch, source, hidden]` with other rows where `mask` (int64 `[batch, source]`) is 0. A source of padding
/// alone, which no attention is defined for, gets such rows only.
fn with_padding_rows<'g>(states: Value<'g>, mask: Value<'g>, rows: PaddingRows, options: &Options) -> Value<'g> {
    let seen = mask.cast(DType::Bool).unsqueeze(&[2]);
    match rows {
        PaddingRows::Unspecified => states,
        PaddingRows::Zero => states.zero_unless(seen),
        PaddingRows::Learned => {
            let row = options.padding_row.as_ref().expect("the exporter has read the vector");
            let numbers = Data::Floats(row.iter().copied().map(f64::from).collect());
            states.where_else(seen, states.graph().constant(states.dtype(), &[row.len()], numbers))
        }
    }
}

/// One vector `[batch, hidden]` of the states `[batch, source, hidden]` that `mask` (int64 `[batch, source]`) lets
/// through.
fn pooled<'g>(states: Value<'g>, mask: Value<'g>, pooling: Pooling) -> Value<'g> {
    let seen = mask.cast(DType::Bool);
    match pooling {
        Pooling::None => states,
        Pooling::Mean => {
            let sum = states.zero_unless(seen.unsqueeze(&[2])).reduce_sum(1).squeeze(1);
            sum / seen.cast(DType::Float32).reduce_sum(-1)
        }
        Pooling::Last => states.gather_entry(last_true(seen)),
        Pooling::First => states.gather_entry(first_true(seen)),
    }
}

/// The last position of each row where `true` stands, or 0: int64 `[batch, 1]` of bool `[batch, source]`.
pub fn last_true(seen: Value<'_>) -> Value<'_> {
    positions(seen).zero_unless(seen).reduce_max(-1)
}

fn first_true(seen: Value<'_>) -> Value<'_> {
    // Counted from the right, the first position is the greatest.
    let length = seen.graph().size(&seen.dim(1));
    let from_the_right = length - positions(seen); // length, …, 1
    length - from_the_right.zero_unless(seen).reduce_max(-1)
}

/// The positions of rows of this length, int64 `[1, source]`.
fn positions(rows: Value<'_>) -> Value<'_> {
    let (graph, length) = (rows.graph(), rows.dim(1));
    graph.range(graph.size(&0.into()), graph.size(&length), &length).unsqueeze(&[0])
}

/// `x / max(√Σx², 1e-12)` over the last axis, as `torch.nn.functional.normalize`.
fn normalized(x: Value<'_>) -> Value<'_> {
    x / (x * x).reduce_sum(-1).sqrt().clamp_min(1e-12)
}
