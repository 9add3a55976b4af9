//! `Compiler`: compiles the constraint options of a call to a [`Constraint`] on one model's tokens.

use std::sync::{Arc, OnceLock};

use super::Constraint;
#[cfg(feature = "constraints")]
use super::grammar::Vocabulary;
use super::matcher::{Matcher, bytes};
use super::phrases::{Phrase, Phrases};
#[cfg(feature = "constraints")]
use super::source::Source;
use super::trie::Trie;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::options::{GenerationConfig, OptionError, Sequence};
use crate::tokenizer::{LazyTokenizer, TokenText};

/// Compiles constraints for one model. Shared data is prepared on first use.
pub(crate) struct Compiler {
    tokenizer: Arc<LazyTokenizer>,
    vocab_size: usize,
    texts: OnceLock<Result<Arc<[TokenText]>, String>>,
    #[cfg(feature = "constraints")]
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
}

impl Compiler {
    /// A compiler for a model whose vocabulary has `vocab_size` tokens.
    pub fn new(tokenizer: Arc<LazyTokenizer>, vocab_size: usize) -> Compiler {
        Compiler {
            tokenizer,
            vocab_size,
            texts: OnceLock::new(),
            #[cfg(feature = "constraints")]
            vocabulary: OnceLock::new(),
        }
    }

    /// Compiles the constraints of a configuration; `None` if it has none.
    ///
    /// # Errors
    /// A grammar that cannot be compiled, tokens outside the vocabulary, text for a model without a usable tokenizer,
    /// sequences and phrases that are too long for the maximum length, or a cancellation.
    pub fn compile(
        &self,
        config: &GenerationConfig,
        prompt_len: usize,
        cancel: &Cancellation,
    ) -> Result<Option<Arc<Constraint>>, Error> {
        if !config.is_constrained() {
            return Ok(None);
        }
        let max_length = config.max_length(prompt_len);
        let room = max_length.saturating_sub(prompt_len);
        let mut start = Vec::new();
        if !config.allowed_sequences.is_empty() {
            let trie = allowed_sequences(self, &config.allowed_sequences, &config.eos_token_id, room)?;
            start.push(Matcher::Sequences { trie: Arc::new(trie), node: Trie::ROOT });
        }
        if !config.required_phrases.is_empty() {
            let (phrases, texts) = required_phrases(self, &config.required_phrases, &config.eos_token_id, room)?;
            let state = phrases.start();
            start.push(Matcher::Phrases { phrases: Arc::new(phrases), state, texts });
        }
        start.extend(self.grammars(config, cancel)?);
        start.extend(config.prefix_allowed_tokens.clone().map(Matcher::Callback));
        Ok(Some(Arc::new(Constraint { start, prompt_len, max_length, eos: config.eos_token_id.clone() })))
    }

    #[cfg(feature = "constraints")]
    fn grammars(&self, config: &GenerationConfig, cancel: &Cancellation) -> Result<Vec<Matcher>, Error> {
        let mut grammars = Vec::new();
        for (name, expected, source) in [
            ("json_schema", "a JSON schema that compiles", config.json_schema.clone().map(Source::Schema)),
            ("regex", "a regular expression that compiles", config.regex.clone().map(Source::Regex)),
            ("grammar", "a Lark grammar that compiles", config.grammar.clone().map(Source::Lark)),
        ] {
            if let Some(source) = source {
                let compiled = self.vocabulary()?.compile(source, cancel)?;
                grammars.push(Matcher::Grammar(compiled.map_err(|found| OptionError::new(name, expected, found))?));
            }
        }
        Ok(grammars)
    }

    #[cfg(not(feature = "constraints"))]
    fn grammars(&self, config: &GenerationConfig, _: &Cancellation) -> Result<Vec<Matcher>, Error> {
        let is_set = [
            ("json_schema", config.json_schema.is_some()),
            ("regex", config.regex.is_some()),
            ("grammar", config.grammar.is_some()),
        ];
        match is_set.into_iter().find(|(_, is_set)| *is_set) {
            None => Ok(Vec::new()),
            Some((name, _)) => {
                Err(OptionError::requires(name, "the feature `constraints` of t5gemma-runtime", "a build without it")
                    .into())
            }
        }
    }

    #[cfg(feature = "constraints")]
    fn vocabulary(&self) -> Result<&Arc<Vocabulary>, Error> {
        let tokenizer = self.tokenizer.get()?;
        let texts = self.texts()?;
        let vocabulary = self.vocabulary.get_or_init(|| Vocabulary::new(tokenizer, texts).map(Arc::new));
        vocabulary.as_ref().map_err(|problem| self.unusable(problem))
    }

    /// The text of every token.
    fn texts(&self) -> Result<&Arc<[TokenText]>, Error> {
        let tokenizer = self.tokenizer.get()?;
        let prepare = || {
            let mut texts = vec![TokenText::default(); self.vocab_size];
            for (id, text) in tokenizer.token_texts()? {
                if let Some(place) = texts.get_mut(id as usize) {
                    *place = text;
                }
            }
            Ok(texts.into())
        };
        self.texts.get_or_init(prepare).as_ref().map_err(|problem| self.unusable(problem))
    }

    fn unusable(&self, problem: &str) -> Error {
        Error::Tokenizer { path: self.tokenizer.path().to_path_buf(), problem: problem.to_string() }
    }
}

/// The sequences that fit into `room` tokens, as a trie.
fn allowed_sequences(compiler: &Compiler, sequences: &[Sequence], eos: &[i64], room: usize) -> Result<Trie, Error> {
    const NAME: &str = "allowed_sequences";
    let mut all = Vec::new();
    for sequence in sequences {
        let mut tokens = tokens(compiler, NAME, sequence)?;
        // An end-of-sequence token follows, whether the sequence has one or not.
        tokens.pop_if(|last| eos.contains(last));
        check_ends(NAME, &tokens, eos)?;
        all.push(tokens);
    }
    let fitting: Vec<&[i64]> = all.iter().map(Vec::as_slice).filter(|tokens| tokens.len() <= room).collect();
    if fitting.is_empty() {
        let expected = format!("a sequence of at most {room} tokens, the maximum to generate");
        let shortest = all.iter().map(Vec::len).min().unwrap_or(0);
        return Err(OptionError::new(NAME, expected, format!("{shortest} tokens in the shortest")).into());
    }
    Ok(Trie::new(fitting))
}

/// The phrases with their spellings, and the texts of all tokens if a phrase is text.
fn required_phrases(
    compiler: &Compiler,
    sequences: &[Sequence],
    eos: &[i64],
    room: usize,
) -> Result<(Phrases, Arc<[TokenText]>), Error> {
    const NAME: &str = "required_phrases";
    let mut texts: Arc<[TokenText]> = Arc::new([]);
    let mut phrases = Vec::new();
    for sequence in sequences {
        let spelled = tokens(compiler, NAME, sequence)?;
        check_ends(NAME, &spelled, eos)?;
        let phrase = match sequence {
            Sequence::Tokens(_) => Phrase { text: None, spellings: vec![spelled] },
            Sequence::Text(text) => {
                texts = compiler.texts()?.clone();
                let spaced = tokens(compiler, NAME, &Sequence::Text(format!(" {text}")))?;
                let mut spellings = vec![spelled, spaced];
                spellings.retain(|spelling| spells(&texts, spelling, text));
                if spellings.is_empty() {
                    let expected = "text that the model's tokens can express";
                    return Err(OptionError::new(NAME, expected, format!("{text:?}")).into());
                }
                Phrase { text: Some(text.clone().into_bytes()), spellings }
            }
        };
        phrases.push(phrase);
    }
    let phrases = Phrases::new(phrases);
    let least = phrases.cost(&phrases.start());
    if least > room {
        let expected = format!("phrases of at most {room} tokens together, the maximum to generate");
        return Err(OptionError::new(NAME, expected, format!("{least} tokens")).into());
    }
    Ok((phrases, texts))
}

/// Whether the text of tokens ends with `text`.
fn spells(texts: &[TokenText], spelling: &[i64], text: &str) -> bool {
    let written: Vec<u8> = spelling.iter().flat_map(|&token| bytes(texts, token)).copied().collect();
    written.ends_with(text.as_bytes())
}

/// The tokens of a sequence, checked to be in the vocabulary.
fn tokens(compiler: &Compiler, name: &str, sequence: &Sequence) -> Result<Vec<i64>, Error> {
    let vocab_size = compiler.vocab_size;
    let tokens = match sequence {
        Sequence::Text(text) => compiler.tokenizer.get()?.encode_target(text)?,
        Sequence::Tokens(tokens) => tokens.clone(),
    };
    match tokens.iter().find(|&&token| usize::try_from(token).map_or(true, |token| token >= vocab_size)) {
        None => Ok(tokens),
        Some(token) => {
            let expected = format!("token ids below {vocab_size}, the size of the vocabulary");
            Err(OptionError::new(name, expected, token.to_string()).into())
        }
    }
}

fn check_ends(name: &str, tokens: &[i64], eos: &[i64]) -> Result<(), OptionError> {
    match tokens.iter().find(|token| eos.contains(token)) {
        None => Ok(()),
        Some(end) => Err(OptionError::new(name, "end-of-sequence tokens at the end only", format!("token {end}"))),
    }
}

#[cfg(all(test, not(feature = "constraints")))]
mod tests {
    use super::*;
    use crate::options::GenerationOptions;

    #[test]
    fn a_grammar_is_refused_by_a_build_without_the_feature() {
        let tokenizer = Arc::new(LazyTokenizer::in_folder("nowhere".as_ref()));
        let config = GenerationConfig::default().with(&GenerationOptions::default().regex("a+".into())).expect("valid");
        let error = Compiler::new(tokenizer, 8).compile(&config, 1, &Cancellation::new()).err().expect("refused");
        assert_eq!(
            error.to_string(),
            "regex requires the feature `constraints` of t5gemma-runtime (got a build without it)"
        );
    }
}
