//! The contract between exporter and runtime: file names, and the name, dtype and symbolic shape of every input and
//! output of the graphs, spelled once. Names and their order follow Optimum and transformers.js, so that other tools
//! can run the files. The graph definitions declare these ports; the runtime checks opened sessions against them.

mod lora;

use serde::{Deserialize, Serialize};

pub use crate::onnx::{DType, Dim};
pub use lora::{LoraModule, LoraModules, lora, lora_graph};
pub(crate) use lora::{adapter_mask, encoder_adapter_mask};

use crate::config::{Head, Positions, StackInput};
use crate::facts::Facts;
use crate::onnx::{Graph, Value};
use crate::task::{Features, Pooling, Task};

/// File name of the graph from source tokens to hidden states.
pub const ENCODER: &str = "encoder_model.onnx";
/// File name of the graph of the first decoder step.
pub const DECODER: &str = "decoder_model.onnx";
/// File name of the graph of the cached decoder steps.
pub const DECODER_WITH_PAST: &str = "decoder_with_past_model.onnx";
/// File name of the graph from images to what the encoder reads of them.
pub const VISION_ENCODER: &str = "vision_encoder.onnx";
/// File name of the only graph of a model that does not generate.
pub const MODEL: &str = "model.onnx";
/// File name of [`ENCODER`] with an adapter among its inputs.
pub const ENCODER_LORA: &str = "encoder_lora_model.onnx";
/// File name of [`DECODER`] with an adapter among its inputs.
pub const DECODER_LORA: &str = "decoder_lora_model.onnx";
/// File name of [`DECODER_WITH_PAST`] with adapters among its inputs.
pub const DECODER_WITH_PAST_LORA: &str = "decoder_with_past_lora_model.onnx";
/// File name of the graph that reorders the rows of a cache on a device: see [`reorder`].
pub const REORDER: &str = "reorder_model.onnx";
/// File name of the weights that all graphs share.
pub const WEIGHTS: &str = "model.onnx_data";

/// File name of a serving plan's optimization profiles.
pub const PROFILES_FILE: &str = "profiles.json";
/// File name of a serving plan's provider options.
pub const PROVIDER_OPTIONS: &str = "provider_options.json";
/// The folder for engines that are built from the graphs.
pub const ENGINES: &str = "engines";

/// The dimension of source rows.
pub const BATCH: &str = "batch_size";
/// The dimension of target rows per source row.
pub const BEAMS: &str = "num_beams";
/// The dimension of images.
pub const IMAGES: &str = "num_images";
/// The dimension of source tokens, padding included.
pub const SOURCE_LENGTH: &str = "encoder_sequence_length";
/// The dimension of the target tokens that a step is given.
pub const STEP_LENGTH: &str = "decoder_sequence_length";
/// The dimension of the target tokens in the cache before a step, or of its capacity where it is written in place.
pub const PAST_LENGTH: &str = "past_decoder_sequence_length";
/// The dimension of a cache's capacity after a step, where it is written in place: as before the step, or the tokens
/// there are.
pub const PRESENT_LENGTH: &str = "present_decoder_sequence_length";
/// The dimension of target rows after they were reordered.
pub const PARENTS: &str = "num_parents";

/// The dimension of the rank of a LoRA adapter, or of several side by side.
pub const LORA_RANK: &str = "lora_rank";

/// The input with the adapter that each target row uses: see [`lora`].
pub const ADAPTER_MASK: &str = "adapter_mask";
/// The input with the adapter that each source row uses, where the keys and values of sources are computed.
pub const ENCODER_ADAPTER_MASK: &str = "encoder_adapter_mask";
/// The output with the greatest logits of [`Logits::Candidates`], greatest first.
pub const TOP_SCORES: &str = "top_scores";
/// The output with the token ids of [`TOP_SCORES`].
pub const TOP_IDS: &str = "top_ids";
/// The output with the log-sum-exp of all logits.
pub const LOG_SUM_EXP: &str = "log_sum_exp";
/// The output of [`DecoderOutputs::cross_attentions`].
pub const CROSS_ATTENTIONS: &str = "cross_attentions";
/// The input of the graph in [`VISION_ENCODER`].
pub const PIXEL_VALUES: &str = "pixel_values";
/// The output of the graph in [`VISION_ENCODER`], and the last input of a graph that reads sources with images.
pub const IMAGE_FEATURES: &str = "image_features";
/// The input with the float positions of source tokens.
pub const POSITION_IDS: &str = "position_ids";
/// The input with the float positions of target tokens.
pub const DECODER_POSITION_IDS: &str = "decoder_position_ids";
/// The output of a decoder without a head, in the place of the logits.
pub const DECODER_LAST_HIDDEN_STATE: &str = "decoder_last_hidden_state";
/// The output of [`activation_ranges`].
pub const ACTIVATION_RANGES: &str = "activation_ranges";

/// One input or output of a graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// The name in the graph.
    pub name: String,
    /// The element type.
    pub dtype: DType,
    /// The dimensions, symbolic where they vary from run to run.
    pub shape: Vec<Dim>,
}

/// The inputs and outputs of one graph, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ports {
    /// What a run takes.
    pub inputs: Vec<Port>,
    /// What a run returns.
    pub outputs: Vec<Port>,
}

/// The logits that the decoder graphs return.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Logits {
    /// Those of the last position, which is all that generation needs.
    #[default]
    Last,
    /// Those of every position, for scoring.
    All,
    /// Those of the last position, and as further outputs this many of the greatest, their token ids and the
    /// log-sum-exp of all, so that a search need not copy whole rows of logits from a GPU.
    Candidates(usize),
}

/// The outputs of the decoder graphs besides keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecoderOutputs {
    /// The logits.
    pub logits: Logits,
    /// The number of tokens that have logits, if not the whole vocabulary.
    pub kept_tokens: Option<usize>,
    /// Whether the last output is how much each given target token attends to each source token, the mean over heads
    /// and some layers.
    pub cross_attentions: bool,
}

impl From<Logits> for DecoderOutputs {
    fn from(logits: Logits) -> DecoderOutputs {
        DecoderOutputs { logits, ..DecoderOutputs::default() }
    }
}

/// How the keys and values of the target tokens pass from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheLayout {
    /// The present is a new tensor, longer than the past by the step's tokens.
    #[default]
    Growing,
    /// The past is a buffer with room for more tokens. `cache_position` (int64 `[rows, length]`) is where the step's
    /// tokens are written; if the present is given the past's memory, nothing else is written. Rows of different
    /// lengths can share a step. A step of several tokens has one row.
    InPlace,
    /// The past is a buffer for this many tokens. `cache_position` (int64 `[length]`) is where the step's tokens are
    /// written, into a new tensor of the same size. One graph does all steps, the first too, with a past of zeros.
    Static(usize),
}

/// The ports of the three graphs of a model that generates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    /// Source tokens → hidden states.
    pub encoder: Ports,
    /// First target tokens + hidden states → logits, self-attention and cross-attention keys and values.
    pub decoder: Ports,
    /// Next target tokens + past → logits, present self-attention keys and values.
    pub decoder_with_past: Ports,
}

/// The two kinds of cached tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Keys and values of the target tokens, `[batch_size * num_beams, num_key_value_heads, length, head_dim]`.
    SelfAttention,
    /// Keys and values of the source tokens, `[batch_size, num_key_value_heads, length, head_dim]`.
    CrossAttention,
}

impl Cache {
    /// The name of a port: `prefix` is `past_key_values` for inputs and `present` for outputs, `tensor` is `key` or
    /// `value`.
    pub fn port(self, prefix: &str, layer: usize, tensor: &str) -> String {
        format!("{prefix}.{layer}.{}.{tensor}", self.stack())
    }

    /// The stack whose tokens are cached, as port names have it.
    fn stack(self) -> &'static str {
        match self {
            Cache::SelfAttention => "decoder",
            Cache::CrossAttention => "encoder",
        }
    }
}

impl Interface {
    /// The ports of a model with weights and activations in `dtype`.
    pub fn of(facts: &Facts, dtype: DType, outputs: impl Into<DecoderOutputs>, cache: CacheLayout) -> Interface {
        let DecoderOutputs { logits, kept_tokens, cross_attentions } = outputs.into();
        let fixed = Dim::fixed;
        let (batch, source) = (Dim::symbol(BATCH), Dim::symbol(SOURCE_LENGTH));
        let (step, past) = (Dim::symbol(STEP_LENGTH), Dim::symbol(PAST_LENGTH));
        let rows = batch.times(&Dim::symbol(BEAMS));
        let hidden = |name| port(name, dtype, &[&batch, &source, &fixed(facts.encoder.hidden_size)]);
        let mask = |name| port(name, DType::Int64, &[&batch, &source]);
        let custom = &facts.custom;
        let target_ids = || match custom.decoder_input {
            StackInput::InputIds => port("input_ids", DType::Int64, &[&rows, &step]),
            StackInput::InputsEmbeds => {
                port("decoder_inputs_embeds", dtype, &[&rows, &step, &fixed(facts.decoder.hidden_size)])
            }
        };
        let source_positions = source_positions(facts, &batch, &source);
        // The keys of the cross cache are rotated by the positions of the source.
        let cross_positions = || source_positions.clone().filter(|_| custom.cross_rope);
        let target_positions = (custom.target_positions == Positions::Float)
            .then(|| port(DECODER_POSITION_IDS, DType::Float32, &[&rows, &step]));
        let (scored, candidates) = match logits {
            Logits::Last => (fixed(1), None),
            Logits::All => (step.clone(), None),
            Logits::Candidates(count) => (fixed(1), Some(count)),
        };
        let tokens = fixed(kept_tokens.unwrap_or(facts.decoder.vocab_size));
        let logits = || match custom.head {
            Head::None => port(DECODER_LAST_HIDDEN_STATE, dtype, &[&rows, &scored, &fixed(facts.decoder.hidden_size)]),
            _ => port("logits", DType::Float32, &[&rows, &scored, &tokens]),
        };

        let (kv_heads, head_dim) = (fixed(facts.decoder.num_key_value_heads), fixed(facts.decoder.head_dim));
        let cached = |prefix: &str, layer, cache: Cache, rows: &Dim, length: &Dim| {
            ["key", "value"]
                .map(|tensor| port(&cache.port(prefix, layer, tensor), dtype, &[rows, &kv_heads, length, &head_dim]))
        };
        let layers = 0..facts.decoder.num_hidden_layers;
        let (past, present, position) = match cache {
            CacheLayout::Growing => (past.clone(), past.plus(&step), None),
            CacheLayout::InPlace => (past, Dim::symbol(PRESENT_LENGTH), Some(vec![&rows, &step])),
            CacheLayout::Static(capacity) => (fixed(capacity), fixed(capacity), Some(vec![&step])),
        };
        let candidates = match candidates {
            None => Vec::new(),
            Some(count) => vec![
                port(TOP_SCORES, DType::Float32, &[&rows, &fixed(count)]),
                port(TOP_IDS, DType::Int64, &[&rows, &fixed(count)]),
                port(LOG_SUM_EXP, DType::Float32, &[&rows, &fixed(1)]),
            ],
        };
        let attended = cross_attentions.then(|| port(CROSS_ATTENTIONS, DType::Float32, &[&rows, &step, &source]));
        let first = match cache {
            CacheLayout::Static(_) => Ports {
                inputs: [hidden("encoder_hidden_states")].into_iter().chain(cross_positions()).collect(),
                outputs: (layers.clone())
                    .flat_map(|layer| cached("present", layer, Cache::CrossAttention, &batch, &source))
                    .collect(),
            },
            _ => Ports {
                inputs: [mask("encoder_attention_mask"), target_ids(), hidden("encoder_hidden_states")]
                    .into_iter()
                    .chain(target_positions.clone())
                    .chain(cross_positions())
                    .collect(),
                outputs: [logits()]
                    .into_iter()
                    .chain(layers.clone().flat_map(|layer| {
                        let own = cached("present", layer, Cache::SelfAttention, &rows, &step);
                        let cross = cached("present", layer, Cache::CrossAttention, &batch, &source);
                        own.into_iter().chain(cross)
                    }))
                    .chain(candidates.clone())
                    .chain(attended.clone())
                    .collect(),
            },
        };

        Interface {
            encoder: Ports {
                inputs: source_inputs(facts, dtype, &batch, &source),
                outputs: vec![hidden("last_hidden_state")],
            },
            decoder: first,
            decoder_with_past: Ports {
                inputs: [mask("encoder_attention_mask"), target_ids()]
                    .into_iter()
                    .chain(position.map(|shape| port("cache_position", DType::Int64, &shape)))
                    .chain(target_positions)
                    .chain(layers.clone().flat_map(|layer| {
                        let own = cached("past_key_values", layer, Cache::SelfAttention, &rows, &past);
                        let cross = cached("past_key_values", layer, Cache::CrossAttention, &batch, &source);
                        own.into_iter().chain(cross)
                    }))
                    .collect(),
                outputs: [logits()]
                    .into_iter()
                    .chain(layers.flat_map(|layer| cached("present", layer, Cache::SelfAttention, &rows, &present)))
                    .chain(candidates)
                    .chain(attended)
                    .collect(),
            },
        }
    }
}

/// One graph of a model folder.
#[derive(Clone, Debug, PartialEq)]
pub struct GraphSpec {
    /// Its name in the manifest.
    pub name: &'static str,
    /// Its file.
    pub file: &'static str,
    /// Its inputs and outputs.
    pub ports: Ports,
}

/// The graphs of a model for `task`, in the order in which they are run.
pub fn graphs(
    facts: &Facts,
    dtype: DType,
    outputs: impl Into<DecoderOutputs>,
    cache: CacheLayout,
    task: &Task,
) -> Vec<GraphSpec> {
    let vision = facts.vision.as_ref().map(|_| {
        let ports = vision_encoder(facts, dtype);
        GraphSpec { name: "vision_encoder", file: VISION_ENCODER, ports }
    });
    if !task.is_generation() {
        let model = GraphSpec { name: "model", file: MODEL, ports: model(facts, dtype, task) };
        return [model].into_iter().chain(vision).collect();
    }
    let Interface { encoder, decoder, decoder_with_past } = Interface::of(facts, dtype, outputs, cache);
    let graphs = [
        GraphSpec { name: "encoder", file: ENCODER, ports: encoder },
        GraphSpec { name: "decoder", file: DECODER, ports: decoder },
        GraphSpec { name: "decoder_with_past", file: DECODER_WITH_PAST, ports: decoder_with_past },
    ];
    graphs.into_iter().chain(vision).collect()
}

/// The ports of the graph in [`VISION_ENCODER`].
///
/// # Panics
/// If the model reads no images.
pub(crate) fn vision_encoder(facts: &Facts, dtype: DType) -> Ports {
    let vision = facts.vision.as_ref().expect("a model that reads images");
    let (images, side) = (Dim::symbol(IMAGES), Dim::fixed(vision.image_size));
    Ports {
        inputs: vec![port(PIXEL_VALUES, DType::Float32, &[&images, &Dim::fixed(3), &side, &side])],
        outputs: image_features(facts, dtype).into_iter().collect(),
    }
}

/// The features of images, which may be none, in reading order: none if the model reads none.
fn image_features(facts: &Facts, dtype: DType) -> Option<Port> {
    let vision = facts.vision.as_ref()?;
    let (tokens, hidden) = (Dim::fixed(vision.tokens_per_image), Dim::fixed(facts.encoder.hidden_size));
    Some(port(IMAGE_FEATURES, dtype, &[&Dim::symbol(IMAGES), &tokens, &hidden]))
}

/// The last output of a graph with observed activations, float32 `[count]`: `max |x|` over the run for the operand of
/// each observed matrix.
pub fn activation_ranges(count: usize) -> Port {
    Port { name: ACTIVATION_RANGES.into(), dtype: DType::Float32, shape: vec![Dim::fixed(count)] }
}

/// The ports of the graph in [`REORDER`]: `parents` is the row that each row continues, `places` the token that goes to
/// each place of the present. The keys and values of sources have the same dimensions as those of targets, and can be
/// passed as well.
pub fn reorder(facts: &Facts, dtype: DType) -> Ports {
    let (parents, places) = (Dim::symbol(PARENTS), Dim::symbol(PRESENT_LENGTH));
    let step = Interface::of(facts, dtype, Logits::Last, CacheLayout::Growing).decoder_with_past;
    let is_past = |port: &Port| port.name.split('.').nth(2) == Some(Cache::SelfAttention.stack());
    let past: Vec<Port> = step.inputs.into_iter().filter(is_past).collect();
    let moved = past.iter().zip(&step.outputs[1..]).map(|(past, present)| Port {
        shape: vec![parents.clone(), past.shape[1].clone(), places.clone(), past.shape[3].clone()],
        ..present.clone()
    });
    let outputs = moved.collect();
    let indices = [port("parents", DType::Int64, &[&parents]), port("places", DType::Int64, &[&places])];
    Ports { inputs: indices.into_iter().chain(past).collect(), outputs }
}

/// The ports of the only graph of a model that does not generate.
pub(crate) fn model(facts: &Facts, dtype: DType, task: &Task) -> Ports {
    let features = match task {
        Task::FeatureExtraction(features) => *features,
        _ => Features::default(),
    };
    let batch = Dim::symbol(BATCH);
    let source = features.fixed_length.map_or_else(|| Dim::symbol(SOURCE_LENGTH), Dim::fixed);
    let hidden = Dim::fixed(facts.encoder.hidden_size);
    let labels = Dim::fixed(facts.classifier.as_ref().map_or(0, |classifier| classifier.labels.len()));
    let all = facts.encoder.num_hidden_layers;
    let output = match task {
        Task::FeatureExtraction(_) if features.pooling != Pooling::None => {
            port("sentence_embedding", DType::Float32, &[&batch, &hidden])
        }
        Task::FeatureExtraction(_) => {
            let layers = features.layers(all).filter(|&layers| layers < all);
            let name = layers.map_or("last_hidden_state".into(), |layers| format!("hidden_states.{layers}"));
            port(&name, features.output_dtype.unwrap_or(dtype), &[&batch, &source, &hidden])
        }
        Task::TokenClassification => port("logits", DType::Float32, &[&batch, &source, &labels]),
        Task::TextClassification | Task::Text2TextGeneration => port("logits", DType::Float32, &[&batch, &labels]),
    };
    let others = if features.output_hidden_states { 0..all } else { 0..0 };
    let others = others.map(|layers| Port { name: format!("hidden_states.{layers}"), ..output.clone() });
    Ports {
        inputs: source_inputs(facts, dtype, &batch, &source),
        outputs: std::iter::once(output.clone()).chain(others).collect(),
    }
}

/// What a graph that reads sources takes: ids or vectors, the mask, float positions if there are any, and the features
/// of images if it reads them.
fn source_inputs(facts: &Facts, dtype: DType, batch: &Dim, source: &Dim) -> Vec<Port> {
    let ids = match facts.custom.encoder_input {
        StackInput::InputIds => port("input_ids", DType::Int64, &[batch, source]),
        StackInput::InputsEmbeds => {
            port("inputs_embeds", dtype, &[batch, source, &Dim::fixed(facts.encoder.hidden_size)])
        }
    };
    let mask = port("attention_mask", DType::Int64, &[batch, source]);
    let positions = source_positions(facts, batch, source);
    [ids, mask].into_iter().chain(positions).chain(image_features(facts, dtype)).collect()
}

fn source_positions(facts: &Facts, batch: &Dim, source: &Dim) -> Option<Port> {
    let are_float = facts.custom.source_positions == Positions::Float;
    are_float.then(|| port(POSITION_IDS, DType::Float32, &[batch, source]))
}

fn port(name: &str, dtype: DType, shape: &[&Dim]) -> Port {
    Port { name: name.to_string(), dtype, shape: shape.iter().map(|&dim| dim.clone()).collect() }
}

/// Declares a graph's inputs.
pub(crate) fn all_inputs<'g>(graph: &'g Graph, ports: &Ports) -> Vec<Value<'g>> {
    ports.inputs.iter().map(|port| input(graph, port)).collect()
}

/// Declares one more input.
pub(crate) fn input<'g>(graph: &'g Graph, port: &Port) -> Value<'g> {
    graph.input(&port.name, port.dtype, &port.shape)
}

/// Declares the inputs of a graph with `N` of them.
pub(crate) fn inputs<'g, const N: usize>(graph: &'g Graph, ports: &Ports) -> [Value<'g>; N] {
    all_inputs(graph, ports).try_into().unwrap_or_else(|all: Vec<_>| panic!("{} inputs, not {N}", all.len()))
}

/// Declares a graph's outputs, which must have the dtypes and shapes of the ports, and [`activation_ranges`] behind
/// them if anything is observed.
pub(crate) fn outputs<'g>(graph: &'g Graph, ports: &Ports, values: impl Iterator<Item = Value<'g>>) {
    let observed: Vec<Value> = graph.observed().iter().map(|(_, value)| value.max_abs()).collect();
    let mut declared = ports.outputs.iter();
    for value in values {
        let port = declared.next().expect("no more outputs than ports");
        assert_eq!((value.dtype(), value.shape()), (port.dtype, port.shape.clone()), "{}", port.name);
        graph.output(&port.name, value);
    }
    assert!(declared.next().is_none(), "no fewer outputs than ports");
    if !observed.is_empty() {
        graph.output(ACTIVATION_RANGES, Value::concat(&observed, 0));
    }
}
