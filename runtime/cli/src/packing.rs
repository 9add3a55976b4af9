//! How requests that are there together become batches: in the order in which they came, or, under a budget of tokens,
//! packed by length, so that little is computed for padding. Answers come in the order of the requests either way.

use anyhow::Result;
use t5gemma_runtime::Limits;

use crate::requests::{Refused, Request};

/// Requests to look through for equally long ones, at most.
const WINDOW: usize = 1024;

/// Whether it was told that there are sources longer than a batch may be.
static TOLD: std::sync::Once = std::sync::Once::new();

/// Most source rows of a batch where nothing is said of it.
const DEFAULT_ROWS: usize = 8;

/// Flags of commands that run batches.
#[derive(clap::Args)]
pub struct Packing {
    /// Run at most so many sources at a time; those of a larger request run in pieces [default: 8; any number with
    /// --max-batch-tokens]
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: Option<u32>,
    /// Sort waiting requests by length and run as many sources at a time as have at most this many tokens, padding included.
    /// A longer source runs alone. Results keep their order
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_batch_tokens: Option<u32>,
}

impl Packing {
    /// Batches of so many rows.
    pub fn of_rows(rows: u32) -> Packing {
        Packing { batch_size: Some(rows), max_batch_tokens: None }
    }

    /// What a model runs at a time, also of one request.
    pub fn limits(&self) -> Limits {
        let max_tokens = self.max_batch_tokens.map_or(usize::MAX, |tokens| tokens as usize);
        Limits { max_sources: self.rows(), max_tokens, ..Limits::default() }
    }

    /// Source rows to read before they are run.
    pub fn window(&self) -> usize {
        if self.is_by_tokens() { WINDOW } else { self.rows() }
    }

    /// Whether batches are made by tokens.
    pub fn is_by_tokens(&self) -> bool {
        self.max_batch_tokens.is_some()
    }

    /// Source rows of a batch at most.
    pub fn rows(&self) -> usize {
        match (self.batch_size, self.max_batch_tokens) {
            (Some(rows), _) => rows as usize,
            (None, Some(_)) => usize::MAX,
            (None, None) => DEFAULT_ROWS,
        }
    }

    /// Runs requests in batches of those that fit together, and returns what `run` made of each in their order. Only for
    /// batches by tokens.
    pub fn run<A>(
        &self,
        requests: Vec<Result<Request, Refused>>,
        fits: impl Fn(&Request, &Request) -> bool,
        refuse: impl Fn(Refused) -> A,
        mut run: impl FnMut(Vec<Request>) -> Result<Vec<A>>,
    ) -> Result<Vec<A>> {
        let mut answers: Vec<Option<A>> = Vec::new();
        let mut taken: Vec<Option<Request>> = Vec::new();
        let mut classes: Vec<Vec<usize>> = Vec::new();
        for (at, request) in requests.into_iter().enumerate() {
            match request {
                Err(refused) => {
                    answers.push(Some(refuse(refused)));
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
                (sources.len(), sources.iter().map(Vec::len).max().unwrap_or(0))
            };
            let sizes: Vec<(usize, usize)> = class.iter().map(size).collect();
            if let Some((_, longest)) = sizes.iter().find(|(_, longest)| *longest > most_tokens) {
                TOLD.call_once(|| {
                    let alone = "which then runs alone, as all sources do that are longer";
                    eprintln!(
                        "t5gemma: --max-batch-tokens {most_tokens} is less than a source of {longest} tokens, {alone}"
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

/// Which of the requests, each of so many rows and of such a length, are run together: the longest first, so that what
/// cannot be held is known early; those of a length in the order in which they came.
fn packs(sizes: &[(usize, usize)], most_rows: usize, most_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(sizes[at].1));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // Of the last pack.
    let (mut rows, mut length) = (0, 0);
    for at in order {
        let (more, own) = sizes[at];
        let (with, longest) = (rows + more, own.max(length));
        match packs.last_mut() {
            Some(pack) if with <= most_rows && with.saturating_mul(longest) <= most_tokens => {
                pack.push(at);
                (rows, length) = (with, longest);
            }
            _ => {
                packs.push(vec![at]);
                (rows, length) = (more, own);
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
            assert_eq!(packs(sizes, rows, tokens), expected, "{name}");
        }
    }
}
