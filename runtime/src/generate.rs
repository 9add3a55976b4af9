//! The one loop where model and search meet. It runs the model for all rows in flight, hands each row's scores to its
//! search, and tells the state which rows go on; it knows neither tensors nor how a search decides.

use std::ops::ControlFlow;
use std::sync::Arc;

use t5gemma_graphs::interface::Logits;

use crate::batch::Batch;
use crate::constraint::{Constraint, Walk};
use crate::error::Error;
use crate::logprobs::Trace;
use crate::model::{Cancellation, Model};
use crate::options::{GenerationOptions, OptionError};
use crate::scores::Processors;
use crate::search::{Hypothesis, Progress, Search};
use crate::speculation::Lookup;
use crate::stop::Stops;

/// Is shown the tokens of a generation as they are chosen. `()` shows them to no one; closures are watches.
pub trait Watch {
    /// Takes the next token of a source row's first hypothesis, once it is certain; [`ControlFlow::Break`] ends the whole
    /// call as a cancellation does.
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

/// A source row whose targets are not finished.
struct Item {
    row: usize,
    search: Search,
    processors: Processors,
    /// Tokens of the first hypothesis that the watch was shown.
    shown: usize,
    /// With `output_logprobs`.
    trace: Option<Trace>,
    /// With `prompt_lookup_num_tokens`.
    lookup: Option<Lookup>,
    /// With constraints.
    walk: Option<Arc<Walk>>,
}

/// Shows a row's tokens to the watch.
fn show(row: usize, tokens: &[i64], watch: &mut dyn Watch) -> Result<(), Error> {
    match tokens.iter().any(|&token| watch.token(row, token).is_break()) {
        true => Err(Error::Cancelled),
        false => Ok(()),
    }
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

    if let Some(tokens) = options.prompt_lookup_num_tokens
        && model.manifest().logits != Logits::All
    {
        let expected = "nothing for this model (drafts need the scores of all positions: export it with --all-logits)";
        return Err(OptionError::new("prompt_lookup_num_tokens", expected, tokens.to_string()).into());
    }
    let constraint = Constraint::new(model, options, prompts.length)?;
    // Which hypotheses are the best is for the constraint to say, so a search with beams has to give all that it has.
    let of_search = &match &constraint {
        Some(_) if options.num_beams > 1 => {
            GenerationOptions { num_return_sequences: options.num_beams, ..options.clone() }
        }
        _ => options.clone(),
    };
    let seed = options.seed.unwrap_or_else(GenerationOptions::draw_seed);
    let mut items: Vec<Item> = (0..batch.rows())
        .map(|row| {
            let walk = constraint.as_ref().map(|constraint| Arc::new(Walk::new(constraint, row)));
            let processors = Processors::new(options, batch.source(row), prompts.length);
            Item {
                row,
                search: search(of_search, &prompts.ids[row * prompts.length..][..prompts.length])
                    .drawing(batch.draws(row, seed)),
                processors: match &walk {
                    Some(walk) => processors.limited(walk.clone()),
                    None => processors,
                },
                shown: 0,
                trace: options.output_logprobs.then(|| Trace::new(options.top_logprobs)),
                lookup: options.prompt_lookup_num_tokens.map(|tokens| {
                    let ngram_size = options.max_matching_ngram_size.unwrap_or(2);
                    Lookup::new(batch.source(row), tokens, ngram_size)
                }),
                walk,
            }
        })
        .collect();
    let stops = Stops::new(options, || model.tokenizer())?;
    let mut results: Vec<Vec<Hypothesis>> = vec![Vec::new(); batch.rows()];
    let encoded = model.run_encoder(batch, cancel)?;
    let (mut state, mut logits) = model.start(encoded, prompts, cancel)?;

    // Of logits of several positions, the one at which the search is.
    let mut position = 0;
    for step in 0.. {
        let scores = &mut logits.rows_mut()?[position * decoder.vocab_size..];
        // The rows of an item begin as one: the first step has one row for all of them.
        let rows_per_item = state.rows() / state.items();
        let mut widened;
        let mut going_on = Vec::new();
        let mut finished = Vec::new();
        for (slot, item) in items.iter_mut().enumerate() {
            let width = item.search.width();
            let rows = rows_per_item.min(width);
            let mut scores = &mut scores[slot * rows_per_item * decoder.vocab_size..][..rows * decoder.vocab_size];
            if !options.remove_invalid_values && !all_finite(scores) {
                return Err(Error::NotFinite { row: item.row, step, dtype: model.manifest().dtype });
            }
            if rows < width {
                widened = scores.repeat(width);
                scores = &mut widened;
            }
            let is_over = stops.is_over();
            let unprocessed = item.trace.is_some().then(|| scores.to_vec());
            let progress = loop {
                let mut candidates = item.processors.candidates(scores, &item.search);
                let mut ends = stops.of(&candidates, &item.search, is_over)?;
                if let Some(walk) = &item.walk {
                    walk.take(&mut candidates, &mut ends, &item.search)?;
                }
                if let (Some(trace), Some(logits)) = (&mut item.trace, &unprocessed) {
                    trace.take(&candidates, logits, width);
                }
                match item.search.advance_to_ends(&candidates, &ends) {
                    Progress::Turn => {}
                    progress => break progress,
                }
            };
            match progress {
                Progress::Done => finished.push(slot),
                Progress::Continue | Progress::Turn => {
                    going_on.push(slot);
                    // Of beams, the best hypothesis may be passed over for one that meets the constraint.
                    let is_certain = item.walk.is_none() || !item.search.sums_log_probabilities();
                    let settled = if is_certain { item.search.settled(item.shown) } else { &[] };
                    show(item.row, settled, watch)?;
                    item.shown += settled.len();
                    if let Some(trace) = &mut item.trace {
                        trace.follow(&item.search);
                    }
                }
            }
        }
        if watch.step().is_break() {
            return Err(Error::Cancelled);
        }

        // Every item has as many rows as the widest: where targets have ended, the last that goes on is computed again.
        let width = going_on.iter().map(|&slot| items[slot].search.width()).max().unwrap_or(0);
        let (mut parents, mut tokens) = (Vec::new(), Vec::new());
        for &slot in &going_on {
            let search = &items[slot].search;
            let rows = (0..width).map(|row| row.min(search.width() - 1));
            for row in rows {
                parents.push(slot * rows_per_item + search.parents()[row].min(rows_per_item - 1));
                tokens.push(search.next_tokens()[row]);
            }
        }

        for slot in finished.into_iter().rev() {
            let Item { row, search, shown, trace, walk, .. } = items.remove(slot);
            let found = search.finish();
            results[row] = match walk {
                Some(walk) => walk.judged(found, options),
                None => found,
            };
            for hypothesis in &mut results[row] {
                hypothesis.logprobs = trace.as_ref().map(|trace| trace.of(&hypothesis.tokens));
            }
            show(row, results[row][0].tokens.get(shown..).unwrap_or(&[]), watch)?;
        }
        if items.is_empty() {
            break;
        }
        let mut draft = Vec::new();
        if let ([Item { search, lookup: Some(lookup), .. }], [token]) = (items.as_mut_slice(), tokens.as_slice()) {
            if lookup.follows(*token) {
                // What follows it is scored already.
                position += 1;
                continue;
            }
            let length = search.history(0).len();
            draft = lookup.draft(search.history(0), max_length.saturating_sub(length + 1));
            state.select(&going_on, &parents)?;
            state.truncate(length - 1)?;
        } else {
            state.select(&going_on, &parents)?;
        }
        position = 0;
        logits = match draft.is_empty() {
            true => model.step(&mut state, tokens, cancel)?,
            false => model.step_all(&mut state, [tokens, draft].concat(), cancel)?,
        };
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
