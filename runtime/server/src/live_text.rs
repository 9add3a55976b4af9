//! `LiveText`: the text of one target while its tokens arrive, without what may still be taken back.

use t5gemma_runtime::{Error, TextStream};

use crate::stop_text::{StopText, cut};

/// The text of a target in progress.
#[derive(Debug)]
pub struct LiveText {
    stream: TextStream,
    stops: Vec<String>,
    stop: StopText,
    sent: String,
}

impl LiveText {
    /// No token yet. The text ends before the first of `stops`.
    pub fn new(stream: TextStream, stops: &[String]) -> LiveText {
        LiveText { stream, stops: stops.to_vec(), stop: StopText::new(stops), sent: String::new() }
    }

    /// Takes a token and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// A token that the tokenizer cannot decode.
    pub fn push(&mut self, token: i64) -> Result<String, Error> {
        let piece = self.stop.push(&self.stream.push(token)?);
        self.sent.push_str(&piece);
        Ok(piece)
    }

    /// What is missing of the whole text, `text`.
    pub fn rest(&self, text: &str) -> String {
        cut(text, &self.stops).strip_prefix(&self.sent).unwrap_or_default().to_string()
    }
}
