//! `Constraint`: a call's constraints on its outputs, as a filter of each next token. A [`Compiler`] compiles them once
//! per call; a [`ConstraintState`] tracks them along the targets of one source row.
//!
//! # Design
//! The state of a constraint is a function of the tokens generated so far. A `ConstraintState` caches it for the
//! targets of the last two lengths and continues from there, so that the search does not have to know: whichever beams
//! it continues, drops or duplicates, their histories lead to their states.

mod compiler;
#[cfg(feature = "constraints")]
mod grammar;
mod matcher;
mod phrases;
#[cfg(feature = "constraints")]
mod source;
mod state;
mod trie;

pub(crate) use compiler::Compiler;
use matcher::{Matcher, bytes};
pub(crate) use state::ConstraintState;

/// The compiled constraints of a call. An output ends only where all of them are satisfied.
pub(crate) struct Constraint {
    start: State,
    prompt_len: usize,
    max_length: usize,
    eos: Vec<i64>,
}

/// The state of a target in each of the constraints.
type State = Vec<Matcher>;

impl Constraint {
    /// The state of a target that is continued by a token; `None` if the token is not allowed.
    fn advance(&self, state: &State, token: i64) -> Result<Option<State>, String> {
        if self.eos.contains(&token) {
            return Ok(None);
        }
        let mut state = state.clone();
        for matcher in &mut state {
            if !matcher.advance(token)? {
                return Ok(None);
            }
        }
        Ok(Some(state))
    }

    /// Sets the scores of the tokens that may not follow `history`, a target in the given state, to −∞.
    fn filter(&self, row: usize, state: &mut State, history: &[i64], scores: &mut [f32]) -> Result<(), String> {
        // An end-of-sequence token is allowed exactly where the constraints are satisfied, even if they forbid it as a
        // token.
        let score = |scores: &[f32], token: i64| scores.get(usize::try_from(token).ok()?).copied();
        let mut ends: Vec<(i64, f32)> =
            self.eos.iter().filter_map(|&token| Some((token, score(scores, token)?))).collect();
        let room = self.max_length.saturating_sub(history.len());
        let best = || scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let best = if ends.is_empty() { f32::INFINITY } else { best() };
        let wants_to_end = ends.iter().any(|&(_, score)| score >= best);
        for matcher in state {
            match matcher {
                Matcher::Sequences { trie, node } => keep_only(scores, trie.tokens(*node)),
                Matcher::Phrases { phrases, state, texts } => {
                    if wants_to_end {
                        phrases.force(state);
                    }
                    if let Some(tokens) = phrases.allowed_tokens(state, room, |token| bytes(texts, token)) {
                        keep_only(scores, tokens);
                    }
                }
                #[cfg(feature = "constraints")]
                Matcher::Grammar(grammar) => match grammar.allowed_tokens()? {
                    None => scores.fill(f32::NEG_INFINITY),
                    Some(tokens) => keep_set(scores, tokens.as_slice()),
                },
                Matcher::Callback(allowed) => {
                    let allowed = allowed.call(row, history);
                    check_allowed(&allowed, scores.len())?;
                    ends.retain(|(token, _)| allowed.contains(token));
                    keep_only(scores, allowed);
                }
            }
            if !matcher.is_satisfied() {
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

/// Refuses an empty list or tokens outside the vocabulary from `prefix_allowed_tokens`.
fn check_allowed(allowed: &[i64], vocab_size: usize) -> Result<(), String> {
    const NAME: &str = "prefix_allowed_tokens";
    let outside = |token: &&i64| usize::try_from(**token).map_or(true, |token| token >= vocab_size);
    match allowed.iter().find(outside) {
        Some(token) => Err(format!("{NAME} returned token {token}, expected token ids from 0 to {}", vocab_size - 1)),
        None if allowed.is_empty() => Err(format!(
            "{NAME} returned no token, expected at least one (an end-of-sequence token if nothing may follow)"
        )),
        None => Ok(()),
    }
}

/// Forbids all other tokens.
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

/// Forbids the tokens that are not in a bit set.
#[cfg(feature = "constraints")]
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
