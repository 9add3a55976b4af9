//! Serves T5Gemma models over HTTP and gRPC on one port, in the forms that existing clients speak.
//!
//! ```no_run
//! # async fn run() -> Result<(), t5gemma_server::ServeError> {
//! use t5gemma_server::{Config, ModelConfig, Server};
//!
//! let server = Server::new(Config::new(vec![ModelConfig::new("model", "folder")]))?;
//! server.load().await?;
//! let router = axum::Router::new().merge(server.router());
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//! `doors` holds the wire types of each client's API. They use `generating` and `vectors`, which do the same for all of
//! them: accept (`admission`), tokenize, run and count. `events` alone talks to the engine; `served` and `models` open
//! models; `uploads` are images without a URI; `call` reads requests; `sse`, `live_text`, `stop_text`, `truncation`,
//! `pictures` and `fields` are tools of the doors; `failure` is the table of errors; `listen`, `tls` and `serve` own
//! connections and the life of the process; `traces` sends spans.

#![warn(missing_debug_implementations)]

mod serve;

mod doors;
mod listen;

mod call;
mod generating;
mod vectors;

mod app;
mod events;
mod models;
mod served;

mod live_text;
mod pictures;
mod sse;
mod stop_text;
mod truncation;
mod uploads;

mod admission;
mod auth;
mod config;
mod failure;
mod fields;
pub mod log;
mod metrics;
mod tls;
#[cfg(feature = "traces")]
mod traces;
#[cfg(not(feature = "traces"))]
#[path = "no_traces.rs"]
mod traces;

pub use auth::{Keys, Tenant};
pub use config::{Config, Limits, ModelConfig};
pub use serve::{Drain, ServeError, Server};
pub use tls::Tls;
pub use traces::Traces;
