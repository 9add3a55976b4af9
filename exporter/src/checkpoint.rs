//! A Hugging Face checkpoint, a folder or a single safetensors file: its tensors by name, memory-mapped. The only module
//! that uses safetensors.

mod adapters;
mod companions;
mod index;
mod mapping;
mod renaming;
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;
use t5gemma_graphs::adapter::WEIGHTS_FILE;
use t5gemma_graphs::json::{self, cut};
use t5gemma_graphs::onnx::DType;

use crate::error::{Error, Result};
use crate::files;
use crate::names;
use adapters::{OpenedAdapter, StoredChange};
use mapping::map_file;

pub use companions::{
    CHAT_TEMPLATE, COMPANIONS, DEFAULT_CHAT_TEMPLATE, GENERATION_CONFIG, SENTENCEPIECE_FILE, SENTENCEPIECE_TENSOR,
    companion,
};
pub use index::{INDEX, SINGLE, weight_map};
pub use mapping::read_vector;
pub use written::Layout;

/// An opened checkpoint.
pub struct Checkpoint {
    /// The folder, or the single file.
    path: PathBuf,
    /// The folder of the weights files.
    folder: PathBuf,
    /// The configuration, if it is not `config.json` in the folder.
    config: Option<PathBuf>,
    /// The folder of the tokenizer, if it is another one.
    tokenizer: Option<PathBuf>,
    /// Whether its names had a prefix that the caller gave.
    has_weights_prefix: bool,
    shards: Vec<Shard>,
    /// By the names that the model's classes give them.
    tensors: BTreeMap<String, Location>,
    /// Tensors in files that are listed in the index and do not exist, by the same names.
    absent: BTreeMap<String, Absent>,
    /// The adapters that are merged.
    adapters: Vec<OpenedAdapter>,
    /// What they change, by the same names, in this order.
    changes: BTreeMap<String, Vec<StoredChange>>,
}

/// A mapped weights file.
struct Shard {
    name: String,
    path: PathBuf,
    bytes: Mmap,
    /// Whether it is the file of an adapter rather than of the checkpoint.
    is_adapter: bool,
}

/// Where a tensor is stored.
#[derive(Clone)]
struct Location {
    /// Its name in the file.
    stored: String,
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor in a file that does not exist.
struct Absent {
    /// Its name in the index.
    stored: String,
    /// The name of the file.
    shard: String,
}

/// A tensor of a checkpoint.
#[derive(Clone, Copy)]
pub struct Tensor<'c> {
    /// The element type in the file; see [`Tensor::float`].
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'c [usize],
    /// The elements, row-major, little-endian, not necessarily aligned.
    pub bytes: &'c [u8],
}

impl Tensor<'_> {
    /// The element type, if weights can be exported from it: float32, float16 or bfloat16.
    pub fn float(&self) -> Option<DType> {
        float(self.dtype)
    }
}

impl Location {
    /// As [`Tensor::float`].
    fn float(&self) -> Option<DType> {
        float(self.dtype)
    }
}

fn float(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::Float32),
        Dtype::F16 => Some(DType::Float16),
        Dtype::BF16 => Some(DType::BFloat16),
        _ => None,
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards: Vec<&str> = self.shards.iter().map(|shard| shard.name.as_str()).collect();
        let mut shown = f.debug_struct("Checkpoint");
        shown.field("path", &self.path).field("shards", &shards).field("tensors", &self.tensors.len());
        shown.finish()
    }
}

impl Checkpoint {
    /// Opens a folder as `save_pretrained` or a download leaves it: `config.json` with `model.safetensors`, or with
    /// `model.safetensors.index.json` and its shards. `path` may also be a single `.safetensors` file of any name, with
    /// `config.json` in its folder or from [`with_config`](Checkpoint::with_config). Shards may be missing if the export
    /// needs none of their tensors.
    ///
    /// # Errors
    /// A file that is missing, truncated or malformed, a tensor that is not where the index says, or tensor names that
    /// fit more than one model.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        if path.is_file() && path.extension().is_some_and(|extension| extension == "safetensors") {
            let mut checkpoint = Checkpoint::of_file(path)?;
            checkpoint.rename_tensors()?;
            return Ok(checkpoint);
        }
        let folder = path;
        if !folder.is_dir() {
            let found = if folder.exists() { "a file".to_string() } else { files::describe_missing(folder) };
            return Err(Error::invalid(folder.display(), "a checkpoint folder", found + &hint(folder)));
        }
        let weight_map = weight_map(folder)?;
        let names: BTreeSet<&str> = match &weight_map {
            None => BTreeSet::from([SINGLE]),
            Some(map) => map.values().map(String::as_str).collect(),
        };
        let mut checkpoint = Checkpoint::new(path, folder);
        let (present, absent): (Vec<&str>, Vec<&str>) =
            names.into_iter().partition(|name| weight_map.is_none() || folder.join(name).exists());
        for name in present {
            checkpoint.add_shard(name)?;
        }
        for (tensor, shard) in weight_map.iter().flatten() {
            if absent.contains(&shard.as_str()) {
                let tensor = tensor.clone();
                checkpoint.absent.insert(tensor.clone(), Absent { stored: tensor, shard: shard.clone() });
                continue;
            }
            let found = checkpoint.tensors.get(tensor).map(|stored| &checkpoint.shards[stored.shard].name);
            if found != Some(shard) {
                let found = found.map_or("in no file", String::as_str);
                let index = folder.join(INDEX);
                return Err(Error::invalid(index.display(), format!("in {shard}"), found).of(cut(tensor)));
            }
        }
        checkpoint.rename_tensors()?;
        Ok(checkpoint)
    }

    fn new(path: &Path, folder: &Path) -> Checkpoint {
        Checkpoint {
            path: path.to_path_buf(),
            folder: folder.to_path_buf(),
            config: None,
            tokenizer: None,
            has_weights_prefix: false,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            absent: BTreeMap::new(),
            adapters: Vec::new(),
            changes: BTreeMap::new(),
        }
    }

    /// Opens a single file, with the names that it has.
    fn of_file(path: &Path) -> Result<Checkpoint> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::invalid(path.display(), "a file name in UTF-8", "another"))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut checkpoint = Checkpoint::new(path, folder);
        checkpoint.add_shard(name)?;
        Ok(checkpoint)
    }

    /// Reads the configuration from this file instead of `config.json` in the checkpoint's folder.
    pub fn with_config(self, path: &Path) -> Checkpoint {
        Checkpoint { config: Some(path.to_path_buf()), ..self }
    }

    /// Takes the tokenizer from this folder, which must have `tokenizer.json`, instead of the checkpoint's folder.
    ///
    /// # Errors
    /// There is no `tokenizer.json`.
    pub fn with_tokenizer(self, folder: &Path) -> Result<Checkpoint> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::invalid(path.display(), "a tokenizer", files::describe_missing(&path)));
        }
        Ok(Checkpoint { tokenizer: Some(folder.to_path_buf()), ..self })
    }

    /// The file of the configuration.
    pub(crate) fn config_path(&self) -> PathBuf {
        self.config.clone().unwrap_or_else(|| self.folder.join("config.json"))
    }

    /// The text of the configuration, without a byte-order mark.
    pub(crate) fn config_text(&self) -> Result<String> {
        let text = json::without_mark(&files::read_text(&self.config_path())?).to_string();
        Ok(if self.has_weights_prefix { renaming::inner_config(&text).unwrap_or(text) } else { text })
    }

    /// The folder of the configuration, which may have generation options too.
    pub(crate) fn config_folder(&self) -> PathBuf {
        self.config_path().parent().map_or_else(PathBuf::new, Path::to_path_buf)
    }

    /// The folder of the tokenizer.
    pub(crate) fn tokenizer_folder(&self) -> &Path {
        self.tokenizer.as_deref().unwrap_or(&self.folder)
    }

    /// The SentencePiece model that some repackaged checkpoints have as a tensor.
    ///
    /// # Errors
    /// There is no such tensor, or it does not hold bytes.
    pub(crate) fn sentencepiece(&self) -> Result<&[u8]> {
        let invalid = |found: String| {
            let expected = "a SentencePiece model, bytes (U8) in one dimension";
            Error::invalid(self.path.display(), expected, found).of(SENTENCEPIECE_TENSOR)
        };
        let tensor = self.tensor(SENTENCEPIECE_TENSOR).ok_or_else(|| invalid("no such tensor".into()))?;
        if tensor.dtype != Dtype::U8 || tensor.shape.len() != 1 || tensor.bytes.is_empty() {
            return Err(invalid(format!("{:?} of shape {:?}", tensor.dtype, tensor.shape)));
        }
        Ok(tensor.bytes)
    }

    /// Refuses a checkpoint with a missing file if `is_needed` returns true for a tensor in it.
    ///
    /// # Errors
    /// The first such file, with a tensor that the index lists for it.
    pub(crate) fn check_present(&self, is_needed: impl Fn(&str) -> bool) -> Result<()> {
        let Some((_, Absent { stored, shard })) = self.absent.iter().find(|(name, _)| is_needed(name)) else {
            return Ok(());
        };
        let expected = format!("a file with {}, as {INDEX} says", cut(stored));
        let found = files::describe_missing(&self.folder.join(shard));
        Err(Error::invalid(self.folder.join(cut(shard)).display(), expected, found))
    }

    /// Remarks on a checkpoint that can be exported.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self.adapter_notes().collect();
        let is_own = |stored: &Location| !self.shards[stored.shard].is_adapter;
        // A tied table that was made two tensors has the name of the other.
        let is_tied = |stored: &Location| self.tensors.contains_key(&stored.stored);
        let mut renamed = self
            .tensors
            .iter()
            .filter(|(name, stored)| is_own(stored) && !is_tied(stored) && !name.ends_with(&stored.stored));
        if let Some((name, stored)) = renamed.next() {
            let others = renamed.count();
            notes.push(format!(
                "the tensor names have the prefix of a wrapper: read {} as {name}, and {others} others like it",
                cut(&stored.stored)
            ));
        }
        let mut of_adapter = self.tensors.keys().filter(|name| names::is_of_adapter(name));
        if let Some(name) = of_adapter.next() {
            let others = of_adapter.count();
            notes.push(format!("the tensors of a PEFT adapter are not applied: {}, and {others} others", cut(name)));
        } else if self.folder.join(WEIGHTS_FILE).exists() && !self.merges(&self.folder) {
            notes.push("the PEFT adapter in adapter_model.safetensors is not applied".to_string());
        }
        notes
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the weights files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether there is a tensor for which `is_wanted` returns true, be it in a file that is missing.
    pub(crate) fn lists(&self, is_wanted: impl Fn(&str) -> bool) -> bool {
        self.tensors.keys().chain(self.absent.keys()).any(|name| is_wanted(name))
    }

    /// A tensor by its name.
    pub(crate) fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let stored = self.tensors.get(name)?;
        Some(Tensor { dtype: stored.dtype, shape: &stored.shape, bytes: self.bytes_of(stored) })
    }

    /// A tensor by the name that its file has for it.
    pub(crate) fn stored_tensor(&self, stored: &str) -> Option<Tensor<'_>> {
        // Most tensors are known by this name.
        let known = self.tensors.get(stored).filter(|location| location.stored == stored);
        let found = known.or_else(|| self.tensors.values().find(|location| location.stored == stored))?;
        Some(Tensor { dtype: found.dtype, shape: &found.shape, bytes: self.bytes_of(found) })
    }

    /// Every tensor, with the name that its file has for it.
    pub(crate) fn stored_tensors(&self) -> impl Iterator<Item = (&str, Tensor<'_>)> {
        self.tensors.values().map(|found| {
            (&*found.stored, Tensor { dtype: found.dtype, shape: &found.shape, bytes: self.bytes_of(found) })
        })
    }

    fn bytes_of(&self, location: &Location) -> &[u8] {
        &self.shards[location.shard].bytes[location.start..location.end]
    }

    /// Lets the system take back the memory of bytes of a tensor that are not read again soon.
    pub(crate) fn release(&self, bytes: &[u8]) {
        self.shards.iter().for_each(|shard| mapping::release(&shard.bytes, bytes));
    }

    /// The probable reason why these tensors are missing, or an empty text.
    pub(crate) fn explain_missing(&self, missing: &[&str]) -> String {
        if let Some(name) = self.tensors.keys().find(|name| names::is_of_adapter(name)) {
            return format!(
                "the checkpoint is a PEFT adapter that is not merged ({}): call merge_and_unload() and save the result",
                cut(name)
            );
        }
        if self.tensors.is_empty() {
            return "the checkpoint has no tensors".to_string();
        }
        if self.names().any(names::is_of_stack) {
            return String::new();
        }
        let nearest = missing.iter().find_map(|name| Some((name, names::nearest(name, self.names())?)));
        if let Some((_, nearest)) = nearest.filter(|(name, nearest)| nearest != *name) {
            return format!("the tensor names are those of another model class, such as {}", cut(nearest));
        }
        let first: Vec<String> = self.tensors.values().take(3).map(|stored| cut(&stored.stored)).collect();
        format!("none of the {} tensors has a T5Gemma name; the first are {}", self.tensors.len(), first.join(", "))
    }

    /// The name of every tensor, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The file that holds a tensor.
    pub(crate) fn file_of(&self, name: &str) -> Option<PathBuf> {
        self.tensors.get(name).map(|stored| self.shards[stored.shard].path.clone())
    }

    /// Name and content of each weights file that has a tensor for which `is_used` returns true.
    pub(crate) fn files(&self, is_used: impl Fn(&str) -> bool) -> impl Iterator<Item = (&str, &[u8])> {
        let used = self.tensors.iter().filter(|(name, _)| is_used(name)).map(|(_, location)| location.shard);
        let used: BTreeSet<usize> = used.collect();
        used.into_iter()
            .filter(|&shard| !self.shards[shard].is_adapter)
            .map(|shard| (self.shards[shard].name.as_str(), &self.shards[shard].bytes[..]))
    }

    fn add_shard(&mut self, name: &str) -> Result<()> {
        let path = self.folder.join(name);
        let (bytes, tensors) = map_file(&path)?;
        let shard = self.shards.len();
        for location in tensors {
            let tensor = location.stored.clone();
            if let Some(other) = self.tensors.insert(tensor.clone(), Location { shard, ..location }) {
                let found = format!("another in {}", self.shards[other.shard].name);
                return Err(Error::invalid(path.display(), "one tensor of this name", found).of(cut(&tensor)));
            }
        }
        self.shards.push(Shard { name: name.to_string(), path, bytes, is_adapter: false });
        Ok(())
    }
}

/// A hint to the folder that was probably meant, in parentheses.
fn hint(folder: &Path) -> String {
    files::nearby_checkpoint(folder).map_or_else(String::new, |hint| format!(" ({hint})"))
}
