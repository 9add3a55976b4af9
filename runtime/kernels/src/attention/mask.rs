//! `DenseMask`: which keys the queries see, as a dense boolean matrix.

use std::ops::Range;

use super::single_head::KeyMask;

/// The keys that a query sees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VisibleKeys {
    /// From the first to the last that it sees.
    pub range: Range<usize>,
    /// Whether it sees all of these.
    pub is_full: bool,
}

impl VisibleKeys {
    /// Those of a row of a mask.
    pub fn of(row: &[bool]) -> VisibleKeys {
        const CHUNK: usize = 64;
        let any = |chunk: &[bool]| chunk.iter().fold(false, |any, &seen| any | seen);
        let Some(first) = row.chunks(CHUNK).position(any) else { return VisibleKeys { range: 0..0, is_full: true } };
        let first = first * CHUNK + row[first * CHUNK..].iter().position(|&seen| seen).unwrap_or(0);
        let last = row.rchunks(CHUNK).position(any).map_or(row.len(), |chunk| row.len() - chunk * CHUNK);
        let end = row[..last].iter().rposition(|&seen| seen).map_or(first, |at| at + 1);
        VisibleKeys { range: first..end, is_full: row[first..end].iter().fold(true, |all, &seen| all & seen) }
    }
}

/// A mask `[rows, keys]`.
pub struct DenseMask<'m> {
    pub mask: &'m [bool],
    pub keys: usize,
    /// `[rows]`
    pub rows: &'m [VisibleKeys],
    /// Queries of a head; further ones are of further heads, which have the same rows again.
    pub queries: usize,
}

impl DenseMask<'_> {
    fn row(&self, query: usize) -> usize {
        query % self.queries % self.rows.len()
    }
}

impl KeyMask for DenseMask<'_> {
    fn range(&self, query: usize) -> Range<usize> {
        self.rows[self.row(query)].range.clone()
    }

    fn mask(&self, query: usize, range: Range<usize>) -> Option<&[bool]> {
        let row = self.row(query);
        (!self.rows[row].is_full).then(|| &self.mask[row * self.keys..][range])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_keys_lie_between_the_first_and_the_last() {
        let row = |seen: &[usize]| (0..200).map(|key| seen.contains(&key)).collect::<Vec<_>>();
        // keys that are seen, range, whether it is full
        let cases: [(&[usize], Range<usize>, bool); 5] = [
            (&[], 0..0, true),
            (&[0], 0..1, true),
            (&[63, 64, 65], 63..66, true),
            (&[70, 72], 70..73, false),
            (&[0, 199], 0..200, false),
        ];
        for (seen, range, is_full) in cases {
            assert_eq!(VisibleKeys::of(&row(seen)), VisibleKeys { range, is_full }, "{seen:?}");
        }
    }
}
