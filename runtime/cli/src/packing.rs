//! Batches waiting requests: in order of arrival or, with a token budget, sorted by length to save padding. Answers
//! keep the order of the requests either way.

use std::time::Duration;

use anyhow::Result;
use t5gemma_protocol::TokenizedRequest;
use t5gemma_runtime::Limits;

use crate::stderr::note;

/// Maximum number of requests to sort by length at a time.
const WINDOW: usize = 1024;

/// Set once the warning about sources longer than a batch was printed.
static WARNED: std::sync::Once = std::sync::Once::new();

/// Default maximum of source rows per batch.
const DEFAULT_ROWS: usize = 8;

/// Flags of commands that run batches.
#[derive(clap::Args)]
#[command(next_help_heading = "Runtime")]
pub struct Packing {
    /// Maximum number of sources in a batch [default: 8, or any number with --max-batch-tokens]
    ///
    /// Larger requests run in several batches.
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: Option<u32>,
    /// Maximum number of source tokens in a batch, padding included
    ///
    /// Waiting requests are sorted by length to save padding; results keep their order. A source with more tokens runs
    /// alone.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_batch_tokens: Option<u32>,
}

impl Packing {
    /// Batches of at most `rows` rows.
    pub fn of_rows(rows: u32) -> Packing {
        Packing { batch_size: Some(rows), max_batch_tokens: None }
    }

    /// The limits of one model call, which also apply within a single request.
    pub fn limits(&self) -> Limits {
        let max_tokens = self.max_batch_tokens.map_or(usize::MAX, |tokens| tokens as usize);
        Limits::default().max_sources(self.rows()).max_tokens(max_tokens)
    }

    /// Number of source rows to read before running them.
    pub fn window(&self) -> usize {
        if self.is_by_tokens() { WINDOW } else { self.rows() }
    }

    /// How long to wait for another request before running those already read: briefly if requests are sorted, else not
    /// at all.
    pub fn patience(&self) -> Duration {
        if self.is_by_tokens() { Duration::from_millis(20) } else { Duration::ZERO }
    }

    /// Whether batches have a token budget.
    pub fn is_by_tokens(&self) -> bool {
        self.max_batch_tokens.is_some()
    }

    /// Maximum number of source rows per batch.
    pub fn rows(&self) -> usize {
        match (self.batch_size, self.max_batch_tokens) {
            (Some(rows), _) => rows as usize,
            (None, Some(_)) => usize::MAX,
            (None, None) => DEFAULT_ROWS,
        }
    }

    /// Runs requests in batches within the token budget and returns the answers in the order of the requests. Requests
    /// share a batch only if `fits` returns true.
    pub fn run<A, E>(
        &self,
        requests: Vec<Result<TokenizedRequest, E>>,
        fits: impl Fn(&TokenizedRequest, &TokenizedRequest) -> bool,
        mut run: impl FnMut(Vec<TokenizedRequest>) -> Result<Vec<Result<A, E>>>,
    ) -> Result<Vec<Result<A, E>>> {
        let mut answers: Vec<Option<Result<A, E>>> = Vec::new();
        let mut taken: Vec<Option<TokenizedRequest>> = Vec::new();
        let mut classes: Vec<Vec<usize>> = Vec::new();
        for (at, request) in requests.into_iter().enumerate() {
            match request {
                Err(refused) => {
                    answers.push(Some(Err(refused)));
                    taken.push(None);
                }
                Ok(request) => {
                    let alike = |class: &&mut Vec<usize>| {
                        class
                            .first()
                            .and_then(|&first| taken[first].as_ref())
                            .is_some_and(|first| fits(first, &request))
                    };
                    match classes.iter_mut().find(alike) {
                        Some(class) => class.push(at),
                        None => classes.push(vec![at]),
                    }
                    answers.push(None);
                    taken.push(Some(request));
                }
            }
        }
        let most_tokens = self.max_batch_tokens.map_or(usize::MAX, |tokens| tokens as usize);
        for class in classes {
            let size = |&at: &usize| {
                let sources = taken[at].as_ref().map(|request| request.sources.as_slice()).unwrap_or_default();
                Size { rows: sources.len(), length: sources.iter().map(Vec::len).max().unwrap_or(0) }
            };
            let sizes: Vec<Size> = class.iter().map(size).collect();
            if let Some(Size { length, .. }) = sizes.iter().find(|size| size.length > most_tokens) {
                WARNED.call_once(|| {
                    note!(
                        "t5gemma: a source has {length} tokens, more than --max-batch-tokens {most_tokens}; such \
                         sources run alone"
                    );
                });
            }
            for pack in packs(&sizes, self.rows(), most_tokens) {
                let batch = pack.iter().filter_map(|&of_class| taken[class[of_class]].take()).collect();
                for (&of_class, answer) in pack.iter().zip(run(batch)?) {
                    answers[class[of_class]] = Some(answer);
                }
            }
        }
        Ok(answers.into_iter().map(|answer| answer.expect("every request is in one pack")).collect())
    }
}

/// The sizes of a request's sources.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    length: usize,
}

/// Divides requests, by index, into packs: the longest first, so that running out of memory happens early; requests of
/// equal length in their order.
fn packs(sizes: &[Size], most_rows: usize, most_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(sizes[at].length));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut last = Size { rows: 0, length: 0 };
    for at in order {
        let own = sizes[at];
        let joined = Size { rows: last.rows + own.rows, length: last.length.max(own.length) };
        match packs.last_mut() {
            Some(pack) if joined.rows <= most_rows && joined.rows.saturating_mul(joined.length) <= most_tokens => {
                pack.push(at);
                last = joined;
            }
            _ => {
                packs.push(vec![at]);
                last = own;
            }
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_hold_what_fits_and_each_request_once() {
        // name, (rows, length) of the requests, rows, tokens, the packs
        type Case = (&'static str, &'static [(usize, usize)], usize, usize, &'static [&'static [usize]]);
        let cases: &[Case] = &[
            ("none", &[], 9, 9, &[]),
            ("all together", &[(1, 3), (1, 2), (1, 3)], 9, 9, &[&[0, 2, 1]]),
            ("by tokens with padding", &[(1, 1), (1, 4), (1, 4), (1, 1)], 9, 8, &[&[1, 2], &[0, 3]]),
            ("padding counts", &[(1, 5), (1, 1)], 9, 9, &[&[0], &[1]]),
            ("by rows", &[(1, 1), (2, 1), (1, 1), (1, 1)], 2, 99, &[&[0], &[1], &[2, 3]]),
            ("too long or too many, so alone", &[(1, 1), (1, 20), (9, 1)], 4, 8, &[&[1], &[0], &[2]]),
        ];
        for &(name, sizes, rows, tokens, expected) in cases {
            let sizes: Vec<Size> = sizes.iter().map(|&(rows, length)| Size { rows, length }).collect();
            assert_eq!(packs(&sizes, rows, tokens), expected, "{name}");
        }
    }
}
