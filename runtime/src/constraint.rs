//! `Constraint`: what the whole output has to be, as a limit on each next token. It is compiled once for a call;
//! a `Walk` follows it along the targets of one source row.
//!
//! # Design
//! Where a constraint stands is a function of the tokens generated so far. A walk remembers that for the targets of the
//! last two lengths and goes on from there, so the search needs to know nothing of it: whichever beams it continues,
//! drops or doubles, their histories lead to their states.

mod grammar;
mod phrases;
mod source;
mod trie;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::{FinishReason, Hypothesis};
use crate::options::{GenerationConfig, OptionError, PrefixAllowedTokens, Sequence};
use crate::scores::Limit;
use crate::search::{Candidate, Search};
use crate::tokenizer::{LazyTokenizer, TokenText};
use grammar::{Match, Next, Vocabulary};
use phrases::{Phrase, Phrases, Progress};
use source::Source;
use trie::Trie;

/// Compiles constraints for one model. The texts of its tokens are prepared by the first constraint that needs them.
pub(crate) struct Compiler {
    tokenizer: Arc<LazyTokenizer>,
    vocab_size: usize,
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
}

impl Compiler {
    /// A compiler for a model whose vocabulary has `vocab_size` tokens.
    pub fn new(tokenizer: Arc<LazyTokenizer>, vocab_size: usize) -> Compiler {
        Compiler { tokenizer, vocab_size, vocabulary: OnceLock::new() }
    }

    fn vocabulary(&self) -> Result<&Arc<Vocabulary>, Error> {
        let tokenizer = self.tokenizer.get()?;
        let prepare = || Vocabulary::new(tokenizer, self.vocab_size).map(Arc::new);
        self.vocabulary
            .get_or_init(prepare)
            .as_ref()
            .map_err(|problem| Error::Tokenizer { path: self.tokenizer.path().to_path_buf(), problem: problem.clone() })
    }
}

/// The constraints of a request, compiled. An output ends only where all of them are met.
pub(crate) struct Constraint {
    start: State,
    prompt_len: usize,
    max_length: usize,
    eos: Vec<i64>,
}

/// Where a target stands in each of the constraints.
type State = Vec<Place>;

/// One constraint and how far a target has come in it.
#[derive(Clone)]
enum Place {
    Sequences(Arc<Trie>, usize),
    /// Whether a phrase is to be written now stands in the progress.
    Phrases(Arc<Phrases>, Progress, Arc<[TokenText]>),
    Grammar(Match),
    Callback(PrefixAllowedTokens),
}

impl Constraint {
    /// Compiles what the options ask for; nothing if they ask for nothing.
    ///
    /// # Errors
    /// A grammar that cannot be compiled, tokens outside the vocabulary, text where the model has no tokenizer for it,
    /// sequences and phrases that are too long for `max_new_tokens`, or a cancellation.
    pub(crate) fn new(
        compiler: &Compiler,
        options: &GenerationConfig,
        prompt_len: usize,
        cancel: &Cancellation,
    ) -> Result<Option<Arc<Constraint>>, Error> {
        if !options.is_constrained() {
            return Ok(None);
        }
        let max_length = options.max_length(prompt_len);
        let room = max_length.saturating_sub(prompt_len);
        let mut start = Vec::new();
        if !options.allowed_sequences.is_empty() {
            let trie = allowed_sequences(compiler, &options.allowed_sequences, &options.eos_token_id, room)?;
            start.push(Place::Sequences(Arc::new(trie), 0));
        }
        if !options.required_phrases.is_empty() {
            let (phrases, texts) = required_phrases(compiler, &options.required_phrases, &options.eos_token_id, room)?;
            let progress = phrases.start();
            start.push(Place::Phrases(Arc::new(phrases), progress, texts));
        }
        let schema = options.json_schema.clone().map(Source::Schema);
        let regex = options.regex.clone().map(Source::Regex);
        let lark = options.grammar.clone().map(Source::Lark);
        for (name, expected, source) in [
            ("json_schema", "a JSON schema that can be compiled", schema),
            ("regex", "a regular expression that can be compiled", regex),
            ("grammar", "a Lark grammar that can be compiled", lark),
        ] {
            if let Some(source) = source {
                let compiled = compiler.vocabulary()?.compile(source, cancel)?;
                start.push(Place::Grammar(compiled.map_err(|found| OptionError::new(name, expected, found))?));
            }
        }
        start.extend(options.prefix_allowed_tokens.clone().map(Place::Callback));
        Ok(Some(Arc::new(Constraint { start, prompt_len, max_length, eos: options.eos_token_id.clone() })))
    }

    /// The state of a target that goes on with a token; nothing if it may not.
    fn advance(&self, state: &State, token: i64) -> Result<Option<State>, String> {
        if self.eos.contains(&token) {
            return Ok(None);
        }
        let mut state = state.clone();
        for place in &mut state {
            if !place.advance(token)? {
                return Ok(None);
            }
        }
        Ok(Some(state))
    }

    /// Sets the scores of what may not follow `history`, whose state this is, to −∞.
    fn limit(&self, row: usize, state: &mut State, history: &[i64], scores: &mut [f32]) -> Result<(), String> {
        // An end of sequence depends on the constraints being met, not on what they say of it as a token.
        let score = |scores: &[f32], token: i64| scores.get(usize::try_from(token).ok()?).copied();
        let mut ends: Vec<(i64, f32)> =
            self.eos.iter().filter_map(|&token| Some((token, score(scores, token)?))).collect();
        let room = self.max_length.saturating_sub(history.len());
        let best = || scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let best = if ends.is_empty() { f32::INFINITY } else { best() };
        let wants_to_end = ends.iter().any(|&(_, score)| score >= best);
        for place in state {
            match place {
                Place::Sequences(trie, at) => keep_only(scores, trie.tokens(*at)),
                Place::Phrases(phrases, progress, texts) => {
                    if wants_to_end {
                        phrases.insist(progress);
                    }
                    if let Some(tokens) = phrases.forced(progress, room, |token| bytes(texts, token)) {
                        keep_only(scores, tokens);
                    }
                }
                Place::Grammar(matched) => match matched.next()? {
                    Next::Nothing => scores.fill(f32::NEG_INFINITY),
                    Next::Tokens(tokens) => keep_set(scores, tokens.as_slice()),
                },
                Place::Callback(allowed) => {
                    let allowed = allowed.call(row, history);
                    check_allowed(&allowed, scores.len())?;
                    ends.retain(|(token, _)| allowed.contains(token));
                    keep_only(scores, allowed);
                }
            }
            if !place.is_met() {
                ends.clear();
            }
        }
        for &token in &self.eos {
            if let Some(score) = usize::try_from(token).ok().and_then(|token| scores.get_mut(token)) {
                let end = ends.iter().find(|(end, _)| *end == token);
                *score = end.map_or(f32::NEG_INFINITY, |&(_, score)| score);
            }
        }
        Ok(())
    }
}

impl Place {
    /// Goes on with a token: false if it may not.
    fn advance(&mut self, token: i64) -> Result<bool, String> {
        match self {
            Place::Sequences(trie, at) => match trie.advance(*at, token) {
                Some(next) => *at = next,
                None => return Ok(false),
            },
            Place::Phrases(phrases, progress, texts) => {
                *progress = phrases.advance(progress, token, bytes(texts, token));
            }
            Place::Grammar(matched) => return matched.advance(token),
            Place::Callback(_) => {}
        }
        Ok(true)
    }

    /// Whether a target may end here.
    fn is_met(&mut self) -> bool {
        match self {
            Place::Sequences(trie, at) => trie.is_end(*at),
            Place::Phrases(phrases, progress, _) => phrases.is_met(progress),
            Place::Grammar(matched) => matched.is_met(),
            Place::Callback(_) => true,
        }
    }
}

/// The tree of those sequences that fit into `room` tokens.
fn allowed_sequences(compiler: &Compiler, sequences: &[Sequence], eos: &[i64], room: usize) -> Result<Trie, Error> {
    const NAME: &str = "allowed_sequences";
    let mut all = Vec::new();
    for sequence in sequences {
        let mut tokens = tokens(compiler, NAME, sequence)?;
        // Written out or not, an end of sequence follows.
        tokens.pop_if(|last| eos.contains(last));
        check_ends(NAME, &tokens, eos)?;
        all.push(tokens);
    }
    let fitting: Vec<&[i64]> = all.iter().map(Vec::as_slice).filter(|tokens| tokens.len() <= room).collect();
    if fitting.is_empty() {
        let expected = format!("one that fits into the {room} tokens that may be generated");
        let shortest = all.iter().map(Vec::len).min().unwrap_or(0);
        return Err(OptionError::new(NAME, expected, format!("{shortest} tokens in the shortest")).into());
    }
    Ok(Trie::new(fitting))
}

/// The phrases with their spellings, and the texts of all tokens if a phrase is text.
fn required_phrases(
    compiler: &Compiler,
    sequences: &[Sequence],
    eos: &[i64],
    room: usize,
) -> Result<(Phrases, Arc<[TokenText]>), Error> {
    const NAME: &str = "required_phrases";
    let mut texts: Arc<[TokenText]> = Arc::new([]);
    let mut phrases = Vec::new();
    for sequence in sequences {
        let spelled = tokens(compiler, NAME, sequence)?;
        check_ends(NAME, &spelled, eos)?;
        let phrase = match sequence {
            Sequence::Tokens(_) => Phrase { text: None, spellings: vec![spelled] },
            Sequence::Text(text) => {
                texts = compiler.vocabulary()?.texts().clone();
                let spaced = tokens(compiler, NAME, &Sequence::Text(format!(" {text}")))?;
                let mut spellings = vec![spelled, spaced];
                spellings.retain(|spelling| spells(&texts, spelling, text));
                if spellings.is_empty() {
                    let expected = "text that the model's tokens can express";
                    return Err(OptionError::new(NAME, expected, format!("{text:?}")).into());
                }
                Phrase { text: Some(text.clone().into_bytes()), spellings }
            }
        };
        phrases.push(phrase);
    }
    let phrases = Phrases::new(phrases);
    let least = phrases.cost(&phrases.start());
    if least > room {
        let expected = format!("phrases that fit into the {room} tokens that may be generated");
        return Err(OptionError::new(NAME, expected, format!("{least} tokens together")).into());
    }
    Ok((phrases, texts))
}

/// Whether tokens write a text, apart from what stands before it.
fn spells(texts: &[TokenText], spelling: &[i64], text: &str) -> bool {
    let written: Vec<u8> = spelling.iter().flat_map(|&token| bytes(texts, token)).copied().collect();
    written.ends_with(text.as_bytes())
}

/// The tokens of a sequence, all of them in the vocabulary.
fn tokens(compiler: &Compiler, name: &str, sequence: &Sequence) -> Result<Vec<i64>, Error> {
    let vocab_size = compiler.vocab_size;
    let tokens = match sequence {
        Sequence::Text(text) => compiler.tokenizer.get()?.encode_target(text)?,
        Sequence::Tokens(tokens) => tokens.clone(),
    };
    match tokens.iter().find(|&&token| usize::try_from(token).map_or(true, |token| token >= vocab_size)) {
        None => Ok(tokens),
        Some(token) => {
            let expected = format!("token ids below {vocab_size}, the size of the vocabulary");
            Err(OptionError::new(name, expected, token.to_string()).into())
        }
    }
}

fn check_ends(name: &str, tokens: &[i64], eos: &[i64]) -> Result<(), OptionError> {
    match tokens.iter().find(|token| eos.contains(token)) {
        None => Ok(()),
        Some(end) => Err(OptionError::new(name, "no end of sequence before the end", format!("token {end}"))),
    }
}

/// The text of a token; of a special one, none.
fn bytes(texts: &[TokenText], token: i64) -> &[u8] {
    match usize::try_from(token).ok().and_then(|token| texts.get(token)) {
        Some(text) if !text.is_special => &text.bytes,
        _ => &[],
    }
}

/// Refuses what `prefix_allowed_tokens` may not return: nothing at all, or tokens that do not exist.
fn check_allowed(allowed: &[i64], vocab_size: usize) -> Result<(), String> {
    const NAME: &str = "prefix_allowed_tokens";
    let outside = |token: &&i64| usize::try_from(**token).map_or(true, |token| token >= vocab_size);
    match allowed.iter().find(outside) {
        Some(token) => Err(format!("{NAME} returned token {token}, expected token ids from 0 to {}", vocab_size - 1)),
        None if allowed.is_empty() => {
            Err(format!("{NAME} returned no token, expected at least one (an end of sequence, if nothing may follow)"))
        }
        None => Ok(()),
    }
}

/// Forbids all tokens but some.
fn keep_only(scores: &mut [f32], tokens: impl IntoIterator<Item = i64>) {
    let kept: Vec<(usize, f32)> = (tokens.into_iter())
        .filter_map(|token| usize::try_from(token).ok())
        .filter_map(|token| Some((token, *scores.get(token)?)))
        .collect();
    scores.fill(f32::NEG_INFINITY);
    for (token, score) in kept {
        scores[token] = score;
    }
}

/// Forbids all tokens but those of a set, a bit for each.
fn keep_set(scores: &mut [f32], set: &[u32]) {
    let words = set.iter().copied().chain(std::iter::repeat(0));
    for (scores, word) in scores.chunks_mut(u32::BITS as usize).zip(words) {
        for (bit, score) in scores.iter_mut().enumerate() {
            if word & (1 << bit) == 0 {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

/// The constraint along the targets of one source row.
pub(crate) struct Walk {
    constraint: Arc<Constraint>,
    row: usize,
    tracks: Mutex<Tracks>,
}

/// The states of the targets of the last two lengths; nothing for one that is not allowed.
#[derive(Default)]
struct Tracks {
    length: usize,
    now: HashMap<Vec<i64>, Option<State>>,
    before: HashMap<Vec<i64>, Option<State>>,
    failure: Option<String>,
    /// The best target of a beam search, with its score, when nothing could follow any.
    stuck: Option<(Vec<i64>, f32)>,
}

impl Tracks {
    /// The state of a target that has generated these tokens.
    fn state(&mut self, constraint: &Constraint, generated: &[i64]) -> Result<Option<&mut State>, String> {
        if generated.len() != self.length {
            let before =
                if generated.len() == self.length + 1 { std::mem::take(&mut self.now) } else { HashMap::new() };
            (self.length, self.now, self.before) = (generated.len(), HashMap::new(), before);
        }
        if !self.now.contains_key(generated) {
            let known = generated.split_last().and_then(|(_, parent)| self.before.get(parent));
            let (mut state, rest) = match known {
                Some(parent) => (parent.clone(), &generated[generated.len() - 1..]),
                None => (Some(constraint.start.clone()), generated),
            };
            for &token in rest {
                state = match &state {
                    Some(state) => constraint.advance(state, token)?,
                    None => None,
                };
            }
            self.now.insert(generated.to_vec(), state);
        }
        Ok(self.now.get_mut(generated).and_then(Option::as_mut))
    }
}

impl fmt::Debug for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("row", &self.row).finish_non_exhaustive()
    }
}

impl Limit for Walk {
    fn apply(&self, scores: &mut [f32], history: &[i64]) {
        let mut tracks = self.tracks();
        let generated = &history[self.constraint.prompt_len..];
        let limited = match tracks.state(&self.constraint, generated) {
            Ok(Some(state)) => self.constraint.limit(self.row, state, history, scores),
            Ok(None) => {
                scores.fill(f32::NEG_INFINITY);
                Ok(())
            }
            Err(failure) => Err(failure),
        };
        if let Err(failure) = limited {
            tracks.failure.get_or_insert(failure);
        }
    }
}

impl Walk {
    /// Starts for a source row.
    pub(crate) fn new(constraint: &Arc<Constraint>, row: usize) -> Walk {
        Walk { constraint: constraint.clone(), row, tracks: Mutex::default() }
    }

    fn tracks(&self) -> MutexGuard<'_, Tracks> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a target that has generated these tokens, and no end of sequence, meets the constraint.
    fn is_met(&self, generated: &[i64]) -> bool {
        let mut tracks = self.tracks();
        match tracks.state(&self.constraint, generated) {
            Ok(Some(state)) => state.iter_mut().all(Place::is_met),
            _ => false,
        }
    }

    /// Looks through a step's candidates for those that are forbidden: their targets end as they are.
    pub(crate) fn take(
        &self,
        candidates: &mut Vec<Candidate>,
        ends: &mut Vec<Option<FinishReason>>,
        search: &Search,
    ) -> Result<(), Error> {
        let mut tracks = self.tracks();
        if let Some(problem) = tracks.failure.take() {
            return Err(Error::Constraint { row: self.row, problem });
        }
        let is_forbidden = |candidate: &Candidate| candidate.score == f32::NEG_INFINITY;
        let are_all_forbidden = candidates.iter().all(is_forbidden);
        if search.compares_rows() && !search.sums_log_probabilities() && !are_all_forbidden {
            // Fewer first tokens than alternatives were asked for.
            let kept = candidates.iter().take_while(|candidate| !is_forbidden(candidate)).count();
            candidates.truncate(kept);
        }
        if search.sums_log_probabilities() && are_all_forbidden {
            let best = search.rows().start;
            let (history, score) = (search.history(best), search.running_score(best));
            tracks.stuck.get_or_insert_with(|| (history[self.constraint.prompt_len..].to_vec(), score));
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

    /// The hypotheses of a finished search with why they end. With beams, those that meet the constraint come first, each
    /// once; what is left of beams that found no target is dropped, so there may be fewer than were asked for. `ending` is what
    /// the score of a target gets besides.
    pub(crate) fn judged(
        &self,
        mut found: Vec<Hypothesis>,
        options: &GenerationConfig,
        ending: impl Fn(&[i64]) -> f32,
    ) -> Vec<Hypothesis> {
        let stuck = self.tracks().stuck.take();
        if options.num_beams > 1 {
            let mut seen: HashSet<Vec<i64>> = HashSet::new();
            found.retain(|hypothesis| !hypothesis.tokens.is_empty() && seen.insert(hypothesis.tokens.clone()));
            if found.is_empty() {
                let (tokens, score) = stuck.unwrap_or_default();
                let normaliser = (tokens.len().max(1) as f64).powf(options.length_penalty) as f32;
                found.push(Hypothesis {
                    score: Some(score / normaliser + ending(&tokens)),
                    tokens,
                    finish_reason: FinishReason::Constraint,
                    logprobs: None,
                    cross_attentions: None,
                });
            }
        }
        for hypothesis in &mut found {
            if hypothesis.finish_reason != FinishReason::Eos && !self.is_met(&hypothesis.tokens) {
                hypothesis.finish_reason = FinishReason::ConstraintIncomplete;
            }
        }
        if options.num_beams > 1 {
            found.sort_by_key(|hypothesis| hypothesis.finish_reason == FinishReason::ConstraintIncomplete);
            found.truncate(options.num_return_sequences);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::EarlyStopping;
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
        let walk = Arc::new(Walk::new(constraint, 0));
        let processors = Processors::new(options, &[], 1).limited(walk.clone());
        let num_return_sequences = options.num_return_sequences.max(options.num_beams);
        let of_search = GenerationConfig { num_return_sequences, ..options.clone() };
        let mut search = Search::new(&of_search, &[2]);
        loop {
            let mut scores: Vec<f32> = (0..search.width()).flat_map(|row| logits(search.history(row))).collect();
            let progress = loop {
                let mut candidates = processors.candidates(&mut scores, &search);
                let mut ends = Vec::new();
                walk.take(&mut candidates, &mut ends, &search).expect("no grammar here");
                match search.advance_to_ends(&candidates, &ends) {
                    Progress::Turn => {}
                    progress => break progress,
                }
            };
            if progress == Progress::Done {
                return walk.judged(search.finish(), options, |_| 0.0);
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
            let constraint = constraint(vec![Place::Sequences(trie, 0)], &options);
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
                let constraint = constraint(vec![Place::Sequences(trie, 0)], &options);
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
                let constraint = constraint(vec![Place::Sequences(trie, 0)], &options);
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
            let progress = phrases.start();
            let places =
                vec![Place::Callback(allowed.clone()), Place::Phrases(Arc::new(phrases), progress, Arc::new([]))];
            let constraint = constraint(places, &options);
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
