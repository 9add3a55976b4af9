//! The search over the targets of one source row: candidates in, next tokens and the beams they continue out.
//!
//! A search is a state machine that never sees logits or a model, so that it can be tested with tables of numbers, and
//! batching, streaming and cancellation stay with the loop that drives it. Candidates and their scores come from
//! `scores`.

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

/// Whether a search needs another step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Feed [`Search::next_tokens`] and advance again.
    Continue,
    /// Advance again with candidates of the same step: one group of beams has chosen, the next one is to choose.
    NextGroup,
    /// Further steps cannot change the result.
    Done,
}

/// The search for the targets of one source row. One model step evaluates [`Search::width`] target rows for it.
#[derive(Clone, Debug)]
pub struct Search {
    strategy: Strategy,
    /// The random numbers of sampling; `None` if the best candidates are taken.
    draws: Option<Draws>,
}

#[derive(Clone, Debug)]
enum Strategy {
    Rows(Rows),
    Beam(Beam),
    Groups(Groups),
}

impl Search {
    /// Starts at `prompt`, the decoder's first tokens (at least the start token): beam search if `num_beams` is more
    /// than 1, diverse beam search if `num_beam_groups` is, otherwise greedy search. With `do_sample` it draws from the
    /// seed of the options, or as [`Search::drawing`] says.
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

    /// Has a search that samples draw from `draws`.
    pub fn drawing(self, draws: Draws) -> Search {
        Search { draws: self.draws.map(|_| draws), ..self }
    }

    /// Number of target rows that one step evaluates: the beams, or the targets that have not ended.
    pub fn width(&self) -> usize {
        match &self.strategy {
            Strategy::Rows(rows) => rows.width(),
            Strategy::Beam(beam) => beam.width(),
            Strategy::Groups(groups) => groups.width(),
        }
    }

    /// Number of candidates that a step needs; fewer only where fewer exist.
    pub fn candidates(&self) -> usize {
        match &self.strategy {
            Strategy::Rows(rows) => rows.candidates(),
            Strategy::Beam(beam) => beam.candidates(),
            Strategy::Groups(groups) => groups.candidates(),
        }
    }

    /// The rows that the next candidates continue: all, or those of the group of beams that chooses next.
    pub(crate) fn rows(&self) -> Range<usize> {
        match &self.strategy {
            Strategy::Groups(groups) => groups.rows(),
            _ => 0..self.width(),
        }
    }

    /// The tokens that earlier groups of beams have chosen in this step.
    pub(crate) fn chosen(&self) -> &[i64] {
        match &self.strategy {
            Strategy::Groups(groups) => groups.chosen(),
            _ => &[],
        }
    }

    /// Whether candidates are compared across rows: in beam search, and in the first step of `return_alternatives`.
    /// Otherwise each row needs one of its own.
    pub(crate) fn compares_rows(&self) -> bool {
        match &self.strategy {
            Strategy::Rows(rows) => rows.branches(),
            Strategy::Beam(_) | Strategy::Groups(_) => true,
        }
    }

    /// Whether scores are summed log-probabilities, as in beam search.
    pub(crate) fn sums_log_probabilities(&self) -> bool {
        !matches!(self.strategy, Strategy::Rows(_))
    }

    /// The random numbers that this step's candidates are drawn with; `None` if they are the best, as the first tokens
    /// of `return_alternatives` always are.
    pub(crate) fn draws(&self) -> Option<&Draws> {
        match &self.strategy {
            Strategy::Rows(rows) if rows.branches() => None,
            _ => self.draws.as_ref(),
        }
    }

    /// The index that distinguishes the draws of a row from those of the other rows of its source.
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

    /// The tokens that are certain to begin the first hypothesis, from its generated token `from` on.
    pub fn settled(&self, from: usize) -> &[i64] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.first().get(from..).unwrap_or(&[]),
            Strategy::Beam(beam) => beam.settled(from),
            Strategy::Groups(groups) => groups.settled(from),
        }
    }

    /// Takes one step's candidates: best first, or one for each row. Must not be called again after [`Progress::Done`].
    ///
    /// # Panics
    /// If there is no candidate, or if one continues a beam that does not exist.
    pub fn advance(&mut self, candidates: &[Candidate]) -> Progress {
        self.advance_to_ends(candidates, &[])
    }

    /// [`Search::advance`], where `ends` tells which candidates end their target for a reason unknown to the search;
    /// candidates beyond its length do not. A target ends without the candidate's token if the reason is
    /// [`FinishReason::Constraint`].
    ///
    /// # Panics
    /// See [`Search::advance`].
    pub fn advance_to_ends(&mut self, candidates: &[Candidate], ends: &[Option<FinishReason>]) -> Progress {
        self.advance_to_covered_ends(candidates, ends, &[])
    }

    /// [`Search::advance_to_ends`] with a term for each row in `endings`, which is added to the score of a hypothesis
    /// whose last token continues that row; empty for none. Running beams are compared with finished ones as if they
    /// ended now or, with `early_stopping` never, as if their term were 0, its maximum.
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

    /// The tokens to feed in the next step, one for each row. Before the first step: the last token of the prompt.
    pub fn next_tokens(&self) -> &[i64] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.next_tokens(),
            Strategy::Beam(beam) => beam.next_tokens(),
            Strategy::Groups(groups) => groups.next_tokens(),
        }
    }

    /// The row of the previous step that each row of the next step continues: the order for the rows of the
    /// self-attention cache.
    pub fn parents(&self) -> &[usize] {
        match &self.strategy {
            Strategy::Rows(rows) => rows.parents(),
            Strategy::Beam(beam) => beam.parents(),
            Strategy::Groups(groups) => groups.parents(),
        }
    }

    /// The `num_return_sequences` hypotheses, those of beam search best first. Before [`Progress::Done`], unfinished
    /// hypotheses of a beam search are empty, and those of other searches are the targets so far.
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
