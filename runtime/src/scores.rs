//! From the logits of a search's rows to its candidates: logits processors, log-softmax and the choice of the best.
//!
//! A file of its own because it is the one place that walks whole vocabularies (256 thousand scores a row), and because
//! its arithmetic follows Hugging Face's float32 operations one by one (but for the order of the sum in log-softmax).
//! Only slices, no model and no tensors: which candidate becomes what is left to `search`. Standard library only.
//!
//! # Design
//! A processor is an item of a list in Hugging Face's order, so a new one (temperature, top-k, …) is one more item. Most
//! touch a handful of tokens; a pass over the vocabulary happens only in those whose definition needs it, and a row on
//! which no processor acts is never written.
//!
//! NaN ranks above every number, as in PyTorch: a NaN that no processor replaces yields a candidate whose score is NaN,
//! which the caller can refuse, and never a plausible token.

mod kept;
mod warpers;

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use t5gemma_kernels::log_softmax::{LogSumExp, exp};
use t5gemma_kernels::{Level, LogitsRequest, LogitsStats, LogitsStatsView};

use crate::draws::Draws;
use crate::options::{ExponentialDecay, GenerationConfig, LogitsProcessor, Position};
use crate::search::{Candidate, Search};
pub use kept::Kept;
use warpers::Warper;

/// A limit on the tokens that may come next, beyond what the options say token by token.
pub trait Limit: Debug + Send + Sync {
    /// Sets the scores of the tokens that may not follow `history` to −∞.
    fn apply(&self, scores: &mut [f32], history: &[i64]);
}

/// The logits processors that the options of a request ask for, for one source row.
#[derive(Clone, Debug)]
pub struct Processors {
    /// In the order of application.
    processors: Vec<Processor>,
    /// Of rows that are not of the whole vocabulary, whose logits they are: processors have these places for tokens then.
    kept: Option<Arc<Kept>>,
    /// What one of the caller's has done to scores, until it is asked for.
    fault: Arc<Mutex<Option<Fault>>>,
}

/// Scores that a [`LogitsProcessor`] of the caller's left and that no token can be chosen by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which of the processors, from 0.
    pub processor: usize,
    /// What it wrote.
    pub wrote: Wrote,
}

/// What a [`Fault`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrote {
    /// NaN.
    NaN,
    /// +∞.
    Infinity,
    /// −∞ for every token, so that none may come.
    Nothing,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrote = match self.wrote {
            Wrote::NaN => "wrote NaN, expected scores below infinity, or -inf to forbid a token",
            Wrote::Infinity => "wrote +inf, expected scores below infinity, or -inf to forbid a token",
            Wrote::Nothing => "left no token: the scores of all are -inf",
        };
        write!(f, "logits_processor[{}] {wrote}", self.processor)
    }
}

#[derive(Clone, Debug)]
enum Processor {
    /// Adds to the score of a token that completes a sequence. Bad words are sequences with a bias of −∞.
    SequenceBias(Vec<TokenBias>),
    /// Makes tokens less likely that groups of beams chose before in this step.
    Diversity(f32),
    /// Makes the tokens of the source likelier (the penalty is below 1 then).
    EncoderRepetitionPenalty { source: Vec<i64>, penalty: f32 },
    /// Makes the tokens of the history less likely.
    RepetitionPenalty(f32),
    /// Makes generated tokens less likely, by how often they were and that they were.
    Generated { frequency: f32, presence: f32, prompt_len: usize },
    /// Forbids n-grams that the history holds already.
    NoRepeatNgram(usize),
    /// Forbids n-grams of the source.
    EncoderNoRepeatNgram { source: Vec<i64>, size: usize },
    /// Forbids tokens as long as the history's length is in a range.
    Forbid { tokens: Vec<i64>, from: usize, to: usize },
    /// Allows only some tokens at one length of the history.
    Force { tokens: Vec<i64>, at: usize },
    /// Replaces NaN and infinities.
    RemoveInvalid,
    /// Raises the scores of the end-of-sequence tokens, the more the longer the history is than `start`.
    ExponentialDecay { eos: Vec<i64>, start: usize, factor: f64 },
    /// Does what the caller wants.
    Caller { processor: LogitsProcessor, number: usize, source: Vec<i64>, prompt_len: usize },
    /// Leaves only the tokens that a constraint on the whole output allows.
    Limit(Arc<dyn Limit>),
    /// Prepares a draw.
    Warp(Warper),
    /// Takes the logarithm of the softmax.
    Renormalize,
}

/// The biases of the sequences that end in one token.
#[derive(Clone, Debug)]
struct TokenBias {
    token: i64,
    /// What must end the history, and what is added then.
    sequences: Vec<(Vec<i64>, f32)>,
}

impl Processors {
    /// Prepares the processors that `options` ask for: `source` holds the encoder's tokens with their padding, and
    /// `prompt_len` counts the decoder's first tokens.
    pub fn new(options: &GenerationConfig, source: &[i64], prompt_len: usize) -> Processors {
        let mut processors = Vec::new();
        let eos = &options.eos_token_id;
        if !options.sequence_bias.is_empty() {
            let sequences = options.sequence_bias.iter().map(|entry| (entry.tokens.as_slice(), entry.bias));
            processors.push(sequence_bias(sequences));
        }
        if options.diversity_penalty != 0.0 {
            processors.push(Processor::Diversity(options.diversity_penalty as f32));
        }
        if options.encoder_repetition_penalty != 1.0 {
            let penalty = (1.0 / options.encoder_repetition_penalty) as f32;
            processors.push(Processor::EncoderRepetitionPenalty { source: source.to_vec(), penalty });
        }
        if options.repetition_penalty != 1.0 {
            processors.push(Processor::RepetitionPenalty(options.repetition_penalty as f32));
        }
        let (frequency, presence) = (options.frequency_penalty as f32, options.presence_penalty as f32);
        if (frequency, presence) != (0.0, 0.0) {
            processors.push(Processor::Generated { frequency, presence, prompt_len });
        }
        if options.no_repeat_ngram_size > 0 {
            processors.push(Processor::NoRepeatNgram(options.no_repeat_ngram_size));
        }
        if options.encoder_no_repeat_ngram_size > 0 {
            let size = options.encoder_no_repeat_ngram_size;
            processors.push(Processor::EncoderNoRepeatNgram { source: source.to_vec(), size });
        }
        if !options.bad_words_ids.is_empty() {
            let is_eos = |word: &[i64]| matches!(word, [token] if eos.contains(token));
            let words = options.bad_words_ids.iter().map(Vec::as_slice).filter(|word| !is_eos(word));
            processors.push(sequence_bias(words.map(|word| (word, f32::NEG_INFINITY))));
        }
        // min_new_tokens has precedence over min_length, which counts the prompt.
        let min_length = match options.min_new_tokens {
            Some(min_new_tokens) => prompt_len.saturating_add(min_new_tokens),
            None => options.min_length,
        };
        if min_length > 0 {
            processors.push(Processor::Forbid { tokens: eos.clone(), from: 0, to: min_length });
        }
        if let Some(token) = options.forced_bos_token_id {
            processors.push(Processor::Force { tokens: vec![token], at: 1 });
        }
        if !options.forced_eos_token_id.is_empty() {
            let at = options.max_length(prompt_len).saturating_sub(1);
            processors.push(Processor::Force { tokens: options.forced_eos_token_id.clone(), at });
        }
        if options.remove_invalid_values {
            processors.push(Processor::RemoveInvalid);
        }
        if let Some(ExponentialDecay { start, factor }) = options.exponential_decay_length_penalty {
            let start = start.saturating_add(prompt_len);
            processors.push(Processor::ExponentialDecay { eos: eos.clone(), start, factor });
        }
        if !options.suppress_tokens.is_empty() {
            let tokens = options.suppress_tokens.clone();
            processors.push(Processor::Forbid { tokens, from: 0, to: usize::MAX });
        }
        if !options.begin_suppress_tokens.is_empty() {
            let is_forced = prompt_len == 1 && options.forced_bos_token_id.is_some();
            let from = if is_forced { 2 } else { prompt_len };
            let tokens = options.begin_suppress_tokens.clone();
            processors.push(Processor::Forbid { tokens, from, to: from + 1 });
        }
        processors.extend(options.logits_processor.iter().enumerate().map(|(number, processor)| Processor::Caller {
            processor: processor.clone(),
            number,
            source: source.to_vec(),
            prompt_len,
        }));
        processors.extend(warpers::warpers(options).into_iter().map(Processor::Warp));
        if options.renormalize_logits {
            processors.push(Processor::Renormalize);
        }
        Processors { processors, kept: None, fault: Arc::default() }
    }

    /// For rows of the logits of kept tokens alone. Tokens are still what goes in and comes out.
    ///
    /// # Panics
    /// If [`Processors::see_all`].
    pub fn keeping(mut self, kept: Arc<Kept>) -> Processors {
        let replace = |tokens: &mut [i64]| tokens.iter_mut().for_each(|token| *token = kept.place(*token));
        for processor in &mut self.processors {
            match processor {
                Processor::SequenceBias(biases) => {
                    for TokenBias { token, sequences } in biases {
                        replace(std::slice::from_mut(token));
                        sequences.iter_mut().for_each(|(prefix, _)| replace(prefix));
                    }
                }
                Processor::EncoderRepetitionPenalty { source, .. } | Processor::EncoderNoRepeatNgram { source, .. } => {
                    replace(source)
                }
                Processor::Forbid { tokens, .. }
                | Processor::Force { tokens, .. }
                | Processor::ExponentialDecay { eos: tokens, .. } => replace(tokens),
                Processor::Caller { .. } | Processor::Limit(_) => unreachable!("these see rows of the vocabulary"),
                Processor::Diversity(_)
                | Processor::RepetitionPenalty(_)
                | Processor::Generated { .. }
                | Processor::NoRepeatNgram(_)
                | Processor::RemoveInvalid
                | Processor::Warp(_)
                | Processor::Renormalize => {}
            }
        }
        self.kept = Some(kept);
        self
    }

    /// Whether someone is shown whole rows, in which a token's score is at the token's place.
    pub fn see_all(&self) -> bool {
        self.processors.iter().any(|processor| matches!(processor, Processor::Caller { .. } | Processor::Limit(_)))
    }

    /// Tokens as the processors have them.
    fn places<'t>(&self, tokens: &'t [i64]) -> Cow<'t, [i64]> {
        match &self.kept {
            None => tokens.into(),
            Some(kept) => tokens.iter().map(|&token| kept.place(token)).collect(),
        }
    }

    /// Adds a limit. It acts after the processors that forbid tokens, so that what either forbids is forbidden, and before
    /// those of sampling, which choose among what is left.
    pub fn limited(mut self, limit: Arc<dyn Limit>) -> Processors {
        let is_later = |processor: &Processor| matches!(processor, Processor::Warp(_) | Processor::Renormalize);
        let place = self.processors.iter().position(is_later);
        self.processors.insert(place.unwrap_or(self.processors.len()), Processor::Limit(limit));
        self
    }

    /// What the next step needs of the logits, or one that is `ahead` tokens later.
    pub(crate) fn wanted(&self, search: &Search, ahead: usize) -> LogitsRequest {
        let length = search.history(search.rows().start).len() + ahead;
        let sum = search.sums_log_probabilities();
        // Beams and draws beside each other may leave what others choose from.
        let mut count = if search.compares_rows() { search.candidates() } else { 1 };
        let mut is_cut = search.draws().is_none();
        let mut listed = is_cut;
        for processor in self.processors.iter().filter(|processor| processor.is_active(length)) {
            // Where a processor makes some tokens less likely, as many that follow them may take their place.
            let more = match processor {
                Processor::Forbid { tokens, .. } => tokens.len(),
                Processor::RepetitionPenalty(penalty) if *penalty >= 1.0 => length,
                Processor::Generated { frequency, presence, .. } if *frequency >= 0.0 && *presence >= 0.0 => length,
                Processor::NoRepeatNgram(_) => length,
                Processor::EncoderNoRepeatNgram { source, .. } => source.len(),
                Processor::Warp(Warper::Temperature(_)) => 0,
                // What others leave of these does not depend on the rest.
                Processor::Warp(Warper::TopK(kept)) => {
                    is_cut = true;
                    *kept
                }
                Processor::Warp(Warper::TopP { .. } | Warper::MinP { .. } | Warper::Typical { .. }) if is_cut => 0,
                Processor::Warp(Warper::Epsilon { .. } | Warper::Eta { .. }) if is_cut => 0,
                _ => return LogitsRequest::All,
            };
            count = count.saturating_add(more);
            // Warpers look at whole rows.
            listed &= !matches!(processor, Processor::Warp(_));
        }
        if is_cut { LogitsRequest::TopK { k: count, log_sum_exp: sum, sparse: listed } } else { LogitsRequest::All }
    }

    /// Applies the processors to the scores of one row: logits for greedy search, log-probabilities for beam search.
    /// `history` is the row's prompt and generated tokens; tokens outside the vocabulary are passed over.
    pub fn apply(&self, scores: &mut [f32], history: &[i64]) {
        self.apply_after(&mut Row { scores, listed: &[] }, history, &[]);
    }

    /// [`Processors::apply`] after groups of beams have chosen tokens in this step. Tells which of the caller's processors
    /// left no token, if one did.
    fn apply_after(&self, row: &mut Row, history: &[i64], chosen: &[i64]) -> Option<usize> {
        let mut emptied = None;
        for processor in &self.processors {
            if !processor.is_active(history.len()) {
                continue;
            }
            let caller = match processor {
                Processor::Caller { number, .. } => Some((*number, allows_any(row.scores))),
                _ => None,
            };
            processor.apply(row, history, chosen);
            let Some((processor, allowed)) = caller else { continue };
            if let Some(wrote) = wrote(row.scores) {
                self.fault().get_or_insert(Fault { processor, wrote });
            } else if allowed && !allows_any(row.scores) {
                emptied.get_or_insert(processor);
            }
        }
        emptied
    }

    fn fault(&self) -> MutexGuard<'_, Option<Fault>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the caller's processors have done to the scores of the rows that were looked at since this was asked.
    pub fn take_fault(&self) -> Option<Fault> {
        self.fault().take()
    }

    /// Chooses the candidates of one step: for a search that compares rows the best or, where it samples, draws without
    /// replacement in the order drawn; otherwise the best or a draw of each row. Ties go by row and then token.
    ///
    /// `logits` holds [`Search::width`] rows of one vocabulary, or of the kept tokens, and is overwritten where a processor acts. Beam search
    /// adds processed log-probabilities to the beams' scores; otherwise the processed logits count.
    ///
    /// # Panics
    /// If `logits` is empty or not a whole number of rows.
    pub fn candidates(&self, logits: &mut [f32], search: &Search) -> Vec<Candidate> {
        self.candidates_of(logits, None, search)
    }

    /// The same, of rows of which so much is known.
    pub(crate) fn candidates_of(
        &self,
        logits: &mut [f32],
        known: Option<LogitsStatsView>,
        search: &Search,
    ) -> Vec<Candidate> {
        let vocab_size = logits.len() / search.width();
        assert!(vocab_size > 0 && vocab_size * search.width() == logits.len(), "logits are rows of one vocabulary");
        let mut best = Best::new(search.candidates());
        let mut of_rows = Vec::new();
        let rows = search.rows();
        let (chosen, mut maxima) = (self.places(search.chosen()), Vec::new());
        let mut emptied = Vec::new();
        for (beam, row) in logits.chunks_exact_mut(vocab_size).enumerate().take(rows.end).skip(rows.start) {
            let history = &*self.places(search.history(beam));
            let mut norm = LogSumExp::ZERO;
            maxima.clear();
            let changes = self.processors.iter().any(|processor| processor.is_active(history.len()));
            if let (Some(known), false) = (known, changes) {
                maxima.extend_from_slice(known.block_maxima(beam));
            }
            if search.sums_log_probabilities() {
                norm = match known {
                    Some(known) => known.log_sum_exp(beam),
                    None => LogSumExp::with_block_maxima(row, &mut maxima),
                };
                if changes {
                    norm.apply(row);
                    norm = LogSumExp::ZERO;
                    maxima.clear();
                }
            }
            let listed = known.map_or(&[][..], |known| known.rows(beam, 1).tokens());
            emptied.push(self.apply_after(&mut Row { scores: row, listed }, history, &chosen));
            let (step, running) = (history.len() as u32, search.running_score(beam));
            match (search.compares_rows(), search.draws()) {
                (true, None) => best.take_row(beam, row, &maxima, |x| norm.log_probability(x) + running),
                (true, Some(draws)) => best.draw_row(beam, row, |x| norm.log_probability(x) + running, draws, step),
                (false, None) => {
                    let mut best = Best::new(1);
                    best.take_row(beam, row, &maxima, |x| x);
                    of_rows.extend(best.candidates);
                }
                (false, Some(draws)) => {
                    let token = draw(row, draws.uniform(step, search.lane(beam)));
                    of_rows.push(Candidate { parent: beam, token: token as i64, score: row[token] });
                }
            }
        }
        // Of rows that are compared, one without tokens is dropped for the others. Under a constraint it ends where it is.
        let by = if search.compares_rows() {
            emptied.iter().copied().min().flatten()
        } else {
            emptied.iter().flatten().next().copied()
        };
        let is_limited = self.processors.iter().any(|processor| matches!(processor, Processor::Limit(_)));
        if let Some(processor) = by.filter(|_| !is_limited) {
            self.fault().get_or_insert(Fault { processor, wrote: Wrote::Nothing });
        }
        let mut candidates = if search.compares_rows() { best.candidates } else { of_rows };
        if let Some(known) = known.filter(|known| !known.tokens().is_empty()) {
            candidates
                .iter_mut()
                .for_each(|candidate| candidate.token = known.token(candidate.parent, candidate.token as usize));
        }
        if let Some(kept) = &self.kept {
            candidates.iter_mut().for_each(|candidate| candidate.token = kept.token(candidate.token));
        }
        candidates
    }
}

/// Draws a token with the probability that the softmax of the scores gives it: the first for which the probabilities up to
/// and with it exceed `u`. Where nothing is allowed, the first of all.
fn draw(row: &[f32], u: f64) -> usize {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: f32| if x == f32::NEG_INFINITY { 0.0 } else { f64::from(exp(x - max)) };
    let limit = row.iter().map(|&x| weight(x)).sum::<f64>() * u;
    let (mut sum, mut last) = (0.0, 0);
    for (token, &x) in row.iter().enumerate().filter(|(_, x)| **x != f32::NEG_INFINITY) {
        sum += weight(x);
        last = token;
        if sum > limit {
            break;
        }
    }
    last
}

/// Whether a token may come at all.
fn allows_any(scores: &[f32]) -> bool {
    scores.iter().any(|&score| score != f32::NEG_INFINITY)
}

/// What scores hold that none may be.
fn wrote(scores: &[f32]) -> Option<Wrote> {
    // In blocks, so that the compiler can compare many at once.
    let is_usable = |block: &[f32]| block.iter().fold(true, |usable, &score| usable & (score < f32::INFINITY));
    let block = scores.chunks(4096).find(|block| !is_usable(block))?;
    Some(if block.iter().any(|score| score.is_nan()) { Wrote::NaN } else { Wrote::Infinity })
}

/// A row of scores.
struct Row<'r> {
    scores: &'r mut [f32],
    /// Of which tokens they are, in order; nothing if they are of all.
    listed: &'r [u32],
}

impl Row<'_> {
    /// The score of a token, if there is one.
    fn at(&mut self, token: i64) -> Option<&mut f32> {
        let place = match self.listed {
            [] => usize::try_from(token).ok()?,
            listed => listed.binary_search(&u32::try_from(token).ok()?).ok()?,
        };
        self.scores.get_mut(place)
    }
}

impl Processor {
    /// Whether it can change anything for a history of this length.
    fn is_active(&self, length: usize) -> bool {
        match *self {
            Processor::NoRepeatNgram(size) => length >= size,
            Processor::EncoderNoRepeatNgram { size, .. } => length + 1 >= size,
            Processor::Forbid { from, to, .. } => (from..to).contains(&length),
            Processor::Force { at, .. } => length == at,
            Processor::Generated { prompt_len, .. } => length > prompt_len,
            Processor::ExponentialDecay { start, .. } => length > start,
            Processor::SequenceBias(_)
            | Processor::Diversity(_)
            | Processor::EncoderRepetitionPenalty { .. }
            | Processor::RepetitionPenalty(_)
            | Processor::RemoveInvalid
            | Processor::Caller { .. }
            | Processor::Warp(_)
            | Processor::Limit(_)
            | Processor::Renormalize => true,
        }
    }

    /// Changes the scores; the history is of a length for which it is active.
    fn apply(&self, row: &mut Row, history: &[i64], chosen: &[i64]) {
        match self {
            Processor::Diversity(penalty) => {
                // Each beam that chose a token counts.
                for &token in chosen {
                    if let Some(score) = row.at(token) {
                        *score -= penalty;
                    }
                }
            }
            Processor::SequenceBias(biases) => {
                for TokenBias { token, sequences } in biases {
                    let active = sequences.iter().filter(|(prefix, _)| history.ends_with(prefix));
                    if let Some(bias) = active.map(|&(_, bias)| bias).reduce(|sum, bias| sum + bias)
                        && let Some(score) = row.at(*token)
                    {
                        *score += bias;
                    }
                }
            }
            Processor::EncoderRepetitionPenalty { source, penalty } => penalise(row, source, *penalty),
            Processor::RepetitionPenalty(penalty) => penalise(row, history, *penalty),
            Processor::Generated { frequency, presence, prompt_len } => {
                let mut counts: HashMap<i64, u32> = HashMap::new();
                history[*prompt_len..].iter().for_each(|&token| *counts.entry(token).or_default() += 1);
                for (token, count) in counts {
                    if let Some(score) = row.at(token) {
                        *score -= count as f32 * frequency + presence;
                    }
                }
            }
            Processor::NoRepeatNgram(size) => forbid_ngrams(row, history, history, *size),
            Processor::EncoderNoRepeatNgram { source, size } => forbid_ngrams(row, source, history, *size),
            Processor::Forbid { tokens, .. } => set(row, tokens, f32::NEG_INFINITY),
            Processor::Force { tokens, .. } => {
                row.scores.fill(f32::NEG_INFINITY);
                set(row, tokens, 0.0);
            }
            Processor::RemoveInvalid => {
                for score in row.scores.iter_mut() {
                    *score = if score.is_nan() { 0.0 } else { score.clamp(f32::MIN, f32::MAX) };
                }
            }
            Processor::ExponentialDecay { eos, start, factor } => {
                let growth = (factor.powf((history.len() - start) as f64) - 1.0) as f32;
                update(row, eos, |score| if score.is_finite() { score + score.abs() * growth } else { score });
            }
            Processor::Caller { processor, source, prompt_len, .. } => {
                processor.apply(&Position { source, history, prompt_len: *prompt_len }, row.scores);
            }
            Processor::Warp(warper) => warper.apply(row.scores),
            Processor::Limit(limit) => limit.apply(row.scores, history),
            Processor::Renormalize => LogSumExp::of(row.scores).apply(row.scores),
        }
    }
}

/// Collects biased sequences by their last token; of a sequence given twice the last bias counts, as in a dictionary.
fn sequence_bias<'a>(sequences: impl Iterator<Item = (&'a [i64], f32)>) -> Processor {
    let mut places: HashMap<&[i64], usize> = HashMap::new();
    let mut distinct: Vec<(&[i64], f32)> = Vec::new();
    for (tokens, bias) in sequences.filter(|(tokens, _)| !tokens.is_empty()) {
        match places.entry(tokens) {
            Entry::Occupied(place) => distinct[*place.get()].1 = bias,
            Entry::Vacant(place) => {
                place.insert(distinct.len());
                distinct.push((tokens, bias));
            }
        }
    }
    // Sums of float32 depend on their order: single tokens first, then by length in the order lengths first appear.
    let mut lengths: HashMap<usize, usize> = HashMap::from([(1, 0)]);
    for (tokens, _) in &distinct {
        let next = lengths.len();
        lengths.entry(tokens.len()).or_insert(next);
    }
    distinct.sort_by_key(|(tokens, _)| lengths[&tokens.len()]);

    let mut places: HashMap<i64, usize> = HashMap::new();
    let mut biases: Vec<TokenBias> = Vec::new();
    for (tokens, bias) in distinct {
        let (&token, prefix) = tokens.split_last().expect("empty sequences were passed over");
        let place = *places.entry(token).or_insert_with(|| {
            biases.push(TokenBias { token, sequences: Vec::new() });
            biases.len() - 1
        });
        biases[place].sequences.push((prefix.to_vec(), bias));
    }
    Processor::SequenceBias(biases)
}

/// Moves the scores of tokens away from what is likely; a token that occurs twice is moved once.
fn penalise(row: &mut Row, tokens: &[i64], penalty: f32) {
    update(row, tokens, |score| if score < 0.0 { score * penalty } else { score / penalty });
}

/// Forbids every token that would complete an n-gram of `text`.
fn forbid_ngrams(row: &mut Row, text: &[i64], history: &[i64], size: usize) {
    let prefix = &history[history.len() + 1 - size..];
    for ngram in text.windows(size).filter(|ngram| ngram.starts_with(prefix)) {
        set(row, &ngram[size - 1..], f32::NEG_INFINITY);
    }
}

/// Replaces the scores of tokens by a function of what they were before any was replaced.
fn update(row: &mut Row, tokens: &[i64], new: impl Fn(f32) -> f32) {
    let replaced: Vec<(i64, f32)> =
        tokens.iter().filter_map(|&token| row.at(token).map(|score| (token, new(*score)))).collect();
    for (token, score) in replaced {
        set(row, &[token], score);
    }
}

fn set(row: &mut Row, tokens: &[i64], score: f32) {
    for &token in tokens {
        if let Some(place) = row.at(token) {
            *place = score;
        }
    }
}

/// The log-probabilities of the tokens at one place.
pub(crate) struct LogProbabilities<'a> {
    logits: &'a [f32],
    norm: LogSumExp,
}

impl<'a> LogProbabilities<'a> {
    /// Those that `logits` amount to.
    pub fn of(logits: &'a [f32]) -> LogProbabilities<'a> {
        LogProbabilities { logits, norm: LogSumExp::of(logits) }
    }

    /// That of a token of the vocabulary.
    pub fn token(&self, token: i64) -> f32 {
        self.norm.log_probability(self.logits[token as usize])
    }

    /// The likeliest tokens with theirs, best first.
    pub fn best(&self, count: usize) -> Vec<(i64, f32)> {
        let mut best = Best::new(count);
        best.take_row(0, self.logits, &[], |x| self.norm.log_probability(x));
        best.candidates.into_iter().map(|candidate| (candidate.token, candidate.score)).collect()
    }
}

/// The best candidates among the rows seen so far, rows coming in the order of beams.
struct Best {
    count: usize,
    /// Best first. Few enough that an insertion may move them all.
    candidates: Vec<Candidate>,
    /// What each of them is compared by: its score, or that with noise.
    keys: Vec<f32>,
}

impl Best {
    fn new(count: usize) -> Best {
        Best { count, candidates: Vec::with_capacity(count + 1), keys: Vec::with_capacity(count + 1) }
    }

    /// Offers every token of a row, whose score does not fall as `x` grows. Where the greatest of each [`LogitsStats::BLOCK`] are known
    /// only blocks are looked at that may have a place.
    fn take_row(&mut self, beam: usize, row: &[f32], maxima: &[f32], score: impl Fn(f32) -> f32) {
        if maxima.is_empty() {
            return self.take_part(beam, 0, row, score);
        }
        for (at, (block, &max)) in row.chunks(LogitsStats::BLOCK).zip(maxima).enumerate() {
            let best = score(max);
            if self.worst().is_none_or(|worst| best > worst || best.is_nan()) {
                self.take_part(beam, at * LogitsStats::BLOCK, block, &score);
            }
        }
    }

    /// Offers the tokens from `first` on.
    fn take_part(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        #[cfg(target_arch = "x86_64")]
        match t5gemma_kernels::level() {
            // SAFETY: `level` returns what the processor supports.
            Level::Amx | Level::Vnni => return unsafe { self.take_part_with_avx512(beam, first, part, score) },
            // SAFETY: `level` returns what the processor supports.
            Level::Avx2 => return unsafe { self.take_part_with_avx2(beam, first, part, score) },
            Level::Generic => {}
        }
        self.take_part_anywhere(beam, first, part, score);
    }

    /// The same candidates as without.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn take_part_with_avx512(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        self.take_part_anywhere(beam, first, part, score);
    }

    /// The same candidates as without, in half the time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn take_part_with_avx2(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        self.take_part_anywhere(beam, first, part, score);
    }

    #[inline(always)]
    fn take_part_anywhere(&mut self, beam: usize, first: usize, part: &[f32], score: impl Fn(f32) -> f32) {
        const BLOCK: usize = 64;
        for (block, xs) in part.chunks(BLOCK).enumerate() {
            // A whole block is compared without branches; few blocks hold a score that is good enough.
            if let Some(worst) = self.worst() {
                let mut any = false;
                for &x in xs {
                    let score = score(x);
                    any |= (score > worst) | score.is_nan();
                }
                if !any {
                    continue;
                }
            }
            for (place, &x) in xs.iter().enumerate() {
                let token = (first + block * BLOCK + place) as i64;
                let score = score(x);
                self.offer(score, Candidate { parent: beam, token, score });
            }
        }
    }

    /// Offers every token of a row at its score with Gumbel noise: the best of these are draws without replacement from
    /// the softmax of the scores of all rows, in the order drawn.
    fn draw_row(&mut self, beam: usize, row: &[f32], score: impl Fn(f32) -> f32, draws: &Draws, step: u32) {
        const BLOCK: usize = 4;
        for (block, xs) in row.chunks(BLOCK).enumerate() {
            if self.worst().is_some() && xs.iter().all(|&x| x == f32::NEG_INFINITY) {
                continue;
            }
            let noise = draws.open_uniforms(step, (beam as u32) << 24 | block as u32);
            for (place, (&x, u)) in xs.iter().zip(noise).enumerate() {
                let token = (block * BLOCK + place) as i64;
                let score = score(x);
                self.offer(score - (-u.ln()).ln() as f32, Candidate { parent: beam, token, score });
            }
        }
    }

    /// The key to beat.
    fn worst(&self) -> Option<f32> {
        self.keys.get(self.count - 1).copied()
    }

    fn offer(&mut self, key: f32, candidate: Candidate) {
        let rank = rank(key);
        // Beams and tokens ascend, so of equal keys the newcomer is the last.
        let place = match self.worst() {
            Some(worst) if self::rank(worst) >= rank => return,
            _ => self.keys.partition_point(|&kept| self::rank(kept) >= rank),
        };
        self.candidates.truncate(self.count - 1);
        self.candidates.insert(place, candidate);
        self.keys.truncate(self.count - 1);
        self.keys.insert(place, key);
    }
}

/// Orders scores as whole numbers: −0 and 0 alike, NaN above all.
fn rank(score: f32) -> i32 {
    if score.is_nan() {
        return i32::MAX;
    }
    let bits = (score + 0.0).to_bits() as i32;
    if bits < 0 { bits ^ i32::MAX } else { bits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::SequenceBias;

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

            let mut best = Best::new(count);
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
                let LogitsRequest::TopK { k: count, log_sum_exp: sum, sparse: true } = processors.wanted(&search, 0)
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
                let found = processors.candidates_of(&mut listed, Some(known.view()), &search);
                assert_eq!(found, expected, "{num_beams} beams, step {step}, {options:?}");
                if search.advance(&found) == crate::search::Progress::Done {
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
