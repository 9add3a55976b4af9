//! ONNX files: graph definitions encoded as protobuf, and decoded as far as `inspect` and `check` need. The only module
//! that uses protobuf.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use half::{bf16, f16};
use prost::Message;
use t5gemma_graphs::interface::{Port, Ports};
use t5gemma_graphs::onnx::{Attribute, Constant, DType, Data, Definition, Dim, Function, Node, ValueInfo};

use crate::error::{Error, Result};
use crate::quantize::float8_code;

use onnx::attribute_proto::AttributeType;
use onnx::tensor_proto::{DataLocation, DataType};
use onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto, type_proto,
};

pub mod read;

#[allow(missing_docs, clippy::all, rustdoc::all)]
mod onnx {
    include!("../proto/onnx.rs");
}

/// The IR version that goes with a version of the standard operator set.
fn ir_version(opset: u32) -> i64 {
    match opset {
        ..=20 => 9,
        21..=22 => 10,
        _ => 11,
    }
}

/// Where a weight is stored.
#[derive(Clone, Debug)]
pub struct Location {
    /// Name of the weights file.
    pub file: String,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Encodes a graph as an ONNX file. `location` returns where an initializer is stored, by name.
pub fn encode(graph: &Definition, opset: u32, location: impl Fn(&str) -> Location) -> Vec<u8> {
    let constants = graph.constants.iter().map(|constant| inline(graph, constant));
    let weights = graph.parameters.iter().map(|parameter| {
        let info = graph.value(parameter.value);
        let at = location(&info.name);
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
        TensorProto {
            data_location: Some(DataLocation::External as i32),
            external_data: vec![
                entry("location", at.file),
                entry("offset", at.offset.to_string()),
                entry("length", at.bytes.to_string()),
            ],
            ..tensor(info)
        }
    });
    let infos = |ids: &[usize]| ids.iter().map(|&id| value_info(graph.value(id))).collect();
    let intermediate: Vec<usize> = graph
        .nodes
        .iter()
        .flat_map(|node| node.outputs.iter().copied().flatten())
        .filter(|id| !graph.outputs.contains(id))
        .collect();
    let bodies = graph.functions.iter().map(|function| &function.body);
    let opsets = opsets([graph].into_iter().chain(bodies), opset);
    let model = ModelProto {
        ir_version: Some(ir_version(opset)),
        opset_import: opsets,
        producer_name: Some(env!("CARGO_PKG_NAME").into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        graph: Some(GraphProto {
            name: Some(graph.name.clone()),
            node: graph.nodes.iter().map(|node| node_proto(graph, node)).collect(),
            initializer: constants.chain(weights).collect(),
            input: infos(&graph.inputs),
            output: infos(&graph.outputs),
            value_info: infos(&intermediate),
            ..Default::default()
        }),
        functions: graph.functions.iter().map(|function| function_proto(function, opset)).collect(),
        ..Default::default()
    };
    model.encode_to_vec()
}

/// The operator sets of graphs: the standard one in version `opset`, and the others that they use.
fn opsets<'g>(graphs: impl Iterator<Item = &'g Definition>, opset: u32) -> Vec<OperatorSetIdProto> {
    let nodes = graphs.flat_map(|graph| &graph.nodes);
    let others: BTreeSet<&str> = nodes.map(|node| node.operator().0).filter(|domain| !domain.is_empty()).collect();
    let all = [("", opset)].into_iter().chain(others.into_iter().map(|domain| (domain, 1)));
    all.map(|(domain, version)| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version.into()) })
        .collect()
}

fn node_proto(graph: &Definition, node: &Node) -> NodeProto {
    let name = |id: &Option<usize>| id.map_or_else(String::new, |id| graph.value(id).name.clone());
    let names = |ids: &[Option<usize>]| ids.iter().map(name).collect();
    NodeProto {
        name: Some(node.name.clone()),
        op_type: Some(node.operator().1.into()),
        domain: Some(node.operator().0).filter(|domain| !domain.is_empty()).map(Into::into),
        input: names(&node.inputs),
        output: names(&node.outputs),
        attribute: node.attributes.iter().map(|(name, value)| attribute(name, value)).collect(),
        ..Default::default()
    }
}

/// A function, whose constants are nodes: it has no initializers.
fn function_proto(function: &Function, opset: u32) -> FunctionProto {
    let Function { op, attributes, body } = function;
    let (domain, name) = op.rsplit_once('.').unwrap_or(("", op));
    let constants = body.constants.iter().map(|constant| NodeProto {
        name: Some(body.value(constant.value).name.clone()),
        op_type: Some("Constant".into()),
        output: vec![body.value(constant.value).name.clone()],
        attribute: vec![AttributeProto {
            name: Some("value".into()),
            r#type: Some(AttributeType::Tensor as i32),
            t: Some(TensorProto { name: None, ..inline(body, constant) }),
            ..Default::default()
        }],
        ..Default::default()
    });
    let names = |ids: &[usize]| ids.iter().map(|&id| body.value(id).name.clone()).collect();
    FunctionProto {
        name: Some(name.into()),
        domain: Some(domain.into()),
        input: names(&body.inputs),
        output: names(&body.outputs),
        attribute: attributes.iter().map(|&name| name.into()).collect(),
        node: constants.chain(body.nodes.iter().map(|node| node_proto(body, node))).collect(),
        opset_import: opsets([body].into_iter(), opset),
        ..Default::default()
    }
}

/// Encodes a model of one `EPContext` node, through which ONNX Runtime runs a prebuilt engine of the graph in the file
/// `graph`. `engine` is the engine's path relative to the wrapper.
pub fn wrapper(name: &str, engine: &str, graph: &str, ports: &Ports) -> Vec<u8> {
    let info =
        |port: &Port| value_info(&ValueInfo { name: port.name.clone(), dtype: port.dtype, shape: port.shape.clone() });
    let names = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect();
    let text = |name: &str, text: &str| AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::String as i32),
        s: Some(text.as_bytes().to_vec()),
        ..Default::default()
    };
    let node = NodeProto {
        name: Some(format!("{name}_engine")),
        op_type: Some("EPContext".into()),
        domain: Some("com.microsoft".into()),
        input: names(&ports.inputs),
        output: names(&ports.outputs),
        attribute: vec![
            attribute("main_context", &Attribute::Int(1)),
            attribute("embed_mode", &Attribute::Int(0)),
            text("ep_cache_context", engine),
            text("source", "TensorrtExecutionProvider"),
            text("onnx_model_filename", graph),
        ],
        ..Default::default()
    };
    let opsets = [("", 21), ("com.microsoft", 1)];
    let opsets =
        opsets.map(|(domain, version)| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) });
    let model = ModelProto {
        ir_version: Some(ir_version(21)),
        opset_import: opsets.to_vec(),
        producer_name: Some(env!("CARGO_PKG_NAME").into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        graph: Some(GraphProto {
            name: Some(name.into()),
            node: vec![node],
            input: ports.inputs.iter().map(info).collect(),
            output: ports.outputs.iter().map(info).collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    model.encode_to_vec()
}

/// What `inspect` shows of an ONNX file.
pub struct Summary {
    /// Version of the standard operator set.
    pub opset: i64,
    /// Version of ONNX's intermediate representation.
    pub ir_version: i64,
    /// Number of nodes by operator.
    pub operators: BTreeMap<String, usize>,
}

/// Summarizes the ONNX file at `path`, whose content is `bytes`.
///
/// # Errors
/// If the bytes are not an ONNX model.
pub fn summary(path: &Path, bytes: &[u8]) -> Result<Summary> {
    let (model, graph) = decode(path, bytes)?;
    let mut operators = BTreeMap::new();
    for node in &graph.node {
        let domain = node.domain.as_deref().filter(|domain| !domain.is_empty());
        let op = node.op_type();
        *operators.entry(domain.map_or_else(|| op.into(), |domain| format!("{domain}.{op}"))).or_insert(0) += 1;
    }
    let standard = model.opset_import.iter().find(|set| set.domain().is_empty());
    Ok(Summary {
        opset: standard.map_or(0, OperatorSetIdProto::version),
        ir_version: model.ir_version.unwrap_or(0),
        operators,
    })
}

/// Decodes the ONNX file at `path` into its model and its graph.
fn decode(path: &Path, bytes: &[u8]) -> Result<(ModelProto, GraphProto)> {
    let mut model = ModelProto::decode(bytes).map_err(|error| Error::Parse {
        path: path.to_path_buf(),
        expected: "an ONNX model",
        source: Box::new(error),
    })?;
    let graph =
        model.graph.take().ok_or_else(|| Error::invalid(path.display(), "an ONNX model with a graph", "none"))?;
    Ok((model, graph))
}

fn data_type(dtype: DType) -> i32 {
    let code = match dtype {
        DType::Float32 => DataType::Float,
        DType::Float16 => DataType::Float16,
        DType::BFloat16 => DataType::Bfloat16,
        DType::Int64 => DataType::Int64,
        DType::Int32 => DataType::Int32,
        DType::UInt8 => DataType::Uint8,
        DType::Int8 => DataType::Int8,
        DType::Int4 => DataType::Int4,
        DType::Float8E4M3FN => DataType::Float8e4m3fn,
        DType::Bool => DataType::Bool,
    };
    code as i32
}

fn tensor(info: &ValueInfo) -> TensorProto {
    let size = |dim: &Dim| dim.as_fixed().expect("initializers have fixed sizes") as i64;
    TensorProto {
        name: Some(info.name.clone()),
        data_type: Some(data_type(info.dtype)),
        dims: info.shape.iter().map(size).collect(),
        ..Default::default()
    }
}

fn inline(graph: &Definition, constant: &Constant) -> TensorProto {
    let info = graph.value(constant.value);
    let raw: Vec<u8> = match &constant.data {
        Data::Ints(numbers) if info.dtype == DType::Int32 => {
            numbers.iter().flat_map(|&number| (number as i32).to_le_bytes()).collect()
        }
        Data::Ints(numbers) if info.dtype == DType::Int8 => numbers.iter().map(|&number| number as i8 as u8).collect(),
        Data::Ints(numbers) => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
        Data::Floats(numbers) => numbers
            .iter()
            .flat_map(|&number| match info.dtype {
                DType::Float16 => f16::from_f64(number).to_le_bytes().to_vec(),
                DType::BFloat16 => bf16::from_f64(number).to_le_bytes().to_vec(),
                DType::Float8E4M3FN => vec![float8_code(number as f32)],
                _ => (number as f32).to_le_bytes().to_vec(),
            })
            .collect(),
    };
    TensorProto { raw_data: Some(raw), ..tensor(info) }
}

fn attribute(name: &str, value: &Attribute) -> AttributeProto {
    let named = AttributeProto { name: Some(name.into()), ..Default::default() };
    match value {
        Attribute::Int(i) => AttributeProto { r#type: Some(AttributeType::Int as i32), i: Some(*i), ..named },
        Attribute::Float(bits) => {
            AttributeProto { r#type: Some(AttributeType::Float as i32), f: Some(f32::from_bits(*bits)), ..named }
        }
        Attribute::Ints(ints) => {
            AttributeProto { r#type: Some(AttributeType::Ints as i32), ints: ints.clone(), ..named }
        }
        Attribute::Text(s) => {
            AttributeProto { r#type: Some(AttributeType::String as i32), s: Some(s.as_bytes().to_vec()), ..named }
        }
        Attribute::Reference(of) => {
            AttributeProto { r#type: Some(AttributeType::Int as i32), ref_attr_name: Some((*of).into()), ..named }
        }
    }
}

fn value_info(info: &ValueInfo) -> ValueInfoProto {
    let dim = |dim: &Dim| tensor_shape_proto::Dimension {
        value: Some(match dim.as_fixed() {
            Some(size) => tensor_shape_proto::dimension::Value::DimValue(size as i64),
            None => tensor_shape_proto::dimension::Value::DimParam(dim.to_string()),
        }),
        ..Default::default()
    };
    let tensor_type = type_proto::Tensor {
        elem_type: Some(data_type(info.dtype)),
        shape: Some(TensorShapeProto { dim: info.shape.iter().map(dim).collect() }),
    };
    ValueInfoProto {
        name: Some(info.name.clone()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor_type)), ..Default::default() }),
        ..Default::default()
    }
}
