//! Which keys the queries see: `DenseMask`, a dense boolean matrix, or one that `SourceWindows` makes of sources and a
//! window.

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

/// Queries and keys in one sequence of sources: a query sees the keys of its source within a window.
pub struct SourceWindows {
    /// `[sources, keys]`: whether a key belongs to the source.
    members: Vec<bool>,
    /// `[keys]`: what each query sees, and the source in which it does.
    rows: Vec<VisibleKeys>,
    sources: Vec<usize>,
}

impl SourceWindows {
    /// `numbers` has the number of each token's source, from 1 on, or 0 for padding, which sees the first source. Queries
    /// see `back` tokens before them and `ahead` behind them.
    pub fn new(numbers: &[i64], back: usize, ahead: usize) -> SourceWindows {
        let keys = numbers.len();
        let mut known: Vec<i64> = vec![1];
        let sources: Vec<usize> = (numbers.iter())
            .map(|&number| {
                let number = number.max(1);
                known.iter().rposition(|&known| known == number).unwrap_or_else(|| {
                    known.push(number);
                    known.len() - 1
                })
            })
            .collect();
        let members: Vec<bool> =
            known.iter().flat_map(|number| numbers.iter().map(move |other| other == number)).collect();
        // How many keys of each source lie before a place.
        let mut rows = vec![VisibleKeys { range: 0..0, is_full: true }; keys];
        for source in 0..known.len() {
            let members = &members[source * keys..][..keys];
            let places: Vec<usize> = (0..keys).filter(|&key| members[key]).collect();
            for (query, row) in rows.iter_mut().enumerate().filter(|(query, _)| sources[*query] == source) {
                let first = places.partition_point(|&place| place.saturating_add(back) < query);
                let end = places.partition_point(|&place| place <= query.saturating_add(ahead));
                if first < end {
                    let range = places[first]..places[end - 1] + 1;
                    *row = VisibleKeys { is_full: range.len() == end - first, range };
                }
            }
        }
        SourceWindows { members, rows, sources }
    }

    /// The mask of as many queries as there are keys.
    pub fn mask(&self) -> DenseMask<'_> {
        let keys = self.rows.len();
        DenseMask { mask: &self.members, keys, rows: &self.rows, of_rows: Some(&self.sources), queries: keys }
    }
}

/// A mask `[rows, keys]`.
pub struct DenseMask<'m> {
    pub mask: &'m [bool],
    pub keys: usize,
    /// `[rows]`
    pub rows: &'m [VisibleKeys],
    /// `[rows]`: the row of the mask that each has, if it is not its own.
    pub of_rows: Option<&'m [usize]>,
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
        let of_row = self.of_rows.map_or(row, |of_rows| of_rows[row]);
        (!self.rows[row].is_full).then(|| &self.mask[of_row * self.keys..][range])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_see_the_keys_of_their_source_within_the_window() {
        // numbers, back, ahead
        let cases: [(&[i64], usize, usize); 6] = [
            (&[1, 1, 1, 1, 1, 1, 1], 1, 2),
            (&[1, 0, 1, 1, 0, 0, 1, 0, 0], 2, 1),
            (&[0, 0, 1, 1, 1], 100, 100),
            (&[1, 1, 2, 2, 2, 3, 0, 0], 1, 1),
            (&[0, 0, 0], 4, 4),
            (&[1, 0, 0, 0, 0, 1], 0, 0),
        ];
        for (numbers, back, ahead) in cases {
            let windows = SourceWindows::new(numbers, back, ahead);
            let mask = windows.mask();
            for query in 0..numbers.len() {
                let range = mask.range(query);
                let seen: Vec<usize> = match mask.mask(query, range.clone()) {
                    None => range.collect(),
                    Some(shown) => range.zip(shown).filter(|(_, shown)| **shown).map(|(key, _)| key).collect(),
                };
                let sees = |key: &usize| {
                    numbers[*key] == numbers[query].max(1) && *key + back >= query && *key <= query + ahead
                };
                let expected: Vec<usize> = (0..numbers.len()).filter(sees).collect();
                assert_eq!(seen, expected, "{numbers:?}, {back}, {ahead}: {query}");
            }
        }
    }

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
