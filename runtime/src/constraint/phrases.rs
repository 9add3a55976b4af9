//! Phrases that an output has to hold before it may end, and how they are forced: where the model would end without them,
//! and where the length would run out.
//!
//! # Design
//! A text occurs as text, however it is cut into tokens; a list of tokens occurs as these tokens. What is forced is tokens:
//! those of the phrase, or those of the phrase after a space. A state's cost is how many tokens the missing phrases still
//! take, one written after the other, less what the best of them has already behind it; only one can be under way. A
//! token is allowed if the state it leads to costs no more than the places that are left, and from a state that can be
//! afforded there is always such a token: the next one of the phrase under way. Where the model would end, the tokens that
//! bring a phrase forward are all that is allowed, until one has occurred.

/// The phrases of a request.
#[derive(Debug)]
pub(super) struct Phrases {
    phrases: Vec<Phrase>,
}

/// One phrase.
#[derive(Debug)]
pub(super) struct Phrase {
    /// The bytes to be found, for a phrase that was given as text.
    pub text: Option<Vec<u8>>,
    /// The token sequences that write it, none of them empty.
    pub spellings: Vec<Vec<i64>>,
}

/// What of the phrases an output holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    phrases: Vec<PhraseProgress>,
    /// Whether a phrase is written now, wherever else the model would go.
    is_insisted: bool,
    /// Whether the output ends within a word, as far as its last token tells.
    ends_in_word: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct PhraseProgress {
    has_occurred: bool,
    /// How many bytes of the text the output ends with.
    bytes: usize,
    /// For each spelling, how many of its tokens the output ends with.
    tokens: Vec<usize>,
}

impl Phrase {
    /// The tokens that it takes at most.
    fn length(&self) -> usize {
        self.spellings.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The progress of an output that goes on with a token, `bytes` in text.
    fn advance(&self, progress: &PhraseProgress, token: i64, bytes: &[u8]) -> PhraseProgress {
        let mut next = progress.clone();
        if progress.has_occurred {
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

    pub(super) fn start(&self) -> Progress {
        let start =
            |phrase: &Phrase| PhraseProgress { has_occurred: false, bytes: 0, tokens: vec![0; phrase.spellings.len()] };
        Progress { phrases: self.phrases.iter().map(start).collect(), is_insisted: false, ends_in_word: false }
    }

    pub(super) fn advance(&self, progress: &Progress, token: i64, bytes: &[u8]) -> Progress {
        let phrases: Vec<PhraseProgress> = (self.phrases.iter().zip(&progress.phrases))
            .map(|(phrase, progress)| phrase.advance(progress, token, bytes))
            .collect();
        let missing = |phrases: &[PhraseProgress]| phrases.iter().filter(|phrase| !phrase.has_occurred).count();
        let is_insisted = progress.is_insisted && missing(&phrases) == missing(&progress.phrases);
        let ends_in_word = str::from_utf8(bytes).is_ok_and(|text| text.chars().next_back().is_some_and(is_of_word));
        Progress { phrases, is_insisted, ends_in_word }
    }

    /// Has the next phrase written from here.
    pub(super) fn insist(&self, progress: &mut Progress) {
        progress.is_insisted = !self.is_met(progress);
    }

    pub(super) fn is_met(&self, progress: &Progress) -> bool {
        progress.phrases.iter().all(|phrase| phrase.has_occurred)
    }

    /// How many tokens it takes at most from here until every phrase has occurred.
    pub(super) fn cost(&self, progress: &Progress) -> usize {
        let missing = || self.missing(progress);
        let all: usize = missing().map(|(phrase, _)| phrase.length()).sum();
        let saved = missing().flat_map(|(phrase, progress)| {
            let left =
                phrase.spellings.iter().zip(&progress.tokens).map(|(spelling, matched)| spelling.len() - matched);
            left.map(|left| phrase.length().saturating_sub(left))
        });
        all - saved.max().unwrap_or(0)
    }

    fn missing<'a>(&'a self, progress: &'a Progress) -> impl Iterator<Item = (&'a Phrase, &'a PhraseProgress)> {
        self.phrases.iter().zip(&progress.phrases).filter(|(_, progress)| !progress.has_occurred)
    }

    /// The tokens of which one has to come next where `room` places are left, this one included. None: any may come.
    pub(super) fn forced<'a>(
        &self,
        progress: &Progress,
        room: usize,
        bytes: impl Fn(i64) -> &'a [u8],
    ) -> Option<Vec<i64>> {
        let worst: usize = self.missing(progress).map(|(phrase, _)| phrase.length()).sum();
        if worst < room && !progress.is_insisted {
            return None;
        }
        // With room to spare, what is furthest goes on. Otherwise any token that begins a phrase or goes on with one may
        // fit; all others lose what progress there is, and the worst case does not fit.
        let spellings = || self.missing(progress).flat_map(|(phrase, at)| phrase.spellings.iter().zip(&at.tokens));
        let furthest = spellings().map(|(_, &matched)| matched).max().unwrap_or(0);
        let mut tokens: Vec<i64> = spellings()
            .flat_map(|(spelling, &matched)| match worst < room {
                true if matched < furthest => vec![],
                true => vec![spelling[matched]],
                false => vec![spelling[matched], spelling[0]],
            })
            .filter(|&token| self.cost(&self.advance(progress, token, bytes(token))) < room)
            .collect();
        tokens.sort_unstable();
        tokens.dedup();
        // A phrase that begins here does so with a space after a word, unless there is no room for that.
        let begins_word = |token| str::from_utf8(bytes(token)).is_ok_and(|text| text.starts_with(is_of_word));
        if progress.ends_in_word && furthest == 0 && !tokens.iter().all(|&token| begins_word(token)) {
            tokens.retain(|&token| !begins_word(token));
        }
        Some(tokens)
    }
}

/// Whether two such characters side by side are one word. Scripts that are written without spaces have none.
fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() && c < '\u{2e80}'
}

/// How much of `pattern` a text ends with, after `matched` of it and one more symbol: the longest that fits.
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

    fn after(phrases: &Phrases, output: &[i64]) -> Progress {
        output.iter().fold(phrases.start(), |progress, &token| phrases.advance(&progress, token, letter(token)))
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
            assert_eq!(as_tokens.is_met(&after(&as_tokens, output)), occurs, "{name}");
            // As text, with a spelling that never occurs.
            let text = phrase.iter().flat_map(|&token| letter(token)).copied().collect();
            let as_text = Phrases::new(vec![Phrase { text: Some(text), spellings: vec![vec![99]] }]);
            assert_eq!(as_text.is_met(&after(&as_text, output)), occurs, "{name}, as text");
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
            let found = phrases.forced(&after(&phrases, output), room, letter);
            assert_eq!(found.as_deref(), forced, "{name}");
        }
    }

    #[test]
    fn a_phrase_that_is_insisted_on_is_written_to_its_end() {
        let phrases = Phrases::new(vec![tokens(&[1, 2, 3]), tokens(&[4, 2])]);
        let mut progress = after(&phrases, &[3, 4]);
        assert_eq!(phrases.forced(&progress, 100, letter), None);
        phrases.insist(&mut progress);
        assert_eq!(phrases.forced(&progress, 100, letter), Some(vec![2]), "what is under way goes on");
        progress = phrases.advance(&progress, 2, letter(2));
        assert_eq!(phrases.forced(&progress, 100, letter), None);
        phrases.insist(&mut progress);
        for token in [1, 2, 3] {
            assert_eq!(phrases.forced(&progress, 100, letter), Some(vec![token]));
            progress = phrases.advance(&progress, token, letter(token));
        }
        assert!(phrases.is_met(&progress));
        phrases.insist(&mut progress);
        assert_eq!(phrases.forced(&progress, 100, letter), None);
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
                let mut progress = phrases.start();
                for place in 0..length {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let pick = (seed >> 33) as usize;
                    if pick.is_multiple_of(7) {
                        phrases.insist(&mut progress);
                    }
                    let token = match phrases.forced(&progress, length - place, letter) {
                        None => 1 + (pick / 8 % 4) as i64,
                        Some(tokens) => tokens[pick / 8 % tokens.len()],
                    };
                    progress = phrases.advance(&progress, token, letter(token));
                }
                assert!(phrases.is_met(&progress), "{phrases:?} in {length}");
            }
        }
    }
}
