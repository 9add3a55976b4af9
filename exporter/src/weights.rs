//! Which weight of the graphs is which tensor of the checkpoint, checked both ways: a weight without its tensor is an error,
//! a tensor that no weight uses is listed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, bail, ensure};
use t5gemma_graphs::Vocabulary;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::onnx::{Adjust, DType, Definition, Part};
use t5gemma_graphs::task::Task;
use t5gemma_graphs::tensors::Role;

use crate::checkpoint::Checkpoint;

/// A weight as the graphs use it.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Name of the initializer.
    pub name: String,
    /// Type in the file of weights.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// The checkpoint's tensors that it is made of, one above the other.
    pub parts: Vec<Part>,
    /// What is done to the numbers.
    pub adjust: Adjust,
    /// An earlier weight that is the same bytes in another shape.
    pub alias: Option<usize>,
}

/// What is said of a checkpoint whose tensors are not those that its settings ask for.
pub const NOT_DESCRIBED: &str = "the tensors are not those that config.json describes";

/// The weights of some graphs, each once, in order of first use.
pub fn collect(graphs: &[&Definition]) -> Vec<Weight> {
    let mut weights: Vec<Weight> = Vec::new();
    let mut seen = BTreeSet::new();
    // Those made of a tensor, so that a model of thousands of layers is not compared each with each.
    let mut of_tensor: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for graph in graphs {
        for parameter in &graph.parameters {
            let info = graph.value(parameter.value);
            if seen.insert(info.name.clone()) {
                let tensor = parameter.parts.first().map_or("", |part| part.tensor.as_str());
                let others = of_tensor.entry(tensor).or_default();
                let same = |other: &&usize| {
                    let other = &weights[**other];
                    other.parts == parameter.parts && other.adjust == parameter.adjust
                };
                let alias = others.iter().find(same).copied();
                others.push(weights.len());
                weights.push(Weight {
                    name: info.name.clone(),
                    dtype: info.dtype,
                    shape: info.shape.iter().map(|dim| dim.as_fixed().expect("weights have fixed sizes")).collect(),
                    alias,
                    parts: parameter.parts.clone(),
                    adjust: parameter.adjust,
                });
            }
        }
    }
    weights
}

impl Weight {
    /// Length in the file of weights.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape.iter().product()).expect("the size of weights was checked") as u64
    }
}

/// Numbers in the tensors that the weights are made of, each counted once.
pub fn numbers(weights: &[Weight]) -> u64 {
    numbers_of(weights).into_iter().map(|(_, numbers)| numbers).sum()
}

/// The tensors that the weights are made of, with the numbers in each.
pub fn numbers_of(weights: &[Weight]) -> Vec<(String, u64)> {
    let mut seen = BTreeSet::new();
    let parts = weights.iter().flat_map(|weight| &weight.parts).filter(|part| seen.insert(&part.tensor));
    parts.map(|part| (part.tensor.clone(), part.shape.iter().product::<usize>() as u64)).collect()
}

/// Checks that the size of all weights together can be counted, as it always can where a checkpoint has them.
pub fn check_size(weights: &[Weight]) -> Result<()> {
    let bytes = |weight: &Weight| {
        weight.dtype.bytes(weight.shape.iter().try_fold(1_usize, |all, &size| all.checked_mul(size))?)
    };
    let total = weights.iter().try_fold(0_usize, |all, weight| all.checked_add(bytes(weight)?));
    // Half of what can be counted leaves room for the gaps between tensors.
    ensure!(
        total.is_some_and(|total| total < usize::MAX / 2),
        "expected sizes of a model, found more than {} bytes of weights",
        usize::MAX / 2
    );
    Ok(())
}

/// Finds the decoder's embedding and the head among the stored tensors, as transformers 5 ties them: a stored head is used
/// even where the config says tied, unless it equals the embedding; where only one is stored, it serves as both.
pub fn vocabulary(config: &Config, checkpoint: &Checkpoint) -> Result<Vocabulary> {
    let (tensors, tie) = (config.family.tensors(), config.tie_word_embeddings);
    let stored = |names: &[&'static str], why: &str| {
        let candidates = if tie { names } else { &names[..1] };
        candidates.iter().copied().find(|name| checkpoint.tensor(name).is_some()).ok_or_else(|| {
            let (name, instead) = (names[0], checkpoint.instead_of(&names[..1]));
            let instead = if instead.is_empty() { instead } else { format!("; {instead}") };
            anyhow!("{}: {name}: missing{why}{instead}", checkpoint.folder().display())
        })
    };
    let embedding = stored(tensors.decoder_embedding, "")?;
    let head = stored(tensors.head, ", though config.json has tie_word_embeddings false")?;
    let is_copy = match (checkpoint.tensor(embedding), checkpoint.tensor(head)) {
        (Some(embedding), Some(head)) => embedding.dtype == head.dtype && embedding.bytes == head.bytes,
        _ => false,
    };
    let head = if tie && is_copy { embedding } else { head };
    Ok(Vocabulary { embedding: embedding.into(), head: head.into(), kept: None })
}

/// The names used when no checkpoint says otherwise.
pub fn default_vocabulary(config: &Config) -> Vocabulary {
    let tensors = config.family.tensors();
    let head = if config.tie_word_embeddings { tensors.decoder_embedding[0] } else { tensors.head[0] };
    Vocabulary { embedding: tensors.decoder_embedding[0].into(), head: head.into(), kept: None }
}

/// The names of the tensors that an exported model was made from, of which `is_stored` tells whether it has one.
pub fn exported_vocabulary(config: &Config, is_stored: impl Fn(&str) -> bool) -> Vocabulary {
    let tensors = config.family.tensors();
    let stored = |names: &[&'static str]| names.iter().find(|name| is_stored(name)).map(|name| name.to_string());
    match (stored(tensors.decoder_embedding), stored(tensors.head)) {
        (Some(embedding), Some(head)) => Vocabulary { embedding, head, kept: None },
        _ => default_vocabulary(config),
    }
}

/// Holds every weight to its tensor, and returns the names of the tensors that no weight uses.
///
/// # Errors
/// All tensors that are missing, of another shape than the config asks for, or of a type that cannot be exported.
pub fn check(weights: &[Weight], checkpoint: &Checkpoint, config: &Config, task: &Task) -> Result<Vec<String>> {
    let (mut wrong, mut missing) = (Vec::new(), Vec::new());
    let mut used = BTreeSet::new();
    let folder = checkpoint.folder().display();
    for part in weights.iter().flat_map(|weight| &weight.parts) {
        if !used.insert(part.tensor.as_str()) {
            continue;
        }
        match checkpoint.tensor(&part.tensor) {
            None => {
                wrong.push(format!("{}: missing (expected shape {:?})", part.tensor, part.shape));
                missing.push(part.tensor.as_str());
            }
            Some(tensor) if tensor.shape != part.shape => {
                wrong.push(format!("{}: expected shape {:?}, found {}", part.tensor, part.shape, shape(tensor.shape)));
            }
            Some(tensor) if tensor.float().is_none() => {
                let path = checkpoint.file_of(&part.tensor).unwrap_or_default();
                let dtype = tensor.dtype;
                let quantized = "quantized weights have to be saved in one of these first";
                bail!("{}: {}: expected F32, F16 or BF16, found {dtype:?} ({quantized})", path.display(), part.tensor);
            }
            Some(_) => {}
        }
    }
    let shown = 10;
    let more = wrong.len().saturating_sub(shown);
    wrong.truncate(shown);
    if more > 0 {
        wrong.push(format!("… and {more} more"));
    }
    if !missing.is_empty() {
        wrong.extend(Some(checkpoint.instead_of(&missing)).filter(|instead| !instead.is_empty()));
    }
    ensure!(wrong.is_empty(), "{folder}: {NOT_DESCRIBED}:\n  {}", wrong.join("\n  "));
    // A stored head that equals the tied embedding is redundant, not left over.
    let tensors = config.family.tensors();
    let redundant = |name: &str| name == tensors.head[0] && !used.contains(name);
    // Whoever exports the encoder alone leaves the rest behind on purpose.
    let is_of_encoder = |name: &str| matches!((tensors.role)(name), Some(Role::Encoder | Role::EncoderEmbedding));
    let left = |name: &str| matches!(task, Task::FeatureExtraction(_)) && !is_of_encoder(name);
    let unused = checkpoint.names().filter(|name| !used.contains(name) && !redundant(name) && !left(name));
    Ok(unused.map(str::to_string).collect())
}

/// A shape as messages show it: of many dimensions only some.
fn shape(shape: &[usize]) -> String {
    match shape.get(..8) {
        Some(first) => format!("{first:?} and more dimensions"),
        None => format!("{shape:?}"),
    }
}

/// A tensor that [`check`] has found.
pub(crate) fn found<'c>(checkpoint: &'c Checkpoint, part: &Part) -> Result<crate::checkpoint::Tensor<'c>> {
    checkpoint.tensor(&part.tensor).with_context(|| format!("{}: missing", part.tensor))
}
