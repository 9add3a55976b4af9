//! A Hugging Face checkpoint folder: its settings as text, and its tensors by name, mapped rather than read. The only user
//! of safetensors.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::Deserialize;
use t5gemma_graphs::onnx::DType;

/// Files besides the settings and weights that belong to a model and are carried along where they exist.
pub const COMPANIONS: &[&str] = &[
    "generation_config.json",
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

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An opened checkpoint folder.
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Place>,
}

struct Shard {
    name: String,
    bytes: Mmap,
}

struct Place {
    shard: usize,
    dtype: DType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor of a checkpoint.
#[derive(Clone, Copy)]
pub struct Tensor<'c> {
    /// float32, float16 or bfloat16.
    pub dtype: DType,
    /// Dimensions.
    pub shape: &'c [usize],
    /// The numbers, row-major, little-endian, not necessarily aligned.
    pub bytes: &'c [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder as `save_pretrained` or a download leaves it: `config.json` with `model.safetensors`, or with
    /// `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// A file that is missing, truncated or malformed, a tensor that is not where the index says, or one of a type other
    /// than F32, F16 and BF16.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        ensure!(folder.is_dir(), "{}: expected a checkpoint folder, found {}", folder.display(), kind(folder));
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
                "{}: {tensor}: expected in {shard}, found {}",
                folder.join(INDEX).display(),
                found.map_or("in no file", String::as_str)
            );
        }
        checkpoint.name_as_with_a_head();
        Ok(checkpoint)
    }

    /// The classes without a head (`T5GemmaModel`, `T5GemmaEncoderModel`) save the names that the others put behind
    /// `model.`; all are known by the longer name from here on.
    fn name_as_with_a_head(&mut self) {
        if self.tensors.keys().all(|name| name.starts_with("encoder.") || name.starts_with("decoder.")) {
            let tensors = std::mem::take(&mut self.tensors);
            self.tensors = tensors.into_iter().map(|(name, place)| (format!("model.{name}"), place)).collect();
        }
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
        let file = File::open(&path).with_context(|| format!("{}: cannot be opened", path.display()))?;
        // SAFETY: the mapping is only read. A file that another process truncates meanwhile ends this process with
        // SIGBUS, as with every mapped file; nothing is written through it.
        let bytes = unsafe { Mmap::map(&file) }.with_context(|| format!("{}: cannot be mapped", path.display()))?;
        let malformed = || format!("{}: not a whole safetensors file ({} bytes)", path.display(), bytes.len());
        ensure!(
            !bytes.starts_with(b"version https://git-lfs"),
            "{}: expected a safetensors file, found the pointer of Git LFS to one (fetch it by `git lfs pull`)",
            path.display()
        );
        let (header, _) = SafeTensors::read_metadata(&bytes).with_context(malformed)?;
        // Holds the header to the file's length, so that the ranges below cannot leave it.
        let views = SafeTensors::deserialize(&bytes).with_context(malformed)?;
        let shard = self.shards.len();
        for (tensor, view) in views.iter() {
            let dtype = match view.dtype() {
                safetensors::Dtype::F32 => DType::Float32,
                safetensors::Dtype::F16 => DType::Float16,
                safetensors::Dtype::BF16 => DType::BFloat16,
                other => bail!("{}: {tensor}: expected F32, F16 or BF16, found {other:?}", path.display()),
            };
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            debug_assert!(start >= header);
            let (shape, end) = (view.shape().to_vec(), start + view.data().len());
            if let Some(other) = self.tensors.insert(tensor.to_string(), Place { shard, dtype, shape, start, end }) {
                bail!("{}: {tensor}: is also in {}", path.display(), self.shards[other.shard].name);
            }
        }
        self.shards.push(Shard { name, bytes });
        Ok(())
    }
}

/// The index of a sharded checkpoint, or nothing for a single file.
fn weight_map(folder: &Path) -> Result<Option<BTreeMap<String, String>>> {
    if folder.join(SINGLE).exists() {
        return Ok(None);
    }
    let path = folder.join(INDEX);
    if !path.exists() {
        let hint = match () {
            () if folder.join("manifest.json").exists() => " (this is an exported model, not a checkpoint)",
            () if folder.join("adapter_config.json").exists() => {
                " (this is a LoRA adapter: merge it into its base model and save that)"
            }
            () if folder.join("pytorch_model.bin").exists() => {
                " (found pytorch_model.bin: load and save it with safe_serialization=True)"
            }
            () => "",
        };
        bail!("{}: expected {SINGLE} or {INDEX}, found neither{hint}", folder.display());
    }
    let text = read_text(&path)?;
    let index: Index = serde_json::from_str(&text)
        .with_context(|| format!("{}: expected a weight_map from tensor names to files", path.display()))?;
    for (tensor, shard) in &index.weight_map {
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard.as_str());
        ensure!(plain, "{}: {tensor}: expected a file name in the same folder, found {shard:?}", path.display());
        let there = folder.join(shard);
        ensure!(there.exists(), "{}: missing, though {INDEX} expects {tensor} in it", there.display());
    }
    ensure!(!index.weight_map.is_empty(), "{}: weight_map: expected tensors, found none", path.display());
    Ok(Some(index.weight_map))
}

/// Reads a text file whole.
pub fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))
}

fn kind(path: &Path) -> &'static str {
    if path.exists() { "a file" } else { "nothing there" }
}
