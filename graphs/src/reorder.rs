//! The graph that makes target rows the continuations of others, and that gives them more room: parents, places and past →
//! present. It is for where the cache lies in a device's memory: a beam search then sends some numbers there instead of
//! fetching the cache.

use crate::facts::Facts;
use crate::interface::{self, DType};
use crate::onnx::{Definition, Graph};

/// The graph of a change of rows.
pub fn reorder(facts: &Facts, dtype: DType) -> Definition {
    let graph = Graph::new();
    let ports = interface::reorder(facts, dtype);
    let inputs = interface::all_inputs(&graph, &ports);
    let (&[parents, places], past) = inputs.split_first_chunk().expect("the parents and places come first");
    interface::outputs(&graph, &ports, past.iter().map(|past| past.taken(parents, 0).taken(places, 2)));
    graph.finish("reorder")
}
