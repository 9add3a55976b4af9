//! The search over target sequences of one source row: candidates in, next tokens and the beams they continue out.
//!
//! A search is a state machine that never sees logits or a model, so it can be tested by tables of numbers, and
//! batching, streaming and cancellation stay with the loop that drives it. What the candidates of a step are worth is
//! the business of `scores`. Standard library only.

mod beam;
mod greedy;

use crate::options::GenerationOptions;
use beam::Beam;
use greedy::Greedy;

/// One way of continuing one beam by one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The beam of this search that is continued.
    pub parent: usize,
    /// The token it is continued by.
    pub token: i64,
    /// Beam search: the summed log-probability of the continued beam. Greedy: the token's logit.
    pub score: f32,
}

/// Why a hypothesis ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// Its last token is an end-of-sequence token.
    Eos,
    /// It is as long as the options allow.
    Length,
}

impl FinishReason {
    /// Names the reason as results spell it: `eos` or `length`.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Eos => "eos",
            FinishReason::Length => "length",
        }
    }

    fn of(tokens: &[i64], eos: &[i64]) -> FinishReason {
        match tokens.last() {
            Some(last) if eos.contains(last) => FinishReason::Eos,
            _ => FinishReason::Length,
        }
    }
}

/// One generated target.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The generated tokens: without the prompt, without filling, with the end-of-sequence token if there is one.
    pub tokens: Vec<i64>,
    /// Summed log-probability divided by `length^length_penalty`, Hugging Face's `sequences_scores`; beam search only.
    pub score: Option<f32>,
    /// Why it ends.
    pub finish_reason: FinishReason,
}

/// Whether a search wants another step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Feed [`Search::next_tokens`] and advance again.
    Continue,
    /// Nothing that follows can change the result.
    Done,
}

/// The search for the targets of one source row. One model step evaluates [`Search::width`] target rows for it.
#[derive(Clone, Debug)]
pub struct Search(Strategy);

#[derive(Clone, Debug)]
enum Strategy {
    Greedy(Greedy),
    Beam(Beam),
}

impl Search {
    /// Starts at `prompt`, the decoder's first tokens (at least the start token): greedy if `num_beams` is 1, else beam search.
    pub fn new(options: &GenerationOptions, prompt: &[i64]) -> Search {
        Search(match options.num_beams {
            0 | 1 => Strategy::Greedy(Greedy::new(options, prompt)),
            _ => return Search::beam(options, prompt),
        })
    }

    /// Starts a beam search at `prompt`, also if `num_beams` is 1.
    pub fn beam(options: &GenerationOptions, prompt: &[i64]) -> Search {
        Search(Strategy::Beam(Beam::new(options, prompt)))
    }

    /// Target rows that one step evaluates: 1, or `num_beams`.
    pub fn width(&self) -> usize {
        match &self.0 {
            Strategy::Greedy(_) => 1,
            Strategy::Beam(beam) => beam.width(),
        }
    }

    /// How many candidates a step needs; fewer only where fewer exist.
    pub fn candidates(&self) -> usize {
        match &self.0 {
            Strategy::Greedy(_) => 1,
            Strategy::Beam(beam) => beam.candidates(),
        }
    }

    /// Whether candidates are compared across beams, which makes their scores summed log-probabilities.
    pub(crate) fn sums_log_probabilities(&self) -> bool {
        matches!(self.0, Strategy::Beam(_))
    }

    /// Prompt and generated tokens of a beam.
    pub fn history(&self, beam: usize) -> &[i64] {
        match &self.0 {
            Strategy::Greedy(greedy) => greedy.history(),
            Strategy::Beam(search) => search.history(beam),
        }
    }

    /// Summed log-probability of a beam; 0 for greedy search.
    pub fn running_score(&self, beam: usize) -> f32 {
        match &self.0 {
            Strategy::Greedy(_) => 0.0,
            Strategy::Beam(search) => search.running_score(beam),
        }
    }

    /// Takes one step's candidates, best first. Not to be called again once it answered [`Progress::Done`].
    ///
    /// # Panics
    /// If there is no candidate, or one continues a beam that does not exist.
    pub fn advance(&mut self, candidates: &[Candidate]) -> Progress {
        match &mut self.0 {
            Strategy::Greedy(greedy) => greedy.advance(candidates),
            Strategy::Beam(beam) => beam.advance(candidates),
        }
    }

    /// The tokens to feed in the next step, one per row. Before the first step: the last token of the prompt.
    pub fn next_tokens(&self) -> &[i64] {
        match &self.0 {
            Strategy::Greedy(greedy) => greedy.next_tokens(),
            Strategy::Beam(beam) => beam.next_tokens(),
        }
    }

    /// The beam each row of the next step continues, one per row: the order the self cache must be brought into.
    pub fn parents(&self) -> &[usize] {
        match &self.0 {
            Strategy::Greedy(_) => &[0],
            Strategy::Beam(beam) => beam.parents(),
        }
    }

    /// The `num_return_sequences` hypotheses, best first. Of a beam search that is not done, those that have not
    /// finished yet come back empty; of a greedy search, what there is so far.
    pub fn finish(self) -> Vec<Hypothesis> {
        match self.0 {
            Strategy::Greedy(greedy) => vec![greedy.finish()],
            Strategy::Beam(beam) => beam.finish(),
        }
    }
}
