//! For ONNX Runtime's CUDA provider, where a step is bound by the bytes it reads and by how many kernels it launches: the
//! operators of the CPU's lowering, which CUDA has too, and one operator for the encoder's attention as well.
//!
//! # Design
//! What an operator reads in the process's memory is made of shapes alone, in a cached step. A number that was computed on the
//! GPU would have to be waited for in every step, and a step with such a copy in it cannot be captured as a CUDA graph.

use super::cpu::{Cpu, group_query};
use super::{Attention, Lowering};
use crate::attention::KeyValue;
use crate::decoder::Context;
use crate::interface::CacheLayout;
use crate::nn::Weights;
use crate::onnx::{DType, Value};

pub struct Cuda;

impl Lowering for Cuda {
    fn rms_norm<'g>(&self, x: Value<'g>, factor: Value<'g>, eps: f64) -> Value<'g> {
        Cpu.rms_norm(x, factor, eps)
    }

    fn causal<'g>(
        &self,
        x: Value<'g>,
        context: &Context<'g>,
        past: Option<KeyValue<'g>>,
        w: &Weights<'g>,
    ) -> (Value<'g>, KeyValue<'g>) {
        let past = match (context.cache, past) {
            (CacheLayout::InPlace | CacheLayout::Static(_), Some(past)) => past,
            _ => return Cpu.causal(x, context, past, w),
        };
        let tokens = &context.tokens;
        let last = tokens.positions.last(1).cast(DType::Int32).reshape(std::slice::from_ref(&tokens.rows));
        // The longest row may have as many tokens as there is room for: what each has is told by `last`, on the GPU.
        let most = w.graph.size(&past.key.dim(2)).cast(DType::Int32);
        group_query(x, context, Some(past), [last, most], w)
    }

    /// What is not visible gets a number of its own to add instead of a bool: the operator's own for `false` may be −∞, with
    /// which a padded query that sees nothing would become NaN.
    fn attention<'g>(&self, a: Attention<'g>) -> Value<'g> {
        let query = a.query.transpose(&[0, 2, 1, 3]); // [batch, heads, queries, head_dim]
        let visible = if a.visible.shape().len() == 5 { a.visible.squeeze(1) } else { a.visible };
        // Added to a score in the same type, the sum must not pass the type's least number.
        let hidden = if query.dtype() == DType::Float16 { -60_000.0 } else { -1e38 };
        let bias = visible.choose(query.dtype(), 0.0, hidden);
        let mut shape = bias.shape();
        shape[bias.shape().len() - 2] = query.dim(2);
        let bias = bias.expand(&shape);
        query.attention([a.key_value.key, a.key_value.value], bias, a.scale, a.cap).transpose(&[0, 2, 1, 3])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use crate::config::Config;
    use crate::interface::Logits;
    use crate::lower::Target;
    use crate::manifest::EncoderWindow;
    use crate::onnx::{DType, Definition, Node};
    use crate::quantization::{Activations, Quantization};
    use crate::task::Task;
    use crate::{Options, Vocabulary, decoder_step};

    /// The inputs that operators of the CUDA provider read in the process's memory.
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

    /// The first input of an operator in the process's memory that needs a number from the GPU: what makes it.
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
                vocabulary: Vocabulary { embedding: "embedding".into(), head: "embedding".into(), kept: None },
            };
            decoder_step::decoder_step(&config, &options)
        };
        for logits in [Logits::Last, Logits::All, Logits::Candidates(8)] {
            assert_eq!(first_copy(&step(Target::Cuda, logits)), None, "{logits:?}");
        }
        // The CPU's is told the length of the longest row, which is computed of the positions.
        let found = first_copy(&step(Target::Cpu, Logits::Last)).expect("seen");
        assert!(found.contains("self_attn"), "{found}");
    }
}
