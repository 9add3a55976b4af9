//! Where an exported model comes from: a checkpoint, or random weights for a configuration.

use std::collections::BTreeMap;

use serde_json::Value;
use sha2::{Digest, Sha256};
use t5gemma_graphs::config::Config;
use t5gemma_graphs::images::ImageSettings;
use t5gemma_graphs::manifest::{self, FileRecord};

use crate::checkpoint::{self, CHAT_TEMPLATE, COMPANIONS, Checkpoint, DEFAULT_CHAT_TEMPLATE, GENERATION_CONFIG};
use crate::error::{Error, Result};
use crate::files;
use crate::images::image_settings;

/// Where a model comes from.
#[derive(Debug)]
#[non_exhaustive]
pub enum Source {
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// A configuration with random weights.
    Dummy {
        /// The text of a `config.json`.
        config: String,
        /// Where the text comes from, for messages.
        origin: String,
        /// Seed of the weights.
        seed: u64,
    },
}

/// The configuration of a [`Source`].
pub(crate) struct SourceConfig {
    /// The text of `config.json`.
    pub text: String,
    pub config: Config,
    /// Where the text comes from, for messages.
    pub origin: String,
}

impl Source {
    /// The text of the configuration, what it says, and where it comes from.
    pub(crate) fn config(&self) -> Result<SourceConfig> {
        let (text, origin) = match self {
            Source::Checkpoint(checkpoint) => {
                (checkpoint.config_text()?, checkpoint.config_path().display().to_string())
            }
            Source::Dummy { config, origin, .. } => (config.clone(), origin.clone()),
        };
        let config = Config::parse(&text).map_err(|error| Error::config(&origin, error))?;
        Ok(SourceConfig { text, config, origin })
    }

    /// The manifest's record of this source: the files of the tensors for which `is_used` returns true. Once `is_stopped`
    /// returns true, the hashes are cut short.
    pub(crate) fn record(&self, is_used: impl Fn(&str) -> bool, is_stopped: impl Fn() -> bool) -> manifest::Source {
        let checkpoint = match self {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Dummy { seed, .. } => return manifest::Source::Dummy { seed: *seed },
        };
        let mut files = BTreeMap::new();
        for (name, bytes) in checkpoint.files(is_used) {
            let mut hash = Sha256::new();
            bytes.chunks(8 << 20).take_while(|_| !is_stopped()).for_each(|chunk| hash.update(chunk));
            let record = FileRecord { bytes: bytes.len() as u64, sha256: hex::encode(hash.finalize()) };
            files.insert(name.to_string(), record);
        }
        manifest::Source::Checkpoint(files)
    }

    /// The manifest's records of the merged adapters.
    pub(crate) fn adapters(&self) -> Vec<manifest::AdapterRecord> {
        match self {
            Source::Checkpoint(checkpoint) => checkpoint.adapter_records(),
            Source::Dummy { .. } => Vec::new(),
        }
    }

    /// A tensor and the file it is in, for messages.
    pub(crate) fn place(&self, tensor: &str) -> String {
        match self {
            Source::Checkpoint(checkpoint) => match checkpoint.file_of(tensor) {
                Some(file) => format!("{}: {tensor}", file.display()),
                None => tensor.to_string(),
            },
            Source::Dummy { .. } => tensor.to_string(),
        }
    }

    /// The tokenizer's files and others that are copied into the model folder, with their content.
    ///
    /// # Errors
    /// A file that the programs which read it could not use.
    pub(crate) fn companions(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let Source::Checkpoint(checkpoint) = self else { return Ok(Vec::new()) };
        let folder = checkpoint.tokenizer_folder();
        let exists = |name: &str| files::entry_exists(&folder.join(name));
        let read = |name: &&'static str| Ok((*name, checkpoint::companion(folder, name)?));
        let of_tokenizer = COMPANIONS.iter().filter(|name| **name != GENERATION_CONFIG && exists(name));
        let mut companions: Vec<_> = of_tokenizer.map(read).collect::<Result<_>>()?;
        let settings = checkpoint.config_folder();
        if files::entry_exists(&settings.join(GENERATION_CONFIG)) {
            companions.push((GENERATION_CONFIG, checkpoint::companion(&settings, GENERATION_CONFIG)?));
        }
        // A checkpoint may keep its chat template in a folder of templates for several uses; only the default is
        // copied.
        if !exists(CHAT_TEMPLATE) && exists(DEFAULT_CHAT_TEMPLATE) {
            companions.push((CHAT_TEMPLATE, checkpoint::companion(folder, DEFAULT_CHAT_TEMPLATE)?));
        }
        Ok(companions)
    }

    /// How the model wants its images: `defaults`, unless the checkpoint says otherwise.
    pub(crate) fn image_settings(&self, defaults: ImageSettings) -> Result<ImageSettings> {
        let Source::Checkpoint(checkpoint) = self else { return Ok(defaults) };
        // Beside the tokenizer where that is elsewhere: a processor is both.
        image_settings(checkpoint.tokenizer_folder(), defaults)
    }

    /// The content of `generation_config.json`, if there is one.
    pub(crate) fn generation_config(&self) -> Result<Option<Value>> {
        let Source::Checkpoint(checkpoint) = self else { return Ok(None) };
        let path = checkpoint.config_folder().join(GENERATION_CONFIG);
        if path.exists() { Ok(Some(files::read_json_object(&path)?.1)) } else { Ok(None) }
    }
}
