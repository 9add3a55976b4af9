//! Maps the tensor names of a checkpoint to those of the model's classes. Training wraps a model in others
//! (`torch.compile`, data parallelism, FSDP, PEFT); a checkpoint saved from within a wrapper has its name in every
//! tensor name.

use std::collections::BTreeMap;

use t5gemma_graphs::config::Family;
use t5gemma_graphs::tensors::without_levels;

/// Name components that wrappers insert anywhere and no T5Gemma has.
const WRAPPERS: [&str; 5] =
    ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// Parts of names that only unmerged PEFT adapters have.
const ADAPTERS: [&str; 4] = [".lora_", ".base_layer.", ".modules_to_save.", ".original_module."];

/// Names that fit more than one model, or more than one tensor of a model.
#[derive(Debug)]
pub struct Ambiguous {
    /// What would have been accepted.
    pub expected: String,
    /// The names in question.
    pub found: String,
}

/// Maps the name that the model's classes give each tensor to its stored name. Names that belong to no class stay as
/// they are.
///
/// # Errors
/// Names of more than one model, or two names for one tensor.
pub fn of_model<'n>(stored: &[&'n str]) -> Result<BTreeMap<String, &'n str>, Ambiguous> {
    let plain: Vec<String> = stored.iter().map(|name| unwrapped(name)).collect();
    let mut prefixes: Vec<&str> = plain.iter().filter_map(|name| prefix(name)).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let prefix = match prefixes[..] {
        [] | ["", ..] => "",
        [prefix] => prefix,
        [..] => {
            let prefixes: Vec<String> = prefixes.iter().map(|prefix| format!("{prefix:?}")).collect();
            let (count, prefixes) = (prefixes.len(), prefixes.join(" and "));
            let found = format!("those of {count} (the names begin with {prefixes}): save one of them alone");
            return Err(Ambiguous { expected: "the tensors of one model".into(), found });
        }
    };
    // The classes without a head (`T5GemmaModel`, `T5GemmaEncoderModel`) save names without the `model.` of the others.
    let is_bare = !plain.iter().any(|name| name.strip_prefix(prefix).is_some_and(is_of_stack));
    let name = |plain: &str| match plain.strip_prefix(prefix) {
        Some(rest) if is_bare && (rest.starts_with("encoder.") || rest.starts_with("decoder.")) => {
            format!("model.{rest}")
        }
        Some(rest) => rest.to_string(),
        None => plain.to_string(),
    };
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    // A tensor stored under its plain name keeps it, whatever other names map to it.
    let (own, others): (Vec<_>, Vec<_>) = stored
        .iter()
        .zip(&plain)
        .map(|(stored, plain)| (*stored, name(plain)))
        .partition(|(stored, name)| stored == name);
    let of_own: BTreeMap<String, &str> = own.into_iter().map(|(stored, name)| (name, stored)).collect();
    for (stored, name) in others {
        let name = if of_own.contains_key(&name) { stored.to_string() } else { name };
        if let Some(other) = names.insert(name.clone(), stored) {
            let found = format!("{other} and {stored}");
            return Err(Ambiguous { expected: format!("one tensor for {name}"), found });
        }
    }
    names.extend(of_own);
    Ok(names)
}

/// Starts of the tensor names of the encoder and decoder in all families, by which they are recognized behind other
/// prefixes.
fn stacks() -> impl Iterator<Item = &'static str> {
    Family::ALL.into_iter().flat_map(|family| family.tensors().stacks.iter().copied())
}

/// Whether a name is that of a tensor of the encoder or decoder.
pub fn is_of_stack(name: &str) -> bool {
    name.strip_prefix("model.").is_some_and(|rest| stacks().any(|stack| rest.starts_with(stack)))
}

/// Whether a tensor belongs to an unmerged PEFT adapter, or to a matrix that has one.
pub fn is_of_adapter(name: &str) -> bool {
    ADAPTERS.iter().any(|part| name.contains(part))
}

/// The name among `others` that shares the most components with `name`, counted from the end.
pub fn nearest<'n>(name: &str, others: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let common = |other: &str| name.rsplit('.').zip(other.rsplit('.')).take_while(|(a, b)| a == b).count();
    // One shared component is `weight`, which means nothing.
    others
        .map(|other| (common(other), other))
        .filter(|(common, _)| *common > 1)
        .max_by_key(|(common, _)| *common)
        .map(|(_, other)| other)
}

fn unwrapped(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    without_levels(&parts.join("."))
}

/// The prefix before the name of a stack's tensor, without the `model.` that is part of the name.
fn prefix(name: &str) -> Option<&str> {
    let places = stacks().filter_map(|stack| name.find(stack));
    let before = &name[..places.filter(|&at| at == 0 || name[..at].ends_with('.')).min()?];
    match before.strip_suffix("model.") {
        Some(rest) if rest.is_empty() || rest.ends_with('.') => Some(rest),
        _ => Some(before),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMBEDDING: &str = "model.decoder.embed_tokens.weight";
    const QUERY: &str = "model.encoder.layers.0.self_attn.q_proj.weight";
    const HEAD: &str = "lm_head.out_proj.weight";

    #[test]
    fn wrappers_are_removed_from_names() {
        for prefix in [
            "",
            "module.",
            "_orig_mod.",
            "_orig_mod.module.",
            "module._orig_mod.",
            "base_model.model.",
            "module.base_model.model.",
            "_fsdp_wrapped_module.",
            "model.",
            "student.",
            "net.model.",
        ] {
            let stored: Vec<String> = [EMBEDDING, QUERY, HEAD].iter().map(|name| format!("{prefix}{name}")).collect();
            let stored: Vec<&str> = stored.iter().map(String::as_str).chain(["spiece_model"]).collect();
            let names = of_model(&stored).expect(prefix);
            let found: Vec<&str> = names.keys().map(String::as_str).collect();
            assert_eq!(found, [HEAD, EMBEDDING, QUERY, "spiece_model"], "{prefix}");
        }
        for (stored, name) in [
            ("model.encoder.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight", QUERY),
            ("model.encoder._orig_mod.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight", QUERY),
            ("encoder.layers.0.self_attn.q_proj.weight", QUERY),
            ("module.encoder.layers.0.self_attn.q_proj.weight", QUERY),
            ("base_model.model.encoder.layers.0.self_attn.q_proj.weight", QUERY),
        ] {
            assert_eq!(of_model(&[stored]).expect(stored).keys().next().map(String::as_str), Some(name), "{stored}");
        }
    }

    #[test]
    fn names_of_two_models_are_refused() {
        let twice = [format!("student.{QUERY}"), format!("teacher.{QUERY}")];
        let error = of_model(&[&twice[0], &twice[1]]).expect_err("ambiguous");
        assert!(error.found.contains("\"student.\" and \"teacher.\""), "{}", error.found);
        let twice = [format!("module.{QUERY}"), format!("_orig_mod.{QUERY}")];
        of_model(&[&twice[0], &twice[1]]).expect_err("ambiguous");
        // A tensor stored under its plain name is not ambiguous.
        let names = of_model(&[QUERY, &twice[0], &format!("ema.{QUERY}")]).expect("its own").len();
        assert_eq!(names, 3);
    }

    #[test]
    fn the_nearest_name_is_that_of_the_same_matrix() {
        let others = ["encoder.block.0.self_attn.q_proj.weight", "encoder.block.0.mlp.up_proj.weight", "a.weight"];
        assert_eq!(nearest(QUERY, others.into_iter()), Some(others[0]));
        assert_eq!(nearest(EMBEDDING, others.into_iter()), None);
    }
}
