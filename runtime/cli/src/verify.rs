//! `t5gemma verify`: whether a model computes what it should.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use t5gemma_runtime::Cancellation;
use t5gemma_runtime::verify::{Check, Golden, against, consistency};

use crate::tensors::Tensors;
use crate::{Opening, Outcome};

/// Checks a model against itself and, with --golden, against reference numbers
///
/// Prints the largest error of each comparison: cached steps = recomputation, a ragged batch = its rows alone, left = right
/// padding, beam width 1 = greedy, beam scores = recomputed ones, and each kind of reference tensor. Exit status 1 if one is
/// beyond its limit.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    opening: Opening,
    /// Reference tensors: in.B.input_ids and in.B.attention_mask for any names B, with enc.B.last_hidden_state,
    /// dec.B.first.logits, dec.B.forced_ids and dec.B.forced_logits, dec.B.prefill.logits where there are any
    #[arg(long, value_name = "FILE.safetensors")]
    golden: Option<PathBuf>,
    /// Largest absolute error that passes [default: 5e-4 in float32, a tenth of the largest number in half precision]
    #[arg(long)]
    tolerance: Option<f32>,
}

/// Runs the command.
pub fn run(mut arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let golden = arguments.golden.as_deref().map(Tensors::read).transpose()?.map(|file| read(&file)).transpose()?;
    arguments.opening.check_weights = true;
    let model = arguments.opening.open()?;
    let mut checks = consistency(&model, arguments.tolerance, cancel)?;
    if let Some(golden) = &golden {
        let compared = against(&model, golden, arguments.tolerance, cancel)?;
        ensure!(!compared.is_empty(), "the reference file holds nothing to compare with; see --help for the names");
        checks.extend(compared);
    }
    for check in &checks {
        let verdict = if check.passed() { "ok  " } else { "FAIL" };
        let Check { name, largest, limit } = check;
        writeln!(io::stdout(), "{verdict} {name:<52} {largest:>9.2e}  (limit {limit:.2e})")?;
    }
    Ok(if checks.iter().all(|check| check.passed()) { Outcome::Done } else { Outcome::SomeFailed })
}

fn read(file: &Tensors) -> Result<Golden> {
    let mut golden = Golden::default();
    for name in file.names()? {
        // Other tensors of the file, in whatever type, are not looked at.
        if name.starts_with("in.") || name.ends_with(".forced_ids") {
            golden.whole.extend(file.whole(&name)?.map(|tensor| (name, tensor)));
        } else if name.starts_with("enc.") || name.starts_with("dec.") {
            golden.floats.extend(file.floats(&name)?.map(|tensor| (name, tensor)));
        }
    }
    Ok(golden)
}
