//! `Model::generate_batch`: the generation loop. It runs the model for all rows in flight, hands each row's logits to
//! its item, and tells the state which rows continue. It knows neither tensors nor how a search decides.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::Hypothesis;
use crate::item::{Call, Item, ItemStatus, NewSearch};
use crate::memory::{Footprint, pieces_to_decode};
use crate::model::{Lane, Model};
use crate::options::GenerationConfig;
use crate::search::Search;
use crate::stop::StoppingCriteria;

/// Receives the tokens of a generation as they are chosen. `()` ignores them; closures are streamers.
pub trait Streamer {
    /// Receives the next token of a source row's first hypothesis, once it is final; [`ControlFlow::Break`] ends the
    /// whole call like a cancellation.
    fn token(&mut self, row: usize, token: i64) -> ControlFlow<()>;

    /// Called after each step of the rows that run together, also in beam search; [`ControlFlow::Break`] as above.
    fn step(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl Streamer for () {
    fn token(&mut self, _: usize, _: i64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(usize, i64) -> ControlFlow<()>> Streamer for F {
    fn token(&mut self, row: usize, token: i64) -> ControlFlow<()> {
        self(row, token)
    }
}

/// Optional arguments of [`Model::generate_batch`] and [`Model::generate_with`]: streaming and cancellation.
///
/// ```no_run
/// # use t5gemma_runtime::{Error, Model};
/// use std::ops::ControlFlow;
/// use std::time::{Duration, Instant};
///
/// use t5gemma_runtime::{Cancellation, Controls, GenerationOptions};
///
/// # fn call(model: &Model) -> Result<(), Error> {
/// let mut streamer = |row: usize, token: i64| {
///     println!("row {row}: token {token}");
///     ControlFlow::Continue(())
/// };
/// let cancellation = Cancellation::until(Instant::now() + Duration::from_secs(5));
/// let controls = Controls::default().streamer(&mut streamer).cancellation(&cancellation);
/// model.generate_with(&["The quick brown fox"], &GenerationOptions::default(), controls)?;
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
#[non_exhaustive]
pub struct Controls<'a> {
    /// Receives the tokens of each row's first hypothesis as soon as they are final.
    pub streamer: Option<&'a mut dyn Streamer>,
    /// Stops the call from another thread, or at a deadline.
    pub cancellation: Option<&'a Cancellation>,
}

impl fmt::Debug for Controls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controls")
            .field("has_streamer", &self.streamer.is_some())
            .field("cancellation", &self.cancellation)
            .finish()
    }
}

impl<'a> Controls<'a> {
    /// Receives the tokens of each row's first hypothesis as soon as they are final.
    #[must_use]
    pub fn streamer(mut self, streamer: &'a mut dyn Streamer) -> Controls<'a> {
        self.streamer = Some(streamer);
        self
    }

    /// Stops the call from another thread, or at a deadline.
    #[must_use]
    pub fn cancellation(mut self, cancellation: &'a Cancellation) -> Controls<'a> {
        self.cancellation = Some(cancellation);
        self
    }
}

impl Model {
    /// Generates targets for each source of a batch: `num_return_sequences` hypotheses for each row in the order of the
    /// rows, those of beam search best first. Rows beyond [`OpenOptions::limits`](crate::OpenOptions::limits) run in
    /// pieces, one after the other.
    ///
    /// # Errors
    /// Tokens outside the vocabularies, lengths or options that do not fit the model, logits that are not finite,
    /// [`Error::Cancelled`] when the call is cancelled or the streamer breaks, or [`Error::Deadline`].
    pub fn generate_batch(
        &self,
        batch: &Batch,
        config: &GenerationConfig,
        controls: Controls,
    ) -> Result<Vec<Vec<Hypothesis>>, Error> {
        let (mut no_streamer, no_cancellation) = ((), Cancellation::new());
        let streamer: &mut dyn Streamer = match controls.streamer {
            Some(streamer) => streamer,
            None => &mut no_streamer,
        };
        let cancellation = controls.cancellation.unwrap_or(&no_cancellation);
        generate(self, batch, config, Search::new, streamer, cancellation)
    }
}

/// Streams tokens of a row.
fn stream(row: usize, tokens: &[i64], streamer: &mut dyn Streamer) -> Result<(), Error> {
    if tokens.iter().any(|&token| streamer.token(row, token).is_break()) { Err(Error::Cancelled) } else { Ok(()) }
}

/// [`Model::generate_batch`] with another search.
pub(crate) fn generate(
    model: &Model,
    batch: &Batch,
    options: &GenerationConfig,
    new_search: NewSearch,
    streamer: &mut dyn Streamer,
    cancel: &Cancellation,
) -> Result<Vec<Vec<Hypothesis>>, Error> {
    // The time in which constraints are compiled counts.
    let stops = Arc::new(StoppingCriteria::new(options));
    let call = Call::new(model, batch, options, cancel)?;
    cancel.check()?;
    let pieces = pieces_to_decode(model, &call.batch, call.prompts.length, |row| Footprint::of(&call, row));
    let mut results = Vec::with_capacity(batch.rows());
    for rows in pieces {
        let items = rows.clone().map(|row| call.item(row, new_search, &stops)).collect();
        let piece = Piece { sources: call.batch.piece(rows.clone()), prompts: call.prompts.piece(rows), items };
        results.extend(piece.generate(model, &call, streamer, cancel)?);
    }
    Ok(results)
}

/// Rows of a call that run side by side.
struct Piece {
    sources: Batch,
    prompts: Prompts,
    items: Vec<Item>,
}

impl Piece {
    fn generate(
        self,
        model: &Model,
        call: &Call,
        streamer: &mut dyn Streamer,
        cancel: &Cancellation,
    ) -> Result<Vec<Vec<Hypothesis>>, Error> {
        let Piece { sources, prompts, mut items } = self;
        let first = items[0].row;
        let mut results: Vec<Vec<Hypothesis>> = vec![Vec::new(); items.len()];
        // Rows that a serving plan adds to those of the items leave after the first step.
        let sources = model.fit(&sources);
        let encoded = model.run_encoder(Lane::Main, &sources, cancel)?;
        let prompts = prompts.widened(sources.rows());
        let request = Item::joint_request(items.iter(), 0);
        let (mut state, mut tensors) = model.prefill(Lane::Main, encoded, prompts, request, cancel)?;

        // The position of the search among the positions of the logits.
        let mut position = 0;
        for step in 0.. {
            let mut output = tensors.output()?;
            // The rows of an item begin as one: the first step has one row for all of them.
            let rows_per_item = state.rows() / state.items();
            let (mut running, mut finished) = (Vec::new(), Vec::new());
            for (slot, item) in items.iter_mut().enumerate() {
                let rows = rows_per_item.min(item.search.width());
                match item.advance(model, output.rows(position + slot * rows_per_item, rows), step)? {
                    ItemStatus::Finished => finished.push(slot),
                    ItemStatus::Running => {
                        running.push(slot);
                        stream(item.row, item.settled(), streamer)?;
                    }
                }
            }
            if streamer.step().is_break() {
                return Err(Error::Cancelled);
            }

            // Every item has as many rows as the widest: in place of targets that have ended, the last running one is
            // computed again.
            let width = running.iter().map(|&slot| items[slot].search.width()).max().unwrap_or(0);
            let (mut parents, mut tokens) = (Vec::new(), Vec::new());
            for &slot in &running {
                let search = &items[slot].search;
                let rows = (0..width).map(|row| row.min(search.width() - 1));
                for row in rows {
                    parents.push(slot * rows_per_item + search.parents()[row].min(rows_per_item - 1));
                    tokens.push(search.next_tokens()[row]);
                }
            }

            for slot in finished.into_iter().rev() {
                let item = items.remove(slot).finish();
                stream(item.row, item.unshown(), streamer)?;
                results[item.row - first] = item.hypotheses;
            }
            if items.is_empty() {
                // A call that is done can be cancelled too, by its last callbacks.
                cancel.check()?;
                break;
            }
            let mut draft = Vec::new();
            if let ([Item { search, lookup: Some(lookup), .. }], [token]) = (items.as_mut_slice(), tokens.as_slice()) {
                if lookup.follows(*token) {
                    // The logits after it are there already.
                    position += 1;
                    cancel.check()?;
                    continue;
                }
                let length = search.history(0).len();
                draft = lookup.draft(search.history(0), call.max_length.saturating_sub(length + 1));
                state.select(&running, &parents)?;
                state.truncate(length - 1)?;
            } else {
                state.select(&running, &parents)?;
            }
            position = 0;
            let request = Item::joint_request(items.iter(), draft.len());
            tensors = if draft.is_empty() {
                model.step(&mut state, tokens, request, cancel)?
            } else {
                model.step_all_positions(&mut state, [tokens, draft].concat(), request, cancel)?
            };
        }
        Ok(results)
    }
}
