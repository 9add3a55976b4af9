//! `t5gemma doctor`: which ONNX Runtime is used, what to do if none is found, and whether a model runs with it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Error, Facts, Model, OpenOptions, PixelValues, Pooling, Provider,
    ProviderConfig, ProviderProbe, Task, onnxruntime, probe_providers, task_of,
};

use crate::exit::Outcome;

/// Show which ONNX Runtime is used and what is missing
///
/// Shows the CPU instruction sets that the kernels use, where ONNX Runtime was searched for, its version, and for each
/// execution provider whether it is available and, if not, why. With a model, also runs each of its graphs once on the
/// CPU.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  t5gemma doctor
  t5gemma doctor model
  t5gemma doctor --onnxruntime /opt/onnxruntime/lib/libonnxruntime.so")]
pub struct Arguments {
    /// Model folder to run once
    #[arg(value_name = "MODEL")]
    model: Option<PathBuf>,
    /// ONNX Runtime library to check, instead of searching for one
    #[arg(long, value_name = "FILE", help_heading = "Runtime")]
    onnxruntime: Option<PathBuf>,
    /// GPU index to check
    #[arg(long, value_name = "N", help_heading = "Runtime", default_value_t = 0)]
    device: u32,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let report = onnxruntime::report(arguments.onnxruntime.as_deref());
    let mut out = io::stdout().lock();
    writeln!(out, "t5gemma {}", env!("CARGO_PKG_VERSION"))?;
    match t5gemma_runtime::instructions() {
        Ok(instructions) => writeln!(out, "CPU kernels use {instructions}")?,
        Err(error) => {
            writeln!(out, "{error}")?;
            return Ok(Outcome::SomeFailed);
        }
    }
    writeln!(out, "searched for ONNX Runtime, in order of precedence:")?;
    for place in &report.searched {
        writeln!(out, "  {:<24} {}: {}", place.why, place.path.display(), place.found)?;
    }
    match report.library {
        Ok(library) => {
            writeln!(out, "using {}", library.path.display())?;
            writeln!(out, "  {}", library.build)?;
            writeln!(out, "  providers: {}", library.providers.join(", "))?;
            let providers = Provider::ALL.map(|provider| {
                let device = if provider == Provider::Cpu { 0 } else { arguments.device };
                ProviderConfig::new(provider).device(device)
            });
            for ProviderProbe { provider, result, .. } in probe_providers(arguments.onnxruntime.as_deref(), &providers)?
            {
                match result {
                    Ok(()) => writeln!(out, "  --provider {provider}: ready")?,
                    Err(error) => writeln!(out, "  --provider {provider}: {error}")?,
                }
            }
            let Some(model) = &arguments.model else { return Ok(Outcome::Done) };
            match ran(model, arguments.onnxruntime.as_deref(), cancel) {
                Ok(graphs) => {
                    writeln!(out, "{} runs: {}", model.display(), graphs.join(", "))?;
                    Ok(Outcome::Done)
                }
                Err(Error::Cancelled) => Err(Error::Cancelled.into()),
                Err(error) => {
                    // Errors of a folder name it.
                    writeln!(out, "{error}")?;
                    Ok(Outcome::SomeFailed)
                }
            }
        }
        Err(error) => {
            writeln!(out, "{error}")?;
            Ok(Outcome::SomeFailed)
        }
    }
}

/// Runs each graph of a model once, and returns the names of the graphs.
fn ran(path: &Path, library: Option<&Path>, cancel: &Cancellation) -> Result<Vec<&'static str>, Error> {
    let mut options = OpenOptions::default();
    options.library = library.map(PathBuf::from);
    let mut graphs = Vec::new();
    let source = Batch::padded(&[[0; 4]], 0)?;
    let image = |facts: &Facts| {
        let Some(vision) = &facts.vision else { return Ok(None) };
        PixelValues::new(vision.image_size, vec![0.0; 3 * vision.image_size * vision.image_size]).map(Some)
    };
    if task_of(path)? == Task::Text2TextGeneration {
        let model = Model::open_with(path, &options)?;
        let mut config = model.generation_config().plain();
        (config.max_new_tokens, config.min_new_tokens) = (Some(2), Some(2));
        let source = match model.facts().custom.target_scale() {
            None => source,
            Some(_) => source.with_progress_totals(&[3])?,
        };
        model.generate_batch(&source, &config, Controls::default().cancellation(cancel))?;
        graphs.extend(["encoder", "decoder", "decoder_with_past"]);
        if let Some(image) = image(model.facts())? {
            model.encode_images(&[image], cancel)?;
            graphs.push("vision_encoder");
        }
    } else {
        let encoder = Encoder::open_with(path, &options)?;
        match &encoder.manifest().task {
            Task::TextClassification => drop(encoder.classify(&source, cancel)?),
            Task::TokenClassification => drop(encoder.classify_tokens(&source, cancel)?),
            _ => match encoder.features()?.pooling {
                Pooling::None => drop(encoder.encode(&source, cancel)?),
                pooling => drop(encoder.embed(&source, pooling, cancel)?),
            },
        }
        graphs.push("model");
        if let Some(image) = image(encoder.facts())? {
            encoder.encode_images(&[image], cancel)?;
            graphs.push("vision_encoder");
        }
    }
    Ok(graphs)
}
