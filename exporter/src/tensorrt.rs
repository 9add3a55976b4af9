//! Everything specific to TensorRT, none of which needs TensorRT: the check whether its parser accepts a graph, and serving
//! plans with the files that follow from them.

mod check;
mod files;
mod limits;
mod memory;
mod plan;
mod profiles;
mod version;

pub use check::{Checked, Finding, check};
pub(crate) use files::files;
pub use memory::{Bytes, Memory};
pub use plan::Plan;
pub use version::TensorRt;
