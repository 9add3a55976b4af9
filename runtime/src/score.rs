//! How likely given targets are: teacher forcing through the cached decoder steps, a token a step, rows leaving as their
//! targets end.

use std::ops::{ControlFlow, Range};

use t5gemma_kernels::LogitsRequest;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::{CrossAttentions, Logprobs};
use crate::logits::Said;
use crate::model::Model;
use crate::needs::{Need, pieces_to_decode};
use crate::vocabulary_subset::VocabularySubset;

/// A target's log-probabilities, and what it attends to of models that tell it.
type Scored = (Logprobs, Option<CrossAttentions>);

impl Model {
    /// The log-probabilities of given targets, each for its source, end token included where it is given; with those of
    /// the `top` likeliest tokens at each place. They come after the decoder prompts of `batch`, or the start token.
    ///
    /// # Errors
    /// Not one target for each source, an empty one, tokens outside the vocabularies, lengths that do not fit the model,
    /// logits that are not finite, or a cancellation.
    pub fn score(
        &self,
        batch: &Batch,
        targets: &[Vec<i64>],
        top: usize,
        cancel: &Cancellation,
    ) -> Result<Vec<Logprobs>, Error> {
        let scored = self.score_with_progress(batch, targets, top, &mut || ControlFlow::Continue(()), cancel)?;
        Ok(scored.into_iter().map(|(logprobs, _)| logprobs).collect())
    }

    /// [`Model::score`] with what the targets attend to in their sources.
    ///
    /// # Errors
    /// As [`Model::score`], and of a model that was exported without `--alignment`.
    pub fn score_with_attentions(
        &self,
        batch: &Batch,
        targets: &[Vec<i64>],
        top: usize,
        cancel: &Cancellation,
    ) -> Result<Vec<(Logprobs, CrossAttentions)>, Error> {
        self.check_cross_attentions()?;
        let scored = self.score_with_progress(batch, targets, top, &mut || ControlFlow::Continue(()), cancel)?;
        Ok(scored.into_iter().map(|(logprobs, attended)| (logprobs, attended.unwrap_or_default())).collect())
    }

    /// [`Model::score`], with what the targets attend to where the model tells it. `on_step` is called after each step of all
    /// targets; [`ControlFlow::Break`] ends the call as a cancellation does.
    ///
    /// # Errors
    /// As [`Model::score`].
    pub fn score_with_progress(
        &self,
        batch: &Batch,
        targets: &[Vec<i64>],
        top: usize,
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
        cancel: &Cancellation,
    ) -> Result<Vec<(Logprobs, Option<CrossAttentions>)>, Error> {
        score(self, batch, targets, top, on_step, cancel)
    }
}

/// See [`Model::score`] and, of models that tell it, [`Model::score_with_attentions`]; `on_step` is called after each step.
pub(crate) fn score(
    model: &Model,
    batch: &Batch,
    targets: &[Vec<i64>],
    top: usize,
    on_step: &mut dyn FnMut() -> ControlFlow<()>,
    cancel: &Cancellation,
) -> Result<Vec<Scored>, Error> {
    let decoder = &model.config().decoder;
    model.check(batch)?;
    check(targets, batch.rows(), decoder.vocab_size, model.vocabulary_subset().map(|subset| &**subset))?;
    let scored = model.vocabulary_subset().map_or(decoder.vocab_size, |subset| subset.tokens().len());
    if top > scored {
        let expected = format!("at most {scored}, the tokens that the model has scores of");
        return Err(Error::input("top_logprobs", expected, top.to_string()));
    }
    let prompts = batch.prompts(model.generation_config().decoder_start_token_id);
    if let Some(profiles) = model.profiles() {
        profiles.check_targets(prompts.length, 1, 1)?;
    }
    let longest = targets.iter().map(Vec::len).max().unwrap_or(0) + prompts.length;
    let (most, limit) = model.longest_target();
    if longest > most {
        let expected = format!("at most {most} target tokens ({limit})");
        let found = format!("{longest}, of which {} are the prompt", prompts.length);
        return Err(Error::input("target_ids", expected, found));
    }

    let need = |row: usize| Need::of_target(batch, row, prompts.length + targets[row].len());
    let pieces = pieces_to_decode(model, batch, prompts.length, need);
    let request = Request { batch, prompts, targets, top };
    cancel.check()?;
    let mut found = Vec::with_capacity(targets.len());
    for rows in pieces {
        found.extend(piece(model, &request, rows, on_step, cancel)?);
    }
    Ok(found)
}

/// What is scored, checked.
struct Request<'r> {
    batch: &'r Batch,
    prompts: Prompts,
    targets: &'r [Vec<i64>],
    top: usize,
}

/// Scores the targets of some rows.
fn piece(
    model: &Model,
    request: &Request,
    of: Range<usize>,
    on_step: &mut dyn FnMut() -> ControlFlow<()>,
    cancel: &Cancellation,
) -> Result<Vec<Scored>, Error> {
    let &Request { batch, ref prompts, targets, top } = request;
    let vocab_size = model.config().decoder.vocab_size;
    let nothing_yet = |row: usize| {
        let attended = model.attends().then(|| CrossAttentions::of_source(batch.source(row).len()));
        (Logprobs::default(), attended)
    };
    let mut found: Vec<Scored> = of.clone().map(nothing_yet).collect();
    let piece = batch.piece(of.clone());
    let sources = model.fit(&piece);
    let encoded = model.run_encoder(&sources, cancel)?;
    let prompts = prompts.piece(of.clone()).widened(sources.rows());
    let (mut state, mut logits) = model.start(encoded, prompts, LogitsRequest::All, cancel)?;
    let mut rows: Vec<usize> = of.clone().collect();
    for step in 0.. {
        let mut said = logits.said()?;
        for (slot, &row) in rows.iter().enumerate() {
            let Said { scores, attended, .. } = said.rows(slot, 1);
            if !scores.iter().all(|score| score.is_finite()) {
                return Err(Error::NotFinite { row, step, dtype: model.manifest().dtype, processor: None });
            }
            let (logprobs, cross_attentions) = &mut found[row - of.start];
            match model.vocabulary_subset() {
                Some(subset) => logprobs.push(&subset.scatter(scores, vocab_size), targets[row][step], top),
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
        logits = model.step(&mut state, tokens, LogitsRequest::All, cancel)?;
    }
    Ok(found)
}

fn check(targets: &[Vec<i64>], rows: usize, vocab_size: usize, subset: Option<&VocabularySubset>) -> Result<(), Error> {
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
        if let Some(at) = subset.and_then(|subset| target.iter().position(|&id| !subset.contains(id))) {
            let expected = "a token that this model keeps (one of kept_tokens.json)";
            return Err(Error::input(format!("target_ids[{row}][{at}]"), expected, target[at].to_string()));
        }
    }
    Ok(())
}
