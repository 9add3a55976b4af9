//! A Hugging Face checkpoint folder: its settings as text, and its tensors by name, mapped rather than read. The only user
//! of safetensors.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde::de::IgnoredAny;
use t5gemma_graphs::json::{self, cut, shown};
use t5gemma_graphs::onnx::DType;

use crate::found;
use crate::names;

/// Files besides the settings and weights that belong to a model and are carried along where they exist.
pub const COMPANIONS: &[&str] = &[
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
];

/// The template for conversations.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Where transformers takes it from if that file is not there.
pub const DEFAULT_CHAT_TEMPLATE: &str = "additional_chat_templates/default.jinja";
/// The model's own options for generation, of which all may be edited.
pub const GENERATION_CONFIG: &str = "generation_config.json";

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An opened checkpoint folder.
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// By the names that the model's classes give them.
    tensors: BTreeMap<String, Place>,
}

struct Shard {
    name: String,
    bytes: Mmap,
}

struct Place {
    /// The name in the file.
    stored: String,
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor of a checkpoint.
#[derive(Clone, Copy)]
pub struct Tensor<'c> {
    /// The element type as the file has it; see [`Tensor::float`].
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'c [usize],
    /// The numbers, row-major, little-endian, not necessarily aligned.
    pub bytes: &'c [u8],
}

impl Tensor<'_> {
    /// The element type, if it is one that weights can be exported from: float32, float16 or bfloat16.
    pub fn float(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::Float32),
            Dtype::F16 => Some(DType::Float16),
            Dtype::BF16 => Some(DType::BFloat16),
            _ => None,
        }
    }
}

/// More weights files than any checkpoint has.
const MOST_SHARDS: usize = 10_000;

impl Checkpoint {
    /// Opens a folder as `save_pretrained` or a download leaves it: `config.json` with `model.safetensors`, or with
    /// `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// A file that is missing, truncated or malformed, a tensor that is not where the index says, or names that may be those of
    /// several models.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        if !folder.is_dir() {
            let found = if folder.exists() { "a file".to_string() } else { found::absent(folder) };
            let near = found::checkpoint_near(folder).map_or_else(String::new, |near| format!(" ({near})"));
            bail!("{}: expected a checkpoint folder, found {found}{near}", folder.display());
        }
        let weight_map = weight_map(folder)?;
        let names = match &weight_map {
            None => vec![SINGLE.to_string()],
            Some(map) => {
                let mut names: Vec<String> = map.values().cloned().collect();
                names.sort();
                names.dedup();
                names
            }
        };
        let mut checkpoint = Checkpoint { folder: folder.to_path_buf(), shards: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            checkpoint.add_shard(name)?;
        }
        for (tensor, shard) in weight_map.iter().flatten() {
            let found = checkpoint.tensors.get(tensor).map(|place| &checkpoint.shards[place.shard].name);
            ensure!(
                found == Some(shard),
                "{}: {}: expected in {shard}, found {}",
                folder.join(INDEX).display(),
                cut(tensor),
                found.map_or("in no file", String::as_str)
            );
        }
        checkpoint.name_as_the_model()?;
        Ok(checkpoint)
    }

    /// Has all tensors known by the names that the model's classes give them.
    fn name_as_the_model(&mut self) -> Result<()> {
        let stored: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        let names = names::of_model(&stored).with_context(|| self.folder.display().to_string())?;
        let names: Vec<(String, String)> = names.into_iter().map(|(name, stored)| (name, stored.to_string())).collect();
        let mut tensors = std::mem::take(&mut self.tensors);
        let found = names.into_iter().filter_map(|(name, stored)| Some((name, tensors.remove(&stored)?)));
        self.tensors = found.collect();
        Ok(())
    }

    /// What is to be known of this checkpoint though it can be exported, in sentences.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let mut renamed = self.tensors.iter().filter(|(name, place)| !name.ends_with(&place.stored));
        if let Some((name, place)) = renamed.next() {
            let others = renamed.count();
            notes.push(format!(
                "the tensors have the names of a wrapped model: {} is read as {name}, and {others} others likewise",
                cut(&place.stored)
            ));
        }
        let mut of_adapter = self.tensors.keys().filter(|name| names::is_of_adapter(name));
        if let Some(name) = of_adapter.next() {
            let others = of_adapter.count();
            notes.push(format!("tensors of a PEFT adapter are not applied: {}, and {others} others", cut(name)));
        } else if self.folder.join("adapter_model.safetensors").exists() {
            notes.push("adapter_model.safetensors, a PEFT adapter beside the model, is not applied".to_string());
        }
        notes
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let place = self.tensors.get(name)?;
        let bytes = &self.shards[place.shard].bytes[place.start..place.end];
        Some(Tensor { dtype: place.dtype, shape: &place.shape, bytes })
    }

    /// What may have happened to tensors that are missing: what has their names in part, or else what is there.
    pub fn instead_of(&self, missing: &[&str]) -> String {
        if let Some(name) = self.tensors.keys().find(|name| names::is_of_adapter(name)) {
            let name = cut(name);
            return format!(
                "the tensors are those of a PEFT adapter that is not merged ({name}): merge it by merge_and_unload() and save that"
            );
        }
        let nearest = missing.iter().find_map(|name| Some((name, names::nearest(name, self.names())?)));
        match (nearest, self.tensors.len()) {
            (_, 0) => "the checkpoint has no tensors".to_string(),
            (Some((name, nearest)), _) if nearest != *name && !self.is_of_stacks() => {
                format!("the tensors have other names, such as {}: the checkpoint is of another class", cut(nearest))
            }
            (_, count) if !self.is_of_stacks() => {
                let first: Vec<String> = self.tensors.values().take(3).map(|place| cut(&place.stored)).collect();
                format!("none of the {count} tensors is named as a T5Gemma's; they begin with {}", first.join(", "))
            }
            _ => String::new(),
        }
    }

    fn is_of_stacks(&self) -> bool {
        self.names().any(names::is_of_stack)
    }

    /// The name of every tensor, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The file a tensor is in, for messages.
    pub fn file_of(&self, name: &str) -> Option<PathBuf> {
        self.tensors.get(name).map(|place| self.folder.join(&self.shards[place.shard].name))
    }

    /// Name and content of each weights file.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.shards.iter().map(|shard| (shard.name.as_str(), &shard.bytes[..]))
    }

    fn add_shard(&mut self, name: String) -> Result<()> {
        let path = self.folder.join(&name);
        let place = path.display();
        let file = found::open(&path)?;
        ensure!(file.metadata().is_ok_and(|metadata| metadata.len() > 0), "{place}: {}, found an empty file", EXPECTED);
        // SAFETY: the mapping is only read. A file that another process truncates meanwhile ends this process with
        // SIGBUS, as with every mapped file; nothing is written through it.
        let bytes = unsafe { Mmap::map(&file) }.with_context(|| format!("{place}: cannot be mapped"))?;
        // Holds the header to the file's length, so that the ranges below cannot leave it.
        let views = SafeTensors::deserialize(&bytes).map_err(|error| match described(&bytes) {
            Some(found) => anyhow!("{place}: {EXPECTED}, found {found}"),
            None => {
                let whole = incomplete(&bytes, &error).unwrap_or_else(|| cut(&error.to_string()));
                anyhow!("{place}: not a whole safetensors file ({} bytes): {whole}", bytes.len())
            }
        })?;
        let shard = self.shards.len();
        for (tensor, view) in views.iter() {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let (shape, end) = (view.shape().to_vec(), start + view.data().len());
            let stored = tensor.to_string();
            let found = Place { stored: stored.clone(), shard, dtype: view.dtype(), shape, start, end };
            if let Some(other) = self.tensors.insert(stored, found) {
                bail!("{place}: {}: is also in {}", cut(tensor), self.shards[other.shard].name);
            }
        }
        self.shards.push(Shard { name, bytes });
        Ok(())
    }
}

const EXPECTED: &str = "expected a safetensors file";

/// What a file is that is no safetensors file at all.
fn described(bytes: &[u8]) -> Option<String> {
    let length = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
    // A header of a sane length, cut off or not, is one.
    let is_header = length.is_some_and(|length| length < 1 << 32) && bytes.get(8).is_none_or(|first| *first == b'{');
    if is_header { None } else { found::described(bytes) }
}

/// How much of a file there is, if that is what is wrong with it.
fn incomplete(bytes: &[u8], error: &SafeTensorError) -> Option<String> {
    #[derive(Deserialize)]
    struct Info {
        data_offsets: (u64, u64),
    }
    let whole = match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            let length = u64::from_le_bytes(*bytes.first_chunk()?);
            let header = bytes.get(8..)?.get(..usize::try_from(length).ok()?)?;
            let tensors: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
            let ends = tensors.into_values().filter_map(|info| serde_json::from_value::<Info>(info).ok());
            8 + length + ends.map(|info| info.data_offsets.1).max()?
        }
        SafeTensorError::HeaderTooSmall => return Some("it ends before its header".to_string()),
        SafeTensorError::InvalidHeaderLength => return Some("it ends in its header".to_string()),
        _ => return None,
    };
    Some(format!("by its header it has {whole} bytes; copy or download it again"))
}

/// The index of a sharded checkpoint, or nothing for a single file.
fn weight_map(folder: &Path) -> Result<Option<BTreeMap<String, String>>> {
    let (single, path) = (folder.join(SINGLE), folder.join(INDEX));
    if single.exists() {
        return Ok(None);
    }
    if !path.exists() {
        // A link to nothing, or a part of a download, is a better reason than what else is there.
        let broken = [&single, &path].into_iter().find(|path| found::is_there(path) || found::part(path).is_some());
        if let Some(path) = broken {
            bail!("{}: {EXPECTED}, found {}", path.display(), found::absent(path));
        }
        let is_there = |name: &str| folder.join(name).exists();
        let named = |start: &str, end: &str| {
            let entries = folder.read_dir().ok()?;
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            names.filter(|name| name.starts_with(start) && name.ends_with(end)).min()
        };
        let hint = match () {
            () if is_there("manifest.json") => " (this is an exported model, not a checkpoint)".to_string(),
            () if is_there("adapter_config.json") => {
                " (this is a LoRA adapter: merge it into its base model and save that)".to_string()
            }
            () if is_there("pytorch_model.bin") || is_there("pytorch_model.bin.index.json") => {
                let name = named("pytorch_model.bin", "").unwrap_or_default();
                format!(" (found {name}: load and save it with safe_serialization=True)")
            }
            () => match (named("model-", ".safetensors"), named("", ".safetensors"), found::checkpoint_near(folder)) {
                (Some(shard), ..) => format!(" (found {shard}, a shard without its index)"),
                (None, Some(other), _) => format!(" (found {other}: give it that name)"),
                (None, None, Some(near)) => format!(" ({near})"),
                (None, None, None) => String::new(),
            },
        };
        bail!("{}: expected {SINGLE} or {INDEX}, found neither{hint}", folder.display());
    }
    let (_, index) = found::read_object(&path)?;
    let place = path.display();
    let expected = "expected a weight_map from tensor names to files";
    let Some(map) = index.get("weight_map") else { bail!("{place}: {expected}, found none") };
    let map: BTreeMap<String, String> =
        serde_json::from_value(map.clone()).map_err(|_| anyhow!("{place}: {expected}, found {}", shown(map)))?;
    let mut seen = BTreeSet::new();
    for (tensor, shard) in &map {
        if !seen.insert(shard) {
            continue;
        }
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard.as_str());
        let (tensor, found) = (cut(tensor), shown(&shard.as_str().into()));
        ensure!(plain, "{place}: {tensor}: expected a file name in the same folder, found {found}");
        ensure!(seen.len() <= MOST_SHARDS, "{place}: expected at most {MOST_SHARDS} files, found more");
        let there = folder.join(shard);
        ensure!(
            there.exists(),
            "{}: missing, though {INDEX} expects {tensor} in it: found {}",
            folder.join(cut(shard)).display(),
            found::absent(&there)
        );
    }
    ensure!(!map.is_empty(), "{place}: weight_map: expected tensors, found none");
    Ok(Some(map))
}

/// The content of a file of [`COMPANIONS`], without a byte-order mark.
///
/// # Errors
/// What lies there instead of one that could be used.
pub fn companion(folder: &Path, name: &str) -> Result<Vec<u8>> {
    let path = folder.join(name);
    let place = path.display();
    if name == "tokenizer.json" {
        let text = found::read_text(&path)?;
        let text = json::without_mark(&text);
        // A whole vocabulary as values would take ten times its size.
        serde_json::from_str::<BTreeMap<String, IgnoredAny>>(text)
            .map_err(|error| anyhow!("{place}: expected a JSON object, found {}", json::malformed(text, &error)))?;
        return Ok(text.as_bytes().to_vec());
    }
    if name.ends_with(".json") {
        return Ok(found::read_object(&path)?.0.into_bytes());
    }
    let mut bytes = Vec::new();
    found::open(&path)?.read_to_end(&mut bytes).with_context(|| format!("{place}: cannot be read"))?;
    match found::foreign(&bytes).filter(|_| !(bytes.is_empty() && name.ends_with(".jinja"))) {
        Some(found) => Err(anyhow!("{place}: expected a file of the tokenizer, found {found}")),
        None => Ok(bytes),
    }
}
