//! `LazyTokenizer`: the tokenizer of a model folder, loaded on first use. A model works without one on token ids alone,
//! so a missing or unusable `tokenizer.json` is an error of the calls that need text, and every one of them reports it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{Tokenizer, Unusable};
use crate::error::Error;
use crate::fork::Origin;

/// The tokenizer of a model folder.
pub(crate) struct LazyTokenizer {
    path: PathBuf,
    loaded: OnceLock<Result<Tokenizer, Unusable>>,
    origin: Origin,
}

impl LazyTokenizer {
    /// The tokenizer of the model folder `folder`, not loaded yet.
    pub fn in_folder(folder: &Path) -> LazyTokenizer {
        LazyTokenizer { path: folder.join(Tokenizer::FILE), loaded: OnceLock::new(), origin: Origin::now() }
    }

    /// The tokenizer's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tokenizer, loaded by the first call.
    ///
    /// # Errors
    /// The folder has no `tokenizer.json`, or an unusable one.
    pub fn get(&self) -> Result<&Tokenizer, Error> {
        let loaded = match self.loaded.get() {
            Some(loaded) => loaded,
            None => {
                let _in_call = self.origin.enter()?;
                self.loaded.get_or_init(|| Tokenizer::read(&self.path))
            }
        };
        loaded.as_ref().map_err(|error| error.at(&self.path))
    }
}
