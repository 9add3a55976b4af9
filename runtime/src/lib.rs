//! Runs exported T5Gemma models: a model folder and text in, text out.
//!
//! ```no_run
//! use t5gemma_runtime::{GenerationOptions, Model};
//!
//! let model = Model::open("model")?;
//! for generated in model.generate(&["The quick brown fox"], &GenerationOptions::default().num_beams(4))? {
//!     println!("{}", generated.text());
//! }
//! # Ok::<(), t5gemma_runtime::Error>(())
//! ```
//!
//! One level deeper, [`Model::generate_batch`] takes a [`Batch`] of token ids and a complete [`GenerationConfig`], and
//! [`Controls`] add streaming and cancellation to any call. [`Engine`] runs many requests at once, [`Encoder`] computes
//! hidden states, embeddings and classifications.
//!
//! # Features
//! All are enabled by default. What a build lacks is refused with an error that names the feature.
//!
//! | feature | |
//! |---|---|
//! | `chat` | [`ChatTemplate`] |
//! | `constraints` | the options `json_schema`, `regex` and `grammar` |
//! | `cuda`, `tensorrt` | these providers; the latter includes the former |
//!
//! # Modules
//! In reading order: `text` is the front door; `generate` is the loop for one call, `engine` that for many at once; `search` and `scores` decide on tokens from numbers alone;
//! `constraint` limits what they may decide; `model` and `state` hold everything that is ONNX Runtime's, `encoder`
//! and `classify` what models do besides generating; `folder` and `onnxruntime` are what opening checks first.

mod build_engines;
mod device;
mod engine_files;
mod identity_model;
pub mod log;
pub mod onnxruntime;
mod provider;
mod telemetry;

mod cancellation;
mod classify;
mod encoder;
mod encoder_cache;
mod folder;
mod limits;
mod model;
mod profiles;
mod ragged_batch;
mod session;
mod state;
mod step_output;
mod weights;

#[cfg(feature = "chat")]
mod chat;
#[cfg(not(feature = "chat"))]
#[path = "chat/disabled.rs"]
mod chat;
mod foreign;
mod shortlist;
mod tokenizer;

mod batch;
mod constraint;
mod draws;
pub mod options;
pub mod scores;
pub mod search;
mod speculation;
mod vocabulary_subset;

mod calibrate;
mod engine;
mod generate;
mod hypothesis;
mod item;
mod memory;
mod score;
mod stop;
mod target_tree;
mod text;

mod cross_attention;
mod logprobs;
pub mod verify;
mod warm_up;

mod error;

pub use batch::Batch;
pub use build_engines::{ExistingEngines, build_engines};
pub use calibrate::Calibration;
pub use cancellation::Cancellation;
pub use chat::ChatTemplate;
pub use classify::ScoreFunction;
pub use device::{Provider, ProviderConfig};
pub use draws::Draws;
pub use encoder::Encoder;
pub use engine::{Canceller, Engine, EngineOptions, EngineStats, Event, Generation, PollResult, Request};
pub use error::Error;
pub use folder::task_of;
pub use foreign::silence_caught_panics;
pub use generate::{Controls, Streamer};
pub use hypothesis::{CrossAttentions, FinishReason, Hypothesis, Logprobs};
pub use limits::Limits;
pub use model::Model;
pub use options::{
    EarlyStopping, ExponentialDecay, GenerationConfig, GenerationOptions, LogitsProcessor, OptionError, OptionProblem,
    Position, PrefixAllowedTokens, Sequence, SequenceBias,
};
pub use provider::{Fallback, ProviderProbe, probe_providers};
pub use score::TargetScore;
pub use session::{DEFAULT_ENCODER_CACHE_BYTES, OpenOptions};
pub use shortlist::Shortlist;
pub use t5gemma_graphs::facts::{ClassifierFacts, Facts, StackFacts};
pub use t5gemma_graphs::manifest::{ActivationRanges, Manifest};
pub use t5gemma_graphs::task::{Features, Pooling, Task};
pub use t5gemma_graphs::tensors::Role;
pub use t5gemma_kernels::instructions;
pub use text::Generated;
pub use tokenizer::{SpecialTokens, TextStream, Tokenizer};
pub use warm_up::WarmUpShape;
