//! Runs a model over shards of documents: JSON lines or Parquet in, a shard of the same name with the results out.
//!
//! The unit of work is the shard. An output appears under its name only when it is complete, and its bytes depend on
//! the input, the model and the options alone. So whatever is interrupted is simply run again: outputs that exist are
//! kept, the others are computed from their beginning.
//!
//! In reading order: `job` is what to run and its loop; `shards` finds the inputs, `settings` is what an output folder
//! was begun with, `store` is where outputs lie; `reader` turns shards into windows of rows, `worker` answers them by
//! the task, `writer` writes the answers; `json_lines` and `records` are the two formats, and `npy`
//! is one of vectors; `format` is what the names of files say. Nothing here knows flags or
//! prints: the program does.

#![warn(missing_debug_implementations)]

mod job;

mod reader;
mod worker;
mod writer;

mod settings;
mod shards;
mod store;

mod format;
mod json_lines;
mod npy;
mod records;

mod answer;
mod columns;
mod error;

pub use columns::{Columns, Task, VectorFormat};
pub use error::BatchError;
pub use job::{Event, Job, Progress, Summary, run};
pub use settings::Settings;
pub use shards::{Part, Shard, Shards, find};
pub use store::{Store, discard_unfinished};
pub use worker::{Classifying, Encoding, Explain, Generating, Scoring, Worker, has_scores};
