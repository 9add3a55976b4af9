//! Counts the parameters of a model from its configuration alone.

use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::manifest::EncoderWindow;
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_graphs::task::Task;
use t5gemma_graphs::{Options, Target, Vocabulary, definitions};

use crate::weights;

/// Counts the parameters of a model with this configuration, each tensor once.
pub fn parameters(config: &Config) -> u64 {
    let options = plain_options(weights::default_vocabulary(config));
    weights::parameters(&weights::collect(&definitions(config, &options), config, &options))
}

/// Options of graphs that hold every tensor as the checkpoint has it.
pub(crate) fn plain_options(vocabulary: Vocabulary) -> Options {
    Options {
        task: Task::Text2TextGeneration,
        target: Target::Portable,
        dtype: DType::Float32,
        logits: Logits::Last,
        alignment_layers: Vec::new(),
        encoder_window: EncoderWindow::Inclusive,
        quantization: Quantization::default(),
        activations: Activations::Unknown,
        capacity: None,
        padding_row: None,
        vocabulary,
        takes_adapters: false,
    }
}
