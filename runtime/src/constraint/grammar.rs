//! Grammars over the text of an output: JSON schemas, regular expressions and Lark. The only user of `llguidance`,
//! which works on bytes: it gets the bytes of every token and returns which tokens are allowed next.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use llguidance::api::{GrammarInit, ParserLimits, StopReason};
use llguidance::earley::lexerspec::LexerSpec;
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};

use super::source::Source;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::panics;
use crate::tokenizer::{TokenText, Tokenizer};

/// The name of the library in errors.
const LIBRARY: &str = "llguidance";
/// The stack of a compilation, enough for the deepest grammar that is accepted.
const STACK: usize = 512 << 20;

/// What all grammars of a model share: the trie of its tokens' bytes.
pub(crate) struct Vocabulary {
    factory: ParserFactory,
    /// The ids of special tokens.
    special: Arc<[TokenId]>,
}

/// A tokenizer, as llguidance sees it.
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
            // Text that the tokenizer cannot express is written by whichever tokens have its bytes.
            let tokens = self.tokenizer.encode_target(text).ok();
            let ids = tokens.and_then(|tokens| tokens.into_iter().map(|token| token.try_into().ok()).collect());
            ids.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}

impl Vocabulary {
    /// Prepares the tokens of a tokenizer, whose texts these are.
    pub(super) fn new(tokenizer: &Tokenizer, texts: &Arc<[TokenText]>) -> Result<Vocabulary, String> {
        // The trie marks special tokens by a byte that does not occur in UTF-8, so the token of that byte is left out.
        const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
        let bytes: Vec<Vec<u8>> = texts
            .iter()
            .map(|text| {
                if text.is_special {
                    [&[MARKER], text.bytes.as_slice()].concat()
                } else if text.bytes.first() == Some(&MARKER) {
                    Vec::new()
                } else {
                    text.bytes.clone()
                }
            })
            .collect();
        let end = u32::try_from(texts.len()).map_err(|_| format!("a vocabulary of {} tokens", texts.len()))?;
        let prepare = || {
            // The trie needs an end-of-sequence token, which it allows wherever a grammar may end. Ends of sequence are
            // left to the search, so it gets one that does not exist.
            let bytes: Vec<Vec<u8>> = bytes.into_iter().chain([Vec::new()]).collect();
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &bytes);
            let env: TokEnv = Arc::new(Tokens { trie, tokenizer: tokenizer.clone() });
            let mut factory = ParserFactory::new_simple(&env).map_err(one_line)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        };
        let factory = panics::catch(LIBRARY, prepare).flatten()?;
        let special = (0..end).filter(|&id| texts[id as usize].is_special).collect();
        Ok(Vocabulary { factory, special })
    }

    /// Compiles a grammar, or returns why it cannot be compiled.
    ///
    /// Takes at most two seconds for any grammar, due to [`check_first_bytes`] and the library's own limits. Runs on
    /// its own thread, so that a cancellation need not wait for it.
    pub(super) fn compile(
        self: &Arc<Self>,
        source: Source,
        cancel: &Cancellation,
    ) -> Result<Result<GrammarState, String>, Error> {
        if let Err(found) = source.check() {
            return Ok(Err(found));
        }
        let (done, compiled) = channel();
        let vocabulary = self.clone();
        let work = move || {
            let compiled = panics::catch(LIBRARY, || vocabulary.compile_here(source)).flatten();
            // After a cancellation nobody receives it.
            let _ = done.send(compiled);
        };
        let started = thread::Builder::new().name("t5gemma-grammar".into()).stack_size(STACK).spawn(work);
        if let Err(problem) = started {
            return Ok(Err(format!("cannot start a thread to compile it: {problem}")));
        }
        loop {
            match compiled.recv_timeout(Duration::from_millis(10)) {
                Ok(compiled) => return Ok(compiled),
                Err(RecvTimeoutError::Timeout) => cancel.check()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(Err("its compilation ended without a result".into())),
            }
        }
    }

    fn compile_here(&self, source: Source) -> Result<GrammarState, String> {
        let names_special = matches!(&source, Source::Lark(lark) if lark.contains('<'));
        let grammar = source.grammar();
        let (limits, env) = (self.factory.limits(), self.factory.tok_env());
        let (grammar, lexer) =
            GrammarInit::Serialized(grammar).to_internal(Some(env.clone()), limits.clone()).map_err(one_line)?;
        check_first_bytes(&lexer, self.factory.extra_lexemes(), limits.clone())?;
        let parser = self.factory.create_parser_from_init_default(GrammarInit::Internal(grammar, lexer));
        let matcher = Box::new(Matcher::new(Ok(parser.map_err(one_line)?)));
        if let Some(error) = matcher.get_error() {
            return Err(one_line(error));
        }
        let forbidden = if names_special { Arc::new([]) } else { self.special.clone() };
        let compiled = GrammarState { matcher, forbidden };
        // A grammar too complex for the first token fails now, not in a step that other requests share.
        compiled.clone().allowed_tokens()?;
        Ok(compiled)
    }
}

/// A grammar and how much of it an output has matched.
#[derive(Clone)]
pub(super) struct GrammarState {
    matcher: Box<Matcher>,
    /// Tokens that are forbidden in any case: the special ones, unless the grammar names some.
    forbidden: Arc<[TokenId]>,
}

impl GrammarState {
    /// The tokens that are allowed next, ends of sequence aside; `None` if the grammar is matched and cannot continue,
    /// or if no token fits.
    pub(super) fn allowed_tokens(&mut self) -> Result<Option<SimpleVob>, String> {
        if self.matcher.is_stopped() {
            return Ok(None);
        }
        match self.matcher.compute_mask() {
            Ok(mut tokens) => {
                self.forbidden.iter().for_each(|&token| tokens.disallow_token(token));
                Ok(Some(tokens))
            }
            // A matcher's error has no kind, only this text.
            Err(error) => match one_line(error) {
                error if error.starts_with(&StopReason::NoExtensionBias.to_string()) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Whether the output may end here.
    pub(super) fn is_satisfied(&mut self) -> bool {
        match self.matcher.stop_reason() {
            StopReason::NoExtension | StopReason::EndOfSentence => true,
            StopReason::NotStopped => self.matcher.is_accepting().unwrap_or(false),
            _ => false,
        }
    }

    /// Advances by a token; false if it does not fit.
    pub(super) fn advance(&mut self, token: i64) -> Result<bool, String> {
        let Ok(token) = TokenId::try_from(token) else { return Ok(false) };
        if self.matcher.is_stopped() || self.forbidden.binary_search(&token).is_ok() {
            return Ok(false);
        }
        self.matcher.try_consume_tokens(&[token]).map(|consumed| consumed == 1).map_err(one_line)
    }
}

/// Follows each first byte into the lexer within the library's limit on work. The library does the same when it opens
/// the lexer, but without a limit, and for `multipleOf` and other intersections that can take minutes and gigabytes.
fn check_first_bytes(lexer: &LexerSpec, extra_lexemes: Vec<String>, mut limits: ParserLimits) -> Result<(), String> {
    let mut lexer = lexer.clone();
    lexer.add_extra_lexemes(&extra_lexemes);
    let fuel = limits.initial_lexer_fuel;
    let mut states = lexer.to_regex_vec(&mut limits).map_err(one_line)?;
    states.set_fuel(fuel);
    let start = states.initial_state(&lexer.all_lexemes());
    for byte in 0..=u8::MAX {
        states.transition(start, byte);
        if states.has_error() {
            return Err(format!(
                "too complex: its first byte takes more than {fuel} steps (typical for a large multipleOf, or for \
                 patterns combined with lengths)"
            ));
        }
    }
    Ok(())
}

/// The problem and its position in the regular expression, out of the multi-line message of the `regex` crate.
fn of_regex(text: &str) -> Option<String> {
    let (before, drawing) = text.split_once("regex parse error:\n")?;
    let (drawing, problem) = drawing.split_once("\nerror: ")?;
    let problem = problem.lines().next()?.trim();
    let [pattern, mark] = drawing.lines().collect::<Vec<_>>()[..] else { return Some(problem.to_string()) };
    let indent = pattern.len() - pattern.trim_start().len();
    let position = 1 + mark.find('^')?.checked_sub(indent)?;
    // For an expression in a grammar, its position there.
    let of_grammar = before.split_once(": ").filter(|_| !text.contains("1 | start: /")).map(|(position, _)| position);
    let of_grammar = of_grammar.map(|position| format!("{position}: ")).unwrap_or_default();
    Some(format!("{of_grammar}{problem} at character {position}"))
}

/// An error's message on one line, without the backtrace that may follow it.
fn one_line(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    if let Some(problem) = of_regex(&text) {
        return problem;
    }
    let lines = text.lines().map(str::trim).take_while(|line| *line != "<backtrace>");
    let mut line = lines.filter(|line| !line.is_empty() && *line != "<non-verbose/>").collect::<Vec<_>>().join(" ");
    // Some messages repeat the whole grammar.
    if let Some((end, _)) = line.char_indices().nth(400) {
        line.truncate(end);
        line.push('…');
    }
    line
}
