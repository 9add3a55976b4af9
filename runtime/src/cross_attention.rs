//! `CrossAttentionTracker`: collects the cross-attention of targets during generation, and how much of the source each
//! target has covered. For `output_attentions`, and for beam search with a `coverage_penalty`.

use crate::hypothesis::CrossAttentions;
use crate::options::GenerationConfig;
use crate::search::{Candidate, Search};
use crate::target_tree::TargetTree;

/// `coverage_penalty · Σ log(min(coverage, 1))` over the source's tokens except padding. The coverage of a source token
/// is the sum of what all tokens of the target attended to it: the term is 0 for a target that covers its source, and
/// less for others. Coverage below the least normal float32 counts as that.
///
/// The formula is equation 14 of Wu et al., "Google's Neural Machine Translation System" (arXiv 1609.08144).
fn coverage_term(penalty: f64, coverage: &[f32], mask: &[i64]) -> f32 {
    let visible = coverage.iter().zip(mask).filter(|(_, mask)| **mask != 0);
    let sum: f64 = visible.map(|(&coverage, _)| f64::from(coverage.clamp(f32::MIN_POSITIVE, 1.0)).ln()).sum();
    (penalty * sum) as f32
}

/// The cross-attentions of the rows of a search, step by step.
pub(crate) struct CrossAttentionTracker {
    tree: TargetTree,
    /// By node, the cross-attentions of the token chosen there; empty before its step.
    by_node: Vec<Vec<f32>>,
    /// The mask of the source.
    mask: Vec<i64>,
    penalty: f64,
    /// For each row of the step, the coverage of the source by its target, this step included.
    coverage: Vec<Vec<f32>>,
    /// For each row of the step, the term of a hypothesis that ends by continuing it; empty without a penalty.
    ending_terms: Vec<f32>,
}

impl CrossAttentionTracker {
    /// Before the first step, for a source with such a mask; `None` if no option needs it.
    pub fn new(options: &GenerationConfig, mask: &[i64]) -> Option<CrossAttentionTracker> {
        let is_needed = options.output_attentions || options.coverage_penalty != 0.0;
        is_needed.then(|| CrossAttentionTracker {
            tree: TargetTree::default(),
            by_node: vec![Vec::new()],
            mask: mask.to_vec(),
            penalty: options.coverage_penalty,
            coverage: Vec::new(),
            ending_terms: Vec::new(),
        })
    }

    /// Begins a step of `width` rows. `attentions`, `[rows, at least the source]`, are of these rows, or of one that
    /// stands for all.
    pub fn begin_step(&mut self, attentions: &[f32], rows: usize, width: usize) {
        self.tree.begin_step(width);
        self.coverage.resize(width, vec![0.0; self.mask.len()]);
        self.ending_terms.clear();
        let rows: Vec<&[f32]> = attentions.chunks_exact(attentions.len() / rows).collect();
        for (row, coverage) in self.coverage.iter_mut().enumerate() {
            let attentions = &rows[row.min(rows.len() - 1)][..self.mask.len()];
            let at_node = &mut self.by_node[self.tree.node(row)];
            if at_node.is_empty() {
                at_node.extend_from_slice(attentions);
            }
            if self.penalty != 0.0 {
                coverage.iter_mut().zip(attentions).for_each(|(coverage, attention)| *coverage += attention);
                self.ending_terms.push(coverage_term(self.penalty, coverage, &self.mask));
            }
        }
    }

    /// Adds candidates of the step.
    pub fn add(&mut self, candidates: &[Candidate]) {
        for candidate in candidates {
            if self.tree.add(candidate) {
                self.by_node.push(Vec::new());
            }
        }
    }

    /// For each row of the step, what is added to the score of a hypothesis that ends by continuing it; empty without a
    /// penalty.
    pub fn ending_terms(&self) -> &[f32] {
        &self.ending_terms
    }

    /// Follows the rows that the search continues with.
    pub fn follow(&mut self, search: &Search) {
        self.tree.follow(search);
        self.coverage = search.parents().iter().map(|&parent| self.coverage[parent].clone()).collect();
    }

    /// The cross-attentions of a hypothesis.
    pub fn of(&self, tokens: &[i64]) -> CrossAttentions {
        let mut found = CrossAttentions::of_source(self.mask.len());
        self.tree.along(tokens).for_each(|edge| found.push(&self.by_node[edge.from]));
        found
    }

    /// What is added to the score of a target that ends after `tokens`.
    pub fn ending_term(&self, tokens: &[i64]) -> f32 {
        if self.penalty == 0.0 {
            return 0.0;
        }
        let mut coverage = vec![0.0; self.mask.len()];
        for edge in self.tree.along(tokens) {
            coverage.iter_mut().zip(&self.by_node[edge.from]).for_each(|(coverage, attention)| *coverage += attention);
        }
        coverage_term(self.penalty, &coverage, &self.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::Processors;
    use crate::search::Progress;

    #[test]
    fn coverage_is_what_all_tokens_attended_to_a_source_token() {
        const LEAST: f64 = -87.336_544_750_553_1; // ln of the least normal float32
        // name, penalty, coverage, mask, what is added
        type Case = (&'static str, f64, &'static [f32], &'static [i64], f64);
        let cases: &[Case] = &[
            ("all covered", 1.0, &[1.0, 1.0], &[1, 1], 0.0),
            ("more than covered is no better", 1.0, &[3.5, 1.0], &[1, 1], 0.0),
            ("half of one", 1.0, &[0.5, 1.5], &[1, 1], 0.5_f64.ln()),
            ("half of each", 1.0, &[0.5, 0.5], &[1, 1], 2.0 * 0.5_f64.ln()),
            ("the penalty is a factor", 0.2, &[0.5, 0.25], &[1, 1], 0.2 * 0.125_f64.ln()),
            ("padding does not count", 1.0, &[0.0, 0.25, 0.0], &[0, 1, 0], 0.25_f64.ln()),
            ("what was never attended to counts as the least", 1.0, &[0.0, 1.0], &[1, 1], LEAST),
            ("below the least as well", 1.0, &[1e-42, 1.0], &[1, 1], LEAST),
        ];
        for &(name, penalty, covered, mask, expected) in cases {
            let found = f64::from(coverage_term(penalty, covered, mask));
            assert!((found - expected).abs() < 1e-6 * expected.abs().max(1.0), "{name}: {found}, expected {expected}");
        }
    }

    #[test]
    fn the_most_attended_is_the_first_of_the_greatest() {
        let mut attended = CrossAttentions::of_source(3);
        [[0.2, 0.5, 0.3, 9.0], [0.4, 0.4, 0.2, 9.0], [0.0, 0.5, 0.5, 9.0]].iter().for_each(|row| attended.push(row));
        assert_eq!((attended.source_length(), attended.values().len()), (3, 9));
        assert_eq!(attended.tokens().map(<[f32]>::to_vec).nth(1), Some(vec![0.4, 0.4, 0.2]));
        assert_eq!(attended.most_attended(), [1, 0, 1]);
    }

    /// The logits and cross-attentions of a made-up model of ten tokens, after a history.
    fn output_after(history: &[i64]) -> ([f32; 10], [f32; 4]) {
        let state = history.iter().fold(7i64, |sum, &token| (sum * 31 + token) % 1009);
        let number = |at: usize| ((state * (at as i64 + 3)) % 101) as f32;
        (std::array::from_fn(|token| number(token) / 20.0), std::array::from_fn(|at| number(at + 20) / 101.0))
    }

    #[test]
    fn every_hypothesis_has_what_its_own_tokens_attended_to() {
        let default = || GenerationConfig { output_attentions: true, ..GenerationConfig::default() };
        let beams = || GenerationConfig { num_beams: 4, num_return_sequences: 4, ..default() };
        let cases = [
            ("greedy", default()),
            ("beams", beams()),
            ("beams that cover", GenerationConfig { coverage_penalty: 0.7, ..beams() }),
            ("groups", GenerationConfig { num_beam_groups: 2, diversity_penalty: 1.0, ..beams() }),
            (
                "groups that cover",
                GenerationConfig { num_beam_groups: 2, diversity_penalty: 1.0, coverage_penalty: 0.7, ..beams() },
            ),
            ("samples", GenerationConfig { do_sample: true, num_return_sequences: 5, top_k: 4, ..default() }),
            ("alternatives", GenerationConfig { return_alternatives: true, num_return_sequences: 3, ..default() }),
        ];
        let mask = [1, 1, 1, 0];
        for (name, options) in cases {
            let mut search = Search::new(&options, &[2]);
            let mut tracker = CrossAttentionTracker::new(&options, &mask).expect("asked for");
            let processors = Processors::new(&options, &[], 1);
            let mut is_first = true;
            'steps: loop {
                let rows: Vec<_> = (0..search.width()).map(|row| output_after(search.history(row))).collect();
                let mut scores: Vec<f32> = rows.iter().flat_map(|(scores, _)| *scores).collect();
                // The first step has one row for all, and rows are wider where other sources are longer.
                let attended = rows.iter().take(if is_first { 1 } else { rows.len() });
                let attended: Vec<f32> = attended.flat_map(|(_, [a, b, c, d])| [*a, *b, *c, *d, 9.0]).collect();
                tracker.begin_step(&attended, attended.len() / 5, search.width());
                is_first = false;
                loop {
                    let candidates = processors.candidates(&mut scores, &search);
                    tracker.add(&candidates);
                    match search.advance_to_covered_ends(&candidates, &[], tracker.ending_terms()) {
                        Progress::NextGroup => {}
                        Progress::Continue => break,
                        Progress::Done => break 'steps,
                    }
                }
                tracker.follow(&search);
            }
            let found = search.finish();
            for hypothesis in &found {
                let tokens = &hypothesis.tokens;
                let expected: Vec<f32> =
                    (0..tokens.len()).flat_map(|at| output_after(&[&[2], &tokens[..at]].concat()).1).collect();
                assert!(!tokens.is_empty(), "{name}");
                assert_eq!(tracker.of(tokens).values(), expected, "{name}: {tokens:?}");
                if let Some(score) = hypothesis.score {
                    let sum: f64 = (0..tokens.len())
                        .map(|at| {
                            let logits = output_after(&[&[2], &tokens[..at]].concat()).0.map(f64::from);
                            logits[tokens[at] as usize] - logits.iter().map(|x| x.exp()).sum::<f64>().ln()
                        })
                        .sum();
                    let covered = (0..3).map(|at| expected.chunks(4).map(|row| f64::from(row[at])).sum::<f64>());
                    let covered: f64 = covered.map(|covered| covered.min(1.0).ln()).sum();
                    let score_expected = sum / tokens.len() as f64 + options.coverage_penalty * covered;
                    // What groups subtract for each other is part of their sums.
                    if options.num_beam_groups == 1 {
                        assert!((f64::from(score) - score_expected).abs() < 1e-4, "{name}: {score}, {score_expected}");
                    }
                    let ending = f64::from(tracker.ending_term(tokens));
                    assert!((ending - options.coverage_penalty * covered).abs() < 1e-4, "{name}: {ending}");
                }
            }
        }
    }
}
