//! Diverse beam search: groups of beams choose one after the other, and the tokens of each group are penalized in later
//! groups (Vijayakumar et al., "Diverse Beam Search", 2016; `num_beam_groups` of transformers 4).

use super::beam::{Beam, common_prefix};
use super::{Candidate, Progress};
use crate::hypothesis::{FinishReason, Hypothesis};
use crate::options::GenerationConfig;

#[derive(Clone, Debug)]
pub(super) struct Groups {
    groups: Vec<Beam>,
    /// The indices of the groups that are not done.
    live: Vec<usize>,
    /// The index in `live` of the group that chooses next, and the tokens that earlier groups chose in this step.
    turn: usize,
    chosen: Vec<i64>,
    /// The groups that continue after this step, with their next tokens and parents.
    going_on: Vec<usize>,
    coming_tokens: Vec<i64>,
    coming_parents: Vec<usize>,
    /// Those of the previous step, valid until all groups have chosen.
    next_tokens: Vec<i64>,
    parents: Vec<usize>,
    size: usize,
    num_return_sequences: usize,
}

impl Groups {
    pub(super) fn new(options: &GenerationConfig, prompt: &[i64]) -> Groups {
        let count = options.num_beam_groups;
        let size = options.num_beams / count;
        let of_group = GenerationConfig { num_beams: size, num_return_sequences: size, ..options.clone() };
        Groups {
            groups: vec![Beam::new(&of_group, prompt); count],
            live: (0..count).collect(),
            turn: 0,
            chosen: Vec::new(),
            going_on: Vec::new(),
            coming_tokens: Vec::new(),
            coming_parents: Vec::new(),
            next_tokens: vec![prompt.last().copied().unwrap_or_default(); size * count],
            parents: (0..size * count).collect(),
            size,
            num_return_sequences: options.num_return_sequences,
        }
    }

    pub(super) fn width(&self) -> usize {
        self.live.len() * self.size
    }

    /// The rows of the group that chooses next.
    pub(super) fn rows(&self) -> std::ops::Range<usize> {
        self.turn * self.size..(self.turn + 1) * self.size
    }

    pub(super) fn candidates(&self) -> usize {
        self.groups[self.live[self.turn]].candidates()
    }

    /// The tokens that earlier groups chose in this step, one for each beam.
    pub(super) fn chosen(&self) -> &[i64] {
        &self.chosen
    }

    pub(super) fn history(&self, row: usize) -> &[i64] {
        self.groups[self.live[row / self.size]].history(row % self.size)
    }

    pub(super) fn running_score(&self, row: usize) -> f32 {
        self.groups[self.live[row / self.size]].running_score(row % self.size)
    }

    pub(super) fn next_tokens(&self) -> &[i64] {
        &self.next_tokens
    }

    pub(super) fn parents(&self) -> &[usize] {
        &self.parents
    }

    pub(super) fn settled(&self, from: usize) -> &[i64] {
        let contenders = self.groups.iter().enumerate().flat_map(|(index, group)| {
            let running = self.live.contains(&index).then(|| group.running()).into_iter().flatten();
            running.chain(group.best_finished())
        });
        common_prefix(contenders, from)
    }

    pub(super) fn advance(
        &mut self,
        candidates: &[Candidate],
        ends: &[Option<FinishReason>],
        endings: &[f32],
    ) -> Progress {
        let index = self.live[self.turn];
        let first_row = self.turn * self.size;
        let own: Vec<Candidate> = (candidates.iter())
            .map(|candidate| Candidate { parent: candidate.parent - first_row, ..*candidate })
            .collect();
        let group = &mut self.groups[index];
        let progress = group.advance(&own, ends, endings.get(first_row..).unwrap_or(&[]));
        self.chosen.extend_from_slice(group.next_tokens());
        if progress == Progress::Continue {
            self.going_on.push(index);
            self.coming_tokens.extend_from_slice(group.next_tokens());
            self.coming_parents.extend(group.parents().iter().map(|parent| first_row + parent));
        }
        self.turn += 1;
        if self.turn < self.live.len() {
            return Progress::NextGroup;
        }
        self.turn = 0;
        self.chosen.clear();
        self.live = std::mem::take(&mut self.going_on);
        self.next_tokens = std::mem::take(&mut self.coming_tokens);
        self.parents = std::mem::take(&mut self.coming_parents);
        if self.live.is_empty() { Progress::Done } else { Progress::Continue }
    }

    pub(super) fn finish(self) -> Vec<Hypothesis> {
        let mut all: Vec<Hypothesis> = self.groups.into_iter().flat_map(Beam::finish).collect();
        let score = |hypothesis: &Hypothesis| hypothesis.score.unwrap_or(f32::NEG_INFINITY);
        all.sort_by(|a, b| score(b).total_cmp(&score(a)));
        all.truncate(self.num_return_sequences);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::Processors;
    use crate::search::Search;

    /// Logits of a made-up model of twelve tokens.
    fn logits(history: &[i64]) -> Vec<f32> {
        let place = history.iter().fold(11i64, |sum, &token| (sum * 37 + token + 1) % 1013);
        (0..12).map(|token| ((place * (token + 5)) % 97) as f32 / 16.0).collect()
    }

    fn generate(options: &GenerationConfig) -> (Vec<Hypothesis>, Vec<Vec<i64>>) {
        let processors = Processors::new(options, &[], 1);
        let mut search = Search::new(options, &[2]);
        let mut first_tokens = Vec::new();
        loop {
            let mut rows: Vec<f32> = (0..search.width()).flat_map(|row| logits(search.history(row))).collect();
            let before: Vec<Vec<i64>> = (0..search.width()).map(|row| search.history(row).to_vec()).collect();
            let progress = loop {
                let candidates = processors.candidates(&mut rows, &search);
                match search.advance(&candidates) {
                    Progress::NextGroup => {}
                    progress => break progress,
                }
            };
            first_tokens.push(search.next_tokens().to_vec());
            if progress == Progress::Done {
                return (search.finish(), first_tokens);
            }
            for row in 0..search.width() {
                let expected = [&before[search.parents()[row]][..], &[search.next_tokens()[row]]].concat();
                assert_eq!(search.history(row), expected);
            }
        }
    }

    #[test]
    fn groups_without_a_penalty_are_each_a_beam_search() {
        let options = GenerationConfig { num_beams: 3, num_return_sequences: 3, ..GenerationConfig::default() };
        let (alone, _) = generate(&options);
        let groups = GenerationConfig { num_beams: 6, num_beam_groups: 2, num_return_sequences: 6, ..options };
        let (found, _) = generate(&groups);
        let twice: Vec<Hypothesis> =
            alone.iter().flat_map(|hypothesis| [hypothesis.clone(), hypothesis.clone()]).collect();
        assert_eq!(found, twice);
    }

    #[test]
    fn a_large_penalty_keeps_groups_apart() {
        let options = GenerationConfig {
            num_beams: 6,
            num_beam_groups: 3,
            num_return_sequences: 6,
            diversity_penalty: 100.0,
            max_new_tokens: Some(6),
            eos_token_id: vec![],
            ..GenerationConfig::default()
        };
        let (found, steps) = generate(&options);
        assert_eq!(found.len(), 6);
        assert!(found.windows(2).all(|pair| pair[0].score >= pair[1].score));
        for tokens in &steps[..5] {
            for (index, group) in tokens.chunks(2).enumerate() {
                let earlier = &tokens[..index * 2];
                assert!(group.iter().all(|token| !earlier.contains(token)), "{tokens:?}");
            }
        }
    }
}
