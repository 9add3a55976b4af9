//! `Shortlist`: the tokens that occur in example texts, to which an export can restrict the output head.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::error::Error;
use crate::tokenizer::{TokenText, Tokenizer};

/// Counts the tokens of texts.
#[derive(Debug)]
pub struct Shortlist<'t> {
    tokenizer: &'t Tokenizer,
    tokens: BTreeMap<i64, Counted>,
    texts: usize,
}

/// A token of the vocabulary.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Always kept: special tokens, and the single bytes that can spell any text.
    always: bool,
    count: u64,
}

impl<'t> Shortlist<'t> {
    /// An empty count.
    ///
    /// # Errors
    /// A tokenizer whose tokens have no text on their own.
    pub fn new(tokenizer: &'t Tokenizer) -> Result<Shortlist<'t>, Error> {
        let texts = tokenizer.token_texts().map_err(|problem| Error::Tokenizer {
            path: Tokenizer::FILE.into(),
            problem: format!("cannot find the single-byte tokens: {problem}"),
        })?;
        let known = |text: &TokenText| Counted { always: text.is_special || text.bytes.len() == 1, count: 0 };
        let tokens = texts.iter().map(|(&token, text)| (token.into(), known(text))).collect();
        Ok(Shortlist { tokenizer, tokens, texts: 0 })
    }

    /// Counts the tokens of an example text.
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

    /// Number of texts counted.
    pub fn texts(&self) -> usize {
        self.texts
    }

    /// The ids of the tokens that occur at least `min_count` times and of those that are always kept, in ascending
    /// order. If there are more than `max_tokens`, only the most frequent, but still all that are always kept.
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
