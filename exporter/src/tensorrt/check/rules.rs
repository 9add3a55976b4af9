//! Checks the rules of an operator in the table: attributes, constants, ranks, and connections to inputs and outputs of
//! the graph.

use super::graph::Scope;
use super::{Checker, FindingKind};
use crate::proto::read::{Attribute, Initializer, Node, Value};
use crate::tensorrt::operators::{Operator, Rules};

impl Checker<'_> {
    pub(super) fn check_rules(&mut self, node: &Node, listed: &Operator, scope: &Scope) {
        let note = if listed.note.is_empty() { String::new() } else { format!(" ({})", listed.note) };
        let checked = NodeInScope { node, scope };
        let violations =
            [checked.attributes(&listed.rules), checked.inputs(&listed.rules), checked.ports(&listed.rules)];
        for reason in violations.into_iter().flatten() {
            self.report_node(node, FindingKind::Rule, reason + &note);
        }
    }
}

struct NodeInScope<'n> {
    node: &'n Node,
    scope: &'n Scope<'n>,
}

impl<'n> NodeInScope<'n> {
    /// The name of an input, if it is present.
    fn input(&self, index: usize) -> Option<&'n String> {
        self.node.inputs.get(index).filter(|input| !input.is_empty())
    }

    fn shape(&self, index: usize) -> Option<&'n [Option<i64>]> {
        self.scope.known.get(self.input(index)?)?.shape.as_deref()
    }

    /// The value of an input, if it is constant.
    fn constant(&self, index: usize) -> Option<&'n Initializer> {
        let (name, graph) = (self.input(index)?, self.scope.graph);
        graph.initializers.get(name).or_else(|| {
            let is_maker = |node: &&Node| node.op == "Constant" && node.outputs.first() == Some(name);
            let maker = graph.nodes.iter().find(is_maker)?;
            maker.attributes.values().find_map(|attribute| match attribute {
                Attribute::Tensor(tensor) => Some(tensor),
                _ => None,
            })
        })
    }

    fn integers(&self, index: usize) -> Option<&'n [i64]> {
        self.constant(index)?.ints.as_deref()
    }

    /// Whether an attribute is set and not 0.
    fn has_attribute(&self, name: &str) -> bool {
        self.node.attributes.get(name).is_some_and(|value| !matches!(value, Attribute::Int(0)))
    }

    fn attributes(&self, rules: &Rules) -> Vec<String> {
        let mut wrong = Vec::new();
        for (name, expected) in &rules.attrs_equal {
            let differs = match self.node.attributes.get(name) {
                Some(Attribute::Int(found)) => expected.as_f64() != Some(*found as f64),
                Some(Attribute::Float(found)) => expected.as_f64() != Some(*found),
                Some(Attribute::Text(found)) => expected.as_str() != Some(found),
                _ => false,
            };
            if differs {
                wrong.push(format!("attribute {name} is not {expected}"));
            }
        }
        for name in rules.attrs_absent.iter().filter(|name| self.has_attribute(name)) {
            wrong.push(format!("attribute {name} is not supported"));
        }
        for pair in &rules.exclusive {
            let is_given = |what: &String| match what.split_once(':') {
                Some(("input", index)) => index.parse().is_ok_and(|index: usize| self.input(index).is_some()),
                Some((_, name)) => self.has_attribute(name),
                None => false,
            };
            if pair.iter().all(is_given) {
                wrong.push(format!("{} and {} cannot be used together", pair[0], pair[1]));
            }
        }
        wrong
    }

    fn inputs(&self, rules: &Rules) -> Vec<String> {
        let mut wrong = Vec::new();
        for &index in rules.forbid_inputs.iter().filter(|&&index| self.input(index).is_some()) {
            wrong.push(format!("input {index} is not supported"));
        }
        for (&index, ranks) in &rules.rank_in {
            if let Some(shape) = self.shape(index).filter(|shape| !ranks.contains(&shape.len())) {
                wrong.push(format!("input {index} has {} dimensions, not one of {ranks:?}", shape.len()));
            }
        }
        for &index in &rules.const_inputs {
            if let Some(input) = self.input(index).filter(|_| self.constant(index).is_none()) {
                wrong.push(format!("input {index} ({input}) is not a constant"));
            }
        }
        for (&index, axes) in &rules.static_dims {
            let is_dynamic = |axis: usize| self.shape(index).is_some_and(|shape| shape.get(axis) == Some(&None));
            for axis in axes.iter().filter(|&&axis| is_dynamic(axis)) {
                wrong.push(format!("axis {axis} of input {index} is dynamic"));
            }
        }
        for (&index, &max) in &rules.const_max {
            let number = self.integers(index).and_then(|numbers| numbers.first().copied());
            if let Some(number) = number.filter(|&number| number > max) {
                wrong.push(format!("input {index} is {number}, above {max}"));
            }
        }
        if let Some(numbers) = rules.zero_point_all_zero.and_then(|index| self.integers(index))
            && numbers.iter().any(|&number| number != 0)
        {
            wrong.push("a zero point is not 0".into());
        }
        for (&index, dtypes) in &rules.input_dtype {
            let dtype = self.input(index).and_then(|input| self.scope.dtype(input));
            if let Some(dtype) = dtype.filter(|dtype| !dtypes.iter().any(|listed| listed == dtype)) {
                wrong.push(format!("input {index} is {dtype}, not one of {}", dtypes.join(" ")));
            }
        }
        wrong
    }

    fn ports(&self, rules: &Rules) -> Vec<String> {
        let mut wrong = Vec::new();
        let outputs = self.node.outputs.iter().filter(|output| !output.is_empty()).count();
        if let Some(max) = rules.max_outputs.filter(|&max| outputs > max) {
            wrong.push(format!("{outputs} outputs, more than {max}"));
        }
        let graph = self.scope.graph;
        let is_among =
            |ports: &[Value], name: &String| !self.scope.is_subgraph && ports.iter().any(|port| port.name == *name);
        for &index in &rules.input_is_graph_input {
            if let Some(input) = self.input(index).filter(|input| !is_among(&graph.inputs, input)) {
                wrong.push(format!("input {index} ({input}) is not an input of the graph"));
            }
        }
        for &index in &rules.output_is_graph_output {
            if let Some(output) = self.node.outputs.get(index).filter(|output| !is_among(&graph.outputs, output)) {
                wrong.push(format!("output {index} ({output}) is not an output of the graph"));
            }
        }
        wrong
    }
}
