//! Turns the logits of a search's rows into its candidates: logits processors, log-softmax and top-k.
//!
//! Apart from the search because it is what scans whole vocabularies (256 thousand scores a row), and because its
//! arithmetic follows Hugging Face's float32 operations one by one (except the order of the sum in log-softmax). Slices
//! only: no model and no tensors. What becomes of the candidates is left to `search`.
//!
//! # Design
//! The processors are a list in Hugging Face's order, so that a new one is one more entry. Most touch a handful of
//! tokens; only those that are defined over the vocabulary scan it, and a row that no processor changes is never
//! written.
//!
//! NaN ranks above every number, as in PyTorch: a NaN that no processor replaces becomes a candidate whose score is
//! NaN, which the caller can refuse, and never a plausible token.

mod candidates;
mod error;
mod logprobs;
mod processor;
mod top_k;
mod warpers;

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::options::{ExponentialDecay, GenerationConfig};
use crate::vocabulary_subset::VocabularySubset;
use processor::{Processor, Row};

pub use error::{InvalidScores, ScoresProblem};
pub(crate) use logprobs::LogProbabilities;
pub use processor::TokenFilter;

/// The logits processors of a configuration, for one source row.
#[derive(Clone, Debug)]
pub struct Processors {
    /// In the order of application.
    processors: Vec<Processor>,
    /// The tokens of the rows where these do not cover the vocabulary; the processors then hold indices in it for
    /// tokens.
    subset: Option<Arc<VocabularySubset>>,
    /// The first unusable scores that a processor of the caller's left, until they are taken.
    invalid: Arc<Mutex<Option<InvalidScores>>>,
}

impl Processors {
    /// The processors of a configuration for a source, given with its padding, and a decoder prompt of `prompt_len`
    /// tokens.
    pub fn new(config: &GenerationConfig, source: &[i64], prompt_len: usize) -> Processors {
        let mut processors = Vec::new();
        let eos = &config.eos_token_id;
        if !config.sequence_bias.is_empty() {
            let sequences = config.sequence_bias.iter().map(|entry| (entry.tokens.as_slice(), entry.bias));
            processors.push(processor::sequence_bias(sequences));
        }
        if config.diversity_penalty != 0.0 {
            processors.push(Processor::Diversity(config.diversity_penalty as f32));
        }
        if config.encoder_repetition_penalty != 1.0 {
            let penalty = (1.0 / config.encoder_repetition_penalty) as f32;
            processors.push(Processor::EncoderRepetitionPenalty { source: source.to_vec(), penalty });
        }
        if config.repetition_penalty != 1.0 {
            processors.push(Processor::RepetitionPenalty(config.repetition_penalty as f32));
        }
        let (frequency, presence) = (config.frequency_penalty as f32, config.presence_penalty as f32);
        if (frequency, presence) != (0.0, 0.0) {
            processors.push(Processor::OccurrencePenalty { frequency, presence, prompt_len });
        }
        if config.no_repeat_ngram_size > 0 {
            processors.push(Processor::NoRepeatNgram(config.no_repeat_ngram_size));
        }
        if config.encoder_no_repeat_ngram_size > 0 {
            let size = config.encoder_no_repeat_ngram_size;
            processors.push(Processor::EncoderNoRepeatNgram { source: source.to_vec(), size });
        }
        if !config.bad_words_ids.is_empty() {
            let is_eos = |word: &[i64]| matches!(word, [token] if eos.contains(token));
            let words = config.bad_words_ids.iter().map(Vec::as_slice).filter(|word| !is_eos(word));
            processors.push(processor::sequence_bias(words.map(|word| (word, f32::NEG_INFINITY))));
        }
        // min_new_tokens takes precedence over min_length, which counts the prompt.
        let min_length = match config.min_new_tokens {
            Some(min_new_tokens) => prompt_len.saturating_add(min_new_tokens),
            None => config.min_length,
        };
        if min_length > 0 {
            processors.push(Processor::Forbid { tokens: eos.clone(), from: 0, to: min_length });
        }
        if let Some(token) = config.forced_bos_token_id {
            processors.push(Processor::Force { tokens: vec![token], at: 1 });
        }
        if !config.forced_eos_token_id.is_empty() {
            let at = config.max_length(prompt_len).saturating_sub(1);
            processors.push(Processor::Force { tokens: config.forced_eos_token_id.clone(), at });
        }
        if config.remove_invalid_values {
            processors.push(Processor::RemoveInvalid);
        }
        if let Some(ExponentialDecay { start, factor }) = config.exponential_decay_length_penalty {
            let start = start.saturating_add(prompt_len);
            processors.push(Processor::ExponentialDecay { eos: eos.clone(), start, factor });
        }
        if !config.suppress_tokens.is_empty() {
            let tokens = config.suppress_tokens.clone();
            processors.push(Processor::Forbid { tokens, from: 0, to: usize::MAX });
        }
        if !config.begin_suppress_tokens.is_empty() {
            let is_forced = prompt_len == 1 && config.forced_bos_token_id.is_some();
            let from = if is_forced { 2 } else { prompt_len };
            let tokens = config.begin_suppress_tokens.clone();
            processors.push(Processor::Forbid { tokens, from, to: from + 1 });
        }
        processors.extend(config.logits_processor.iter().enumerate().map(|(index, processor)| Processor::Caller {
            processor: processor.clone(),
            index,
            source: source.to_vec(),
            prompt_len,
        }));
        if config.eos_on_argmax && config.do_sample && config.num_beams == 1 {
            processors.push(Processor::EndOnArgmax { eos: eos.clone() });
        }
        processors.extend(warpers::warpers(config).into_iter().map(Processor::Warp));
        if config.renormalize_logits {
            processors.push(Processor::Renormalize);
        }
        Processors { processors, subset: None, invalid: Arc::default() }
    }

    /// Has the processors work on rows with the logits of a subset of the vocabulary. Histories and candidates still
    /// hold tokens.
    ///
    /// # Panics
    /// If [`Processors::need_full_rows`].
    pub fn for_subset(mut self, subset: Arc<VocabularySubset>) -> Processors {
        self.processors.iter_mut().for_each(|processor| processor.map_tokens(|token| subset.index(token)));
        self.subset = Some(subset);
        self
    }

    /// Whether a processor needs rows with a score for each token of the vocabulary, at the token's index.
    pub fn need_full_rows(&self) -> bool {
        self.processors.iter().any(Processor::needs_full_rows)
    }

    /// The indices of tokens in a row.
    fn indices<'t>(&self, tokens: &'t [i64]) -> Cow<'t, [i64]> {
        match &self.subset {
            None => tokens.into(),
            Some(subset) => tokens.iter().map(|&token| subset.index(token)).collect(),
        }
    }

    /// Adds a filter. It runs after the processors that forbid tokens, so that what either forbids is forbidden, and
    /// before those of sampling, which choose among what is left.
    pub fn filtered_by(mut self, filter: Arc<dyn TokenFilter>) -> Processors {
        let first_final = self.processors.iter().position(Processor::is_final);
        self.processors.insert(first_final.unwrap_or(self.processors.len()), Processor::Filter(filter));
        self
    }

    /// Applies the processors to the scores of one row: logits for greedy search, log-probabilities for beam search.
    /// `history` is the row's prompt and generated tokens; tokens outside the vocabulary are ignored.
    pub fn apply(&self, scores: &mut [f32], history: &[i64]) {
        self.apply_after(&mut Row { scores, tokens: &[] }, history, &[]);
    }

    /// [`Processors::apply`], after earlier groups of beams have chosen tokens in this step. Returns the index of the
    /// caller's processor that forbade all tokens, if one did.
    fn apply_after(&self, row: &mut Row, history: &[i64], chosen: &[i64]) -> Option<usize> {
        let mut emptied_by = None;
        for processor in self.processors.iter().filter(|processor| processor.is_active(history.len())) {
            let Processor::Caller { index, .. } = *processor else {
                processor.apply(row, history, chosen);
                continue;
            };
            let was_empty = is_empty(row.scores);
            processor.apply(row, history, chosen);
            if let Some(problem) = ScoresProblem::of(row.scores) {
                self.invalid().get_or_insert(InvalidScores { processor: index, problem });
            } else if !was_empty && is_empty(row.scores) {
                emptied_by.get_or_insert(index);
            }
        }
        emptied_by
    }

    fn invalid(&self) -> MutexGuard<'_, Option<InvalidScores>> {
        self.invalid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the first unusable scores that a processor of the caller's has left since this was last called.
    pub fn take_invalid_scores(&self) -> Option<InvalidScores> {
        self.invalid().take()
    }
}

/// Whether all tokens are forbidden.
fn is_empty(scores: &[f32]) -> bool {
    scores.iter().all(|&score| score == f32::NEG_INFINITY)
}

#[cfg(test)]
mod tests {
    use t5gemma_kernels::{LogSumExp, LogitsRequest, LogitsStats};

    use super::top_k::{TopK, draw, rank};
    use super::*;
    use crate::draws::Draws;
    use crate::options::{LogitsProcessor, SequenceBias};
    use crate::search::{Candidate, Progress, Search};

    /// Reproducible noise.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        /// Between −`scale` and `scale`.
        fn row(&mut self, len: usize, scale: f32) -> Vec<f32> {
            (0..len).map(|_| ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale).collect()
        }
    }

    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;

    /// Equal, with NaN equal to itself.
    fn is_same(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()))
    }

    #[test]
    fn each_processor_does_what_its_option_says() {
        let default = GenerationConfig::default;
        let bias = |tokens, bias| SequenceBias { tokens, bias };
        // The source is [0, 4, 5, 4], the end-of-sequence token 1, the scores are [1, −1, 2, −2, 3, −3].
        let scores = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0];
        type Case = (&'static str, GenerationConfig, usize, &'static [i64], [f32; 6]);
        let cases: Vec<Case> = vec![
            ("none", default(), 1, &[2, 4], scores),
            (
                "repetition_penalty counts a token once and the prompt too",
                GenerationConfig { repetition_penalty: 2.0, ..default() },
                1,
                &[2, 3, 3],
                [1.0, -1.0, 1.0, -4.0, 3.0, -3.0],
            ),
            (
                "eos_on_argmax leaves an end that is the most likely alone",
                GenerationConfig { eos_on_argmax: true, do_sample: true, eos_token_id: vec![2, 4], ..default() },
                1,
                &[2],
                [-INF, -INF, -INF, -INF, 3.0, -INF],
            ),
            (
                "eos_on_argmax leaves the draw where another token is more likely",
                GenerationConfig { eos_on_argmax: true, do_sample: true, eos_token_id: vec![2], ..default() },
                1,
                &[2],
                scores,
            ),
            (
                "eos_on_argmax is of sampling",
                GenerationConfig { eos_on_argmax: true, eos_token_id: vec![4], ..default() },
                1,
                &[2],
                scores,
            ),
            (
                "frequency_penalty counts what was generated, not the prompt",
                GenerationConfig { frequency_penalty: 0.5, ..default() },
                1,
                &[2, 3, 3, 4],
                [1.0, -1.0, 2.0, -3.0, 2.5, -3.0],
            ),
            (
                "presence_penalty does not count",
                GenerationConfig { presence_penalty: 0.5, frequency_penalty: -0.25, ..default() },
                1,
                &[2, 3, 3, 4],
                [1.0, -1.0, 2.0, -2.0, 2.75, -3.0],
            ),
            (
                "logits_processor is told the place and comes before what sampling does",
                GenerationConfig {
                    logits_processor: vec![LogitsProcessor::new(|place, scores| {
                        assert_eq!((place.source, place.prompt_len), (&[0, 4, 5, 4][..], 1));
                        scores[place.history[1] as usize] = 9.0;
                    })],
                    do_sample: true,
                    top_k: 2,
                    ..default()
                },
                1,
                &[2, 5],
                [-INF, -INF, -INF, -INF, 3.0, 9.0],
            ),
            (
                "encoder_repetition_penalty works the other way, on the source with its padding",
                GenerationConfig { encoder_repetition_penalty: 2.0, ..default() },
                1,
                &[2, 3],
                [2.0, -1.0, 2.0, -2.0, 6.0, -1.5],
            ),
            (
                "no_repeat_ngram_size 1 forbids the history",
                GenerationConfig { no_repeat_ngram_size: 1, ..default() },
                1,
                &[2, 3],
                [1.0, -1.0, -INF, -INF, 3.0, -3.0],
            ),
            (
                "no_repeat_ngram_size 2 forbids what followed the last token",
                GenerationConfig { no_repeat_ngram_size: 2, ..default() },
                1,
                &[2, 3, 4, 3, 5, 3],
                [1.0, -1.0, 2.0, -2.0, -INF, -INF],
            ),
            (
                "no_repeat_ngram_size is idle in a shorter history",
                GenerationConfig { no_repeat_ngram_size: 3, ..default() },
                1,
                &[2, 2],
                scores,
            ),
            (
                "encoder_no_repeat_ngram_size looks into the source",
                GenerationConfig { encoder_no_repeat_ngram_size: 2, ..default() },
                1,
                &[4],
                [1.0, -1.0, 2.0, -2.0, 3.0, -INF],
            ),
            (
                "encoder_no_repeat_ngram_size is idle while the history is shorter than its prefix",
                GenerationConfig { encoder_no_repeat_ngram_size: 3, ..default() },
                1,
                &[4],
                scores,
            ),
            (
                "sequence_bias: sums for one token, prefixes must fit, the last of equals counts",
                GenerationConfig {
                    sequence_bias: vec![
                        bias(vec![4], 9.0),
                        bias(vec![3, 4], 1.0),
                        bias(vec![2, 3, 4], 0.5),
                        bias(vec![3, 2, 3, 4], 100.0),
                        bias(vec![2, 5], 100.0),
                        bias(vec![4], 0.25),
                    ],
                    ..default()
                },
                1,
                &[2, 3],
                [1.0, -1.0, 2.0, -2.0, 4.75, -3.0],
            ),
            (
                "bad_words_ids: an end-of-sequence token is not a bad word",
                GenerationConfig { bad_words_ids: vec![vec![0], vec![1], vec![3, 4], vec![2, 5]], ..default() },
                1,
                &[2, 3],
                [-INF, -1.0, 2.0, -2.0, -INF, -3.0],
            ),
            (
                "min_length counts the prompt",
                GenerationConfig { min_length: 3, ..default() },
                1,
                &[2, 3],
                [1.0, -INF, 2.0, -2.0, 3.0, -3.0],
            ),
            ("min_length reached", GenerationConfig { min_length: 2, ..default() }, 1, &[2, 3], scores),
            (
                "min_new_tokens does not count the prompt",
                GenerationConfig { min_new_tokens: Some(2), eos_token_id: vec![1, 5], ..default() },
                2,
                &[2, 3, 4],
                [1.0, -INF, 2.0, -2.0, 3.0, -INF],
            ),
            (
                "min_new_tokens has precedence over min_length",
                GenerationConfig { min_new_tokens: Some(0), min_length: 9, ..default() },
                1,
                &[2],
                scores,
            ),
            (
                "forced_bos_token_id after one token",
                GenerationConfig { forced_bos_token_id: Some(3), ..default() },
                1,
                &[2],
                [-INF, -INF, -INF, 0.0, -INF, -INF],
            ),
            (
                "forced_bos_token_id not after two",
                GenerationConfig { forced_bos_token_id: Some(3), ..default() },
                2,
                &[2, 4],
                scores,
            ),
            (
                "forced_eos_token_id for the last token",
                GenerationConfig { forced_eos_token_id: vec![1, 4], max_new_tokens: Some(2), ..default() },
                1,
                &[2, 3],
                [-INF, 0.0, -INF, -INF, 0.0, -INF],
            ),
            (
                "forced_eos_token_id not earlier",
                GenerationConfig { forced_eos_token_id: vec![1, 4], max_new_tokens: Some(3), ..default() },
                1,
                &[2, 3],
                scores,
            ),
            (
                "exponential_decay_length_penalty moves an end-of-sequence token once, upwards",
                GenerationConfig {
                    exponential_decay_length_penalty: Some(ExponentialDecay { start: 1, factor: 3.0 }),
                    eos_token_id: vec![1, 4, 1],
                    ..default()
                },
                1,
                &[2, 3, 3, 3],
                [1.0, 7.0, 2.0, -2.0, 27.0, -3.0],
            ),
            (
                "exponential_decay_length_penalty is idle at its start",
                GenerationConfig {
                    exponential_decay_length_penalty: Some(ExponentialDecay { start: 1, factor: 3.0 }),
                    ..default()
                },
                1,
                &[2, 3],
                scores,
            ),
            (
                "suppress_tokens",
                GenerationConfig { suppress_tokens: vec![0, 5], ..default() },
                1,
                &[2, 3],
                [-INF, -1.0, 2.0, -2.0, 3.0, -INF],
            ),
            (
                "begin_suppress_tokens on the first token",
                GenerationConfig { begin_suppress_tokens: vec![4], ..default() },
                2,
                &[2, 3],
                [1.0, -1.0, 2.0, -2.0, -INF, -3.0],
            ),
            (
                "begin_suppress_tokens not on the second",
                GenerationConfig { begin_suppress_tokens: vec![4], ..default() },
                1,
                &[2, 3],
                scores,
            ),
            (
                "begin_suppress_tokens on the second if the first is forced",
                GenerationConfig { begin_suppress_tokens: vec![4], forced_bos_token_id: Some(3), ..default() },
                1,
                &[2, 3],
                [1.0, -1.0, 2.0, -2.0, -INF, -3.0],
            ),
            (
                "tokens outside the vocabulary are passed over",
                GenerationConfig { suppress_tokens: vec![6, -1], repetition_penalty: 2.0, ..default() },
                1,
                &[99, -100],
                scores,
            ),
        ];
        for (name, options, prompt_len, history, expected) in cases {
            let mut row = scores;
            Processors::new(&options, &[0, 4, 5, 4], prompt_len).apply(&mut row, history);
            assert_eq!(row, expected, "{name}");
        }
    }

    #[test]
    fn invalid_values_are_removed_before_the_processors_that_follow() {
        let options =
            GenerationConfig { remove_invalid_values: true, suppress_tokens: vec![3], ..GenerationConfig::default() };
        let mut row = [NAN, INF, -INF, INF, 1.0];
        Processors::new(&options, &[], 1).apply(&mut row, &[2]);
        assert_eq!(row, [0.0, f32::MAX, f32::MIN, -INF, 1.0]);
    }

    #[test]
    fn the_choice_is_that_of_a_full_sort() {
        let mut noise = Noise(2);
        for round in 0..400 {
            let (len, width, count) = (1 + noise.next() as usize % 300, 1 + round % 4, 1 + round % 13);
            // Few distinct values, so that most choices are ties; some rows hold what arithmetic can leave behind.
            let levels = [2.0, 5.0, 1e6][round % 3];
            let mut rows = noise.row(len * width, levels);
            rows.iter_mut().for_each(|x| *x = if levels < 1e6 { x.round() } else { *x });
            for special in [NAN, -INF, INF, -0.0, -1e9].into_iter().take(round % 6) {
                let place = noise.next() as usize % rows.len();
                rows[place] = special;
            }
            let running = noise.row(width, 3.0);
            let mut expected: Vec<(i32, usize)> =
                (0..rows.len()).map(|place| (rank(rows[place] + running[place / len]), place)).collect();
            expected.sort_by_key(|&(rank, place)| (std::cmp::Reverse(rank), place));
            expected.truncate(count);

            let mut best = TopK::new(count);
            for (beam, row) in rows.chunks(len).enumerate() {
                best.take_row(beam, row, &[], |x| x + running[beam]);
            }
            let found: Vec<(i32, usize)> = (best.candidates.iter())
                .map(|candidate| (rank(candidate.score), candidate.parent * len + candidate.token as usize))
                .collect();
            assert_eq!(found, expected, "round {round}");
        }
    }

    #[test]
    fn greedy_candidates_are_the_best_logits() {
        let suppress = GenerationConfig { suppress_tokens: vec![1], ..GenerationConfig::default() };
        let plain = GenerationConfig::default();
        // name, options, logits, token, score
        type Case<'a> = (&'static str, &'a GenerationConfig, &'static [f32], i64, f32);
        let cases: &[Case] = &[
            ("the highest", &plain, &[1.0, 3.0, 2.0], 1, 3.0),
            ("the first of equals", &plain, &[1.0, 3.0, 3.0], 1, 3.0),
            ("zeros of both signs are equal", &plain, &[-0.0, 0.0], 0, 0.0),
            ("after processing", &suppress, &[1.0, 3.0, 2.0], 2, 2.0),
            ("nothing is left", &suppress, &[-INF, 3.0], 0, -INF),
            ("NaN is not passed over", &plain, &[1.0, NAN, 2.0], 1, NAN),
        ];
        for &(name, options, logits, token, score) in cases {
            let processors = Processors::new(options, &[], 1);
            let found = processors.candidates(&mut logits.to_vec(), &Search::new(options, &[2]));
            assert_eq!((found.len(), found[0].parent, found[0].token), (1, 0, token), "{name}");
            assert!(is_same(&[found[0].score], &[score]), "{name}: {}", found[0].score);
        }
    }

    /// Pearson's statistic of counts against probabilities; cells that are expected less than five times are one.
    fn chi_square(counts: &[u32], probabilities: &[f64]) -> (f64, usize) {
        let draws = f64::from(counts.iter().sum::<u32>());
        let (mut rest, mut cells) = ((0.0, 0.0), Vec::new());
        for (&count, &probability) in counts.iter().zip(probabilities) {
            match probability * draws {
                0.0 => assert_eq!(count, 0, "what is impossible was drawn"),
                expected if expected < 5.0 => rest = (rest.0 + f64::from(count), rest.1 + expected),
                expected => cells.push((f64::from(count), expected)),
            }
        }
        cells.extend((rest.1 > 0.0).then_some(rest));
        let statistic = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
        (statistic, cells.len() - 1)
    }

    /// What a chi-square variable exceeds once in ten thousand times (Wilson and Hilferty's approximation).
    fn limit(degrees: usize) -> f64 {
        let spread = 2.0 / (9.0 * degrees as f64);
        degrees as f64 * (1.0 - spread + 3.719 * spread.sqrt()).powi(3)
    }

    fn softmax(scores: &[f32]) -> Vec<f64> {
        let sum: f64 = scores.iter().map(|&x| f64::from(x).exp()).sum();
        scores.iter().map(|&x| f64::from(x).exp() / sum).collect()
    }

    #[test]
    fn samples_are_drawn_with_their_probabilities() {
        const ROWS: usize = 200;
        const ROUNDS: usize = 500;
        let default = || GenerationConfig {
            do_sample: true,
            top_k: 0,
            num_return_sequences: ROWS,
            ..GenerationConfig::default()
        };
        let row = Noise(5).row(37, 3.0);
        let cases = [
            ("plain", default()),
            ("temperature", GenerationConfig { temperature: 0.6, ..default() }),
            ("top_k", GenerationConfig { top_k: 6, temperature: 1.5, ..default() }),
            ("top_p", GenerationConfig { top_p: 0.8, ..default() }),
            ("after a processor", GenerationConfig { suppress_tokens: vec![0, 9], min_p: 0.05, ..default() }),
        ];
        for (name, options) in cases {
            let processors = Processors::new(&options, &[], 1);
            let mut processed = row.clone();
            processors.apply(&mut processed, &[2]);
            let mut counts = vec![0; row.len()];
            for round in 0..ROUNDS {
                let search = Search::new(&options, &[2]).drawing(Draws::new(round as u64, 0, [7]));
                let candidates = processors.candidates(&mut row.repeat(ROWS), &search);
                assert!(candidates.iter().enumerate().all(|(lane, candidate)| candidate.parent == lane), "{name}");
                candidates.iter().for_each(|candidate| counts[candidate.token as usize] += 1);
            }
            let (statistic, degrees) = chi_square(&counts, &softmax(&processed));
            assert!(statistic < limit(degrees), "{name}: {statistic} with {degrees} degrees of freedom: {counts:?}");
        }
    }

    #[test]
    fn beams_that_sample_draw_without_replacement_from_all_beams() {
        const VOCAB: usize = 5;
        let options = GenerationConfig { num_beams: 2, do_sample: true, top_k: 0, ..GenerationConfig::default() };
        let mut search = Search::new(&options, &[2]);
        let candidates = [(3, -0.2), (4, -0.9), (1, -2.0), (0, -2.5)];
        search.advance(&candidates.map(|(token, score)| Candidate { parent: 0, token, score }));
        let rows = Noise(6).row(2 * VOCAB, 1.0);
        let processors = Processors::new(&options, &[], 1);
        let mut sums = rows.clone();
        for (row, running) in sums.chunks_mut(VOCAB).zip([-0.2, -0.9]) {
            LogSumExp::of(row).apply(row);
            row.iter_mut().for_each(|score| *score += running);
        }
        let chance = softmax(&sums);
        let mut counts = vec![0; chance.len() * chance.len()];
        for seed in 0..60_000 {
            let search = search.clone().drawing(Draws::new(seed, 0, [7]));
            let found = processors.candidates(&mut rows.clone(), &search);
            assert_eq!(found.len(), 4);
            let places: Vec<usize> = found.iter().map(|found| found.parent * VOCAB + found.token as usize).collect();
            assert!(found.iter().zip(&places).all(|(found, &place)| (found.score - sums[place]).abs() < 1e-6));
            counts[places[0] * chance.len() + places[1]] += 1;
        }
        let pairs: Vec<f64> = (0..counts.len())
            .map(|pair| (pair / chance.len(), pair % chance.len()))
            .map(|(a, b)| if a == b { 0.0 } else { chance[a] * chance[b] / (1.0 - chance[a]) })
            .collect();
        let (statistic, degrees) = chi_square(&counts, &pairs);
        assert!(degrees > 60 && statistic < limit(degrees), "{statistic} with {degrees} degrees of freedom");
    }

    #[test]
    fn a_draw_is_the_token_in_whose_part_of_the_interval_the_number_falls() {
        let row = [-INF, 0.5f32.ln(), -INF, 0.25f32.ln(), 0.25f32.ln(), -INF];
        let cases = [(0.0, 1), (0.499, 1), (0.501, 3), (0.749, 3), (0.751, 4), (1.0 - f64::EPSILON / 2.0, 4)];
        for (u, token) in cases {
            assert_eq!(draw(&row, u), token, "{u}");
        }
        assert_eq!(draw(&[-INF; 3], 0.7), 0, "nothing is allowed");
    }

    #[test]
    fn beam_candidates_of_the_first_step_come_from_the_first_beam() {
        let options = GenerationConfig { num_beams: 2, ..GenerationConfig::default() };
        let row = [0.5, 4.0, 1.0, 2.0, 3.0, 0.0];
        let found =
            Processors::new(&options, &[], 1).candidates(&mut [row, row].concat(), &Search::new(&options, &[2]));
        let places: Vec<_> = found.iter().map(|candidate| (candidate.parent, candidate.token)).collect();
        assert_eq!(places, [(0, 1), (0, 4), (0, 3), (0, 2)]);
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((f64::from(found[0].score) - (4.0 - sum.ln())).abs() < 1e-6);
    }

    #[test]
    fn a_list_of_what_is_wanted_has_the_candidates_of_the_whole_rows() {
        let plain = GenerationConfig::default();
        let processed = GenerationConfig {
            repetition_penalty: 1.3,
            no_repeat_ngram_size: 2,
            encoder_no_repeat_ngram_size: 2,
            frequency_penalty: 0.4,
            min_length: 9,
            eos_token_id: vec![1, 40],
            suppress_tokens: vec![17, 600],
            ..plain.clone()
        };
        let mut noise = Noise(5);
        for (options, num_beams) in [(&plain, 1), (&plain, 3), (&processed, 1), (&processed, 3)] {
            let options = GenerationConfig { num_beams, ..options.clone() };
            let (processors, mut search) = (Processors::new(&options, &[7, 8, 9, 7], 1), Search::new(&options, &[2]));
            for step in 0..8 {
                let LogitsRequest::TopK { k: count, log_sum_exp: sum, sparse: true } =
                    processors.logits_request(&search, 0)
                else {
                    panic!("{options:?}: not to be listed")
                };
                let (vocab_size, width) = (700, count + 5);
                let mut logits = noise.row(vocab_size * num_beams, 4.0);
                let (mut listed, mut tokens) = (Vec::new(), Vec::new());
                for (at, row) in logits.chunks(vocab_size).enumerate() {
                    let mut order: Vec<u32> = (0..vocab_size as u32).collect();
                    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
                    // Some rows list more than they have to.
                    order.truncate(count + at);
                    order.sort_unstable();
                    listed.extend(order.iter().map(|&token| row[token as usize]));
                    order.resize(width, LogitsStats::NO_TOKEN);
                    tokens.extend(order);
                    listed.resize(tokens.len(), -INF);
                }
                let norms = logits.chunks(vocab_size).map(LogSumExp::of);
                let norms = if sum { norms.collect() } else { vec![LogSumExp::ZERO; num_beams] };
                let known = LogitsStats::sparse(norms, tokens).checked_against(&listed, num_beams).expect("as many");
                assert!(known.view().all_finite());
                let expected = processors.candidates(&mut logits, &search);
                let found = processors.candidates_with_stats(&mut listed, Some(known.view()), &search);
                assert_eq!(found, expected, "{num_beams} beams, step {step}, {options:?}");
                if search.advance(&found) == Progress::Done {
                    break;
                }
            }
        }
    }

    #[test]
    fn rows_are_not_written_unless_a_processor_acts() {
        let row = [0.5, 4.0, 1.0, 2.0, 3.0, 0.0];
        for num_beams in [1, 2] {
            let options = GenerationConfig { num_beams, min_length: 3, ..GenerationConfig::default() };
            let processors = Processors::new(&options, &[], 1);
            let mut logits = row.repeat(num_beams);
            processors.candidates(&mut logits, &Search::new(&options, &[2, 3, 4]));
            assert_eq!(logits, row.repeat(num_beams), "num_beams {num_beams}");
        }
    }
}
