//! The ONNX graph builder: values with a dtype and a symbolic shape, operators that check both, and hash-consing, so
//! that an equation is written where it is used and still computed once. It knows nothing of T5Gemma.
//!
//! # Design
//! [`Value`] is a copyable handle into the graph's arena, so equations read as equations and nothing returns a
//! `Result`: a shape that does not fit is a mistake in a model definition, and panics with the definition's line, scope
//! and shapes.

mod blocks;
mod contrib;
mod definition;
mod graph;
mod ops;
mod shape;

pub use blocks::{Blocks, Code};
pub use contrib::{GroupQuery, Heads, Packed};
pub use definition::{Adjust, Attribute, Constant, Data, Definition, Function, Node, Parameter, Part, ValueInfo};
pub use graph::{Graph, Scope, Value};
pub use shape::{DType, Dim};
