//! The arena of a graph under construction, and the finished `Definition` that is handed to whoever writes it to disk.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::Location;

use super::{DType, Dim};

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

/// A finished graph. Values are indices into `values`; nodes are in an order in which they can be run.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The graph's name.
    pub name: String,
    /// Every tensor.
    pub values: Vec<ValueInfo>,
    /// Every operator.
    pub nodes: Vec<Node>,
    /// What a run is given, in order.
    pub inputs: Vec<usize>,
    /// What a run returns, in order.
    pub outputs: Vec<usize>,
    /// Small tensors whose numbers are part of the graph.
    pub constants: Vec<Constant>,
    /// Tensors whose numbers are the model's weights, in order of first use.
    pub parameters: Vec<Parameter>,
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

/// One operator of the standard domain.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique within the graph: the scope it was written in and the operator's name.
    pub name: String,
    /// The operator.
    pub op: &'static str,
    /// Indices of values.
    pub inputs: Vec<usize>,
    /// Indices of values.
    pub outputs: Vec<usize>,
    /// Attributes, in order.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// The value of an operator's attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Attribute {
    /// A whole number.
    Int(i64),
    /// Several whole numbers.
    Ints(Vec<i64>),
    /// Text.
    Text(&'static str),
}

/// The numbers of a constant, before they are rounded to its dtype.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// For the float types.
    Floats(Vec<f64>),
    /// For int64.
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
    /// The checkpoint's name of the tensor.
    pub tensor: String,
    /// What is done to the tensor's numbers before they are rounded to the value's dtype.
    pub adjust: Adjust,
}

/// What is done to a checkpoint tensor's numbers on the way into a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Adjust {
    /// Nothing.
    AsIs,
    /// `1 + w`, in float32: the factor that Gemma's RMSNorm multiplies by.
    OnePlus,
}

/// Keeps node names under a path until it is dropped.
pub struct Scope<'g> {
    graph: &'g Graph,
    outer: String,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    op: &'static str,
    inputs: Vec<usize>,
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
    /// Nodes already written, by what they compute.
    written: HashMap<Key, Vec<usize>>,
    names: HashMap<String, usize>,
}

impl State {
    fn add(&mut self, name: String, dtype: DType, shape: Vec<Dim>) -> usize {
        self.values.push(ValueInfo { name, dtype, shape });
        self.values.len() - 1
    }

    /// `name`, or `name_1`, `name_2`, … if it has been given before.
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

    /// Declares `value` as the next output, under `name`.
    pub fn output(&self, name: &str, value: Value<'_>) {
        let terminal = self.state.borrow().is_terminal(value.id);
        // An input, weight or other output keeps its name; a copy of it takes the new one.
        let value = if terminal { value.identity() } else { value };
        let mut state = self.state.borrow_mut();
        state.values[value.id].name = name.to_string();
        state.outputs.push(value.id);
    }

    /// A tensor of the checkpoint, rounded to `dtype` after `adjust`.
    pub fn parameter(&self, tensor: &str, dtype: DType, shape: &[usize], adjust: Adjust) -> Value<'_> {
        let mut state = self.state.borrow_mut();
        let name = match adjust {
            Adjust::AsIs => tensor.to_string(),
            Adjust::OnePlus => format!("{tensor}.one_plus"),
        };
        let known = state.parameters.iter().find(|known| state.values[known.value].name == name);
        let id = match known {
            Some(known) => {
                let (info, expected) = (&state.values[known.value], Dim::all(shape));
                assert!(
                    info.dtype == dtype && info.shape == expected,
                    "{tensor} is used as {} {:?} and as {dtype} {shape:?}",
                    info.dtype,
                    info.shape
                );
                known.value
            }
            None => {
                let id = state.add(name, dtype, Dim::all(shape));
                state.parameters.push(Parameter { value: id, tensor: tensor.to_string(), adjust });
                id
            }
        };
        Value { graph: self, id }
    }

    /// Numbers that are part of the graph.
    pub fn constant(&self, dtype: DType, shape: &[usize], data: Data) -> Value<'_> {
        let count = match &data {
            Data::Floats(numbers) if dtype.is_float() => numbers.len(),
            Data::Ints(numbers) if dtype == DType::Int64 => numbers.len(),
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

    /// Names the nodes written from here on by `path`, until the returned scope is dropped.
    pub fn scope(&self, path: &str) -> Scope<'_> {
        let outer = std::mem::replace(&mut self.state.borrow_mut().scope, path.replace('.', "/"));
        Scope { graph: self, outer }
    }

    /// A one-element int64 tensor with the run-time size of `dim`, read off the first tensor that has it.
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

    /// Whether some tensor has `dim` among its dimensions, so that [`Graph::size`] can tell it.
    pub(super) fn has_size(&self, dim: &Dim) -> bool {
        dim.as_fixed().is_some() || self.state.borrow().values.iter().any(|value| value.shape.contains(dim))
    }

    /// Writes an operator, or finds the one written before that computes the same.
    pub(super) fn node<'g>(
        &'g self,
        op: &'static str,
        inputs: &[Value<'g>],
        attributes: &[(&'static str, Attribute)],
        outputs: &[(DType, Vec<Dim>)],
    ) -> Vec<Value<'g>> {
        let mut state = self.state.borrow_mut();
        let inputs: Vec<usize> = inputs.iter().map(|value| value.id).collect();
        let key = Key { op, inputs: inputs.clone(), attributes: attributes.to_vec() };
        if let Some(ids) = state.written.get(&key) {
            return ids.iter().map(|&id| Value { graph: self, id }).collect();
        }
        let path = if state.scope.is_empty() { format!("/{op}") } else { format!("/{}/{op}", state.scope) };
        let name = state.unique(path);
        let ids: Vec<usize> = outputs
            .iter()
            .enumerate()
            .map(|(i, (dtype, shape))| state.add(format!("{name}_output_{i}"), *dtype, shape.clone()))
            .collect();
        state.nodes.push(Node { name, op, inputs, outputs: ids.clone(), attributes: attributes.to_vec() });
        state.written.insert(key, ids.clone());
        ids.into_iter().map(|id| Value { graph: self, id }).collect()
    }

    /// Stops with what is wrong and where in the model definition it was written.
    #[track_caller]
    pub(super) fn mistake(&self, what: String) -> ! {
        panic!("{what}, in scope {:?} at {}", self.state.borrow().scope, Location::caller());
    }

    /// The finished graph, without what no output needs.
    pub fn finish(self, name: &str) -> Definition {
        let state = self.state.into_inner();
        let mut needed = vec![false; state.values.len()];
        for &id in state.outputs.iter().chain(&state.inputs) {
            needed[id] = true;
        }
        let mut nodes = Vec::new();
        for node in state.nodes.into_iter().rev() {
            if node.outputs.iter().any(|&id| needed[id]) {
                node.inputs.iter().for_each(|&id| needed[id] = true);
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
        }
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.graph.state.borrow_mut().scope = std::mem::take(&mut self.outer);
    }
}

impl<'g> Value<'g> {
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

impl Definition {
    /// The information on a value.
    pub fn value(&self, id: usize) -> &ValueInfo {
        &self.values[id]
    }
}
