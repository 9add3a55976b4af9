//! Matches the weights of the graphs with the tensors of the checkpoint, in both directions: a weight without a tensor
//! is an error, a tensor without a weight is listed.

use std::collections::{BTreeMap, BTreeSet};

use t5gemma_graphs::config::{Config, Head, StackInput};
use t5gemma_graphs::onnx::{Adjust, DType, Definition, Part};
use t5gemma_graphs::task::Task;
use t5gemma_graphs::tensors::Role;
use t5gemma_graphs::{Options, Vocabulary};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// An initializer of one or more graphs.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Name of the initializer.
    pub name: String,
    /// Type in the weights file.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// The checkpoint tensors it consists of, concatenated along the first axis.
    pub parts: Vec<Part>,
    /// The conversion of the numbers.
    pub adjust: Adjust,
    /// What it is for.
    pub role: Role,
    /// Index of an earlier weight that has the same bytes in another shape.
    pub alias: Option<usize>,
}

/// The weights of the graphs that a configuration and options give, each once, in order of first use.
pub fn collect(graphs: &[Definition], config: &Config, options: &Options) -> Vec<Weight> {
    let mut weights: Vec<Weight> = Vec::new();
    let mut seen = BTreeSet::new();
    // By first tensor, so that a model of thousands of layers does not compare each weight with each.
    let mut by_tensor: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for graph in graphs {
        for parameter in &graph.parameters {
            let info = graph.value(parameter.value);
            if !seen.insert(info.name.clone()) {
                continue;
            }
            let tensor = parameter.parts.first().map_or("", |part| part.tensor.as_str());
            let others = by_tensor.entry(tensor).or_default();
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
                role: role(&parameter.parts[0], config, options),
            });
        }
    }
    weights
}

/// What a tensor is for: the family knows it by name, except for a table that is both embedding and head.
fn role(part: &Part, config: &Config, options: &Options) -> Role {
    if options.is_head(&part.tensor) && part.kept == options.vocabulary.kept {
        return Role::Head;
    }
    config.role(&part.tensor).expect("a family knows the tensors of its graphs")
}

impl Weight {
    /// Length in the weights file.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape.iter().product()).expect("the size of weights was checked") as u64
    }
}

/// Counts the parameters in the tensors of the weights, each tensor once.
pub fn parameters(weights: &[Weight]) -> u64 {
    parameters_by_tensor(weights).into_iter().map(|(_, count)| count).sum()
}

/// The tensors of the weights with the number of parameters in each.
pub fn parameters_by_tensor(weights: &[Weight]) -> Vec<(String, u64)> {
    let mut seen = BTreeSet::new();
    let parts = weights.iter().flat_map(|weight| &weight.parts).filter(|part| seen.insert(&part.tensor));
    parts.map(|part| (part.tensor.clone(), part.shape.iter().product::<usize>() as u64)).collect()
}

/// Checks that the total size of the weights does not overflow; for random weights, nothing else bounds it. `origin` is
/// where the configuration comes from.
pub fn check_size(weights: &[Weight], origin: &str) -> Result<()> {
    let bytes = |weight: &Weight| {
        weight.dtype.bytes(weight.shape.iter().try_fold(1_usize, |all, &size| all.checked_mul(size))?)
    };
    let total = weights.iter().try_fold(0_usize, |all, weight| all.checked_add(bytes(weight)?));
    // Half of the range leaves room for the padding between tensors.
    let most = usize::MAX / 2;
    if total.is_some_and(|total| total < most) {
        return Ok(());
    }
    Err(Error::invalid(origin, "the sizes of a model", format!("more than {most} bytes of weights")))
}

/// Finds the embeddings and the head among the stored tensors, as transformers 5 ties them: a stored tensor is used even
/// where the config says tied, unless it equals the one that it would be tied to; where it is not stored, another one
/// serves as both.
pub fn vocabulary(config: &Config, checkpoint: &Checkpoint, task: &Task) -> Result<Vocabulary> {
    let (tensors, tie) = (config.family.tensors(), config.tie_word_embeddings);
    let is_stored = |name: &str| checkpoint.tensor(name).is_some();
    let end_of_image = end_of_image(config, is_stored);
    let stored = |names: &[&'static str], reason: &str| {
        let candidates = if tie { names } else { &names[..1] };
        candidates.iter().copied().find(|name| is_stored(name)).ok_or_else(|| Error::Tensors {
            checkpoint: checkpoint.path().to_path_buf(),
            mismatches: vec![format!("{}: missing{reason}", names[0])],
            hint: checkpoint.explain_missing(&names[..1]),
        })
    };
    // One of several equal tensors that could stand for each other is enough.
    let shared = |name: &'static str, with: &[&'static str], names: &[&'static str]| {
        let is_equal = |other: &&&'static str| names.contains(*other) && checkpoint.is_same(other, name);
        if tie { with.iter().find(is_equal).copied().unwrap_or(name) } else { name }
    };
    let source = match config.custom.encoder_input {
        StackInput::InputIds => stored(tensors.encoder_embedding, "")?,
        StackInput::InputsEmbeds => tensors.encoder_embedding[0],
    };
    if !task.is_generation() {
        let mut vocabulary = Vocabulary { source_embedding: source.into(), end_of_image, ..default_vocabulary(config) };
        // A classifier's decoder may share the encoder's table.
        if config.classifier.is_some() && tensors.decoder_embedding.contains(&tensors.encoder_embedding[0]) {
            let embedding = stored(tensors.decoder_embedding, "")?;
            vocabulary.embedding = shared(embedding, &[source], tensors.decoder_embedding).into();
        }
        return Ok(vocabulary);
    }
    if !config.custom.has_text_targets() {
        return Ok(custom_vocabulary(config, is_stored));
    }
    let untied = ", though config.json has tie_word_embeddings false";
    let embedding = stored(tensors.decoder_embedding, "")?;
    let embedding = shared(embedding, &[source], tensors.decoder_embedding);
    let head = stored(tensors.head, untied)?;
    let head = shared(head, &[source, embedding], tensors.head);
    Ok(Vocabulary { end_of_image, ..of_names([source, embedding, head]) })
}

fn of_names([source, embedding, head]: [&str; 3]) -> Vocabulary {
    Vocabulary {
        source_embedding: source.into(),
        embedding: embedding.into(),
        head: head.into(),
        kept: None,
        custom_head: Head::Stock,
        end_of_image: None,
    }
}

/// The vectors of the token behind an image, of source and target; each stands for the other where it is not stored.
fn end_of_image(config: &Config, is_stored: impl Fn(&str) -> bool) -> Option<[String; 2]> {
    let [source, target] = config.family.tensors().end_of_image?;
    let either = |own: &'static str, other| [own, other].into_iter().find(|name| is_stored(name)).map(String::from);
    Some([either(source, target)?, either(target, source)?])
}

/// The names where the table, the head or both are not the family's own. `is_stored` returns whether there is such a
/// tensor: without a head of its own, a model has the table for one.
fn custom_vocabulary(config: &Config, is_stored: impl Fn(&str) -> bool) -> Vocabulary {
    let (tensors, custom) = (config.family.tensors(), &config.custom);
    let embedding = custom.decoder_embedding.as_deref().unwrap_or(tensors.decoder_embedding[0]);
    let head = match &custom.head {
        Head::Linear { weight, .. } => weight,
        Head::Mlp { tensors: [_, _, last, _], .. } => last,
        Head::None => tensors.head[0],
        Head::Stock if config.tie_word_embeddings && !is_stored(tensors.head[0]) => embedding,
        Head::Stock => tensors.head[0],
    };
    let names = of_names([tensors.encoder_embedding[0], embedding, head]);
    Vocabulary { custom_head: custom.head.clone(), ..names }
}

/// The names used without a checkpoint: those of published ones, which store tied tensors once.
pub fn default_vocabulary(config: &Config) -> Vocabulary {
    let tensors = config.family.tensors();
    let source = tensors.encoder_embedding[0];
    let names = match config.custom.has_text_targets() {
        false => return custom_vocabulary(config, |_| false),
        true if !config.tie_word_embeddings => [source, tensors.decoder_embedding[0], tensors.head[0]],
        // The encoder's table serves for all, or the decoder's for both.
        true if tensors.decoder_embedding.contains(&source) => [source; 3],
        true => [source, tensors.decoder_embedding[0], tensors.decoder_embedding[0]],
    };
    Vocabulary { end_of_image: end_of_image(config, |name| name.starts_with("model.encoder.")), ..of_names(names) }
}

/// The names of the tensors that an exported model was made of. `is_stored` returns whether the model has a tensor.
pub fn exported_vocabulary(config: &Config, is_stored: impl Fn(&str) -> bool) -> Vocabulary {
    if !config.custom.has_text_targets() {
        return custom_vocabulary(config, is_stored);
    }
    let tensors = config.family.tensors();
    let stored = |names: &[&'static str]| names.iter().find(|name| is_stored(name)).copied();
    let source = stored(tensors.encoder_embedding).unwrap_or(tensors.encoder_embedding[0]);
    match (stored(tensors.decoder_embedding), stored(tensors.head)) {
        (Some(embedding), Some(head)) => {
            Vocabulary { end_of_image: end_of_image(config, is_stored), ..of_names([source, embedding, head]) }
        }
        _ => default_vocabulary(config),
    }
}

/// Checks that every weight has its tensor, and returns the names of the tensors that no weight uses.
///
/// # Errors
/// All tensors that are missing or have another shape than the config asks for, or one of a type that cannot be
/// exported.
pub fn check(weights: &[Weight], checkpoint: &Checkpoint, config: &Config, task: &Task) -> Result<Vec<String>> {
    let (mut mismatches, mut missing) = (Vec::new(), Vec::new());
    let mut used = BTreeSet::new();
    for part in weights.iter().flat_map(|weight| &weight.parts) {
        let name = part.tensor.as_str();
        if !used.insert(name) {
            continue;
        }
        match checkpoint.tensor(name) {
            None => {
                mismatches.push(format!("{name}: missing (expected shape {:?})", part.shape));
                missing.push(name);
            }
            Some(tensor) if tensor.shape != part.shape => {
                mismatches.push(format!("{name}: expected shape {:?}, found {}", part.shape, shape(tensor.shape)));
            }
            Some(tensor) if tensor.float().is_none() => {
                let file = checkpoint.file_of(name).unwrap_or_default();
                let found = format!("{:?} (save quantized weights in one of these types first)", tensor.dtype);
                return Err(Error::invalid(file.display(), "F32, F16 or BF16", found).of(name));
            }
            Some(_) => {}
        }
    }
    if !mismatches.is_empty() {
        let hint = if missing.is_empty() { String::new() } else { checkpoint.explain_missing(&missing) };
        return Err(Error::Tensors { checkpoint: checkpoint.path().to_path_buf(), mismatches, hint });
    }
    // A stored head that equals the tied embedding is redundant, not forgotten; so is what a custom interface replaces.
    let (tensors, custom) = (config.family.tensors(), &config.custom);
    let replaces_embedding = custom.decoder_embedding.is_some() || custom.decoder_input == StackInput::InputsEmbeds;
    let is_redundant = |name: &str| {
        let is_embedding = replaces_embedding && name == tensors.decoder_embedding[0];
        // Where tables stand for each other, those that are left over are equal to those used.
        let is_table = tensors.decoder_embedding.contains(&tensors.encoder_embedding[0])
            && tensors.encoder_embedding.contains(&name);
        (is_embedding || is_table || name == tensors.head[0]) && !used.contains(name)
    };
    // An export of the encoder alone leaves the rest out on purpose, and one without vision the tower.
    let is_left_out =
        |name: &str| !is_for(name, config, task) || (config.vision.is_none() && is_of_vision(name, config));
    let unused = checkpoint.names().filter(|name| !used.contains(name) && !is_redundant(name) && !is_left_out(name));
    Ok(unused.map(str::to_string).collect())
}

/// Whether a tensor is part of what reads images.
pub fn is_of_vision(name: &str, config: &Config) -> bool {
    config.family.tensors().vision.iter().any(|start| name.starts_with(start))
}

/// Whether an export for `task` needs this tensor, if any does.
pub fn is_for(tensor: &str, config: &Config, task: &Task) -> bool {
    let role = config.role(tensor);
    !matches!(task, Task::FeatureExtraction(_))
        || !matches!(
            role,
            Some(Role::CrossKeyValue | Role::Decoder | Role::DecoderEmbedding | Role::Head | Role::Classifier)
        )
}

/// A shape for messages, truncated after eight dimensions.
fn shape(shape: &[usize]) -> String {
    match shape.get(..8) {
        Some(first) => format!("{first:?} and more dimensions"),
        None => format!("{shape:?}"),
    }
}
