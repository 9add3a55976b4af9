//! Stopping criteria outside the search: stop strings, which may begin and end inside tokens, and the time limit.

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::hypothesis::FinishReason;
use crate::options::GenerationConfig;
use crate::search::{Candidate, Search};
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// The stopping criteria of one call.
pub(crate) struct StoppingCriteria {
    strings: Vec<String>,
    deadline: Option<Instant>,
}

impl StoppingCriteria {
    /// Starts the clock.
    pub fn new(options: &GenerationConfig) -> StoppingCriteria {
        // A deadline beyond the range of the clock is none.
        let time = options.max_time.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let deadline = time.and_then(|time| Instant::now().checked_add(time));
        StoppingCriteria { strings: options.stop_strings.clone(), deadline }
    }

    /// Whether the time limit has passed.
    pub fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Which of a step's candidates end their targets; all of them if `is_over`. `tokenizer` is loaded only for stop
    /// strings.
    pub fn of<'m>(
        &self,
        candidates: &[Candidate],
        search: &Search,
        is_over: bool,
        tokenizer: impl FnOnce() -> Result<&'m Tokenizer, Error>,
    ) -> Result<Vec<Option<FinishReason>>, Error> {
        if self.strings.is_empty() && !is_over {
            return Ok(Vec::new());
        }
        let tokenizer = if self.strings.is_empty() { None } else { Some(tokenizer()?) };
        let end = |candidate: &Candidate| {
            Ok(match tokenizer {
                Some(tokenizer)
                    if completes(tokenizer, &self.strings, search.history(candidate.parent), candidate.token)? =>
                {
                    Some(FinishReason::StopString)
                }
                _ if is_over => Some(FinishReason::Time),
                _ => None,
            })
        };
        candidates.iter().map(end).collect()
    }
}

/// Whether `token` completes one of the strings. The text of `history` holds none that ends in generated text.
fn completes(tokenizer: &Tokenizer, strings: &[String], history: &[i64], token: i64) -> Result<bool, Error> {
    let longest = strings.iter().map(String::len).max().unwrap_or(0);
    // Most tokens are one byte or more; where some have no text, more of them are decoded.
    let mut count = longest + 4;
    let (before, after) = loop {
        let tail = &history[history.len().saturating_sub(count)..];
        let before = tokenizer.decode(tail, SpecialTokens::Keep)?;
        if before.len() >= longest || tail.len() == history.len() {
            break (before, tokenizer.decode(&[tail, &[token]].concat(), SpecialTokens::Keep)?);
        }
        count *= 2;
    };
    // Bytes that the token completes to a character change the text before it.
    let kept = before.bytes().zip(after.bytes()).take_while(|(a, b)| a == b).count();
    Ok(strings.iter().any(|string| after.rfind(string.as_str()).is_some_and(|at| at + string.len() > kept)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::gemma_like;

    #[test]
    fn a_stop_string_is_found_across_tokens_and_only_where_it_ends() {
        // The vocabulary: 1 <eos>, 2 <bos>, 3 a, 4 ▁, 5 ▁a, 6 to 8 the bytes of €, 10 the byte A.
        // name, strings, history, token, whether it completes one
        type Case = (&'static str, &'static [&'static str], &'static [i64], i64, bool);
        let cases: &[Case] = &[
            ("one token", &["a"], &[2], 3, true),
            ("part of a token", &["a"], &[2, 10], 5, true),
            ("two tokens", &["a a"], &[2, 3], 5, true),
            ("three tokens", &["Aa a"], &[2, 10, 3], 5, true),
            ("not yet", &["a aa"], &[2, 3], 5, false),
            ("the second of two", &["€", "aa"], &[2, 3], 3, true),
            ("one that the prompt holds", &["a a"], &[2, 3, 5], 4, false),
            ("one that begins in the prompt", &["a a"], &[2, 3], 5, true),
            ("again", &["a"], &[2, 3], 5, true),
            ("overlapping itself", &["aa"], &[2, 3, 3], 3, true),
            ("a character in the making", &["€"], &[2, 6], 7, false),
            ("a character of three tokens", &["€"], &[2, 6, 7], 8, true),
            ("a special token", &["<eos>"], &[2, 3], 1, true),
            ("far behind tokens without text", &["aa"], &[2, 3, 99, 99, 99, 99, 99, 99, 99, 99, 99], 3, true),
        ];
        let tokenizer = gemma_like();
        for &(name, strings, history, token, expected) in cases {
            let strings: Vec<String> = strings.iter().map(|string| string.to_string()).collect();
            assert_eq!(completes(&tokenizer, &strings, history, token).expect("known ids"), expected, "{name}");
        }
    }

    #[test]
    fn the_clock_ends_every_candidate() {
        let options = GenerationConfig { max_time: Some(0.0), ..GenerationConfig::default() };
        let stops = StoppingCriteria::new(&options);
        let candidates = [3, 4].map(|token| Candidate { parent: 0, token, score: 0.0 });
        let search = Search::new(&options, &[2]);
        let ends = stops.of(&candidates, &search, stops.is_over(), || unreachable!("no strings, no tokenizer"));
        assert_eq!(ends.expect("no text"), [Some(FinishReason::Time); 2]);
        for max_time in [None, Some(1e300), Some(3600.0)] {
            let options = GenerationConfig { max_time, ..GenerationConfig::default() };
            let stops = StoppingCriteria::new(&options);
            assert!(!stops.is_over(), "{max_time:?}");
        }
    }
}
