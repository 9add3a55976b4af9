//! Groups the rows of a ragged batch for the encoder on a CPU. A GPU wants one large batch; a few dozen tokens already
//! keep a CPU busy, and work on padding is wasted.

use std::ops::Range;
use std::sync::Arc;

use ort::value::DynValue;
use t5gemma_graphs::manifest::Manifest;
use t5gemma_kernels::attention_skips_other_sources;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::encoder_cache::States;
use crate::error::Error;
use crate::session::{GraphSession, float32_values};

/// Tokens of padding in a row that cost no more than another run of the graph.
const MOST_PADDING: usize = 24;
/// Tokens of a run from which on more would not make it more efficient, but only take more memory.
const ENOUGH_TOKENS: usize = 1024;

/// The tokens of a row of the batch from the first to the last that its mask shows.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Span {
    row: usize,
    tokens: Range<usize>,
}

/// Rows that are encoded in one run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// The spans side by side in each row of the run: mostly one.
    lines: Vec<Vec<Span>>,
    /// Tokens of the longest line.
    length: usize,
}

/// How rows are put into groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grouping {
    /// Rows of similar lengths below each other.
    ByLength,
    /// Several sources in one row of the run.
    SideBySide,
}

impl Grouping {
    /// Sources may share a row if the encoder graph keeps them apart and its attention operator skips the pairs between
    /// them.
    pub fn of(manifest: &Manifest) -> Grouping {
        if manifest.side_by_side && attention_skips_other_sources() { Grouping::SideBySide } else { Grouping::ByLength }
    }
}

/// Groups of the rows of a batch, each in one group; `None` if the batch is best encoded as it is.
pub(crate) fn groups(batch: &Batch, grouping: Grouping) -> Option<Vec<Group>> {
    groups_of(batch.mask(), batch.length(), grouping)
}

fn groups_of(mask: &[i64], length: usize, grouping: Grouping) -> Option<Vec<Group>> {
    let tokens = |mask: &[i64]| match mask.iter().position(|&seen| seen != 0) {
        Some(first) => first..mask.iter().rposition(|&seen| seen != 0).unwrap_or(first) + 1,
        None => 0..1,
    };
    let spans = mask.chunks(length).map(tokens).enumerate();
    let mut spans: Vec<Span> = spans.map(|(row, tokens)| Span { row, tokens }).collect();
    let mut groups: Vec<Group> = Vec::new();
    match grouping {
        Grouping::SideBySide => {
            for span in spans {
                match groups.last_mut() {
                    Some(group) if group.length + span.tokens.len() <= ENOUGH_TOKENS => {
                        group.length += span.tokens.len();
                        group.lines[0].push(span);
                    }
                    _ => groups.push(Group { length: span.tokens.len(), lines: vec![vec![span]] }),
                }
            }
        }
        Grouping::ByLength => {
            spans.sort_by_key(|span| std::cmp::Reverse(span.tokens.len()));
            for span in spans {
                match groups.last_mut() {
                    Some(group) if group.length - span.tokens.len() <= MOST_PADDING => group.lines.push(vec![span]),
                    _ => groups.push(Group { length: span.tokens.len(), lines: vec![vec![span]] }),
                }
            }
        }
    }
    // Positions are relative, so a row may begin anywhere. That all begin at the same place makes results independent
    // of where their padding is.
    let is_whole = |line: &Vec<Span>| line.len() == 1 && line[0].tokens.start == 0;
    let is_whole = |group: &Group| group.length == length && group.lines.iter().all(is_whole);
    (groups.len() > 1 || !groups.iter().all(is_whole)).then_some(groups)
}

/// What a row of an output is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputUnit {
    /// A source: the output is `[rows, …]`.
    Source,
    /// A token: the output is `[rows, length, …]`.
    Token,
    /// As `Token`, of a graph that returns one state for all padding.
    TokenOrPadding,
}

/// The output of all groups together.
pub(crate) struct Output {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Runs the encoder, with `others` behind its inputs, on each group and puts its outputs together as if it had run once. Tokens that are in no group get
/// zeros, or with [`OutputUnit::TokenOrPadding`] the state of padding. `features` are those of the images of each row, or none.
pub(crate) fn run(
    encoder: &GraphSession,
    others: &[Arc<DynValue>],
    batch: &Batch,
    features: &[Vec<States>],
    groups: &[Group],
    unit: OutputUnit,
    cancel: &Cancellation,
) -> Result<Output, Error> {
    let (length, mut shape, mut values) = (batch.length(), Vec::new(), Vec::new());
    let mut padding: Option<Vec<f32>> = None;
    let mut is_written = vec![false; batch.rows() * length];
    for group in groups {
        let rows = group.lines.len();
        // The state of padding stands behind the tokens of a shorter line. Where all are full, one more token makes room.
        let tokens_of = |line: &Vec<Span>| line.iter().map(|span| span.tokens.len()).sum::<usize>();
        let needs_padding = unit == OutputUnit::TokenOrPadding && padding.is_none();
        let is_full = group.lines.iter().all(|line| tokens_of(line) == group.length);
        let run_length = group.length + usize::from(needs_padding && is_full && group.length < length);
        // Each row begins with its first visible token and is padded with zeros after its last. The mask numbers the
        // sources that are side by side.
        let (mut ids, mut mask) = (vec![0; rows * run_length], vec![0; rows * run_length]);
        for (line, spans) in group.lines.iter().enumerate() {
            let mut at = line * run_length;
            for (number, Span { row, tokens }) in (1..).zip(spans) {
                let from = row * length + tokens.start..row * length + tokens.end;
                ids[at..at + tokens.len()].copy_from_slice(&batch.ids()[from.clone()]);
                for (to, &seen) in mask[at..].iter_mut().zip(&batch.mask()[from]) {
                    *to = if seen == 0 { 0 } else { number };
                }
                at += tokens.len();
            }
        }
        // In the order of the rows in the group.
        let of_span = |span: &Span| features.get(span.row).into_iter().flatten().cloned().collect::<Vec<_>>();
        let of_group = group.lines.iter().flatten().flat_map(of_span).collect();
        let outputs = encoder.run_on_sources(rows, [ids, mask], of_group, others, "running the encoder", cancel)?;
        let output = outputs.into_iter().next().expect("opening has verified that there is one output");
        let found = float32_values(&output).map_err(Error::onnxruntime("reading the output"))?;
        let found_shape: Vec<usize> = output.shape().iter().map(|&size| size as usize).collect();
        let outer = |rows: usize, tokens: usize| match unit {
            OutputUnit::Source => vec![rows],
            OutputUnit::Token | OutputUnit::TokenOrPadding => vec![rows, tokens],
        };
        let expected = outer(rows, run_length);
        if !found_shape.starts_with(&expected) {
            let message = format!("expected an output of shape {expected:?} and more, found {found_shape:?}");
            return Err(Error::OnnxRuntime { during: "reading the output".into(), message });
        }
        let inner = &found_shape[expected.len()..];
        let width: usize = inner.iter().product();
        if shape.is_empty() {
            shape = [&outer(batch.rows(), length), inner].concat();
            values = vec![0.0; shape.iter().product()];
        }
        for (line, found) in group.lines.iter().zip(found.chunks(found.len() / rows)) {
            let mut from = 0;
            for Span { row, tokens } in line {
                let (to, count) = match unit {
                    OutputUnit::Source => (*row, 1),
                    OutputUnit::Token | OutputUnit::TokenOrPadding => (row * length + tokens.start, tokens.len()),
                };
                values[to * width..][..count * width].copy_from_slice(&found[from * width..][..count * width]);
                is_written[to..to + count].fill(true);
                from += count;
            }
        }
        let shorter = group.lines.iter().position(|line| tokens_of(line) < run_length);
        if let Some(line) = shorter.filter(|_| needs_padding) {
            padding = Some(found[((line + 1) * run_length - 1) * width..][..width].to_vec());
        }
    }
    if let Some(padding) = padding {
        let states = values.chunks_mut(padding.len()).zip(is_written);
        states.filter(|(_, is_written)| !is_written).for_each(|(state, _)| state.copy_from_slice(&padding));
    }
    Ok(Output { shape, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row and its tokens.
    type Tokens = (usize, Range<usize>);

    #[test]
    fn rows_of_similar_lengths_are_encoded_together() {
        let mask = |rows: &[[usize; 2]], length: usize| -> Vec<i64> {
            rows.iter().flat_map(|[from, to]| (0..length).map(move |at| (*from..*to).contains(&at).into())).collect()
        };
        let group = |rows: &[Tokens]| {
            let lines = rows.iter().map(|(row, tokens)| vec![Span { row: *row, tokens: tokens.clone() }]).collect();
            Group { length: rows[0].1.len(), lines }
        };
        let check = |name: &str, rows: &[[usize; 2]], expected: Option<&[Group]>| {
            let found = groups_of(&mask(rows, 100), 100, Grouping::ByLength);
            assert_eq!(found.as_deref(), expected, "{name}");
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
        check("padding on both sides", &[[60, 98], [0, 20], [3, 43]], Some(&expected));
        check("nothing", &[[0, 0], [0, 100]], Some(&[group(&[(1, 0..100)]), group(&[(0, 0..1)])]));
    }

    #[test]
    fn rows_lie_side_by_side_up_to_a_number_of_tokens() {
        let check = |name: &str, length: usize, rows: &[[usize; 2]], expected: Option<&[&[Tokens]]>| {
            let mask: Vec<i64> = rows
                .iter()
                .flat_map(|[from, to]| (0..length).map(move |at| (*from..*to).contains(&at).into()))
                .collect();
            let span = |(row, tokens): &Tokens| Span { row: *row, tokens: tokens.clone() };
            let group = |line: &&[Tokens]| Group {
                length: line.iter().map(|(_, tokens)| tokens.len()).sum(),
                lines: vec![line.iter().map(span).collect()],
            };
            let expected: Option<Vec<Group>> = expected.map(|lines| lines.iter().map(group).collect());
            assert_eq!(groups_of(&mask, length, Grouping::SideBySide), expected, "{name}");
        };
        check("one row", 100, &[[0, 100]], None);
        check("one row with padding before it", 100, &[[2, 100]], Some(&[&[(0, 2..100)]]));
        check("equal rows", 100, &[[0, 100], [0, 100]], Some(&[&[(0, 0..100), (1, 0..100)]]));
        let expected: &[&[_]] = &[&[(0, 90..100), (1, 0..100), (2, 0..1)]];
        check("padding on both sides", 100, &[[90, 100], [0, 100], [0, 0]], Some(expected));
        let expected: &[&[_]] = &[&[(0, 0..600), (1, 0..424)], &[(2, 0..1)], &[(3, 0..2000)]];
        check("many tokens", 2000, &[[0, 600], [0, 424], [0, 1], [0, 2000]], Some(expected));
    }
}
