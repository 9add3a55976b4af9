//! Grammars over the text of an output: JSON schemas, regular expressions and Lark. The only user of `llguidance`, which
//! works on bytes: it is given the bytes of every token, and says which tokens may come next.

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
use crate::foreign;
use crate::tokenizer::{TokenText, Tokenizer};

/// The name of the library in errors.
const LIBRARY: &str = "llguidance";
/// The stack of a compilation, enough for what may be nested in a grammar.
const STACK: usize = 512 << 20;

/// What all grammars of a model share: the tree of its tokens' bytes.
pub(crate) struct Vocabulary {
    factory: ParserFactory,
    texts: Arc<[TokenText]>,
    /// The ids of special tokens.
    special: Arc<[TokenId]>,
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
        let mut texts = vec![TokenText::default(); vocab_size];
        for (id, text) in tokenizer.token_texts()? {
            if let Some(place) = texts.get_mut(id as usize) {
                *place = text;
            }
        }
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
        let end = u32::try_from(vocab_size).map_err(|_| format!("a vocabulary of {vocab_size} tokens"))?;
        let prepare = || {
            // Ends of sequence are the search's. The tree has to be told one and lets it pass wherever a grammar may end, so it
            // is told one that does not exist.
            let bytes: Vec<Vec<u8>> = bytes.into_iter().chain([Vec::new()]).collect();
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &bytes);
            let env: TokEnv = Arc::new(Tokens { trie, tokenizer: tokenizer.clone() });
            let mut factory = ParserFactory::new_simple(&env).map_err(words)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        };
        let factory = foreign::call(LIBRARY, prepare).flatten()?;
        let special = (0..end).filter(|&id| texts[id as usize].is_special).collect();
        Ok(Vocabulary { factory, texts: texts.into(), special })
    }

    /// The text of every token.
    pub(super) fn texts(&self) -> &Arc<[TokenText]> {
        &self.texts
    }

    /// Compiles a grammar, or says why it cannot be.
    ///
    /// It takes a second or two at most, however the grammar is made: [`check_first_bytes`] and the library's own limits see to
    /// that. It is done on a thread of its own, so that `cancel` ends the waiting for it.
    pub(super) fn compile(
        self: &Arc<Self>,
        source: Source,
        cancel: &Cancellation,
    ) -> Result<Result<Match, String>, Error> {
        if let Err(found) = source.check() {
            return Ok(Err(found));
        }
        let (done, compiled) = channel();
        let vocabulary = self.clone();
        let work = move || {
            let compiled = foreign::call(LIBRARY, || vocabulary.compile_here(source)).flatten();
            // Nobody waits for it any more if it was cancelled.
            let _ = done.send(compiled);
        };
        let started = thread::Builder::new().name("t5gemma-grammar".into()).stack_size(STACK).spawn(work);
        if let Err(problem) = started {
            return Ok(Err(format!("no thread to compile it on: {problem}")));
        }
        loop {
            match compiled.recv_timeout(Duration::from_millis(10)) {
                Ok(compiled) => return Ok(compiled),
                Err(RecvTimeoutError::Timeout) => cancel.check()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(Err("its compilation ended".into())),
            }
        }
    }

    fn compile_here(&self, source: Source) -> Result<Match, String> {
        let names_special = matches!(&source, Source::Lark(lark) if lark.contains('<'));
        let grammar = source.grammar();
        let (limits, env) = (self.factory.limits(), self.factory.tok_env());
        let (grammar, lexer) =
            GrammarInit::Serialized(grammar).to_internal(Some(env.clone()), limits.clone()).map_err(words)?;
        check_first_bytes(&lexer, self.factory.extra_lexemes(), limits.clone())?;
        let parser = self.factory.create_parser_from_init_default(GrammarInit::Internal(grammar, lexer));
        let matcher = Box::new(Matcher::new(Ok(parser.map_err(words)?)));
        if let Some(error) = matcher.get_error() {
            return Err(words(error));
        }
        let forbidden = if names_special { Arc::new([]) } else { self.special.clone() };
        let compiled = Match { matcher, forbidden };
        // What is too complex to begin with is told now, not when others wait for the step.
        compiled.clone().next()?;
        Ok(compiled)
    }
}

/// A grammar and how much of it an output has matched.
#[derive(Clone)]
pub(super) struct Match {
    matcher: Box<Matcher>,
    /// Tokens that it does not allow, whatever the grammar says: special ones, unless the grammar names some.
    forbidden: Arc<[TokenId]>,
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
            Ok(mut tokens) => {
                self.forbidden.iter().for_each(|&token| tokens.disallow_token(token));
                Ok(Next::Tokens(tokens))
            }
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
        if self.matcher.is_stopped() || self.forbidden.binary_search(&token).is_ok() {
            return Ok(false);
        }
        self.matcher.try_consume_tokens(&[token]).map(|consumed| consumed == 1).map_err(words)
    }
}

/// Follows each first byte into the lexer, with the library's limit on the work: it does the same itself when it opens the
/// lexer, without one, and what `multipleOf` and other intersections ask for there can take minutes and gigabytes.
fn check_first_bytes(lexer: &LexerSpec, extra_lexemes: Vec<String>, mut limits: ParserLimits) -> Result<(), String> {
    let mut lexer = lexer.clone();
    lexer.add_extra_lexemes(&extra_lexemes);
    let fuel = limits.initial_lexer_fuel;
    let mut states = lexer.to_regex_vec(&mut limits).map_err(words)?;
    states.set_fuel(fuel);
    let start = states.initial_state(&lexer.all_lexemes());
    for byte in 0..=u8::MAX {
        states.transition(start, byte);
        if states.has_error() {
            return Err(format!(
                "too much work: it takes more than {fuel} steps to find out how it may begin (large multipleOf, or patterns and \
                 lengths that hold together, are known for that)"
            ));
        }
    }
    Ok(())
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
    let mut words = lines.filter(|line| !line.is_empty() && *line != "<non-verbose/>").collect::<Vec<_>>().join(" ");
    // Some repeat the whole grammar.
    if let Some((end, _)) = words.char_indices().nth(400) {
        words.truncate(end);
        words.push('…');
    }
    words
}
