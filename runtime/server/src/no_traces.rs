//! `Traces` of a server that is built without them.

use std::time::SystemTime;

use axum::http::HeaderMap;
use t5gemma_runtime::RequestStats;

/// Nothing is sent.
#[derive(Clone, Debug)]
pub enum Traces {}

/// Nothing is noted.
#[derive(Clone, Debug, Default)]
pub struct Trace(());

impl Traces {
    /// None.
    ///
    /// # Errors
    /// None.
    pub fn from_environment() -> Result<Option<Traces>, String> {
        Ok(None)
    }

    /// Sends nothing.
    pub fn end(&self) {
        match *self {}
    }

    /// Begins nothing.
    pub fn begin(&self, _door: &str, _id: &str, _headers: &HeaderMap) -> Trace {
        match *self {}
    }
}

impl Trace {
    /// Notes nothing.
    pub fn answered(&self, _status: u16) {}

    /// Notes nothing.
    pub fn generated(
        &self,
        _model: &str,
        _submitted: SystemTime,
        _stats: &RequestStats,
        _failure: Option<&'static str>,
    ) {
    }
}
