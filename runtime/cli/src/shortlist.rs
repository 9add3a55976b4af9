//! `t5gemma shortlist`: the tokens that an export keeps of the head.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use t5gemma_runtime::{Cancellation, Error, Shortlist, Tokenizer};

use crate::exit::Outcome;
use crate::files::read_text;
use crate::progress::counter;
use crate::tensors::{Aside, write_text};

/// Lists the tokens that texts are made of, for a model that is to write such texts only
///
/// The texts should be like those that the model is to write: in the languages, scripts and domains that it will be asked
/// for. Special tokens, and those that any other text can be spelled with byte by byte, are listed too.
/// `t5gemma-export --keep-tokens` reads what is written: the head, of which every step reads all, becomes as much smaller.
#[derive(clap::Args)]
pub struct Arguments {
    /// Checkpoint or exported model, for its tokenizer.json
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// Texts, a line each
    #[arg(long, value_name = "FILE.txt")]
    texts: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "TOKENS.json")]
    output: PathBuf,
    /// List tokens that occur so many times at least
    #[arg(long, value_name = "N", default_value_t = 1)]
    min_count: u64,
    /// List so many tokens at most, the most frequent ones [default: all]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let Arguments { folder, texts, output, min_count, max_tokens } = arguments;
    let tokenizer = Tokenizer::open(&folder.join("tokenizer.json"))?;
    let mut shortlist = Shortlist::new(&tokenizer).with_context(|| folder.display().to_string())?;
    let text = read_text(&texts)?;
    let output = Aside::create(&output)?;
    let done = counter("texts", true);
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled.into());
        }
        shortlist.add(line).with_context(|| format!("{}: line {}", texts.display(), number + 1))?;
        done.inc(1);
    }
    done.finish_and_clear();
    ensure!(shortlist.texts() > 0, "{}: expected a text a line, found none", texts.display());
    let tokens = shortlist.tokens(min_count, max_tokens);
    write_text(output, &(serde_json::to_string(&tokens)? + "\n"))?;
    eprintln!("{} tokens of {} texts", tokens.len(), shortlist.texts());
    Ok(Outcome::Done)
}
