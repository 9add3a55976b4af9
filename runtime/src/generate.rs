//! The one loop where model and search meet. It runs the model for all rows in flight, hands each row's scores to its
//! search, and tells the state which rows go on; it knows neither tensors nor how a search decides.

use std::ops::ControlFlow;

use crate::batch::Batch;
use crate::error::Error;
use crate::model::{Cancellation, Model};
use crate::options::GenerationOptions;
use crate::scores::Processors;
use crate::search::{Hypothesis, Progress, Search};

/// Is shown the tokens of a generation as they are chosen. `()` shows them to no one; closures are watches.
pub trait Watch {
    /// Takes the next token of a source row; [`ControlFlow::Break`] ends the whole call as a cancellation does.
    fn token(&mut self, row: usize, token: i64) -> ControlFlow<()>;

    /// Is told, also in beam search, that all rows have chosen what a step brings them; [`ControlFlow::Break`] as above.
    fn step(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl Watch for () {
    fn token(&mut self, _: usize, _: i64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(usize, i64) -> ControlFlow<()>> Watch for F {
    fn token(&mut self, row: usize, token: i64) -> ControlFlow<()> {
        self(row, token)
    }
}

/// A source row whose target is not finished.
struct Item {
    row: usize,
    search: Search,
    processors: Processors,
}

/// See [`Model::generate`]; `search` begins the search for one source row at a decoder prompt.
pub(crate) fn generate(
    model: &Model,
    batch: &Batch,
    options: &GenerationOptions,
    search: fn(&GenerationOptions, &[i64]) -> Search,
    watch: &mut dyn Watch,
    cancel: &Cancellation,
) -> Result<Vec<Vec<Hypothesis>>, Error> {
    let decoder = &model.config().decoder;
    batch.check(model.config())?;
    let prompts = batch.prompts(options.decoder_start_token_id);
    options.check(decoder.vocab_size, prompts.length)?;
    let (max_length, longest) = (options.max_length(prompts.length), decoder.max_position_embeddings);
    if max_length > longest {
        return Err(Error::input(
            "max_length",
            format!("at most {longest} target tokens (decoder.max_position_embeddings)"),
            format!("{max_length}, of which {} are the prompt", prompts.length),
        ));
    }

    let mut items: Vec<Item> = (0..batch.rows())
        .map(|row| Item {
            row,
            search: search(options, &prompts.ids[row * prompts.length..][..prompts.length]),
            processors: Processors::new(options, batch.source(row), prompts.length),
        })
        .collect();
    let mut results: Vec<Vec<Hypothesis>> = vec![Vec::new(); batch.rows()];
    let encoded = model.run_encoder(batch, cancel)?;
    let (mut state, mut logits) = model.start(encoded, prompts, cancel)?;

    for step in 0.. {
        let scores = logits.rows_mut()?;
        // The beams of an item begin as one: the first step has one row for all of them.
        let rows_per_item = state.rows() / state.items();
        let mut widened;
        let (mut going_on, mut parents, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        let mut finished = Vec::new();
        for (slot, item) in items.iter_mut().enumerate() {
            let width = item.search.width();
            let mut scores =
                &mut scores[slot * rows_per_item * decoder.vocab_size..][..rows_per_item * decoder.vocab_size];
            if !options.remove_invalid_values && !all_finite(scores) {
                return Err(Error::NotFinite { row: item.row, step, dtype: model.manifest().dtype });
            }
            if rows_per_item < width {
                widened = scores.repeat(width);
                scores = &mut widened;
            }
            let candidates = item.processors.candidates(scores, &item.search);
            let progress = item.search.advance(&candidates);

            if width == 1
                && let Some(&token) = item.search.history(0).last()
                && watch.token(item.row, token).is_break()
            {
                return Err(Error::Cancelled);
            }
            match progress {
                Progress::Done => finished.push(slot),
                Progress::Continue => {
                    let first_row = slot * rows_per_item;
                    going_on.push(slot);
                    parents.extend(item.search.parents().iter().map(|&beam| first_row + beam.min(rows_per_item - 1)));
                    tokens.extend_from_slice(item.search.next_tokens());
                }
            }
        }
        if watch.step().is_break() {
            return Err(Error::Cancelled);
        }

        for slot in finished.into_iter().rev() {
            let Item { row, search, .. } = items.remove(slot);
            results[row] = search.finish();
        }
        if items.is_empty() {
            break;
        }
        state.select(&going_on, &parents)?;
        logits = model.step(&mut state, tokens, cancel)?;
    }
    Ok(results)
}

/// Whether no score is NaN or infinite. In blocks, so that the compiler can compare many at once.
fn all_finite(scores: &[f32]) -> bool {
    scores.chunks(4096).all(|block| block.iter().fold(true, |finite, score| finite & score.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_score_is_found_anywhere() {
        let mut scores = vec![0.5; 10_000];
        assert!(all_finite(&scores));
        for (at, bad) in [(0, f32::NAN), (4096, f32::INFINITY), (9_999, f32::NEG_INFINITY)] {
            let good = std::mem::replace(&mut scores[at], bad);
            assert!(!all_finite(&scores), "{at}");
            scores[at] = good;
        }
    }
}
