//! The rules between the options of an export, and between options and checkpoint. Each refuses with a
//! [`SettingError`], which names options by their fields.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use t5gemma_graphs::config::{Config, Stack};
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::json::cut;
use t5gemma_graphs::manifest::EncoderWindow;
use t5gemma_graphs::onnx::{Blocks, Code};
use t5gemma_graphs::quantization::{self, Activations, Quantization};
use t5gemma_graphs::task::{Features, PaddingRows, Pooling, Task};
use t5gemma_graphs::{Capabilities, Options, Packing, Target, definitions};

use super::{Alignment, CustomInterface, Export, PaddingRow};
use crate::checkpoint::{self, GENERATION_CONFIG};
use crate::error;
use crate::settings::{Setting, SettingError};
use crate::tensorrt::{MemoryEstimate, MemorySize, ServingPlan};
use crate::weights::Weight;

type Result<T, E = SettingError> = std::result::Result<T, E>;

/// Maximum number of candidates: the limit of TensorRT's TopK.
const MAX_CANDIDATES: usize = 3839;
/// Maximum rank of adapters, beyond which merging is the better choice in any model.
const MAX_LORA_RANK: usize = 1024;

/// Refuses options that contradict each other, whatever the checkpoint.
pub(super) fn check(export: &Export) -> Result<()> {
    let (target, dtype) = (export.target, export.dtype);
    requires_target(export, Setting::Dtype, &dtype.to_string(), &|target| target.dtypes.contains(&dtype))?;
    check_blocks(export)?;
    if export.plan.is_some() {
        requires_target(export, Setting::Plan, "", &|target| target.serving_plans)?;
    }
    if export.memory_limit.is_some() && export.plan.is_none() {
        return Err(requires(Setting::MemoryLimit, "", Setting::Plan, "", ""));
    }
    if export.capacity.is_some() {
        requires_target(export, Setting::Capacity, "", &|target| target.static_cache)?;
    }
    if export.quantization.vision.is_some() {
        // In eight bits, the others compute with quantized activations too, for which the tower has no ranges.
        let suits = |target: &Capabilities| target.packing == Some(Packing::Blocks);
        requires_target(export, Setting::VisionQuantization, "", &suits)?;
    }
    check_activations(export)?;
    check_lora(export)?;
    let has_ranges = matches!(export.activations, Activations::Ranges(_));
    for blocks in export.quantization.formats() {
        if target.capabilities().quantizes_activations && blocks.bits == 8 && !has_ranges {
            let value = format!("{} with target {}", blocks.name(), target.name());
            return Err(requires(Setting::Quantization, &value, Setting::Ranges, "", ""));
        }
        if !blocks.symmetric {
            let suits = |target: &Capabilities| target.packing == Some(Packing::Blocks);
            requires_target(export, Setting::Asymmetric, "", &suits)?;
        }
    }
    Ok(())
}

fn check_blocks(export: &Export) -> Result<()> {
    for blocks in export.quantization.formats() {
        let Blocks { bits, size, .. } = blocks;
        if !matches!(bits, 4 | 8) {
            return Err(SettingError::invalid(Setting::Quantization, "4 or 8 bits", bits));
        }
        if !matches!(size, 16 | 32 | 64 | 128) {
            return Err(SettingError::invalid(Setting::BlockSize, "16, 32, 64 or 128", size));
        }
        let is_float8 = blocks.code == Code::Float8E4M3FN;
        let suits = |target: &Capabilities| if is_float8 { target.float8 } else { target.packing.is_some() };
        requires_target(export, Setting::Quantization, blocks.name(), &suits)?;
    }
    Ok(())
}

fn check_activations(export: &Export) -> Result<()> {
    match &export.activations {
        Activations::Unknown => {}
        Activations::Observed => {
            requires_target(export, Setting::Observed, "", &|target| target.observes_activations)?;
            if export.dtype != DType::Float32 {
                return Err(requires(Setting::Observed, "", Setting::Dtype, "float32", export.dtype.to_string()));
            }
            if export.alignment != Alignment::None {
                return Err(SettingError::Excludes { setting: Setting::Observed, other: Setting::Alignment });
            }
        }
        Activations::Ranges(_) => {
            requires_target(export, Setting::Ranges, "", &|target| target.quantizes_activations)?;
            if !export.quantization.formats().any(|blocks| blocks.bits == 8) {
                let found: Vec<&str> = export.quantization.formats().map(|blocks| blocks.name()).collect();
                return Err(requires(Setting::Ranges, "", Setting::Quantization, "int8 or fp8", found.join(", ")));
            }
        }
    }
    Ok(())
}

fn check_lora(export: &Export) -> Result<()> {
    let Some(rank) = export.lora_inputs else { return Ok(()) };
    requires_target(export, Setting::LoraInputs, "", &|target| target.lora_inputs)?;
    if !(1..=MAX_LORA_RANK).contains(&rank) {
        return Err(SettingError::invalid(Setting::LoraInputs, format!("a rank from 1 to {MAX_LORA_RANK}"), rank));
    }
    if export.activations == Activations::Observed {
        return Err(SettingError::Excludes { setting: Setting::LoraInputs, other: Setting::Observed });
    }
    Ok(())
}

/// Refuses an option, or one value of it, unless the target suits.
fn requires_target(
    export: &Export,
    setting: Setting,
    value: &str,
    suits: &dyn Fn(&Capabilities) -> bool,
) -> Result<()> {
    if suits(export.target.capabilities()) {
        return Ok(());
    }
    let suited = Target::ALL.into_iter().filter(|target| suits(target.capabilities())).map(Target::name);
    let needed = suited.collect::<Vec<_>>().join(" or ");
    Err(requires(setting, value, Setting::Target, needed, export.target.name()))
}

fn requires(
    setting: Setting,
    value: &str,
    other: Setting,
    needed: impl Into<String>,
    found: impl Into<String>,
) -> SettingError {
    SettingError::Requires { setting, value: value.into(), other, needed: needed.into(), found: found.into() }
}

/// The task to export for: the one that was asked for, which must suit the checkpoint, or the checkpoint's own.
pub(super) fn task(wanted: Option<Task>, config: &Config) -> Result<Task> {
    let task = wanted.unwrap_or_else(|| config.task());
    if !task.suits(&config.task()) {
        let mut suited = vec![config.task().name(), Task::FeatureExtraction(Features::default()).name()];
        suited.dedup();
        let expected =
            format!("{} for a checkpoint of {}", suited.join(" or "), config.architecture.name(config.family));
        return Err(SettingError::invalid(Setting::Task, expected, task.name()));
    }
    let Task::FeatureExtraction(mut features) = task else { return Ok(task) };
    let all = config.encoder.layers.len();
    let Some(layers) = features.layers(all) else {
        let expected = format!("0 to {all}, or -1 to -{} from the end", all + 1);
        return Err(SettingError::invalid(Setting::HiddenLayer, expected, features.hidden_layer));
    };
    features.hidden_layer = layers as i64;
    check_features(&features, config)?;
    Ok(Task::FeatureExtraction(features))
}

fn check_features(features: &Features, config: &Config) -> Result<()> {
    if let Some(length) = features.fixed_length {
        let most = config.encoder.max_position_embeddings;
        if !(1..=most).contains(&length) {
            let expected = format!("1 to {most} (encoder.max_position_embeddings)");
            return Err(SettingError::invalid(Setting::FixedLength, expected, length));
        }
    }
    let without_pooling = [
        (Setting::PaddingRows, !features.padding_rows.is_unspecified()),
        (Setting::OutputDtype, features.output_dtype.is_some()),
    ];
    if let Some((setting, _)) = without_pooling.into_iter().find(|(_, is_given)| *is_given)
        && features.pooling != Pooling::None
    {
        return Err(requires(setting, "", Setting::Pooling, "none", features.pooling.name()));
    }
    if features.output_hidden_states {
        if features.pooling != Pooling::None {
            return Err(requires(Setting::OutputHiddenStates, "", Setting::Pooling, "none", features.pooling.name()));
        }
        let (layer, last) = (features.hidden_layer, config.encoder.layers.len() as i64);
        if layer != last {
            return Err(requires(Setting::OutputHiddenStates, "", Setting::HiddenLayer, "last", layer.to_string()));
        }
    }
    match features.output_dtype {
        None | Some(DType::Float32 | DType::Float16) => Ok(()),
        Some(dtype) => Err(SettingError::invalid(Setting::OutputDtype, "float16 or float32", dtype)),
    }
}

/// Reads the hidden state of padding, if the task has a learned one.
pub(super) fn padding_row(export: &Export, task: &Task, config: &Config) -> error::Result<Option<Vec<f32>>> {
    let is_learned = matches!(task, Task::FeatureExtraction(Features { padding_rows: PaddingRows::Learned, .. }));
    match &export.padding_row {
        Some(PaddingRow { file, tensor }) if is_learned => {
            Ok(Some(checkpoint::read_vector(file, tensor, config.encoder.hidden_size)?))
        }
        Some(_) => Err(SettingError::invalid(Setting::PaddingRows, "learned rows for a padding_row", "others").into()),
        None if is_learned => {
            Err(SettingError::invalid(Setting::PaddingRows, "a padding_row for learned rows", "none").into())
        }
        None => Ok(None),
    }
}

/// The error for `write_sentencepiece` with random weights.
pub(super) fn no_sentencepiece() -> SettingError {
    SettingError::invalid(Setting::WriteSentencepiece, "a checkpoint", "random weights")
}

/// Refuses a plan for other source lengths than the fixed one.
pub(super) fn check_fixed_length(plan: &ServingPlan, task: &Task) -> Result<()> {
    let Task::FeatureExtraction(Features { fixed_length: Some(length), .. }) = task else { return Ok(()) };
    let (shortest, longest) = plan.source_lengths();
    if shortest == *length && longest == *length {
        return Ok(());
    }
    let found = if shortest == longest { format!("source={longest}") } else { format!("source={shortest}..{longest}") };
    Err(requires(Setting::FixedLength, &length.to_string(), Setting::Plan, format!("source={length}"), found))
}

/// Refuses options that a family of models does not have.
pub(super) fn check_family(export: &Export, config: &Config) -> Result<()> {
    let Some(window) = config.family.encoder_window() else { return Ok(()) };
    let family = config.family.class_prefix();
    if export.encoder_window == EncoderWindow::Exclusive {
        let expected = format!("the window of {family} ({window:?})").to_lowercase();
        return Err(SettingError::invalid(Setting::EncoderWindow, expected, "exclusive"));
    }
    if export.custom != CustomInterface::default() {
        let expected = "a T5Gemma";
        return Err(SettingError::invalid(Setting::Custom, expected, family));
    }
    Ok(())
}

/// Refuses a format for a vision tower that the model does not have.
pub(super) fn check_vision(export: &Export, config: &Config) -> Result<()> {
    match export.quantization.vision {
        Some(blocks) if config.vision.is_none() => {
            let expected = "none for a model that reads no images";
            Err(SettingError::invalid(Setting::VisionQuantization, expected, blocks.name()))
        }
        _ => Ok(()),
    }
}

/// Refuses options of the decoder graphs for tasks without them.
pub(super) fn check_task(export: &Export, task: &Task) -> Result<()> {
    if task.is_generation() {
        return Ok(());
    }
    let of_decoder = [
        (Setting::AllLogits, export.logits == Logits::All),
        (Setting::Candidates, matches!(export.logits, Logits::Candidates(_))),
        (Setting::KeptTokens, export.kept_tokens.is_some()),
        (Setting::Alignment, export.alignment != Alignment::None),
        (Setting::Capacity, export.capacity.is_some()),
        (Setting::LoraInputs, export.lora_inputs.is_some()),
    ];
    let Some((setting, _)) = of_decoder.into_iter().find(|(_, is_given)| *is_given) else { return Ok(()) };
    let by = if export.task.is_some() { "" } else { ", the task of the checkpoint" };
    let found = format!("{}{by}", task.name());
    Err(requires(setting, "", Setting::Task, Task::Text2TextGeneration.name(), found))
}

/// Refuses sizes that do not fit the model.
pub(super) fn check_sizes(export: &Export, config: &Config) -> Result<()> {
    let Quantization { encoder, decoder, head, .. } = &export.quantization;
    let widths =
        |stack: &Stack| [stack.hidden_size, stack.num_attention_heads * stack.head_dim, stack.intermediate_size];
    let (of_encoder, of_decoder) = (widths(&config.encoder), widths(&config.decoder));
    let packing = export.target.capabilities().packing;
    let of_cross_attention = [config.encoder.hidden_size];
    for (blocks, widths) in
        [(encoder, &of_encoder[..]), (decoder, &of_decoder), (decoder, &of_cross_attention), (head, &of_decoder[..1])]
    {
        // With 8 bits, a whole row shares a scale.
        let has_blocks = |blocks: &Blocks| packing == Some(Packing::Signed) && blocks.bits == 4;
        let Some(Blocks { size, .. }) = blocks.filter(has_blocks) else { continue };
        if let Some(width) = widths.iter().find(|width| !width.is_multiple_of(size)) {
            let expected = format!("a divisor of every matrix width for target {}", export.target.name());
            return Err(SettingError::invalid(Setting::BlockSize, expected, format!("{size} for width {width}")));
        }
    }
    if let Some(capacity) = export.capacity {
        let most = config.decoder.max_position_embeddings;
        if !(1..=most).contains(&capacity) {
            let expected = format!("1 to {most} (decoder.max_position_embeddings)");
            return Err(SettingError::invalid(Setting::Capacity, expected, capacity));
        }
    }
    if let Logits::Candidates(count) = export.logits {
        let tokens = export.kept_tokens.as_ref().map_or(config.decoder.vocab_size, Vec::len);
        let most = tokens.min(MAX_CANDIDATES);
        if !(1..=most).contains(&count) {
            return Err(SettingError::invalid(Setting::Candidates, format!("1 to {most}"), count));
        }
    }
    Ok(())
}

/// Refuses tokens that the model does not have, and a set without any token that ends a text.
pub(super) fn check_kept_tokens(tokens: &[usize], config: &Config, generation_config: Option<&Value>) -> Result<()> {
    let refused = |expected: String, found: String| Err(SettingError::invalid(Setting::KeptTokens, expected, found));
    let vocab_size = config.decoder.vocab_size;
    if tokens.is_empty() {
        return refused("token ids".into(), "none".into());
    }
    if let Some(token) = tokens.iter().find(|&&token| token >= vocab_size) {
        return refused(format!("token ids below {vocab_size}, the vocabulary size"), token.to_string());
    }
    if let Some(pair) = tokens.windows(2).find(|pair| pair[0] >= pair[1]) {
        return refused("ascending token ids without repetitions".into(), format!("{} before {}", pair[0], pair[1]));
    }
    let ends: Vec<u64> = match generation_config.and_then(|fields| fields.get("eos_token_id")) {
        Some(Value::Array(tokens)) => tokens.iter().filter_map(Value::as_u64).collect(),
        Some(token) => token.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let is_kept = |token: &u64| tokens.binary_search(&(*token as usize)).is_ok();
    if !ends.is_empty() && !ends.iter().any(is_kept) {
        return refused(format!("at least one eos_token_id of {GENERATION_CONFIG}, {ends:?}"), "none".into());
    }
    Ok(())
}

/// The layers of an alignment, ascending.
pub(super) fn alignment_layers(alignment: &Alignment, config: &Config) -> Result<Vec<usize>> {
    let all = config.decoder.layers.len();
    let mut layers = match alignment {
        Alignment::None => return Ok(Vec::new()),
        Alignment::AllLayers => return Ok((0..all).collect()),
        Alignment::Layers(layers) => layers.clone(),
    };
    if layers.is_empty() {
        return Err(SettingError::invalid(Setting::AlignmentLayers, "decoder layers", "none"));
    }
    if let Some(layer) = layers.iter().find(|&&layer| layer >= all) {
        let expected = format!("decoder layers from 0 to {}", all - 1);
        return Err(SettingError::invalid(Setting::AlignmentLayers, expected, layer));
    }
    layers.sort_unstable();
    if let Some(twice) = layers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(SettingError::invalid(Setting::AlignmentLayers, "each layer once", format!("{} twice", twice[0])));
    }
    Ok(layers)
}

/// Refuses ranges that do not cover the matrices to be computed in 8 bits, or are those of another model.
pub(super) fn check_ranges(config: &Config, options: &Options, ranges: &BTreeMap<String, f32>) -> Result<()> {
    let refused = |expected: String, found: String| Err(SettingError::invalid(Setting::Ranges, expected, found));
    let observed = definitions(config, &Options { activations: Activations::Observed, ..options.clone() });
    let known: BTreeSet<&str> = observed.iter().flat_map(|graph| &graph.observed).map(String::as_str).collect();
    let needs_range =
        |name: &str| options.quantization.of(name, config.role(name)).is_some_and(|blocks| blocks.bits == 8);
    for &name in known.iter().filter(|name| needs_range(name)) {
        match ranges.get(name) {
            Some(range) if range.is_finite() && *range >= 0.0 => {}
            Some(range) => return refused(format!("a finite range of at least 0 for {name}"), range.to_string()),
            None => return refused(format!("a range for {name}"), "none".into()),
        }
    }
    match ranges.keys().find(|name| !known.contains(name.as_str())) {
        Some(name) => refused("names of this model's matrices".into(), cut(name)),
        None => Ok(()),
    }
}

/// Refuses a plan that takes more memory than the limit.
pub(super) fn check_memory(limit: Option<MemorySize>, memory: &MemoryEstimate) -> Result<()> {
    let Some(MemorySize(limit)) = limit else { return Ok(()) };
    let needed = memory.bytes();
    if needed > limit {
        return Err(SettingError::Memory { limit, needed, table: memory.to_string() });
    }
    Ok(())
}

/// Refuses patterns that match no weight.
pub(super) fn check_excluded(patterns: &[String], weights: &[Weight]) -> Result<()> {
    for pattern in patterns {
        let mut names = weights.iter().flat_map(|weight| &weight.parts).map(|part| &part.tensor);
        if !names.any(|name| quantization::matches(pattern, name)) {
            let expected = "a pattern that matches a weight, with * for any text";
            return Err(SettingError::invalid(Setting::Exclude, expected, format!("{pattern:?}")));
        }
    }
    Ok(())
}
