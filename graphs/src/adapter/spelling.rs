//! `Spelling`: the names that modules have in PEFT. Patterns of an adapter are written for those, while this project calls
//! modules what a checkpoint's tensors are called.

use crate::config::Family;
use crate::tensors::LEVELS;

/// The levels that an adapter's names of modules have besides those of the checkpoint's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spelling {
    levels: Vec<(&'static str, &'static str)>,
}

impl Spelling {
    /// The spelling of names from an adapter for a model of a family. Where they do not tell, it is that of
    /// transformers 5.24.
    pub fn of<'n>(names: impl Iterator<Item = &'n str>, family: Family) -> Spelling {
        let names: Vec<&str> = names.collect();
        let has = |level: &str| names.iter().any(|name| name.contains(level));
        let is_plain = ["encoder.layers.", "encoder.embed_tokens."]
            .iter()
            .any(|start| names.iter().any(|name| name.strip_prefix("model.").unwrap_or(name).starts_with(start)));
        let is_spelled = |&(parent, level): &(&str, &str)| {
            let is_default = family == Family::T5Gemma2 && level == "text_model" && !is_plain;
            has(&format!("{parent}.{level}.")) || is_default
        };
        Spelling { levels: LEVELS.into_iter().filter(is_spelled).collect() }
    }

    /// What PEFT calls a module of this name.
    pub fn of_module(&self, name: &str) -> String {
        let (mut spelled, mut before) = (String::new(), "");
        for part in name.split('.') {
            let is_below = |(parent, level): &(&str, &str)| {
                // The tower is beside the text's level, and has an `encoder` of its own.
                let is_of_text =
                    spelled == "model.encoder" && !["vision_tower", "multi_modal_projector"].contains(&part);
                *parent == before && (*level != "text_model" || is_of_text)
            };
            if let Some((_, level)) = self.levels.iter().copied().find(is_below) {
                spelled += &format!(".{level}");
            }
            if !spelled.is_empty() {
                spelled.push('.');
            }
            spelled += part;
            before = part;
        }
        spelled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::without_levels;

    #[test]
    fn modules_have_the_names_of_the_adapter() {
        let text = "model.encoder.layers.0.self_attn.q_proj";
        let tower = "model.encoder.vision_tower.encoder.layers.0.mlp.fc1";
        let decoder = "model.decoder.layers.0.mlp.up_proj";
        let with_level = "model.encoder.text_model.layers.0.self_attn.q_proj";
        let with_model = "model.encoder.vision_tower.vision_model.encoder.layers.0.mlp.fc1";
        for (names, family, expected) in [
            (vec![with_level, tower], Family::T5Gemma2, [with_level, tower, decoder]),
            (vec![with_level, with_model], Family::T5Gemma2, [with_level, with_model, decoder]),
            (vec![decoder], Family::T5Gemma2, [with_level, tower, decoder]),
            (vec![text, with_model], Family::T5Gemma2, [text, with_model, decoder]),
            (vec![text, decoder], Family::T5Gemma, [text, tower, decoder]),
            (vec![decoder], Family::T5Gemma, [text, tower, decoder]),
        ] {
            let spelling = Spelling::of(names.iter().copied(), family);
            assert_eq!([text, tower, decoder].map(|name| spelling.of_module(name)), expected, "{names:?}");
            assert_eq!(expected.map(without_levels), [text, tower, decoder], "{names:?}");
        }
    }
}
