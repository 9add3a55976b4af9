//! An ONNX file as plain data for `check`: the graph, the types and locations of tensors, and the values of small ones.

use std::collections::BTreeMap;
use std::path::Path;

use super::onnx::tensor_proto::DataLocation;
use super::onnx::tensor_shape_proto::dimension::Value as Size;
use super::onnx::{self, AttributeProto, GraphProto, TensorProto, ValueInfoProto, type_proto};
use crate::error::Result;

/// Maximum number of elements of a constant whose values are read, to check limits on them.
const SMALL: usize = 64;

/// An ONNX file.
pub struct Model {
    /// Version of the standard operator set.
    pub opset: i64,
    /// The graph.
    pub graph: Graph,
    /// Domain and name of the functions that the file defines.
    pub functions: Vec<(String, String)>,
}

/// A graph, or a subgraph of an operator.
#[derive(Default)]
pub struct Graph {
    /// Nodes in order.
    pub nodes: Vec<Node>,
    /// Initializers by name.
    pub initializers: BTreeMap<String, Initializer>,
    /// Inputs, without initializers.
    pub inputs: Vec<Value>,
    /// Outputs.
    pub outputs: Vec<Value>,
    /// Type and shape of intermediate tensors, where the file has them.
    pub value_info: Vec<Value>,
}

/// A node.
pub struct Node {
    /// Name; may be empty.
    pub name: String,
    /// Domain of the operator; empty for the standard one.
    pub domain: String,
    /// Operator.
    pub op: String,
    /// Tensor names; empty for omitted optional inputs.
    pub inputs: Vec<String>,
    /// Tensor names; empty for omitted optional outputs.
    pub outputs: Vec<String>,
    /// Attributes by name.
    pub attributes: BTreeMap<String, Attribute>,
}

/// The value of an attribute, if a check depends on it.
pub enum Attribute {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// Text.
    Text(String),
    /// A tensor.
    Tensor(Initializer),
    /// Subgraphs.
    Graphs(Vec<Graph>),
    /// Anything else.
    Other,
}

/// A tensor with a value in the file or in external data.
pub struct Initializer {
    /// ONNX's code of the element type.
    pub dtype: i32,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// Where the value is, if in external data.
    pub external: Option<ExternalData>,
    /// The values of a small integer tensor.
    pub ints: Option<Vec<i64>>,
}

/// Name, type and shape of a tensor.
pub struct Value {
    /// Name.
    pub name: String,
    /// ONNX's code of the element type; 0 if it is unknown.
    pub dtype: i32,
    /// Dimensions, `None` for dynamic ones; `None` if even the rank is unknown.
    pub shape: Option<Vec<Option<i64>>>,
    /// Names of the dynamic dimensions, empty for the others.
    pub symbols: Vec<String>,
}

/// Where a tensor is in external data.
pub struct ExternalData {
    /// File, relative to the model's folder.
    pub file: String,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, if the file states it.
    pub length: Option<u64>,
}

/// Reads the ONNX file at `path`, whose content is `bytes`.
///
/// # Errors
/// If the bytes are not an ONNX model.
pub fn read(path: &Path, bytes: &[u8]) -> Result<Model> {
    let (model, main) = super::decode(path, bytes)?;
    let standard = model.opset_import.iter().find(|set| matches!(set.domain(), "" | "ai.onnx"));
    Ok(Model {
        opset: standard.map_or(0, |set| set.version()),
        functions: model.functions.iter().map(|f| (f.domain().to_string(), f.name().to_string())).collect(),
        graph: graph(main),
    })
}

fn graph(graph: GraphProto) -> Graph {
    let initializers: BTreeMap<String, Initializer> =
        graph.initializer.iter().map(|tensor| (tensor.name().to_string(), initializer(tensor))).collect();
    Graph {
        nodes: graph.node.into_iter().map(node).collect(),
        inputs: graph.input.iter().map(value).filter(|input| !initializers.contains_key(&input.name)).collect(),
        outputs: graph.output.iter().map(value).collect(),
        value_info: graph.value_info.iter().map(value).collect(),
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
    let number = |key: &str| entry(key).and_then(|text| text.parse().ok());
    let external = (tensor.data_location() == DataLocation::External).then(|| ExternalData {
        file: entry("location").unwrap_or_default(),
        offset: number("offset").unwrap_or(0),
        length: number("length"),
    });
    let elements = tensor.dims.iter().product::<i64>();
    let ints = (external.is_none() && (0..=SMALL as i64).contains(&elements)).then(|| integers(tensor)).flatten();
    Initializer { dtype: tensor.data_type(), shape: tensor.dims.clone(), external, ints }
}

fn integers(tensor: &TensorProto) -> Option<Vec<i64>> {
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
