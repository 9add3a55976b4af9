//! `t5gemma encode`: encoder hidden states into a file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use ndarray::Array3;
use t5gemma_runtime::{Cancellation, Model};

use crate::progress::counter;
use crate::requests::{self, Kind, Lines, Refused, Request};
use crate::tensors::{Aside, write_npy, write_safetensors};
use crate::{Opening, Outcome};

/// Writes the encoder's last hidden states of texts: those given, or each line of stdin
///
/// One tensor for each text or request, named {id}.last_hidden_state, float32 [rows, source tokens, hidden size]; a text's
/// id is its number from 0. Rows of a request keep its padding, whose states mean nothing. With --jsonl, each line of stdin
/// is a request {"id"?, "text" | "input_ids", "attention_mask"?}, and blank lines are passed over. A request that fails is
/// told on stderr and left out.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    opening: Opening,
    /// Texts to encode [default: the lines of stdin]
    texts: Vec<String>,
    /// Read requests as JSON lines
    #[arg(long, conflicts_with = "texts")]
    jsonl: bool,
    /// File to write: .safetensors, or .npy for a single text or request
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let extension = arguments.output.extension().and_then(|extension| extension.to_str());
    let npy = match extension {
        Some("npy") => true,
        Some("safetensors") => false,
        _ => bail!("{}: expected a name that ends in .safetensors or .npy", arguments.output.display()),
    };
    // A place that cannot be written is told before anything is computed.
    let file = Aside::create(&arguments.output)?;
    let model = arguments.opening.open()?;
    let mut outcome = Outcome::Done;
    let mut tensors = BTreeMap::new();
    let done = counter("encoded", false);
    let mut encode = |request: Result<Request, Refused>| -> Result<()> {
        let states = request.map_err(|refused| (refused.id, refused.reason)).and_then(|request| {
            let name =
                format!("{}.last_hidden_state", request.id.as_str().map_or(request.id.to_string(), str::to_string));
            if tensors.contains_key(&name) {
                return Err((request.id, "the same id was given before".to_string()));
            }
            match states(&model, &request, cancel) {
                Ok(states) => Ok((name, states)),
                Err(error) => Err((request.id, error.to_string())),
            }
        });
        if cancel.is_cancelled() {
            return Err(t5gemma_runtime::Error::Cancelled.into());
        }
        match states {
            Ok((name, states)) => {
                tensors.insert(name, states);
                done.inc(1);
            }
            Err((id, reason)) => {
                done.suspend(|| eprintln!("t5gemma: request {id}: {reason}"));
                outcome = Outcome::SomeFailed;
            }
        }
        Ok(())
    };
    if arguments.texts.is_empty() {
        let (mut lines, read) = match arguments.jsonl {
            true => (Lines::requests(), Request::parse as Read),
            false => (Lines::texts(), Request::of_text as Read),
        };
        while let Some((number, line)) = lines.next(cancel)? {
            encode(read(&line, number, Kind::Encode, &model))?;
        }
    } else {
        for (number, text) in arguments.texts.iter().enumerate() {
            encode(Request::of_text(text.as_bytes(), number, Kind::Encode, &model))?;
        }
    }
    if npy {
        ensure!(
            tensors.len() == 1,
            "a .npy file holds one tensor, and there are {}: write .safetensors",
            tensors.len()
        );
        let only = tensors.values().next().context("there is one tensor")?;
        write_npy(file, only)?;
    } else {
        write_safetensors(file, tensors)?;
    }
    Ok(outcome)
}

type Read = fn(&[u8], usize, Kind, &Model) -> Result<Request, Refused>;

fn states(model: &Model, request: &Request, cancel: &Cancellation) -> Result<Array3<f32>, t5gemma_runtime::Error> {
    let batch = requests::batch(std::slice::from_ref(request), model.options().pad_token_id)?;
    model.encode(&batch, cancel)
}
