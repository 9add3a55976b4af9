//! Building a provider's engines ahead of time, so that nobody's first request waits for it.

use std::fs;
use std::path::Path;

use t5gemma_graphs::interface::{ENGINES, PROVIDER_OPTIONS};

use crate::device::Provider;
use crate::engine_files;
use crate::error::Error;
use crate::folder::Folder;
use crate::session::{OpenOptions, Opener, check_options, engines_of};

/// Has the provider of `options` build the engines of the model folder `path`, into its folder `engines`, or into that
/// of [`OpenOptions::engines`]. `watch` is told of each graph before its engine is built. With `anew`, what is there already is
/// removed first.
///
/// # Errors
/// A provider without engines, a folder without a serving plan for it, engines that were built of other graphs, or whatever
/// the provider finds wrong.
pub fn build_engines(path: &Path, options: &OpenOptions, anew: bool, watch: &mut dyn FnMut(&str)) -> Result<(), Error> {
    check_options(options)?;
    let provider = options.provider.kind;
    if !matches!(provider, Provider::TensorRt | Provider::NvTensorRtRtx) {
        return Err(Error::input("provider", "tensorrt or nv-tensorrt-rtx, which build engines", provider.name()));
    }
    let folder = Folder::open(path, options.check_weights)?;
    if !folder.manifest.files.contains_key(PROVIDER_OPTIONS) {
        return Err(Error::Folder {
            path: folder.path.join(PROVIDER_OPTIONS),
            field: "file".into(),
            expected: "the options of a serving plan (export with --target tensorrt --plan)".into(),
            found: "none".into(),
        });
    }
    let engines = engines_of(&folder, options).join(ENGINES);
    if anew && engines.is_dir() {
        fs::remove_dir_all(&engines).map_err(Error::file(&engines))?;
    }
    let mut opener = Opener::new(&folder, options)?;
    let manifest = &folder.manifest;
    let parts = manifest.parts(&folder.config);
    fs::create_dir_all(&engines).map_err(Error::file(&engines))?;
    for part in &parts {
        watch(part.name);
        drop(opener.open(part.name, &part.ports)?);
    }
    drop(opener);
    engine_files::stamp_cache(engines_of(&folder, options), &engine_files::stamp_of(&folder, provider))
}
