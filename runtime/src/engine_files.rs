//! The files of a provider's engines in a model folder, and the stamps that say what they were built of. An engine of other
//! graphs or weights is refused before a session reads it.

use std::fs;
use std::path::{Path, PathBuf};

use t5gemma_graphs::interface::ENGINES;

use crate::device::Provider;
use crate::error::Error;
use crate::folder::Folder;
use crate::onnxruntime;

/// The graph file to open in place of `graph` where an engine was built of it ahead of time, by the folder's script.
///
/// # Errors
/// An engine that was built of another graph, or by a TensorRT whose engines ONNX Runtime does not run.
pub(crate) fn built(
    (folder, engines): (&Folder, &Path),
    graph: &str,
    provider: Provider,
) -> Result<Option<PathBuf>, Error> {
    let record = folder.graph(graph);
    let stem = record.file.strip_suffix(".onnx").unwrap_or(&record.file);
    let plan = engines.join(ENGINES).join(format!("{stem}.plan"));
    if provider != Provider::TensorRt || !plan.is_file() {
        return Ok(None);
    }
    let stamp = plan.with_extension("plan.stamp");
    let found = fs::read_to_string(&stamp).map_err(Error::file(&stamp))?;
    let expected = format!("graph {}, weights {}", record.record.sha256, folder.manifest.weights.record.sha256);
    let refused = |expected: String, found: &str| {
        let expected = format!("{expected} (build it with build_engines.sh --force, or remove it)");
        let found = found.trim().to_string();
        Error::Folder { path: plan.clone(), field: "stamp".into(), expected, found }
    };
    if !found.starts_with(&expected) {
        return Err(refused(format!("an engine of {expected}"), &found));
    }
    if major_version(&found).is_some_and(|major| major > 10) {
        return Err(refused("an engine of TensorRT 10, which ONNX Runtime 1.31 is built for".into(), &found));
    }
    // Of a wrapper only a copy that was made for these engines may lie elsewhere.
    let (name, wrapper) = (format!("{stem}_ctx.onnx"), engines.join(format!("{stem}_ctx.onnx")));
    if engines != folder.path {
        let [own, copy] =
            [folder.path.join(&name), wrapper.clone()].map(|path| fs::read(&path).map_err(Error::file(&path)));
        if own? != copy? {
            return Err(refused(format!("a copy of the model's {name} beside it"), "another file"));
        }
    }
    Ok(Some(wrapper))
}

/// The major version in a stamp's `TensorRT 101600` or `TensorRT 10.16.0`, if it tells it.
fn major_version(stamp: &str) -> Option<u32> {
    let (_, version) = stamp.split_once("TensorRT ")?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    let number: u32 = digits.parse().ok()?;
    Some(if number >= 1000 { number / 10_000 } else { number })
}

/// The stamp of the engines that a provider has cached in the folder.
const STAMP: &str = "cache.stamp";

/// Refuses engines that were cached for other graphs.
pub(crate) fn check_cache((folder, engines): (&Folder, &Path), provider: Provider) -> Result<(), Error> {
    let stamp = engines.join(ENGINES).join(STAMP);
    let Ok(found) = fs::read_to_string(&stamp) else { return Ok(()) };
    let expected = stamp_of(folder, provider);
    match found == expected {
        true => Ok(()),
        false => Err(Error::Folder {
            path: stamp,
            field: "graphs".into(),
            expected: format!(
                "{} (remove the folder {ENGINES}, or run `t5gemma build-engines --force`)",
                expected.trim()
            ),
            found: found.trim().to_string(),
        }),
    }
}

/// Says of the engines in the folder what they were built of.
pub(crate) fn stamp_cache(folder: &Path, text: &str) -> Result<(), Error> {
    let engines = folder.join(ENGINES);
    fs::create_dir_all(&engines).map_err(Error::file(&engines))?;
    let stamp = engines.join(STAMP);
    fs::write(&stamp, text).map_err(Error::file(&stamp))
}

/// What the engines of a folder are built of and by.
pub(crate) fn stamp_of(folder: &Folder, provider: Provider) -> String {
    let graphs = folder.manifest.graphs.values().map(|graph| graph.record.sha256.as_str()).collect::<Vec<_>>();
    let weights = &folder.manifest.weights.record.sha256;
    format!("provider {provider}, {}, graphs {}, weights {weights}\n", onnxruntime::version(), graphs.join(" "))
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
