//! The table of the operators that TensorRT's ONNX parser imports (`tensorrt/operators.json`, with its sources), and
//! ONNX type rules that the check also needs.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;

use crate::proto::read::{Attribute, Node};

const OPERATORS: &str = include_str!("../../tensorrt/operators.json");

/// The table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    #[serde(rename = "about")]
    _about: String,
    #[serde(rename = "sources")]
    _sources: Vec<String>,
    /// The newest version of the standard operator set that the parser reads.
    pub newest_opset: i64,
    /// Maximum number of dimensions of a tensor.
    pub largest_rank: usize,
    /// Maximum size of a protobuf file in bytes.
    pub largest_protobuf: u64,
    pub operators: HashMap<String, Operator>,
    /// Standard operators that the parser does not import.
    pub not_imported: HashSet<String>,
    /// Operators outside the standard set that TensorRT's plugins implement.
    pub plugins: HashSet<String>,
}

/// A standard operator that the parser imports.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// The first version of TensorRT with the operator, if later than 7.0.
    #[serde(default)]
    pub since: Option<String>,
    /// The element types that it accepts, separated by spaces.
    pub types: String,
    #[serde(default)]
    pub rules: Rules,
    /// What the documentation says beyond the rules.
    #[serde(default)]
    pub note: String,
}

/// Requirements beyond types. Numbers are indices of inputs.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    pub max_outputs: Option<usize>,
    pub forbid_inputs: Vec<usize>,
    pub attrs_equal: BTreeMap<String, serde_json::Value>,
    pub attrs_absent: Vec<String>,
    /// Pairs of `input:N` and `attr:NAME` of which at most one may be given.
    pub exclusive: Vec<[String; 2]>,
    pub rank_in: BTreeMap<usize, Vec<usize>>,
    pub const_inputs: Vec<usize>,
    pub input_is_graph_input: Vec<usize>,
    pub output_is_graph_output: Vec<usize>,
    pub static_dims: BTreeMap<usize, Vec<usize>>,
    pub const_max: BTreeMap<usize, i64>,
    pub zero_point_all_zero: Option<usize>,
    pub input_dtype: BTreeMap<usize, Vec<String>>,
}

impl Table {
    pub fn load() -> Table {
        serde_json::from_str(OPERATORS).expect("the table in the source tree is well-formed")
    }
}

/// The type of a node's output that follows from the types of its inputs, if the operator is known. `input` returns the
/// type of an input by index.
pub fn result_type(node: &Node, output: usize, input: impl Fn(usize) -> Option<&'static str>) -> Option<&'static str> {
    let code = |name: &str| match node.attributes.get(name) {
        Some(Attribute::Int(code)) => i32::try_from(*code).ok().and_then(type_name),
        _ => None,
    };
    match node.op.as_str() {
        _ if !node.domain.is_empty() => None,
        "Cast" => code("to"),
        "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" | "Not" | "IsNaN"
        | "IsInf" => Some("BOOL"),
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" | "NonMaxSuppression" => Some("INT64"),
        "TopK" if output == 1 => Some("INT64"),
        "Where" | "CastLike" => input(1),
        "DequantizeLinear" => input(1),
        "QuantizeLinear" => input(2).or_else(|| code("output_dtype")),
        "ConstantOfShape" | "Constant" => node.attributes.values().find_map(|attribute| match attribute {
            Attribute::Tensor(tensor) => type_name(tensor.dtype),
            _ => None,
        }),
        "OneHot" => input(2),
        "If"
        | "Loop"
        | "Scan"
        | "DynamicQuantizeLinear"
        | "EyeLike"
        | "Unique"
        | "RandomUniform"
        | "RandomNormal"
        | "Bernoulli"
        | "MatMulInteger"
        | "ConvInteger"
        | "SequenceAt"
        | "Dropout"
        | "LayerNormalization" => None,
        _ => input(0),
    }
}

/// The inputs of an operator that must have one type, by index; empty for all inputs. `None` for operators without such
/// a rule.
pub fn inputs_of_one_type(operator: &str) -> Option<&'static [usize]> {
    Some(match operator {
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "MatMul" | "Equal" | "Greater" | "GreaterOrEqual" | "Less"
        | "LessOrEqual" | "And" | "Or" | "Xor" | "PRelu" | "RMSNormalization" | "TensorScatter" => &[0, 1],
        "Gemm" | "LayerNormalization" | "Range" | "Clip" | "Attention" => &[0, 1, 2],
        "Where" => &[1, 2],
        "ScatterElements" | "ScatterND" => &[0, 2],
        "Concat" | "Max" | "Min" | "Sum" | "Mean" | "Einsum" => &[],
        _ => return None,
    })
}

/// The table's name of a type by ONNX's code.
pub fn type_name(code: i32) -> Option<&'static str> {
    Some(match code {
        1 => "FP32",
        2 => "UINT8",
        3 => "INT8",
        6 => "INT32",
        7 => "INT64",
        9 => "BOOL",
        10 => "FP16",
        11 => "FP64",
        16 => "BF16",
        17 => "FP8",
        22 => "INT4",
        23 => "FP4",
        _ => return None,
    })
}

/// Bits of an element by ONNX's code of its type.
pub fn bits(code: i32) -> u32 {
    match code {
        7 | 11 | 13 => 64,
        1 | 6 | 12 => 32,
        4 | 5 | 10 | 16 => 16,
        21..=23 => 4,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_consistent() {
        let table = Table::load();
        let known = ["FP32", "FP16", "BF16", "INT64", "INT32", "BOOL", "INT8", "UINT8", "INT4", "FP8", "FP4"];
        for (name, operator) in &table.operators {
            assert!(operator.types.split(' ').all(|dtype| known.contains(&dtype)), "{name}: {}", operator.types);
            assert!(!table.not_imported.contains(name), "{name} is listed as imported and as not imported");
            assert!(!table.plugins.contains(name), "{name} is listed as an operator and as a plugin");
        }
        // Keys of JSON objects are strings; these must have become indices.
        assert_eq!(table.operators["TensorScatter"].rules.static_dims.keys().next(), Some(&0));
    }

    /// The operators of all graphs for TensorRT, and those that a lowering for it must avoid.
    #[test]
    fn the_table_tells_imported_operators_from_others() {
        let table = Table::load();
        for name in ["MatMul", "Softmax", "DequantizeLinear", "GroupNormalization", "TopK", "Gelu"] {
            assert!(table.operators.contains_key(name), "{name}");
        }
        for name in ["BitShift", "DynamicQuantizeLinear", "MatMulInteger"] {
            assert!(table.not_imported.contains(name), "{name}");
        }
    }
}
