//! A repository for Triton's own backends: the three graphs as models of `onnxruntime` or `tensorrt`, and a model of `python` that
//! generates with them. For people who want no other backend; it is slower.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use t5gemma_graphs::interface::{DType, ENGINES, Port};
use t5gemma_graphs::manifest::Manifest;

use super::{TritonBackend, TritonRepository, escaped, put, relative};
use crate::error::{Error, Result};

/// The program of the model that generates.
const MODEL: &str = include_str!("model.py");

/// The name of a plan in its version, which Triton's `tensorrt` looks for.
const PLAN: &str = "model.plan";

/// The models, by name, with their configurations; the graphs come before the model that needs them.
pub(super) fn models(repository: &TritonRepository, manifest: &Manifest) -> Vec<(String, String)> {
    let mut models = Vec::new();
    let mut parameters = String::new();
    for (graph, record) in &manifest.graphs {
        let name = format!("{}_{graph}", repository.name);
        let is_plan = repository.backend == TritonBackend::TensorRt;
        let file = if is_plan { PLAN } else { &record.file };
        let mut config = format!(
            "name: {name:?}\nbackend: {:?}\nmax_batch_size: 0\ndefault_model_filename: {file:?}\n",
            repository.backend.name(),
        );
        if is_plan {
            // build_engines.sh builds each plan with one profile.
            config += "instance_group [ { kind: KIND_GPU count: 1 profile: [ \"0\" ] } ]\n";
        }
        for (list, ports) in [("input", &record.ports.inputs), ("output", &record.ports.outputs)] {
            ports.iter().for_each(|port| config += &format!("{list} [ {} ]\n", tensor(port)));
        }
        models.push((name, config));
        let outputs: Vec<&str> = record.ports.outputs.iter().map(|port| &*port.name).collect();
        parameters += &parameter(graph, &outputs.join(","));
    }
    let folder = repository.folder.join(&repository.name);
    parameters += &parameter("model", &relative(&folder, &repository.out));
    let text =
        |list: &str, name: &str| format!("{list} [ {{ name: \"{name}\" data_type: TYPE_STRING dims: [ -1 ] }} ]\n");
    let config = format!("name: {:?}\nbackend: \"python\"\nmax_batch_size: 0\n", repository.name)
        + &text("input", "text_input")
        + &text("output", "text_output")
        + "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
        + &parameters;
    models.push((repository.name.clone(), config));
    models
}

/// Writes what a model has besides its configuration: the program, or the model folder as the version.
pub(super) fn version(repository: &TritonRepository, manifest: &Manifest, name: &str) -> Result<()> {
    let folder = repository.folder.join(name);
    if name == repository.name {
        return put(&folder.join("1/model.py"), MODEL.as_bytes());
    }
    if repository.backend == TritonBackend::TensorRt {
        let graph = name.strip_prefix(&repository.name).and_then(|rest| rest.strip_prefix('_'));
        let record = graph.and_then(|graph| manifest.graphs.get(graph)).expect("a model of a graph");
        let folder = folder.join("1");
        fs::create_dir_all(&folder).map_err(Error::io(&folder, "cannot be created"))?;
        let plan = Path::new(ENGINES).join(&record.file).with_extension("plan");
        // It leads nowhere until the plans are built.
        return link(&relative(&folder, &repository.out.join(plan)), &folder.join(PLAN));
    }
    fs::create_dir_all(&folder).map_err(Error::io(&folder, "cannot be created"))?;
    link(&relative(&folder, &repository.out), &folder.join("1"))
}

/// Links to the model folder, which is the version because graphs read their weights beside them, or to a plan.
fn link(to: &str, path: &Path) -> Result<()> {
    if path.is_symlink() {
        fs::remove_file(path).map_err(Error::io(path, "cannot be removed"))?;
    }
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(to, path);
    #[cfg(not(unix))]
    let made = Err::<(), _>(std::io::Error::other(format!("expected a system with symbolic links, to {to}")));
    made.map_err(Error::io(path, "cannot be created"))
}

fn parameter(key: &str, value: &str) -> String {
    format!("parameters {{ key: \"{key}\" value {{ string_value: \"{}\" }} }}\n", escaped(value))
}

fn tensor(port: &Port) -> String {
    let kind = match port.dtype {
        DType::Float32 => "TYPE_FP32",
        DType::Float16 => "TYPE_FP16",
        DType::BFloat16 => "TYPE_BF16",
        DType::Int32 => "TYPE_INT32",
        _ => "TYPE_INT64",
    };
    let mut dims = String::new();
    for (at, dim) in port.shape.iter().enumerate() {
        // A symbol, or a product with one, varies from run to run.
        let size: i64 = dim.to_string().parse().unwrap_or(-1);
        let _ = write!(dims, "{}{size}", if at == 0 { "" } else { ", " });
    }
    format!("{{ name: {:?} data_type: {kind} dims: [ {dims} ] }}", port.name)
}
