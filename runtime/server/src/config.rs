//! `Config`: which models are served and within which limits.

use std::path::PathBuf;
use std::time::Duration;

use t5gemma_runtime::{EngineOptions, OpenOptions};

use crate::auth::Keys;
use crate::tls::Tls;
use crate::traces::Traces;

/// What to serve, and how.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The models by name. Doors that name no model use the first that fits.
    pub models: Vec<ModelConfig>,
    /// How models are opened.
    pub open: OpenOptions,
    /// The GPUs that each get a copy of a model that generates.
    pub devices: Vec<u32>,
    /// Limits of each model's engine. Its `max_waiting` is that of `limits`.
    pub engine: EngineOptions,
    /// Limits of requests.
    pub limits: Limits,
    /// The keys that callers need; `None` lets everyone in.
    pub keys: Option<Keys>,
    /// The certificate of the ports; `None` does not encrypt.
    pub tls: Option<Tls>,
    /// Where the spans of requests are sent.
    pub traces: Option<Traces>,
    /// Maximum number of generated tokens where a request does not say.
    pub max_new_tokens: Option<usize>,
    /// What the answers to Hugging Face's tasks are called.
    pub pipeline_tag: Option<String>,
    /// Whether `/metrics` has vLLM's names too.
    pub vllm_metrics: bool,
    /// Whether `/metrics` and the repository API are on a port of their own, and not among the doors.
    pub separate_admin: bool,
}

/// A model to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Its name in requests.
    pub name: String,
    /// The folder written by `t5gemma-export`.
    pub folder: PathBuf,
    /// LoRA adapters to load, by name.
    pub adapters: Vec<(String, PathBuf)>,
}

impl ModelConfig {
    /// A model without adapters.
    pub fn new(name: impl Into<String>, folder: impl Into<PathBuf>) -> ModelConfig {
        ModelConfig { name: name.into(), folder: folder.into(), adapters: Vec::new() }
    }

    /// Sets [`ModelConfig::adapters`].
    pub fn adapters(self, adapters: Vec<(String, PathBuf)>) -> ModelConfig {
        ModelConfig { adapters, ..self }
    }
}

/// What the server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Rows of one request: sources times the larger of beams and returned targets.
    pub max_request_rows: usize,
    /// Sources of one request.
    pub max_request_sources: usize,
    /// Requests that are accepted and unfinished.
    pub max_requests: usize,
    /// Rows of these requests.
    pub max_rows: usize,
    /// Source tokens of these requests.
    pub max_source_tokens: usize,
    /// Images of one request, crops included.
    pub max_request_images: usize,
    /// Images of the accepted and unfinished requests.
    pub max_images: usize,
    /// Pixels of an image. The limit of a body bounds its bytes.
    pub max_image_pixels: usize,
    /// How long the headers of a request may take to arrive, and a connection may be idle.
    pub header_timeout: Duration,
    /// How long a client may read nothing of an answer.
    pub read_timeout: Duration,
    /// Open connections.
    pub max_connections: usize,
    /// How long a request may take, whatever it says itself.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_body_bytes: 2_000_000,
            max_request_rows: 256,
            max_request_sources: 32,
            max_requests: 512,
            max_rows: 4096,
            max_source_tokens: 1 << 20,
            max_request_images: 16,
            max_images: 64,
            max_image_pixels: 16 << 20,
            header_timeout: Duration::from_secs(75),
            read_timeout: Duration::from_secs(60),
            max_connections: 1024,
            timeout: Duration::from_secs(600),
        }
    }
}

impl Config {
    /// Serves models with the default limits.
    pub fn new(models: Vec<ModelConfig>) -> Config {
        Config {
            models,
            open: OpenOptions::default(),
            devices: vec![0],
            engine: EngineOptions::default(),
            limits: Limits::default(),
            keys: None,
            tls: None,
            traces: None,
            max_new_tokens: None,
            pipeline_tag: None,
            vllm_metrics: false,
            separate_admin: false,
        }
    }
}
