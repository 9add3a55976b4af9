//! `Model::score`: the log-probabilities of given targets, by teacher forcing through the cached decoder steps, one
//! token a step. Rows leave as their targets end.

use std::ops::{ControlFlow, Range};

use t5gemma_kernels::LogitsRequest;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::{CrossAttentions, Logprobs};
use crate::memory::{Footprint, pieces_to_decode};
use crate::model::{Lane, Model, TargetLimit};
use crate::step_output::StepOutput;
use crate::vocabulary_subset::VocabularySubset;

/// A scored target.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct TargetScore {
    /// The log-probabilities of its tokens.
    pub logprobs: Logprobs,
    /// The cross-attentions of its tokens, if the model was exported with alignment.
    pub cross_attentions: Option<CrossAttentions>,
}

impl Model {
    /// Scores given targets, one per source: the log-probabilities of their tokens (including the end token if
    /// present), and of the `top` most likely tokens at each position. Targets continue the decoder prompts of `batch`,
    /// or the start token.
    ///
    /// # Errors
    /// Not one target per source, an empty target, tokens outside the vocabularies, lengths that do not fit the model,
    /// logits that are not finite, or a cancellation.
    pub fn score(
        &self,
        batch: &Batch,
        targets: &[Vec<i64>],
        top: usize,
        cancel: &Cancellation,
    ) -> Result<Vec<TargetScore>, Error> {
        self.score_with_progress(batch, targets, top, &mut || ControlFlow::Continue(()), cancel)
    }

    /// [`Model::score`], with a call of `on_step` after each step; [`ControlFlow::Break`] ends the call as a
    /// cancellation does.
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
    ) -> Result<Vec<TargetScore>, Error> {
        self.check(batch)?;
        let (vocab_size, subset) = (self.facts().decoder.vocab_size, self.vocabulary_subset());
        check(targets, batch.rows(), vocab_size, subset.map(|subset| &**subset))?;
        let most = subset.map_or(vocab_size, |subset| subset.tokens().len());
        if top > most {
            let expected = format!("at most {most}, the number of tokens with logits");
            return Err(Error::input("top_logprobs", expected, top.to_string()));
        }
        let prompts = batch.prompts(self.generation_config().decoder_start_token_id);
        self.check_targets(batch, prompts.length)?;
        if let Some(profiles) = self.profiles() {
            profiles.check_targets(prompts.length, 1, 1)?;
        }
        let longest = targets.iter().map(Vec::len).max().unwrap_or(0) + prompts.length;
        let TargetLimit { tokens, reason } = self.target_limit();
        if longest > tokens {
            let expected = format!("at most {tokens} target tokens ({reason})");
            let found = format!("{longest} ({} of them in the prompt)", prompts.length);
            return Err(Error::input("target_ids", expected, found));
        }

        let footprint = |row: usize| Footprint::of_target(batch, row, prompts.length + targets[row].len());
        let pieces = pieces_to_decode(self, batch, prompts.length, footprint);
        let call = ScoreCall { model: self, batch, prompts, targets, top };
        cancel.check()?;
        let mut scores = Vec::with_capacity(targets.len());
        for rows in pieces {
            scores.extend(call.score(rows, on_step, cancel)?);
        }
        Ok(scores)
    }
}

/// Targets that were checked, with what they are scored by.
struct ScoreCall<'c> {
    model: &'c Model,
    batch: &'c Batch,
    prompts: Prompts,
    targets: &'c [Vec<i64>],
    top: usize,
}

impl ScoreCall<'_> {
    /// Scores the targets of a piece.
    fn score(
        &self,
        piece: Range<usize>,
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
        cancel: &Cancellation,
    ) -> Result<Vec<TargetScore>, Error> {
        let &ScoreCall { model, batch, targets, top, .. } = self;
        let vocab_size = model.facts().decoder.vocab_size;
        let empty = |row: usize| TargetScore {
            logprobs: Logprobs::default(),
            cross_attentions: (model.has_cross_attentions())
                .then(|| CrossAttentions::of_source(batch.source(row).len())),
        };
        let mut scores: Vec<TargetScore> = piece.clone().map(empty).collect();
        let sources = batch.piece(piece.clone());
        let sources = model.fit(&sources);
        let encoded = model.run_encoder(Lane::Main, &sources, cancel)?;
        let prompts = self.prompts.piece(piece.clone()).widened(sources.rows());
        let (mut state, mut tensors) = model.prefill(Lane::Main, encoded, prompts, LogitsRequest::All, cancel)?;
        let mut rows: Vec<usize> = piece.clone().collect();
        for step in 0.. {
            let mut output = tensors.output()?;
            for (slot, &row) in rows.iter().enumerate() {
                let StepOutput { logits, cross_attentions, .. } = output.rows(slot, 1);
                if !logits.iter().all(|logit| logit.is_finite()) {
                    return Err(Error::NotFinite { row, step, dtype: model.manifest().dtype, processor: None });
                }
                let score = &mut scores[row - piece.start];
                match model.vocabulary_subset() {
                    Some(subset) => {
                        score.logprobs.push(&subset.scatter(logits, vocab_size), targets[row][step], top);
                    }
                    None => score.logprobs.push(logits, targets[row][step], top),
                }
                score.cross_attentions.iter_mut().for_each(|found| found.push(cross_attentions));
            }
            if on_step().is_break() {
                return Err(Error::Cancelled);
            }
            let running: Vec<usize> = (0..rows.len()).filter(|&slot| targets[rows[slot]].len() > step + 1).collect();
            if running.is_empty() {
                cancel.check()?;
                break;
            }
            state.select(&running, &running)?;
            rows = running.iter().map(|&slot| rows[slot]).collect();
            let tokens = rows.iter().map(|&row| targets[row][step]).collect();
            tensors = model.step(&mut state, tokens, LogitsRequest::All, cancel)?;
        }
        Ok(scores)
    }
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
