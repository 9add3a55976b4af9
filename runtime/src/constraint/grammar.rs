//! Grammars over the text of an output: JSON schemas, regular expressions and Lark. The only user of `llguidance`, which
//! works on bytes: it is given the bytes of every token, and says which tokens may come next.

use std::sync::Arc;

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory, panic_utils};
use serde_json::{Value, json};

use crate::tokenizer::{TokenText, Tokenizer};

/// What all grammars of a model share: the tree of its tokens' bytes.
pub(crate) struct Vocabulary {
    factory: ParserFactory,
    texts: Arc<[TokenText]>,
}

/// The tokens as llguidance sees them.
struct Tokens {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            // What the tokenizer cannot express is written by whichever tokens have these bytes.
            let tokens = self.tokenizer.encode_target(text).ok();
            let ids = tokens.and_then(|tokens| tokens.into_iter().map(|token| token.try_into().ok()).collect());
            ids.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}

impl Vocabulary {
    /// Prepares the first `vocab_size` tokens of a tokenizer.
    pub(crate) fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Vocabulary, String> {
        let mut texts = tokenizer.token_texts()?;
        texts.resize_with(vocab_size, TokenText::default);
        // The tree keeps special tokens apart by a byte that no UTF-8 text holds, so the token of that byte has no place.
        const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
        let bytes: Vec<Vec<u8>> = texts
            .iter()
            .map(|text| match text.is_special {
                true => [&[MARKER], text.bytes.as_slice()].concat(),
                false if text.bytes.first() == Some(&MARKER) => Vec::new(),
                false => text.bytes.clone(),
            })
            .collect();
        let size = u32::try_from(vocab_size).map_err(|_| format!("a vocabulary of {vocab_size} tokens"))?;
        // Ends of sequence are the search's; the tree only needs to be told one.
        let end = texts.iter().position(|text| text.is_special).ok_or("the tokenizer has no special token")?;
        let prepare = || {
            let trie = TokTrie::from(&TokRxInfo::new(size, end as TokenId), &bytes);
            let env: TokEnv = Arc::new(Tokens { trie, tokenizer: tokenizer.clone() });
            let mut factory = ParserFactory::new_simple(&env)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        };
        let factory = panic_utils::catch_unwind(std::panic::AssertUnwindSafe(prepare)).map_err(words)?;
        Ok(Vocabulary { factory, texts: texts.into() })
    }

    /// The text of every token.
    pub(super) fn texts(&self) -> &Arc<[TokenText]> {
        &self.texts
    }

    /// Compiles a grammar, or says why it cannot be.
    pub(super) fn compile(&self, grammar: TopLevelGrammar) -> Result<Match, String> {
        let parser = panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| self.factory.create_parser(grammar)));
        let matcher = Box::new(Matcher::new(Ok(parser.map_err(words)?)));
        match matcher.get_error() {
            Some(error) => Err(words(error)),
            None => Ok(Match { matcher }),
        }
    }
}

/// A grammar and how much of it an output has matched.
#[derive(Clone)]
pub(super) struct Match {
    matcher: Box<Matcher>,
}

/// What may come next.
pub(super) enum Next {
    /// These tokens.
    Tokens(SimpleVob),
    /// None: the grammar is matched and cannot go on, or no token fits.
    Nothing,
}

impl Match {
    /// The tokens that may come next, ends of sequence aside.
    pub(super) fn next(&mut self) -> Result<Next, String> {
        if self.matcher.is_stopped() {
            return Ok(Next::Nothing);
        }
        match self.matcher.compute_mask() {
            Ok(tokens) => Ok(Next::Tokens(tokens)),
            // What its error says is all that a matcher tells of why it failed.
            Err(error) => match words(error) {
                error if error.starts_with(&StopReason::NoExtensionBias.to_string()) => Ok(Next::Nothing),
                error => Err(error),
            },
        }
    }

    /// Whether the output may end here.
    pub(super) fn is_met(&mut self) -> bool {
        match self.matcher.stop_reason() {
            StopReason::NoExtension | StopReason::EndOfSentence => true,
            StopReason::NotStopped => self.matcher.is_accepting().unwrap_or(false),
            _ => false,
        }
    }

    /// Goes on with a token: false if it does not fit.
    pub(super) fn advance(&mut self, token: i64) -> Result<bool, String> {
        let Ok(token) = TokenId::try_from(token) else { return Ok(false) };
        if self.matcher.is_stopped() {
            return Ok(false);
        }
        self.matcher.try_consume_tokens(&[token]).map(|consumed| consumed == 1).map_err(words)
    }
}

/// A grammar of the JSON of a schema.
///
/// Between the parts of the JSON stands at most one space, or a line break with its indentation: where any white space is
/// allowed, small models are known to write nothing else. `x-guidance` in the schema says otherwise.
pub(super) fn of_schema(schema: &Value) -> TopLevelGrammar {
    let mut schema = schema.clone();
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": r"\x20|\x0A\x20{0,16}"}));
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// What is wrong with a regular expression and where, out of the drawing that the library makes of it.
fn of_regex(text: &str) -> Option<String> {
    let (before, drawing) = text.split_once("regex parse error:\n")?;
    let (drawing, problem) = drawing.split_once("\nerror: ")?;
    let problem = problem.lines().next()?.trim();
    let [pattern, mark] = drawing.lines().collect::<Vec<_>>()[..] else { return Some(problem.to_string()) };
    let indent = pattern.len() - pattern.trim_start().len();
    let place = 1 + mark.find('^')?.checked_sub(indent)?;
    // Of a grammar, the place of the expression in it.
    let of_grammar = before.split_once(": ").filter(|_| !text.contains("1 | start: /")).map(|(place, _)| place);
    let of_grammar = of_grammar.map(|place| format!("{place}: ")).unwrap_or_default();
    Some(format!("{of_grammar}{problem} at character {place}"))
}

/// An error's words on one line, without the backtrace that may follow them.
fn words(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    if let Some(problem) = of_regex(&text) {
        return problem;
    }
    let lines = text.lines().map(str::trim).take_while(|line| *line != "<backtrace>");
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}
