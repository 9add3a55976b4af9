//! Library errors in terms of the command line: the library names fields, which become flags here.

use std::fmt;
use std::path::PathBuf;

use t5gemma_exporter::{Error, Setting, SettingError};

use crate::arguments::ExportArgs;

/// Maximum number of tensors to list in an error.
const MAX_TENSORS: usize = 10;

/// Contradictory or missing arguments.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The values of flags that messages need.
pub struct Flags {
    keep_tokens: Option<PathBuf>,
    calibrate: Option<PathBuf>,
}

impl Flags {
    pub fn new(args: &ExportArgs) -> Flags {
        Flags { keep_tokens: args.graphs.keep_tokens.clone(), calibrate: args.quantize.calibrate.clone() }
    }

    /// The message of an error, with its causes.
    pub fn message(&self, error: &anyhow::Error) -> String {
        match error.downcast_ref::<Error>() {
            Some(Error::Setting(refused)) => {
                let message = refused.message(|setting, value| self.flag(setting, value));
                match refused {
                    SettingError::Memory { table, .. } => format!("{message}\n\n{}", table.trim_end()),
                    _ => message,
                }
            }
            Some(Error::Tensors { checkpoint, mismatches, hint }) if mismatches.len() > 1 => {
                let mut message = format!("{}: the tensors do not match config.json:", checkpoint.display());
                mismatches.iter().take(MAX_TENSORS).for_each(|mismatch| message += &format!("\n  {mismatch}"));
                if mismatches.len() > MAX_TENSORS {
                    message += &format!("\n  and {} more", mismatches.len() - MAX_TENSORS);
                }
                if hint.is_empty() { message } else { format!("{message}\n  {hint}") }
            }
            Some(Error::OutputExists { .. }) => format!("{error}; choose another folder or pass --overwrite"),
            _ => format!("{error:#}"),
        }
    }

    /// The flag of an option, followed by the value that the message gives for it.
    fn flag(&self, setting: Setting, value: &str) -> String {
        let with_file = |flag: &str, file: &Option<PathBuf>| match file {
            Some(file) => format!("{flag} {}", file.display()),
            None => flag.to_string(),
        };
        let flag = match setting {
            Setting::Task => "--task",
            Setting::HiddenLayer => "--hidden-layer",
            Setting::Pooling => "--pooling",
            Setting::FixedLength => "--fixed-length",
            Setting::PaddingRows => "--pad-rows",
            Setting::OutputDtype => "--output-dtype",
            Setting::OutputHiddenStates => "--output-hidden-states",
            Setting::Target => "--target",
            Setting::Dtype => "--dtype",
            Setting::AllLogits => "--all-logits",
            Setting::Candidates => "--candidates",
            Setting::KeptTokens => return with_file("--keep-tokens", &self.keep_tokens),
            Setting::LoraInputs => "--lora-inputs",
            Setting::Alignment => "--alignment",
            Setting::AlignmentLayers => "--alignment-layers",
            Setting::Capacity if value.is_empty() => return "--cache static=N".to_string(),
            Setting::Capacity => return format!("--cache static={value}"),
            Setting::SourcePositions => "--source-positions",
            Setting::TargetPositions => "--target-positions",
            Setting::DecoderEmbedding => "--decoder-embedding",
            Setting::Head => "--head",
            Setting::Custom => "a custom interface",
            Setting::EncoderWindow => "--encoder-window",
            Setting::WriteSentencepiece => "--write-sentencepiece",
            Setting::Plan => "--plan",
            Setting::MemoryLimit => "--fits",
            Setting::Observed => "--observe",
            Setting::Ranges => return with_file("--calibrate", &self.calibrate),
            Setting::Quantization => "--quantize",
            Setting::BlockSize => "--block-size",
            Setting::VisionQuantization => "--quantize-vision",
            Setting::Asymmetric => "--asymmetric",
            Setting::Exclude => "--quantize-exclude",
            _ => setting.field(),
        };
        // A message says "--quantize int8 with target tensorrt", where a library says "quantization int8 with target
        // tensorrt".
        if value.is_empty() { flag.to_string() } else { format!("{flag} {value}") }
    }
}

/// The exit status for an error: 2 for invalid arguments, 1 for everything else, including invalid files that arguments
/// name.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    let is_of_arguments = match error.downcast_ref::<Error>() {
        Some(Error::Setting(SettingError::Invalid { setting, .. })) => {
            !matches!(setting, Setting::KeptTokens | Setting::Ranges)
        }
        Some(Error::Setting(_)) => true,
        _ => error.is::<Usage>(),
    };
    if is_of_arguments { 2 } else { 1 }
}
