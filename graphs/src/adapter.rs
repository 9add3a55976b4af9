//! PEFT LoRA adapters: what `adapter_config.json` and the tensor names of an adapter say it changes. The exporter merges
//! adapters into the weights, the runtime gives them to graphs that take them as inputs; both read them by these rules.
//! Files and numbers are theirs.
//!
//! # Design
//! The rules are those of PEFT's unmerged forward pass, not of its `merge_and_unload`, which changes a tied output head
//! together with the embedding although training did not.

mod config;
mod spelling;

use std::collections::{BTreeMap, BTreeSet};

use crate::config::Family;
use crate::json::{cut, list};
use crate::tensors::without_levels;

pub use config::{AdapterConfig, ModuleKind};
pub use spelling::Spelling;

/// The file with the settings of an adapter.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file with its tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The file with its tensors in older adapters, a pickle.
pub const PICKLE_FILE: &str = "adapter_model.bin";

/// What the names of an adapter's tensors begin with.
const PREFIX: &str = "base_model.model.";

/// The parts of an adapter for one module, each by the name of its tensor.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ModuleParts {
    /// `[rank, in]`, or for an embedding `[rank, vocabulary]`.
    pub a: Option<String>,
    /// `[out, rank]`.
    pub b: Option<String>,
    /// `[out]`, added to the module's bias.
    pub bias: Option<String>,
    /// DoRA's magnitudes: `[out]`.
    pub magnitude: Option<String>,
    /// Whether the parts are those of an embedding.
    pub is_embedding: bool,
}

/// The tensors of an adapter by what they change.
#[derive(Debug, Default)]
pub struct AdapterTensors {
    /// By module.
    pub modules: BTreeMap<String, ModuleParts>,
    /// Whole tensors by the tensor that they replace.
    pub replacements: BTreeMap<String, String>,
    /// Rows of embeddings by module: the rows that replace those of `trainable_token_indices`.
    pub token_rows: BTreeMap<String, String>,
    /// What PEFT calls modules.
    pub spelling: Spelling,
}

impl AdapterTensors {
    /// Sorts the names of the tensors of an adapter for a model of a family.
    ///
    /// # Errors
    /// What was expected of a name, and the name.
    pub fn of<'n>(names: impl Iterator<Item = &'n str>, family: Family) -> Result<AdapterTensors, (String, String)> {
        let names: Vec<&str> = names.collect();
        let plain = names.iter().filter_map(|name| name.strip_prefix(PREFIX));
        let mut tensors = AdapterTensors { spelling: Spelling::of(plain, family), ..AdapterTensors::default() };
        for name in names {
            let Some(plain) = name.strip_prefix(PREFIX) else {
                return Err((format!("a tensor name that begins with {PREFIX}"), cut(name)));
            };
            // Adapters of the classes without a head have names without the `model.` of the others.
            let is_bare = plain.starts_with("encoder.") || plain.starts_with("decoder.");
            let plain = without_levels(&if is_bare { format!("model.{plain}") } else { plain.to_string() });
            let stored = name.to_string();
            if let Some(module) = plain.strip_suffix(".token_adapter.trainable_tokens_delta") {
                tensors.token_rows.insert(module.to_string(), stored);
                continue;
            }
            let parts = [
                (".lora_A.weight", false),
                (".lora_B.weight", false),
                (".lora_B.bias", false),
                (".lora_magnitude_vector", false),
                (".lora_magnitude_vector.weight", false),
                (".lora_embedding_A", true),
                (".lora_embedding_B", true),
            ];
            let part = parts
                .iter()
                .find_map(|(suffix, is_embedding)| Some((plain.strip_suffix(suffix)?, *suffix, *is_embedding)));
            let Some((module, suffix, is_embedding)) = part else {
                if plain.contains(".lora_") || plain.contains(".ia3_") {
                    return Err(("a tensor of a LoRA adapter".into(), cut(name)));
                }
                let replaced = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".");
                if let Some(other) = tensors.replacements.insert(replaced.clone(), stored.clone()) {
                    return Err((format!("one tensor for {replaced}"), format!("{other} and {stored}")));
                }
                continue;
            };
            let parts = tensors.modules.entry(module.to_string()).or_default();
            parts.is_embedding |= is_embedding;
            let place = match suffix {
                ".lora_A.weight" | ".lora_embedding_A" => &mut parts.a,
                ".lora_B.weight" | ".lora_embedding_B" => &mut parts.b,
                ".lora_B.bias" => &mut parts.bias,
                _ => &mut parts.magnitude,
            };
            if let Some(other) = place.replace(stored.clone()) {
                return Err((format!("one tensor for {module}{suffix}"), format!("{other} and {stored}")));
            }
        }
        Ok(tensors)
    }
}

/// The modules of a checkpoint that LoRA can change, by name.
pub fn modules_of<'n>(tensors: impl Iterator<Item = &'n str>, family: Family) -> BTreeMap<String, ModuleKind> {
    const LINEAR: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    const OF_VISION: [&str; 6] = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"];
    let names = family.tensors();
    let mut modules = BTreeMap::new();
    for name in tensors {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        let last = module.rsplit('.').next().unwrap_or(module);
        if names.vision.iter().any(|start| module.starts_with(start)) {
            if OF_VISION.contains(&last) {
                modules.insert(module.to_string(), ModuleKind::Linear);
            }
        } else if last == "embed_tokens" {
            modules.insert(module.to_string(), ModuleKind::Embedding);
        } else if LINEAR.contains(&last) {
            modules.insert(module.to_string(), ModuleKind::Linear);
        } else if last == "out_proj" || last == "score" || last == "classifier" {
            modules.insert(module.to_string(), ModuleKind::Head);
        }
    }
    // A tied head is a module without a tensor of its own.
    if let Some(module) = names.head[0].strip_suffix(".weight") {
        modules.insert(module.to_string(), ModuleKind::Head);
    }
    modules
}

/// Compares the modules that `adapter_config.json` names with those that have tensors.
///
/// # Errors
/// What was expected, and the modules that are missing or too many.
pub fn check_modules(expected: &BTreeSet<String>, found: &BTreeSet<String>) -> Result<(), (String, String)> {
    let list = |names: Vec<&String>| list(&names.into_iter().cloned().collect::<Vec<_>>());
    let missing: Vec<&String> = expected.difference(found).collect();
    if !missing.is_empty() {
        return Err(("tensors for all modules of adapter_config.json".into(), format!("none for {}", list(missing))));
    }
    let others: Vec<&String> = found.difference(expected).collect();
    if !others.is_empty() {
        let expected = "tensors for the modules of adapter_config.json and of this checkpoint alone".into();
        return Err((expected, format!("tensors for {}", list(others))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_sorted_by_what_they_change() {
        let names = [
            "base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
            "base_model.model.encoder.layers.1.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.encoder.embed_tokens.lora_embedding_A",
            "base_model.model.model.encoder.embed_tokens.base_layer.weight",
            "base_model.model.model.decoder.embed_tokens.token_adapter.trainable_tokens_delta",
            "base_model.model.lm_head.modules_to_save.out_proj.weight",
        ];
        let tensors = AdapterTensors::of(names.into_iter(), Family::T5Gemma).expect("an adapter");
        let modules: Vec<&str> = tensors.modules.keys().map(String::as_str).collect();
        assert_eq!(
            modules,
            [
                "model.encoder.embed_tokens",
                "model.encoder.layers.0.self_attn.q_proj",
                "model.encoder.layers.1.self_attn.q_proj"
            ]
        );
        assert!(tensors.modules["model.encoder.embed_tokens"].is_embedding);
        assert_eq!(tensors.modules["model.encoder.layers.0.self_attn.q_proj"].a.as_deref(), Some(names[0]));
        let replaced: Vec<&str> = tensors.replacements.keys().map(String::as_str).collect();
        assert_eq!(replaced, ["lm_head.out_proj.weight", "model.encoder.embed_tokens.weight"]);
        assert_eq!(tensors.token_rows["model.decoder.embed_tokens"], names[5]);
        for (name, expected) in [
            ("model.encoder.x.lora_A.weight", "a tensor name that begins with base_model.model."),
            ("base_model.model.model.encoder.x.lora_C.weight", "a tensor of a LoRA adapter"),
            ("base_model.model.model.encoder.x.ia3_l", "a tensor of a LoRA adapter"),
        ] {
            let error = AdapterTensors::of([name].into_iter(), Family::T5Gemma).expect_err(expected);
            assert_eq!(error.0, expected, "{name}");
        }
    }

    #[test]
    fn modules_are_those_with_matrices() {
        let names = [
            "model.encoder.embed_tokens.weight",
            "model.encoder.layers.0.self_attn.q_proj.weight",
            "model.encoder.layers.0.self_attn.q_proj.bias",
            "model.encoder.norm.weight",
        ];
        let modules = modules_of(names.into_iter(), Family::T5Gemma2);
        assert_eq!(modules.keys().collect::<Vec<_>>(), ["lm_head.out_proj", &names[0][..26], &names[1][..39]]);
    }
}
