//! Prompt lookup decoding: drafts of the next tokens, copied from the source, as summaries, corrections and answers
//! from tables copy it. The model scores a whole draft in one step, and the search chooses as if there were none: a
//! draft saves steps but never changes a choice. Token ids only; the loop runs the model.

use std::collections::VecDeque;

/// Looks up the last tokens of a target in its source.
#[derive(Clone, Debug)]
pub(crate) struct PromptLookup {
    source: Vec<i64>,
    /// Maximum number of tokens in a draft.
    num_tokens: usize,
    /// Maximum number of tokens at the end of the target to look up.
    ngram_size: usize,
    /// The position in the source behind the last accepted token; of several matches the first one from there is taken.
    cursor: usize,
    /// Drafted tokens that are not chosen yet.
    ahead: VecDeque<i64>,
}

impl PromptLookup {
    /// Drafts at most `num_tokens` tokens that follow an occurrence of the last `ngram_size` or fewer tokens in
    /// `source`.
    pub(crate) fn new(source: &[i64], num_tokens: usize, ngram_size: usize) -> PromptLookup {
        PromptLookup { source: source.to_vec(), num_tokens, ngram_size, cursor: 0, ahead: VecDeque::new() }
    }

    /// Drafts the tokens after `history`, at most `room`, by the longest n-gram at its end that occurs in the source.
    /// Replaces an earlier draft.
    pub(crate) fn draft(&mut self, history: &[i64], room: usize) -> Vec<i64> {
        self.ahead.clear();
        let longest = self.ngram_size.min(history.len()).min(self.source.len());
        for size in (1..=longest).rev() {
            let ngram = &history[history.len() - size..];
            // An occurrence at the very end of the source is followed by nothing.
            let ends = (size..self.source.len()).filter(|&end| self.source[..end].ends_with(ngram));
            let Some(start) = ends.min_by_key(|&end| (end < self.cursor, end)) else { continue };
            let end = self.source.len().min(start + self.num_tokens.min(room));
            self.cursor = start;
            self.ahead.extend(&self.source[start..end]);
            break;
        }
        self.ahead.iter().copied().collect()
    }

    /// Whether `token` is the next drafted one. If so, the rest of the draft stays; otherwise it is dropped.
    pub(crate) fn follows(&mut self, token: i64) -> bool {
        let follows = self.ahead.pop_front() == Some(token);
        if follows {
            self.cursor += 1;
        } else {
            self.ahead.clear();
        }
        follows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_are_what_follows_in_the_source() {
        type Case = (&'static str, &'static [i64], &'static [i64], usize, &'static [i64]);
        let source: &[i64] = &[2, 10, 11, 12, 10, 13, 14, 1];
        let cases: &[Case] = &[
            ("the start token is one like others", source, &[2], 9, &[10, 11, 12]),
            ("the longest n-gram counts", source, &[2, 12, 10], 9, &[13, 14, 1]),
            ("or a shorter one", source, &[2, 14, 10], 9, &[11, 12, 10]),
            ("as much as there is", source, &[2, 10, 13], 9, &[14, 1]),
            ("as much as there is room for", source, &[2], 2, &[10, 11]),
            ("nothing at the end", source, &[2, 14, 1], 9, &[]),
            ("nothing unknown", source, &[2, 99], 9, &[]),
            ("nothing without room", source, &[2], 0, &[]),
            ("nothing without a source", &[], &[2], 9, &[]),
        ];
        for &(name, source, history, room, draft) in cases {
            assert_eq!(PromptLookup::new(source, 3, 2).draft(history, room), draft, "{name}");
        }
    }

    #[test]
    fn a_draft_is_followed_as_far_as_it_is_right() {
        let mut lookup = PromptLookup::new(&[2, 10, 11, 10, 12, 10, 13], 3, 1);
        assert_eq!(lookup.draft(&[2], 9), [10, 11, 10]);
        assert_eq!([10, 11, 15, 10].map(|token| lookup.follows(token)), [true, true, false, false]);
        // The first place behind what was followed.
        assert_eq!(lookup.draft(&[2, 10, 11, 15, 10], 9), [12, 10, 13]);
        assert!(lookup.follows(12) && lookup.follows(10));
        assert_eq!(lookup.draft(&[10], 9), [13]);
        // None is left behind it: from the beginning.
        assert!(lookup.follows(13));
        assert_eq!(lookup.draft(&[10], 9), [11, 10, 12]);
    }
}
