//! `Tokenizer`: text to token ids and back, with the checkpoint's `tokenizer.json`. The only user of `tokenizers`; the
//! rest of the runtime works on ids and needs no tokenizer.

mod lazy;
mod settings;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::{AddedToken, EncodeInput, ModelWrapper};

use crate::error::Error;
use crate::panics;
pub(crate) use lazy::LazyTokenizer;
pub(crate) use settings::{Settings, read_text};

/// A model's tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").finish_non_exhaustive()
    }
}

/// The name of the library in errors.
const LIBRARY: &str = "tokenizers";

/// The text of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TokenText {
    /// Its bytes, not necessarily whole characters, or the name of a special token. Empty if there is no such token.
    pub bytes: Vec<u8>,
    /// Whether it is a special token, which stands for no text.
    pub is_special: bool,
}

impl Tokenizer {
    /// The file's name in a model folder.
    pub(crate) const FILE: &str = "tokenizer.json";

    /// Reads a `tokenizer.json`, with the special and added tokens of the files beside it.
    ///
    /// # Errors
    /// A file that is missing or not a tokenizer.
    pub fn open(path: &Path) -> Result<Tokenizer, Error> {
        Tokenizer::read(path).map_err(|error| error.at(path))
    }

    /// [`Tokenizer::open`] with an error that can be reported more than once.
    pub(crate) fn read(path: &Path) -> Result<Tokenizer, Unusable> {
        let folder = path.parent().unwrap_or(Path::new(""));
        if !path.exists() {
            let without = "the model takes and returns token ids only";
            let problem = if folder.join("tokenizer.model").exists() {
                format!(
                    "no such file, only tokenizer.model, which this runtime does not read: {without} (to get one, load \
                     the checkpoint with transformers' AutoTokenizer, call save_pretrained(), and export it again)"
                )
            } else {
                format!("no such file: {without}")
            };
            return Err(Unusable::itself(problem));
        }
        let text = read_text(path).map_err(Unusable::itself)?;
        let parse = || tokenizers::Tokenizer::from_bytes(text.as_bytes()).map_err(|error| error.to_string());
        let mut inner = panics::catch(LIBRARY, parse).flatten().map_err(Unusable::itself)?;
        let settings = Settings::read(folder).map_err(|(file, problem)| Unusable { file: Some(file), problem })?;
        if settings.cleans_up && (settings.cleans_up_bpe || !matches!(inner.get_model(), ModelWrapper::BPE(_))) {
            let problem = "clean_up_tokenization_spaces: expected false, found true (this runtime does not remove \
                           spaces before punctuation)";
            return Err(Unusable { file: Some(Settings::FILE.into()), problem: problem.into() });
        }
        let prepare = || {
            // A truncation left over from training would silently drop the end of a source; padding is left to the
            // batch.
            inner.with_truncation(None).map_err(|error| error.to_string())?;
            inner.with_padding(None);
            let present: Vec<AddedToken> = inner.get_added_tokens_decoder().into_values().collect();
            let mut missing = settings.missing(&present);
            // New tokens get ids from the number of tokens on. A vocabulary with gaps uses some of these ids, and then
            // tokens that only the tokenizer's class names must not take them.
            let next = inner.get_vocab_size(true) as u32;
            if (next..).take(missing.len()).any(|id| inner.id_to_token(id).is_some()) {
                missing.retain(|token| !settings.of_class.contains(&token.content));
            }
            if !missing.is_empty() {
                inner.add_tokens(missing).map_err(|error| error.to_string())?;
            }
            inner.set_encode_special_tokens(settings.splits_special_tokens);
            Ok(())
        };
        panics::catch(LIBRARY, prepare).flatten().map_err(Unusable::itself)?;
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// The tokens of a text, with the special tokens that the tokenizer's post-processor adds.
    ///
    /// # Errors
    /// A text that the tokenizer cannot express.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, Error> {
        self.ids(text, true)
    }

    /// The tokens of two texts that are read together, with the special tokens that the tokenizer's post-processor adds.
    ///
    /// # Errors
    /// Texts that the tokenizer cannot express.
    pub fn encode_pair(&self, first: &str, second: &str) -> Result<Vec<i64>, Error> {
        self.encoded((first, second), true)
    }

    fn ids(&self, text: &str, special: bool) -> Result<Vec<i64>, Error> {
        self.encoded(text, special)
    }

    fn encoded<'t>(&self, text: impl Into<EncodeInput<'t>>, special: bool) -> Result<Vec<i64>, Error> {
        let text = text.into();
        let encode = || self.inner.encode_fast(text, special).map_err(|error| error.to_string());
        let encoding = panics::catch(LIBRARY, encode)
            .flatten()
            .map_err(|found| Error::input("text", "text that the tokenizer can express", found))?;
        Ok(encoding.get_ids().iter().map(|&id| id as i64).collect())
    }

    /// The tokens of a target's text, or of its beginning, without special tokens.
    ///
    /// # Errors
    /// A text that the tokenizer cannot express.
    pub fn encode_target(&self, text: &str) -> Result<Vec<i64>, Error> {
        self.ids(text, false)
    }

    /// The text of tokens, with or without special tokens such as the end of the text.
    ///
    /// # Errors
    /// An id that is no 32-bit number, or tokens that the tokenizer cannot decode.
    pub fn decode(&self, tokens: &[i64], special: SpecialTokens) -> Result<String, Error> {
        let ids = tokens.iter().map(|&token| token_id(token)).collect::<Result<Vec<u32>, Error>>()?;
        self.text(&ids, special)
    }

    /// The text of every token by its id: the text of a target is the concatenation of its tokens' texts. Where a
    /// byte-fallback token has the same byte as an ordinary token, only the latter has a text.
    ///
    /// # Errors
    /// A decoder that does more than concatenate.
    pub(crate) fn token_texts(&self) -> Result<BTreeMap<u32, TokenText>, String> {
        let decoder = serde_json::to_value(self.inner.get_decoder()).map_err(|error| error.to_string())?;
        let steps = decoding_steps(&decoder).ok_or_else(|| {
            format!("its decoder does more than concatenate tokens, so tokens have no text of their own: {decoder}")
        })?;
        // A map, since ids may be arbitrarily large, whatever the size of the vocabulary.
        let mut texts = BTreeMap::new();
        let (mut written, mut bytes) = (std::collections::HashSet::new(), Vec::new());
        for (token, id) in self.inner.get_vocab(false) {
            match decoded(&token, &steps) {
                Decoded::Text(text) => {
                    written.insert(text.clone().into_bytes());
                    texts.insert(id, TokenText { bytes: text.into_bytes(), is_special: false });
                }
                Decoded::Byte(byte) => bytes.push((id, vec![byte])),
            }
        }
        for (id, byte) in bytes {
            if !written.contains(&byte) {
                texts.insert(id, TokenText { bytes: byte, is_special: false });
            }
        }
        for (id, token) in self.inner.get_added_tokens_decoder() {
            texts.insert(id, TokenText { bytes: token.content.into_bytes(), is_special: token.special });
        }
        Ok(texts)
    }

    /// The token of an id as the vocabulary spells it.
    pub fn token(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?)
    }

    /// A decoder that takes tokens one by one.
    pub fn stream(&self, special: SpecialTokens) -> TextStream {
        TextStream { tokenizer: self.clone(), special, ids: Vec::new(), sent: 0 }
    }

    fn text(&self, ids: &[u32], special: SpecialTokens) -> Result<String, Error> {
        let decode = || self.inner.decode(ids, special == SpecialTokens::Skip).map_err(|error| error.to_string());
        panics::catch(LIBRARY, decode)
            .flatten()
            .map_err(|found| Error::input("tokens", "tokens that the tokenizer can decode", found))
    }
}

/// Why a tokenizer cannot be used.
#[derive(Clone, Debug)]
pub(crate) struct Unusable {
    /// The file at fault, if it is one beside `tokenizer.json`.
    file: Option<String>,
    problem: String,
}

impl Unusable {
    fn itself(problem: String) -> Unusable {
        Unusable { file: None, problem }
    }

    /// The error for the tokenizer at `path`.
    pub fn at(&self, path: &Path) -> Error {
        let path = self.file.as_ref().map_or(path.to_path_buf(), |file| path.with_file_name(file));
        Error::Tokenizer { path, problem: self.problem.clone() }
    }
}

/// How to decode special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Leave them out.
    Skip,
    /// Write their names.
    Keep,
}

/// A step of a decoder that acts on each token alone.
enum DecodingStep {
    Replace { pattern: String, content: String },
    ByteFallback,
}

/// A decoded token.
enum Decoded {
    Text(String),
    Byte(u8),
}

/// The steps of a decoder in the JSON of `tokenizer.json`, if each acts on one token alone.
fn decoding_steps(decoder: &Value) -> Option<Vec<DecodingStep>> {
    match decoder["type"].as_str()? {
        "Sequence" => {
            let steps: Option<Vec<_>> = decoder["decoders"].as_array()?.iter().map(decoding_steps).collect();
            Some(steps?.into_iter().flatten().collect())
        }
        "Replace" => {
            let pattern = decoder["pattern"]["String"].as_str()?.to_string();
            Some(vec![DecodingStep::Replace { pattern, content: decoder["content"].as_str()?.to_string() }])
        }
        "ByteFallback" => Some(vec![DecodingStep::ByteFallback]),
        "Fuse" => Some(Vec::new()),
        _ => None,
    }
}

fn decoded(token: &str, steps: &[DecodingStep]) -> Decoded {
    let mut text = token.to_string();
    for step in steps {
        match step {
            DecodingStep::Replace { pattern, content } => text = text.replace(pattern, content),
            DecodingStep::ByteFallback => {
                let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                if let Some(byte) = byte.filter(|hex| hex.len() == 2)
                    && let Ok(byte) = u8::from_str_radix(byte, 16)
                {
                    return Decoded::Byte(byte);
                }
            }
        }
    }
    Decoded::Text(text)
}

fn token_id(token: i64) -> Result<u32, Error> {
    u32::try_from(token).map_err(|_| Error::input("tokens", "token ids between 0 and 4294967295", token.to_string()))
}

/// Decodes a growing target piece by piece. Pieces are whole characters: an incomplete one waits for the next token,
/// and [`TextStream::finish`] returns the rest.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    special: SpecialTokens,
    /// The tokens of the last piece, which decide on a space behind it, and those after it that are not complete
    /// characters yet.
    ids: Vec<u32>,
    /// How many of `ids` have been returned as text.
    sent: usize,
}

impl TextStream {
    /// Takes the next token and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: i64) -> Result<String, Error> {
        self.ids.push(token_id(token)?);
        let piece = self.unsent()?;
        // The replacement character stands for bytes that may still become a character.
        if piece.is_empty() || piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.sent);
        self.sent = self.ids.len();
        Ok(piece)
    }

    /// Returns the text of the tokens that waited for more.
    ///
    /// # Errors
    /// Tokens that the tokenizer cannot decode.
    pub fn finish(self) -> Result<String, Error> {
        self.unsent()
    }

    fn unsent(&self) -> Result<String, Error> {
        let sent = self.tokenizer.text(&self.ids[..self.sent], self.special)?;
        let all = self.tokenizer.text(&self.ids, self.special)?;
        // Counted in characters: bytes that turn out to be invalid change the text before them, but not its number of
        // characters.
        Ok(all.chars().skip(sent.chars().count()).collect())
    }
}

/// A tokenizer of Gemma's kind: words with a leading `▁`, bytes for what has no token.
#[cfg(test)]
const GEMMA_LIKE: &str = r#"{
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    "padding": null,
    "added_tokens": [
        {"id": 1, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        {"id": 2, "content": "<bos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": null,
    "post_processor": null,
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": {"<unk>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "▁": 4, "▁a": 5,
            "<0xE2>": 6, "<0x82>": 7, "<0xAC>": 8, "<0xFF>": 9, "<0x41>": 10},
        "merges": [["▁", "a"]]}
}"#;

/// A [`Tokenizer`] of it.
#[cfg(test)]
pub(crate) fn gemma_like() -> Tokenizer {
    let folder = std::env::temp_dir().join(format!("t5gemma-tokenizer-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    let path = folder.join(format!("{:?}.json", std::thread::current().id()));
    std::fs::write(&path, GEMMA_LIKE).expect("the temporary folder is writable");
    let tokenizer = Tokenizer::open(&path).expect("the tokenizer is sound");
    std::fs::remove_file(&path).expect("just written");
    tokenizer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_encoded_in_full_and_comes_back() {
        let tokenizer = gemma_like();
        let ids = tokenizer.encode("a a€").expect("bytes express everything");
        assert_eq!(ids, [3, 5, 6, 7, 8]);
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Skip).expect("known ids"), "a a€");
        let ended = [2, 3, 1];
        assert_eq!(tokenizer.decode(&ended, SpecialTokens::Skip).expect("known ids"), "a");
        assert_eq!(tokenizer.decode(&ended, SpecialTokens::Keep).expect("known ids"), "<bos>a<eos>");
        assert!(tokenizer.decode(&[-1], SpecialTokens::Keep).is_err());
    }

    #[test]
    fn a_stream_never_splits_a_character() {
        let tokenizer = gemma_like();
        let cases: [(&[i64], &[&str]); 5] = [
            (&[3, 5, 5], &["a", " a", " a", ""]),
            (&[3, 6, 7, 8, 5], &["a", "", "", "€", " a", ""]),
            (&[3, 1, 5], &["a", "", " a", ""]),
            (&[3, 6, 7], &["a", "", "", "\u{fffd}\u{fffd}"]),
            (&[10, 9, 3], &["A", "", "\u{fffd}a", ""]),
        ];
        for (tokens, pieces) in cases {
            let mut stream = tokenizer.stream(SpecialTokens::Skip);
            let mut found: Vec<String> = tokens.iter().map(|&token| stream.push(token).expect("known ids")).collect();
            found.push(stream.finish().expect("known ids"));
            assert_eq!(found, pieces, "{tokens:?}");
        }
    }

    #[test]
    fn every_token_has_its_text() {
        let texts = gemma_like().token_texts().expect("a decoder that joins tokens");
        let expected: [(&[u8], bool); 11] = [
            (b"<unk>", false),
            (b"<eos>", true),
            (b"<bos>", true),
            (b"a", false),
            (b" ", false),
            (b" a", false),
            (&[0xe2], false),
            (&[0x82], false),
            (&[0xac], false),
            (&[0xff], false),
            (b"A", false),
        ];
        let found: Vec<(&[u8], bool)> = texts.values().map(|text| (text.bytes.as_slice(), text.is_special)).collect();
        assert_eq!(found, expected);

        let unknown = serde_json::json!({"type": "Sequence", "decoders": [{"type": "Strip", "content": " "}]});
        assert!(decoding_steps(&unknown).is_none());
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let error = Tokenizer::open(Path::new("no/such/tokenizer.json")).expect_err("there is none").to_string();
        assert!(error.starts_with("no/such/tokenizer.json: no such file") && error.contains("token ids"), "{error}");
    }
}
