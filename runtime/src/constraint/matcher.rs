//! `Matcher`: one constraint and how much of it a target has matched.

use std::sync::Arc;

#[cfg(feature = "constraints")]
use super::grammar::GrammarState;
use super::phrases::{Phrases, PhrasesState};
use super::trie::Trie;
use crate::options::PrefixAllowedTokens;
use crate::tokenizer::TokenText;

/// One constraint and how much of it a target has matched.
#[derive(Clone)]
pub(super) enum Matcher {
    /// `allowed_sequences`.
    Sequences { trie: Arc<Trie>, node: usize },
    /// `required_phrases`, with the texts of all tokens if a phrase is text.
    Phrases { phrases: Arc<Phrases>, state: PhrasesState, texts: Arc<[TokenText]> },
    /// `json_schema`, `regex` or `grammar`.
    #[cfg(feature = "constraints")]
    Grammar(GrammarState),
    /// `prefix_allowed_tokens`.
    Callback(PrefixAllowedTokens),
}

impl Matcher {
    /// Advances by a token; false if it is not allowed.
    pub fn advance(&mut self, token: i64) -> Result<bool, String> {
        match self {
            Matcher::Sequences { trie, node } => match trie.advance(*node, token) {
                Some(next) => *node = next,
                None => return Ok(false),
            },
            Matcher::Phrases { phrases, state, texts } => {
                *state = phrases.advance(state, token, bytes(texts, token));
            }
            #[cfg(feature = "constraints")]
            Matcher::Grammar(grammar) => return grammar.advance(token),
            Matcher::Callback(_) => {}
        }
        Ok(true)
    }

    /// Whether a target may end here.
    pub fn is_satisfied(&mut self) -> bool {
        match self {
            Matcher::Sequences { trie, node } => trie.is_end(*node),
            Matcher::Phrases { phrases, state, .. } => phrases.are_complete(state),
            #[cfg(feature = "constraints")]
            Matcher::Grammar(grammar) => grammar.is_satisfied(),
            Matcher::Callback(_) => true,
        }
    }
}

/// The bytes of a token's text; none for special tokens.
pub(super) fn bytes(texts: &[TokenText], token: i64) -> &[u8] {
    match usize::try_from(token).ok().and_then(|token| texts.get(token)) {
        Some(text) if !text.is_special => &text.bytes,
        _ => &[],
    }
}
