//! Float positions, for models whose rotary angles say how far a sequence has come rather than how many tokens lie
//! before one: from 0 at the first token to a scale at the last. The last token of a target is where the caller expects
//! it (`progress_total`).
//!
//! # Design
//! The arithmetic is in float32, one operation after the other as in T5Gemma-TTS's published code: with scales of
//! thousands, an angle changes with the last bit of a position.

/// The positions of source tokens: `i / (max(n, 2) − 1) · scale` for the `i`-th of a row's `n` visible tokens, 0 for
/// padding. `mask` is `[rows, length]`, as is the result.
pub(crate) fn of_sources(mask: &[i64], length: usize, scale: f32) -> Vec<f32> {
    let row = |row: &[i64]| {
        let last = last_position(row.iter().filter(|&&visible| visible != 0).count());
        let mut before = 0;
        let position = |&visible: &i64| {
            let position = if visible == 0 { 0.0 } else { before as f32 / last * scale };
            before += usize::from(visible != 0);
            position
        };
        row.iter().map(position).collect::<Vec<f32>>()
    };
    mask.chunks(length).flat_map(row).collect()
}

/// The last index in a sequence of `total` tokens, but at least 1.
fn last_position(total: usize) -> f32 {
    (total.max(2) - 1) as f32
}

/// The positions of the target rows in flight.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TargetPositions {
    /// The expected length of each source item's target, the start token included.
    totals: Vec<usize>,
    /// Target tokens so far, in every row.
    length: usize,
    scale: f32,
}

impl TargetPositions {
    /// The positions of targets without a token.
    pub fn new(totals: Vec<usize>, scale: f32) -> TargetPositions {
        TargetPositions { totals, length: 0, scale }
    }

    /// The positions of the next `count` tokens of each of `rows` rows, `[rows, count]`: `min(t / (max(total, 2) − 1) ·
    /// scale, scale)`. The rows of an item are adjacent.
    pub fn next(&self, rows: usize, count: usize) -> Vec<f32> {
        let width = rows / self.totals.len().max(1);
        let of_row = |&total: &usize| {
            let last = last_position(total);
            let position = move |t: usize| (t as f32 / last * self.scale).min(self.scale);
            (self.length..self.length + count).map(position).collect::<Vec<f32>>().repeat(width)
        };
        self.totals.iter().flat_map(of_row).collect()
    }

    /// Counts tokens that have been run.
    pub fn advance(&mut self, count: usize) {
        self.length += count;
    }

    /// Drops the tokens after the first `length`.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Keeps these items.
    pub fn select(&mut self, items: &[usize]) {
        self.totals = items.iter().map(|&item| self.totals[item]).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_goes_from_0_to_the_scale_wherever_its_padding_is() {
        let mask = [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0];
        let positions = of_sources(&mask, 4, 2000.0);
        assert_eq!(positions, [0.0, 1000.0, 2000.0, 0.0, 0.0, 0.0, 1000.0, 2000.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_target_stays_at_the_scale_beyond_its_total() {
        let mut positions = TargetPositions::new(vec![3, 1], 8.0);
        assert_eq!(positions.next(2, 2), [0.0, 4.0, 0.0, 8.0]);
        positions.advance(2);
        assert_eq!(positions.next(4, 1), [8.0, 8.0, 8.0, 8.0], "two rows for each item");
        positions.truncate(1);
        positions.select(&[1, 0, 0]);
        assert_eq!(positions.next(3, 2), [8.0, 8.0, 4.0, 8.0, 4.0, 8.0]);
    }
}
