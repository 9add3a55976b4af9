//! The data of options that constrain the whole output. They are compiled to a `Constraint` when generation begins,
//! because texts and grammars need the model's tokenizer.

use std::fmt;
use std::sync::Arc;

/// A part of an output, as a request gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sequence {
    /// Text, for the model's tokenizer.
    Text(String),
    /// Token ids.
    Tokens(Vec<i64>),
}

/// Hugging Face's `prefix_allowed_tokens_fn`: given the index of a source row and its target so far, decoder prompt
/// included, returns the tokens that may come next. Equal are clones of one.
#[derive(Clone)]
pub struct PrefixAllowedTokens(Arc<AllowedTokens>);

type AllowedTokens = dyn Fn(usize, &[i64]) -> Vec<i64> + Send + Sync;

impl PrefixAllowedTokens {
    /// Wraps the function.
    pub fn new(allowed: impl Fn(usize, &[i64]) -> Vec<i64> + Send + Sync + 'static) -> PrefixAllowedTokens {
        PrefixAllowedTokens(Arc::new(allowed))
    }

    pub(crate) fn call(&self, row: usize, history: &[i64]) -> Vec<i64> {
        (self.0)(row, history)
    }
}

impl fmt::Debug for PrefixAllowedTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrefixAllowedTokens(..)")
    }
}

impl PartialEq for PrefixAllowedTokens {
    fn eq(&self, other: &PrefixAllowedTokens) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
