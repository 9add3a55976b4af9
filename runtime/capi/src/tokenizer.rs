//! Texts and tokens that callers hold, the tokenizer, and text of tokens that come one by one.

use std::ffi::c_char;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, TryLockError};

use t5gemma_runtime::{SpecialTokens, TextStream, Tokenizer};

use crate::error::{Code, Failure, fallible, free, value};
use crate::handle::{Handle, Object};
use crate::input::{Array, Out, Text, flag};

/// A `t5g_text`: with a zero behind it, which is none of it. Zeros within stay.
pub struct Written(Vec<u8>);

impl Object for Written {
    const NAME: &'static str = "t5g_text";
}

impl Written {
    pub fn new(text: String) -> Written {
        let mut bytes = text.into_bytes();
        bytes.push(0);
        Written(bytes)
    }

    pub fn handle(text: String) -> Handle<Written> {
        Handle::new(Written::new(text))
    }

    pub fn pointer(&self) -> *const c_char {
        self.0.as_ptr().cast()
    }

    pub fn size(&self) -> usize {
        self.0.len() - 1
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_text_data(text: Handle<Written>) -> *const c_char {
    value(c"".as_ptr(), || Ok(text.get("text")?.pointer()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_text_size(text: Handle<Written>) -> usize {
    value(0, || Ok(text.get("text")?.size()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_text_free(text: Handle<Written>) -> i32 {
    free(text, "text")
}

/// A `t5g_tokens`.
pub struct Tokens(Vec<i64>);

impl Object for Tokens {
    const NAME: &'static str = "t5g_tokens";
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokens_data(tokens: Handle<Tokens>) -> *const i64 {
    value(std::ptr::null(), || Ok(tokens.get("tokens")?.0.as_ptr()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokens_size(tokens: Handle<Tokens>) -> usize {
    value(0, || Ok(tokens.get("tokens")?.0.len()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokens_free(tokens: Handle<Tokens>) -> i32 {
    free(tokens, "tokens")
}

/// A `t5g_tokenizer`.
pub struct Reading(pub Tokenizer);

impl Object for Reading {
    const NAME: &'static str = "t5g_tokenizer";
}

fn special(value: i32) -> Result<SpecialTokens, Failure> {
    Ok(if flag(value.into(), "special")? { SpecialTokens::Keep } else { SpecialTokens::Skip })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_open(path: Text, tokenizer: Out<Handle<Reading>>) -> Handle<Failure> {
    fallible(|| {
        let place = tokenizer.check("tokenizer")?;
        let path = path.required("path")?;
        place.put(Handle::new(Reading(Tokenizer::open(Path::new(path))?)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_encode(
    tokenizer: Handle<Reading>,
    text: Text,
    size: usize,
    kind: i32,
    tokens: Out<Handle<Tokens>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, tokenizer) = (tokens.check("tokens")?, tokenizer.get("tokenizer")?);
        let text = text.get(size, "text")?;
        let tokens = match kind {
            0 => tokenizer.0.encode(text)?,
            1 => tokenizer.0.encode_target(text)?,
            other => return Err(Failure::argument("kind", "T5G_TEXT_SOURCE or T5G_TEXT_TARGET", other.to_string())),
        };
        place.put(Handle::new(Tokens(tokens)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_decode(
    tokenizer: Handle<Reading>,
    tokens: Array<i64>,
    count: usize,
    keep_special: i32,
    text: Out<Handle<Written>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, tokenizer) = (text.check("text")?, tokenizer.get("tokenizer")?);
        let tokens = tokens.get(count, "tokens")?;
        place.put(Written::handle(tokenizer.0.decode(tokens, special(keep_special)?)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_token(
    tokenizer: Handle<Reading>,
    token: i64,
    piece: Out<Handle<Written>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, tokenizer) = (piece.check("piece")?, tokenizer.get("tokenizer")?);
        place.put(Written::handle(tokenizer.0.token(token).unwrap_or_default()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_tokenizer_free(tokenizer: Handle<Reading>) -> i32 {
    free(tokenizer, "tokenizer")
}

/// A `t5g_stream`.
pub struct Stream(Mutex<Growing>);

struct Growing {
    stream: Option<TextStream>,
    special: SpecialTokens,
    /// What was given last, which the caller may still read.
    given: Written,
    tokenizer: Tokenizer,
}

impl Object for Stream {
    const NAME: &'static str = "t5g_stream";
}

impl Growing {
    /// The stream, begun if there is none.
    fn stream(&mut self) -> &mut TextStream {
        self.stream.get_or_insert_with(|| self.tokenizer.stream(self.special))
    }

    fn give(
        &mut self,
        text: String,
        place: crate::input::Place<*const c_char>,
        size: Option<crate::input::Place<usize>>,
    ) {
        self.given = Written::new(text);
        place.put(self.given.pointer());
        if let Some(size) = size {
            size.put(self.given.size());
        }
    }
}

impl Stream {
    fn only(&self) -> Result<MutexGuard<'_, Growing>, Failure> {
        match self.0.try_lock() {
            Ok(growing) => Ok(growing),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Failure::new(Code::Busy, "stream: another thread is using it; each needs its own").at("stream"))
            }
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_new(
    tokenizer: Handle<Reading>,
    keep_special: i32,
    stream: Out<Handle<Stream>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, tokenizer) = (stream.check("stream")?, tokenizer.get("tokenizer")?);
        let (special, tokenizer) = (special(keep_special)?, tokenizer.0.clone());
        let growing = Growing { stream: None, special, given: Written::new(String::new()), tokenizer };
        place.put(Handle::new(Stream(Mutex::new(growing))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_push(
    stream: Handle<Stream>,
    token: i64,
    text: Out<*const c_char>,
    size: Out<usize>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, size, stream) = (text.check("text")?, size.optional("size")?, stream.get("stream")?);
        let mut growing = stream.only()?;
        let text = growing.stream().push(token)?;
        growing.give(text, place, size);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_finish(
    stream: Handle<Stream>,
    text: Out<*const c_char>,
    size: Out<usize>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, size, stream) = (text.check("text")?, size.optional("size")?, stream.get("stream")?);
        let mut growing = stream.only()?;
        let text = growing.stream.take().map_or(Ok(String::new()), TextStream::finish)?;
        growing.give(text, place, size);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_stream_free(stream: Handle<Stream>) -> i32 {
    free(stream, "stream")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::c_string;

    #[test]
    fn a_text_keeps_its_zeros_and_has_one_behind() {
        let text = Written::new("a\0b".into());
        assert_eq!((text.0.as_slice(), text.size()), (b"a\0b\0".as_slice(), 3));
        assert_eq!(c_string("a\0b").as_bytes(), "a\u{fffd}b".as_bytes());
    }
}
