//! The arguments of commands that open a model, and how they open it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use clap::builder::PossibleValuesParser;
use t5gemma_runtime::{Cancellation, Encoder, Limits, Model, OpenOptions, Provider, ProviderConfig};

use crate::exit::{bail_usage, ensure_usage};
use crate::flag_errors;
use crate::stderr::note;

/// The model.
#[derive(Args, Clone)]
#[command(next_help_heading = "Model")]
pub struct ModelArguments {
    /// Model folder written by t5gemma-export
    #[arg(value_name = "MODEL", help_heading = None::<&str>)]
    pub model: PathBuf,
    /// Verify the hash of the weights file before running
    ///
    /// By default, only its size is checked.
    #[arg(long)]
    pub check_weights: bool,
    /// Folder with the TensorRT engines of the model's serving plan [default: MODEL/engines]
    ///
    /// Written by `t5gemma build-engines --engines` or `build_engines.sh --engines`.
    #[arg(long, value_name = "DIR")]
    pub engines: Option<PathBuf>,
}

/// The adapters to load.
#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct AdapterArguments {
    /// Load the PEFT LoRA adapter in DIR as NAME; may be repeated
    ///
    /// The model must be exported with --lora-inputs. JSON requests choose an adapter by its name. Texts use the only
    /// one that is given.
    #[arg(long, value_name = "NAME=DIR", value_parser = adapter)]
    pub adapter: Vec<(String, PathBuf)>,
}

impl AdapterArguments {
    /// Loads the adapters.
    pub fn load(&self, models: &[Arc<Model>]) -> Result<()> {
        for (name, folder) in &self.adapter {
            for model in models {
                model.load_adapter(name, folder).map_err(flag_errors::of_adapter)?;
            }
        }
        Ok(())
    }

    /// The name of the adapter that texts use.
    pub fn of_texts(&self) -> Result<Option<&str>> {
        match &self.adapter[..] {
            [] => Ok(None),
            [(name, _)] => Ok(Some(name)),
            several => {
                bail_usage!("--adapter: expected one for texts, found {} (--jsonl takes several)", several.len())
            }
        }
    }
}

/// How the model runs.
#[derive(Args, Clone)]
#[command(next_help_heading = "Runtime")]
pub struct RuntimeArguments {
    /// ONNX Runtime library to load [default: the first that `t5gemma doctor` finds]
    ///
    /// The environment variable ORT_DYLIB_PATH has the same effect.
    #[arg(long, value_name = "FILE")]
    pub onnxruntime: Option<PathBuf>,
    /// Number of threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Execution provider of ONNX Runtime
    ///
    /// `tensorrt` falls back to `cuda` for operators that it does not support. If the provider is not available, the
    /// command fails; `t5gemma doctor` shows why.
    #[arg(long, default_value = "cpu", value_parser = PossibleValuesParser::new(Provider::ALL.map(Provider::name)))]
    pub provider: String,
    /// GPU index, or several of them
    ///
    /// With several, as in `0,1`, `generate --jsonl` runs a copy of the model on each.
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',', default_value = "0")]
    pub device: Vec<u32>,
    /// Provider option, under its ONNX Runtime name; may be repeated
    ///
    /// Takes precedence over the model's serving plan.
    #[arg(long, value_name = "NAME=VALUE", value_parser = provider_option)]
    pub provider_option: Vec<(String, String)>,
    /// Run typical shapes once before the first request
    ///
    /// The first request then takes no longer than later ones. The shapes come from the model's serving plan; without a
    /// plan, a source of 64 tokens runs.
    #[arg(long)]
    pub warm_up: bool,
    /// Profile each operator and write the times to PREFIX-GRAPH_TIME.json
    ///
    /// chrome://tracing shows these files. Profiling slows the operators down slightly.
    #[arg(long, value_name = "PREFIX")]
    pub profile: Option<PathBuf>,
}

/// A model to open, with all its command-line options.
pub struct Opening {
    pub model: ModelArguments,
    pub runtime: RuntimeArguments,
    /// For commands that may encode the same source more than once.
    pub encoder_cache_bytes: usize,
    /// For commands that run batches.
    pub limits: Limits,
}

impl Opening {
    pub fn new(model: ModelArguments, runtime: RuntimeArguments) -> Opening {
        Opening { model, runtime, encoder_cache_bytes: 0, limits: Limits::default() }
    }

    /// The model's folder.
    pub fn path(&self) -> &Path {
        &self.model.model
    }

    /// Opens the model.
    pub fn open(&self) -> Result<Model> {
        self.open_model(self.path())
    }

    /// Opens another model with the same options.
    pub fn open_model(&self, path: &Path) -> Result<Model> {
        self.open_on(path, self.one_device()?)
    }

    /// Opens a copy of the model on each device.
    pub fn open_all(&self) -> Result<Vec<Arc<Model>>> {
        self.runtime.device.iter().map(|&device| Ok(Arc::new(self.open_on(self.path(), device)?))).collect()
    }

    fn open_on(&self, path: &Path, device: u32) -> Result<Model> {
        let model = Model::open_with(path, &self.options(device)).map_err(flag_errors::of_opening)?;
        for fallback in model.fallbacks() {
            note!("t5gemma: {fallback}");
        }
        for warning in model.warnings() {
            note!("t5gemma: {}: {warning}", path.display());
        }
        if self.runtime.warm_up {
            model.warm_up(&Cancellation::new())?;
        }
        Ok(model)
    }

    /// Opens the model's encoder, or its only graph.
    pub fn open_encoder(&self) -> Result<Encoder> {
        self.open_encoder_of(self.path())
    }

    /// Opens another encoder in the same way.
    pub fn open_encoder_of(&self, path: &Path) -> Result<Encoder> {
        ensure_usage!(!self.runtime.warm_up, "--warm-up requires a command that generates");
        Encoder::open_with(path, &self.options(self.one_device()?)).map_err(flag_errors::of_opening)
    }

    /// The device, for commands that run on only one.
    pub fn one_device(&self) -> Result<u32> {
        let [device] = self.runtime.device[..] else {
            bail_usage!(
                "--device: expected one GPU, found {} (only generate --jsonl runs on several)",
                self.runtime.device.len()
            );
        };
        Ok(device)
    }

    /// The runtime's options for a device.
    pub fn options(&self, device: u32) -> OpenOptions {
        let (model, runtime) = (&self.model, &self.runtime);
        let provider = Provider::ALL.into_iter().find(|known| known.name() == runtime.provider).unwrap_or_default();
        let mut options = OpenOptions::default()
            .check_weights(model.check_weights)
            .encoder_cache_bytes(self.encoder_cache_bytes)
            .limits(self.limits)
            .provider(ProviderConfig::new(provider).device(device));
        options.provider.options = runtime.provider_option.clone();
        options.library = runtime.onnxruntime.clone();
        options.threads = runtime.threads;
        options.profile = runtime.profile.clone();
        options.engines = model.engines.clone();
        options
    }
}

fn adapter(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok((name.to_string(), folder.into())),
        _ => Err(format!("expected NAME=DIR, found {text}")),
    }
}

fn provider_option(text: &str) -> Result<(String, String), String> {
    let option = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, found {text}"))?;
    Ok((option.0.to_string(), option.1.to_string()))
}
