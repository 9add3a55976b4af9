//! The arena of a graph under construction.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::Location;

use super::definition::domain_and_name;
use super::{Adjust, Attribute, Constant, DType, Data, Definition, Dim, Function, Node, Parameter, Part, ValueInfo};

/// A graph under construction.
pub struct Graph {
    state: RefCell<State>,
}

/// A tensor of a graph under construction: a copyable handle.
#[derive(Clone, Copy)]
pub struct Value<'g> {
    pub(super) graph: &'g Graph,
    pub(super) id: usize,
}

/// Puts a path before the names of nodes until it is dropped.
pub struct Scope<'g> {
    graph: &'g Graph,
    outer: String,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    op: &'static str,
    inputs: Vec<Option<usize>>,
    attributes: Vec<(&'static str, Attribute)>,
}

#[derive(Default)]
struct State {
    scope: String,
    values: Vec<ValueInfo>,
    nodes: Vec<Node>,
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    constants: Vec<Constant>,
    parameters: Vec<Parameter>,
    /// Nodes already written, by their operator, inputs and attributes.
    written: HashMap<Key, Vec<Option<usize>>>,
    names: HashMap<String, usize>,
    /// See [`Graph::observe`].
    observed: Vec<(String, usize)>,
    functions: Vec<Function>,
}

impl State {
    fn add(&mut self, name: String, dtype: DType, shape: Vec<Dim>) -> usize {
        self.values.push(ValueInfo { name, dtype, shape });
        self.values.len() - 1
    }

    /// `name`, or `name_1`, `name_2`, … if it is taken.
    fn unique(&mut self, name: String) -> String {
        let count = self.names.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { name } else { format!("{name}_{}", *count - 1) }
    }

    fn is_terminal(&self, id: usize) -> bool {
        self.inputs.contains(&id)
            || self.outputs.contains(&id)
            || self.constants.iter().any(|constant| constant.value == id)
            || self.parameters.iter().any(|parameter| parameter.value == id)
    }
}

impl Graph {
    /// An empty graph.
    #[allow(clippy::new_without_default)] // a graph is begun, not defaulted
    pub fn new() -> Graph {
        Graph { state: RefCell::new(State::default()) }
    }

    /// Declares the next input.
    pub fn input(&self, name: &str, dtype: DType, shape: &[Dim]) -> Value<'_> {
        let mut state = self.state.borrow_mut();
        let id = state.add(name.to_string(), dtype, shape.to_vec());
        state.inputs.push(id);
        Value { graph: self, id }
    }

    /// The input of this name, if it has been declared.
    pub fn declared_input(&self, name: &str) -> Option<Value<'_>> {
        let state = self.state.borrow();
        let id = state.inputs.iter().copied().find(|&id| state.values[id].name == name)?;
        Some(Value { graph: self, id })
    }

    /// Declares `value` as the next output, called `name`.
    pub fn output(&self, name: &str, value: Value<'_>) {
        let terminal = self.state.borrow().is_terminal(value.id);
        // An input, weight or other output keeps its name; a copy of it gets the new one.
        let value = if terminal { value.identity() } else { value };
        let mut state = self.state.borrow_mut();
        state.values[value.id].name = name.to_string();
        state.outputs.push(value.id);
    }

    /// A weight: tensors of the checkpoint, concatenated along the first axis, rounded to `dtype` after `adjust`.
    /// `name` is that of the unadjusted tensor; the same bytes can be had in several shapes under several names.
    ///
    /// # Panics
    /// If the name has been used for another dtype or shape.
    pub fn parameter(&self, name: &str, parts: &[Part], dtype: DType, shape: &[usize], adjust: Adjust) -> Value<'_> {
        let mut state = self.state.borrow_mut();
        let name = match adjust {
            Adjust::AsIs => name.to_string(),
            Adjust::OnePlus => format!("{name}.one_plus"),
            Adjust::Packed(blocks) | Adjust::Signed(blocks) => format!("{name}.{}", blocks.name()),
            Adjust::Scales(_) => format!("{name}.scales"),
            Adjust::ZeroPoints(_) => format!("{name}.zero_points"),
        };
        let known = state.parameters.iter().find(|known| state.values[known.value].name == name);
        let id = match known {
            Some(known) => {
                let (info, expected) = (&state.values[known.value], Dim::all(shape));
                assert!(
                    info.dtype == dtype && info.shape == expected,
                    "{name} is used as {} {:?} and as {dtype} {shape:?}",
                    info.dtype,
                    info.shape
                );
                known.value
            }
            None => {
                let id = state.add(name, dtype, Dim::all(shape));
                state.parameters.push(Parameter { value: id, parts: parts.to_vec(), adjust });
                id
            }
        };
        Value { graph: self, id }
    }

    /// A tensor whose numbers are part of the graph; equal ones are written once.
    ///
    /// # Panics
    /// If the numbers are not of the dtype's kind, or not as many as the shape has.
    pub fn constant(&self, dtype: DType, shape: &[usize], data: Data) -> Value<'_> {
        let count = match &data {
            Data::Floats(numbers) if dtype.is_float() || dtype == DType::Float8E4M3FN => numbers.len(),
            Data::Ints(numbers) if matches!(dtype, DType::Int64 | DType::Int32 | DType::Int8) => numbers.len(),
            other => panic!("a constant of {dtype} cannot hold {other:?}"),
        };
        assert_eq!(count, shape.iter().product::<usize>(), "a constant of shape {shape:?}");
        let mut state = self.state.borrow_mut();
        let known = state.constants.iter().find(|known| {
            let info = &state.values[known.value];
            known.data == data && info.dtype == dtype && info.shape == Dim::all(shape)
        });
        let id = match known {
            Some(known) => known.value,
            None => {
                let name = format!("constant_{}", state.constants.len());
                let id = state.add(name, dtype, Dim::all(shape));
                state.constants.push(Constant { value: id, data });
                id
            }
        };
        Value { graph: self, id }
    }

    /// A named float32 tensor whose numbers are part of the graph: computed once, however often it is asked for.
    pub fn table(&self, name: &str, shape: &[usize], numbers: impl FnOnce() -> Vec<f64>) -> Value<'_> {
        let known = {
            let state = self.state.borrow();
            state.constants.iter().find(|known| state.values[known.value].name == name).map(|known| known.value)
        };
        let id = known.unwrap_or_else(|| {
            let numbers = numbers();
            assert_eq!(numbers.len(), shape.iter().product::<usize>(), "{name} of shape {shape:?}");
            let mut state = self.state.borrow_mut();
            let id = state.add(name.to_string(), DType::Float32, Dim::all(shape));
            state.constants.push(Constant { value: id, data: Data::Floats(numbers) });
            id
        });
        Value { graph: self, id }
    }

    /// Puts `path` before the names of nodes, until the returned scope is dropped.
    pub fn scope(&self, path: &str) -> Scope<'_> {
        let outer = std::mem::replace(&mut self.state.borrow_mut().scope, path.replace('.', "/"));
        Scope { graph: self, outer }
    }

    /// The size of `dim` at run time, int64 `[1]`: the dimension of the first tensor that has it.
    ///
    /// # Panics
    /// If no tensor has that dimension.
    #[track_caller]
    pub fn size(&self, dim: &Dim) -> Value<'_> {
        if let Some(size) = dim.as_fixed() {
            return self.constant(DType::Int64, &[1], Data::Ints(vec![size as i64]));
        }
        let found = {
            let state = self.state.borrow();
            (0..state.values.len())
                .find_map(|id| Some((id, state.values[id].shape.iter().position(|known| known == dim)?)))
        };
        let Some((id, axis)) = found else { self.mistake(format!("no tensor has the dimension {dim}")) };
        let bounds = [("start", Attribute::Int(axis as i64)), ("end", Attribute::Int(axis as i64 + 1))];
        self.node("Shape", &[Value { graph: self, id }], &bounds, &[(DType::Int64, vec![Dim::fixed(1)])])[0]
    }

    /// Marks a tensor as observed under a name, unless that name is taken. What that means is the caller's:
    /// [`Graph::observed`] returns the tensors, and [`Definition::observed`] their names.
    pub fn observe(&self, name: &str, value: Value<'_>) {
        let mut state = self.state.borrow_mut();
        if state.observed.iter().all(|(known, _)| known != name) {
            state.observed.push((name.to_string(), value.id));
        }
    }

    /// The observed tensors, in order.
    pub fn observed(&self) -> Vec<(String, Value<'_>)> {
        let observed = self.state.borrow().observed.clone();
        observed.into_iter().map(|(name, id)| (name, Value { graph: self, id })).collect()
    }

    /// Whether [`Graph::size`] finds `dim`.
    pub(super) fn has_size(&self, dim: &Dim) -> bool {
        dim.as_fixed().is_some() || self.state.borrow().values.iter().any(|value| value.shape.contains(dim))
    }

    /// Writes an operator, or returns the outputs of an equal one that was written before.
    pub(super) fn node<'g>(
        &'g self,
        op: &'static str,
        inputs: &[Value<'g>],
        attributes: &[(&'static str, Attribute)],
        outputs: &[(DType, Vec<Dim>)],
    ) -> Vec<Value<'g>> {
        let inputs: Vec<Option<Value<'g>>> = inputs.iter().copied().map(Some).collect();
        let outputs: Vec<Option<(DType, Vec<Dim>)>> = outputs.iter().cloned().map(Some).collect();
        self.node_with_options(op, &inputs, attributes, &outputs).into_iter().flatten().collect()
    }

    /// [`Graph::node`] with optional inputs and outputs.
    pub(super) fn node_with_options<'g>(
        &'g self,
        op: &'static str,
        inputs: &[Option<Value<'g>>],
        attributes: &[(&'static str, Attribute)],
        outputs: &[Option<(DType, Vec<Dim>)>],
    ) -> Vec<Option<Value<'g>>> {
        let mut state = self.state.borrow_mut();
        let inputs: Vec<Option<usize>> = inputs.iter().map(|value| value.map(|value| value.id)).collect();
        let key = Key { op, inputs: inputs.clone(), attributes: attributes.to_vec() };
        let value = |id: &Option<usize>| id.map(|id| Value { graph: self, id });
        if let Some(ids) = state.written.get(&key) {
            return ids.iter().map(value).collect();
        }
        let (_, short) = domain_and_name(op);
        let path = if state.scope.is_empty() { format!("/{short}") } else { format!("/{}/{short}", state.scope) };
        let name = state.unique(path);
        let ids: Vec<Option<usize>> = outputs
            .iter()
            .enumerate()
            .map(|(i, output)| {
                output.as_ref().map(|(dtype, shape)| state.add(format!("{name}_output_{i}"), *dtype, shape.clone()))
            })
            .collect();
        state.nodes.push(Node { name, op, inputs, outputs: ids.clone(), attributes: attributes.to_vec() });
        state.written.insert(key, ids.clone());
        ids.iter().map(value).collect()
    }

    /// An operator that `body` defines, given a graph and its inputs there, which have the names `input_names`. Every node
    /// of this operator in a graph has the same body; what differs between them is in the attributes, see
    /// [`Graph::attribute`].
    pub fn call<'g>(
        &'g self,
        op: &'static str,
        inputs: &[(&'static str, Value<'g>)],
        attributes: &[(&'static str, Attribute)],
        outputs: &[(DType, Vec<Dim>)],
        body: impl for<'b> FnOnce(&'b Graph, &[Value<'b>]) -> Vec<Value<'b>>,
    ) -> Vec<Value<'g>> {
        if self.state.borrow().functions.iter().all(|known| known.op != op) {
            let graph = Graph::new();
            let own: Vec<Value<'_>> =
                inputs.iter().map(|(name, input)| graph.input(name, input.dtype(), &input.shape())).collect();
            let made = body(&graph, &own);
            assert_eq!(made.len(), outputs.len(), "outputs of {op}");
            for (at, value) in made.into_iter().enumerate() {
                graph.output(&format!("output_{at}"), value);
            }
            let attributes = attributes.iter().map(|(name, _)| *name).collect();
            let function = Function { op, attributes, body: graph.finish(op) };
            self.state.borrow_mut().functions.push(function);
        }
        let inputs: Vec<Value<'g>> = inputs.iter().map(|(_, input)| *input).collect();
        self.node(op, &inputs, attributes, outputs)
    }

    /// In the body of a function, the integer attribute of its node with this name: int64 `[]`.
    pub fn attribute(&self, name: &'static str) -> Value<'_> {
        self.node("Constant", &[], &[("value_int", Attribute::Reference(name))], &[(DType::Int64, Vec::new())])[0]
    }

    /// The inputs of the node that computes `value`, if that is an `op`.
    pub(super) fn inputs_of<'g>(&'g self, value: Value<'g>, op: &str) -> Option<Vec<Value<'g>>> {
        let state = self.state.borrow();
        let node = state.nodes.iter().find(|node| node.op == op && node.outputs.contains(&Some(value.id)))?;
        node.inputs.iter().map(|id| id.map(|id| Value { graph: self, id })).collect()
    }

    /// Replaces the operator that computes `value` by one that computes more. Its outputs are `outputs` and then
    /// `value`.
    pub(super) fn recompute<'g>(
        &'g self,
        value: Value<'g>,
        op: &'static str,
        inputs: &[Value<'g>],
        attributes: &[(&'static str, Attribute)],
        outputs: &[Option<(DType, Vec<Dim>)>],
    ) -> Vec<Option<Value<'g>>> {
        let new = {
            let inputs: Vec<Option<Value<'g>>> = inputs.iter().copied().map(Some).collect();
            self.node_with_options(op, &inputs, attributes, outputs)
        };
        let mut state = self.state.borrow_mut();
        let mut node = state.nodes.pop().expect("written just now");
        let place = state.nodes.iter().position(|old| old.outputs == [Some(value.id)]).expect("has one output");
        node.outputs.push(Some(value.id));
        state.nodes[place] = node;
        new
    }

    /// Panics with what is wrong and with the place in the model definition.
    #[track_caller]
    pub(super) fn mistake(&self, what: String) -> ! {
        panic!("{what}, in scope {:?} at {}", self.state.borrow().scope, Location::caller());
    }

    /// The finished graph, without operators that no output depends on.
    pub fn finish(self, name: &str) -> Definition {
        let state = self.state.into_inner();
        let mut needed = vec![false; state.values.len()];
        for &id in state.outputs.iter().chain(&state.inputs) {
            needed[id] = true;
        }
        let mut nodes = Vec::new();
        for node in state.nodes.into_iter().rev() {
            if node.outputs.iter().flatten().any(|&id| needed[id]) {
                node.inputs.iter().flatten().for_each(|&id| needed[id] = true);
                nodes.push(node);
            }
        }
        nodes.reverse();
        Definition {
            name: name.to_string(),
            values: state.values,
            nodes,
            inputs: state.inputs,
            outputs: state.outputs,
            constants: state.constants.into_iter().filter(|constant| needed[constant.value]).collect(),
            parameters: state.parameters.into_iter().filter(|parameter| needed[parameter.value]).collect(),
            functions: state.functions,
            observed: state.observed.into_iter().map(|(name, _)| name).collect(),
        }
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.graph.state.borrow_mut().scope = std::mem::take(&mut self.outer);
    }
}

impl<'g> Value<'g> {
    /// The graph it is part of.
    pub fn graph(self) -> &'g Graph {
        self.graph
    }

    /// The element type.
    pub fn dtype(self) -> DType {
        self.graph.state.borrow().values[self.id].dtype
    }

    /// The dimensions.
    pub fn shape(self) -> Vec<Dim> {
        self.graph.state.borrow().values[self.id].shape.clone()
    }

    /// One dimension; negative axes count from the end.
    ///
    /// # Panics
    /// If there is no such axis.
    #[track_caller]
    pub fn dim(self, axis: isize) -> Dim {
        let shape = self.shape();
        let at = if axis < 0 { axis + shape.len() as isize } else { axis };
        match usize::try_from(at).ok().and_then(|at| shape.get(at)) {
            Some(dim) => dim.clone(),
            None => self.graph.mistake(format!("no axis {axis} in {}", Dim::list(&shape))),
        }
    }
}
