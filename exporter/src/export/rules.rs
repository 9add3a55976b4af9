//! The rules between the options of an export, and between options and checkpoint. Each refuses with a [`SettingError`], which
//! names options by their fields.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use t5gemma_graphs::config::{Config, Stack};
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::json::cut;
use t5gemma_graphs::onnx::{Blocks, Code, Definition};
use t5gemma_graphs::quantization::{self, Activations, Quantization};
use t5gemma_graphs::task::{Features, Task};
use t5gemma_graphs::{Capabilities, Options, Packing, Target, definitions};

use super::Export;
use crate::checkpoint::GENERATION_CONFIG;
use crate::settings::{Setting, SettingError};
use crate::tensorrt::{Bytes, Memory, Plan};
use crate::weights::Weight;

/// Refuses what does not go together, whatever the checkpoint.
pub(super) fn check(export: &Export) -> Result<(), SettingError> {
    let (target, dtype) = (export.target, export.dtype);
    let requires_target = |setting, value: &str, suits: &dyn Fn(&Capabilities) -> bool| {
        if suits(target.capabilities()) {
            return Ok(());
        }
        let suited = Target::ALL.into_iter().filter(|target| suits(target.capabilities()));
        let needed = suited.map(Target::name).collect::<Vec<_>>().join(" or ");
        Err(requires(setting, value, Setting::Target, needed, target.name()))
    };
    requires_target(Setting::Dtype, &dtype.to_string(), &|target| target.dtypes.contains(&dtype))?;
    for blocks in export.quantization.parts() {
        let Blocks { bits, size, .. } = blocks;
        if !matches!(bits, 4 | 8) {
            return Err(SettingError::value(Setting::Quantization, "4 or 8 bits", bits));
        }
        if !matches!(size, 16 | 32 | 64 | 128) {
            return Err(SettingError::value(Setting::BlockSize, "16, 32, 64 or 128", size));
        }
        let is_float8 = blocks.code == Code::Float8E4M3FN;
        requires_target(Setting::Quantization, blocks.name(), &|target| {
            if is_float8 { target.float8 } else { target.packing.is_some() }
        })?;
    }
    if export.plan.is_some() {
        requires_target(Setting::Plan, "", &|target| target.serving_plans)?;
    }
    if export.fits.is_some() && export.plan.is_none() {
        return Err(requires(Setting::Fits, "", Setting::Plan, "", ""));
    }
    if export.capacity.is_some() {
        requires_target(Setting::Capacity, "", &|target| target.static_cache)?;
    }
    if export.activations == Activations::Observed {
        requires_target(Setting::Observed, "", &|target| target.observes_activations)?;
        if dtype != DType::Float32 {
            return Err(requires(Setting::Observed, "", Setting::Dtype, "float32", dtype.to_string()));
        }
        if export.alignment.is_some() {
            return Err(requires(Setting::Observed, "", Setting::Alignment, "to be left out", ""));
        }
    }
    let has_ranges = matches!(export.activations, Activations::Ranges(_));
    if has_ranges {
        requires_target(Setting::Ranges, "", &|target| target.quantizes_activations)?;
        let names: Vec<&str> = export.quantization.parts().map(|blocks| blocks.name()).collect();
        if !export.quantization.parts().any(|blocks| blocks.bits == 8) {
            return Err(requires(Setting::Ranges, "", Setting::Quantization, "int8 or fp8", names.join(", ")));
        }
    }
    for blocks in export.quantization.parts() {
        if target.capabilities().quantizes_activations && blocks.bits == 8 && !has_ranges {
            let value = format!("{} with target {}", blocks.name(), target.name());
            return Err(requires(Setting::Quantization, &value, Setting::Ranges, "", ""));
        }
        if !blocks.symmetric {
            requires_target(Setting::Asymmetric, "", &|target| target.packing == Some(Packing::Blocks))?;
        }
    }
    Ok(())
}

/// Refuses options of a decoder for tasks that have none.
pub(super) fn check_task(export: &Export, task: &Task) -> Result<(), SettingError> {
    if task.is_generation() {
        return Ok(());
    }
    let of_decoder = [
        (Setting::AllLogits, export.logits == Logits::All),
        (Setting::Candidates, matches!(export.logits, Logits::Candidates(_))),
        (Setting::KeptTokens, export.kept_tokens.is_some()),
        (Setting::Alignment, export.alignment.is_some()),
        (Setting::Capacity, export.capacity.is_some()),
    ];
    let Some((setting, _)) = of_decoder.into_iter().find(|(_, is_given)| *is_given) else { return Ok(()) };
    let by = if export.task.is_some() { "" } else { ", by the checkpoint" };
    let found = format!("{}{by}", task.name());
    Err(requires(setting, "", Setting::Task, Task::Text2TextGeneration.name(), found))
}

/// Refuses a plan that the model cannot serve.
pub(super) fn check_plan(
    plan: &Plan,
    config: &Config,
    options: &Options,
    graphs: &[Definition],
) -> Result<(), SettingError> {
    plan.check(config, options, graphs).map_err(|error| SettingError::Unfit {
        setting: Setting::Plan,
        why: error.to_string().trim_start_matches("--plan: ").to_string(),
    })
}

/// Refuses a plan that takes more memory than there is.
pub(super) fn check_memory(fits: Option<Bytes>, memory: &Memory) -> Result<(), SettingError> {
    let Some(Bytes(available)) = fits else { return Ok(()) };
    let needed = memory.bytes();
    if needed > available {
        let expected = format!("at least the {needed} bytes that the plan takes");
        return Err(SettingError::value(Setting::Fits, expected, format!("{available} bytes:\n\n{memory}")));
    }
    Ok(())
}

/// Refuses patterns that match no weight.
pub(super) fn check_excluded(patterns: &[String], weights: &[Weight]) -> Result<(), SettingError> {
    for pattern in patterns {
        let mut names = weights.iter().flat_map(|weight| &weight.parts).map(|part| &part.tensor);
        if !names.any(|name| quantization::matches(pattern, name)) {
            let expected = "the name of a weight, in which * may stand for any text";
            return Err(SettingError::value(Setting::Exclude, expected, format!("{pattern:?}, which no weight has")));
        }
    }
    Ok(())
}

/// Refuses sizes that do not fit the model.
pub(super) fn check_sizes(export: &Export, config: &Config) -> Result<(), SettingError> {
    let Quantization { encoder, decoder, head, .. } = &export.quantization;
    let widths =
        |stack: &Stack| [stack.hidden_size, stack.num_attention_heads * stack.head_dim, stack.intermediate_size];
    let (of_encoder, of_decoder) = (widths(&config.encoder), widths(&config.decoder));
    let across = [config.encoder.hidden_size];
    let packing = export.target.capabilities().packing;
    for (blocks, widths) in
        [(encoder, &of_encoder[..]), (decoder, &of_decoder), (decoder, &across), (head, &of_decoder[..1])]
    {
        // Of 8 bits a row is a block.
        let is_blocked = |blocks: &Blocks| packing == Some(Packing::Signed) && blocks.bits == 4;
        let Some(Blocks { size, .. }) = blocks.filter(is_blocked) else { continue };
        if let Some(width) = widths.iter().find(|width| !width.is_multiple_of(size)) {
            let expected = format!("a divisor of the matrices' widths for target {}", export.target.name());
            return Err(SettingError::value(Setting::BlockSize, expected, format!("{size} for {width}")));
        }
    }
    if let Some(capacity) = export.capacity {
        let most = config.decoder.max_position_embeddings;
        if !(1..=most).contains(&capacity) {
            return Err(SettingError::value(
                Setting::Capacity,
                format!("1 to {most} (decoder.max_position_embeddings)"),
                capacity,
            ));
        }
    }
    if let Logits::Candidates(count) = export.logits {
        // The limit of TensorRT's TopK.
        let tokens = export.kept_tokens.as_ref().map_or(config.decoder.vocab_size, Vec::len);
        let most = tokens.min(3839);
        if !(1..=most).contains(&count) {
            return Err(SettingError::value(Setting::Candidates, format!("1 to {most}"), count));
        }
    }
    Ok(())
}

/// Refuses tokens that the model does not have, and a choice of which no text would ever end.
pub(super) fn check_kept_tokens(
    tokens: &[usize],
    config: &Config,
    generation_config: Option<&Value>,
) -> Result<(), SettingError> {
    let refused = |expected: String, found: String| Err(SettingError::value(Setting::KeptTokens, expected, found));
    let vocab_size = config.decoder.vocab_size;
    if tokens.is_empty() {
        return refused("ids of tokens".into(), "none".into());
    }
    if let Some(token) = tokens.iter().find(|&&token| token >= vocab_size) {
        return refused(format!("token ids below {vocab_size}, the size of the vocabulary"), token.to_string());
    }
    if let Some(pair) = tokens.windows(2).find(|pair| pair[0] >= pair[1]) {
        return refused("ascending token ids, each once".into(), format!("{} before {}", pair[0], pair[1]));
    }
    let ends: Vec<u64> = match generation_config.and_then(|fields| fields.get("eos_token_id")) {
        Some(Value::Array(tokens)) => tokens.iter().filter_map(Value::as_u64).collect(),
        Some(token) => token.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let is_kept = |token: &u64| tokens.binary_search(&(*token as usize)).is_ok();
    if !ends.is_empty() && !ends.iter().any(is_kept) {
        let expected =
            format!("one of those that end a text, eos_token_id {ends:?} of {GENERATION_CONFIG}, among them");
        return refused(expected, "none".into());
    }
    Ok(())
}

/// The layers of an alignment, ascending.
pub(super) fn alignment_layers(wanted: Option<&[usize]>, config: &Config) -> Result<Vec<usize>, SettingError> {
    let all = config.decoder.layers.len();
    let mut layers = match wanted {
        None => return Ok(Vec::new()),
        Some([]) => return Ok((0..all).collect()),
        Some(layers) => layers.to_vec(),
    };
    if let Some(layer) = layers.iter().find(|&&layer| layer >= all) {
        let expected = format!("decoder layers from 0 to {}", all - 1);
        return Err(SettingError::value(Setting::AlignmentLayers, expected, layer));
    }
    layers.sort_unstable();
    if let Some(twice) = layers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(SettingError::value(Setting::AlignmentLayers, "each layer once", format!("{} twice", twice[0])));
    }
    Ok(layers)
}

/// Holds ranges to the matrices of the model.
pub(super) fn check_ranges(
    config: &Config,
    options: &Options,
    ranges: &BTreeMap<String, f32>,
) -> Result<(), SettingError> {
    let refused = |expected: String, found: String| Err(SettingError::value(Setting::Ranges, expected, found));
    let observed = definitions(config, &Options { activations: Activations::Observed, ..options.clone() });
    let known: BTreeSet<&str> = observed.iter().flat_map(|graph| &graph.observed).map(String::as_str).collect();
    let role = config.family.tensors().role;
    let is_rounded = |name: &str| options.quantization.of(name, role(name)).is_some_and(|blocks| blocks.bits == 8);
    for &name in known.iter().filter(|name| is_rounded(name)) {
        match ranges.get(name) {
            Some(range) if range.is_finite() && *range >= 0.0 => {}
            Some(range) => return refused(format!("ranges of 0 or more for {name}"), range.to_string()),
            None => return refused(format!("a range for {name}"), "none".into()),
        }
    }
    match ranges.keys().find(|name| !known.contains(name.as_str())) {
        Some(name) => refused("names of this model's matrices".into(), cut(name)),
        None => Ok(()),
    }
}

/// The task to export for, which must suit the checkpoint.
pub(super) fn task(wanted: Option<Task>, config: &Config) -> Result<Task, SettingError> {
    let task = wanted.unwrap_or_else(|| Task::of(config));
    if !task.suits(config) {
        let mut suited = vec![Task::of(config).name(), Task::FeatureExtraction(Features::default()).name()];
        suited.dedup();
        let expected =
            format!("{} for a checkpoint of {}", suited.join(" or "), config.architecture.name(config.family));
        return Err(SettingError::value(Setting::Task, expected, task.name()));
    }
    let Task::FeatureExtraction(mut features) = task else { return Ok(task) };
    let all = config.encoder.layers.len();
    let Some(layers) = features.layers(config) else {
        let expected = format!("0 to {all}, or -1 to -{} from the end", all + 1);
        return Err(SettingError::value(Setting::HiddenLayer, expected, features.hidden_layer));
    };
    features.hidden_layer = layers as i64;
    Ok(Task::FeatureExtraction(features))
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
