//! Which rows of a ragged batch a processor encodes together. A graphics card wants one large batch; a processor is busy with
//! a few dozen tokens already, and what it computes for padding is lost.

use std::ops::Range;

use crate::batch::Batch;
use crate::error::Error;
use crate::model::{Cancellation, Graph, float32_values, int64_tensor, run};
use crate::scores::Wanted;

/// Tokens of padding that take no longer than another run of the graph.
const WORTH_A_RUN: usize = 24;

/// Rows that are encoded in one run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    rows: Vec<usize>,
    /// What of them is given to the encoder: beyond it the mask of all is 0.
    columns: Range<usize>,
}

/// The rows of a rectangle `mask` of rows of `length`, each in one group.
pub(crate) fn groups(mask: &[i64], length: usize) -> Vec<Group> {
    let span = |mask: &[i64]| match mask.iter().position(|&seen| seen != 0) {
        Some(first) => first..mask.iter().rposition(|&seen| seen != 0).unwrap_or(first) + 1,
        None => 0..1,
    };
    let mut spans: Vec<(usize, Range<usize>)> = mask.chunks(length).map(span).enumerate().collect();
    spans.sort_by_key(|(_, span)| (std::cmp::Reverse(span.len()), span.start));
    let mut groups: Vec<Group> = Vec::new();
    for (row, span) in spans {
        if let Some(Group { rows, columns }) = groups.last_mut() {
            let joined = columns.start.min(span.start)..columns.end.max(span.end);
            let padding = (joined.len() - columns.len()) * rows.len() + joined.len() - span.len();
            if padding <= WORTH_A_RUN {
                rows.push(row);
                *columns = joined;
                continue;
            }
        }
        groups.push(Group { rows: vec![row], columns: span });
    }
    groups
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
    for Group { rows, columns } in groups {
        let part = |values: &[i64]| {
            let of_row = |row: &usize| &values[row * length..][..length][columns.clone()];
            int64_tensor(rows.len(), rows.iter().map(of_row).collect::<Vec<_>>().concat())
        };
        let (ids, mask) = (part(batch.ids())?, part(batch.mask())?);
        let outputs = run((encoder, Wanted::All), "running the encoder", &[(&ids).into(), (&mask).into()], cancel)?;
        let output = outputs.into_iter().next().expect("opening has verified that there is one output");
        let found = float32_values(&output).map_err(Error::onnxruntime("reading the output"))?;
        let of_group: Vec<usize> = output.shape().iter().map(|&size| size as usize).collect();
        let outer = |rows: usize, tokens: usize| [rows, tokens][..if by_token { 2 } else { 1 }].to_vec();
        let expected = outer(rows.len(), columns.len());
        if !of_group.starts_with(&expected) {
            let message = format!("expected an output of shape {expected:?} and more, found {of_group:?}");
            return Err(Error::OnnxRuntime { during: "reading the output".into(), message });
        }
        let inner = &of_group[expected.len()..];
        let width: usize = inner.iter().product();
        let (tokens, at) = if by_token { (length, columns.start) } else { (1, 0) };
        if shape.is_empty() {
            shape = [&outer(batch.rows(), length), inner].concat();
            values = vec![0.0; batch.rows() * tokens * width];
        }
        for (row, found) in rows.iter().zip(found.chunks(found.len() / rows.len())) {
            values[(row * tokens + at) * width..][..found.len()].copy_from_slice(found);
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
        let group = |rows: &[usize], columns| Group { rows: rows.to_vec(), columns };
        let check = |name: &str, rows: &[[usize; 2]], expected: &[Group]| {
            assert_eq!(groups(&mask(rows, 100), 100), expected, "{name}");
        };
        check("one row", &[[0, 9]], &[group(&[0], 0..9)]);
        check("one row with padding", &[[2, 9]], &[group(&[0], 2..9)]);
        check("equal rows", &[[0, 100], [0, 100], [0, 100]], &[group(&[0, 1, 2], 0..100)]);
        check("a long one", &[[0, 10], [0, 100], [0, 30]], &[group(&[1], 0..100), group(&[2, 0], 0..30)]);
        check("padding on the left", &[[90, 100], [0, 100]], &[group(&[1], 0..100), group(&[0], 90..100)]);
        check("nothing", &[[0, 0], [0, 100]], &[group(&[1], 0..100), group(&[0], 0..1)]);
    }
}
