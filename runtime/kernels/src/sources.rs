//! Which tokens of the sources that a decoder begins with are there: of padding no keys and values are computed.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use ort::operator::KernelContext;

/// Tells by the name of a weight whether it is multiplied with hidden states of sources.
#[derive(Clone)]
pub struct ReadsSource(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl ReadsSource {
    pub fn new(reads_source: impl Fn(&str) -> bool + Send + Sync + 'static) -> ReadsSource {
        ReadsSource(Arc::new(reads_source))
    }

    /// Whether one of the node's inputs is such a weight.
    pub fn of(&self, node: &KernelContext) -> ort::Result<bool> {
        Ok(node.inputs()?.iter().any(|input| (self.0)(input.name())))
    }
}

/// The tokens of the sources of the run that is under way, those of padding false; none if nothing is known of them.
#[derive(Debug, Default)]
pub struct Sources(Mutex<Vec<bool>>);

impl Sources {
    /// Takes a mask, with zeros for padding.
    pub fn set(&self, mask: &[i64]) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.clear();
        tokens.extend(mask.iter().map(|&seen| seen != 0));
    }

    /// The rows of a product of so many that are to be computed: those of `sources`, if they are as many, in spans that begin and end
    /// at whole steps of so many.
    pub fn spans(sources: Option<&Sources>, rows: usize, step: usize) -> Vec<Range<usize>> {
        let all = || vec![Range { start: 0, end: rows }];
        let Some(sources) = sources else { return all() };
        let tokens = sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() != rows {
            return all();
        }
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (at, _) in tokens.chunks(step).enumerate().filter(|(_, tokens)| tokens.contains(&true)) {
            let here = at * step..rows.min((at + 1) * step);
            match spans.last_mut() {
                Some(span) if span.end == here.start => span.end = here.end,
                _ => spans.push(here),
            }
        }
        spans
    }
}

/// Which steps of so many rows spans consist of: see [`Sources::spans`].
pub fn steps(spans: &[Range<usize>], step: usize) -> Vec<usize> {
    spans.iter().flat_map(|span| span.start / step..span.end.div_ceil(step)).collect()
}

/// Makes zeros of the rows of `y [rows, n]` that no span holds.
pub fn clear_between(spans: &[Range<usize>], y: &mut [f32], n: usize) {
    let mut from = 0;
    for span in spans {
        y[from..span.start * n].fill(0.0);
        from = span.end * n;
    }
    y[from..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_padding_are_left_out_and_zero() {
        let sources = Sources::default();
        let all = vec![Range { start: 0, end: 10 }];
        assert_eq!(Sources::spans(None, 10, 4), all);
        assert_eq!(Sources::spans(Some(&sources), 10, 4), all);
        sources.set(&[1, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(Sources::spans(Some(&sources), 11, 4), [Range { start: 0, end: 11 }]);
        assert_eq!(Sources::spans(Some(&sources), 10, 1), [0..2, 9..10]);
        assert_eq!(Sources::spans(Some(&sources), 10, 4), [0..4, 8..10]);
        assert_eq!(Sources::spans(Some(&sources), 10, 8), all);
        assert_eq!(steps(&[0..4, 8..10], 4), [0, 2]);
        let mut y: Vec<f32> = (1..=20).map(|x| x as f32).collect();
        clear_between(&[0..4, 8..9], &mut y, 2);
        let expected =
            [[1., 2.], [3., 4.], [5., 6.], [7., 8.], [0.; 2], [0.; 2], [0.; 2], [0.; 2], [17., 18.], [0.; 2]];
        assert_eq!(y, expected.as_flattened());
    }
}
