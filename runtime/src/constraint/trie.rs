//! A prefix tree of token sequences: which tokens continue one of them, and where one of them ends.

use std::collections::BTreeMap;

/// The tree. A place in it is a number, 0 at the root.
#[derive(Debug)]
pub(super) struct Trie {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    children: BTreeMap<i64, usize>,
    is_end: bool,
}

impl Trie {
    pub(super) fn new<'a>(sequences: impl IntoIterator<Item = &'a [i64]>) -> Trie {
        let mut nodes = vec![Node::default()];
        for sequence in sequences {
            let mut place = 0;
            for &token in sequence {
                let next = nodes.len();
                place = *nodes[place].children.entry(token).or_insert(next);
                if place == next {
                    nodes.push(Node::default());
                }
            }
            nodes[place].is_end = true;
        }
        Trie { nodes }
    }

    /// Where a token leads, if to any sequence.
    pub(super) fn advance(&self, place: usize, token: i64) -> Option<usize> {
        self.nodes[place].children.get(&token).copied()
    }

    /// The tokens that lead on.
    pub(super) fn tokens(&self, place: usize) -> impl Iterator<Item = i64> + '_ {
        self.nodes[place].children.keys().copied()
    }

    /// Whether a sequence ends here.
    pub(super) fn is_end(&self, place: usize) -> bool {
        self.nodes[place].is_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sequences_are_in_the_tree() {
        let sequences: [&[i64]; 4] = [&[5, 6], &[5, 6, 7], &[5, 8], &[9]];
        let trie = Trie::new(sequences);
        let walk = |tokens: &[i64]| tokens.iter().try_fold(0, |place, &token| trie.advance(place, token));
        for tokens in sequences {
            assert!(walk(tokens).is_some_and(|place| trie.is_end(place)), "{tokens:?}");
        }
        for (tokens, next) in [(&[][..], &[5, 9][..]), (&[5], &[6, 8]), (&[5, 6], &[7]), (&[9], &[])] {
            let place = walk(tokens).expect("a prefix of a sequence");
            assert_eq!(trie.tokens(place).collect::<Vec<_>>(), next, "{tokens:?}");
        }
        assert!(!trie.is_end(0) && walk(&[5]).is_some_and(|place| !trie.is_end(place)));
        assert_eq!(walk(&[6]), None);
    }
}
