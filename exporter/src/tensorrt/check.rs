//! Whether TensorRT would take the graphs of a folder, told without TensorRT: operators and their versions, types, strong
//! typing, what its parser misreads, empty tensors, where weights lie, and the profiles of a serving plan.
//!
//! # Design
//! What the parser takes is a table (`tensorrt/operators.json`, with its sources). What cannot be told from a table, whether
//! a kernel is found for every part, is for a builder: `make check-rtx` compiles the graphs with that of TensorRT for RTX.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::limits::{FLOAT8_GPUS, LARGEST_VOLUME};
use super::profiles::{PROFILES, Profile, Profiles};
use super::version::TensorRt;
use crate::proto::{Given as Attribute, Graph, Initializer, Model, Node, read};

/// What the parser takes.
const OPERATORS: &str = include_str!("../../tensorrt/operators.json");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(rename = "about")]
    _about: String,
    #[serde(rename = "sources")]
    _sources: Vec<String>,
    newest_opset: i64,
    largest_rank: usize,
    largest_protobuf: u64,
    operators: HashMap<String, Operator>,
    not_imported: HashSet<String>,
    plugins: HashSet<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Operator {
    #[serde(default)]
    since: Option<String>,
    types: String,
    #[serde(default)]
    rules: Rules,
    #[serde(default)]
    said: String,
}

/// What of an operator has to be how. Numbers are places among its inputs.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Rules {
    max_outputs: Option<usize>,
    forbid_inputs: Vec<usize>,
    attrs_equal: BTreeMap<String, serde_json::Value>,
    attrs_absent: Vec<String>,
    /// `input:N` and `attr:NAME`, of which one at most is there.
    exclusive: Vec<[String; 2]>,
    rank_in: BTreeMap<usize, Vec<usize>>,
    const_inputs: Vec<usize>,
    input_is_graph_input: Vec<usize>,
    output_is_graph_output: Vec<usize>,
    static_dims: BTreeMap<usize, Vec<usize>>,
    const_max: BTreeMap<usize, i64>,
    zero_point_all_zero: Option<usize>,
    input_dtype: BTreeMap<usize, Vec<String>>,
}

/// Something that TensorRT would not take, or would take for something else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The file.
    pub graph: String,
    /// The operator's name, or that of the tensor in question.
    pub node: String,
    /// The operator, if one is in question.
    pub operator: Option<String>,
    /// The kind: `domain`, `operator`, `version`, `type`, `strong-typing`, `rule`, `empty`, `size`, `volume`,
    /// `external-data`, `profile`.
    pub kind: &'static str,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { graph, node, operator, kind, reason } = self;
        write!(f, "{graph}: {node}")?;
        if let Some(operator) = operator {
            write!(f, " ({operator})")?;
        }
        write!(f, ": {kind}: {reason}")
    }
}

/// What [`check`] has looked at and found.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// Operators of each graph, by file.
    pub graphs: BTreeMap<String, usize>,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What of some GPUs only can be told to be right.
    pub notes: Vec<String>,
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))?;
        for (graph, operators) in &self.graphs {
            let findings = self.findings.iter().filter(|finding| finding.graph == *graph).count();
            writeln!(f, "{graph}: {operators} operators, {findings} findings")?;
        }
        Ok(())
    }
}

/// Checks an ONNX file, or all in a folder, with its profiles if it has some.
///
/// # Errors
/// A file that cannot be read or is not an ONNX model, or a folder without any.
pub fn check(path: &Path, version: TensorRt) -> Result<Checked> {
    let cannot_read = |path: &Path| format!("{}: cannot be read", path.display());
    let table: Table = serde_json::from_str(OPERATORS).context("tensorrt/operators.json")?;
    let (folder, mut files) = match path.is_dir() {
        false => (path.parent().unwrap_or(Path::new("")), vec![path.to_path_buf()]),
        true => {
            let entries = fs::read_dir(path).with_context(|| cannot_read(path))?;
            let files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
            (path, files.with_context(|| cannot_read(path))?)
        }
    };
    files.retain(|file| file.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    if files.is_empty() {
        bail!("{}: expected an ONNX file or a folder of them, found none", path.display());
    }
    let profiles = folder.join(PROFILES);
    let profiles: Option<Profiles> = match fs::read(&profiles) {
        Err(_) if !profiles.exists() => None,
        read => {
            let bytes = read.with_context(|| cannot_read(&profiles))?;
            Some(serde_json::from_slice(&bytes).with_context(|| format!("{}: not profiles", profiles.display()))?)
        }
    };
    let mut checked = Checked { graphs: BTreeMap::new(), findings: Vec::new(), notes: Vec::new() };
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let size = fs::metadata(&file).with_context(|| cannot_read(&file))?.len();
        if size > table.largest_protobuf {
            let reason = format!("{size} bytes; a protobuf file ends at {}", table.largest_protobuf);
            let node = "model".to_string();
            checked.findings.push(Finding { graph: name.clone(), node, operator: None, kind: "size", reason });
            checked.graphs.insert(name, 0);
            continue;
        }
        let bytes = fs::read(&file).with_context(|| cannot_read(&file))?;
        let mut findings = Vec::new();
        let model = read(&bytes).with_context(|| file.display().to_string())?;
        let mut look = Look { table: &table, version, model: &model, found: &mut findings };
        look.all();
        look.external_data(folder);
        look.volumes(profiles.as_ref().and_then(|profiles| profiles.get(&name)));
        if has_float8(&model.graph) {
            checked.notes.push(format!("{name}: computes in fp8, which {FLOAT8_GPUS}"));
        }
        let is_wrapper = model.graph.nodes.iter().all(|node| node.op == "EPContext");
        if let Some(profiles) = profiles.as_ref().filter(|_| !is_wrapper) {
            // The graph that moves a cache is for ONNX Runtime's own providers.
            match profiles.get(&name) {
                None if name == t5gemma_graphs::interface::REORDER => {}
                profiles => look.profiles(profiles),
            }
        }
        checked.graphs.insert(name.clone(), model.graph.nodes.len());
        checked.findings.extend(findings.into_iter().map(|(node, operator, kind, reason)| Finding {
            graph: name.clone(),
            node,
            operator,
            kind,
            reason,
        }));
    }
    Ok(checked)
}

/// Whether a tensor of the graph is of FP8.
fn has_float8(graph: &Graph) -> bool {
    let constants = graph.initializers.values().map(|tensor| tensor.dtype);
    constants.chain(graph.between.iter().map(|value| value.dtype)).any(|dtype| type_name(dtype) == Some("FP8"))
}

/// What is known of a tensor.
#[derive(Clone, Default)]
struct Known {
    /// Its type, by the table's names.
    dtype: Option<&'static str>,
    shape: Option<Vec<Option<i64>>>,
}

type Found = (String, Option<String>, &'static str, String);

struct Look<'c> {
    table: &'c Table,
    version: TensorRt,
    model: &'c Model,
    found: &'c mut Vec<Found>,
}

impl<'c> Look<'c> {
    fn all(&mut self) {
        let newest = self.table.newest_opset;
        if self.model.opset > newest {
            self.tensor("model", "version", format!("operator set {}, read up to {newest}", self.model.opset));
        }
        let mut known = HashMap::new();
        self.graph(&self.model.graph, &mut known, true);
    }

    fn node(&mut self, node: &Node, kind: &'static str, reason: String) {
        let name =
            if node.name.is_empty() { node.outputs.first().cloned().unwrap_or_default() } else { node.name.clone() };
        let operator = if node.domain.is_empty() { node.op.clone() } else { format!("{}.{}", node.domain, node.op) };
        self.found.push((name, Some(operator), kind, reason));
    }

    fn tensor(&mut self, name: &str, kind: &'static str, reason: String) {
        self.found.push((name.to_string(), None, kind, reason));
    }

    /// Follows the types from the inputs on, and holds every operator to the table.
    fn graph(&mut self, graph: &'c Graph, known: &mut HashMap<String, Known>, outermost: bool) {
        for (name, tensor) in &graph.initializers {
            let shape = Some(tensor.shape.iter().copied().map(Some).collect());
            self.declared(name, tensor.dtype, &shape);
            known.insert(name.clone(), Known { dtype: type_name(tensor.dtype), shape });
        }
        for input in &graph.inputs {
            self.declared(&input.name, input.dtype, &input.shape);
            known.insert(input.name.clone(), Known { dtype: type_name(input.dtype), shape: input.shape.clone() });
        }
        let said: HashMap<&str, Known> = (graph.between.iter().chain(&graph.outputs))
            .map(|value| (value.name.as_str(), (type_name(value.dtype), &value.shape)))
            .map(|(name, (dtype, shape))| (name, Known { dtype, shape: shape.clone() }))
            .collect();
        for node in &graph.nodes {
            let is_function =
                self.model.functions.iter().any(|(domain, name)| (domain, name) == (&node.domain, &node.op));
            if !is_function {
                self.operator(node, graph, known, outermost);
            }
            for attribute in node.attributes.values() {
                if let Attribute::Graphs(graphs) = attribute {
                    graphs.iter().for_each(|inner| self.graph(inner, &mut known.clone(), false));
                }
            }
            for (place, output) in node.outputs.iter().enumerate().filter(|(_, output)| !output.is_empty()) {
                let said = said.get(output.as_str()).cloned().unwrap_or_default();
                let follows = if is_function { None } else { result_type(node, place, known) };
                if let (Some(follows), Some(said)) = (follows, said.dtype)
                    && follows != said
                {
                    let reason = format!("{output} is declared {said}, but its inputs make it {follows}");
                    self.node(node, "strong-typing", reason);
                }
                if said.shape.as_ref().is_some_and(|shape| shape.contains(&Some(0))) {
                    self.node(node, "empty", format!("{output} has no elements"));
                }
                let known_now = Known { dtype: follows.or(said.dtype), shape: said.shape };
                known.insert(output.clone(), known_now);
            }
        }
    }

    /// What is said of an input or a constant.
    fn declared(&mut self, name: &str, dtype: i32, shape: &Option<Vec<Option<i64>>>) {
        match type_name(dtype) {
            Some("FP64") => self.tensor(name, "type", "FP64, which is cut down to FP32".into()),
            None => self.tensor(name, "type", format!("ONNX type {dtype}, which no network tensor can have")),
            Some(_) => {}
        }
        let Some(shape) = shape else { return };
        if shape.contains(&Some(0)) {
            self.tensor(name, "empty", "a tensor without elements".into());
        }
        if shape.len() > self.table.largest_rank {
            self.tensor(
                name,
                "rule",
                format!("{} axes, of which there can be {}", shape.len(), self.table.largest_rank),
            );
        }
    }

    fn operator(&mut self, node: &Node, graph: &Graph, known: &HashMap<String, Known>, outermost: bool) {
        let listed = self.table.operators.get(&node.op);
        if !node.domain.is_empty() {
            // A plan that is built already: ONNX Runtime gives it to TensorRT as it is.
            if (node.domain.as_str(), node.op.as_str()) == ("com.microsoft", "EPContext") {
                return;
            }
            if listed.is_some() || self.table.not_imported.contains(&node.op) {
                let reason =
                    "the parser looks at the name alone and would take it for the standard operator".to_string();
                self.node(node, "domain", reason);
            } else if !self.table.plugins.contains(&node.op) {
                self.node(node, "operator", "not imported: an engine would be cut here".into());
            }
            return;
        }
        let Some(listed) = listed else {
            if !self.table.plugins.contains(&node.op) {
                self.node(node, "operator", "not imported: an engine would be cut here".into());
            }
            return;
        };
        if let Some(since) = listed.since.as_deref().filter(|since| !self.version.has(since)) {
            self.node(node, "version", format!("needs TensorRT {since}, this is for {}", self.version));
        }
        self.types(node, listed, known);
        self.rules(node, listed, graph, known, outermost);
    }

    fn types(&mut self, node: &Node, listed: &Operator, known: &HashMap<String, Known>) {
        let dtype = |input: &String| known.get(input).and_then(|known| known.dtype);
        let allowed = |dtype: &str| listed.types.split(' ').any(|listed| listed == dtype);
        let condition = usize::from(node.op == "Where");
        for (place, input) in node.inputs.iter().enumerate().filter(|(_, input)| !input.is_empty()) {
            let Some(dtype) = dtype(input) else { continue };
            // Whole numbers behind the first input are axes, shapes and indices.
            let is_data = place == condition || matches!(dtype, "FP32" | "FP16" | "BF16" | "FP64");
            let quantizes = matches!(node.op.as_str(), "QuantizeLinear" | "DequantizeLinear");
            if is_data && !(quantizes && place > 0) && !allowed(dtype) {
                self.node(node, "type", format!("input {place} ({input}) is {dtype}, taken are {}", listed.types));
            }
        }
        let alike: &[usize] = match node.op.as_str() {
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "MatMul" | "Equal" | "Greater" | "GreaterOrEqual"
            | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" | "PRelu" => &[0, 1],
            "Gemm" | "LayerNormalization" | "Range" | "Clip" => &[0, 1, 2],
            "RMSNormalization" => &[0, 1],
            "Where" => &[1, 2],
            "ScatterElements" | "ScatterND" | "TensorScatter" => &[0, if node.op == "TensorScatter" { 1 } else { 2 }],
            "Attention" => &[0, 1, 2],
            "Concat" | "Max" | "Min" | "Sum" | "Mean" | "Einsum" => &[],
            _ => return,
        };
        let places: Vec<usize> = if alike.is_empty() { (0..node.inputs.len()).collect() } else { alike.to_vec() };
        let typed: Vec<(usize, &str)> =
            places.iter().filter_map(|&place| Some((place, dtype(node.inputs.get(place)?)?))).collect();
        if let Some(&(place, other)) = typed.iter().find(|(_, dtype)| *dtype != typed[0].1) {
            let (first, expected) = typed[0];
            let reason = format!("input {first} is {expected} and input {place} is {other}; they must be of one type");
            self.node(node, "strong-typing", reason);
        }
    }

    fn rules(
        &mut self,
        node: &Node,
        listed: &Operator,
        graph: &Graph,
        known: &HashMap<String, Known>,
        outermost: bool,
    ) {
        let rules = &listed.rules;
        let said = if listed.said.is_empty() { String::new() } else { format!(" ({})", listed.said) };
        let given = |place: usize| node.inputs.get(place).filter(|input| !input.is_empty());
        let constant = |name: &String| -> Option<&Initializer> {
            graph.initializers.get(name).or_else(|| {
                let maker =
                    graph.nodes.iter().find(|node| node.op == "Constant" && node.outputs.first() == Some(name))?;
                maker.attributes.values().find_map(|attribute| match attribute {
                    Attribute::Tensor(tensor) => Some(tensor),
                    _ => None,
                })
            })
        };
        let shape = |place: usize| known.get(given(place)?).and_then(|known| known.shape.clone());
        let mut wrong: Vec<String> = Vec::new();
        let outputs = node.outputs.iter().filter(|output| !output.is_empty()).count();
        if let Some(most) = rules.max_outputs.filter(|&most| outputs > most) {
            wrong.push(format!("{outputs} outputs, of which there can be {most}"));
        }
        wrong.extend(
            rules
                .forbid_inputs
                .iter()
                .filter(|&&place| given(place).is_some())
                .map(|place| format!("input {place} is given")),
        );
        for (name, expected) in &rules.attrs_equal {
            let differs = match (node.attributes.get(name), expected) {
                (Some(Attribute::Int(found)), expected) => expected.as_f64() != Some(*found as f64),
                (Some(Attribute::Float(found)), expected) => expected.as_f64() != Some(*found),
                (Some(Attribute::Text(found)), expected) => expected.as_str() != Some(found),
                _ => false,
            };
            if differs {
                wrong.push(format!("{name} is not {expected}"));
            }
        }
        let attribute = |name: &str| node.attributes.get(name).is_some_and(|value| !matches!(value, Attribute::Int(0)));
        wrong.extend(rules.attrs_absent.iter().filter(|name| attribute(name)).map(|name| format!("{name} is given")));
        for pair in &rules.exclusive {
            let there = |what: &str| match what.split_once(':') {
                Some(("input", place)) => place.parse().is_ok_and(|place: usize| given(place).is_some()),
                Some((_, name)) => attribute(name),
                None => false,
            };
            if pair.iter().all(|what| there(what)) {
                wrong.push(format!("{} and {} exclude each other", pair[0], pair[1]));
            }
        }
        for (&place, ranks) in &rules.rank_in {
            if let Some(shape) = shape(place).filter(|shape| !ranks.contains(&shape.len())) {
                wrong.push(format!("input {place} has {} axes, not one of {ranks:?}", shape.len()));
            }
        }
        for &place in &rules.const_inputs {
            if let Some(input) = given(place).filter(|input| constant(input).is_none()) {
                wrong.push(format!("input {place} ({input}) is not a constant"));
            }
        }
        let ports =
            |ports: &[crate::proto::Value], name: &String| outermost && ports.iter().any(|port| port.name == *name);
        for &place in &rules.input_is_graph_input {
            if let Some(input) = given(place).filter(|input| !ports(&graph.inputs, input)) {
                wrong.push(format!("input {place} ({input}) is not an input of the graph"));
            }
        }
        for &place in &rules.output_is_graph_output {
            if let Some(output) = node.outputs.get(place).filter(|output| !ports(&graph.outputs, output)) {
                wrong.push(format!("output {place} ({output}) is not an output of the graph"));
            }
        }
        for (&place, axes) in &rules.static_dims {
            for &axis in axes {
                if shape(place).is_some_and(|shape| shape.get(axis).is_some_and(Option::is_none)) {
                    wrong.push(format!("axis {axis} of input {place} varies"));
                }
            }
        }
        for (&place, &most) in &rules.const_max {
            let number = given(place).and_then(constant).and_then(|constant| constant.ints.as_ref()?.first().copied());
            if let Some(number) = number.filter(|&number| number > most) {
                wrong.push(format!("input {place} is {number}, at most {most}"));
            }
        }
        if let Some(place) = rules.zero_point_all_zero
            && let Some(ints) = given(place).and_then(constant).and_then(|constant| constant.ints.as_ref())
            && ints.iter().any(|&number| number != 0)
        {
            wrong.push("a zero point is not 0".into());
        }
        for (&place, dtypes) in &rules.input_dtype {
            let dtype = given(place).and_then(|input| known.get(input)?.dtype);
            if let Some(dtype) = dtype.filter(|dtype| !dtypes.iter().any(|listed| listed == dtype)) {
                wrong.push(format!("input {place} is {dtype}, taken are {}", dtypes.join(" ")));
            }
        }
        for reason in wrong {
            self.node(node, "rule", reason + &said);
        }
    }

    /// That weights which lie outside lie where they can be found, whole.
    fn external_data(&mut self, folder: &Path) {
        let mut sizes: HashMap<String, Option<u64>> = HashMap::new();
        for (name, tensor) in &self.model.graph.initializers {
            let Some((file, offset, length)) = &tensor.external else { continue };
            let inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            if !inside || file.is_empty() {
                self.tensor(name, "external-data", format!("{file:?} is not a path below the model's folder"));
                continue;
            }
            let size = sizes
                .entry(file.clone())
                .or_insert_with(|| fs::metadata(folder.join(file)).ok().map(|file| file.len()));
            let Some(size) = *size else {
                self.tensor(name, "external-data", format!("{file} is not there"));
                continue;
            };
            let bits =
                tensor.shape.iter().map(|&size| size.max(0) as u128).product::<u128>() * u128::from(bits(tensor.dtype));
            let needed = bits.div_ceil(8);
            if let Some(length) = length.filter(|&length| u128::from(length) != needed) {
                let reason = format!("{length} bytes for a tensor of {needed}");
                self.tensor(name, "external-data", reason);
            }
            if u128::from(*offset) + needed > u128::from(size) {
                let reason = format!("bytes {offset} to {} of {file}, which has {size}", u128::from(*offset) + needed);
                self.tensor(name, "external-data", reason);
            }
        }
    }

    /// That no tensor has more elements than there can be, at the greatest sizes of the profiles.
    fn volumes(&mut self, profiles: Option<&BTreeMap<String, Profile>>) {
        let graph = &self.model.graph;
        let greatest = greatest(graph, profiles.unwrap_or(&BTreeMap::new()));
        let mut too_large: Vec<(&String, Vec<u128>)> = Vec::new();
        for (name, tensor) in &graph.initializers {
            let shape = tensor.shape.iter().map(|&size| u128::try_from(size).ok()).collect::<Option<Vec<_>>>();
            too_large.extend(shape.map(|shape| (name, shape)));
        }
        for value in graph.inputs.iter().chain(&graph.between).chain(&graph.outputs) {
            let Some(shape) = &value.shape else { continue };
            let sizes = shape.iter().zip(&value.symbols).map(|(size, symbol)| match size {
                Some(size) => u128::try_from(*size).ok(),
                None => size_of(symbol, &greatest),
            });
            too_large.extend(sizes.collect::<Option<Vec<_>>>().map(|shape| (&value.name, shape)));
        }
        let volume = |shape: &[u128]| shape.iter().fold(1_u128, |volume, &size| volume.saturating_mul(size));
        too_large.retain(|(_, shape)| volume(shape) > LARGEST_VOLUME);
        if let Some((name, shape)) = too_large.iter().max_by_key(|(_, shape)| volume(shape)) {
            let (volume, others) = (volume(shape), too_large.len() - 1);
            let mut reason = format!("{shape:?}, {volume} elements; a tensor has at most {LARGEST_VOLUME}");
            if others > 0 {
                reason += &format!("; too large are {others} others too");
            }
            self.tensor(name, "volume", reason);
        }
    }

    /// That every input which varies has its least, usual and greatest size, and no other has.
    fn profiles(&mut self, profiles: Option<&BTreeMap<String, Profile>>) {
        let empty = BTreeMap::new();
        let profiles = profiles.unwrap_or(&empty);
        for input in &self.model.graph.inputs {
            let Some(shape) = &input.shape else { continue };
            let Some(spans) = profiles.get(&input.name) else {
                if shape.contains(&None) {
                    let reason = "varies, and has no profile: the engine would be built anew for each new size";
                    self.tensor(&input.name, "profile", reason.into());
                }
                continue;
            };
            let [least, usual, most] = spans;
            if spans.iter().any(|span| span.len() != shape.len()) {
                self.tensor(&input.name, "profile", format!("{spans:?} for {} axes", shape.len()));
                continue;
            }
            for (axis, fixed) in shape.iter().enumerate() {
                let (least, usual, most) = (least[axis], usual[axis], most[axis]);
                if least < 1 {
                    self.tensor(&input.name, "empty", format!("axis {axis} is from {least} on"));
                } else if !(least <= usual && usual <= most) {
                    self.tensor(&input.name, "profile", format!("axis {axis}: {least}, {usual}, {most} do not ascend"));
                }
                if let Some(fixed) = fixed.filter(|&fixed| (least, usual, most) != (fixed, fixed, fixed)) {
                    let reason = format!("axis {axis} is {fixed}, the profile has {least}, {usual}, {most}");
                    self.tensor(&input.name, "profile", reason);
                }
            }
        }
        for name in profiles.keys() {
            if !self.model.graph.inputs.iter().any(|input| input.name == *name) {
                self.tensor(name, "profile", "is not an input of the graph".into());
            }
        }
    }
}

/// The greatest sizes of the symbols in the shapes of a graph's inputs.
fn greatest(graph: &Graph, profiles: &BTreeMap<String, Profile>) -> HashMap<String, u128> {
    let mut known: HashMap<String, u128> = HashMap::new();
    let mut products = Vec::new();
    for input in &graph.inputs {
        let Some([.., most]) = profiles.get(&input.name) else { continue };
        for (symbol, &most) in input.symbols.iter().zip(most).filter(|(symbol, _)| !symbol.is_empty()) {
            let most = u128::try_from(most).unwrap_or(0);
            match symbol.contains(" * ") {
                true => products.push((symbol, most)),
                false => known.extend([(symbol.clone(), most)]),
            }
        }
    }
    // Of a product of which all factors but one are known, that one.
    for (product, most) in products {
        let unknown: Vec<&str> = product.split(" * ").filter(|factor| size_of(factor, &known).is_none()).collect();
        if let [factor] = unknown[..] {
            let others = product.split(" * ").filter_map(|factor| size_of(factor, &known)).product::<u128>().max(1);
            known.insert(factor.to_string(), most.div_ceil(others));
        }
    }
    known
}

/// The size that a dimension's name says, a sum or product of symbols as the exporter writes it.
fn size_of(symbol: &str, known: &HashMap<String, u128>) -> Option<u128> {
    if let Some(size) = known.get(symbol).copied().or_else(|| symbol.parse().ok()) {
        return Some(size);
    }
    for (operator, apply) in [(" + ", u128::saturating_add as fn(u128, u128) -> u128), (" * ", u128::saturating_mul)] {
        if let Some((first, rest)) = symbol.split_once(operator) {
            return Some(apply(size_of(first, known)?, size_of(rest, known)?));
        }
    }
    None
}

/// The type that an operator's inputs give its output, where that can be told.
fn result_type(node: &Node, place: usize, known: &HashMap<String, Known>) -> Option<&'static str> {
    let of = |place: usize| known.get(node.inputs.get(place)?).and_then(|known| known.dtype);
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
        "TopK" if place == 1 => Some("INT64"),
        "Where" | "CastLike" => of(1),
        "DequantizeLinear" => of(1),
        "QuantizeLinear" => of(2).or_else(|| code("output_dtype")),
        "ConstantOfShape" | "Constant" => node.attributes.values().find_map(|attribute| match attribute {
            Attribute::Tensor(tensor) => type_name(tensor.dtype),
            _ => None,
        }),
        "OneHot" => of(2),
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
        _ => of(0),
    }
}

/// The table's name of a type by its number in ONNX.
fn type_name(code: i32) -> Option<&'static str> {
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

/// Bits of a number of a type.
fn bits(code: i32) -> u32 {
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
    fn the_table_is_read_as_it_is_meant() {
        let table: Table = serde_json::from_str(OPERATORS).expect("the table is well-formed");
        assert!(table.operators["TensorScatter"].rules.static_dims.contains_key(&0));
        for name in ["BitShift", "DynamicQuantizeLinear", "MatMulInteger"] {
            assert!(table.not_imported.contains(name) && !table.operators.contains_key(name), "{name}");
        }
        for name in ["MatMul", "Softmax", "DequantizeLinear"] {
            assert!(table.operators.contains_key(name) && !table.not_imported.contains(name), "{name}");
        }
        let known = ["FP32", "FP16", "BF16", "INT64", "INT32", "BOOL", "INT8", "UINT8", "INT4", "FP8", "FP4"];
        for (name, operator) in &table.operators {
            assert!(operator.types.split(' ').all(|dtype| known.contains(&dtype)), "{name}: {}", operator.types);
            assert!(!table.not_imported.contains(name), "{name}");
        }
    }

    #[test]
    fn sizes_follow_from_the_names_of_dimensions() {
        let known = HashMap::from([("batch".to_string(), 16), ("source".to_string(), 1024), ("past".to_string(), 7)]);
        for (symbol, expected) in [
            ("8", Some(8)),
            ("source", Some(1024)),
            ("2 * batch * source", Some(32768)),
            ("past + 1", Some(8)),
            ("batch * past + batch * 1", Some(128)),
            ("batch * beams", None),
            ("", None),
        ] {
            assert_eq!(size_of(symbol, &known), expected, "{symbol}");
        }
        let input = |name: &str, symbols: [&str; 2]| crate::proto::Value {
            name: name.into(),
            dtype: 7,
            shape: Some(vec![None; 2]),
            symbols: symbols.map(String::from).to_vec(),
        };
        let inputs = vec![input("ids", ["batch * beams", "new"]), input("mask", ["batch", "source"])];
        let spans = |most: [i64; 2]| [vec![1, 1], vec![1, 1], most.to_vec()];
        let profiles = BTreeMap::from([("ids".to_string(), spans([64, 1])), ("mask".to_string(), spans([16, 9]))]);
        let found = greatest(&Graph { inputs, ..Graph::default() }, &profiles);
        for (symbol, expected) in [("batch", 16), ("beams", 4), ("source", 9), ("new", 1)] {
            assert_eq!(found.get(symbol), Some(&expected), "{symbol}");
        }
    }
}
