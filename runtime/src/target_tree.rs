//! `TargetTree`: the targets that a search has considered, as a tree of tokens, because only the end shows which of
//! them become hypotheses. Trackers store per-token data by node.

use std::collections::HashMap;

use crate::search::{Candidate, Search};

/// The tree of one search. Node 0 is before the first token, every other node is after a token at another node.
#[derive(Default)]
pub(crate) struct TargetTree {
    /// Node and next token to the node after it.
    next: HashMap<(usize, i64), usize>,
    /// The nodes of the rows of the current step.
    rows: Vec<usize>,
}

/// A step along a target.
pub(crate) struct Edge {
    /// The node at which the token was chosen.
    pub from: usize,
    /// The node after it.
    pub to: usize,
}

impl TargetTree {
    /// Begins a step of `width` rows; those of the first step are all at node 0.
    pub fn begin_step(&mut self, width: usize) {
        self.rows.resize(width, 0);
    }

    /// The node of a row of the step.
    pub fn node(&self, row: usize) -> usize {
        self.rows[row]
    }

    /// Adds a candidate of the step, and returns whether the node after it is new; if so, it has the next number.
    pub fn add(&mut self, candidate: &Candidate) -> bool {
        let new = self.next.len() + 1;
        *self.next.entry((self.rows[candidate.parent], candidate.token)).or_insert(new) == new
    }

    /// Follows the rows that the search continues with, after its candidates were added.
    pub fn follow(&mut self, search: &Search) {
        let steps = search.parents().iter().zip(search.next_tokens());
        self.rows = steps.map(|(&parent, &token)| self.next[&(self.rows[parent], token)]).collect();
    }

    /// The edges along a target, one for each token.
    pub fn along(&self, tokens: &[i64]) -> impl Iterator<Item = Edge> {
        tokens.iter().scan(0, |node, &token| {
            let from = *node;
            *node = self.next[&(from, token)];
            Some(Edge { from, to: *node })
        })
    }
}
