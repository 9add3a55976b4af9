//! Which source tokens are not padding: keys and values of padding are skipped.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The attention mask of the sources of the current run: false for padding; empty while there is none.
#[derive(Debug, Default)]
pub struct SourceMask(Mutex<Vec<bool>>);

impl SourceMask {
    /// Sets the mask, with zeros for padding.
    pub fn set(&self, mask: &[i64]) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.clear();
        tokens.extend(mask.iter().map(|&token| token != 0));
    }

    /// The spans of rows to compute, each of whole tiles of `tile` rows: those with a real token if `mask` has as many
    /// tokens as there are rows, otherwise all.
    pub fn spans(mask: Option<&SourceMask>, rows: usize, tile: usize) -> Vec<Range<usize>> {
        let all = || vec![Range { start: 0, end: rows }];
        let Some(mask) = mask else { return all() };
        let tokens = mask.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() != rows {
            return all();
        }
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (at, _) in tokens.chunks(tile).enumerate().filter(|(_, tokens)| tokens.contains(&true)) {
            let here = at * tile..rows.min((at + 1) * tile);
            match spans.last_mut() {
                Some(span) if span.end == here.start => span.end = here.end,
                _ => spans.push(here),
            }
        }
        spans
    }
}

/// The numbers of the tiles of `tile` rows that `spans` consist of.
pub fn tiles(spans: &[Range<usize>], tile: usize) -> Vec<usize> {
    spans.iter().flat_map(|span| span.start / tile..span.end.div_ceil(tile)).collect()
}

/// Zeroes the rows of `y [rows, n]` outside the spans.
pub fn clear_outside(spans: &[Range<usize>], y: &mut [f32], n: usize) {
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
        let mask = SourceMask::default();
        let all = vec![Range { start: 0, end: 10 }];
        assert_eq!(SourceMask::spans(None, 10, 4), all);
        assert_eq!(SourceMask::spans(Some(&mask), 10, 4), all);
        mask.set(&[1, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(SourceMask::spans(Some(&mask), 11, 4), [Range { start: 0, end: 11 }]);
        assert_eq!(SourceMask::spans(Some(&mask), 10, 1), [0..2, 9..10]);
        assert_eq!(SourceMask::spans(Some(&mask), 10, 4), [0..4, 8..10]);
        assert_eq!(SourceMask::spans(Some(&mask), 10, 8), all);
        assert_eq!(tiles(&[0..4, 8..10], 4), [0, 2]);
        let mut y: Vec<f32> = (1..=20).map(|x| x as f32).collect();
        clear_outside(&[0..4, 8..9], &mut y, 2);
        let expected =
            [[1., 2.], [3., 4.], [5., 6.], [7., 8.], [0.; 2], [0.; 2], [0.; 2], [0.; 2], [17., 18.], [0.; 2]];
        assert_eq!(y, expected.as_flattened());
    }
}
