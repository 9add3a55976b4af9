//! The arena of a graph under construction, and the finished `Definition` that is handed to whoever writes it to disk.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::Location;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

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
    /// The names of what was observed, in order.
    pub observed: Vec<String>,
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
    /// The operator; one that is not of the standard domain follows its domain and a dot.
    pub op: &'static str,
    /// Indices of values; none for an optional input that is left out.
    pub inputs: Vec<Option<usize>>,
    /// Indices of values; none for an optional output that is not asked for.
    pub outputs: Vec<Option<usize>>,
    /// Attributes, in order.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// The value of an operator's attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Attribute {
    /// A whole number.
    Int(i64),
    /// A number in float32, as its bits.
    Float(u32),
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
    /// For the whole numbers.
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
    /// The tensors of the checkpoint that it is made of, one above the other.
    pub parts: Vec<Part>,
    /// What is done to the tensors' numbers before they are rounded to the value's dtype.
    pub adjust: Adjust,
}

/// A tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The checkpoint's name of it.
    pub tensor: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Those along the first axis that are taken, ascending; all if none.
    pub kept: Option<Arc<[usize]>>,
}

impl Part {
    /// Its numbers that are taken.
    pub fn numbers(&self) -> usize {
        let rows = self.kept.as_ref().map_or(self.shape[0], |kept| kept.len());
        rows * self.shape[1..].iter().product::<usize>()
    }
}

/// What is done to a checkpoint tensor's numbers on the way into a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Adjust {
    /// Nothing.
    AsIs,
    /// `1 + w`, in float32: the factor that Gemma's RMSNorm multiplies by.
    OnePlus,
    /// Whole numbers of few bits, see [`Blocks`].
    Packed(Blocks),
    /// The same as signed numbers, 0 for zero, one after the other and scaled by positive numbers; rows are whole blocks, or
    /// the matrix is one.
    Signed(Blocks),
    /// What the packed or signed numbers of a block are multiplied with.
    Scales(Blocks),
    /// The packed numbers that stand for zero, one a block.
    ZeroPoints(Blocks),
}

/// How the rows of a matrix `[n, k]` are held in few bits a number, as `MatMulNBits` reads them: in blocks of `size`
/// numbers along `k`, the last one filled up, with `w = scale · (packed − zero)`. A target may have whole rows, or the whole
/// matrix, for a block of 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blocks {
    /// Bits of a packed number, 4 or 8; of two in a byte the first is the lower.
    pub bits: u8,
    /// Numbers in a block: a power of two from 16 to 128.
    pub size: usize,
    /// Whether zero is in the middle, `2^(bits − 1)`, of every block, which then has no zero point of its own.
    pub symmetric: bool,
    /// What a packed number stands for.
    #[serde(default, skip_serializing_if = "Code::is_whole")]
    pub code: Code,
}

/// What the bits of a packed number stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// A whole number.
    #[default]
    Whole,
    /// A real number, of [`DType::Float8E4M3FN`].
    Float8E4M3FN,
}

impl Code {
    fn is_whole(&self) -> bool {
        *self == Code::Whole
    }
}

impl Blocks {
    /// Whole numbers with zero in the middle.
    pub fn whole(bits: u8, size: usize) -> Blocks {
        Blocks { bits, size, symmetric: true, code: Code::Whole }
    }

    /// Real numbers of 8 bits.
    pub fn float8() -> Blocks {
        Blocks { code: Code::Float8E4M3FN, ..Blocks::whole(8, 128) }
    }

    /// The same for a table that is only looked up: reading a few rows costs nothing, so they keep 8 bits.
    pub fn for_embedding(self) -> Blocks {
        Blocks { bits: 8, code: Code::Whole, ..self }
    }

    /// The name of this way to hold numbers: `int4`, `int8` or `fp8`.
    pub fn name(self) -> &'static str {
        match (self.code, self.bits) {
            (Code::Float8E4M3FN, _) => "fp8",
            (Code::Whole, 4) => "int4",
            (Code::Whole, _) => "int8",
        }
    }

    /// Blocks in a row of `k` numbers.
    pub fn of_row(self, k: usize) -> usize {
        k.div_ceil(self.size)
    }

    /// Bytes of a packed block.
    pub fn bytes(self) -> usize {
        self.size * usize::from(self.bits) / 8
    }

    /// Bytes of a row's zero points.
    pub fn zero_point_bytes(self, k: usize) -> usize {
        (self.of_row(k) * usize::from(self.bits)).div_ceil(8)
    }
}

/// Keeps node names under a path until it is dropped.
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
    /// Nodes already written, by what they compute.
    written: HashMap<Key, Vec<Option<usize>>>,
    names: HashMap<String, usize>,
    /// What is to be observed as it passes, under the names it has there.
    observed: Vec<(String, usize)>,
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

    /// A tensor of the checkpoint, or several one above the other, rounded to `dtype` after `adjust`. `name` is what it is
    /// called where it is as stored; the same bytes can be had in several shapes under several names.
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

    /// Numbers that are part of the graph.
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

    /// Numbers that are part of the graph, of float32, under a name: made once, however often they are asked for.
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

    /// Notes a tensor for [`Graph::observed`], unless something is noted under that name.
    pub fn observe(&self, name: &str, value: Value<'_>) {
        let mut state = self.state.borrow_mut();
        if state.observed.iter().all(|(known, _)| known != name) {
            state.observed.push((name.to_string(), value.id));
        }
    }

    /// What was noted, in order.
    pub fn observed(&self) -> Vec<(String, Value<'_>)> {
        let observed = self.state.borrow().observed.clone();
        observed.into_iter().map(|(name, id)| (name, Value { graph: self, id })).collect()
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
        let inputs: Vec<Option<Value<'g>>> = inputs.iter().copied().map(Some).collect();
        let outputs: Vec<Option<(DType, Vec<Dim>)>> = outputs.iter().cloned().map(Some).collect();
        self.node_with_options(op, &inputs, attributes, &outputs).into_iter().flatten().collect()
    }

    /// Writes an operator some of whose inputs or outputs may be left out, or finds the one written before.
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
        let (_, short) = split(op);
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

    /// The inputs of the node that computes `value`, if that is an `op`.
    pub(super) fn inputs_of<'g>(&'g self, value: Value<'g>, op: &str) -> Option<Vec<Value<'g>>> {
        let state = self.state.borrow();
        let node = state.nodes.iter().find(|node| node.op == op && node.outputs.contains(&Some(value.id)))?;
        node.inputs.iter().map(|id| id.map(|id| Value { graph: self, id })).collect()
    }

    /// Has `value` computed by a new operator, which computes more besides, in the place of the one that computes it.
    /// `outputs` are the new ones; the old value is the last output.
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
            observed: state.observed.into_iter().map(|(name, _)| name).collect(),
        }
    }
}

/// The domain and the name of an operator.
fn split(op: &'static str) -> (&'static str, &'static str) {
    op.rsplit_once('.').unwrap_or(("", op))
}

impl Node {
    /// The operator's domain, empty for the standard one, and its name there.
    pub fn operator(&self) -> (&'static str, &'static str) {
        split(self.op)
    }
}

impl Attribute {
    /// A number, rounded to float32.
    pub fn float(number: f64) -> Attribute {
        Attribute::Float((number as f32).to_bits())
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

impl Definition {
    /// The information on a value.
    pub fn value(&self, id: usize) -> &ValueInfo {
        &self.values[id]
    }
}
