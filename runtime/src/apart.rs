//! Which rows of a ragged batch a processor encodes together. A graphics card wants one large batch; a processor is busy with
//! a few dozen tokens already, and what it computes for padding is lost.

use std::ops::Range;

use crate::batch::Batch;
use crate::error::Error;
use crate::model::{Cancellation, Graph, float32_values, int64_tensor, run};
use crate::scores::Wanted;

/// Tokens of padding that take no longer than another run of the graph.
const WORTH_A_RUN: usize = 24;

/// Rows that are encoded in one run, each with what lies between the first and the last token that its mask shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    rows: Vec<(usize, Range<usize>)>,
    /// Tokens of the longest.
    length: usize,
}

/// The rows of a rectangle `mask` of rows of `length`, each in one group; nothing if it is best encoded as it is.
pub(crate) fn groups(mask: &[i64], length: usize) -> Option<Vec<Group>> {
    let span = |mask: &[i64]| match mask.iter().position(|&seen| seen != 0) {
        Some(first) => first..mask.iter().rposition(|&seen| seen != 0).unwrap_or(first) + 1,
        None => 0..1,
    };
    let mut spans: Vec<(usize, Range<usize>)> = mask.chunks(length).map(span).enumerate().collect();
    spans.sort_by_key(|(_, span)| std::cmp::Reverse(span.len()));
    let mut groups: Vec<Group> = Vec::new();
    for (row, span) in spans {
        match groups.last_mut() {
            Some(group) if group.length - span.len() <= WORTH_A_RUN => group.rows.push((row, span)),
            _ => groups.push(Group { length: span.len(), rows: vec![(row, span)] }),
        }
    }
    // Positions are relative, so that a row may begin anywhere; that all begin at the same place makes them the same numbers, wherever
    // their padding is.
    let as_it_is = |group: &Group| group.length == length && group.rows.iter().all(|(_, span)| span.start == 0);
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
        // Each row from its first token on, filled up behind with zeros: padding is whatever token, of which the mask tells.
        let part = |values: &[i64]| {
            let mut part = vec![0; group.rows.len() * group.length];
            for ((row, span), to) in group.rows.iter().zip(part.chunks_mut(group.length)) {
                to[..span.len()].copy_from_slice(&values[row * length..][span.clone()]);
            }
            int64_tensor(group.rows.len(), part)
        };
        let (ids, mask) = (part(batch.ids())?, part(batch.mask())?);
        let outputs = run((encoder, Wanted::All), "running the encoder", &[(&ids).into(), (&mask).into()], cancel)?;
        let output = outputs.into_iter().next().expect("opening has verified that there is one output");
        let found = float32_values(&output).map_err(Error::onnxruntime("reading the output"))?;
        let of_group: Vec<usize> = output.shape().iter().map(|&size| size as usize).collect();
        let outer = |rows: usize, tokens: usize| [rows, tokens][..if by_token { 2 } else { 1 }].to_vec();
        let expected = outer(group.rows.len(), group.length);
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
        for ((row, span), found) in group.rows.iter().zip(found.chunks(found.len() / group.rows.len())) {
            let (to, count) = if by_token { (row * length + span.start, span.len()) } else { (*row, 1) };
            values[to * width..][..count * width].copy_from_slice(&found[..count * width]);
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
        let group = |rows: &[(usize, Range<usize>)]| Group { length: rows[0].1.len(), rows: rows.to_vec() };
        let check = |name: &str, rows: &[[usize; 2]], expected: Option<&[Group]>| {
            assert_eq!(groups(&mask(rows, 100), 100).as_deref(), expected, "{name}");
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
}
