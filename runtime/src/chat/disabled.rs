//! `ChatTemplate` in a build without the feature `chat`: opening one is an error.

use std::convert::Infallible;
use std::path::Path;

use serde_json::Value;

use crate::error::Error;

/// A checkpoint's chat template.
#[derive(Debug)]
pub struct ChatTemplate(Infallible);

impl ChatTemplate {
    /// Fails: this build lacks the feature `chat`.
    ///
    /// # Errors
    /// Always.
    pub fn open(_: impl AsRef<Path>) -> Result<ChatTemplate, Error> {
        Err(Error::Unsupported {
            what: "chat templates require the feature `chat`, which this build of t5gemma-runtime lacks".into(),
            remedy: "enable it".into(),
        })
    }

    /// See [`ChatTemplate::open`].
    ///
    /// # Errors
    /// None: there is no template to apply.
    pub fn apply(&self, _: &[Value]) -> Result<String, Error> {
        match self.0 {}
    }
}
