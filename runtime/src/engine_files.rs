//! `EngineFiles`: the engine files of a provider, in a model folder or another one, and the stamps that record what
//! they were built from. An engine of other graphs or weights is rejected before a session reads it.

use std::fs;
use std::path::{Path, PathBuf};

use t5gemma_graphs::interface::ENGINES;

use crate::device::Provider;
use crate::error::Error;
use crate::folder::Folder;
use crate::onnxruntime;

/// The stamp of the engines that a provider has cached.
const CACHE_STAMP: &str = "cache.stamp";

/// A model folder and the folder with its engines.
pub(crate) struct EngineFiles<'a> {
    pub model: &'a Folder,
    /// Contains the folder [`ENGINES`] and the graphs that wrap engines.
    pub folder: &'a Path,
}

impl<'a> EngineFiles<'a> {
    /// The engines in `folder`, which is the model's own or another.
    pub fn new(model: &'a Folder, folder: &'a Path) -> EngineFiles<'a> {
        EngineFiles { model, folder }
    }

    /// The file to open in place of `graph` if the model's script has built an engine of it.
    ///
    /// # Errors
    /// An engine that was built from another graph, or by a TensorRT whose engines ONNX Runtime does not run.
    pub fn built(&self, graph: &str, provider: Provider) -> Result<Option<PathBuf>, Error> {
        let record = self.model.graph(graph);
        let stem = record.file.strip_suffix(".onnx").unwrap_or(&record.file);
        let engine = self.folder.join(ENGINES).join(format!("{stem}.plan"));
        if provider != Provider::TensorRt || !engine.is_file() {
            return Ok(None);
        }
        let stamp = engine.with_extension("plan.stamp");
        let found = fs::read_to_string(&stamp).map_err(Error::reading(&stamp))?;
        let expected = format!("graph {}, weights {}", record.record.sha256, self.model.manifest.weights.record.sha256);
        let refused = |expected: String, found: &str| {
            let expected = format!("{expected} (build it with build_engines.sh --force, or remove it)");
            let found = found.trim().to_string();
            Error::Folder { path: engine.clone(), field: "stamp".into(), expected, found }
        };
        if !found.starts_with(&expected) {
            return Err(refused(format!("an engine of {expected}"), &found));
        }
        if major_version(&found).is_some_and(|major| major > 10) {
            return Err(refused("an engine of TensorRT 10, which ONNX Runtime 1.31 is built for".into(), &found));
        }
        // A wrapper in another folder has to be a copy of the model's.
        let (name, wrapper) = (format!("{stem}_ctx.onnx"), self.folder.join(format!("{stem}_ctx.onnx")));
        if self.folder != self.model.path {
            let [own, copy] = [self.model.path.join(&name), wrapper.clone()]
                .map(|path| fs::read(&path).map_err(Error::reading(&path)));
            if own? != copy? {
                return Err(refused(format!("a copy of the model's {name} beside it"), "another file"));
            }
        }
        Ok(Some(wrapper))
    }

    /// Rejects engines that were cached for other graphs or by another provider, if this provider reads them.
    pub fn check_cache(&self, provider: Provider) -> Result<(), Error> {
        if !matches!(provider, Provider::TensorRt | Provider::NvTensorRtRtx) {
            return Ok(());
        }
        let path = self.folder.join(ENGINES).join(CACHE_STAMP);
        let Ok(found) = fs::read_to_string(&path) else { return Ok(()) };
        let stamp = self.cache_stamp(provider);
        if found == stamp {
            return Ok(());
        }
        let remedy = format!("remove the folder {ENGINES}, or run `t5gemma build-engines --force`");
        let expected = format!("{} ({remedy})", stamp.trim());
        Err(Error::Folder { path, field: "graphs".into(), expected, found: found.trim().to_string() })
    }

    /// Writes the stamp of the engines that the provider has cached.
    pub fn write_cache_stamp(&self, provider: Provider) -> Result<(), Error> {
        let engines = self.folder.join(ENGINES);
        fs::create_dir_all(&engines).map_err(Error::writing(&engines))?;
        let path = engines.join(CACHE_STAMP);
        fs::write(&path, self.cache_stamp(provider)).map_err(Error::writing(&path))
    }

    /// What the cached engines are built from, and by which library.
    fn cache_stamp(&self, provider: Provider) -> String {
        let manifest = &self.model.manifest;
        let graphs = manifest.graphs.values().map(|graph| graph.record.sha256.as_str()).collect::<Vec<_>>();
        let weights = &manifest.weights.record.sha256;
        format!("provider {provider}, {}, graphs {}, weights {weights}\n", onnxruntime::version(), graphs.join(" "))
    }
}

/// The major version in a stamp's `TensorRT 101600` or `TensorRT 10.16.0`, if there is one.
fn major_version(stamp: &str) -> Option<u32> {
    let (_, version) = stamp.split_once("TensorRT ")?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    let number: u32 = digits.parse().ok()?;
    Some(if number >= 1000 { number / 10_000 } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_stamps_are_read() {
        for (stamp, expected) in [
            ("graph a, weights b, TensorRT 101600, NVIDIA H100, 9.0", Some(10)),
            ("graph a, weights b, TensorRT 110100, NVIDIA H100, 9.0", Some(11)),
            ("graph a, weights b, TensorRT 8601, NVIDIA A10, 8.6", Some(0)),
            ("graph a, weights b, TensorRT 10.16.1.11, NVIDIA H100, 9.0", Some(10)),
            ("graph a, weights b, TensorRT 11.1, NVIDIA H100, 9.0", Some(11)),
            ("graph a, weights b, TensorRT unknown, NVIDIA H100, 9.0", None),
            ("", None),
        ] {
            assert_eq!(major_version(stamp), expected, "{stamp}");
        }
    }
}
