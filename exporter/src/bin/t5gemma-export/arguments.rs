//! The command line: subcommands and options with their help.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use t5gemma_exporter::{MemorySize, PRESETS, PaddingRow, ServingPlan, TensorRtVersion};
use t5gemma_graphs::Target;
use t5gemma_graphs::task::{Pooling, Task};

/// Export the T5Gemma checkpoint in the folder CHECKPOINT to ONNX graphs in the folder OUT
///
/// CHECKPOINT is a folder as Hugging Face saves or downloads it: config.json, safetensors files and the tokenizer; or a
/// single safetensors file (see --config and --tokenizer). OUT becomes a model folder: the graphs encoder_model.onnx, decoder_model.onnx (the first decoder step) and
/// decoder_with_past_model.onnx (all later steps) over one weights file, model.onnx_data, with the settings, the
/// tokenizer and manifest.json. `t5gemma` runs it, and with the default target any ONNX runtime does.
#[derive(Parser)]
#[command(
    name = "t5gemma-export",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    override_usage = USAGE,
    after_long_help = EXAMPLES
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub export: ExportArgs,
}

const USAGE: &str = "t5gemma-export [OPTIONS] CHECKPOINT OUT
       t5gemma-export [OPTIONS] --dummy-weights --preset SIZE OUT
       t5gemma-export <COMMAND>";

const EXAMPLES: &str = "\
Examples:
  Export for ONNX Runtime on a CPU, with 8-bit weights:
    t5gemma-export --target cpu --quantize int8 t5gemma-2b-2b-ul2-it model

  Export for an NVIDIA GPU in bfloat16, with the logits of the 16 best tokens:
    t5gemma-export --target cuda --candidates 16 t5gemma-2b-2b-ul2-it model

  Export for TensorRT, with profiles for the requests that will be served:
    t5gemma-export --target tensorrt --cache static=256 \\
      --plan batch=1..16,source=1..1024,target=256,beams=1..4 \\
      t5gemma-2b-2b-ul2-it model

  Export the encoder for sentence embeddings:
    t5gemma-export --task feature-extraction --pooling mean --normalize \\
      t5gemma-b-b-ul2 model

  Export the encoder as a text conditioner, for prompts padded to 256 tokens:
    t5gemma-export --task feature-extraction --fixed-length 256 \
      --pad-rows model.safetensors:conditioner.padding_embedding \
      t5gemma-b-b-ul2 model

  Measure a model size without its checkpoint:
    t5gemma-export --dummy-weights --preset 2b-2b model
    t5gemma bench model

Exit status:
  0    success
  1    failure; the reason is on stderr, and nothing is left behind
  2    invalid arguments, or arguments that do not suit the checkpoint
  130  interrupted or terminated; nothing is left behind";

#[derive(Subcommand)]
pub enum Command {
    /// Show what a model folder or checkpoint holds
    ///
    /// Prints the sizes of encoder and decoder, the number of parameters by part, and the element types of the tensors;
    /// for a model folder also target, serving plan, and the operators, inputs and outputs of each graph. No weights
    /// are read.
    #[command(after_long_help = "\
Examples:
  t5gemma-export inspect t5gemma-2b-2b-ul2-it
  t5gemma-export inspect --json model | jq .model.graphs[].operators")]
    Inspect {
        /// Model folder or checkpoint to inspect
        dir: PathBuf,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Check without TensorRT whether TensorRT accepts ONNX files
    ///
    /// Finds operators that TensorRT's ONNX parser does not import or would misread, types that it rejects, violated
    /// rules of single operators, empty or too large tensors, external weights that are missing, and optimization
    /// profiles that do not cover the inputs. Prints each finding with its graph and node; the exit status is 1 if
    /// there are any.
    #[command(after_long_help = "\
Examples:
  t5gemma-export check model
  t5gemma-export check --target tensorrt=11.1 model/encoder_model.onnx")]
    Check {
        /// ONNX file, or folder of ONNX files such as a model folder
        path: PathBuf,
        /// TensorRT version to check for: tensorrt, tensorrt=VERSION or tensorrt=rtx
        ///
        /// VERSION is 10.0 to 10.16, 11.0 or 11.1. `tensorrt` stands for 10.16, the last version that ONNX Runtime
        /// supports, and `tensorrt=rtx` for TensorRT for RTX.
        #[arg(long, value_name = "VERSION", default_value = "tensorrt")]
        target: TensorRtVersion,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Update manifest.json after text files of a model folder were edited, added or removed
    ///
    /// A model folder opens only if its files are those in manifest.json. This command records the current tokenizer
    /// files and chat templates. Graphs, weights, config.json and kept_tokens.json must be those of the export.
    /// generation_config.json can be edited without this command.
    #[command(after_long_help = "\
Examples:
  $EDITOR model/chat_template.jinja && t5gemma-export reseal model")]
    Reseal {
        /// Model folder to update
        dir: PathBuf,
    },
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// Shell to complete for
        shell: Shell,
    },
    /// Write man pages
    #[command(hide = true)]
    Man {
        /// Folder to write into
        dir: PathBuf,
    },
}

/// The same without subcommands: with them, clap would take OUT after an option for a subcommand.
#[derive(Parser)]
#[command(name = "t5gemma-export", version, override_usage = USAGE)]
pub struct ExportAlone {
    #[command(flatten)]
    pub export: ExportArgs,
}

#[derive(Args)]
pub struct ExportArgs {
    /// Checkpoint (omitted with --dummy-weights) and output folder
    // One argument: of two, clap would take the first for OUT as soon as an option follows it. Hidden and not required,
    // since clap would show it as `<CHECKPOINT> [OUT]...`; usage and description name both, and `export` checks their
    // number.
    #[arg(num_args = 1..=2, value_names = ["CHECKPOINT", "OUT"], hide = true)]
    pub folders: Vec<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub graphs: GraphArgs,
    #[command(flatten)]
    pub quantize: QuantizeArgs,
    #[command(flatten)]
    pub tensorrt: TensorRtArgs,
    #[command(flatten)]
    pub dummy: DummyArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Task of the exported model [default: the task that the checkpoint was saved for]
    ///
    /// feature-extraction exports the encoder alone, from any checkpoint. The other tasks need a checkpoint that was
    /// saved for them, as `architectures` in config.json says.
    #[arg(long, value_parser = PossibleValuesParser::new(Task::all().map(|task| task.name())))]
    pub task: Option<String>,
    /// Reduce the hidden states of each source to one vector (task feature-extraction) [default: none]
    #[arg(long, value_name = "METHOD", value_parser = PossibleValuesParser::new(poolings()))]
    pub pooling: Option<String>,
    /// Divide each vector by its Euclidean length (task feature-extraction)
    #[arg(long)]
    pub normalize: bool,
    /// Hidden states to return (task feature-extraction) [default: last]
    ///
    /// 0 is the embedding and N the output of layer N; negative numbers count from the end. `last` is the output of the
    /// final norm.
    #[arg(long, value_name = "N|last", allow_negative_numbers = true, value_parser = hidden_layer)]
    pub hidden_layer: Option<i64>,
    /// Give the sources a fixed length of N tokens, padding included (task feature-extraction)
    ///
    /// The graph has a static sequence axis. `t5gemma` and the libraries pad shorter sources and refuse longer ones.
    #[arg(long, value_name = "N")]
    pub fixed_length: Option<usize>,
    /// Hidden states at padding (task feature-extraction) [default: values without meaning]
    ///
    /// `zero` returns zeros, FILE:TENSOR the vector TENSOR of the safetensors file FILE, which has as many numbers as a
    /// hidden state. Sources may then be empty: all their states are those of padding.
    #[arg(long, value_name = "zero|FILE:TENSOR", value_parser = pad_rows)]
    pub pad_rows: Option<PadRows>,
    /// Type of the hidden states that the graph returns (task feature-extraction) [default: as --dtype]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub output_dtype: Option<OutputDTypeArg>,
    /// Also return the embedding and the hidden states of every layer (task feature-extraction)
    ///
    /// The outputs are hidden_states.0 (the embedding) to hidden_states.N-1 for N layers, before last_hidden_state.
    /// `t5gemma verify --against` compares them layer by layer.
    #[arg(long)]
    pub output_hidden_states: bool,
    /// config.json of the model [default: the one in CHECKPOINT]
    ///
    /// For a checkpoint that is a single safetensors file without a config.json beside it. generation_config.json is
    /// read from the same folder.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the tokenizer [default: CHECKPOINT, or the folder of the file]
    #[arg(long, value_name = "DIR", conflicts_with = "dummy_weights")]
    pub tokenizer: Option<PathBuf>,
    /// Write the SentencePiece model in the tensor spiece_model to tokenizer.model
    ///
    /// `t5gemma` reads tokenizer.json, other programs may read tokenizer.model.
    #[arg(long, conflicts_with = "dummy_weights")]
    pub write_sentencepiece: bool,
}

/// The hidden states at padding.
#[derive(Clone)]
pub enum PadRows {
    Zero,
    Learned(PaddingRow),
}

#[derive(Clone, Copy, ValueEnum)]
pub enum OutputDTypeArg {
    Float32,
    Float16,
}

#[derive(Args)]
#[command(next_help_heading = "Graphs")]
pub struct GraphArgs {
    /// Runtime to write the graphs for
    #[arg(long, default_value = "portable", value_parser = PossibleValuesParser::new(targets()))]
    pub target: String,
    /// Type of weights, activations and caches [default: float32; bfloat16 for cuda and tensorrt]
    ///
    /// Norms, soft-caps, softmax and logits are computed in float32 with every type, and with float16 the residual
    /// stream is too.
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    /// Return the logits of all target positions, not only of the last
    #[arg(long)]
    pub all_logits: bool,
    /// Also return the N best tokens of the last position with their logits
    ///
    /// The graphs also return the log-sum-exp of all logits, so that the logits themselves need not leave the GPU.
    #[arg(long, value_name = "N", conflicts_with = "all_logits")]
    pub candidates: Option<usize>,
    /// Restrict generation to the token ids in this JSON file; shrinks the output head, scores unchanged
    ///
    /// The file holds an array of ids, as `t5gemma shortlist` writes it. Other tokens have no logits.
    #[arg(long, value_name = "TOKENS.json")]
    pub keep_tokens: Option<PathBuf>,
    /// Also return how much each target token attends to each source token
    ///
    /// The output cross_attentions has probabilities, the mean over heads and layers. `t5gemma` needs it for the
    /// generation options output_attentions and coverage_penalty.
    #[arg(long)]
    pub alignment: bool,
    /// Decoder layers that --alignment averages, such as 0,3 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', requires = "alignment")]
    pub alignment_layers: Vec<usize>,
    /// Whether encoder positions exactly one window apart see each other
    ///
    /// This makes no difference for sources up to the window, 4096 tokens in Google's checkpoints.
    #[arg(long, value_name = "MODE", value_enum, default_value = "inclusive")]
    pub encoder_window: WindowArg,
}

#[derive(Args)]
#[command(next_help_heading = "Quantization")]
pub struct QuantizeArgs {
    /// Quantize the weight matrices
    ///
    /// Targets cpu and cuda keep activations in their type; so does tensorrt with int4. int8 and fp8 for tensorrt also
    /// compute in 8 bits, which requires activation ranges (--calibrate).
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "none")]
    pub quantize: FormatArg,
    /// Quantize the encoder's layers in another format [default: as --quantize]
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_encoder: Option<FormatArg>,
    /// Quantize the decoder's layers in another format [default: as --quantize]
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_decoder: Option<FormatArg>,
    /// Quantize the output head, and an embedding tied to it, in another format [default: as --quantize]
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_head: Option<FormatArg>,
    /// Number of weights that share a scale [default: 128 for int8, 32 for int4]
    #[arg(
        long,
        value_name = "N",
        value_parser = PossibleValuesParser::new(["16", "32", "64", "128"]).try_map(|size| size.parse::<usize>())
    )]
    pub block_size: Option<usize>,
    /// Give every block a zero point (targets cpu and cuda)
    #[arg(long)]
    pub asymmetric: bool,
    /// Do not quantize matrices with this checkpoint name; * matches any text; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub quantize_exclude: Vec<String>,
    /// Also output activation ranges, for `t5gemma calibrate` (target portable)
    #[arg(long)]
    pub observe: bool,
    /// Compute int8 and fp8 matrices in 8 bits, with these activation ranges (target tensorrt)
    ///
    /// `t5gemma calibrate` writes the file, by running a model that was exported with --observe. int8 matrices have a
    /// scale for each row, fp8 matrices a single one.
    #[arg(long, value_name = "RANGES.json", conflicts_with = "observe")]
    pub calibrate: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "TensorRT")]
pub struct TensorRtArgs {
    /// Give the decoder's cache a fixed capacity of N target tokens (target tensorrt)
    ///
    /// decoder_model.onnx then only computes the keys and values of the source, and decoder_with_past_model.onnx runs
    /// every step, so that one engine holds the only copy of the decoder's weights.
    #[arg(long, value_name = "static=N", value_parser = capacity)]
    pub cache: Option<usize>,
    /// Prepare the model for these request sizes (target tensorrt)
    ///
    /// PLAN lists sizes such as batch=1..16,source=1..1024,target=256,beams=1..4. `batch` is the number of sources in a
    /// batch, `source` the tokens of a source with padding, `target` the maximum tokens of a target, `beams` the target
    /// rows of a source, and `prompt` the tokens given to the first decoder step. Each is N, MIN..MAX or MIN..OPT..MAX;
    /// `target` is N. `source` is required, and `target` too if the model generates; the others are 1 if omitted.
    ///
    /// TensorRT selects kernels for OPT. Without it, OPT is MAX for batch and beams, and half of MAX, but at least MIN,
    /// for source and prompt.
    ///
    /// The model folder gets optimization profiles, options for ONNX Runtime's providers, the script build_engines.sh,
    /// wrappers for the engines, and memory.txt, an estimate of the GPU memory. `t5gemma` applies the plan with every
    /// provider: it pads requests to MIN, splits batches above MAX, and refuses longer sources and targets.
    #[arg(long, value_name = "PLAN")]
    pub plan: Option<ServingPlan>,
    /// Refuse a plan that takes more GPU memory than this, such as 24GB or 22.5GiB
    ///
    /// The estimate is the one in memory.txt.
    #[arg(long, value_name = "SIZE", requires = "plan")]
    pub fits: Option<MemorySize>,
}

#[derive(Args)]
#[command(next_help_heading = "Random weights")]
pub struct DummyArgs {
    /// Export random weights instead of a checkpoint, to measure a model size (with --preset or --config)
    #[arg(long)]
    pub dummy_weights: bool,
    /// Configuration of one of Google's checkpoints, with the size of the encoder first
    #[arg(
        long,
        value_name = "SIZE",
        requires = "dummy_weights",
        conflicts_with = "config",
        value_parser = PossibleValuesParser::new(PRESETS.iter().map(|(name, _)| *name))
    )]
    pub preset: Option<String>,
    /// Seed of the random weights
    #[arg(long, requires = "dummy_weights", default_value_t = 0)]
    pub seed: u64,
}

#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Replace OUT if it holds an exported model and nothing else
    #[arg(long)]
    pub overwrite: bool,
    /// Print errors and warnings only, neither progress nor notes
    #[arg(short, long)]
    pub quiet: bool,
}

/// A format of quantized weights.
#[derive(Clone, Copy, ValueEnum)]
pub enum FormatArg {
    /// unquantized
    None,
    /// 8-bit integers
    Int8,
    /// 4-bit integers
    Int4,
    /// 8-bit floats, float8e4m3fn (target tensorrt; requires a GPU of compute capability 8.9 or later: Ada, Hopper,
    /// Blackwell)
    Fp8,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DTypeArg {
    Float32,
    Float16,
    Bfloat16,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum WindowArg {
    /// they do, as in transformers 5.4 and later
    Inclusive,
    /// they do not, as in Google's code and earlier transformers
    Exclusive,
}

fn targets() -> [PossibleValue; 4] {
    Target::ALL.map(|target| {
        PossibleValue::new(target.name()).help(match target {
            Target::Portable => "any ONNX runtime",
            Target::Cpu => "ONNX Runtime on a CPU",
            Target::Cuda => "ONNX Runtime on an NVIDIA GPU, with its CUDA provider",
            Target::TensorRt => "TensorRT, alone or as a provider of ONNX Runtime",
        })
    })
}

fn poolings() -> [PossibleValue; 4] {
    Pooling::ALL.map(|pooling| {
        PossibleValue::new(pooling.name()).help(match pooling {
            Pooling::None => "return the hidden state of every token",
            Pooling::Mean => "mean over the tokens",
            Pooling::First => "state of the first token",
            Pooling::Last => "state of the last token",
        })
    })
}

fn capacity(text: &str) -> Result<usize, String> {
    let number = text.strip_prefix("static=").and_then(|number| number.parse().ok());
    number.ok_or_else(|| "expected static=N".to_string())
}

fn pad_rows(text: &str) -> Result<PadRows, String> {
    if text == "zero" {
        return Ok(PadRows::Zero);
    }
    match text.rsplit_once(':') {
        Some((file, tensor)) if !file.is_empty() && !tensor.is_empty() => {
            Ok(PadRows::Learned(PaddingRow { file: file.into(), tensor: tensor.into() }))
        }
        _ => Err("expected zero, or a safetensors file and the name of a tensor in it as FILE:TENSOR".to_string()),
    }
}

fn hidden_layer(text: &str) -> Result<i64, String> {
    if text == "last" { Ok(-1) } else { text.parse().map_err(|_| "expected an integer or last".to_string()) }
}
