//! A tree of the targets that a search has looked at, because only the end tells which of them become hypotheses. Others hang
//! what they know of a target's tokens on its places.

use std::collections::HashMap;

use crate::search::{Candidate, Search};

/// The places of a search: 0 is before the first token, every other is behind a token at another place.
#[derive(Default)]
pub(crate) struct Places {
    /// Place and next token to the place behind it.
    next: HashMap<(usize, i64), usize>,
    /// Where the rows of the step are.
    rows: Vec<usize>,
}

impl Places {
    /// Begins a step of `width` rows; those of the first are all at place 0.
    pub fn step(&mut self, width: usize) {
        self.rows.resize(width, 0);
    }

    /// Where a row of the step is.
    pub fn of_row(&self, row: usize) -> usize {
        self.rows[row]
    }

    /// Takes a candidate of the step, and tells whether the place behind it is a new one: the next in number.
    pub fn take(&mut self, candidate: &Candidate) -> bool {
        let new = self.next.len() + 1;
        *self.next.entry((self.rows[candidate.parent], candidate.token)).or_insert(new) == new
    }

    /// Follows the rows that go on after the candidates that were taken.
    pub fn follow(&mut self, search: &Search) {
        let steps = search.parents().iter().zip(search.next_tokens());
        self.rows = steps.map(|(&parent, &token)| self.next[&(self.rows[parent], token)]).collect();
    }

    /// For each token of a target, the place where it was chosen and the one behind it.
    pub fn along(&self, tokens: &[i64]) -> impl Iterator<Item = (usize, usize)> {
        tokens.iter().scan(0, |place, &token| {
            let before = *place;
            *place = self.next[&(before, token)];
            Some((before, *place))
        })
    }
}
