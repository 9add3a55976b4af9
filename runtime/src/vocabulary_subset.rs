//! `VocabularySubset`: the tokens that have logits, if an export kept only a part of the vocabulary.

/// Token ids, ascending. A row of logits holds theirs, in this order.
#[derive(Debug)]
pub struct VocabularySubset {
    tokens: Vec<i64>,
}

impl VocabularySubset {
    /// A subset of ascending ids.
    pub fn new(tokens: Vec<i64>) -> VocabularySubset {
        debug_assert!(tokens.is_sorted(), "the tokens of a subset ascend");
        VocabularySubset { tokens }
    }

    /// The ids.
    pub fn tokens(&self) -> &[i64] {
        &self.tokens
    }

    /// Whether a token has a logit.
    pub fn contains(&self, token: i64) -> bool {
        self.tokens.binary_search(&token).is_ok()
    }

    /// The index of a token's logit in a row. A token without one gets a negative number, each its own.
    pub fn index(&self, token: i64) -> i64 {
        self.tokens.binary_search(&token).map_or(-1 - token.max(0), |index| index as i64)
    }

    /// The token whose logit is at an index.
    pub fn token(&self, index: i64) -> i64 {
        self.tokens[index as usize]
    }

    /// Scatters rows of logits into rows of `vocab_size` tokens; the logits of other tokens are −∞.
    pub fn scatter(&self, rows: &[f32], vocab_size: usize) -> Vec<f32> {
        let count = rows.len() / self.tokens.len();
        let mut full = vec![f32::NEG_INFINITY; count * vocab_size];
        for (row, full) in rows.chunks_exact(self.tokens.len()).zip(full.chunks_exact_mut(vocab_size)) {
            self.tokens.iter().zip(row).for_each(|(&token, &logit)| full[token as usize] = logit);
        }
        full
    }
}
