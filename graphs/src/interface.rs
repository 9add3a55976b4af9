//! The contract between exporter and runtime: the name, dtype and symbolic shape of every input and output of the three
//! graphs, spelled once. Names and their order follow Optimum and transformers.js, so that other tools can run the files.

use serde::{Deserialize, Serialize};

pub use crate::onnx::{DType, Dim};

use crate::facts::Facts;
use crate::onnx::{Graph, Value};
use crate::task::{Pooling, Task};

/// File name of the graph from source tokens to hidden states.
pub const ENCODER: &str = "encoder_model.onnx";
/// File name of the graph of the first decoder step.
pub const DECODER: &str = "decoder_model.onnx";
/// File name of the graph of the cached decoder steps.
pub const DECODER_WITH_PAST: &str = "decoder_with_past_model.onnx";
/// File name of the only graph of a model that does not generate.
pub const MODEL: &str = "model.onnx";
/// File name of the graph that makes target rows the continuations of others.
pub const REORDER: &str = "reorder_model.onnx";
/// File name of the weights under all three graphs.
pub const WEIGHTS: &str = "model.onnx_data";

/// File name of the optimisation profiles of a serving plan.
pub const PROFILES_FILE: &str = "profiles.json";
/// File name of the options that a serving plan gives providers.
pub const PROVIDER_OPTIONS: &str = "provider_options.json";
/// The folder for engines that are built of the graphs.
pub const ENGINES: &str = "engines";

/// Source rows.
pub const BATCH: &str = "batch_size";
/// Target rows of one source row.
pub const BEAMS: &str = "num_beams";
/// Source tokens, padding included.
pub const SOURCE: &str = "encoder_sequence_length";
/// New target tokens.
pub const TARGET: &str = "decoder_sequence_length";
/// Target tokens whose keys and values are in the cache, or that it has room for.
pub const PAST: &str = "past_decoder_sequence_length";
/// Target rows after a change of rows.
pub const PARENTS: &str = "num_parents";
/// The greatest logits of [`Logits::Candidates`], greatest first.
pub const TOP_SCORES: &str = "top_scores";
/// Their tokens.
pub const TOP_IDS: &str = "top_ids";
/// The logarithm of the sum of the exponentials of all logits.
pub const LOG_SUM_EXP: &str = "log_sum_exp";
/// How much each target token given attends to each source token: the mean over heads and layers of [`Returned::alignment`].
pub const CROSS_ATTENTIONS: &str = "cross_attentions";

/// How large what each matrix is multiplied with becomes: see [`activation_ranges`].
pub const ACTIVATION_RANGES: &str = "activation_ranges";

/// Target tokens that a cache of fixed capacity has room for after a step: as many as before it, or as there are.
pub const PRESENT: &str = "present_decoder_sequence_length";

/// One input or output of a graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// The name that a session is fed and asked by.
    pub name: String,
    /// The element type.
    pub dtype: DType,
    /// The dimensions, symbolic where they vary from run to run.
    pub shape: Vec<Dim>,
}

/// The inputs and outputs of one graph, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ports {
    /// What a run is given.
    pub inputs: Vec<Port>,
    /// What a run returns.
    pub outputs: Vec<Port>,
}

/// The positions whose logits the decoder graphs return.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Logits {
    /// The last position only: all that generation needs, and a 256k-wide row each.
    #[default]
    Last,
    /// Every position given, for scoring.
    All,
    /// The last position only, with as many of its greatest, their tokens and the logarithm of the sum of all exponentials
    /// behind the other outputs: so a search needs not read the row where it lies in a GPU's memory.
    Candidates(usize),
}

/// What the decoder graphs return besides keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Returned {
    /// The positions whose logits.
    pub logits: Logits,
    /// How many tokens have logits, if not all of the vocabulary.
    pub kept_tokens: Option<usize>,
    /// Whether [`CROSS_ATTENTIONS`] of every position given, behind all other outputs.
    pub alignment: bool,
}

impl From<Logits> for Returned {
    fn from(logits: Logits) -> Returned {
        Returned { logits, ..Returned::default() }
    }
}

/// How the keys and values of the target pass from one cached step to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheLayout {
    /// The present is a new tensor, longer than the past by the step's tokens.
    #[default]
    Growing,
    /// The past has room for more tokens than there are, `cache_position` (int64, the positions of the step's tokens, of each
    /// row its own) tells where they go, and the present may be given the past's memory: the step then writes nothing but
    /// its own tokens. Rows of different lengths can share a step. Steps of several tokens are for single rows.
    InPlace,
    /// The past has room for this many tokens, `cache_position` (int64, the positions of the step's tokens) tells where they
    /// go, and the present is a new tensor of the same size. Every step is of one graph, the first too; before it the past
    /// is zeros.
    Static(usize),
}

/// The ports of the three graphs.
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
    /// Keys and values of the target so far, `[batch_size * num_beams, num_key_value_heads, target, head_dim]`.
    SelfAttention,
    /// Keys and values of the source, `[batch_size, num_key_value_heads, source, head_dim]`.
    CrossAttention,
}

impl Cache {
    /// The name of a layer's `key` or `value` among a graph's inputs (`past_key_values`) or outputs (`present`).
    pub fn port(self, prefix: &str, layer: usize, part: &str) -> String {
        let side = match self {
            Cache::SelfAttention => "decoder",
            Cache::CrossAttention => "encoder",
        };
        format!("{prefix}.{layer}.{side}.{part}")
    }
}

impl Interface {
    /// The interface of a model whose weights and activations are of `dtype`.
    pub fn of(facts: &Facts, dtype: DType, returned: impl Into<Returned>, cache: CacheLayout) -> Interface {
        let Returned { logits, kept_tokens, alignment } = returned.into();
        let fixed = Dim::fixed;
        let (batch, source) = (Dim::symbol(BATCH), Dim::symbol(SOURCE));
        let (target, past) = (Dim::symbol(TARGET), Dim::symbol(PAST));
        let rows = batch.times(&Dim::symbol(BEAMS));
        let port = |name: &str, dtype, shape: &[&Dim]| Port {
            name: name.to_string(),
            dtype,
            shape: shape.iter().map(|&dim| dim.clone()).collect(),
        };

        let hidden = |name| port(name, dtype, &[&batch, &source, &fixed(facts.encoder.hidden_size)]);
        let mask = |name| port(name, DType::Int64, &[&batch, &source]);
        let target_ids = || port("input_ids", DType::Int64, &[&rows, &target]);
        let (scored, candidates) = match logits {
            Logits::Last => (fixed(1), None),
            Logits::All => (target.clone(), None),
            Logits::Candidates(count) => (fixed(1), Some(count)),
        };
        let tokens = fixed(kept_tokens.unwrap_or(facts.decoder.vocab_size));
        let logits = || port("logits", DType::Float32, &[&rows, &scored, &tokens]);

        let (kv_heads, head_dim) = (fixed(facts.decoder.num_key_value_heads), fixed(facts.decoder.head_dim));
        let cached = |prefix: &str, layer, cache: Cache, rows: &Dim, length: &Dim| {
            ["key", "value"]
                .map(|part| port(&cache.port(prefix, layer, part), dtype, &[rows, &kv_heads, length, &head_dim]))
        };
        let layers = 0..facts.decoder.num_hidden_layers;
        let (past, present, position) = match cache {
            CacheLayout::Growing => (past.clone(), past.plus(&target), None),
            CacheLayout::InPlace => (past, Dim::symbol(PRESENT), Some(vec![&rows, &target])),
            CacheLayout::Static(capacity) => (fixed(capacity), fixed(capacity), Some(vec![&target])),
        };
        let candidates = match candidates {
            None => Vec::new(),
            Some(count) => vec![
                port(TOP_SCORES, DType::Float32, &[&rows, &fixed(count)]),
                port(TOP_IDS, DType::Int64, &[&rows, &fixed(count)]),
                port(LOG_SUM_EXP, DType::Float32, &[&rows, &fixed(1)]),
            ],
        };
        let attended = alignment.then(|| port(CROSS_ATTENTIONS, DType::Float32, &[&rows, &target, &source]));
        let first = match cache {
            CacheLayout::Static(_) => Ports {
                inputs: vec![hidden("encoder_hidden_states")],
                outputs: (layers.clone())
                    .flat_map(|layer| cached("present", layer, Cache::CrossAttention, &batch, &source))
                    .collect(),
            },
            _ => Ports {
                inputs: vec![mask("encoder_attention_mask"), target_ids(), hidden("encoder_hidden_states")],
                outputs: [logits()]
                    .into_iter()
                    .chain(layers.clone().flat_map(|layer| {
                        let own = cached("present", layer, Cache::SelfAttention, &rows, &target);
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
                inputs: vec![port("input_ids", DType::Int64, &[&batch, &source]), mask("attention_mask")],
                outputs: vec![hidden("last_hidden_state")],
            },
            decoder: first,
            decoder_with_past: Ports {
                inputs: [mask("encoder_attention_mask"), target_ids()]
                    .into_iter()
                    .chain(position.map(|shape| port("cache_position", DType::Int64, &shape)))
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
pub struct Part {
    /// Its name in the manifest.
    pub name: &'static str,
    /// Its file.
    pub file: &'static str,
    /// Its inputs and outputs.
    pub ports: Ports,
}

/// The graphs of a model for `task`, in the order in which they are run.
pub fn parts(facts: &Facts, dtype: DType, returned: impl Into<Returned>, cache: CacheLayout, task: &Task) -> Vec<Part> {
    if !task.is_generation() {
        return vec![Part { name: "model", file: MODEL, ports: model(facts, dtype, task) }];
    }
    let Interface { encoder, decoder, decoder_with_past } = Interface::of(facts, dtype, returned, cache);
    vec![
        Part { name: "encoder", file: ENCODER, ports: encoder },
        Part { name: "decoder", file: DECODER, ports: decoder },
        Part { name: "decoder_with_past", file: DECODER_WITH_PAST, ports: decoder_with_past },
    ]
}

/// The last output of a graph whose activations are observed: the greatest absolute number of what each of `count` matrices is
/// multiplied with in a run.
pub fn activation_ranges(count: usize) -> Port {
    Port { name: ACTIVATION_RANGES.into(), dtype: DType::Float32, shape: vec![Dim::fixed(count)] }
}

/// The ports of the graph in [`REORDER`]: which row each row is to continue, which target token is to stand at each place,
/// and what there is. The keys and values of sources have the dimensions that those of targets have, and can be given in
/// their place.
pub fn reorder(facts: &Facts, dtype: DType) -> Ports {
    let (parents, places) = (Dim::symbol(PARENTS), Dim::symbol(PRESENT));
    let indices = |name: &str, dim: &Dim| Port { name: name.into(), dtype: DType::Int64, shape: vec![dim.clone()] };
    let step = Interface::of(facts, dtype, Logits::Last, CacheLayout::Growing).decoder_with_past;
    let own = Cache::SelfAttention.port("", 0, "");
    let side = own.split('.').nth(2).expect("a prefix, a layer, a side, a part");
    let past = step.inputs.into_iter().filter(|port| port.name.split('.').nth(2) == Some(side)).collect::<Vec<_>>();
    let outputs = past.iter().zip(&step.outputs[1..]).map(|(past, present)| Port {
        shape: vec![parents.clone(), past.shape[1].clone(), places.clone(), past.shape[3].clone()],
        ..present.clone()
    });
    let outputs = outputs.collect();
    let inputs = [indices("parents", &parents), indices("places", &places)].into_iter().chain(past).collect();
    Ports { inputs, outputs }
}

/// The ports of the only graph of a model that does not generate.
pub(crate) fn model(facts: &Facts, dtype: DType, task: &Task) -> Ports {
    let (batch, source) = (Dim::symbol(BATCH), Dim::symbol(SOURCE));
    let port = |name: &str, dtype, shape: &[&Dim]| Port {
        name: name.to_string(),
        dtype,
        shape: shape.iter().map(|&dim| dim.clone()).collect(),
    };
    let hidden = Dim::fixed(facts.encoder.hidden_size);
    let labels = Dim::fixed(facts.classifier.as_ref().map_or(0, |classifier| classifier.labels.len()));
    let all = facts.encoder.num_hidden_layers;
    let output = match task {
        Task::FeatureExtraction(features) if features.pooling != Pooling::None => {
            port("sentence_embedding", DType::Float32, &[&batch, &hidden])
        }
        Task::FeatureExtraction(features) => {
            let layers = features.layers(all).filter(|&layers| layers < all);
            let name = layers.map_or("last_hidden_state".into(), |layers| format!("hidden_states.{layers}"));
            port(&name, dtype, &[&batch, &source, &hidden])
        }
        Task::TokenClassification => port("logits", DType::Float32, &[&batch, &source, &labels]),
        Task::TextClassification | Task::Text2TextGeneration => port("logits", DType::Float32, &[&batch, &labels]),
    };
    Ports {
        inputs: ["input_ids", "attention_mask"].map(|name| port(name, DType::Int64, &[&batch, &source])).to_vec(),
        outputs: vec![output],
    }
}

/// Declares a graph's inputs.
pub(crate) fn all_inputs<'g>(graph: &'g Graph, ports: &Ports) -> Vec<Value<'g>> {
    ports.inputs.iter().map(|port| graph.input(&port.name, port.dtype, &port.shape)).collect()
}

/// Declares the inputs of a graph that has `N`.
pub(crate) fn inputs<'g, const N: usize>(graph: &'g Graph, ports: &Ports) -> [Value<'g>; N] {
    all_inputs(graph, ports).try_into().unwrap_or_else(|all: Vec<_>| panic!("{} inputs, not {N}", all.len()))
}

/// Declares a graph's outputs, which must be of the declared types, and behind them how large what is observed becomes.
pub(crate) fn outputs<'g>(graph: &'g Graph, ports: &Ports, values: impl Iterator<Item = Value<'g>>) {
    let observed: Vec<Value> = graph.observed().iter().map(|(_, value)| value.greatest_absolute()).collect();
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
