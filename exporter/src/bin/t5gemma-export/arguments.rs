//! The command line: subcommands and options with their help.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use t5gemma_exporter::{MemorySize, PRESETS, PaddingRow, ServingPlan, TensorRtVersion};
use t5gemma_graphs::task::Task;

use crate::adapt::AdaptArgs;
use crate::custom::CustomArgs;
use crate::values::{adapter, capacity, hidden_layer, pad_rows, poolings, targets};

/// Export a T5Gemma checkpoint to ONNX
///
/// CHECKPOINT is a Hugging Face checkpoint folder (config.json, safetensors files and the tokenizer), a single
/// safetensors file (see --config and --tokenizer), or a repository on the Hugging Face hub as ORG/NAME,
/// ORG/NAME@REVISION or hf://ORG/NAME, whose files are downloaded into the hub's cache. OUT becomes a model folder: the graphs encoder_model.onnx,
/// decoder_model.onnx (first decoder step) and decoder_with_past_model.onnx (all later steps), which share the weights
/// file model.onnx_data, plus the configuration, the tokenizer and manifest.json. `t5gemma` runs it; with the default
/// target, so does any other ONNX runtime.
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
  Export a checkpoint of the Hugging Face hub, after accepting its licence there:
    HF_TOKEN=hf_... t5gemma-export google/t5gemma-2b-2b-ul2-it model

  Export a folder for ONNX Runtime on a CPU, with 8-bit weights:
    t5gemma-export --target cpu --quantize int8 t5gemma-2b-2b-ul2-it model

  Export for an NVIDIA GPU in bfloat16, with the logits of the 16 best tokens:
    t5gemma-export --target cuda --candidates 16 t5gemma-2b-2b-ul2-it model

  Export for TensorRT, with profiles for the expected request sizes:
    t5gemma-export --target tensorrt --cache static=256 \\
      --plan batch=1..16,source=1..1024,target=256,beams=1..4 \\
      t5gemma-2b-2b-ul2-it model

  Export the encoder for sentence embeddings:
    t5gemma-export --task feature-extraction --pooling mean --normalize \\
      t5gemma-b-b-ul2 model

  Export the encoder as a text conditioner, for prompts padded to 256 tokens:
    t5gemma-export --task feature-extraction --fixed-length 256 \\
      --pad-rows model.safetensors:conditioner.padding_embedding \\
      t5gemma-b-b-ul2 model

  Export T5Gemma-TTS, whose config.json says how it differs from T5Gemma:
    t5gemma-export --target cpu T5Gemma-TTS-2b-2b model

  Merge a LoRA adapter into the model:
    t5gemma-export --adapter my-lora t5gemma-2b-2b-ul2 model

  Benchmark a model size without its checkpoint:
    t5gemma-export --dummy-weights --preset 2b-2b model
    t5gemma bench model

Environment variables, as huggingface_hub reads them:
  HF_TOKEN, HF_TOKEN_PATH     token for gated and private repositories, or a file with it
                              [default: HF_HOME/token, which `hf auth login` writes]
  HF_HOME, HF_HUB_CACHE       folder of the cache [default: ~/.cache/huggingface, and hub in it]
  HF_HUB_OFFLINE=1            use the cache only
  HF_ENDPOINT                 another server [default: https://huggingface.co]
  HF_HUB_DOWNLOAD_TIMEOUT     seconds to wait for data [default: 10]
  HTTPS_PROXY, NO_PROXY       proxy
  SSL_CERT_FILE               certificates to trust instead of Mozilla's

Exit status:
  0    success
  1    failure; the reason is on stderr, and no output is left behind
  2    invalid arguments, or arguments that the checkpoint does not allow
  130  interrupted or terminated; no output is left behind";

#[derive(Subcommand)]
pub enum Command {
    /// Make a T5Gemma checkpoint from Gemma checkpoints, to be trained
    ///
    /// The first checkpoint becomes the encoder, with bidirectional attention, the second the decoder, with
    /// cross-attention added to every layer. Gemma 2 becomes T5Gemma, Gemma 3 becomes T5Gemma 2. OUT becomes a
    /// checkpoint folder that transformers loads. It is where training starts: until then it does not answer questions.
    #[command(after_long_help = "\
Examples:
  t5gemma-export adapt gemma-2-2b gemma-2-2b t5gemma-2b-2b
  t5gemma-export adapt --seed 1 gemma-2-9b gemma-2-2b t5gemma-9b-2b
  t5gemma-export adapt gemma-3-4b-pt gemma-3-4b-pt t5gemma-2-4b-4b")]
    Adapt(AdaptArgs),
    /// Show the contents of a model folder or checkpoint
    ///
    /// Prints the dimensions of encoder and decoder, parameter counts by component, and the tensors' dtypes; for a
    /// model folder, also the target, the serving plan, and each graph's operators, inputs and outputs. Reads no
    /// weights.
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
    /// Check whether TensorRT will accept ONNX files; TensorRT itself is not needed
    ///
    /// Reports operators that TensorRT's ONNX parser cannot import or would misinterpret, unsupported types, violated
    /// restrictions of individual operators, empty or oversized tensors, missing external weights, and optimization
    /// profiles that do not cover the inputs. Prints each finding with its graph and node; the exit status is 1 if
    /// there are any.
    #[command(after_long_help = "\
Examples:
  t5gemma-export check model
  t5gemma-export check --target tensorrt=11.1 model/encoder_model.onnx")]
    Check {
        /// ONNX file, or a folder of them such as a model folder
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
    /// Update manifest.json after editing, adding or removing text files in a model folder
    ///
    /// A model folder opens only if its files match manifest.json. This command records the current tokenizer files and
    /// chat templates. Graphs, weights, config.json and kept_tokens.json must be unchanged since the export.
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

/// [`Cli`] without subcommands: with them, clap would parse OUT after an option as a subcommand.
#[derive(Parser)]
#[command(name = "t5gemma-export", version, override_usage = USAGE)]
pub struct ExportAlone {
    #[command(flatten)]
    pub export: ExportArgs,
}

#[derive(Args)]
pub struct ExportArgs {
    /// Checkpoint (omitted with --dummy-weights) and output folder
    // One argument: if there were two, clap would take the first for OUT as soon as an option follows it. Hidden and
    // not required, since clap would show it as `<CHECKPOINT> [OUT]...`; usage and description name both, and `export`
    // checks how many there are.
    #[arg(num_args = 1..=2, value_names = ["CHECKPOINT", "OUT"], hide = true)]
    pub folders: Vec<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub graphs: GraphArgs,
    #[command(flatten)]
    pub custom: CustomArgs,
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
    /// Task of the exported model [default: the checkpoint's task]
    ///
    /// feature-extraction exports only the encoder, from any checkpoint. Every other task requires a checkpoint that
    /// was saved for it, according to `architectures` in config.json.
    #[arg(long, value_parser = PossibleValuesParser::new(Task::all().map(|task| task.name())))]
    pub task: Option<String>,
    /// Pool the hidden states of each source into one vector (task feature-extraction) [default: none]
    #[arg(long, value_name = "METHOD", value_parser = PossibleValuesParser::new(poolings()))]
    pub pooling: Option<String>,
    /// L2-normalize each vector (task feature-extraction)
    #[arg(long)]
    pub normalize: bool,
    /// Hidden states to return (task feature-extraction) [default: last]
    ///
    /// 0 is the embedding output and N the output of layer N; negative numbers count from the end. `last` is the output
    /// of the final norm.
    #[arg(long, value_name = "N|last", allow_negative_numbers = true, value_parser = hidden_layer)]
    pub hidden_layer: Option<i64>,
    /// Fix the source length at N tokens, padding included (task feature-extraction)
    ///
    /// The graph has a static sequence axis. `t5gemma` and the libraries pad shorter sources and reject longer ones.
    #[arg(long, value_name = "N")]
    pub fixed_length: Option<usize>,
    /// Hidden states at padding positions (task feature-extraction) [default: unspecified]
    ///
    /// `zero` returns zeros; FILE:TENSOR returns the vector TENSOR, of the hidden size, from the safetensors file FILE.
    /// Sources may then be empty: they consist of padding only.
    #[arg(long, value_name = "zero|FILE:TENSOR", value_parser = pad_rows)]
    pub pad_rows: Option<PadRows>,
    /// Data type of the returned hidden states (task feature-extraction) [default: same as --dtype]
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
    /// For a checkpoint that is a single safetensors file without a config.json next to it. generation_config.json is
    /// read from the same folder.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the tokenizer [default: CHECKPOINT, or the folder of the file]
    #[arg(long, value_name = "DIR", conflicts_with = "dummy_weights")]
    pub tokenizer: Option<PathBuf>,
    /// Merge the PEFT LoRA adapter in DIR into the weights; may be repeated
    ///
    /// DIR has adapter_config.json and adapter_model.safetensors; it may be a repository on the hub, as CHECKPOINT may. SCALE multiplies the adapter's own scale. Several adapters are
    /// merged in the order given. Weights are merged in float32 while they are written, and quantized afterwards.
    #[arg(long, value_name = "DIR[=SCALE]", value_parser = adapter, conflicts_with = "dummy_weights")]
    pub adapter: Vec<AdapterArg>,
    /// Write graphs that take LoRA adapters of up to this rank at run time (targets portable, cpu and cuda)
    ///
    /// Adapters are loaded and unloaded while the model runs, and each request chooses one (`t5gemma generate --adapter
    /// NAME=DIR`). Requests without an adapter run the same graphs as without this option. DoRA, biases, embeddings and
    /// tensors that are replaced as a whole can only be merged, with --adapter.
    #[arg(long, value_name = "RANK")]
    pub lora_inputs: Option<usize>,
    /// Leave out the part that reads images (T5Gemma 2)
    ///
    /// The model then takes text only. Without this option, the folder has it if the checkpoint does, as a graph of its
    /// own, which is opened when the first image comes.
    #[arg(long)]
    pub no_vision: bool,
    /// Write the SentencePiece model in the tensor spiece_model to tokenizer.model
    ///
    /// `t5gemma` reads tokenizer.json, other programs may read tokenizer.model.
    #[arg(long, conflicts_with = "dummy_weights")]
    pub write_sentencepiece: bool,
}

/// An adapter to merge.
#[derive(Clone)]
pub struct AdapterArg {
    pub folder: PathBuf,
    pub scale: f32,
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
    /// Runtime that the graphs are for
    #[arg(long, default_value = "portable", value_parser = PossibleValuesParser::new(targets()))]
    pub target: String,
    /// Data type of weights, activations and KV caches [default: float32; bfloat16 for cuda and tensorrt]
    ///
    /// Norms, soft-capping, softmax and logits are always computed in float32; with float16, so is the residual stream.
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    /// Return the logits of all target positions, not only of the last one
    #[arg(long)]
    pub all_logits: bool,
    /// Also return the top N tokens of the last position with their logits
    ///
    /// The graphs also return the log-sum-exp of all logits, so that the logits themselves can stay on the GPU.
    #[arg(long, value_name = "N", conflicts_with = "all_logits")]
    pub candidates: Option<usize>,
    /// Shrink the output head to the token ids in this JSON file; their logits do not change
    ///
    /// The file is an array of ids, such as `t5gemma shortlist` writes. Other tokens cannot be generated.
    #[arg(long, value_name = "TOKENS.json")]
    pub keep_tokens: Option<PathBuf>,
    /// Also return the attention of each target token to each source token
    ///
    /// The output cross_attentions holds attention probabilities, averaged over heads and layers. The generation
    /// options output_attentions and coverage_penalty of `t5gemma` require it.
    #[arg(long)]
    pub alignment: bool,
    /// Decoder layers that --alignment averages over, such as 0,3 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', requires = "alignment")]
    pub alignment_layers: Vec<usize>,
    /// Whether encoder positions exactly one sliding window apart attend to each other
    ///
    /// Only matters for T5Gemma, and for sources longer than the window, which is 4096 tokens in Google's checkpoints.
    #[arg(long, value_name = "MODE", value_enum, default_value = "inclusive")]
    pub encoder_window: WindowArg,
}

#[derive(Args)]
#[command(next_help_heading = "Quantization")]
pub struct QuantizeArgs {
    /// Quantize the weight matrices
    ///
    /// With targets cpu and cuda, and with int4 for tensorrt, only weights are quantized. int8 and fp8 for tensorrt
    /// quantize activations too, which requires their ranges (--calibrate).
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "none")]
    pub quantize: FormatArg,
    /// Format of the encoder's layers [default: same as --quantize]
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_encoder: Option<FormatArg>,
    /// Format of the decoder's layers [default: same as --quantize]
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_decoder: Option<FormatArg>,
    /// Format of the output head, and of an embedding tied to it [default: same as --quantize]
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_head: Option<FormatArg>,
    /// Format of the vision tower's layers [default: none]
    ///
    /// Not set by --quantize, since the tower runs once for an image. T5Gemma 2 with images and targets cpu and cuda only.
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub quantize_vision: Option<FormatArg>,
    /// Number of weights that share a scale [default: 128 for int8, 32 for int4]
    #[arg(
        long,
        value_name = "N",
        value_parser = PossibleValuesParser::new(["16", "32", "64", "128"]).try_map(|size| size.parse::<usize>())
    )]
    pub block_size: Option<usize>,
    /// Quantize asymmetrically, with a zero point per block (targets cpu and cuda)
    #[arg(long)]
    pub asymmetric: bool,
    /// Do not quantize matrices whose checkpoint name matches PATTERN; * matches any text; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub quantize_exclude: Vec<String>,
    /// Also output activation ranges, for `t5gemma calibrate` (target portable)
    #[arg(long)]
    pub observe: bool,
    /// Quantize the activations of int8 and fp8 matrices with these ranges (target tensorrt)
    ///
    /// `t5gemma calibrate` writes the file by running a model exported with --observe. int8 matrices have a scale per
    /// row, fp8 matrices a single one.
    #[arg(long, value_name = "RANGES.json", conflicts_with = "observe")]
    pub calibrate: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "TensorRT")]
pub struct TensorRtArgs {
    /// Give the decoder's KV cache a fixed capacity of N target tokens (target tensorrt)
    ///
    /// decoder_model.onnx then computes only the keys and values of the source, and decoder_with_past_model.onnx runs
    /// every step, so only one engine holds the decoder's weights.
    #[arg(long, value_name = "static=N", value_parser = capacity)]
    pub cache: Option<usize>,
    /// Prepare the model for these request sizes (target tensorrt)
    ///
    /// PLAN lists sizes such as batch=1..16,source=1..1024,target=256,beams=1..4. `batch` is the number of sources per
    /// batch, `source` the padded length of a source, `target` the maximum length of a target with its prompt (N + 1 for
    /// N new tokens after the start token), `beams` the number of target rows per source, and `prompt` the number of
    /// tokens in the first decoder step. Each is N, MIN..MAX or MIN..OPT..MAX; `target` is N. `source` is required, and
    /// for generation `target` too; the others default to 1.
    ///
    /// TensorRT selects its kernels for OPT, which defaults to MAX for batch and beams, and to half of MAX, but at
    /// least MIN, for source and prompt.
    ///
    /// Adds to the model folder: optimization profiles, options for ONNX Runtime's providers, the script
    /// build_engines.sh, wrapper graphs for the engines, and memory.txt, an estimate of the GPU memory. `t5gemma`
    /// applies the plan with every provider: it pads batches and sources to MIN, splits batches above MAX, and rejects
    /// longer sources, longer targets, more beams, and prompts outside their range.
    #[arg(long, value_name = "PLAN")]
    pub plan: Option<ServingPlan>,
    /// Fail if the plan needs more GPU memory than this, such as 24GB or 22.5GiB
    ///
    /// Compares with the estimate in memory.txt.
    #[arg(long, value_name = "SIZE", requires = "plan")]
    pub fits: Option<MemorySize>,
}

#[derive(Args)]
#[command(next_help_heading = "Random weights")]
pub struct DummyArgs {
    /// Export random weights instead of a checkpoint, to benchmark a model size (with --preset or --config)
    #[arg(long)]
    pub dummy_weights: bool,
    /// Google checkpoint whose configuration to use, as ENCODER-DECODER sizes
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
    /// Add a model card, .gitattributes and NOTICE, to upload OUT to the Hugging Face hub
    ///
    /// README.md describes the model and how to run it. Its metadata has the licence (gemma), the task, and the base
    /// model if CHECKPOINT is from the hub or config.json names one. NOTICE is the text that Gemma's terms require with
    /// every copy. The three files may be edited or removed; `t5gemma` does not read them.
    #[arg(long)]
    pub push_layout: bool,
    /// Add OUT to a model repository of Triton Inference Server, for the backend t5gemma
    ///
    /// DIR gets the models NAME, which answers a request at once, and NAME_stream, which answers token by token, where
    /// NAME is the name of OUT. Their configurations name OUT by its path from there, so that both can be moved
    /// together. OUT may also lie in DIR as DIR/NAME/1. Models of other tasks have no NAME_stream.
    #[arg(long, value_name = "DIR")]
    pub triton_repository: Option<PathBuf>,
    /// The backend that the models of --triton-repository are for
    #[arg(long, value_name = "NAME", value_enum, default_value_t, requires = "triton_repository")]
    pub triton_backend: TritonBackendArg,
    /// Print only errors and warnings, no progress or notes
    #[arg(short, long)]
    pub quiet: bool,
}

/// A backend of Triton Inference Server.
#[derive(Clone, Copy, Default, ValueEnum)]
pub enum TritonBackendArg {
    /// this project's, with every option and continuous batching
    #[default]
    T5gemma,
    /// Triton's own onnxruntime for the graphs and python for a greedy loop, which is slower (target portable)
    Onnxruntime,
    /// the same with Triton's tensorrt, for plans that build_engines.sh builds of OUT later (target tensorrt with --plan)
    Tensorrt,
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
