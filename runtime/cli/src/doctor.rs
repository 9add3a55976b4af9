//! `t5gemma doctor`: which ONNX Runtime is used, and what to do if none is found.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use t5gemma_runtime::{Provider, ProviderConfig, ProviderProbe, onnxruntime, probe_providers};

use crate::exit::Outcome;

/// Show which ONNX Runtime is used and what is missing
///
/// Shows the CPU instruction sets that the kernels use, where ONNX Runtime was searched for, its version, and for each
/// execution provider whether it is available and, if not, why.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  t5gemma doctor
  t5gemma doctor --onnxruntime /opt/onnxruntime/lib/libonnxruntime.so")]
pub struct Arguments {
    /// ONNX Runtime library to check, instead of searching for one
    #[arg(long, value_name = "FILE", help_heading = "Runtime")]
    onnxruntime: Option<PathBuf>,
    /// GPU index to check
    #[arg(long, value_name = "N", help_heading = "Runtime", default_value_t = 0)]
    device: u32,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<Outcome> {
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
            Ok(Outcome::Done)
        }
        Err(error) => {
            writeln!(out, "{error}")?;
            Ok(Outcome::SomeFailed)
        }
    }
}
