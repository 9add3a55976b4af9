//! The ONNX graph builder: values with a dtype and a symbolic shape, operators that check both, and hash-consing, so that
//! an equation is written where it is used and still computed once. It knows nothing of T5Gemma.
//!
//! # Design
//! `Value` is a copyable handle into the graph's arena, so equations read as equations and nothing returns a `Result`: a
//! shape that does not fit is a mistake in a model definition, and panics with the definition's line, scope and shapes.

mod contrib;
mod graph;
mod ops;
mod shape;

pub use contrib::{GroupQuery, Heads, Packed};
pub use graph::{
    Adjust, Attribute, Blocks, Code, Constant, Data, Definition, Graph, Node, Parameter, Part, Scope, Value, ValueInfo,
};
pub use shape::{DType, Dim};
