//! An ONNX file as plain data, for `check`: of tensors what they are and where they lie, and the numbers of small ones.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use prost::Message;

use super::onnx::tensor_proto::DataLocation;
use super::onnx::tensor_shape_proto::dimension::Value as Size;
use super::onnx::{self, AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, type_proto};

/// Numbers of a constant that are read, so that a limit on it can be held to.
const SMALL: usize = 64;

/// A model file.
pub struct Model {
    /// Version of the standard operator set.
    pub opset: i64,
    /// The graph.
    pub graph: Graph,
    /// Domain and name of the functions that it defines.
    pub functions: Vec<(String, String)>,
}

/// A graph, or a part of one that an operator runs.
#[derive(Default)]
pub struct Graph {
    /// Operators in order.
    pub nodes: Vec<Node>,
    /// Constants by name.
    pub initializers: BTreeMap<String, Initializer>,
    /// What a run is given, initializers left out.
    pub inputs: Vec<Value>,
    /// What a run returns.
    pub outputs: Vec<Value>,
    /// What is said of tensors between.
    pub between: Vec<Value>,
}

/// An operator.
pub struct Node {
    /// Its name, which may be empty.
    pub name: String,
    /// Its domain, empty for the standard one.
    pub domain: String,
    /// What it does.
    pub op: String,
    /// Names of tensors; empty for those left out.
    pub inputs: Vec<String>,
    /// Names of tensors; empty for those left out.
    pub outputs: Vec<String>,
    /// Attributes by name.
    pub attributes: BTreeMap<String, Attribute>,
}

/// An attribute's value, as far as anything depends on it.
pub enum Attribute {
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Text.
    Text(String),
    /// A constant.
    Tensor(Initializer),
    /// Graphs to run.
    Graphs(Vec<Graph>),
    /// Anything else.
    Other,
}

/// A tensor that the file defines.
pub struct Initializer {
    /// Type by its number in ONNX.
    pub dtype: i32,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// File, first byte and length, where it lies outside.
    pub external: Option<(String, u64, Option<u64>)>,
    /// The numbers, where they are few and whole.
    pub ints: Option<Vec<i64>>,
}

/// A tensor's name and what is said of it.
pub struct Value {
    /// Its name.
    pub name: String,
    /// Type by its number in ONNX; 0 if nothing is said.
    pub dtype: i32,
    /// Dimensions, none where they vary; nothing where even their number is not said.
    pub shape: Option<Vec<Option<i64>>>,
    /// The names of the dimensions that vary, empty for the others.
    pub symbols: Vec<String>,
}

/// Reads an ONNX file.
///
/// # Errors
/// If the bytes are not an ONNX model.
pub fn read(bytes: &[u8]) -> Result<Model> {
    let model = ModelProto::decode(bytes).context("not an ONNX model")?;
    let standard = model.opset_import.iter().find(|set| matches!(set.domain(), "" | "ai.onnx"));
    Ok(Model {
        opset: standard.map_or(0, |set| set.version()),
        functions: model.functions.iter().map(|f| (f.domain().to_string(), f.name().to_string())).collect(),
        graph: graph(model.graph.context("an ONNX model without a graph")?),
    })
}

fn graph(graph: GraphProto) -> Graph {
    let initializers: BTreeMap<String, Initializer> =
        graph.initializer.iter().map(|tensor| (tensor.name().to_string(), initializer(tensor))).collect();
    Graph {
        nodes: graph.node.into_iter().map(node).collect(),
        inputs: graph.input.iter().map(value).filter(|input| !initializers.contains_key(&input.name)).collect(),
        outputs: graph.output.iter().map(value).collect(),
        between: graph.value_info.iter().map(value).collect(),
        initializers,
    }
}

fn node(node: onnx::NodeProto) -> Node {
    Node {
        name: node.name.unwrap_or_default(),
        domain: node.domain.filter(|domain| domain != "ai.onnx").unwrap_or_default(),
        op: node.op_type.unwrap_or_default(),
        inputs: node.input,
        outputs: node.output,
        attributes: node.attribute.into_iter().map(|given| (given.name().to_string(), attribute(given))).collect(),
    }
}

fn attribute(given: AttributeProto) -> Attribute {
    if let Some(text) = given.s {
        return Attribute::Text(String::from_utf8_lossy(&text).into_owned());
    }
    match (given.i, given.f, given.t, given.g) {
        (Some(i), ..) => Attribute::Int(i),
        (_, Some(f), ..) => Attribute::Float(f.into()),
        (_, _, Some(tensor), _) => Attribute::Tensor(initializer(&tensor)),
        (.., Some(g)) => Attribute::Graphs(vec![graph(g)]),
        _ if !given.graphs.is_empty() => Attribute::Graphs(given.graphs.into_iter().map(graph).collect()),
        _ => Attribute::Other,
    }
}

fn initializer(tensor: &TensorProto) -> Initializer {
    let entry =
        |key: &str| tensor.external_data.iter().find(|entry| entry.key() == key).map(|entry| entry.value().to_string());
    let is_external = tensor.data_location() == DataLocation::External;
    let number = |key: &str| entry(key).and_then(|text| text.parse().ok());
    let external =
        is_external.then(|| (entry("location").unwrap_or_default(), number("offset").unwrap_or(0), number("length")));
    let elements = tensor.dims.iter().product::<i64>();
    let ints = (external.is_none() && (0..=SMALL as i64).contains(&elements)).then(|| whole(tensor)).flatten();
    Initializer { dtype: tensor.data_type(), shape: tensor.dims.clone(), external, ints }
}

fn whole(tensor: &TensorProto) -> Option<Vec<i64>> {
    let raw = tensor.raw_data();
    match (tensor.data_type(), raw.is_empty()) {
        (7, true) => Some(tensor.int64_data.clone()),
        (7, false) => Some(raw.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()),
        (6, false) => Some(raw.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes).into()).collect()),
        (2 | 3 | 9, false) => Some(raw.iter().map(|&byte| byte.into()).collect()),
        (2 | 3 | 6 | 9, true) => Some(tensor.int32_data.iter().map(|&number| number.into()).collect()),
        _ => None,
    }
}

fn value(value: &ValueInfoProto) -> Value {
    let name = value.name().to_string();
    let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_ref().and_then(|typed| typed.value.as_ref())
    else {
        return Value { name, dtype: 0, shape: None, symbols: Vec::new() };
    };
    let dims = tensor.shape.as_ref().map(|shape| shape.dim.iter().map(|dim| dim.value.as_ref()));
    let size = |dim: Option<&Size>| match dim {
        Some(Size::DimValue(size)) => Some(*size),
        _ => None,
    };
    let symbol = |dim: Option<&Size>| match dim {
        Some(Size::DimParam(name)) => name.clone(),
        _ => String::new(),
    };
    let symbols = dims.clone().into_iter().flatten().map(symbol).collect();
    Value { name, dtype: tensor.elem_type(), shape: dims.map(|dims| dims.map(size).collect()), symbols }
}
