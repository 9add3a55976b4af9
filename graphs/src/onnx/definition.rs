//! `Definition`: a finished graph as plain data, which is what is written to disk.

use std::sync::Arc;

use super::{Blocks, DType, Dim};

/// A finished graph. Values are indices into `values`; nodes are in an order in which they can be run.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The graph's name.
    pub name: String,
    /// Every tensor.
    pub values: Vec<ValueInfo>,
    /// Every operator.
    pub nodes: Vec<Node>,
    /// The inputs, in order.
    pub inputs: Vec<usize>,
    /// The outputs, in order.
    pub outputs: Vec<usize>,
    /// Small tensors whose numbers are part of the graph.
    pub constants: Vec<Constant>,
    /// Tensors whose numbers are the model's weights, in order of first use.
    pub parameters: Vec<Parameter>,
    /// The functions that nodes call.
    pub functions: Vec<Function>,
    /// The names of the observed tensors, in order: see [`Graph::observe`](super::Graph::observe).
    pub observed: Vec<String>,
}

/// An operator that is defined by others: a runtime that has no better form of it computes the body.
#[derive(Clone, Debug)]
pub struct Function {
    /// As [`Node::op`].
    pub op: &'static str,
    /// The names of its attributes.
    pub attributes: Vec<&'static str>,
    /// What it computes. It has no parameters; attributes are referred to by [`Attribute::Reference`].
    pub body: Definition,
}

/// A tensor's name and type.
#[derive(Clone, Debug)]
pub struct ValueInfo {
    /// Unique within the graph.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<Dim>,
}

/// One operator.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique within the graph: the scope it was written in and the operator's name.
    pub name: String,
    /// The operator, behind its domain and a dot if that is not the standard domain.
    pub op: &'static str,
    /// Indices of values; none for an optional input that is left out.
    pub inputs: Vec<Option<usize>>,
    /// Indices of values; none for an optional output that is left out.
    pub outputs: Vec<Option<usize>>,
    /// Attributes, in order.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// The value of an operator's attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Attribute {
    /// An integer.
    Int(i64),
    /// A float32, as its bits.
    Float(u32),
    /// Several integers.
    Ints(Vec<i64>),
    /// Text.
    Text(&'static str),
    /// The integer that an attribute of the function's node has, by its name.
    Reference(&'static str),
}

/// The numbers of a constant, before they are rounded to its dtype.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// For the float types.
    Floats(Vec<f64>),
    /// For the integer types.
    Ints(Vec<i64>),
}

/// A small tensor that is part of the graph.
#[derive(Clone, Debug)]
pub struct Constant {
    /// The value it defines.
    pub value: usize,
    /// Its numbers, row-major.
    pub data: Data,
}

/// A weight: a tensor of the checkpoint, or a simple function of one.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The value it defines.
    pub value: usize,
    /// The tensors of the checkpoint that it is made from, concatenated along the first axis.
    pub parts: Vec<Part>,
    /// What is done to their numbers before they are rounded to the value's dtype.
    pub adjust: Adjust,
}

/// A tensor of the checkpoint, or some of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The checkpoint's name of the tensor.
    pub tensor: String,
    /// The dimensions of the tensor.
    pub shape: Vec<usize>,
    /// The entries along the first axis that are taken, ascending; all if none.
    pub kept: Option<Arc<[usize]>>,
}

/// What is done to the numbers of checkpoint tensors on the way into a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Adjust {
    /// Nothing.
    AsIs,
    /// `1 + w`, in float32: the factor of Gemma's RMSNorm.
    OnePlus,
    /// Quantized and packed, see [`Blocks`].
    Packed(Blocks),
    /// Quantized as signed numbers with a zero point of 0 and positive scales, one after the other. A row, or the whole
    /// matrix, is a multiple of blocks.
    Signed(Blocks),
    /// The scales of the packed or signed blocks.
    Scales(Blocks),
    /// The zero points of the packed blocks.
    ZeroPoints(Blocks),
}

impl Definition {
    /// A value's name and type.
    pub fn value(&self, id: usize) -> &ValueInfo {
        &self.values[id]
    }
}

impl Node {
    /// The operator's domain, empty for the standard one, and its name there.
    pub fn operator(&self) -> (&'static str, &'static str) {
        domain_and_name(self.op)
    }
}

impl Attribute {
    /// A number, rounded to float32.
    pub fn float(number: f64) -> Attribute {
        Attribute::Float((number as f32).to_bits())
    }
}

impl Part {
    /// How many numbers are taken.
    pub fn numbers(&self) -> usize {
        let rows = self.kept.as_ref().map_or(self.shape[0], |kept| kept.len());
        rows * self.shape[1..].iter().product::<usize>()
    }
}

pub(super) fn domain_and_name(op: &'static str) -> (&'static str, &'static str) {
    op.rsplit_once('.').unwrap_or(("", op))
}
