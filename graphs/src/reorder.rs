//! The graph that reorders the rows of a cache and changes its capacity: parents, places and past → present. For caches
//! in a device's memory: a beam search then sends indices there instead of copying the cache.

use crate::facts::Facts;
use crate::interface::{self, DType};
use crate::onnx::{Definition, Graph};

/// The graph with the ports of [`interface::reorder`].
pub fn reorder(facts: &Facts, dtype: DType) -> Definition {
    let graph = Graph::new();
    let ports = interface::reorder(facts, dtype);
    let inputs = interface::all_inputs(&graph, &ports);
    let (&[parents, places], past) = inputs.split_first_chunk().expect("the parents and places come first");
    interface::outputs(&graph, &ports, past.iter().map(|past| past.gather_along(parents, 0).gather_along(places, 2)));
    graph.finish("reorder")
}
