//! The search over target sequences of one source row: candidates in, next tokens and the beams they continue out.
//!
//! A search is a state machine that never sees logits or a model, so it can be tested by tables of numbers, and
//! batching, streaming and cancellation stay with the loop that drives it. What the candidates of a step are worth is
//! the business of `scores`. Standard library only.

mod beam;
mod groups;
mod rows;

use std::ops::Range;

use crate::draws::Draws;
use crate::hypothesis::{FinishReason, Hypothesis};
use crate::options::GenerationConfig;
use beam::Beam;
use groups::Groups;
use rows::Rows;

/// One way of continuing one beam by one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The beam of this search that is continued.
    pub parent: usize,
    /// The token it is continued by.
    pub token: i64,
    /// Beam search: the summed log-probability of the continued beam. Otherwise: the token's processed logit.
    pub score: f32,
}

/// Whether a search wants another step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Feed [`Search::next_tokens`] and advance again.
    Continue,
    /// Advance again with candidates of the same step: a group of beams has chosen, the next is to.
    Turn,
    /// Nothing that follows can change the result.
    Done,
}

/// The search for the targets of one source row. One model step evaluates [`Search::width`] target rows for it.
#[derive(Clone, Debug)]
pub struct Search {
    strategy: Strategy,
    /// What sampling draws from; `None` where the best is taken.
    draws: Option<Draws>,
}

#[derive(Clone, Debug)]
enum Strategy {
    Rows(Rows),
    Beam(Beam),
    Groups(Groups),
}

impl Search {
    /// Starts at `prompt`, the decoder's first tokens (at least the start token): beam search if `num_beams` is more than
    /// 1, diverse if `num_beam_groups` is, else greedy; with `do_sample`, drawing as [`Search::drawing`] says or else from the options' seed alone.
    pub fn new(options: &GenerationConfig, prompt: &[i64]) -> Search {
        if options.num_beam_groups > 1 {
            return Search { strategy: Strategy::Groups(Groups::new(options, prompt)), draws: None };
        }
        if options.num_beams > 1 {
            return Search::beam(options, prompt);
        }
        Search { strategy: Strategy::Rows(Rows::new(options, prompt)), draws: draws(options) }
    }

    /// Starts a beam search at `prompt`, also if `num_beams` is 1.
    pub fn beam(options: &GenerationConfig, prompt: &[i64]) -> Search {
        Search { strategy: Strategy::Beam(Beam::new(options, prompt)), draws: draws(options) }
    }

    /// Where the search samples, makes it draw from `draws`.
    pub fn drawing(self, draws: Draws) -> Search {
        Search { draws: self.draws.map(|_| draws), ..self }
    }

    /// Target rows that one step evaluates: the beams, or the targets that have not ended.
    pub fn width(&self) -> usize {
        match &self.strategy {
            Strategy::Rows(rows) => rows.width(),
            Strategy::Beam(beam) => beam.width(),
            Strategy::Groups(groups) => groups.width(),
        }
    }

    /// How many candidates a step needs; fewer only where fewer exist.
    pub fn candidates(&self) -> usize {
        match &self.strategy {
            Strategy::Rows(rows) => rows.candidates(),
            Strategy::Beam(beam) => beam.candidates(),
            Strategy::Groups(groups) => groups.candidates(),
        }
    }

    /// The rows that this step's candidates continue: all, or those of the group of beams that chooses next.
    pub(crate) fn rows(&self) -> Range<usize> {
        match &self.strategy {
            Strategy::Groups(groups) => groups.rows(),
            _ => 0..self.width(),
        }
    }

    /// What groups of beams chose before in this step.
    pub(crate) fn chosen(&self) -> &[i64] {
        match &self.strategy {
            Strategy::Groups(groups) => groups.chosen(),
            _ => &[],
        }
    }

    /// Whether candidates are compared across rows: those of beam search, whose scores are summed log-probabilities, and
    /// the first ones of alternatives. Otherwise each row needs one of its own.
    pub(crate) fn compares_rows(&self) -> bool {
        match &self.strategy {
            Strategy::Rows(rows) => rows.branches(),
            Strategy::Beam(_) | Strategy::Groups(_) => true,
        }
    }

    /// Whether scores are summed log-probabilities.
    pub(crate) fn sums_log_probabilities(&self) -> bool {
        !matches!(self.strategy, Strategy::Rows(_))
    }

    /// What this step's candidates are drawn from; `None` where they are the best. The first tokens of alternatives are.
    pub(crate) fn draws(&self) -> Option<&Draws> {
        match &self.strategy {
            Strategy::Rows(rows) if rows.branches() => None,
            _ => self.draws.as_ref(),
        }
    }

    /// What tells the draws of one row from those of the others of its source.
    pub(crate) fn lane(&self, row: usize) -> u32 {
        match &self.strategy {
            Strategy::Rows(rows) => rows.target(row) as u32,
            Strategy::Beam(_) | Strategy::Groups(_) => row as u32,
        }
    }

    /// Prompt and generated tokens of a row of the next step.
    pub fn history(&self, row: usize) -> &[i64] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.history(row),
            Strategy::Beam(beam) => beam.history(row),
            Strategy::Groups(groups) => groups.history(row),
        }
    }

    /// Summed log-probability of a beam; 0 without beams.
    pub fn running_score(&self, beam: usize) -> f32 {
        match &self.strategy {
            Strategy::Rows(_) => 0.0,
            Strategy::Beam(search) => search.running_score(beam),
            Strategy::Groups(groups) => groups.running_score(beam),
        }
    }

    /// What is certain to be the beginning of the first hypothesis, from its generated token `from` on.
    pub fn settled(&self, from: usize) -> &[i64] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.first().get(from..).unwrap_or(&[]),
            Strategy::Beam(beam) => beam.settled(from),
            Strategy::Groups(groups) => groups.settled(from),
        }
    }

    /// Takes one step's candidates: best first, or one for each row. Not to be called again once it answered
    /// [`Progress::Done`].
    ///
    /// # Panics
    /// If there is no candidate, or one continues a beam that does not exist.
    pub fn advance(&mut self, candidates: &[Candidate]) -> Progress {
        self.advance_to_ends(candidates, &[])
    }

    /// [`Search::advance`], where `ends` says which candidates end their target for a reason that the search does not
    /// know. Candidates beyond its length do not. One that ends by [`FinishReason::Constraint`] is none: its target ends as
    /// it is.
    ///
    /// # Panics
    /// See [`Search::advance`].
    pub fn advance_to_ends(&mut self, candidates: &[Candidate], ends: &[Option<FinishReason>]) -> Progress {
        self.advance_to_covered_ends(candidates, ends, &[])
    }

    /// [`Search::advance_to_ends`] of a search whose hypotheses get `endings` besides their scores, according to the row that
    /// their last token continues; if empty, none do. Running beams are compared with what has finished as if they ended now,
    /// or with `early_stopping` never as if they were going to get 0, the most that there is.
    pub(crate) fn advance_to_covered_ends(
        &mut self,
        candidates: &[Candidate],
        ends: &[Option<FinishReason>],
        endings: &[f32],
    ) -> Progress {
        match &mut self.strategy {
            Strategy::Rows(rows) => rows.advance(candidates, ends),
            Strategy::Beam(beam) => beam.advance(candidates, ends, endings),
            Strategy::Groups(groups) => groups.advance(candidates, ends, endings),
        }
    }

    /// The tokens to feed in the next step, one per row. Before the first step: the last token of the prompt.
    pub fn next_tokens(&self) -> &[i64] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.next_tokens(),
            Strategy::Beam(beam) => beam.next_tokens(),
            Strategy::Groups(groups) => groups.next_tokens(),
        }
    }

    /// The row of the step before that each row of the next step continues: the order the self cache must be brought into.
    pub fn parents(&self) -> &[usize] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.parents(),
            Strategy::Beam(beam) => beam.parents(),
            Strategy::Groups(groups) => groups.parents(),
        }
    }

    /// The `num_return_sequences` hypotheses, of beam search the best first. Of a beam search that is not done, those that
    /// have not finished yet come back empty; of others, what there is so far.
    pub fn finish(self) -> Vec<Hypothesis> {
        match self.strategy {
            Strategy::Rows(rows) => rows.finish(),
            Strategy::Beam(beam) => beam.finish(),
            Strategy::Groups(groups) => groups.finish(),
        }
    }
}

fn draws(options: &GenerationConfig) -> Option<Draws> {
    options.do_sample.then(|| Draws::new(options.seed.unwrap_or(0), 0, []))
}
