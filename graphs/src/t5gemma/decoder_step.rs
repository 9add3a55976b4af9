//! The cached decoder steps: next target tokens, past, and the source's keys and values → logits and the present. Any
//! number of new tokens, so that a draft can be verified or a prefix appended in one run.

use super::decoder::layer;
use super::root;
use crate::attention::padding_mask;
use crate::config::{Config, Positions};
use crate::decoder::stack;
use crate::interface::{self, CacheLayout, PAST_LENGTH};
use crate::nn::embedding;
use crate::onnx::{Definition, Dim, Graph};
use crate::options::Options;
use crate::outputs::{mask_by_token, outputs};
use crate::sequence::{Context, KeyValue, Memory, Tokens};
use crate::weights::Weights;

/// The graph of the cached decoder steps.
pub fn decoder_step(config: &Config, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = options.interface(config).decoder_with_past;
    let inputs = interface::all_inputs(&graph, &ports);
    let adapter_mask =
        options.takes_adapters.then(|| interface::input(&graph, &interface::adapter_mask(options.dtype)));
    let (&[mask, ids], cached) = inputs.split_first_chunk().expect("a mask and ids come before the cache");
    let cache = options.cache(config);

    let root = root(&graph, &config.decoder, options);
    let (tokens, cached) = match cache {
        CacheLayout::Growing => (Tokens::after(&graph, &Dim::symbol(PAST_LENGTH), ids), cached),
        CacheLayout::InPlace | CacheLayout::Static(_) => {
            let (&positions, cached) = cached.split_first().expect("positions come before a cache of fixed capacity");
            (Tokens { rows: ids.dim(0), length: ids.dim(1), positions, rotary: positions }, cached)
        }
    };
    let has_float_positions = config.custom.target_positions == Positions::Float;
    let (floats, cached) = cached.split_at(usize::from(has_float_positions));
    let tokens = tokens.rotated_by(floats.first().copied());
    let cross_rotary = config.custom.cross_rope.then_some(tokens.rotary);
    let adapter_mask = adapter_mask.map(|mask| mask_by_token(mask, &tokens.length));
    let context = Context { tokens, source_mask: padding_mask(mask), target_mask: None, cross_rotary, cache };
    let x = embedding(ids, &root.at(&options.vocabulary.embedding));
    let memory = |i: usize, _: &Weights<'_>| {
        let [past_key, past_value, key, value] = *cached[4 * i..].first_chunk().expect("four tensors of each layer");
        Memory { past: Some(KeyValue { key: past_key, value: past_value }), source: KeyValue { key, value } }
    };
    let (x, layers) = stack(
        x,
        &context,
        &options.alignment_layers,
        memory,
        layer,
        &root.at("model.decoder").taking_adapters(adapter_mask),
    );
    let presents = layers.iter().flat_map(|layer| [layer.present.key, layer.present.value]);
    let weights = layers.iter().filter_map(|layer| layer.weights).collect();
    outputs(&ports, x, weights, presents.collect(), &context.tokens, options, &root);
    graph.finish("decoder_with_past")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::config::Head;
    use crate::interface::Logits;
    use crate::manifest::EncoderWindow;
    use crate::onnx::{DType, Node};
    use crate::options::Vocabulary;
    use crate::quantization::{Activations, Quantization};
    use crate::target::Target;
    use crate::task::Task;

    /// The inputs that operators of the CUDA provider read in host memory.
    fn host_inputs(node: &Node) -> &'static [usize] {
        match node.op {
            "Reshape" | "Expand" | "Squeeze" | "Unsqueeze" | "TopK" | "ReduceMax" | "ReduceSum" | "ReduceMean" => &[1],
            "Slice" => &[1, 2, 3, 4],
            "Range" => &[0, 1, 2],
            "ConstantOfShape" => &[0],
            "com.microsoft.GroupQueryAttention" => &[6],
            _ => &[],
        }
    }

    /// What makes the first input in host memory that depends on a number from the GPU.
    fn first_copy(definition: &Definition) -> Option<String> {
        let made: HashMap<usize, &Node> = (definition.nodes.iter())
            .flat_map(|node| node.outputs.iter().flatten().map(move |&output| (output, node)))
            .collect();
        let constants: Vec<usize> = definition.constants.iter().map(|constant| constant.value).collect();
        let host = |node: &Node| host_inputs(node).iter().filter_map(|&at| *node.inputs.get(at)?).collect::<Vec<_>>();
        let mut needed: Vec<usize> = definition.nodes.iter().flat_map(host).collect();
        while let Some(value) = needed.pop() {
            if constants.contains(&value) {
                continue;
            }
            match made.get(&value) {
                Some(node) if node.op == "Shape" => {}
                Some(node) if ["Concat", "Cast", "Gather", "Mul", "Add"].contains(&node.op) => {
                    needed.extend(node.inputs.iter().flatten());
                }
                Some(node) => return Some(node.name.clone()),
                None => return Some(definition.value(value).name.clone()),
            }
        }
        None
    }

    #[test]
    fn a_cached_step_waits_for_no_number_from_the_gpu() {
        let config = r#"{"model_type": "t5gemma", "encoder": {"num_hidden_layers": 2, "head_dim": 32},
            "decoder": {"num_hidden_layers": 3, "head_dim": 32}}"#;
        let config = Config::parse(config).expect("a minimal config");
        let step = |target: Target, logits: Logits| {
            let options = Options {
                task: Task::Text2TextGeneration,
                target,
                dtype: DType::BFloat16,
                logits,
                alignment_layers: vec![1],
                encoder_window: EncoderWindow::Inclusive,
                quantization: Quantization::default(),
                activations: Activations::default(),
                capacity: None,
                padding_row: None,
                vocabulary: Vocabulary {
                    source_embedding: "source".into(),
                    embedding: "embedding".into(),
                    head: "embedding".into(),
                    kept: None,
                    custom_head: Head::Stock,
                    end_of_image: None,
                },
                takes_adapters: false,
            };
            decoder_step(&config, &options)
        };
        for logits in [Logits::Last, Logits::All, Logits::Candidates(8)] {
            assert_eq!(first_copy(&step(Target::Cuda, logits)), None, "{logits:?}");
        }
        // On the CPU the length of the longest row is computed from the positions.
        let found = first_copy(&step(Target::Cpu, Logits::Last)).expect("seen");
        assert!(found.contains("self_attn"), "{found}");
    }
}
