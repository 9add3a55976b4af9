//! Checks the nodes of a graph in order, and infers the types of tensors from the inputs on.

use std::collections::HashMap;

use super::Checker;
use super::FindingKind::{Domain, Empty, Operator, Rule, StrongTyping, Type, Version};
use crate::proto::read::{Attribute, Graph, Node};
use crate::tensorrt::operators::{self, result_type, type_name};

const NOT_IMPORTED: &str = "not imported: the engine would be split here";

/// The type and shape of a tensor, as far as they are known.
#[derive(Clone, Default)]
pub(super) struct TensorType {
    /// The element type, by the table's names.
    pub dtype: Option<&'static str>,
    pub shape: Option<Vec<Option<i64>>>,
}

/// The graph or subgraph that a node is in.
pub(super) struct Scope<'g> {
    pub graph: &'g Graph,
    pub is_subgraph: bool,
    /// The tensors that are defined so far.
    pub known: HashMap<String, TensorType>,
}

impl Scope<'_> {
    pub fn dtype(&self, tensor: &str) -> Option<&'static str> {
        self.known.get(tensor)?.dtype
    }
}

impl Checker<'_> {
    pub(super) fn check_graph(&mut self) {
        let (newest, opset) = (self.table.newest_opset, self.model.opset);
        if opset > newest {
            self.report_tensor("model", Version, format!("operator set {opset}, newer than {newest}"));
        }
        self.check_nodes(Scope { graph: &self.model.graph, is_subgraph: false, known: HashMap::new() });
    }

    fn check_nodes(&mut self, mut scope: Scope) {
        let graph = scope.graph;
        for (name, tensor) in &graph.initializers {
            let shape = Some(tensor.shape.iter().copied().map(Some).collect());
            self.check_declaration(name, tensor.dtype, &shape);
            scope.known.insert(name.clone(), TensorType { dtype: type_name(tensor.dtype), shape });
        }
        for input in &graph.inputs {
            self.check_declaration(&input.name, input.dtype, &input.shape);
            let tensor_type = TensorType { dtype: type_name(input.dtype), shape: input.shape.clone() };
            scope.known.insert(input.name.clone(), tensor_type);
        }
        let declared: HashMap<&str, TensorType> = (graph.value_info.iter().chain(&graph.outputs))
            .map(|value| {
                let tensor_type = TensorType { dtype: type_name(value.dtype), shape: value.shape.clone() };
                (value.name.as_str(), tensor_type)
            })
            .collect();
        for node in &graph.nodes {
            let is_function =
                self.model.functions.iter().any(|(domain, name)| (domain, name) == (&node.domain, &node.op));
            if !is_function {
                self.check_node(node, &scope);
            }
            for attribute in node.attributes.values() {
                let Attribute::Graphs(graphs) = attribute else { continue };
                for graph in graphs {
                    self.check_nodes(Scope { graph, is_subgraph: true, known: scope.known.clone() });
                }
            }
            for (index, output) in node.outputs.iter().enumerate().filter(|(_, output)| !output.is_empty()) {
                let declared = declared.get(output.as_str()).cloned().unwrap_or_default();
                let input = |input: usize| scope.dtype(node.inputs.get(input)?);
                let inferred = if is_function { None } else { result_type(node, index, input) };
                if let (Some(inferred), Some(declared)) = (inferred, declared.dtype)
                    && inferred != declared
                {
                    let reason = format!("{output} is declared as {declared}, but its inputs imply {inferred}");
                    self.report_node(node, StrongTyping, reason);
                }
                if declared.shape.as_ref().is_some_and(|shape| shape.contains(&Some(0))) {
                    self.report_node(node, Empty, format!("{output} has no elements"));
                }
                let tensor_type = TensorType { dtype: inferred.or(declared.dtype), shape: declared.shape };
                scope.known.insert(output.clone(), tensor_type);
            }
        }
    }

    /// Checks the type and shape of an input or initializer.
    fn check_declaration(&mut self, name: &str, dtype: i32, shape: &Option<Vec<Option<i64>>>) {
        match type_name(dtype) {
            Some("FP64") => self.report_tensor(name, Type, "FP64, which is converted to FP32"),
            None => self.report_tensor(name, Type, format!("ONNX type {dtype}, which TensorRT does not support")),
            Some(_) => {}
        }
        let Some(shape) = shape else { return };
        if shape.contains(&Some(0)) {
            self.report_tensor(name, Empty, "a tensor without elements");
        }
        let (rank, largest) = (shape.len(), self.table.largest_rank);
        if rank > largest {
            self.report_tensor(name, Rule, format!("{rank} dimensions, more than {largest}"));
        }
    }

    fn check_node(&mut self, node: &Node, scope: &Scope) {
        let table = self.table;
        let listed = table.operators.get(&node.op);
        if !node.domain.is_empty() {
            // ONNX Runtime passes a prebuilt engine to TensorRT as it is.
            if (node.domain.as_str(), node.op.as_str()) == ("com.microsoft", "EPContext") {
                return;
            }
            if listed.is_some() || table.not_imported.contains(&node.op) {
                let reason = "the parser ignores domains and would take this for the standard operator";
                self.report_node(node, Domain, reason);
            } else if !table.plugins.contains(&node.op) {
                self.report_node(node, Operator, NOT_IMPORTED);
            }
            return;
        }
        let Some(listed) = listed else {
            if !table.plugins.contains(&node.op) {
                self.report_node(node, Operator, NOT_IMPORTED);
            }
            return;
        };
        if let Some(since) = listed.since.as_deref().filter(|since| !self.version.has(since)) {
            self.report_node(node, Version, format!("requires TensorRT {since} (got {})", self.version));
        }
        self.check_types(node, listed, scope);
        self.check_rules(node, listed, scope);
    }

    fn check_types(&mut self, node: &Node, listed: &operators::Operator, scope: &Scope) {
        let is_allowed = |dtype: &str| listed.types.split(' ').any(|listed| listed == dtype);
        let first_data = usize::from(node.op == "Where");
        let quantizes = matches!(node.op.as_str(), "QuantizeLinear" | "DequantizeLinear");
        for (index, input) in node.inputs.iter().enumerate().filter(|(_, input)| !input.is_empty()) {
            let Some(dtype) = scope.dtype(input) else { continue };
            // Integers after the first input are axes, shapes and indices.
            let is_data = index == first_data || matches!(dtype, "FP32" | "FP16" | "BF16" | "FP64");
            if is_data && !(quantizes && index > 0) && !is_allowed(dtype) {
                self.report_node(
                    node,
                    Type,
                    format!("input {index} ({input}) is {dtype}, not one of {}", listed.types),
                );
            }
        }
        let indices = match operators::inputs_of_one_type(&node.op) {
            Some([]) => (0..node.inputs.len()).collect(),
            Some(indices) => indices.to_vec(),
            None => return,
        };
        let typed = indices.iter().filter_map(|&index| Some((index, scope.dtype(node.inputs.get(index)?)?)));
        let typed: Vec<(usize, &str)> = typed.collect();
        if let Some(&(index, other)) = typed.iter().find(|(_, dtype)| *dtype != typed[0].1) {
            let (first, dtype) = typed[0];
            let reason = format!("input {first} is {dtype} and input {index} is {other}; they must have one type");
            self.report_node(node, StrongTyping, reason);
        }
    }
}
