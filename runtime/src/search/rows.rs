//! Targets that do not compete: one by greedy search, several by sampling, or several that start with the best first
//! tokens. Each ends on its own, and ended targets are not part of further steps.

use super::{Candidate, Progress};
use crate::hypothesis::{FinishReason, Hypothesis};
use crate::options::GenerationConfig;

#[derive(Clone, Debug)]
pub(super) struct Rows {
    targets: Vec<Target>,
    /// The indices in `targets` of those that have not ended.
    live: Vec<usize>,
    /// How the last step continued the live targets.
    next_tokens: Vec<i64>,
    parents: Vec<usize>,
    /// Whether each target starts with a first token of its own (`return_alternatives`).
    branches: bool,
    prompt_len: usize,
    max_length: usize,
    eos: Vec<i64>,
}

#[derive(Clone, Debug)]
struct Target {
    history: Vec<i64>,
    finish_reason: FinishReason,
}

impl Rows {
    pub(super) fn new(options: &GenerationConfig, prompt: &[i64]) -> Rows {
        let count = options.num_return_sequences;
        Rows {
            targets: vec![Target { history: prompt.to_vec(), finish_reason: FinishReason::Length }; count],
            live: (0..count).collect(),
            next_tokens: vec![prompt.last().copied().unwrap_or_default(); count],
            parents: vec![0; count],
            branches: options.return_alternatives,
            prompt_len: prompt.len(),
            max_length: options.max_length(prompt.len()),
            eos: options.eos_token_id.clone(),
        }
    }

    /// Before the first step all targets are equal.
    fn is_start(&self) -> bool {
        self.targets[0].history.len() == self.prompt_len
    }

    pub(super) fn width(&self) -> usize {
        if self.branches && self.is_start() { 1 } else { self.live.len() }
    }

    pub(super) fn candidates(&self) -> usize {
        self.live.len()
    }

    /// Whether this step's candidates all continue one row.
    pub(super) fn branches(&self) -> bool {
        self.branches && self.is_start()
    }

    /// The target that a row of the next step continues.
    pub(super) fn target(&self, row: usize) -> usize {
        self.live[row]
    }

    pub(super) fn history(&self, row: usize) -> &[i64] {
        &self.targets[self.live[row]].history
    }

    pub(super) fn next_tokens(&self) -> &[i64] {
        &self.next_tokens[..self.width()]
    }

    pub(super) fn parents(&self) -> &[usize] {
        &self.parents
    }

    /// The generated tokens of the first target.
    pub(super) fn first(&self) -> &[i64] {
        &self.targets[0].history[self.prompt_len..]
    }

    pub(super) fn advance(&mut self, candidates: &[Candidate], ends: &[Option<FinishReason>]) -> Progress {
        self.live.truncate(candidates.len());
        self.targets.truncate(if self.is_start() { candidates.len() } else { self.targets.len() });
        self.next_tokens.clear();
        self.parents.clear();
        let mut going_on = Vec::with_capacity(self.live.len());
        for (index, (&live, candidate)) in self.live.iter().zip(candidates).enumerate() {
            let target = &mut self.targets[live];
            let given_end = ends.get(index).copied().flatten();
            if given_end == Some(FinishReason::Constraint) {
                target.finish_reason = FinishReason::Constraint;
                continue;
            }
            target.history.push(candidate.token);
            let end = match given_end {
                _ if self.eos.contains(&candidate.token) => Some(FinishReason::Eos),
                Some(end) => Some(end),
                None if target.history.len() >= self.max_length => Some(FinishReason::Length),
                None => None,
            };
            match end {
                Some(reason) => target.finish_reason = reason,
                None => {
                    going_on.push(live);
                    self.next_tokens.push(candidate.token);
                    self.parents.push(candidate.parent);
                }
            }
        }
        self.live = going_on;
        if self.live.is_empty() { Progress::Done } else { Progress::Continue }
    }

    pub(super) fn finish(self) -> Vec<Hypothesis> {
        let hypothesis = |Target { mut history, finish_reason }| {
            let tokens = history.split_off(self.prompt_len);
            Hypothesis { tokens, score: None, finish_reason, logprobs: None, cross_attentions: None }
        };
        self.targets.into_iter().map(hypothesis).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::EarlyStopping;
    use crate::search::Search;

    #[test]
    fn a_greedy_search_ends_at_an_eos_token_or_at_the_maximum_length() {
        // name, prompt, eos tokens, new tokens allowed, what the model says, what is generated, why it ends
        type Case = (&'static str, &'static [i64], &'static [i64], usize, &'static [i64], &'static [i64], FinishReason);
        let cases: &[Case] = &[
            ("eos is kept", &[2], &[1], 9, &[5, 6, 1, 7], &[5, 6, 1], FinishReason::Eos),
            ("any of several", &[2], &[1, 6], 9, &[5, 6, 1], &[5, 6], FinishReason::Eos),
            ("length", &[2], &[1], 3, &[5, 6, 7, 8], &[5, 6, 7], FinishReason::Length),
            ("eos at the last place", &[2], &[1], 3, &[5, 6, 1], &[5, 6, 1], FinishReason::Eos),
            ("eos in the prompt does not count", &[2, 1], &[1], 2, &[5, 6], &[5, 6], FinishReason::Length),
            ("no eos at all", &[2], &[], 2, &[1, 1], &[1, 1], FinishReason::Length),
        ];
        for &(name, prompt, eos, max_new_tokens, says, tokens, finish_reason) in cases {
            let options = GenerationConfig {
                max_new_tokens: Some(max_new_tokens),
                eos_token_id: eos.to_vec(),
                early_stopping: EarlyStopping::False,
                ..GenerationConfig::default()
            };
            let mut search = Search::new(&options, prompt);
            assert_eq!((search.width(), search.candidates(), search.parents()), (1, 1, &[0][..]), "{name}");
            assert_eq!(search.next_tokens(), &prompt[prompt.len() - 1..], "{name}");
            for (step, &token) in says.iter().enumerate() {
                let progress = search.advance(&[Candidate { parent: 0, token, score: 0.5 }]);
                assert_eq!(search.settled(0)[step..], [token], "{name}");
                assert_eq!(progress == Progress::Done, step + 1 == tokens.len(), "{name}: step {step}");
                if progress == Progress::Done {
                    break;
                }
            }
            let tokens = tokens.to_vec();
            let hypothesis = Hypothesis { tokens, score: None, finish_reason, logprobs: None, cross_attentions: None };
            assert_eq!(search.finish(), [hypothesis], "{name}");
        }
    }

    #[test]
    fn samples_end_each_on_its_own() {
        let options = GenerationConfig {
            do_sample: true,
            num_return_sequences: 3,
            max_new_tokens: Some(3),
            ..GenerationConfig::default()
        };
        let mut search = Search::new(&options, &[2]);
        let take = |search: &mut Search, tokens: &[i64]| {
            let candidate = |(parent, &token)| Candidate { parent, token, score: 0.0 };
            let candidates: Vec<Candidate> = tokens.iter().enumerate().map(candidate).collect();
            search.advance(&candidates)
        };
        assert_eq!(search.width(), 3);
        assert_eq!(take(&mut search, &[5, 1, 6]), Progress::Continue);
        assert_eq!((search.width(), search.next_tokens(), search.parents()), (2, &[5, 6][..], &[0, 2][..]));
        assert_eq!((search.history(1), search.lane(1)), (&[2, 6][..], 2));
        assert_eq!(take(&mut search, &[1, 7]), Progress::Continue);
        assert_eq!((search.width(), search.next_tokens(), search.parents()), (1, &[7][..], &[1][..]));
        assert_eq!(take(&mut search, &[8]), Progress::Done);
        let hypothesis = |tokens: &[i64], finish_reason| Hypothesis {
            tokens: tokens.to_vec(),
            score: None,
            finish_reason,
            logprobs: None,
            cross_attentions: None,
        };
        let expected = [
            hypothesis(&[5, 1], FinishReason::Eos),
            hypothesis(&[1], FinishReason::Eos),
            hypothesis(&[6, 7, 8], FinishReason::Length),
        ];
        assert_eq!(search.finish(), expected);
    }

    #[test]
    fn alternatives_begin_with_the_candidates_of_one_row() {
        let options =
            GenerationConfig { return_alternatives: true, num_return_sequences: 3, ..GenerationConfig::default() };
        let mut search = Search::new(&options, &[2, 9]);
        assert_eq!((search.width(), search.candidates()), (1, 3));
        let candidates = [7, 1, 5].map(|token| Candidate { parent: 0, token, score: 0.0 });
        assert_eq!(search.advance(&candidates), Progress::Continue);
        assert_eq!((search.width(), search.next_tokens(), search.parents()), (2, &[7, 5][..], &[0, 0][..]));
        let next = [(0, 1), (1, 1)].map(|(parent, token)| Candidate { parent, token, score: 0.0 });
        assert_eq!(search.advance(&next), Progress::Done);
        let tokens: Vec<Vec<i64>> = search.finish().into_iter().map(|hypothesis| hypothesis.tokens).collect();
        assert_eq!(tokens, [vec![7, 1], vec![1], vec![5, 1]]);
    }

    #[test]
    fn another_end_counts_where_the_search_itself_goes_on() {
        let options = GenerationConfig { do_sample: true, num_return_sequences: 2, ..GenerationConfig::default() };
        let mut search = Search::new(&options, &[2]);
        let candidates = [(0, 1), (1, 7)].map(|(parent, token)| Candidate { parent, token, score: 0.0 });
        let ends = [Some(FinishReason::StopString); 2];
        assert_eq!(search.advance_to_ends(&candidates, &ends), Progress::Done);
        let reasons: Vec<FinishReason> = search.finish().iter().map(|hypothesis| hypothesis.finish_reason).collect();
        assert_eq!(reasons, [FinishReason::Eos, FinishReason::StopString]);
    }
}
