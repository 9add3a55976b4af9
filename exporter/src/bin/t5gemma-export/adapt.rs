//! The subcommand `adapt`: its arguments and its final message.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use t5gemma_exporter::{Adapt, Adapted, CrossInit, CrossNorms, DType, Error, Side};

use crate::arguments::DTypeArg;
use crate::progress::Bar;
use crate::stderr::note;

#[derive(Args)]
pub struct AdaptArgs {
    /// Gemma 2 or Gemma 3 checkpoint that becomes the encoder
    encoder: PathBuf,
    /// Checkpoint of the same family that becomes the decoder; may be the same
    decoder: PathBuf,
    /// Checkpoint folder to write; must be empty or not exist
    out: PathBuf,
    /// Matrices of cross-attention
    #[arg(long, value_name = "INIT", value_enum, default_value = "auto")]
    cross_init: CrossInitArg,
    /// Norms around cross-attention
    #[arg(long, value_name = "NORMS", value_enum, default_value = "auto")]
    cross_norms: CrossNormsArg,
    /// Seed of random matrices
    #[arg(long, value_name = "U64", default_value_t = 0)]
    seed: u64,
    /// Standard deviation of random matrices [default: initializer_range of the decoder]
    #[arg(long, value_name = "F", value_parser = deviation)]
    std: Option<f64>,
    /// Data type of all tensors [default: that of the checkpoints, or float32 if they have several]
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// Maximum bytes of tensors in each weights file
    #[arg(long, value_name = "BYTES", default_value_t = Adapt::default().max_shard_size)]
    max_shard_size: u64,
    /// Whose tokenizer to copy; required if the checkpoints have different ones
    #[arg(long, value_enum, value_name = "SIDE")]
    tokenizer_from: Option<SideArg>,
}

#[derive(Clone, Copy, ValueEnum)]
enum CrossInitArg {
    /// copy if encoder and decoder have the same hidden_size, random otherwise
    Auto,
    /// copies of the decoder's self-attention
    Copy,
    /// queries and outputs copied, keys and values random
    CopyQo,
    /// random
    Random,
}

#[derive(Clone, Copy, ValueEnum)]
enum CrossNormsArg {
    /// copy if all matrices are copied, ones otherwise
    Auto,
    /// copies of the norms around the decoder's self-attention
    Copy,
    /// scale factors of 1
    Ones,
    /// scale factors of 0 after cross-attention, so that the decoder starts as its Gemma 2
    Closed,
}

#[derive(Clone, Copy, ValueEnum)]
enum SideArg {
    Encoder,
    Decoder,
}

fn deviation(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|std: &f64| std.is_finite() && *std >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_string())
}

/// Adapts as the arguments say.
pub fn adapt(args: AdaptArgs, interrupted: &AtomicBool) -> Result<()> {
    let options = Adapt {
        cross_init: match args.cross_init {
            CrossInitArg::Auto => None,
            CrossInitArg::Copy => Some(CrossInit::Copy),
            CrossInitArg::CopyQo => Some(CrossInit::CopyQo),
            CrossInitArg::Random => Some(CrossInit::Random),
        },
        cross_norms: match args.cross_norms {
            CrossNormsArg::Auto => None,
            CrossNormsArg::Copy => Some(CrossNorms::Copy),
            CrossNormsArg::Ones => Some(CrossNorms::Ones),
            CrossNormsArg::Closed => Some(CrossNorms::Closed),
        },
        seed: args.seed,
        std: args.std,
        dtype: args.dtype.map(DType::from),
        max_shard_size: args.max_shard_size,
        tokenizer_from: args.tokenizer_from.map(|side| match side {
            SideArg::Encoder => Side::Encoder,
            SideArg::Decoder => Side::Decoder,
        }),
    };
    let progress = Bar::new(interrupted);
    let adapted = options.run_with(&args.encoder, &args.decoder, &args.out, &progress);
    progress.finish();
    let adapted = adapted.map_err(|error| match error {
        Error::OutputExists { .. } => anyhow!("{error}; choose another folder"),
        Error::TokenizersDiffer { .. } => anyhow!("{error}; choose one with --tokenizer-from"),
        error => error.into(),
    })?;
    print_summary(&adapted, &args);
    Ok(())
}

fn print_summary(adapted: &Adapted, args: &AdaptArgs) {
    let Adapted { choices, parameters, bytes, notes, warnings, .. } = adapted;
    for warning in warnings {
        note!("t5gemma-export: warning: {warning}");
    }
    for note in notes {
        note!("t5gemma-export: {note}");
    }
    if let Some(cross) = &choices.cross_attention {
        let random = format!("random (seed {}, standard deviation {})", cross.seed, cross.std);
        let matrices = match cross.init {
            CrossInit::Copy => "copied from the decoder's self-attention".to_string(),
            CrossInit::CopyQo => format!("queries and outputs copied from self-attention, keys and values {random}"),
            _ => random,
        };
        let norms = match cross.norms {
            CrossNorms::Copy => "copied",
            CrossNorms::Ones => "ones",
            _ => "closed",
        };
        note!("cross-attention: {matrices}; its norms: {norms}");
    }
    let head = if choices.tied { "tied to the embedding" } else { "of its own" };
    note!("wrote {}: {parameters} parameters, {bytes} bytes in {}, the head {head}", args.out.display(), choices.dtype);
    note!(
        "This checkpoint is where training starts: it is adapted but not trained, and does not answer questions.{}",
        match choices.cross_attention.map(|cross| cross.init) {
            None | Some(CrossInit::Copy) => "",
            Some(_) => " Train its cross-attention alone for the first steps.",
        }
    );
}
