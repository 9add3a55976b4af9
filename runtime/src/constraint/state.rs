//! `ConstraintState`: tracks a [`Constraint`] along the targets of one source row and filters their next tokens.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::matcher::Matcher;
use super::{Constraint, State};
use crate::error::Error;
use crate::hypothesis::{FinishReason, Hypothesis};
use crate::options::GenerationConfig;
use crate::scores::TokenFilter;
use crate::search::{Candidate, Search};

/// The states of a constraint for the targets of one source row.
pub(crate) struct ConstraintState {
    constraint: Arc<Constraint>,
    row: usize,
    cache: Mutex<Cache>,
}

/// The states of targets by their tokens; `None` for a target that is not allowed.
#[derive(Default)]
struct Cache {
    /// The length of the targets in `current`; those in `previous` are one token shorter.
    length: usize,
    current: HashMap<Vec<i64>, Option<State>>,
    previous: HashMap<Vec<i64>, Option<State>>,
    /// Why the filter failed, until the next candidates are taken.
    failure: Option<String>,
    /// The best target of a beam search in the step in which no beam could be continued.
    dead_end: Option<DeadEnd>,
}

#[derive(Default)]
struct DeadEnd {
    tokens: Vec<i64>,
    score: f32,
}

impl Cache {
    /// The state of a target with these generated tokens.
    fn state(&mut self, constraint: &Constraint, generated: &[i64]) -> Result<Option<&mut State>, String> {
        if generated.len() != self.length {
            let continues = generated.len() == self.length + 1;
            self.previous = if continues { std::mem::take(&mut self.current) } else { HashMap::new() };
            self.current.clear();
            self.length = generated.len();
        }
        if !self.current.contains_key(generated) {
            let cached = generated.split_last().and_then(|(_, parent)| self.previous.get(parent));
            let (mut state, rest) = match cached {
                Some(parent) => (parent.clone(), &generated[generated.len() - 1..]),
                None => (Some(constraint.start.clone()), generated),
            };
            for &token in rest {
                state = match &state {
                    Some(state) => constraint.advance(state, token)?,
                    None => None,
                };
            }
            self.current.insert(generated.to_vec(), state);
        }
        Ok(self.current.get_mut(generated).and_then(Option::as_mut))
    }
}

impl fmt::Debug for ConstraintState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConstraintState").field("row", &self.row).finish_non_exhaustive()
    }
}

impl TokenFilter for ConstraintState {
    fn apply(&self, scores: &mut [f32], history: &[i64]) {
        let mut cache = self.cache();
        let generated = &history[self.constraint.prompt_len..];
        let filtered = match cache.state(&self.constraint, generated) {
            Ok(Some(state)) => self.constraint.filter(self.row, state, history, scores),
            Ok(None) => {
                scores.fill(f32::NEG_INFINITY);
                Ok(())
            }
            Err(failure) => Err(failure),
        };
        if let Err(failure) = filtered {
            cache.failure.get_or_insert(failure);
        }
    }
}

impl ConstraintState {
    /// The start of a source row.
    pub(crate) fn new(constraint: &Arc<Constraint>, row: usize) -> ConstraintState {
        ConstraintState { constraint: constraint.clone(), row, cache: Mutex::default() }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a target with these generated tokens, without an end-of-sequence token, satisfies the constraint.
    fn is_satisfied(&self, generated: &[i64]) -> bool {
        let mut cache = self.cache();
        match cache.state(&self.constraint, generated) {
            Ok(Some(state)) => state.iter_mut().all(Matcher::is_satisfied),
            _ => false,
        }
    }

    /// Marks forbidden candidates of a step as ends: their targets end without them.
    pub(crate) fn take(
        &self,
        candidates: &mut Vec<Candidate>,
        ends: &mut Vec<Option<FinishReason>>,
        search: &Search,
    ) -> Result<(), Error> {
        let mut cache = self.cache();
        if let Some(problem) = cache.failure.take() {
            return Err(Error::Constraint { row: self.row, problem });
        }
        let is_forbidden = |candidate: &Candidate| candidate.score == f32::NEG_INFINITY;
        let are_all_forbidden = candidates.iter().all(is_forbidden);
        if search.compares_rows() && !search.sums_log_probabilities() && !are_all_forbidden {
            // Fewer tokens are allowed first than alternatives were requested.
            let kept = candidates.iter().take_while(|candidate| !is_forbidden(candidate)).count();
            candidates.truncate(kept);
        }
        if search.sums_log_probabilities() && are_all_forbidden {
            let best = search.rows().start;
            let (history, score) = (search.history(best), search.running_score(best));
            let tokens = || history[self.constraint.prompt_len..].to_vec();
            cache.dead_end.get_or_insert_with(|| DeadEnd { tokens: tokens(), score });
        }
        if candidates.iter().any(is_forbidden) {
            ends.resize(candidates.len(), None);
            for (candidate, end) in candidates.iter().zip(ends) {
                if is_forbidden(candidate) {
                    *end = Some(FinishReason::Constraint);
                }
            }
        }
        Ok(())
    }

    /// Corrects the finish reasons of a finished search's hypotheses. Those of beams are deduplicated, and those that
    /// satisfy the constraint come first. Beams that found no target are dropped, so that there may be fewer than were
    /// requested. `ending` is what the score of a target gets besides, such as a coverage penalty.
    pub(crate) fn rank(
        &self,
        mut found: Vec<Hypothesis>,
        config: &GenerationConfig,
        ending: impl Fn(&[i64]) -> f32,
    ) -> Vec<Hypothesis> {
        let dead_end = self.cache().dead_end.take();
        if config.num_beams > 1 {
            let mut seen: HashSet<Vec<i64>> = HashSet::new();
            found.retain(|hypothesis| !hypothesis.tokens.is_empty() && seen.insert(hypothesis.tokens.clone()));
            if found.is_empty() {
                let DeadEnd { tokens, score } = dead_end.unwrap_or_default();
                let normalizer = (tokens.len().max(1) as f64).powf(config.length_penalty) as f32;
                found.push(Hypothesis {
                    score: Some(score / normalizer + ending(&tokens)),
                    tokens,
                    finish_reason: FinishReason::Constraint,
                    logprobs: None,
                    cross_attentions: None,
                });
            }
        }
        for hypothesis in &mut found {
            if hypothesis.finish_reason != FinishReason::Eos && !self.is_satisfied(&hypothesis.tokens) {
                hypothesis.finish_reason = FinishReason::ConstraintIncomplete;
            }
        }
        if config.num_beams > 1 {
            found.sort_by_key(|hypothesis| hypothesis.finish_reason == FinishReason::ConstraintIncomplete);
            found.truncate(config.num_return_sequences);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constraint::State;
    use crate::constraint::phrases::{Phrase, Phrases};
    use crate::constraint::trie::Trie;
    use crate::options::{EarlyStopping, PrefixAllowedTokens};
    use crate::scores::Processors;
    use crate::search::Progress;

    const EOS: i64 = 1;

    fn noise(seed: &mut u64) -> f32 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1 << 24) as f32
    }

    /// The logits of a made-up model.
    fn logits(round: u64, history: &[i64], vocab_size: usize) -> Vec<f32> {
        let mut seed =
            history.iter().fold(round, |seed, &token| (seed ^ token as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..vocab_size).map(|_| noise(&mut seed) * 6.0).collect()
    }

    fn log_softmax(logits: &[f32]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        logits.iter().map(|&x| f64::from(x) - sum.ln()).collect()
    }

    fn constraint(start: State, options: &GenerationConfig) -> Arc<Constraint> {
        Arc::new(Constraint { start, prompt_len: 1, max_length: options.max_length(1), eos: vec![EOS] })
    }

    /// What the loop does with a model, with logits that are a function of the target.
    fn search(
        constraint: &Arc<Constraint>,
        options: &GenerationConfig,
        logits: impl Fn(&[i64]) -> Vec<f32>,
    ) -> Vec<Hypothesis> {
        let state = Arc::new(ConstraintState::new(constraint, 0));
        let processors = Processors::new(options, &[], 1).filtered_by(state.clone());
        let num_return_sequences = options.num_return_sequences.max(options.num_beams);
        let of_search = GenerationConfig { num_return_sequences, ..options.clone() };
        let mut search = Search::new(&of_search, &[2]);
        loop {
            let mut scores: Vec<f32> = (0..search.width()).flat_map(|row| logits(search.history(row))).collect();
            let progress = loop {
                let mut candidates = processors.candidates(&mut scores, &search);
                let mut ends = Vec::new();
                state.take(&mut candidates, &mut ends, &search).expect("no grammar here");
                match search.advance_to_ends(&candidates, &ends) {
                    Progress::NextGroup => {}
                    progress => break progress,
                }
            };
            if progress == Progress::Done {
                return state.rank(search.finish(), options, |_| 0.0);
            }
        }
    }

    #[test]
    fn a_beam_for_each_allowed_sequence_finds_them_in_order_of_their_scores() {
        let mut seed = 5;
        for round in 0..400 {
            let vocab_size = 4 + (noise(&mut seed) * 5.0) as usize;
            let count = 1 + (noise(&mut seed) * 6.0) as usize;
            let mut sequences: Vec<Vec<i64>> = (0..count)
                .map(|_| {
                    let length = 1 + (noise(&mut seed) * 4.0) as usize;
                    (0..length).map(|_| 2 + (noise(&mut seed) * (vocab_size - 2) as f32) as i64).collect()
                })
                .collect();
            sequences.sort();
            sequences.dedup();
            let options = GenerationConfig {
                max_new_tokens: Some(6),
                num_beams: sequences.len().max(2),
                num_return_sequences: sequences.len(),
                length_penalty: [0.0, 1.0, 2.0][round % 3],
                early_stopping: EarlyStopping::Never,
                ..GenerationConfig::default()
            };
            let model = |history: &[i64]| logits(round as u64, history, vocab_size);
            let mut expected: Vec<(f64, Vec<i64>)> = sequences
                .iter()
                .map(|sequence| {
                    let ended = [sequence.as_slice(), &[EOS]].concat();
                    let mut history = vec![2];
                    let sum: f64 = ended
                        .iter()
                        .map(|&token| {
                            let score = log_softmax(&model(&history))[token as usize];
                            history.push(token);
                            score
                        })
                        .sum();
                    (sum / (ended.len() as f64).powf(options.length_penalty), ended)
                })
                .collect();
            expected.sort_by(|(a, _), (b, _)| b.total_cmp(a));

            let trie = Arc::new(Trie::new(sequences.iter().map(Vec::as_slice)));
            let constraint = constraint(vec![Matcher::Sequences { trie, node: Trie::ROOT }], &options);
            let found = search(&constraint, &options, model);
            let best = &found[0];
            assert_eq!(best.tokens, expected[0].1, "round {round}");
            assert!((f64::from(best.score.expect("beam search")) - expected[0].0).abs() < 1e-4, "round {round}");
            for hypothesis in &found {
                assert_eq!(hypothesis.finish_reason, FinishReason::Eos, "round {round}");
                assert!(expected.iter().any(|(_, tokens)| *tokens == hypothesis.tokens), "round {round}");
            }
        }
    }

    #[test]
    fn a_target_that_cannot_go_on_ends_where_it_is() {
        type Case = (&'static str, &'static [i64], &'static [&'static [i64]], &'static [i64], FinishReason);
        let cases: &[Case] = &[
            ("all is well", &[], &[&[5, 6]], &[5, 6, EOS], FinishReason::Eos),
            ("no first token", &[5], &[&[5, 6]], &[], FinishReason::ConstraintIncomplete),
            ("no second token", &[6], &[&[5, 6]], &[5], FinishReason::ConstraintIncomplete),
            ("no end", &[EOS], &[&[5, 6]], &[5, 6], FinishReason::Constraint),
            ("another way", &[6], &[&[5, 6], &[5, 7]], &[5, 7, EOS], FinishReason::Eos),
            ("no room for the end", &[], &[&[5, 6, 7, 7]], &[5, 6, 7, 7], FinishReason::Length),
        ];
        for num_beams in [1, 3] {
            for &(name, banned, sequences, tokens, finish_reason) in cases {
                let options = GenerationConfig {
                    max_new_tokens: Some(4),
                    num_beams,
                    suppress_tokens: banned.to_vec(),
                    ..GenerationConfig::default()
                };
                let trie = Arc::new(Trie::new(sequences.iter().copied()));
                let constraint = constraint(vec![Matcher::Sequences { trie, node: Trie::ROOT }], &options);
                let found = search(&constraint, &options, |history| logits(7, history, 9));
                let found: Vec<_> = found.iter().map(|found| (found.tokens.as_slice(), found.finish_reason)).collect();
                assert_eq!(found, [(tokens, finish_reason)], "{name}, {num_beams} beams");
            }
        }
    }

    #[test]
    fn every_strategy_keeps_to_the_allowed_sequences() {
        let sequences: [&[i64]; 4] = [&[5], &[5, 6], &[6, 6, 6], &[8]];
        let default = GenerationConfig::default;
        let strategies = [
            ("sampling", GenerationConfig { do_sample: true, num_return_sequences: 5, ..default() }, 5),
            ("alternatives", GenerationConfig { return_alternatives: true, num_return_sequences: 5, ..default() }, 3),
            ("beams", GenerationConfig { num_beams: 4, num_return_sequences: 4, ..default() }, 4),
            ("drawn beams", GenerationConfig { num_beams: 4, do_sample: true, ..default() }, 1),
            ("groups", GenerationConfig { num_beams: 4, num_beam_groups: 2, diversity_penalty: 0.5, ..default() }, 1),
        ];
        for (name, options, most) in strategies {
            for round in 0..50 {
                let options = GenerationConfig { max_new_tokens: Some(6), seed: Some(round), ..options.clone() };
                let trie = Arc::new(Trie::new(sequences));
                let constraint = constraint(vec![Matcher::Sequences { trie, node: Trie::ROOT }], &options);
                let found = search(&constraint, &options, |history| logits(round, history, 9));
                assert!((1..=most).contains(&found.len()), "{name}, round {round}: {found:?}");
                for hypothesis in found {
                    let (last, tokens) = hypothesis.tokens.split_last().expect("an end at least");
                    assert_eq!((*last, hypothesis.finish_reason), (EOS, FinishReason::Eos), "{name}, round {round}");
                    assert!(sequences.contains(&tokens), "{name}, round {round}: {tokens:?}");
                }
            }
        }
    }

    #[test]
    fn constraints_hold_together() {
        let phrases = || Phrases::new(vec![Phrase { text: None, spellings: vec![vec![6, 7]] }]);
        let allowed = PrefixAllowedTokens::new(|row, history| {
            assert_eq!((row, history[0]), (0, 2));
            if history.len() < 4 { vec![5, 6, 7] } else { vec![EOS, 7] }
        });
        for num_beams in [1, 4] {
            let options = GenerationConfig { max_new_tokens: Some(6), num_beams, ..GenerationConfig::default() };
            let phrases = phrases();
            let state = phrases.start();
            let matchers = vec![
                Matcher::Callback(allowed.clone()),
                Matcher::Phrases { phrases: Arc::new(phrases), state, texts: Arc::new([]) },
            ];
            let constraint = constraint(matchers, &options);
            for round in 0..50 {
                let found = search(&constraint, &options, |history| logits(round, history, 9));
                let [Hypothesis { tokens, finish_reason, .. }] = found.as_slice() else { panic!("{found:?}") };
                assert!(tokens.iter().take(3).all(|token| [5, 6, 7].contains(token)), "{tokens:?}");
                assert!(tokens.iter().skip(3).all(|token| [EOS, 7].contains(token)), "{tokens:?}");
                let holds = tokens.windows(2).any(|pair| pair == [6, 7]);
                assert_eq!(holds, *finish_reason != FinishReason::ConstraintIncomplete, "{tokens:?}");
            }
        }
    }
}
