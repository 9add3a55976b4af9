//! Which rows of a ragged batch a processor encodes together. A graphics card wants one large batch; a processor is busy with
//! a few dozen tokens already, and what it computes for padding is lost.

use std::ops::Range;

use t5gemma_kernels::LogitsRequest;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::session::{Graph, float32_values, int64_tensor, run};

/// Tokens of padding that take no longer than another run of the graph.
const WORTH_A_RUN: usize = 24;
/// Tokens of a run that keep a processor as busy as more would, which would only take more memory.
const ENOUGH: usize = 1024;

/// A row of a batch, and which of its tokens are taken.
type Span = (usize, Range<usize>);

/// Rows that are encoded in one run, each with what lies between the first and the last token that its mask shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// What lies side by side in each row of the run: mostly one row of the batch.
    lines: Vec<Vec<Span>>,
    /// Tokens of the longest line.
    length: usize,
}

/// The rows of a rectangle `mask` of rows of `length`, each in one group; nothing if it is best encoded as it is.
pub(crate) fn groups(mask: &[i64], length: usize, side_by_side: bool) -> Option<Vec<Group>> {
    let span = |mask: &[i64]| match mask.iter().position(|&seen| seen != 0) {
        Some(first) => first..mask.iter().rposition(|&seen| seen != 0).unwrap_or(first) + 1,
        None => 0..1,
    };
    let mut spans: Vec<(usize, Range<usize>)> = mask.chunks(length).map(span).enumerate().collect();
    let mut groups: Vec<Group> = Vec::new();
    if side_by_side {
        for (row, span) in spans {
            match groups.last_mut() {
                Some(group) if group.length + span.len() <= ENOUGH => {
                    group.length += span.len();
                    group.lines[0].push((row, span));
                }
                _ => groups.push(Group { length: span.len(), lines: vec![vec![(row, span)]] }),
            }
        }
    } else {
        spans.sort_by_key(|(_, span)| std::cmp::Reverse(span.len()));
        for (row, span) in spans {
            match groups.last_mut() {
                Some(group) if group.length - span.len() <= WORTH_A_RUN => group.lines.push(vec![(row, span)]),
                _ => groups.push(Group { length: span.len(), lines: vec![vec![(row, span)]] }),
            }
        }
    }
    // Positions are relative, so that a row may begin anywhere; that all begin at the same place makes them the same numbers, wherever
    // their padding is.
    let as_it_is = |line: &Vec<Span>| line.len() == 1 && line[0].1.start == 0;
    let as_it_is = |group: &Group| group.length == length && group.lines.iter().all(as_it_is);
    (groups.len() > 1 || !groups.iter().all(as_it_is)).then_some(groups)
}

/// What the encoder returns for the groups, put together as if it had been asked once: values and shape, `[rows, …]` or, if
/// the second axis is that of the tokens, `[rows, length, …]` with zeros at what no group holds.
pub(crate) fn run_apart(
    encoder: &Graph,
    batch: &Batch,
    groups: &[Group],
    by_token: bool,
    cancel: &Cancellation,
) -> Result<(Vec<usize>, Vec<f32>), Error> {
    let (length, mut shape, mut values) = (batch.length(), Vec::new(), Vec::new());
    for group in groups {
        // Each row from its first token on, filled up behind with zeros: padding is whatever token, of which the mask tells. Those side
        // by side are numbered there.
        let rows = group.lines.len();
        let (mut ids, mut mask) = (vec![0; rows * group.length], vec![0; rows * group.length]);
        for (line, parts) in group.lines.iter().enumerate() {
            let mut at = line * group.length;
            for (number, (row, span)) in (1..).zip(parts) {
                let from = row * length + span.start..row * length + span.end;
                ids[at..at + span.len()].copy_from_slice(&batch.ids()[from.clone()]);
                for (to, &seen) in mask[at..].iter_mut().zip(&batch.mask()[from]) {
                    *to = if seen == 0 { 0 } else { number };
                }
                at += span.len();
            }
        }
        let (ids, mask) = (int64_tensor(rows, ids)?, int64_tensor(rows, mask)?);
        let outputs =
            run((encoder, LogitsRequest::All), "running the encoder", &[(&ids).into(), (&mask).into()], cancel)?;
        let output = outputs.into_iter().next().expect("opening has verified that there is one output");
        let found = float32_values(&output).map_err(Error::onnxruntime("reading the output"))?;
        let of_group: Vec<usize> = output.shape().iter().map(|&size| size as usize).collect();
        let outer = |rows: usize, tokens: usize| [rows, tokens][..if by_token { 2 } else { 1 }].to_vec();
        let expected = outer(rows, group.length);
        if !of_group.starts_with(&expected) {
            let message = format!("expected an output of shape {expected:?} and more, found {of_group:?}");
            return Err(Error::OnnxRuntime { during: "reading the output".into(), message });
        }
        let inner = &of_group[expected.len()..];
        let width: usize = inner.iter().product();
        if shape.is_empty() {
            shape = [&outer(batch.rows(), length), inner].concat();
            values = vec![0.0; shape.iter().product()];
        }
        for (line, found) in group.lines.iter().zip(found.chunks(found.len() / rows)) {
            let mut from = 0;
            for (row, span) in line {
                let (to, count) = if by_token { (row * length + span.start, span.len()) } else { (*row, 1) };
                values[to * width..][..count * width].copy_from_slice(&found[from * width..][..count * width]);
                from += count;
            }
        }
    }
    Ok((shape, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_about_one_length_are_encoded_together() {
        let mask = |rows: &[[usize; 2]], length: usize| -> Vec<i64> {
            rows.iter().flat_map(|[from, to]| (0..length).map(move |at| (*from..*to).contains(&at).into())).collect()
        };
        let group = |rows: &[Span]| {
            let lines = rows.iter().map(|row| vec![row.clone()]).collect();
            Group { length: rows[0].1.len(), lines }
        };
        let check = |name: &str, rows: &[[usize; 2]], expected: Option<&[Group]>| {
            assert_eq!(groups(&mask(rows, 100), 100, false).as_deref(), expected, "{name}");
        };
        check("one row", &[[0, 100]], None);
        check("one row with padding before it", &[[2, 100]], Some(&[group(&[(0, 2..100)])]));
        check("one row with padding behind it", &[[0, 9]], Some(&[group(&[(0, 0..9)])]));
        check("equal rows", &[[0, 100], [0, 100], [0, 100]], None);
        let expected = [group(&[(1, 0..100)]), group(&[(2, 0..30), (0, 0..10)])];
        check("a long one", &[[0, 10], [0, 100], [0, 30]], Some(&expected));
        let expected = [group(&[(1, 0..100)]), group(&[(0, 90..100)])];
        check("padding on the left", &[[90, 100], [0, 100]], Some(&expected));
        let expected = [group(&[(2, 3..43), (0, 60..98), (1, 0..20)])];
        check("padding here and there", &[[60, 98], [0, 20], [3, 43]], Some(&expected));
        check("nothing", &[[0, 0], [0, 100]], Some(&[group(&[(1, 0..100)]), group(&[(0, 0..1)])]));
    }
    #[test]
    fn rows_lie_side_by_side_as_long_as_they_are_few_tokens() {
        let check = |name: &str, length: usize, rows: &[[usize; 2]], expected: Option<&[&[Span]]>| {
            let mask: Vec<i64> = rows
                .iter()
                .flat_map(|[from, to]| (0..length).map(move |at| (*from..*to).contains(&at).into()))
                .collect();
            let group = |line: &&[Span]| Group {
                length: line.iter().map(|(_, span)| span.len()).sum(),
                lines: vec![line.to_vec()],
            };
            let expected: Option<Vec<Group>> = expected.map(|lines| lines.iter().map(group).collect());
            assert_eq!(groups(&mask, length, true), expected, "{name}");
        };
        check("one row", 100, &[[0, 100]], None);
        check("one row with padding before it", 100, &[[2, 100]], Some(&[&[(0, 2..100)]]));
        check("equal rows", 100, &[[0, 100], [0, 100]], Some(&[&[(0, 0..100), (1, 0..100)]]));
        let expected: &[&[_]] = &[&[(0, 90..100), (1, 0..100), (2, 0..1)]];
        check("padding here and there", 100, &[[90, 100], [0, 100], [0, 0]], Some(expected));
        let expected: &[&[_]] = &[&[(0, 0..600), (1, 0..424)], &[(2, 0..1)], &[(3, 0..2000)]];
        check("many tokens", 2000, &[[0, 600], [0, 424], [0, 1], [0, 2000]], Some(expected));
    }
}
