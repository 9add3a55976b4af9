//! `LogprobTracker`: the model's own log-probabilities of the tokens that a search chooses. They are of the logits
//! before any processing, so that they are comparable across options and with those of
//! [`Model::score`](crate::Model::score).

use crate::hypothesis::Logprobs;
use crate::scores::LogProbabilities;
use crate::search::{Candidate, Search};
use crate::target_tree::TargetTree;

impl Logprobs {
    /// Appends those of the next token, from the logits before it; with those of the `top` likeliest tokens.
    pub(crate) fn push(&mut self, logits: &[f32], token: i64, top: usize) {
        let at = LogProbabilities::of(logits);
        self.tokens.push(at.token(token));
        if top > 0 {
            self.top.push(at.top(top));
        }
    }
}

/// The log-probabilities of the candidates of a search.
pub(crate) struct LogprobTracker {
    top: usize,
    tree: TargetTree,
    /// By node, of the token before it.
    logprobs: Vec<f32>,
    /// By node, the likeliest tokens there; empty unless candidates were added there.
    best: Vec<Vec<(i64, f32)>>,
}

impl LogprobTracker {
    /// Before the first step of a search; `top` alternatives are kept for each token.
    pub fn new(top: usize) -> LogprobTracker {
        LogprobTracker { top, tree: TargetTree::default(), logprobs: vec![0.0], best: vec![Vec::new()] }
    }

    /// Adds a step's candidates. `logits` are those of the `width` rows that they continue, before any processing.
    pub fn add(&mut self, candidates: &[Candidate], logits: &[f32], width: usize) {
        self.tree.begin_step(width);
        let rows: Vec<&[f32]> = logits.chunks_exact(logits.len() / width).collect();
        let mut at: Vec<Option<LogProbabilities>> = rows.iter().map(|_| None).collect();
        for candidate in candidates {
            let node = self.tree.node(candidate.parent);
            let at = at[candidate.parent].get_or_insert_with(|| LogProbabilities::of(rows[candidate.parent]));
            if self.top > 0 && self.best[node].is_empty() {
                self.best[node] = at.top(self.top);
            }
            if self.tree.add(candidate) {
                self.logprobs.push(at.token(candidate.token));
                self.best.push(Vec::new());
            }
        }
    }

    /// Follows the rows that the search continues with.
    pub fn follow(&mut self, search: &Search) {
        self.tree.follow(search);
    }

    /// The log-probabilities of a hypothesis.
    pub fn of(&self, tokens: &[i64]) -> Logprobs {
        let mut found = Logprobs::default();
        for edge in self.tree.along(tokens) {
            if self.top > 0 {
                found.top.push(self.best[edge.from].clone());
            }
            found.tokens.push(self.logprobs[edge.to]);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::GenerationConfig;
    use crate::scores::Processors;
    use crate::search::Progress;

    /// The logits of a made-up model of ten tokens.
    fn logits(history: &[i64]) -> Vec<f32> {
        let state = history.iter().fold(7i64, |sum, &token| (sum * 31 + token) % 1009);
        (0..10).map(|token| ((state * (token + 3)) % 101) as f32 / 20.0).collect()
    }

    #[test]
    fn every_hypothesis_has_the_log_probabilities_of_its_tokens() {
        let default = GenerationConfig::default;
        let cases = [
            ("greedy", default()),
            ("beams", GenerationConfig { num_beams: 4, num_return_sequences: 4, ..default() }),
            ("samples", GenerationConfig { do_sample: true, num_return_sequences: 5, top_k: 4, ..default() }),
            ("alternatives", GenerationConfig { return_alternatives: true, num_return_sequences: 3, ..default() }),
            (
                "beams that sample, with a processor",
                GenerationConfig {
                    num_beams: 3,
                    num_return_sequences: 2,
                    do_sample: true,
                    repetition_penalty: 1.5,
                    suppress_tokens: vec![4],
                    ..default()
                },
            ),
        ];
        for (name, options) in cases {
            let mut search = Search::new(&options, &[2]);
            let mut tracker = LogprobTracker::new(2);
            loop {
                let rows: Vec<f32> = (0..search.width()).flat_map(|row| logits(search.history(row))).collect();
                let candidates = Processors::new(&options, &[], 1).candidates(&mut rows.clone(), &search);
                tracker.add(&candidates, &rows, search.width());
                if search.advance(&candidates) == Progress::Done {
                    break;
                }
                tracker.follow(&search);
            }
            for hypothesis in search.finish() {
                let mut expected = Logprobs::default();
                for (at, &token) in hypothesis.tokens.iter().enumerate() {
                    expected.push(&logits(&[&[2], &hypothesis.tokens[..at]].concat()), token, 2);
                }
                assert!(!hypothesis.tokens.is_empty(), "{name}");
                assert_eq!(tracker.of(&hypothesis.tokens), expected, "{name}: {:?}", hypothesis.tokens);
            }
        }
    }

    #[test]
    fn perplexity_is_that_of_a_uniform_choice() {
        let mut uniform = Logprobs::default();
        assert_eq!(uniform.perplexity(), 1.0);
        (0..3).for_each(|token| uniform.push(&[0.5; 8], token, 0));
        assert!((uniform.perplexity() - 8.0).abs() < 1e-5 && (uniform.sum() + 3.0 * 8f64.ln()).abs() < 1e-5);
    }
}
