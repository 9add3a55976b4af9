//! The tokens that a model has logits of, where these are not all of its vocabulary.

/// Ids, ascending: the logits of a row are theirs, in this order.
#[derive(Debug)]
pub struct Kept {
    tokens: Vec<i64>,
}

impl Kept {
    /// Of ids that ascend.
    pub fn new(tokens: Vec<i64>) -> Kept {
        debug_assert!(tokens.is_sorted(), "kept tokens ascend");
        Kept { tokens }
    }

    /// All of them.
    pub fn tokens(&self) -> &[i64] {
        &self.tokens
    }

    /// Whether a token has logits.
    pub fn has(&self, token: i64) -> bool {
        self.tokens.binary_search(&token).is_ok()
    }

    /// The place of a token's logit in a row. Of a token that has none it is a negative number, of each another one.
    pub fn place(&self, token: i64) -> i64 {
        self.tokens.binary_search(&token).map_or(-1 - token.max(0), |place| place as i64)
    }

    /// The token whose logit is at a place.
    pub fn token(&self, place: i64) -> i64 {
        self.tokens[place as usize]
    }

    /// Rows of logits of kept tokens as rows of `vocab_size` tokens, in which the others are impossible.
    pub fn spread(&self, rows: &[f32], vocab_size: usize) -> Vec<f32> {
        let count = rows.len() / self.tokens.len();
        let mut whole = vec![f32::NEG_INFINITY; count * vocab_size];
        for (row, whole) in rows.chunks_exact(self.tokens.len()).zip(whole.chunks_exact_mut(vocab_size)) {
            self.tokens.iter().zip(row).for_each(|(&token, &logit)| whole[token as usize] = logit);
        }
        whole
    }
}
