//! The arguments of every command that opens a model, and opening it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use clap::builder::PossibleValuesParser;
use t5gemma_runtime::{Cancellation, Encoder, Limits, Model, OpenOptions, Provider, ProviderConfig};

use crate::exit::{bail_usage, ensure_usage};
use crate::flag_errors;

/// What every command that opens a model takes.
#[derive(Args)]
pub struct Opening {
    /// Folder that t5gemma-export has made
    pub model: PathBuf,
    /// ONNX Runtime library to load [default: ORT_DYLIB_PATH, or as `t5gemma doctor` lists]
    #[arg(long, value_name = "FILE")]
    onnxruntime: Option<PathBuf>,
    /// Threads to compute with [default: one a core]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Compare the hash of the whole weights file, however large, before running
    #[arg(long)]
    pub check_weights: bool,
    /// What computes the model; `tensorrt` leaves what it does not take to `cuda`. One that cannot be had is an error, see
    /// `t5gemma doctor`
    #[arg(long, default_value = "cpu", value_parser = PossibleValuesParser::new(Provider::ALL.map(Provider::name)))]
    provider: String,
    /// Number of the GPU; several, as in 0,1, have `generate --jsonl` answer with a copy of the model on each
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',', default_value = "0")]
    device: Vec<u32>,
    /// Run the usual sizes of the model's serving plan once before anything else, so that the first answer takes no longer
    /// than the others; without a plan, a source of 64 tokens
    #[arg(long)]
    pub warm_up: bool,
    /// Option of the provider by ONNX Runtime's name of it, over those of the model's serving plan; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = provider_option)]
    provider_option: Vec<(String, String)>,
    /// Folder with the engines of the model's serving plan, as build_engines.sh --engines or build-engines --engines has made
    /// it [default: the model's own]
    #[arg(long, value_name = "DIR")]
    engines: Option<PathBuf>,
    /// Have ONNX Runtime write how long each operator takes into the files PREFIX-GRAPH_TIME.json, which chrome://tracing
    /// shows; it slows the operators down a little
    #[arg(long, value_name = "PREFIX")]
    profile: Option<PathBuf>,
    /// For commands that encode the same source more than once.
    #[arg(skip)]
    pub encoder_cache_bytes: usize,
    /// For commands that run batches.
    #[arg(skip)]
    pub limits: Limits,
}

impl Opening {
    pub fn open(&self) -> Result<Model> {
        self.open_model(&self.model)
    }

    /// Another model in the same way.
    pub fn open_model(&self, path: &Path) -> Result<Model> {
        self.open_on(path, self.one_device()?)
    }

    /// The model on each of the devices.
    pub fn open_all(&self) -> Result<Vec<Arc<Model>>> {
        self.device.iter().map(|&device| Ok(Arc::new(self.open_on(&self.model, device)?))).collect()
    }

    fn open_on(&self, path: &Path, device: u32) -> Result<Model> {
        let model = Model::open_with(path, &self.options(device)).map_err(flag_errors::of_opening)?;
        for fallback in model.fallbacks() {
            eprintln!("t5gemma: {fallback}");
        }
        for warning in model.warnings() {
            eprintln!("t5gemma: {}: {warning}", path.display());
        }
        if self.warm_up {
            model.warm_up(&Cancellation::new())?;
        }
        Ok(model)
    }

    pub fn open_encoder(&self) -> Result<Encoder> {
        ensure_usage!(!self.warm_up, "--warm-up: expected a command that generates");
        Encoder::open_with(&self.model, &self.options(self.one_device()?)).map_err(flag_errors::of_opening)
    }

    pub fn one_device(&self) -> Result<u32> {
        let [device] = self.device[..] else {
            bail_usage!(
                "--device: expected one number, found {} (several are for generate --jsonl)",
                self.device.len()
            );
        };
        Ok(device)
    }

    pub fn options(&self, device: u32) -> OpenOptions {
        let provider = Provider::ALL.into_iter().find(|provider| provider.name() == self.provider).unwrap_or_default();
        let mut options = OpenOptions::default()
            .check_weights(self.check_weights)
            .encoder_cache_bytes(self.encoder_cache_bytes)
            .limits(self.limits)
            .provider(ProviderConfig::new(provider).device(device));
        options.provider.options = self.provider_option.clone();
        options.library = self.onnxruntime.clone();
        options.threads = self.threads;
        options.profile = self.profile.clone();
        options.engines = self.engines.clone();
        options
    }
}

fn provider_option(text: &str) -> Result<(String, String), String> {
    let option = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, found {text}"))?;
    Ok((option.0.to_string(), option.1.to_string()))
}
