//! Building a provider's engines ahead of time, so that no request waits for it.

use std::fs;
use std::path::Path;

use t5gemma_graphs::interface::{ENGINES, PROVIDER_OPTIONS};

use crate::device::Provider;
use crate::engine_files::EngineFiles;
use crate::error::Error;
use crate::folder::Folder;
use crate::session::{OpenOptions, Opener};

/// What happens to existing engines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExistingEngines {
    /// Keep them.
    #[default]
    Keep,
    /// Remove them and build again.
    Replace,
}

/// Builds the engines of the model folder `path` with the provider of `options`, in its folder `engines` or in
/// [`OpenOptions::engines`]. Calls `on_graph` with the name of each graph before building its engine.
///
/// # Errors
/// A provider without engines, a model without a serving plan for it, engines that were built from other graphs, or a
/// failure of the provider.
pub fn build_engines(
    path: &Path,
    options: &OpenOptions,
    existing: ExistingEngines,
    on_graph: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    options.check()?;
    let provider = options.provider.kind;
    if !matches!(provider, Provider::TensorRt | Provider::NvTensorRtRtx) {
        return Err(Error::input("provider", "tensorrt or nv-tensorrt-rtx, which build engines", provider.name()));
    }
    let folder = Folder::open(path, options.weights_access())?;
    if !folder.manifest.files.contains_key(PROVIDER_OPTIONS) {
        return Err(Error::Folder {
            path: folder.path.join(PROVIDER_OPTIONS),
            field: "file".into(),
            expected: "the options of a serving plan (export for the target tensorrt with a plan)".into(),
            found: "none".into(),
        });
    }
    let files = EngineFiles::new(&folder, options.engines_beside(&folder.path));
    let engines = files.folder.join(ENGINES);
    if existing == ExistingEngines::Replace && engines.is_dir() {
        fs::remove_dir_all(&engines).map_err(Error::writing(&engines))?;
    }
    let mut opener = Opener::new(&folder, options)?;
    fs::create_dir_all(&engines).map_err(Error::writing(&engines))?;
    for spec in folder.manifest.graph_specs() {
        on_graph(spec.name);
        drop(opener.open(spec.name, &spec.ports)?);
    }
    drop(opener);
    files.write_cache_stamp(provider)
}
