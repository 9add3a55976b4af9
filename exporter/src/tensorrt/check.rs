//! Checks whether TensorRT's parser accepts the graphs of a folder, without TensorRT: operators and their versions,
//! types, strong typing, restrictions of individual operators, empty tensors, external data, and the profiles of a
//! serving plan.
//!
//! # Design
//! What the parser accepts is a table (`tensorrt/operators.json`, with its sources). Whether the builder finds a kernel
//! for every part only a builder can tell: `make check-rtx` compiles the graphs with TensorRT for RTX.

mod graph;
mod profile;
mod rules;
mod weights;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use t5gemma_graphs::interface::REORDER;

use super::limits::FLOAT8_GPUS;
use super::operators::{Table, type_name};
use super::profiles::{PROFILES, Profiles};
use super::version::TensorRtVersion;
use crate::error::{Error, Result};
use crate::proto::read::{Graph, Model, Node, read};

/// A part of a graph that TensorRT would reject or misinterpret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// The file.
    pub graph: String,
    /// Name of the node or tensor.
    pub node: String,
    /// The operator, if the finding is about a node.
    pub operator: Option<String>,
    /// The kind.
    pub kind: FindingKind,
    /// What is wrong.
    pub reason: String,
}

/// The kind of a [`Finding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FindingKind {
    /// An operator of another domain that the parser would take for the standard operator of the same name.
    Domain,
    /// An operator that the parser does not import.
    Operator,
    /// An operator or operator set newer than this version of TensorRT.
    Version,
    /// An element type that an operator does not accept.
    Type,
    /// Types that contradict each other in a strongly typed network.
    StrongTyping,
    /// A violated rule of an operator.
    Rule,
    /// A tensor without elements.
    Empty,
    /// A file too large for protobuf.
    Size,
    /// A tensor with too many elements.
    Volume,
    /// Weights that are missing or incomplete.
    ExternalData,
    /// A missing or invalid optimization profile.
    Profile,
}

impl FindingKind {
    /// The name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::Domain => "domain",
            FindingKind::Operator => "operator",
            FindingKind::Version => "version",
            FindingKind::Type => "type",
            FindingKind::StrongTyping => "strong-typing",
            FindingKind::Rule => "rule",
            FindingKind::Empty => "empty",
            FindingKind::Size => "size",
            FindingKind::Volume => "volume",
            FindingKind::ExternalData => "external-data",
            FindingKind::Profile => "profile",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { graph, node, operator, kind, reason } = self;
        write!(f, "{graph}: {node}")?;
        if let Some(operator) = operator {
            write!(f, " ({operator})")?;
        }
        write!(f, ": {}: {reason}", kind.name())
    }
}

/// The result of a [`check`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckReport {
    /// Number of nodes by file.
    pub graphs: BTreeMap<String, usize>,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Requirements on the GPU.
    pub notes: Vec<String>,
}

impl fmt::Display for CheckReport {
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

/// Checks an ONNX file, or all in a folder, and the profiles beside them if there are any.
///
/// # Errors
/// A file that cannot be read or is not an ONNX model, or a folder without any.
pub fn check(path: &Path, version: TensorRtVersion) -> Result<CheckReport> {
    let (folder, files) = onnx_files(path)?;
    let profiles = read_profiles(folder)?;
    let table = Table::load();
    let mut report = CheckReport { graphs: BTreeMap::new(), findings: Vec::new(), notes: Vec::new() };
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let size = fs::metadata(&file).map_err(Error::io(&file, "cannot be read"))?.len();
        if size > table.largest_protobuf {
            let reason = format!("{size} bytes, above protobuf's limit of {}", table.largest_protobuf);
            let (graph, node) = (name.clone(), "model".to_string());
            report.findings.push(Finding { graph, node, operator: None, kind: FindingKind::Size, reason });
            report.graphs.insert(name, 0);
            continue;
        }
        let bytes = fs::read(&file).map_err(Error::io(&file, "cannot be read"))?;
        let model = read(&file, &bytes)?;
        let mut checker = Checker { table: &table, version, model: &model, file: &name, findings: Vec::new() };
        checker.check_graph();
        checker.check_external_data(folder);
        checker.check_volumes(profiles.as_ref().and_then(|profiles| profiles.get(&name)));
        let is_wrapper = model.graph.nodes.iter().all(|node| node.op == "EPContext");
        if let Some(profiles) = profiles.as_ref().filter(|_| !is_wrapper) {
            let of_graph = profiles.get(&name);
            // ONNX Runtime's CUDA provider runs the graph that reorders cache rows, not TensorRT.
            if of_graph.is_some() || name != REORDER {
                checker.check_profiles(of_graph);
            }
        }
        report.findings.append(&mut checker.findings);
        if has_float8(&model.graph) {
            report.notes.push(format!("{name}: computes in fp8, which requires {FLOAT8_GPUS}"));
        }
        report.graphs.insert(name, model.graph.nodes.len());
    }
    Ok(report)
}

/// The ONNX files at a path, sorted, and the folder they are in.
fn onnx_files(path: &Path) -> Result<(&Path, Vec<PathBuf>)> {
    let (folder, mut files) = if path.is_dir() {
        let entries = fs::read_dir(path).map_err(Error::io(path, "cannot be listed"))?;
        let files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
        (path, files.map_err(Error::io(path, "cannot be listed"))?)
    } else {
        (path.parent().unwrap_or(Path::new("")), vec![path.to_path_buf()])
    };
    files.retain(|file| file.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    if files.is_empty() {
        return Err(Error::invalid(path.display(), "an ONNX file or a folder of ONNX files", "none"));
    }
    Ok((folder, files))
}

fn read_profiles(folder: &Path) -> Result<Option<Profiles>> {
    let path = folder.join(PROFILES);
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::read(&path).map_err(Error::io(&path, "cannot be read"))?;
    let profiles = serde_json::from_slice(&bytes);
    let expected = "the optimization profiles of a model";
    profiles.map(Some).map_err(|error| Error::Parse { path, expected, source: Box::new(error) })
}

fn has_float8(graph: &Graph) -> bool {
    let constants = graph.initializers.values().map(|tensor| tensor.dtype);
    constants.chain(graph.value_info.iter().map(|value| value.dtype)).any(|dtype| type_name(dtype) == Some("FP8"))
}

/// Checks one file. Its methods are in the files of this folder, by subject.
struct Checker<'c> {
    table: &'c Table,
    version: TensorRtVersion,
    model: &'c Model,
    /// Name of the file.
    file: &'c str,
    findings: Vec<Finding>,
}

impl Checker<'_> {
    fn report_node(&mut self, node: &Node, kind: FindingKind, reason: impl Into<String>) {
        let name =
            if node.name.is_empty() { node.outputs.first().cloned().unwrap_or_default() } else { node.name.clone() };
        let operator = if node.domain.is_empty() { node.op.clone() } else { format!("{}.{}", node.domain, node.op) };
        self.report(name, Some(operator), kind, reason.into());
    }

    fn report_tensor(&mut self, name: &str, kind: FindingKind, reason: impl Into<String>) {
        self.report(name.to_string(), None, kind, reason.into());
    }

    fn report(&mut self, node: String, operator: Option<String>, kind: FindingKind, reason: String) {
        self.findings.push(Finding { graph: self.file.to_string(), node, operator, kind, reason });
    }
}
