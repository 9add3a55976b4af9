//! `t5gemma shortlist`: lists the tokens that an export keeps in the output head.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use t5gemma_runtime::{Cancellation, Error, Shortlist, Tokenizer};

use crate::exit::Outcome;
use crate::files::read_text;
use crate::progress::counter;
use crate::stderr::note;
use crate::tensors::{Aside, write_text};

/// List the tokens that occur in texts, to export with a smaller output head
///
/// The texts should be representative of those to be generated: in the same languages, scripts and domains. Special
/// tokens and single-byte tokens, which can spell any text, are always included. `t5gemma-export --keep-tokens` reads
/// the file: the output head then has only these tokens, so that every step reads fewer weights.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  t5gemma shortlist checkpoint --texts targets.txt -o tokens.json
  t5gemma-export --keep-tokens tokens.json checkpoint model")]
pub struct Arguments {
    /// Checkpoint or model folder with a tokenizer.json
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// Texts, one per line
    #[arg(long, value_name = "FILE.txt", help_heading = "Input")]
    texts: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "TOKENS.json", help_heading = "Output")]
    output: PathBuf,
    /// Minimum number of occurrences of a token
    #[arg(long, value_name = "N", help_heading = "Output", default_value_t = 1)]
    min_count: u64,
    /// Maximum number of tokens, most frequent first [default: all]
    #[arg(long, value_name = "N", help_heading = "Output")]
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
    ensure!(shortlist.texts() > 0, "{}: expected one text per line, found none", texts.display());
    let tokens = shortlist.tokens(min_count, max_tokens);
    write_text(output, &(serde_json::to_string(&tokens)? + "\n"))?;
    note!("{} tokens of {} texts", tokens.len(), shortlist.texts());
    Ok(Outcome::Done)
}
