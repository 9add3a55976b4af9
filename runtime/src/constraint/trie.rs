//! A trie of token sequences: which tokens continue one of them, and where one of them ends.

use std::collections::BTreeMap;

/// The trie. Its nodes are numbers.
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
    /// The node of the empty sequence.
    pub(super) const ROOT: usize = 0;

    pub(super) fn new<'a>(sequences: impl IntoIterator<Item = &'a [i64]>) -> Trie {
        let mut nodes = vec![Node::default()];
        for sequence in sequences {
            let mut node = Trie::ROOT;
            for &token in sequence {
                let next = nodes.len();
                node = *nodes[node].children.entry(token).or_insert(next);
                if node == next {
                    nodes.push(Node::default());
                }
            }
            nodes[node].is_end = true;
        }
        Trie { nodes }
    }

    /// The node that a token leads to, if any.
    pub(super) fn advance(&self, node: usize, token: i64) -> Option<usize> {
        self.nodes[node].children.get(&token).copied()
    }

    /// The tokens that lead to another node.
    pub(super) fn tokens(&self, node: usize) -> impl Iterator<Item = i64> + '_ {
        self.nodes[node].children.keys().copied()
    }

    /// Whether a sequence ends at the node.
    pub(super) fn is_end(&self, node: usize) -> bool {
        self.nodes[node].is_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sequences_are_in_the_trie() {
        let sequences: [&[i64]; 4] = [&[5, 6], &[5, 6, 7], &[5, 8], &[9]];
        let trie = Trie::new(sequences);
        let walk = |tokens: &[i64]| tokens.iter().try_fold(Trie::ROOT, |node, &token| trie.advance(node, token));
        for tokens in sequences {
            assert!(walk(tokens).is_some_and(|node| trie.is_end(node)), "{tokens:?}");
        }
        for (tokens, next) in [(&[][..], &[5, 9][..]), (&[5], &[6, 8]), (&[5, 6], &[7]), (&[9], &[])] {
            let node = walk(tokens).expect("a prefix of a sequence");
            assert_eq!(trie.tokens(node).collect::<Vec<_>>(), next, "{tokens:?}");
        }
        assert!(!trie.is_end(Trie::ROOT) && walk(&[5]).is_some_and(|node| !trie.is_end(node)));
        assert_eq!(walk(&[6]), None);
    }
}
