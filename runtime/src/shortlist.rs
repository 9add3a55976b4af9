//! Which tokens a model needs for the texts that it is to write: what an export keeps of the head.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::error::Error;
use crate::tokenizer::{TokenText, Tokenizer};

/// Counts the tokens of texts.
pub struct Shortlist<'t> {
    tokenizer: &'t Tokenizer,
    tokens: BTreeMap<i64, Counted>,
    texts: usize,
}

/// What is known of a token.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// Whether it is kept in any case: those that any text can be spelled with, and special ones.
    always: bool,
    count: u64,
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
        let known = |text: &TokenText| Counted { always: text.is_special || text.bytes.len() == 1, count: 0 };
        let tokens = texts.iter().map(|(&token, text)| (token.into(), known(text))).collect();
        Ok(Shortlist { tokenizer, tokens, texts: 0 })
    }

    /// Counts the tokens of a text such as the model is to write.
    ///
    /// # Errors
    /// A text that the tokenizer cannot express.
    pub fn add(&mut self, text: &str) -> Result<(), Error> {
        for token in self.tokenizer.encode_target(text)? {
            self.tokens.entry(token).or_default().count += 1;
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
        let is_in = |counted: &Counted| counted.count >= min_count.max(1) || counted.always;
        let mut tokens: Vec<i64> =
            self.tokens.iter().filter(|(_, counted)| is_in(counted)).map(|(&id, _)| id).collect();
        if let Some(most) = max_tokens {
            let counted = |token: &i64| self.tokens[token];
            tokens.sort_by_key(|token| (!counted(token).always, Reverse(counted(token).count)));
            tokens.truncate(most.max(self.tokens.values().filter(|counted| counted.always).count()));
            tokens.sort_unstable();
        }
        tokens
    }
}
