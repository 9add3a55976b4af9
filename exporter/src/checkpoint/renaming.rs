//! The names of a checkpoint's tensors: those that the model's classes give them, found by themselves or behind a prefix
//! that the caller gives.

use t5gemma_graphs::config::Config;
use t5gemma_graphs::json::{self, cut};

use super::Checkpoint;
use crate::error::{Error, Result};
use crate::names;

/// The configuration of the T5Gemma in that of a model around it.
const INNER_CONFIG: &str = "t5_config_dict";

impl Checkpoint {
    /// Renames all tensors to the names that the model's classes give them.
    pub(super) fn rename_tensors(&mut self) -> Result<()> {
        let stored: Vec<&str> = self.tensors.keys().chain(self.absent.keys()).map(String::as_str).collect();
        let names = names::of_model(&stored)
            .map_err(|ambiguous| Error::invalid(self.path.display(), ambiguous.expected, ambiguous.found))?;
        let names: Vec<(String, String)> = names.into_iter().map(|(name, stored)| (name, stored.to_string())).collect();
        let (mut tensors, mut absent) = (std::mem::take(&mut self.tensors), std::mem::take(&mut self.absent));
        for (name, stored) in names {
            if let Some(location) = tensors.remove(&stored) {
                self.tensors.insert(name, location);
            } else if let Some(missing) = absent.remove(&stored) {
                self.absent.insert(name, missing);
            }
        }
        Ok(())
    }

    /// Strips `prefix` from the names that begin with it; all other tensors have the names that they are stored with. If
    /// `config.json` is of no known `model_type`, the configuration is its `t5_config_dict`.
    ///
    /// # Errors
    /// No tensor has such a name, or two have the same name after it.
    pub fn with_weights_prefix(mut self, prefix: &str) -> Result<Checkpoint> {
        let renamed = |stored: &str| {
            let rest = stored.strip_prefix(prefix).filter(|rest| !rest.is_empty());
            rest.unwrap_or(stored).to_string()
        };
        let (tensors, absent) = (std::mem::take(&mut self.tensors), std::mem::take(&mut self.absent));
        let of_files = tensors.values().map(|location| &location.stored);
        let mut stored = of_files.chain(absent.values().map(|absent| &absent.stored)).peekable();
        let first = stored.peek().map_or_else(|| "no tensors".to_string(), |name| format!("{}, ...", cut(name)));
        if prefix.is_empty() || !stored.any(|stored| stored.starts_with(prefix)) {
            let expected = format!("tensors whose names begin with the weights prefix {prefix:?}");
            return Err(Error::invalid(self.path.display(), expected, first));
        }
        for location in tensors.into_values() {
            let (name, stored) = (renamed(&location.stored), location.stored.clone());
            if let Some(other) = self.tensors.insert(name.clone(), location) {
                let found = format!("{} and {}", cut(&other.stored), cut(&stored));
                return Err(Error::invalid(self.path.display(), format!("one tensor for {}", cut(&name)), found));
            }
        }
        self.absent = absent.into_values().map(|absent| (renamed(&absent.stored), absent)).collect();
        self.has_weights_prefix = true;
        Ok(self)
    }
}

/// The text of the T5Gemma's configuration in that of a model of another `model_type`, if it has one.
pub fn inner_config(text: &str) -> Option<String> {
    let error = Config::parse(text).err()?;
    let inner = json::parse(text).ok()?.get(INNER_CONFIG)?.to_string();
    (error.field == "model_type").then_some(inner)
}
