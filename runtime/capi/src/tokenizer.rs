//! Texts and tokens that callers hold, tokenizers, and streaming decoders.

use std::ffi::c_char;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, TryLockError};

use t5gemma_runtime::{SpecialTokens, TextStream, Tokenizer};

use crate::boundary::{fallible, free, value};
use crate::error::{t5g_code, t5g_error};
use crate::handle::{Handle, Object};
use crate::input::{Array, Out, Text, flag};

/// A `t5g_text`: a text followed by a zero. The text itself may contain zeros.
pub struct t5g_text(Vec<u8>);

impl Object for t5g_text {
    const NAME: &'static str = "t5g_text";
}

impl t5g_text {
    pub fn new(text: String) -> t5g_text {
        let mut bytes = text.into_bytes();
        bytes.push(0);
        t5g_text(bytes)
    }

    pub fn handle(text: String) -> Handle<t5g_text> {
        Handle::new(t5g_text::new(text))
    }

    pub fn pointer(&self) -> *const c_char {
        self.0.as_ptr().cast()
    }

    pub fn size(&self) -> usize {
        self.0.len() - 1
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_text_data(text: Handle<t5g_text>) -> *const c_char {
    value(c"".as_ptr(), || Ok(text.get("text")?.pointer()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_text_size(text: Handle<t5g_text>) -> usize {
    value(0, || Ok(text.get("text")?.size()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_text_free(text: Handle<t5g_text>) -> i32 {
    free(text, "text")
}

/// A `t5g_tokens`.
pub struct t5g_tokens(Vec<i64>);

impl Object for t5g_tokens {
    const NAME: &'static str = "t5g_tokens";
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokens_data(tokens: Handle<t5g_tokens>) -> *const i64 {
    value(std::ptr::null(), || Ok(tokens.get("tokens")?.0.as_ptr()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokens_size(tokens: Handle<t5g_tokens>) -> usize {
    value(0, || Ok(tokens.get("tokens")?.0.len()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokens_free(tokens: Handle<t5g_tokens>) -> i32 {
    free(tokens, "tokens")
}

/// A `t5g_tokenizer`.
pub struct t5g_tokenizer(pub Tokenizer);

impl Object for t5g_tokenizer {
    const NAME: &'static str = "t5g_tokenizer";
}

fn special(value: i32) -> Result<SpecialTokens, t5g_error> {
    Ok(if flag(value.into(), "special")? { SpecialTokens::Keep } else { SpecialTokens::Skip })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_open(path: Text, tokenizer: Out<Handle<t5g_tokenizer>>) -> Handle<t5g_error> {
    fallible(|| {
        let place = tokenizer.check("tokenizer")?;
        let path = path.required("path")?;
        place.put(Handle::new(t5g_tokenizer(Tokenizer::open(Path::new(path))?)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_encode(
    tokenizer: Handle<t5g_tokenizer>,
    text: Text,
    size: usize,
    kind: i32,
    tokens: Out<Handle<t5g_tokens>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, tokenizer) = (tokens.check("tokens")?, tokenizer.get("tokenizer")?);
        let text = text.get(size, "text")?;
        let tokens = match kind {
            0 => tokenizer.0.encode(text)?,
            1 => tokenizer.0.encode_target(text)?,
            other => return Err(t5g_error::argument("kind", "T5G_TEXT_SOURCE or T5G_TEXT_TARGET", other.to_string())),
        };
        place.put(Handle::new(t5g_tokens(tokens)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_decode(
    tokenizer: Handle<t5g_tokenizer>,
    tokens: Array<i64>,
    count: usize,
    keep_special: i32,
    text: Out<Handle<t5g_text>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, tokenizer) = (text.check("text")?, tokenizer.get("tokenizer")?);
        let tokens = tokens.get(count, "tokens")?;
        place.put(t5g_text::handle(tokenizer.0.decode(tokens, special(keep_special)?)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_token(
    tokenizer: Handle<t5g_tokenizer>,
    token: i64,
    piece: Out<Handle<t5g_text>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, tokenizer) = (piece.check("piece")?, tokenizer.get("tokenizer")?);
        place.put(t5g_text::handle(tokenizer.0.token(token).unwrap_or_default()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_free(tokenizer: Handle<t5g_tokenizer>) -> i32 {
    free(tokenizer, "tokenizer")
}

/// A `t5g_stream`.
pub struct t5g_stream(Mutex<Decoding>);

struct Decoding {
    stream: Option<TextStream>,
    special: SpecialTokens,
    /// The last text, which the caller may still read.
    given: t5g_text,
    tokenizer: Tokenizer,
}

impl Object for t5g_stream {
    const NAME: &'static str = "t5g_stream";
}

impl Decoding {
    /// The stream, started if there is none.
    fn stream(&mut self) -> &mut TextStream {
        self.stream.get_or_insert_with(|| self.tokenizer.stream(self.special))
    }

    fn give(
        &mut self,
        text: String,
        place: crate::input::Place<*const c_char>,
        size: Option<crate::input::Place<usize>>,
    ) {
        self.given = t5g_text::new(text);
        place.put(self.given.pointer());
        if let Some(size) = size {
            size.put(self.given.size());
        }
    }
}

impl t5g_stream {
    fn lock(&self) -> Result<MutexGuard<'_, Decoding>, t5g_error> {
        match self.0.try_lock() {
            Ok(decoding) => Ok(decoding),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(t5g_error::new(t5g_code::Busy, "stream: another thread is using it").at("stream"))
            }
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_new(
    tokenizer: Handle<t5g_tokenizer>,
    keep_special: i32,
    stream: Out<Handle<t5g_stream>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, tokenizer) = (stream.check("stream")?, tokenizer.get("tokenizer")?);
        let (special, tokenizer) = (special(keep_special)?, tokenizer.0.clone());
        let decoding = Decoding { stream: None, special, given: t5g_text::new(String::new()), tokenizer };
        place.put(Handle::new(t5g_stream(Mutex::new(decoding))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_push(
    stream: Handle<t5g_stream>,
    token: i64,
    text: Out<*const c_char>,
    size: Out<usize>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, size, stream) = (text.check("text")?, size.optional("size")?, stream.get("stream")?);
        let mut decoding = stream.lock()?;
        let text = decoding.stream().push(token)?;
        decoding.give(text, place, size);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_finish(
    stream: Handle<t5g_stream>,
    text: Out<*const c_char>,
    size: Out<usize>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, size, stream) = (text.check("text")?, size.optional("size")?, stream.get("stream")?);
        let mut decoding = stream.lock()?;
        let text = decoding.stream.take().map_or(Ok(String::new()), TextStream::finish)?;
        decoding.give(text, place, size);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_free(stream: Handle<t5g_stream>) -> i32 {
    free(stream, "stream")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::c_string;

    #[test]
    fn a_text_keeps_its_zeros_and_has_one_behind() {
        let text = t5g_text::new("a\0b".into());
        assert_eq!((text.0.as_slice(), text.size()), (b"a\0b\0".as_slice(), 3));
        assert_eq!(c_string("a\0b").as_bytes(), "a\u{fffd}b".as_bytes());
    }
}
