//! Phrases that must occur in an output before it may end. They are forced if the model would end without them, or if
//! the remaining length leaves room for nothing else.
//!
//! # Design
//! A text occurs as text, however it is split into tokens; a list of tokens occurs as these tokens. Forcing works on
//! tokens: those of the phrase, or those of the phrase after a space. The cost of a state is the number of tokens that
//! the missing phrases still take when written one after the other, less those already written of the one that is
//! furthest along, since only one can be in progress. A token is allowed if the state it leads to costs no more than
//! the remaining length. From a state that is affordable such a token always exists: the next one of the phrase in
//! progress. Where the model would end, only tokens that advance a phrase are allowed until one has occurred.

/// The phrases of a request.
#[derive(Debug)]
pub(super) struct Phrases {
    phrases: Vec<Phrase>,
}

/// One phrase.
#[derive(Debug)]
pub(super) struct Phrase {
    /// The bytes to find, for a phrase given as text.
    pub text: Option<Vec<u8>>,
    /// The non-empty token sequences that spell it.
    pub spellings: Vec<Vec<i64>>,
}

/// How much of the phrases an output contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PhrasesState {
    phrases: Vec<PhraseState>,
    /// Whether a phrase is forced now, whatever the model prefers.
    is_forced: bool,
    /// Whether the last token ends with a character of a word.
    ends_in_word: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct PhraseState {
    has_occurred: bool,
    /// Number of bytes of the text that the output ends with.
    bytes: usize,
    /// For each spelling, the number of its tokens that the output ends with.
    tokens: Vec<usize>,
}

impl Phrase {
    /// The number of tokens of its longest spelling.
    fn length(&self) -> usize {
        self.spellings.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The state of an output continued by a token whose text is `bytes`.
    fn advance(&self, state: &PhraseState, token: i64, bytes: &[u8]) -> PhraseState {
        let mut next = state.clone();
        if state.has_occurred {
            return next;
        }
        for (spelling, matched) in self.spellings.iter().zip(&mut next.tokens) {
            *matched = longer(spelling, *matched, &token);
            next.has_occurred |= *matched == spelling.len();
        }
        if let Some(text) = &self.text {
            for byte in bytes {
                next.bytes = longer(text, next.bytes, byte);
                next.has_occurred |= next.bytes == text.len();
            }
        }
        next
    }
}

impl Phrases {
    pub(super) fn new(phrases: Vec<Phrase>) -> Phrases {
        Phrases { phrases }
    }

    pub(super) fn start(&self) -> PhrasesState {
        let start =
            |phrase: &Phrase| PhraseState { has_occurred: false, bytes: 0, tokens: vec![0; phrase.spellings.len()] };
        PhrasesState { phrases: self.phrases.iter().map(start).collect(), is_forced: false, ends_in_word: false }
    }

    pub(super) fn advance(&self, state: &PhrasesState, token: i64, bytes: &[u8]) -> PhrasesState {
        let phrases: Vec<PhraseState> = (self.phrases.iter().zip(&state.phrases))
            .map(|(phrase, state)| phrase.advance(state, token, bytes))
            .collect();
        let missing = |phrases: &[PhraseState]| phrases.iter().filter(|phrase| !phrase.has_occurred).count();
        let is_forced = state.is_forced && missing(&phrases) == missing(&state.phrases);
        let ends_in_word = str::from_utf8(bytes).is_ok_and(|text| text.chars().next_back().is_some_and(is_of_word));
        PhrasesState { phrases, is_forced, ends_in_word }
    }

    /// Forces a phrase from here on until it has occurred.
    pub(super) fn force(&self, state: &mut PhrasesState) {
        state.is_forced = !self.are_complete(state);
    }

    pub(super) fn are_complete(&self, state: &PhrasesState) -> bool {
        state.phrases.iter().all(|phrase| phrase.has_occurred)
    }

    /// The number of tokens until every phrase has occurred, at most.
    pub(super) fn cost(&self, state: &PhrasesState) -> usize {
        let missing = || self.missing(state);
        let all: usize = missing().map(|(phrase, _)| phrase.length()).sum();
        let saved = missing().flat_map(|(phrase, state)| {
            let left = phrase.spellings.iter().zip(&state.tokens).map(|(spelling, matched)| spelling.len() - matched);
            left.map(|left| phrase.length().saturating_sub(left))
        });
        all - saved.max().unwrap_or(0)
    }

    fn missing<'a>(&'a self, state: &'a PhrasesState) -> impl Iterator<Item = (&'a Phrase, &'a PhraseState)> {
        self.phrases.iter().zip(&state.phrases).filter(|(_, state)| !state.has_occurred)
    }

    /// The tokens that are allowed next where `room` more tokens may be generated; `None` if all are.
    pub(super) fn allowed_tokens<'a>(
        &self,
        state: &PhrasesState,
        room: usize,
        bytes: impl Fn(i64) -> &'a [u8],
    ) -> Option<Vec<i64>> {
        let worst: usize = self.missing(state).map(|(phrase, _)| phrase.length()).sum();
        if worst < room && !state.is_forced {
            return None;
        }
        // With room to spare, the phrase that is furthest along continues. Otherwise any token that begins or continues
        // a phrase may be affordable; all others lose the progress there is, and the worst case is not affordable.
        let spellings = || self.missing(state).flat_map(|(phrase, at)| phrase.spellings.iter().zip(&at.tokens));
        let furthest = spellings().map(|(_, &matched)| matched).max().unwrap_or(0);
        let mut tokens: Vec<i64> = spellings()
            .flat_map(|(spelling, &matched)| {
                if worst >= room {
                    vec![spelling[matched], spelling[0]]
                } else if matched == furthest {
                    vec![spelling[matched]]
                } else {
                    vec![]
                }
            })
            .filter(|&token| self.cost(&self.advance(state, token, bytes(token))) < room)
            .collect();
        tokens.sort_unstable();
        tokens.dedup();
        // Behind a word, a phrase begins with a space if there is room for it.
        let begins_word = |token| str::from_utf8(bytes(token)).is_ok_and(|text| text.starts_with(is_of_word));
        if state.ends_in_word && furthest == 0 && !tokens.iter().all(|&token| begins_word(token)) {
            tokens.retain(|&token| !begins_word(token));
        }
        Some(tokens)
    }
}

/// Whether adjacent characters of this kind belong to one word. Scripts that are written without spaces have none.
fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() && c < '\u{2e80}'
}

/// The length of the longest prefix of `pattern` that a text ends with, after it ended with `matched` symbols of it and
/// one more symbol came.
fn longer<T: PartialEq>(pattern: &[T], matched: usize, symbol: &T) -> usize {
    let ends_so = |length: &usize| match length.checked_sub(1) {
        None => true,
        Some(before) => pattern[before] == *symbol && pattern[..matched].ends_with(&pattern[..before]),
    };
    let longest = pattern.len().min(matched + 1);
    (0..=longest).rev().find(ends_so).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(spelling: &[i64]) -> Phrase {
        Phrase { text: None, spellings: vec![spelling.to_vec()] }
    }

    /// The letter of a token of the tests: 1 is `a`.
    fn letter(token: i64) -> &'static [u8] {
        &b"`abcdefgh"[token as usize..][..1]
    }

    fn after(phrases: &Phrases, output: &[i64]) -> PhrasesState {
        output.iter().fold(phrases.start(), |state, &token| phrases.advance(&state, token, letter(token)))
    }

    #[test]
    fn a_phrase_is_found_wherever_it_occurs() {
        let cases: &[(&str, &[i64], &[i64], bool)] = &[
            ("at the start", &[1, 2], &[1, 2, 3], true),
            ("at the end", &[1, 2], &[3, 1, 2], true),
            ("not in pieces", &[1, 2], &[1, 3, 2], false),
            ("after a false start", &[1, 1, 2], &[1, 1, 1, 2], true),
            ("overlapping itself", &[1, 2, 1, 3], &[1, 2, 1, 2, 1, 3], true),
        ];
        for &(name, phrase, output, occurs) in cases {
            let as_tokens = Phrases::new(vec![tokens(phrase)]);
            assert_eq!(as_tokens.are_complete(&after(&as_tokens, output)), occurs, "{name}");
            // As text, with a spelling that never occurs.
            let text = phrase.iter().flat_map(|&token| letter(token)).copied().collect();
            let as_text = Phrases::new(vec![Phrase { text: Some(text), spellings: vec![vec![99]] }]);
            assert_eq!(as_text.are_complete(&after(&as_text, output)), occurs, "{name}, as text");
        }
    }

    #[test]
    fn a_phrase_is_forced_when_its_last_chance_comes() {
        let phrases = Phrases::new(vec![tokens(&[1, 2, 3]), tokens(&[4, 5])]);
        type Case = (&'static str, &'static [i64], usize, Option<&'static [i64]>);
        let cases: &[Case] = &[
            ("room to spare", &[], 6, None),
            ("either may begin", &[], 5, Some(&[1, 4])),
            ("what is under way goes on", &[1], 4, Some(&[2])),
            ("or is given up while there is room", &[1], 5, Some(&[1, 2, 4])),
            ("one has occurred", &[4, 5], 3, Some(&[1])),
            ("and there is room for the other", &[4, 5], 4, None),
            ("both have", &[4, 5, 1, 2, 3], 1, None),
            ("too late", &[], 4, Some(&[])),
        ];
        for &(name, output, room, forced) in cases {
            let found = phrases.allowed_tokens(&after(&phrases, output), room, letter);
            assert_eq!(found.as_deref(), forced, "{name}");
        }
    }

    #[test]
    fn a_phrase_that_is_forced_is_written_to_its_end() {
        let phrases = Phrases::new(vec![tokens(&[1, 2, 3]), tokens(&[4, 2])]);
        let mut state = after(&phrases, &[3, 4]);
        assert_eq!(phrases.allowed_tokens(&state, 100, letter), None);
        phrases.force(&mut state);
        assert_eq!(phrases.allowed_tokens(&state, 100, letter), Some(vec![2]), "what is under way goes on");
        state = phrases.advance(&state, 2, letter(2));
        assert_eq!(phrases.allowed_tokens(&state, 100, letter), None);
        phrases.force(&mut state);
        for token in [1, 2, 3] {
            assert_eq!(phrases.allowed_tokens(&state, 100, letter), Some(vec![token]));
            state = phrases.advance(&state, token, letter(token));
        }
        assert!(phrases.are_complete(&state));
        phrases.force(&mut state);
        assert_eq!(phrases.allowed_tokens(&state, 100, letter), None);
    }

    #[test]
    fn any_choice_among_what_is_allowed_holds_the_phrases_in_time() {
        let sets = [
            vec![tokens(&[1, 2, 3]), tokens(&[3, 1])],
            vec![tokens(&[1, 1, 2]), tokens(&[2, 1, 1])],
            vec![tokens(&[1]), tokens(&[1, 2, 1, 3]), tokens(&[3])],
            vec![Phrase { text: Some(b"ab".to_vec()), spellings: vec![vec![1, 2], vec![3, 1, 2]] }, tokens(&[2, 2])],
        ];
        let mut seed = 1u64;
        for phrases in sets {
            let phrases = Phrases::new(phrases);
            let least = phrases.cost(&phrases.start());
            for round in 0..2000 {
                let length = least + round % 4;
                let mut state = phrases.start();
                for place in 0..length {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let pick = (seed >> 33) as usize;
                    if pick.is_multiple_of(7) {
                        phrases.force(&mut state);
                    }
                    let token = match phrases.allowed_tokens(&state, length - place, letter) {
                        None => 1 + (pick / 8 % 4) as i64,
                        Some(tokens) => tokens[pick / 8 % tokens.len()],
                    };
                    state = phrases.advance(&state, token, letter(token));
                }
                assert!(phrases.are_complete(&state), "{phrases:?} in {length}");
            }
        }
    }
}
