//! Beam search for one source row, computed as in Hugging Face's vectorized implementation (transformers 5).
//!
//! # Design
//! Every score is a float32, and an ineligible candidate has −1e9 added to its score rather than a flag: which
//! hypothesis is returned can depend on how such a sum rounds, so that the arithmetic is kept, order of operations
//! included. Ties, whose order PyTorch leaves open, go to the earlier entry.

use super::{Candidate, Progress};
use crate::hypothesis::{FinishReason, Hypothesis};
use crate::options::{EarlyStopping, GenerationConfig};

/// Added to a score to rank it behind every eligible one.
const PENALTY: f32 = -1e9;

#[derive(Clone, Debug)]
pub(super) struct Beam {
    /// Running beams, best first: prompt and generated tokens, and the summed log-probability.
    running: Vec<Vec<i64>>,
    running_scores: Vec<f32>,
    /// How the last step continued the running beams.
    next_tokens: Vec<i64>,
    parents: Vec<usize>,
    /// The best finished hypotheses, best first, as many as there are beams or as patience waits for; the rest are
    /// placeholders.
    pool: Vec<Finished>,
    /// Whether a running beam may still beat a finished hypothesis; once false it stays false.
    open: bool,
    prompt_len: usize,
    max_length: usize,
    eos: Vec<i64>,
    length_penalty: f64,
    early_stopping: EarlyStopping,
    num_return_sequences: usize,
    /// The running beams before the last step, kept for their allocations.
    spare: Vec<Vec<i64>>,
}

/// An entry of the pool.
#[derive(Clone, Debug)]
struct Finished {
    tokens: Vec<i64>,
    score: f32,
    is_finished: bool,
    finish_reason: FinishReason,
}

impl Beam {
    pub(super) fn new(options: &GenerationConfig, prompt: &[i64]) -> Beam {
        let width = options.num_beams;
        // All beams start from the same prompt, so that only the first one may contribute to the first step.
        let mut running_scores = vec![PENALTY; width];
        running_scores[0] = 0.0;
        let pool_size = match options.early_stopping {
            EarlyStopping::True => options.patient_size(width).max(1),
            _ => width,
        };
        Beam {
            running: vec![prompt.to_vec(); width],
            running_scores,
            next_tokens: vec![prompt.last().copied().unwrap_or_default(); width],
            parents: (0..width).collect(),
            pool: vec![
                Finished {
                    tokens: Vec::new(),
                    score: PENALTY,
                    is_finished: false,
                    finish_reason: FinishReason::Length
                };
                pool_size
            ],
            open: true,
            prompt_len: prompt.len(),
            max_length: options.max_length(prompt.len()),
            eos: options.eos_token_id.clone(),
            length_penalty: options.length_penalty,
            early_stopping: options.early_stopping,
            num_return_sequences: options.num_return_sequences,
            spare: vec![Vec::new(); width],
        }
    }

    pub(super) fn width(&self) -> usize {
        self.running.len()
    }

    /// Enough that `width` of them do not end, however many end-of-sequence tokens rank above them.
    pub(super) fn candidates(&self) -> usize {
        (1 + self.eos.len()).max(2) * self.width()
    }

    pub(super) fn history(&self, beam: usize) -> &[i64] {
        &self.running[beam]
    }

    pub(super) fn running_score(&self, beam: usize) -> f32 {
        self.running_scores[beam]
    }

    pub(super) fn next_tokens(&self) -> &[i64] {
        &self.next_tokens
    }

    pub(super) fn parents(&self) -> &[usize] {
        &self.parents
    }

    /// The tokens that are certain to begin the best hypothesis, from its generated token `from` on.
    pub(super) fn settled(&self, from: usize) -> &[i64] {
        common_prefix(self.running().chain(self.best_finished()), from)
    }

    /// The generated tokens of the running beams.
    pub(super) fn running(&self) -> impl Iterator<Item = &[i64]> {
        self.running.iter().map(|tokens| &tokens[self.prompt_len..])
    }

    /// The tokens of the best finished hypothesis, if there is one.
    pub(super) fn best_finished(&self) -> Option<&[i64]> {
        self.pool.first().filter(|entry| entry.is_finished).map(|entry| entry.tokens.as_slice())
    }

    pub(super) fn advance(
        &mut self,
        candidates: &[Candidate],
        ends: &[Option<FinishReason>],
        endings: &[f32],
    ) -> Progress {
        let generated = self.running[0].len() + 1 - self.prompt_len;
        let at_end = self.running[0].len() + 1 >= self.max_length;
        let stops: Vec<Option<FinishReason>> = (candidates.iter().enumerate())
            .map(|(rank, candidate)| match ends.get(rank).copied().flatten() {
                _ if self.eos.contains(&candidate.token) => Some(FinishReason::Eos),
                None if at_end => Some(FinishReason::Length),
                end => end,
            })
            .collect();

        self.update_pool(candidates, &stops, generated, endings);
        self.update_running(candidates, &stops);

        let length = match self.early_stopping {
            EarlyStopping::Never if self.length_penalty > 0.0 => self.max_length.saturating_sub(self.prompt_len),
            _ => generated,
        };
        let mut best = self.running_scores[0] / self.normalizer(length);
        if let (true, Some(ending)) = (self.early_stopping != EarlyStopping::Never, endings.get(self.parents[0])) {
            best += ending;
        }
        let worst = self.pool.iter().map(|entry| entry.score).fold(f32::INFINITY, f32::min);
        self.open &= self.pool.iter().any(|entry| best > if entry.is_finished { worst } else { PENALTY });

        let is_done = !self.open || self.is_full() || stops.iter().all(|stop| stop.is_some());
        if is_done { Progress::Done } else { Progress::Continue }
    }

    /// Whether early stopping has all the hypotheses that it waits for.
    fn is_full(&self) -> bool {
        self.early_stopping == EarlyStopping::True && self.pool.iter().all(|entry| entry.is_finished)
    }

    /// `length^length_penalty`, computed as Python does and rounded once.
    fn normalizer(&self, length: usize) -> f32 {
        (length as f64).powf(self.length_penalty) as f32
    }

    /// Lets the candidates that end and rank among the first `width` compete with the finished hypotheses. The term of
    /// their parent in `endings` is added to their scores.
    fn update_pool(
        &mut self,
        candidates: &[Candidate],
        stops: &[Option<FinishReason>],
        generated: usize,
        endings: &[f32],
    ) {
        let (width, pool_size) = (self.width(), self.pool.len());
        let is_full = self.is_full();
        let normalizer = self.normalizer(generated);
        let eligible = |rank: usize| stops[rank].is_some() && rank < width;
        let scores: Vec<f32> = (self.pool.iter().map(|entry| entry.score))
            .chain(candidates.iter().enumerate().map(|(rank, candidate)| {
                let mut score = candidate.score / normalizer;
                if let Some(ending) = endings.get(candidate.parent) {
                    score += ending;
                }
                for closed in [is_full, !self.open, !eligible(rank)] {
                    if closed {
                        score += PENALTY;
                    }
                }
                score
            }))
            .collect();
        let mut old: Vec<Option<Finished>> = std::mem::take(&mut self.pool).into_iter().map(Some).collect();
        self.pool = best(&scores, pool_size)
            .into_iter()
            .map(|index| match index.checked_sub(pool_size) {
                None => old[index].take().expect("no index is chosen twice"),
                Some(rank) => {
                    let Candidate { parent, token, .. } = candidates[rank];
                    let mut tokens = self.running[parent][self.prompt_len..].to_vec();
                    tokens.push(token);
                    let finish_reason = stops[rank].unwrap_or(FinishReason::Length);
                    Finished { tokens, score: scores[index], is_finished: eligible(rank), finish_reason }
                }
            })
            .collect();
    }

    /// Continues the beams with the best candidates that do not end.
    fn update_running(&mut self, candidates: &[Candidate], stops: &[Option<FinishReason>]) {
        let scores: Vec<f32> = (candidates.iter().zip(stops))
            .map(|(candidate, stop)| if stop.is_some() { candidate.score + PENALTY } else { candidate.score })
            .collect();
        let chosen = best(&scores, self.width());
        // There are fewer candidates than beams only if the vocabulary is smaller than the request: the last one is
        // repeated.
        let chosen = (0..self.width()).map(|beam| chosen[beam.min(chosen.len() - 1)]);
        for (beam, index) in chosen.enumerate() {
            let Candidate { parent, token, .. } = candidates[index];
            self.spare[beam].clone_from(&self.running[parent]);
            self.spare[beam].push(token);
            self.running_scores[beam] = scores[index];
            self.next_tokens[beam] = token;
            self.parents[beam] = parent;
        }
        std::mem::swap(&mut self.running, &mut self.spare);
    }

    pub(super) fn finish(self) -> Vec<Hypothesis> {
        let Beam { mut pool, num_return_sequences, .. } = self;
        pool.truncate(num_return_sequences);
        pool.into_iter()
            .map(|Finished { tokens, score, finish_reason, .. }| Hypothesis {
                tokens,
                score: Some(score),
                finish_reason,
                logprobs: None,
                cross_attentions: None,
            })
            .collect()
    }
}

/// The common prefix of all targets, from token `from` on.
pub(super) fn common_prefix<'t>(targets: impl Iterator<Item = &'t [i64]>, from: usize) -> &'t [i64] {
    let mut targets = targets.map(|tokens| tokens.get(from..).unwrap_or(&[]));
    let first = targets.next().unwrap_or(&[]);
    let common = |length: usize, other: &[i64]| first[..length].iter().zip(other).take_while(|(a, b)| a == b).count();
    &first[..targets.fold(first.len(), common)]
}

/// The indices of the `count` highest scores, highest first, ties by index.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Adding 0 makes −0 and 0 equal, which `total_cmp` tells apart.
    order.sort_by(|&a, &b| (scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cross_attention::CrossAttentionTracker;
    use crate::options::SequenceBias;
    use crate::scores::Processors;
    use crate::search::Search;

    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The logits of a made-up model: a function of the source and of everything before the next token.
    fn logits(source: u64, history: &[i64], vocab_size: usize, scale: f32) -> Vec<f32> {
        let seed = history.iter().fold(mix(source + 1), |seed, &token| mix(seed ^ (token as u64 + 1)));
        (0..vocab_size as u64)
            .map(|token| (mix(seed.wrapping_add(token * 0x9e37)) >> 40) as f32 / (1 << 24) as f32 * scale)
            .collect()
    }

    /// The mask of every source.
    const MASK: [i64; 5] = [1, 1, 0, 1, 1];

    /// What the next token of a made-up model attends to.
    fn attended(source: u64, history: &[i64]) -> Vec<f32> {
        let mut row = logits(source + 7919, history, MASK.len(), 9.0);
        row.iter_mut().zip(MASK).for_each(|(x, visible)| *x = if visible == 0 { 0.0 } else { x.exp() });
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
        row
    }

    /// What `coverage_penalty` adds to the score of a target, token by token and anew for each.
    fn coverage(penalty: f64, source: u64, tokens: &[i64], prompt_len: usize) -> f32 {
        let rows: Vec<Vec<f32>> = (prompt_len..tokens.len()).map(|at| attended(source, &tokens[..at])).collect();
        let mut sum = 0.0;
        for (token, _) in MASK.iter().enumerate().filter(|(_, visible)| **visible != 0) {
            let covered = rows.iter().fold(0.0, |covered, row| covered + row[token]);
            sum += f64::from(if covered < 1.0 { covered } else { 1.0 }).ln();
        }
        (penalty * sum) as f32
    }

    /// `_beam_search` of transformers written down step by step for a whole batch, with full sorts and no state but
    /// its variables. Log-softmax and processors are those of `scores`, which has tests of its own.
    fn reference(
        options: &GenerationConfig,
        prompt: &[i64],
        sources: &[u64],
        vocab_size: usize,
        scale: f32,
    ) -> Vec<Vec<(Vec<i64>, f32)>> {
        let width = options.num_beams;
        let max_length = options.max_length(prompt.len());
        let keep = 2.max(1 + options.eos_token_id.len()) * width;
        let processors = Processors::new(options, &[], prompt.len());
        let log_softmax = GenerationConfig { renormalize_logits: true, ..GenerationConfig::default() };
        let log_softmax = Processors::new(&log_softmax, &[], prompt.len());
        let top = |scores: &[f32], count: usize| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).expect("no NaN here").then(a.cmp(&b)));
            order.truncate(count);
            order
        };
        let power = |length: usize| (length as f64).powf(options.length_penalty) as f32;

        let batch = sources.len();
        let mut running: Vec<Vec<Vec<i64>>> = vec![vec![prompt.to_vec(); width]; batch];
        let mut running_scores = vec![vec![-1e9f32; width]; batch];
        running_scores.iter_mut().for_each(|scores| scores[0] = 0.0);
        let mut finished: Vec<Vec<Vec<i64>>> = vec![vec![prompt.to_vec(); width]; batch];
        let mut finished_scores = vec![vec![-1e9f32; width]; batch];
        let mut is_finished = vec![vec![false; width]; batch];
        let mut unsatisfied = vec![true; batch];
        let mut length = prompt.len();
        loop {
            let mut all_stop = true;
            for item in 0..batch {
                let mut scores = Vec::new();
                for beam in 0..width {
                    let mut row = logits(sources[item], &running[item][beam], vocab_size, scale);
                    log_softmax.apply(&mut row, &[]);
                    processors.apply(&mut row, &running[item][beam]);
                    scores.extend(row.iter().map(|x| x + running_scores[item][beam]));
                }
                let places = top(&scores, keep);
                let top_scores: Vec<f32> = places.iter().map(|&place| scores[place]).collect();
                let sequences: Vec<Vec<i64>> = (places.iter())
                    .map(|place| [&running[item][place / vocab_size][..], &[(place % vocab_size) as i64]].concat())
                    .collect();
                let stop: Vec<bool> = (sequences.iter())
                    .map(|tokens| length + 1 >= max_length || options.eos_token_id.contains(&tokens[length]))
                    .collect();
                all_stop &= stop.iter().all(|&stop| stop);

                let going: Vec<f32> =
                    (0..places.len()).map(|c| top_scores[c] + if stop[c] { -1e9 } else { 0.0 }).collect();
                let next = top(&going, width);

                let full = is_finished[item].iter().all(|&f| f) && options.early_stopping == EarlyStopping::True;
                let mut merged_scores = finished_scores[item].clone();
                let mut merged = finished[item].clone();
                let mut merged_finished = is_finished[item].clone();
                for c in 0..places.len() {
                    let mut score = top_scores[c] / power(length + 1 - prompt.len());
                    if options.coverage_penalty != 0.0 {
                        score += coverage(options.coverage_penalty, sources[item], &sequences[c], prompt.len());
                    }
                    let just_finished = stop[c] && c < width;
                    score += if full { -1e9 } else { 0.0 };
                    score += if unsatisfied[item] { 0.0 } else { -1e9 };
                    score += if just_finished { 0.0 } else { -1e9 };
                    merged_scores.push(score);
                    merged.push(sequences[c].clone());
                    merged_finished.push(just_finished);
                }
                let kept = top(&merged_scores, width);
                finished[item] = kept.iter().map(|&i| merged[i].clone()).collect();
                finished_scores[item] = kept.iter().map(|&i| merged_scores[i]).collect();
                is_finished[item] = kept.iter().map(|&i| merged_finished[i]).collect();

                running[item] = next.iter().map(|&c| sequences[c].clone()).collect();
                running_scores[item] = next.iter().map(|&c| going[c]).collect();
            }
            length += 1;
            for item in 0..batch {
                let hypothetical = match options.early_stopping {
                    EarlyStopping::Never if options.length_penalty > 0.0 => max_length - prompt.len(),
                    _ => length - prompt.len(),
                };
                let mut best = running_scores[item][0] / power(hypothetical);
                if options.coverage_penalty != 0.0 && options.early_stopping != EarlyStopping::Never {
                    best += coverage(options.coverage_penalty, sources[item], &running[item][0], prompt.len());
                }
                let worst = finished_scores[item].iter().copied().fold(f32::INFINITY, f32::min);
                unsatisfied[item] &= is_finished[item].iter().any(|&f| best > if f { worst } else { -1e9 });
            }
            let improvement_possible = unsatisfied.iter().any(|&u| u);
            let open_beam =
                !(is_finished.iter().flatten().all(|&f| f) && options.early_stopping == EarlyStopping::True);
            if !(improvement_possible && open_beam && !all_stop) {
                break;
            }
        }
        (finished.into_iter().zip(finished_scores))
            .map(|(tokens, scores)| {
                let tokens = tokens.into_iter().map(|tokens| tokens[prompt.len()..].to_vec());
                tokens.zip(scores).take(options.num_return_sequences).collect()
            })
            .collect()
    }

    #[test]
    fn a_beam_search_finds_what_the_reference_finds_in_a_batch() {
        let (mut early, mut settled_early, mut covered_otherwise) = (0, 0, 0);
        for round in 0..3000u64 {
            let pick = |salt: u64, choices: u64| (mix(round * 64 + salt) % choices) as usize;
            let vocab_size = 4 + pick(0, 12);
            let num_beams = 2 + pick(1, 4);
            let eos_token_id: Vec<i64> = (0..pick(2, 4) as i64).map(|id| id * 2 % vocab_size as i64).collect();
            let mut options = GenerationConfig {
                num_beams,
                num_return_sequences: 1 + pick(3, num_beams as u64),
                max_new_tokens: Some(1 + pick(4, 12)),
                length_penalty: [1.0, -1.0, 0.0, 0.6, 2.0][pick(5, 5)],
                early_stopping: [EarlyStopping::False, EarlyStopping::True, EarlyStopping::Never][pick(6, 3)],
                coverage_penalty: [0.0, 0.0, 0.1, 1.5][pick(11, 4)],
                eos_token_id,
                ..GenerationConfig::default()
            };
            match pick(7, 8) {
                0 => options.repetition_penalty = 1.3,
                1 => options.no_repeat_ngram_size = 2,
                2 => options.min_new_tokens = Some(3),
                3 => options.forced_bos_token_id = Some(3),
                4 => options.forced_eos_token_id = vec![2],
                5 => {
                    let biases = [(vec![3], 40.0), (vec![3, 1], -2.0)];
                    options.sequence_bias = biases.map(|(tokens, bias)| SequenceBias { tokens, bias }).to_vec();
                }
                _ => {}
            }
            let prompt: Vec<i64> = (0..1 + pick(8, 3) as i64).collect();
            let sources: Vec<u64> = (0..1 + pick(9, 3) as u64).map(|source| round * 3 + source).collect();
            let scale = [1.0, 4.0, 12.0][pick(10, 3)];

            let expected = reference(&options, &prompt, &sources, vocab_size, scale);
            if options.coverage_penalty != 0.0 {
                let uncovered = GenerationConfig { coverage_penalty: 0.0, ..options.clone() };
                let tokens = |found: &[Vec<(Vec<i64>, f32)>]| -> Vec<Vec<i64>> {
                    found.iter().flatten().map(|(tokens, _)| tokens.clone()).collect()
                };
                let otherwise = reference(&uncovered, &prompt, &sources, vocab_size, scale);
                covered_otherwise += usize::from(tokens(&otherwise) != tokens(&expected));
            }
            for (source, expected) in sources.iter().zip(expected) {
                let processors = Processors::new(&options, &[], prompt.len());
                let mut search = Search::new(&options, &prompt);
                let mut tracker = CrossAttentionTracker::new(&options, &MASK);
                let mut settled: Vec<i64> = Vec::new();
                loop {
                    let mut rows: Vec<f32> = (0..search.width())
                        .flat_map(|beam| logits(*source, search.history(beam), vocab_size, scale))
                        .collect();
                    let before: Vec<Vec<i64>> = (0..num_beams).map(|beam| search.history(beam).to_vec()).collect();
                    let candidates = processors.candidates(&mut rows, &search);
                    let mut endings: &[f32] = &[];
                    if let Some(tracker) = &mut tracker {
                        let rows: Vec<f32> = before.iter().flat_map(|history| attended(*source, history)).collect();
                        tracker.begin_step(&rows, num_beams, num_beams);
                        tracker.add(&candidates);
                        endings = tracker.ending_terms();
                    }
                    let progress = search.advance_to_covered_ends(&candidates, &[], endings);
                    for (beam, &parent) in search.parents().iter().enumerate() {
                        let expected = [&before[parent][..], &[search.next_tokens()[beam]]].concat();
                        assert_eq!(search.history(beam), expected, "round {round}");
                    }
                    if progress == Progress::Done {
                        break;
                    }
                    tracker.iter_mut().for_each(|tracker| tracker.follow(&search));
                    settled.extend_from_slice(search.settled(settled.len()));
                }
                settled_early += usize::from(!settled.is_empty());
                early += usize::from(search.history(0).len() < options.max_length(prompt.len()));
                let found: Vec<_> = search.finish().into_iter().map(|h| (h.tokens, h.score)).collect();
                assert!(found[0].0.starts_with(&settled), "round {round}: {settled:?} was certain");
                let expected: Vec<_> = expected.into_iter().map(|(tokens, score)| (tokens, Some(score))).collect();
                assert_eq!(found, expected, "round {round}, source {source}: {options:?}");
            }
        }
        assert!(settled_early > 1000, "only {settled_early} searches were certain of a token before their end");
        assert!(early > 1000, "only {early} searches ended before the maximum length");
        assert!(covered_otherwise > 300, "only {covered_otherwise} searches found another target for its coverage");
    }

    #[test]
    fn patience_is_how_many_hypotheses_early_stopping_waits_for() {
        let candidate = |parent, token, score| Candidate { parent, token, score };
        // Every step ends one hypothesis of two beams.
        for (patience, steps, returned) in [(1.0, 2, 2), (0.5, 1, 1), (2.0, 4, 2), (1.4, 3, 2)] {
            let options = GenerationConfig {
                num_beams: 2,
                num_return_sequences: returned,
                early_stopping: EarlyStopping::True,
                patience,
                ..GenerationConfig::default()
            };
            let mut search = Search::new(&options, &[2]);
            for step in 1..=steps {
                let ends = candidate(0, 1, -1.0 - step as f32);
                let candidates = [ends, candidate(0, 5, -2.0), candidate(1, 6, -3.0), candidate(1, 7, -4.0)];
                let expected = if step == steps { Progress::Done } else { Progress::Continue };
                assert_eq!(search.advance(&candidates), expected, "patience {patience}, step {step}");
            }
            let found = search.finish();
            assert_eq!(found.len(), returned, "patience {patience}");
            // −(1 + step) / step: the later, the better.
            assert_eq!(found[0].tokens.len(), steps, "patience {patience}");
        }
    }

    #[test]
    fn an_end_of_sequence_token_counts_only_among_the_first_beams() {
        let candidate = |parent, token, score| Candidate { parent, token, score };
        // name, candidates of the first step, what finished, where the beams go on
        type Case = (&'static str, [Candidate; 4], &'static [&'static [i64]], [i64; 2]);
        let cases: &[Case] = &[
            (
                "first",
                [candidate(0, 1, -0.1), candidate(0, 5, -1.0), candidate(0, 6, -2.0), candidate(0, 7, -3.0)],
                &[&[1], &[]],
                [5, 6],
            ),
            (
                "second",
                [candidate(0, 5, -0.1), candidate(0, 1, -1.0), candidate(0, 6, -2.0), candidate(0, 7, -3.0)],
                &[&[1], &[]],
                [5, 6],
            ),
            (
                "third is too late",
                [candidate(0, 5, -0.1), candidate(0, 6, -1.0), candidate(0, 1, -2.0), candidate(0, 7, -3.0)],
                &[&[], &[]],
                [5, 6],
            ),
        ];
        let options = GenerationConfig { num_beams: 2, num_return_sequences: 2, ..GenerationConfig::default() };
        for (name, candidates, finished, next) in cases {
            let mut search = Search::new(&options, &[2]);
            assert_eq!((search.width(), search.candidates()), (2, 4), "{name}");
            assert_eq!(search.advance(candidates), Progress::Continue, "{name}");
            assert_eq!((search.next_tokens(), search.parents()), (&next[..], &[0, 0][..]), "{name}");
            let found: Vec<Vec<i64>> = search.finish().into_iter().map(|hypothesis| hypothesis.tokens).collect();
            assert_eq!(found, *finished, "{name}");
        }
    }
}
