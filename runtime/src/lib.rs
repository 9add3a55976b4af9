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
//! All are enabled by default. Using something that a build lacks is an error that names the feature.
//!
//! | feature | |
//! |---|---|
//! | `chat` | [`ChatTemplate`] |
//! | `constraints` | the options `json_schema`, `regex` and `grammar` |
//! | `cuda`, `tensorrt` | these providers; `tensorrt` includes `cuda` |
//!
//! # Modules
//! Imports run one way, from the top of this list to its foot:
//!
//! - `text` is the front door; `generate` and `score` are the loops for one call, `engine` is the one for many at once,
//!   `encoder` and `classify` are for models that do not generate
//! - `item` is one source in progress: `search`, `scores` and `constraint` decide on its tokens from numbers alone, and
//!   `cross_attention` and `logprobs` keep what a hypothesis may come with
//! - `model` runs the graphs, `state` keeps keys and values between steps, `session` opens graphs on a `provider` over
//!   one copy of the `weights`
//! - `folder` and `onnxruntime` are what opening checks first; `options`, `limits`, `device`, `hypothesis` and `error`
//!   are plain values

#![warn(missing_debug_implementations)]

mod text;

mod engine;
mod generate;
mod score;
mod warm_up;

mod classify;
mod encoder;

mod calibrate;
pub mod verify;

mod item;
mod memory;

mod constraint;
mod cross_attention;
mod logprobs;
pub mod scores;
pub mod search;
mod speculation;
mod stop;
mod target_tree;

mod model;

mod encoder_cache;
mod ragged_batch;
mod state;
mod step_output;
mod vision;

mod build_engines;
mod engine_files;
mod folder;
mod identity_model;
pub mod onnxruntime;
mod profiles;
mod provider;
mod session;
mod telemetry;
mod tensors;
mod weights;

#[cfg(feature = "chat")]
mod chat;
#[cfg(not(feature = "chat"))]
#[path = "chat/disabled.rs"]
mod chat;
mod images;
mod panics;
mod positions;
mod shortlist;
mod tokenizer;

mod adapter;
mod batch;
mod cancellation;
mod device;
mod draws;
mod error;
pub mod fork;
mod hypothesis;
mod limits;
pub mod log;
pub mod options;
mod vocabulary_subset;

pub use adapter::Adapter;
pub use batch::Batch;
pub use build_engines::{ExistingEngines, build_engines};
pub use calibrate::Calibration;
pub use cancellation::Cancellation;
pub use chat::ChatTemplate;
pub use classify::ScoreFunction;
pub use device::{Provider, ProviderConfig};
pub use draws::Draws;
pub use encoder::Encoder;
pub use engine::{
    Canceller, Engine, EngineOptions, EngineStats, Event, Generation, Message, PollResult, Priority, Request,
    RequestStats,
};
pub use error::Error;
pub use folder::task_of;
pub use generate::{Controls, Streamer};
pub use hypothesis::{CrossAttentions, FinishReason, Hypothesis, Logprobs};
pub use images::{Image, ImageLimits, PixelValues};
pub use limits::Limits;
pub use model::Model;
pub use options::{
    EarlyStopping, ExponentialDecay, GenerationConfig, GenerationOptions, LogitsProcessor, OptionError, OptionProblem,
    Position, PrefixAllowedTokens, Sequence, SequenceBias,
};
pub use panics::silence_caught_panics;
pub use provider::{Fallback, ProviderProbe, probe_providers};
pub use score::TargetScore;
pub use session::{DEFAULT_ENCODER_CACHE_BYTES, OpenOptions};
pub use shortlist::Shortlist;
pub use t5gemma_graphs::facts::{ClassifierFacts, Facts, StackFacts};
pub use t5gemma_graphs::images::{ImageSettings, ImageTokens, PanAndScan};
pub use t5gemma_graphs::json::BYTE_ORDER_MARK;
pub use t5gemma_graphs::manifest::{ActivationRanges, Manifest};
pub use t5gemma_graphs::task::{Features, Pooling, Task};
pub use t5gemma_graphs::tensors::Role;
pub use t5gemma_kernels::instructions;
pub use text::{Generated, TextWithImages};
pub use tokenizer::{SpecialTokens, TextStream, Tokenizer};
pub use warm_up::WarmUpShape;

// Of these crates there are types in public signatures.
pub use {ndarray, serde_json};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_shared_between_threads() {
        fn is_shared<T: Send + Sync + std::fmt::Debug>() {}
        is_shared::<Model>();
        is_shared::<Encoder>();
        is_shared::<Engine>();
        is_shared::<Canceller>();
        is_shared::<Cancellation>();
        is_shared::<Tokenizer>();
        is_shared::<ChatTemplate>();
        is_shared::<Batch>();
        is_shared::<GenerationConfig>();
        is_shared::<GenerationOptions>();
        is_shared::<OpenOptions>();
        is_shared::<Request>();
        is_shared::<Error>();
    }

    #[test]
    fn generations_and_streams_are_sent_between_threads() {
        fn is_sent<T: Send + std::fmt::Debug>() {}
        is_sent::<Generation>();
        is_sent::<TextStream>();
        is_sent::<Event>();
    }
}
