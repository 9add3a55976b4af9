//! How likely given targets are: teacher forcing through the cached decoder steps, a token a step, rows leaving as their
//! targets end.

use std::ops::ControlFlow;

use crate::alignment::CrossAttentions;
use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::logprobs::Logprobs;
use crate::model::{Model, Said};
use crate::scores::{Kept, Wanted};

/// See [`Model::score`] and, of models that tell it, [`Model::score_with_attentions`]; `on_step` is called after each step.
pub(crate) fn score(
    model: &Model,
    batch: &Batch,
    targets: &[Vec<i64>],
    top: usize,
    on_step: &mut dyn FnMut() -> ControlFlow<()>,
    cancel: &Cancellation,
) -> Result<Vec<(Logprobs, Option<CrossAttentions>)>, Error> {
    cancel.check()?;
    let decoder = &model.config().decoder;
    batch.check(model.config())?;
    check(targets, batch.rows(), decoder.vocab_size, model.kept().map(|kept| &**kept))?;
    let scored = model.kept().map_or(decoder.vocab_size, |kept| kept.tokens().len());
    if top > scored {
        let expected = format!("at most {scored}, the tokens that the model has scores of");
        return Err(Error::input("top_logprobs", expected, top.to_string()));
    }
    let prompts = batch.prompts(model.options().decoder_start_token_id);
    let longest = targets.iter().map(Vec::len).max().unwrap_or(0) + prompts.length;
    let (most, limit) = model.longest_target();
    if longest > most {
        let expected = format!("at most {most} target tokens ({limit})");
        let found = format!("{longest}, of which {} are the prompt", prompts.length);
        return Err(Error::input("target_ids", expected, found));
    }

    let nothing_yet = |row: usize| {
        let attended = model.attends().then(|| CrossAttentions::of_source(batch.source(row).len()));
        (Logprobs::default(), attended)
    };
    let mut found: Vec<_> = (0..targets.len()).map(nothing_yet).collect();
    let encoded = model.run_encoder(batch, cancel)?;
    let Prompts { length, ids } = prompts;
    let (mut state, mut logits) = model.start(encoded, Prompts { length, ids }, Wanted::All, cancel)?;
    let mut rows: Vec<usize> = (0..targets.len()).collect();
    for step in 0.. {
        let mut said = logits.said()?;
        for (slot, &row) in rows.iter().enumerate() {
            let Said { scores, attended, .. } = said.rows(slot, 1);
            if !scores.iter().all(|score| score.is_finite()) {
                return Err(Error::NotFinite { row, step, dtype: model.manifest().dtype });
            }
            let (logprobs, cross_attentions) = &mut found[row];
            match model.kept() {
                Some(kept) => logprobs.push(&kept.spread(scores, decoder.vocab_size), targets[row][step], top),
                None => logprobs.push(scores, targets[row][step], top),
            }
            cross_attentions.iter_mut().for_each(|found| found.push(attended));
        }
        if on_step().is_break() {
            return Err(Error::Cancelled);
        }
        let going_on: Vec<usize> = (0..rows.len()).filter(|&slot| targets[rows[slot]].len() > step + 1).collect();
        if going_on.is_empty() {
            cancel.check()?;
            break;
        }
        state.select(&going_on, &going_on)?;
        rows = going_on.iter().map(|&slot| rows[slot]).collect();
        let tokens = rows.iter().map(|&row| targets[row][step]).collect();
        logits = model.step(&mut state, tokens, Wanted::All, cancel)?;
    }
    Ok(found)
}

fn check(targets: &[Vec<i64>], rows: usize, vocab_size: usize, kept: Option<&Kept>) -> Result<(), Error> {
    if targets.len() != rows {
        let expected = format!("{rows} rows, as many as input_ids has");
        return Err(Error::input("target_ids", expected, format!("{} rows", targets.len())));
    }
    for (row, target) in targets.iter().enumerate() {
        if target.is_empty() {
            return Err(Error::input(format!("target_ids[{row}]"), "at least one token", "none"));
        }
        if let Some(at) = target.iter().position(|&id| usize::try_from(id).map_or(true, |id| id >= vocab_size)) {
            let expected = format!("a token id below {vocab_size}, the size of the vocabulary");
            return Err(Error::input(format!("target_ids[{row}][{at}]"), expected, target[at].to_string()));
        }
        if let Some(at) = kept.and_then(|kept| target.iter().position(|&id| !kept.has(id))) {
            let expected = "a token that this model keeps (one of kept_tokens.json)";
            return Err(Error::input(format!("target_ids[{row}][{at}]"), expected, target[at].to_string()));
        }
    }
    Ok(())
}
