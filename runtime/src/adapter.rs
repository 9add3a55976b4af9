//! LoRA adapters at run time: `file` reads one, `Adapters` are those of a model by name, and `rows` are the inputs that the
//! rows of a run need. Which calls use which adapter is decided by `batch` and by the option `adapter`.
//!
//! # Design
//! Graphs that take adapters are files of their own, opened when the first adapter is loaded, so that a model without
//! adapters costs what it would cost without them.
//!
//! The adapters of a run lie side by side along the rank, `A` as `[in, Σ rank]` and `B` as `[Σ rank, out]`, and a mask
//! zeroes what `x·A` has in the columns of other adapters. A row without an adapter gets exactly 0. Gathering an `A` and a
//! `B` for each row would read each adapter once for each of its rows; this way it is read once for all of them.
//!
//! A row holds its adapter for as long as it needs it, so one can be unloaded at any time.

mod file;
mod rows;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use ort::value::DynValue;
use t5gemma_graphs::interface::LoraModule;
use t5gemma_graphs::manifest::{LoraInputs, Manifest};

use crate::error::Error;
use crate::options::OptionError;
pub(crate) use rows::RowAdapters;
use rows::SideBySide;

/// A LoRA adapter that a model has loaded: see [`Model::load_adapter`](crate::Model::load_adapter). It stays usable after
/// it was unloaded, for as long as it is held.
#[derive(Clone)]
pub struct Adapter(Arc<Loaded>);

/// `A` and `B` of a module, `[in, rank]` and `[rank, out]`, with the adapter's scale in `B`.
type Pair = [Arc<DynValue>; 2];

struct Loaded {
    name: String,
    /// Unique in the process, whatever the name.
    id: u64,
    rank: usize,
    /// Those that the adapter changes, by the module's name.
    modules: HashMap<String, Pair>,
    /// The model that it was loaded for: the hash of its weights.
    model: String,
    /// Whether calls can name it.
    is_loaded: AtomicBool,
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("name", &self.0.name).field("rank", &self.0.rank).finish_non_exhaustive()
    }
}

impl PartialEq for Adapter {
    fn eq(&self, other: &Adapter) -> bool {
        self.0.id == other.0.id
    }
}

impl Adapter {
    /// Reads the PEFT adapter in `folder`, for a model that takes adapters.
    fn read(name: &str, folder: &Path, manifest: &Manifest, inputs: &LoraInputs) -> Result<Adapter, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (modules, rank) = file::read(folder, manifest, inputs)?;
        let (id, model) = (NEXT.fetch_add(1, Ordering::Relaxed), manifest.weights.record.sha256.clone());
        Ok(Adapter(Arc::new(Loaded { name: name.to_string(), id, rank, modules, model, is_loaded: true.into() })))
    }

    /// The name that it was loaded under.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its greatest rank.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// A number that no other adapter of the process has.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// Checks that it was loaded for this model or for a copy of it.
    pub(crate) fn check(&self, manifest: &Manifest) -> Result<(), Error> {
        if self.0.model == manifest.weights.record.sha256 {
            return Ok(());
        }
        let expected = "an adapter that was loaded for this model";
        Err(Error::input("adapter", expected, format!("{:?} of another model", self.0.name)))
    }
}

/// The adapters of a model.
#[derive(Default)]
pub(crate) struct Adapters {
    by_name: RwLock<BTreeMap<String, Adapter>>,
    /// The inputs of recent combinations of adapters; the most recently used last.
    recent: Mutex<Vec<Arc<SideBySide>>>,
}

/// Upper bound on the combinations whose inputs are kept.
const MOST_RECENT: usize = 8;

impl Adapters {
    /// Reads the adapter in `folder` and makes it available as `name`.
    pub fn load(&self, name: &str, folder: &Path, manifest: &Manifest) -> Result<(), Error> {
        let inputs = manifest.lora_inputs.as_ref().expect("the caller has checked that the model takes adapters");
        let taken = |names: &BTreeMap<String, Adapter>| {
            let expected = "a name that no loaded adapter has (unload that one first)";
            if names.contains_key(name) { Err(Error::input("adapter", expected, format!("{name:?}"))) } else { Ok(()) }
        };
        if name.is_empty() {
            return Err(Error::input("adapter", "a name", "\"\""));
        }
        taken(&self.by_name.read().unwrap_or_else(PoisonError::into_inner))?;
        let adapter = Adapter::read(name, folder, manifest, inputs)?;
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        taken(&by_name)?;
        by_name.insert(name.to_string(), adapter);
        Ok(())
    }

    /// Makes an adapter unavailable to further calls.
    pub fn unload(&self, name: &str) -> Result<(), Error> {
        let removed = self.by_name.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(adapter) = removed else { return Err(self.unknown(name).into()) };
        adapter.0.is_loaded.store(false, Ordering::Relaxed);
        drop(self.recent());
        Ok(())
    }

    /// The names of all, in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// The adapter of this name.
    pub fn get(&self, name: &str) -> Result<Adapter, OptionError> {
        let found = self.by_name.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        found.ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> OptionError {
        let names = self.names();
        let expected = match &names[..] {
            [] => "a loaded adapter (there is none)".to_string(),
            names => format!("the name of a loaded adapter: {}", names.join(", ")),
        };
        OptionError::new("adapter", &expected, format!("{name:?}"))
    }

    /// What the decoder graphs of a model take for rows with these adapters; none if no row has one.
    pub fn of_rows(&self, rows: &[Option<Adapter>], manifest: &Manifest) -> Result<Option<RowAdapters>, Error> {
        let mut members: Vec<Adapter> = Vec::new();
        for adapter in rows.iter().flatten() {
            if !members.contains(adapter) {
                members.push(adapter.clone());
            }
        }
        if members.is_empty() {
            return Ok(None);
        }
        members.sort_by_key(Adapter::id);
        let side_by_side = self.side_by_side(members, manifest)?;
        RowAdapters::new(side_by_side, rows).map(Some).map_err(Error::onnxruntime(PREPARING))
    }

    /// What the encoder takes for sources that all have this adapter, behind its other inputs.
    pub fn of_sources(&self, adapter: &Adapter, manifest: &Manifest) -> Result<Vec<Arc<DynValue>>, Error> {
        let all = self.side_by_side(vec![adapter.clone()], manifest)?;
        Ok(all.of_graph("encoder_lora").cloned().collect())
    }

    fn side_by_side(&self, members: Vec<Adapter>, manifest: &Manifest) -> Result<Arc<SideBySide>, Error> {
        let mut recent = self.recent();
        if let Some(at) = recent.iter().position(|recent| recent.members() == members) {
            let found = recent.remove(at);
            recent.push(found.clone());
            return Ok(found);
        }
        drop(recent);
        let lora = manifest.lora_inputs.as_ref().expect("adapters are of models that take them");
        let made = SideBySide::new(members, &lora.modules, manifest.dtype);
        let made = Arc::new(made.map_err(Error::onnxruntime(PREPARING))?);
        let mut recent = self.recent();
        if recent.len() == MOST_RECENT {
            recent.remove(0);
        }
        recent.push(made.clone());
        Ok(made)
    }

    /// The recent combinations of adapters that are still loaded.
    fn recent(&self) -> MutexGuard<'_, Vec<Arc<SideBySide>>> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.retain(|all| all.members().iter().all(|member| member.0.is_loaded.load(Ordering::Relaxed)));
        recent
    }
}

const PREPARING: &str = "preparing the adapters of a run";

/// The modules of all graphs by name.
fn modules_by_name(inputs: &LoraInputs) -> BTreeMap<&str, &LoraModule> {
    inputs.modules.values().flatten().map(|module| (module.name.as_str(), module)).collect()
}
