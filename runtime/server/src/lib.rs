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
//! models; `call` reads requests; `sse`, `live_text`, `stop_text`, `truncation` and `fields` are tools of the doors;
//! `failure` is the table of errors; `listen` and `serve` own connections and the life of the process.

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
mod sse;
mod stop_text;
mod truncation;

mod admission;
mod auth;
mod config;
mod failure;
mod fields;
pub mod log;
mod metrics;

pub use auth::Keys;
pub use config::{Config, Limits, ModelConfig};
pub use serve::{Drain, ServeError, Server};
