//! Everything specific to TensorRT, none of which needs TensorRT itself: checking whether its parser accepts a graph,
//! and serving plans with the files generated from them.

mod limits;
mod operators;
mod profiles;
mod version;

mod check;

mod plan;

mod memory;

mod files;

pub use check::{CheckReport, Finding, FindingKind, check};
pub(crate) use files::files;
pub use memory::{MemoryEstimate, MemorySize};
pub use plan::ServingPlan;
pub use version::TensorRtVersion;
