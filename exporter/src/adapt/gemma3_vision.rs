//! The part of a Gemma 3 that reads images, a SigLIP tower and a projector, which T5Gemma 2 has under the same names.

use serde_json::{Map, Value, json};
use t5gemma_graphs::json::shown;

use super::config::{Kind, Result, error};
use crate::checkpoint::Checkpoint;

/// What stands before the name of a tensor, in new and old files.
const PREFIXES: [&str; 2] = ["model.", ""];

/// The matrices of a layer of the tower, behind `encoder.layers.i.`, each with a bias: which widths they go from and to.
const MATRICES: [(&str, [Width; 2]); 6] = [
    ("self_attn.q_proj", [Width::Hidden, Width::Hidden]),
    ("self_attn.k_proj", [Width::Hidden, Width::Hidden]),
    ("self_attn.v_proj", [Width::Hidden, Width::Hidden]),
    ("self_attn.out_proj", [Width::Hidden, Width::Hidden]),
    ("mlp.fc1", [Width::FeedForward, Width::Hidden]),
    ("mlp.fc2", [Width::Hidden, Width::FeedForward]),
];

#[derive(Clone, Copy)]
enum Width {
    Hidden,
    FeedForward,
}

/// Every tensor that is read, under the name behind `model.encoder.` in T5Gemma 2, with its shape; `config` is the whole `config.json`,
/// `text_width` the width of the text's hidden states.
pub fn tensors(config: &Map<String, Value>, text_width: usize) -> Result<Vec<(String, Vec<usize>)>> {
    let nothing = Map::new();
    let vision = match config.get("vision_config") {
        None | Some(Value::Null) => &nothing,
        Some(Value::Object(vision)) => vision,
        Some(other) => return Err(error("vision_config", "an object", shown(other))),
    };
    let size = |name: &str, default: u64| {
        let value = vision.get(name).cloned().unwrap_or(json!(default));
        let size = Kind::Size.check(&format!("vision_config.{name}"), &value)?;
        Ok(size.as_u64().expect("a size was checked") as usize)
    };
    let (hidden, feed_forward) = (size("hidden_size", 768)?, size("intermediate_size", 3072)?);
    let (layers, image, patch) = (size("num_hidden_layers", 12)?, size("image_size", 224)?, size("patch_size", 16)?);
    let grid = image / patch;
    let width = |width: Width| match width {
        Width::Hidden => hidden,
        Width::FeedForward => feed_forward,
    };
    let mut tensors = vec![
        ("multi_modal_projector.mm_soft_emb_norm.weight".to_string(), vec![hidden]),
        ("multi_modal_projector.mm_input_projection_weight".to_string(), vec![hidden, text_width]),
    ];
    let mut tower = |name: String, shape: Vec<usize>| tensors.push((format!("vision_tower.{name}"), shape));
    tower("embeddings.patch_embedding.weight".into(), vec![hidden, 3, patch, patch]);
    tower("embeddings.patch_embedding.bias".into(), vec![hidden]);
    tower("embeddings.position_embedding.weight".into(), vec![grid * grid, hidden]);
    let mut norm = |name: String| {
        for part in ["weight", "bias"] {
            tower(format!("{name}.{part}"), vec![hidden]);
        }
    };
    norm("post_layernorm".into());
    for i in 0..layers {
        norm(format!("encoder.layers.{i}.layer_norm1"));
        norm(format!("encoder.layers.{i}.layer_norm2"));
    }
    for i in 0..layers {
        for (name, axes) in MATRICES {
            let shape = axes.map(width);
            tower(format!("encoder.layers.{i}.{name}.bias"), vec![shape[0]]);
            tower(format!("encoder.layers.{i}.{name}.weight"), shape.to_vec());
        }
    }
    Ok(tensors)
}

/// The stored name of one of [`tensors`].
pub fn stored_name(checkpoint: &Checkpoint, name: &str) -> String {
    let spellings = PREFIXES.iter().flat_map(|prefix| {
        let inner = name.replacen("vision_tower.", "vision_tower.vision_model.", 1);
        [format!("{prefix}{name}"), format!("{prefix}{inner}")]
    });
    let stored = spellings.into_iter().find(|name| checkpoint.stored_tensor(name).is_some());
    stored.unwrap_or_else(|| format!("model.{name}"))
}

/// Whether a tensor is not used: the head of the tower, and positions that older versions stored.
pub fn is_ignored(name: &str) -> bool {
    name.contains("vision_tower.") && (name.contains(".head.") || name.ends_with(".position_ids"))
}
