//! Attention to very many keys in blocks, whose results are added up by the log-sum-exp of their scores.
//!
//! # Design
//! A tile of queries reads all keys and values that it sees. Where these are more than a cache holds, all queries of a
//! task attend to one block before the next is read. Which queries do so, and where their blocks begin, depends only on
//! the keys that they see, so that a source's results do not depend on the rest of the batch.

use std::ops::Range;

use super::HeadScratch;
use super::mask::DenseMask;
use super::single_head::{self, Head, KeyMask};

/// Keys of a block: with their values, half of an L2 cache of a mebibyte where heads have 256 numbers.
const BLOCK: usize = 256;
/// Queries that see no more keys than this attend to all of them at once.
pub const MANY: usize = 4096;

/// The part of a mask for a block of keys.
struct Block<'m> {
    mask: &'m DenseMask<'m>,
    keys: Range<usize>,
}

impl KeyMask for Block<'_> {
    fn range(&self, _: usize) -> Range<usize> {
        self.keys.clone()
    }

    fn mask(&self, query: usize, range: Range<usize>) -> Option<&[bool]> {
        self.mask.mask(query, range)
    }
}

/// The keys that a query sees, if they are read in blocks.
fn in_blocks(mask: &DenseMask, query: usize) -> Option<Range<usize>> {
    let range = mask.range(query);
    (range.len() > MANY && mask.mask(query, range.clone()).is_none()).then_some(range)
}

/// [`single_head::attend`], in blocks for queries that see very many keys. Of `scratch`, the context is not used.
pub fn attend(head: Head, mask: &DenseMask, queries: Range<usize>, scratch: &mut HeadScratch, to: &mut [f32]) {
    let mut first = queries.start;
    while first < queries.end {
        let keys = in_blocks(mask, first);
        let end = (first + 1..queries.end).find(|&query| in_blocks(mask, query) != keys).unwrap_or(queries.end);
        let place = (first - queries.start) * head.dim..(end - queries.start) * head.dim;
        let (head, to) = (Head { queries: &head.queries[place.clone()], ..head }, &mut to[place]);
        match keys {
            None => single_head::attend(head, mask, first..end, &mut scratch.scratch, to),
            Some(keys) => attend_in_blocks(head, mask, first..end, keys, scratch, to),
        }
        first = end;
    }
}

/// Attends with queries that see these keys, all of them.
fn attend_in_blocks(
    head: Head,
    mask: &DenseMask,
    queries: Range<usize>,
    keys: Range<usize>,
    HeadScratch { scratch, part, .. }: &mut HeadScratch,
    to: &mut [f32],
) {
    part.resize(to.len(), 0.0);
    let mut log_sums = vec![f32::NEG_INFINITY; queries.len()];
    to.fill(0.0);
    for first in keys.clone().step_by(BLOCK) {
        let block = Block { mask, keys: first..keys.end.min(first + BLOCK) };
        single_head::attend(head, &block, queries.clone(), scratch, part);
        let rows = to.chunks_exact_mut(head.dim).zip(part.chunks_exact(head.dim));
        for ((to, from), (log_sum, &own)) in rows.zip(log_sums.iter_mut().zip(&scratch.log_sums)) {
            let max = log_sum.max(own);
            let [before, new] = [*log_sum - max, own - max].map(f32::exp);
            let total = before + new;
            let [before, new] = [before / total, new / total];
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *to * before + from * new);
            *log_sum = max + total.ln();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Attention, HeadLayout, Inputs, Windows};
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::noise::noise;
    use crate::parallel::sequential;

    const DIM: usize = 16;
    const SCALE: f32 = 0.3;

    /// Attention of all tokens of `numbers` to those of the same source, two heads over one of keys.
    fn run(queries: &[f32], keys: &[f32], values: &[f32], numbers: &[i64]) -> Vec<f32> {
        let query_layout = HeadLayout { batch: 1, heads: 2, rows: numbers.len(), dim: DIM, is_interleaved: true };
        let key_layout = HeadLayout { heads: 1, ..query_layout };
        let inputs = Inputs { queries, query_layout, keys, values, key_layout, is_quantized: false };
        let windows = Windows { numbers, back: usize::MAX, ahead: usize::MAX };
        let mut found = vec![f32::NAN; queries.len()];
        Attention::of_encoder(SCALE, None).run_in_windows(inputs, windows, &mut found, &sequential).expect("it runs");
        found
    }

    #[test]
    fn blocks_give_the_attention_of_float64_wherever_a_source_lies() {
        at_each_level(Level::Generic, |level| {
            let length = MANY + 2 * BLOCK + 77;
            let [queries, keys, values] =
                [(2, 3), (1, 5), (1, 7)].map(|(heads, seed)| noise(heads * length * DIM, seed));
            let found = run(&queries, &keys, &values, &vec![1; length]);
            for query in [0, 1, 47, 48, 500, length - 1] {
                for head in 0..2 {
                    let start = (2 * query + head) * DIM;
                    let dot = |key: &[f32]| -> f64 {
                        key.iter().zip(&queries[start..]).map(|(k, q)| f64::from(k * q * SCALE)).sum()
                    };
                    let weights: Vec<f64> = keys.chunks_exact(DIM).map(|key| dot(key).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for at in 0..DIM {
                        let terms = weights.iter().zip(values.iter().skip(at).step_by(DIM));
                        let expected = terms.map(|(weight, &value)| weight * f64::from(value)).sum::<f64>() / sum;
                        let apart = (expected - f64::from(found[start + at])).abs();
                        assert!(apart < 2e-6, "{level:?}, {query}, {head}: {apart}");
                    }
                }
            }
            // Behind a short source and padding: the same bits.
            let before = 37;
            let shifted = |x: &[f32]| [noise(before * x.len() / length, 11), x.to_vec()].concat();
            let numbers: Vec<i64> = [vec![0; 16], vec![1; before - 16], vec![2; length]].concat();
            let other = run(&shifted(&queries), &shifted(&keys), &shifted(&values), &numbers);
            assert!(other[before * 2 * DIM..] == found, "{level:?}: the neighbours of a source change its results");
        });
    }
}
