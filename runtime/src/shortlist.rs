//! Which tokens a model needs for the texts that it is to write: what an export keeps of the head.

use std::cmp::Reverse;

use crate::error::Error;
use crate::tokenizer::Tokenizer;

/// Counts the tokens of texts.
pub struct Shortlist<'t> {
    tokenizer: &'t Tokenizer,
    /// Of each token whether it is kept in any case: those that any text can be spelled with, and special ones.
    always: Vec<bool>,
    counts: Vec<u64>,
    texts: usize,
}

impl<'t> Shortlist<'t> {
    /// Nothing counted so far.
    ///
    /// # Errors
    /// A tokenizer of which tokens have no text each.
    pub fn new(tokenizer: &'t Tokenizer) -> Result<Shortlist<'t>, Error> {
        let texts = tokenizer.token_texts().map_err(|problem| Error::Tokenizer {
            path: Tokenizer::FILE.into(),
            problem: format!("no telling which tokens any text can be spelled with: {problem}"),
        })?;
        let always: Vec<bool> = texts.iter().map(|text| text.is_special || text.bytes.len() == 1).collect();
        Ok(Shortlist { tokenizer, counts: vec![0; always.len()], always, texts: 0 })
    }

    /// Counts the tokens of a text such as the model is to write.
    ///
    /// # Errors
    /// A text that the tokenizer cannot express.
    pub fn add(&mut self, text: &str) -> Result<(), Error> {
        for token in self.tokenizer.encode_target(text)? {
            self.counts[token as usize] += 1;
        }
        self.texts += 1;
        Ok(())
    }

    /// Texts that were counted.
    pub fn texts(&self) -> usize {
        self.texts
    }

    /// The ids of the tokens that occur at least `min_count` times, the most frequent `max_tokens` of them if that is given,
    /// and of those that are kept in any case; ascending.
    pub fn tokens(&self, min_count: u64, max_tokens: Option<usize>) -> Vec<i64> {
        let mut tokens: Vec<usize> = (0..self.counts.len())
            .filter(|&token| self.counts[token] >= min_count.max(1) || self.always[token])
            .collect();
        if let Some(most) = max_tokens {
            tokens.sort_by_key(|&token| (!self.always[token], Reverse(self.counts[token])));
            tokens.truncate(most.max(self.always.iter().filter(|always| **always).count()));
            tokens.sort_unstable();
        }
        tokens.into_iter().map(|token| token as i64).collect()
    }
}
