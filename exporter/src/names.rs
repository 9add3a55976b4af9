//! The names of a checkpoint's tensors as the model's classes have them. Training wraps a model into others (`torch.compile`,
//! data parallelism, FSDP, PEFT), and what is saved from inside such a wrapper has its name in every tensor's.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use t5gemma_graphs::config::Family;

/// Parts of names that wrappers put in anywhere and no T5Gemma has.
const WRAPPERS: [&str; 5] =
    ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// Parts of names that only adapters have which are not merged into the model.
const OF_ADAPTERS: [&str; 4] = [".lora_", ".base_layer.", ".modules_to_save.", ".original_module."];

/// The name that the model's classes give each tensor, by the name that it is stored under. What has none keeps its own.
///
/// # Errors
/// More than one model, or tensor of one, that the names may be of.
pub fn of_model<'n>(stored: &[&'n str]) -> Result<BTreeMap<String, &'n str>> {
    let plain: Vec<String> = stored.iter().map(|name| unwrapped(name)).collect();
    let mut prefixes: Vec<&str> = plain.iter().filter_map(|name| prefix(name)).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let prefix = match prefixes[..] {
        [] | ["", ..] => "",
        [prefix] => prefix,
        [..] => bail!(
            "expected the tensors of one model, found those of {} (the names begin with {}): save one of them alone",
            prefixes.len(),
            prefixes.iter().map(|prefix| format!("{prefix:?}")).collect::<Vec<_>>().join(" and ")
        ),
    };
    // The classes without a head (`T5GemmaModel`, `T5GemmaEncoderModel`) save the names that the others put behind `model.`.
    let is_bare = !plain.iter().any(|name| name.strip_prefix(prefix).is_some_and(is_of_stack));
    let name = |plain: &str| match plain.strip_prefix(prefix) {
        Some(rest) if is_bare && (rest.starts_with("encoder.") || rest.starts_with("decoder.")) => {
            format!("model.{rest}")
        }
        Some(rest) => rest.to_string(),
        None => plain.to_string(),
    };
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    // A tensor that is stored by its own name has it, whatever else would come to the same.
    let (own, others): (Vec<_>, Vec<_>) = stored
        .iter()
        .zip(&plain)
        .map(|(stored, plain)| (*stored, name(plain)))
        .partition(|(stored, name)| stored == name);
    let of_own: BTreeMap<String, &str> = own.into_iter().map(|(stored, name)| (name, stored)).collect();
    for (stored, name) in others {
        let name = if of_own.contains_key(&name) { stored.to_string() } else { name };
        if let Some(other) = names.insert(name.clone(), stored) {
            bail!("expected one tensor for {name}, found {other} and {stored}");
        }
    }
    names.extend(of_own);
    Ok(names)
}

/// What the names of stacks' tensors begin with in any family, by which they are found behind other prefixes.
fn stacks() -> impl Iterator<Item = &'static str> {
    Family::ALL.into_iter().flat_map(|family| family.tensors().stacks.iter().copied())
}

/// Whether a name is that of a tensor of either stack.
pub fn is_of_stack(name: &str) -> bool {
    name.strip_prefix("model.").is_some_and(|rest| stacks().any(|stack| rest.starts_with(stack)))
}

/// Whether a tensor belongs to an adapter, or to a matrix that has one, as PEFT names them.
pub fn is_of_adapter(name: &str) -> bool {
    OF_ADAPTERS.iter().any(|part| name.contains(part))
}

/// Of some names that which has most parts in common with another, from the end.
pub fn nearest<'n>(name: &str, others: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let common = |other: &str| name.rsplit('.').zip(other.rsplit('.')).take_while(|(a, b)| a == b).count();
    // One part is `weight`, which says nothing.
    others
        .map(|other| (common(other), other))
        .filter(|(common, _)| *common > 1)
        .max_by_key(|(common, _)| *common)
        .map(|(_, other)| other)
}

fn unwrapped(name: &str) -> String {
    name.split('.').filter(|part| !WRAPPERS.contains(part)).collect::<Vec<_>>().join(".")
}

/// What stands before the name of a stack's tensor, without the `model.` that is part of it.
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
    fn wrappers_are_left_out_of_names() {
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
    fn what_may_be_of_two_models_is_refused() {
        let twice = [format!("student.{QUERY}"), format!("teacher.{QUERY}")];
        let error = of_model(&[&twice[0], &twice[1]]).expect_err("which?").to_string();
        assert!(error.contains("\"student.\" and \"teacher.\""), "{error}");
        let twice = [format!("module.{QUERY}"), format!("_orig_mod.{QUERY}")];
        of_model(&[&twice[0], &twice[1]]).expect_err("which?");
        // The model's own names are no question.
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
