//! Runs an export from the command-line arguments: reads the files that they name, shows progress, prints notes and
//! warnings.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, anyhow, bail};
use t5gemma_exporter::{Alignment, Checkpoint, Existing, Export, Exported, ServingPlan, Source, TritonBackend, preset};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::json::{self, cut};
use t5gemma_graphs::manifest::{ActivationRanges, EncoderWindow};
use t5gemma_graphs::onnx::{Blocks, Code};
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_graphs::task::{Features, PaddingRows, Pooling, Task};

use crate::arguments::{
    DTypeArg, ExportArgs, FormatArg, GraphArgs, ModelArgs, OutputDTypeArg, PadRows, QuantizeArgs, TritonBackendArg,
    WindowArg,
};
use crate::flags::Usage;
use crate::progress::Bar;
use crate::stderr::note;

/// Maximum number of unused tensors to list.
const MAX_UNUSED: usize = 10;

/// Exports as the arguments say.
pub fn export(args: ExportArgs, interrupted: &AtomicBool) -> Result<()> {
    let (checkpoint, out) = match &args.folders[..] {
        [out] => (None, out),
        [checkpoint, out] => (Some(checkpoint), out),
        _ => bail!(Usage("expected CHECKPOINT and OUT, found no folder; see --help".to_string())),
    };
    let export = options(&args)?;
    let progress = if args.output.quiet { Bar::quiet(interrupted) } else { Bar::new(interrupted) };
    let source = source(&args, checkpoint, export.task.as_ref(), &progress)?;
    let exported = export.run_with(&source, out, &progress)?;
    progress.finish();
    for warning in &exported.warnings {
        note!("t5gemma-export: warning: {warning}");
    }
    if !args.output.quiet {
        print_summary(&exported, export.plan.as_ref(), out);
        if let Some(folder) = &args.output.triton_repository {
            note!("added it to {}", folder.display());
        }
    }
    Ok(())
}

fn print_summary(exported: &Exported, plan: Option<&ServingPlan>, out: &Path) {
    if !exported.unused.is_empty() {
        match exported.unused.len() {
            1 => note!("t5gemma-export: 1 tensor of the checkpoint is not used:"),
            count => note!("t5gemma-export: {count} tensors of the checkpoint are not used:"),
        }
        exported.unused.iter().take(MAX_UNUSED).for_each(|name| note!("  {}", cut(name)));
        if exported.unused.len() > MAX_UNUSED {
            note!("  and {} more", exported.unused.len() - MAX_UNUSED);
        }
    }
    for note in &exported.notes {
        note!("t5gemma-export: {note}");
    }
    let (parameters, weights) = (exported.manifest.parameters, &exported.manifest.weights.record);
    note!("wrote {}: {parameters} parameters, {} bytes of weights", out.display(), weights.bytes);
    if let Some(plan) = plan {
        let omitted = match &plan.omitted()[..] {
            [] => String::new(),
            names => format!(" ({} omitted, 1 by default)", names.join(", ")),
        };
        note!("planned for {plan}{omitted}");
    }
}

fn options(args: &ExportArgs) -> Result<Export> {
    let graphs = &args.graphs;
    let target = Target::ALL.into_iter().find(|target| target.name() == graphs.target).context("unknown target")?;
    let dtype = match graphs.dtype {
        None => target.capabilities().default_dtype,
        Some(dtype) => dtype.into(),
    };
    let encoder_window = match graphs.encoder_window {
        WindowArg::Inclusive => EncoderWindow::Inclusive,
        WindowArg::Exclusive => EncoderWindow::Exclusive,
    };
    let padding_row = match &args.model.pad_rows {
        Some(PadRows::Learned(row)) => Some(row.clone()),
        _ => None,
    };
    Ok(Export::default()
        .task(task(&args.model)?)
        .target(target)
        .dtype(dtype)
        .logits(logits(graphs))
        .kept_tokens(graphs.keep_tokens.as_deref().map(kept_tokens).transpose()?)
        .alignment(alignment(graphs))
        .capacity(args.tensorrt.cache)
        .padding_row(padding_row)
        .custom(args.custom.options())
        .write_sentencepiece(args.model.write_sentencepiece)
        .lora_inputs(args.model.lora_inputs)
        .model_card(args.output.push_layout)
        .triton_repository(args.output.triton_repository.clone())
        .triton_backend(args.output.triton_backend)
        .plan(args.tensorrt.plan.clone())
        .memory_limit(args.tensorrt.fits)
        .encoder_window(encoder_window)
        .vision(!args.model.no_vision)
        .quantization(quantization(&args.quantize)?)
        .activations(activations(&args.quantize)?)
        .existing(if args.output.overwrite { Existing::Overwrite } else { Existing::Refuse }))
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> DType {
        match dtype {
            DTypeArg::Float32 => DType::Float32,
            DTypeArg::Float16 => DType::Float16,
            DTypeArg::Bfloat16 => DType::BFloat16,
        }
    }
}

impl From<TritonBackendArg> for TritonBackend {
    fn from(backend: TritonBackendArg) -> TritonBackend {
        match backend {
            TritonBackendArg::T5gemma => TritonBackend::T5Gemma,
            TritonBackendArg::Onnxruntime => TritonBackend::OnnxRuntime,
            TritonBackendArg::Tensorrt => TritonBackend::TensorRt,
        }
    }
}

fn logits(args: &GraphArgs) -> Logits {
    match args.candidates {
        Some(count) => Logits::Candidates(count),
        None if args.all_logits => Logits::All,
        None => Logits::Last,
    }
}

fn alignment(args: &GraphArgs) -> Alignment {
    match &args.alignment_layers[..] {
        _ if !args.alignment => Alignment::None,
        [] => Alignment::AllLayers,
        layers => Alignment::Layers(layers.to_vec()),
    }
}

/// Reads a file of token ids and returns them in ascending order.
fn kept_tokens(path: &Path) -> Result<Vec<usize>> {
    let place = format!("--keep-tokens {}", path.display());
    let text = fs::read_to_string(path).with_context(|| format!("{place}: cannot be read"))?;
    let tokens: Result<BTreeSet<usize>, _> = serde_json::from_str(json::without_mark(&text));
    let tokens = tokens.map_err(|error| {
        anyhow!("{place}: expected a JSON array of token ids, found {}", json::malformed(&text, &error))
    })?;
    Ok(tokens.into_iter().collect())
}

fn task(args: &ModelArgs) -> Result<Option<Task>> {
    let pooling = args.pooling.as_deref().and_then(|name| Pooling::ALL.into_iter().find(|known| known.name() == name));
    let task = args.task.as_deref().and_then(|name| Task::all().into_iter().find(|known| known.name() == name));
    if let Some(Task::FeatureExtraction(defaults)) = task {
        return Ok(Some(Task::FeatureExtraction(Features {
            pooling: pooling.unwrap_or(defaults.pooling),
            normalize: args.normalize,
            hidden_layer: args.hidden_layer.unwrap_or(defaults.hidden_layer),
            fixed_length: args.fixed_length,
            padding_rows: match args.pad_rows {
                None => PaddingRows::Unspecified,
                Some(PadRows::Zero) => PaddingRows::Zero,
                Some(PadRows::Learned(_)) => PaddingRows::Learned,
            },
            output_dtype: args.output_dtype.map(|dtype| match dtype {
                OutputDTypeArg::Float32 => DType::Float32,
                OutputDTypeArg::Float16 => DType::Float16,
            }),
            output_hidden_states: args.output_hidden_states,
        })));
    }
    let given = [
        ("--pooling", pooling.is_some()),
        ("--normalize", args.normalize),
        ("--hidden-layer", args.hidden_layer.is_some()),
        ("--fixed-length", args.fixed_length.is_some()),
        ("--pad-rows", args.pad_rows.is_some()),
        ("--output-dtype", args.output_dtype.is_some()),
        ("--output-hidden-states", args.output_hidden_states),
    ];
    if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
        bail!(Usage(format!("{flag} requires --task feature-extraction")));
    }
    Ok(task)
}

fn quantization(args: &QuantizeArgs) -> Result<Quantization> {
    let blocks = |part: Option<FormatArg>| {
        let blocks = match part.unwrap_or(args.quantize) {
            FormatArg::None => return None,
            FormatArg::Fp8 => return Some(Blocks::float8()),
            FormatArg::Int8 => Blocks::integer(8, 128),
            FormatArg::Int4 => Blocks::integer(4, 32),
        };
        Some(Blocks { size: args.block_size.unwrap_or(blocks.size), symmetric: !args.asymmetric, ..blocks })
    };
    let quantization = Quantization {
        encoder: blocks(args.quantize_encoder),
        decoder: blocks(args.quantize_decoder),
        head: blocks(args.quantize_head),
        vision: blocks(Some(args.quantize_vision.unwrap_or(FormatArg::None))),
        exclude: args.quantize_exclude.clone(),
    };
    let of_blocks = [
        ("--block-size", args.block_size.is_some()),
        ("--asymmetric", args.asymmetric),
        ("--quantize-exclude", !args.quantize_exclude.is_empty()),
    ];
    if let Some((flag, _)) = of_blocks.iter().find(|(_, given)| *given && !quantization.is_any()) {
        bail!(Usage(format!("{flag} requires --quantize, or --quantize-encoder, -decoder, -head or -vision")));
    }
    let is_blocked = quantization.formats().any(|blocks| blocks.code == Code::Integer);
    if let Some((flag, _)) = of_blocks[..2].iter().find(|(_, given)| *given && !is_blocked) {
        bail!(Usage(format!("{flag} requires --quantize int8 or int4 (got fp8, which has no blocks)")));
    }
    Ok(quantization)
}

fn activations(args: &QuantizeArgs) -> Result<Activations> {
    let Some(path) = &args.calibrate else {
        return Ok(if args.observe { Activations::Observed } else { Activations::Unknown });
    };
    let place = format!("--calibrate {}", path.display());
    let text = fs::read_to_string(path).with_context(|| format!("{place}: cannot be read"))?;
    let ranges: Result<ActivationRanges, _> = serde_json::from_str(json::without_mark(&text));
    let ranges = ranges.map_err(|error| {
        anyhow!("{place}: expected the output of `t5gemma calibrate`, found {}", json::malformed(&text, &error))
    })?;
    Ok(Activations::Ranges(ranges.ranges))
}

fn source(args: &ExportArgs, checkpoint: Option<&PathBuf>, task: Option<&Task>, bar: &Bar) -> Result<Source> {
    let ExportArgs { dummy, model, .. } = args;
    if !dummy.dummy_weights {
        let Some(checkpoint) = checkpoint else {
            bail!(Usage("expected CHECKPOINT and OUT, found one folder; see --help".to_string()))
        };
        let checkpoint = &checkpoint_folder(checkpoint, task, bar)?;
        let mut opened = Checkpoint::open(checkpoint)?;
        if let Some(config) = &model.config {
            opened = opened.with_config(config);
        } else if checkpoint.is_file() && !opened.folder().join("config.json").exists() {
            bail!(Usage(format!(
                "{} requires config.json in its folder, or --config FILE: a safetensors file does not have the sizes of \
                 the model",
                checkpoint.display()
            )));
        }
        if let Some(folder) = &model.tokenizer {
            opened = opened.with_tokenizer(folder)?;
        }
        if let Some(prefix) = &args.custom.weights_prefix {
            opened = opened.with_weights_prefix(prefix)?;
        }
        for adapter in &model.adapter {
            opened = opened.with_adapter(&adapter_folder(&adapter.folder, bar)?, adapter.scale)?;
        }
        return Ok(Source::Checkpoint(opened));
    }
    if let Some(checkpoint) = checkpoint {
        bail!(Usage(format!("--dummy-weights cannot be used with a checkpoint (got {})", checkpoint.display())));
    }
    let (config, origin) = match (&dummy.preset, &model.config) {
        (Some(name), _) => (preset(name).context("unknown preset")?.to_string(), format!("preset {name}")),
        (None, Some(path)) => {
            let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
            (text, path.display().to_string())
        }
        (None, None) => bail!(Usage("--dummy-weights requires --preset or --config".to_string())),
    };
    Ok(Source::Dummy { config, origin, seed: dummy.seed })
}

/// The folder of a checkpoint, which may be a repository on the hub.
fn checkpoint_folder(path: &Path, task: Option<&Task>, bar: &Bar) -> Result<PathBuf> {
    #[cfg(feature = "hub")]
    return crate::hub::folder(path, t5gemma_exporter::hub::Wanted::Checkpoint(task), bar);
    #[cfg(not(feature = "hub"))]
    {
        let _ = (task, bar);
        local_folder(path)
    }
}

/// The folder of an adapter, which may be a repository on the hub.
fn adapter_folder(path: &Path, bar: &Bar) -> Result<PathBuf> {
    #[cfg(feature = "hub")]
    return crate::hub::folder(path, t5gemma_exporter::hub::Wanted::Adapter, bar);
    #[cfg(not(feature = "hub"))]
    {
        let _ = bar;
        local_folder(path)
    }
}

#[cfg(not(feature = "hub"))]
fn local_folder(path: &Path) -> Result<PathBuf> {
    let repository = path.to_str().and_then(|name| t5gemma_exporter::Repository::unless_local(name).transpose());
    if repository.is_some() {
        bail!("{}: this program was built without downloads from the hub (the feature `hub`)", path.display());
    }
    Ok(path.to_path_buf())
}
