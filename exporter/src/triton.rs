//! [`TritonRepository`]: the folders that make a model folder a model of Triton Inference Server: configurations, versions and
//! requests that warm the model up. The backend itself, `t5gemma`, is in `runtime/triton`; it fills in inputs and outputs.

mod plain;

use std::fmt::Write as _;
use std::fs;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};
use t5gemma_graphs::Target;
use t5gemma_graphs::manifest::{MANIFEST, Manifest};

use crate::error::{Error, Result};
use crate::staging::Existing;

const CONFIG: &str = "config.pbtxt";
/// A file of each version, by which Triton sees that the model folder was exported anew.
const EXPORTED: &str = "exported";
/// Triton takes the data of its warm-up requests from this folder.
const WARM_UP: &str = "warmup";

/// The backend that runs the models of a repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TritonBackend {
    /// That of this project.
    #[default]
    T5Gemma,
    /// Triton's `onnxruntime` for the graphs and its `python` for generation, which is slower.
    OnnxRuntime,
    /// The same with Triton's `tensorrt`, for plans that are built of the model folder later.
    TensorRt,
}

impl TritonBackend {
    /// As in the option `--triton-backend`, and as Triton calls it.
    pub fn name(self) -> &'static str {
        match self {
            TritonBackend::T5Gemma => "t5gemma",
            TritonBackend::OnnxRuntime => "onnxruntime",
            TritonBackend::TensorRt => "tensorrt",
        }
    }
}

/// Where a model of a repository is written.
struct Entry {
    /// Its name, and that of its folder.
    name: String,
    is_decoupled: bool,
}

/// A model repository of Triton Inference Server and the model folder that its models name: `NAME`, which answers a request
/// at once, and for generation `NAME_stream`, which answers token by token. `NAME` is the name of the model folder, or of the
/// model if the folder is the version `REPOSITORY/NAME/VERSION`.
pub(crate) struct TritonRepository {
    folder: PathBuf,
    out: PathBuf,
    name: String,
    /// The version that the model folder is, if it lies in the repository.
    version: Option<String>,
    backend: TritonBackend,
}

impl TritonRepository {
    /// Checks that the files may be written, before anything is exported.
    pub fn new(folder: &Path, out: &Path, existing: Existing, backend: TritonBackend) -> Result<TritonRepository> {
        let (folder, out) = (absolute(folder)?, absolute(out)?);
        if folder.exists() && !folder.is_dir() {
            return Err(Error::invalid(folder.display(), "the folder of a model repository", "a file"));
        }
        let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::to_string);
        let (parent, grandparent) = (out.parent(), out.parent().and_then(Path::parent));
        let is_inside = out.starts_with(&folder);
        let version = name(&out).filter(|version| is_version(version) && grandparent == Some(&*folder));
        // The version of a model of three graphs is that of none.
        let version = version.filter(|_| backend == TritonBackend::T5Gemma);
        if is_inside && version.is_none() {
            let expected = format!("a folder outside of {0}, or {0}/NAME/VERSION with a number", folder.display());
            return Err(Error::invalid("OUT", expected, out.display().to_string()));
        }
        let named = if version.is_some() { parent.and_then(name) } else { name(&out) };
        let Some(name) = named.filter(|name| is_model_name(name)) else {
            let expected = "a name of letters, digits, '.', '_' and '-', which becomes the model's";
            return Err(Error::invalid("OUT", expected, out.display().to_string()));
        };
        let repository = TritonRepository { folder, out, name, version, backend };
        let ends: &[&str] = match backend {
            TritonBackend::T5Gemma => &["", "_stream"],
            TritonBackend::OnnxRuntime | TritonBackend::TensorRt => &["", "_encoder", "_decoder", "_decoder_with_past"],
        };
        for end in ends {
            let config = repository.folder.join(format!("{}{end}", repository.name)).join(CONFIG);
            if config.exists() && existing == Existing::Refuse {
                return Err(Error::OutputExists { path: config });
            }
        }
        Ok(repository)
    }

    /// Writes the models of an exported model folder.
    pub fn write(&self, manifest: &Manifest) -> Result<()> {
        if self.backend != TritonBackend::T5Gemma {
            for (name, config) in plain::models(self, manifest) {
                plain::version(self, manifest, &name)?;
                put(&self.folder.join(&name).join(CONFIG), config.as_bytes())?;
            }
            return Ok(());
        }
        let stream = Entry { name: format!("{}_stream", self.name), is_decoupled: true };
        let whole = Entry { name: self.name.clone(), is_decoupled: false };
        let entries = if manifest.task.is_generation() { vec![whole, stream] } else { vec![whole] };
        let text = fs::read(self.out.join(MANIFEST)).map_err(Error::io(&self.out.join(MANIFEST), "cannot be read"))?;
        let exported = format!("{}\n", hex::encode(Sha256::digest(text)));
        for entry in entries {
            let folder = self.folder.join(&entry.name);
            let own = self.version.as_deref().filter(|_| !entry.is_decoupled);
            // A version that is the model folder itself is there already.
            if own.is_none() {
                put(&folder.join("1").join(EXPORTED), exported.as_bytes())?;
            }
            let (input, data) = warm_up(manifest);
            if let Some(data) = data {
                put(&folder.join(WARM_UP).join("text"), &data)?;
            }
            put(&folder.join(CONFIG), self.config(manifest, &entry, own.is_some(), &input).as_bytes())?;
        }
        Ok(())
    }

    fn config(&self, manifest: &Manifest, entry: &Entry, is_own: bool, warm_up: &str) -> String {
        let mut config = String::from("# Written by t5gemma-export. The backend fills in inputs and outputs.\n");
        let mut line = |text: std::fmt::Arguments<'_>| writeln!(config, "{text}").expect("a String can be written to");
        line(format_args!("name: {:?}\nbackend: \"t5gemma\"\nmax_batch_size: 0", entry.name));
        if manifest.task.is_generation() {
            line(format_args!("model_transaction_policy {{ decoupled: {} }}", entry.is_decoupled));
        }
        // One engine serves all instances, and its GPUs are chosen by parameters.
        line(format_args!("instance_group [ {{ kind: KIND_MODEL count: 1 }} ]"));
        let mut parameter = |key: &str, value: &str| {
            line(format_args!("parameters {{ key: \"{key}\" value {{ string_value: \"{}\" }} }}", escaped(value)));
        };
        if !is_own {
            parameter("model", &relative(&self.folder.join(&entry.name), &self.out));
        }
        if let Some(provider) = provider(&manifest.target) {
            parameter("provider", provider);
        }
        line(format_args!("model_warmup [ {{ name: \"first\" count: 1 inputs {{ {warm_up} }} }} ]"));
        config
    }
}

/// The input of the request that warms a model up, and the bytes of its text: the length in 4 bytes and the text.
fn warm_up(manifest: &Manifest) -> (String, Option<Vec<u8>>) {
    if !manifest.files.contains_key("tokenizer.json") {
        let ids = "key: \"input_ids\" value { data_type: TYPE_INT64 dims: [ 1, 8 ] zero_data: true }";
        return (ids.to_string(), None);
    }
    let text = b"The meeting starts at 9:05 am.";
    let length = u32::try_from(text.len()).expect("a short text").to_le_bytes();
    let input = "key: \"text_input\" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: \"text\" }";
    (input.to_string(), Some([&length[..], text].concat()))
}

/// The provider that runs the graphs of a target; `None` for the CPU's.
fn provider(target: &str) -> Option<&'static str> {
    match target {
        name if name == Target::Cuda.name() => Some("cuda"),
        name if name == Target::TensorRt.name() => Some("tensorrt"),
        _ => None,
    }
}

fn is_version(name: &str) -> bool {
    !name.starts_with('0') && name.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_model_name(name: &str) -> bool {
    !name.starts_with('.') && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// The text of a protobuf string.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

/// A path without links, as far as there is something, and without `..`.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(Error::io(path, "cannot be resolved"))?;
    let existing = path.ancestors().find(|parent| parent.exists()).unwrap_or(Path::new("/"));
    let rest = path.strip_prefix(existing).expect("an ancestor is a prefix").to_path_buf();
    let resolved = fs::canonicalize(existing).map_err(Error::io(existing, "cannot be resolved"))?;
    let mut whole = resolved;
    for part in rest.components() {
        match part {
            Component::ParentDir => drop(whole.pop()),
            part => whole.push(part),
        }
    }
    Ok(whole)
}

/// The way from one folder to another.
fn relative(from: &Path, to: &Path) -> String {
    let shared = from.components().zip(to.components()).take_while(|(left, right)| left == right).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(to.components().skip(shared)).collect();
    way.to_string_lossy().into_owned()
}

/// Writes a file aside and renames it, and creates the folders that it needs.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().expect("a file of a folder");
    fs::create_dir_all(folder).map_err(Error::io(folder, "cannot be created"))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = folder.join(format!(".{name}.partial-{}", std::process::id()));
    let written = fs::write(&aside, bytes).map_err(Error::io(&aside, "cannot be written"));
    let renamed = written.and_then(|()| fs::rename(&aside, path).map_err(Error::io(path, "cannot be written")));
    if renamed.is_err() {
        let _ = fs::remove_file(&aside);
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative() {
        for (from, to, way) in [
            ("/a/repository/demo", "/a/models/demo", "../../models/demo"),
            ("/a/repository/demo_stream", "/a/repository/demo/1", "../demo/1"),
            ("/a/b", "/c", "../../c"),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), way);
        }
    }

    #[test]
    fn folders_that_triton_would_not_find_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder can be created");
        let repository = folder.path().join("repository");
        let new = |out: &Path| TritonRepository::new(&repository, out, Existing::Refuse, TritonBackend::T5Gemma);
        for (out, name, version) in [
            (folder.path().join("demo"), "demo", None),
            (folder.path().join("x/../demo"), "demo", None),
            (repository.join("demo/12"), "demo", Some("12")),
        ] {
            let found = new(&out).expect("fine");
            assert_eq!((&*found.name, found.version.as_deref()), (name, version));
        }
        for out in [
            "repository/demo",
            "repository/demo/v1",
            "repository/demo/01",
            "repository/a/demo/1",
            "de mo",
            "repository",
        ] {
            assert!(new(&folder.path().join(out)).is_err(), "{out}");
        }
    }
}
