//! The optimization profiles of a model folder, as `profiles.json` holds them.

use std::collections::BTreeMap;

use t5gemma_graphs::interface::PROFILES_FILE;

/// Name of the file with the profiles.
pub const PROFILES: &str = PROFILES_FILE;

/// The minimum, optimum and maximum shape of an input.
pub type Profile = [Vec<i64>; 3];

/// The profiles of all graphs: by file, then by input. Inputs of a fixed shape have none.
pub type Profiles = BTreeMap<String, BTreeMap<String, Profile>>;
