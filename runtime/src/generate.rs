//! The one loop where model and search meet. It runs the model for all rows in flight, hands each row's scores to its
//! search, and tells the state which rows go on; it knows neither tensors nor how a search decides.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::Hypothesis;
use crate::item::{Call, Item, Start};
use crate::model::Model;
use crate::needs::{Need, pieces_to_decode};
use crate::options::GenerationConfig;
use crate::search::Search;
use crate::stop::StoppingCriteria;

/// Is shown the tokens of a generation as they are chosen. `()` shows them to no one; closures are watches.
pub trait Streamer {
    /// Takes the next token of a source row's first hypothesis, once it is certain; [`ControlFlow::Break`] ends the whole
    /// call as a cancellation does.
    fn token(&mut self, row: usize, token: i64) -> ControlFlow<()>;

    /// Is told, also in beam search, that the rows that run together have chosen what a step brings them;
    /// [`ControlFlow::Break`] as above.
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

/// What a call of [`Model::generate_batch`] or [`Model::generate_with`] may come with besides its input and options.
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
    /// Receives the tokens of each row's first hypothesis as soon as they are certain.
    pub streamer: Option<&'a mut dyn Streamer>,
    /// Ends the call from elsewhere, or at a deadline.
    pub cancellation: Option<&'a Cancellation>,
}

impl<'a> Controls<'a> {
    /// Receives the tokens of each row's first hypothesis as soon as they are certain.
    #[must_use]
    pub fn streamer(mut self, streamer: &'a mut dyn Streamer) -> Controls<'a> {
        self.streamer = Some(streamer);
        self
    }

    /// Ends the call from elsewhere, or at a deadline.
    #[must_use]
    pub fn cancellation(mut self, cancellation: &'a Cancellation) -> Controls<'a> {
        self.cancellation = Some(cancellation);
        self
    }
}

impl Model {
    /// Generates targets for each source of a batch: `num_return_sequences` hypotheses for each row in the order of the rows,
    /// those of beam search best first. Rows beyond [`OpenOptions::limits`](crate::OpenOptions::limits) run in pieces, one after
    /// the other.
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

/// Shows a row's tokens to the watch.
fn show(row: usize, tokens: &[i64], watch: &mut dyn Streamer) -> Result<(), Error> {
    match tokens.iter().any(|&token| watch.token(row, token).is_break()) {
        true => Err(Error::Cancelled),
        false => Ok(()),
    }
}

/// See [`Model::generate_batch`]; `search` begins the search for one source row at a decoder prompt.
pub(crate) fn generate(
    model: &Model,
    batch: &Batch,
    options: &GenerationConfig,
    search: Start,
    watch: &mut dyn Streamer,
    cancel: &Cancellation,
) -> Result<Vec<Vec<Hypothesis>>, Error> {
    // The time that constraints take to compile counts.
    let stops = Arc::new(StoppingCriteria::new(options));
    let call = Call::new(model, batch, options, cancel)?;
    cancel.check()?;
    let pieces = pieces_to_decode(model, &call.batch, call.prompts.length, |row| Need::of(&call, row));
    let mut results = Vec::with_capacity(batch.rows());
    for rows in pieces {
        let items = rows.clone().map(|row| call.item(row, search, &stops)).collect();
        let (sources, prompts) = (call.batch.piece(rows.clone()), call.prompts.piece(rows));
        results.extend(piece(model, &call, (&sources, prompts), items, watch, cancel)?);
    }
    Ok(results)
}

/// Generates for the rows that `items` are of.
fn piece(
    model: &Model,
    call: &Call,
    (sources, prompts): (&Batch, Prompts),
    mut items: Vec<Item>,
    watch: &mut dyn Streamer,
    cancel: &Cancellation,
) -> Result<Vec<Vec<Hypothesis>>, Error> {
    let first = items[0].row;
    let mut results: Vec<Vec<Hypothesis>> = vec![Vec::new(); items.len()];
    // Rows that a serving plan wants beside those of the items leave after the first step.
    let sources = model.fit(sources);
    let encoded = model.run_encoder(&sources, cancel)?;
    let prompts = prompts.widened(sources.rows());
    let (mut state, mut logits) = model.start(encoded, prompts, Item::all_want(items.iter(), 0), cancel)?;

    // Of logits of several positions, the one at which the search is.
    let mut position = 0;
    for step in 0.. {
        let mut said = logits.said()?;
        // The rows of an item begin as one: the first step has one row for all of them.
        let rows_per_item = state.rows() / state.items();
        let mut going_on = Vec::new();
        let mut finished = Vec::new();
        for (slot, item) in items.iter_mut().enumerate() {
            let rows = rows_per_item.min(item.search.width());
            match item.take(model, said.rows(position + slot * rows_per_item, rows), step)? {
                true => finished.push(slot),
                false => {
                    going_on.push(slot);
                    show(item.row, item.settled(), watch)?;
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
            let item = items.remove(slot);
            let row = item.row;
            let (found, shown) = item.finish();
            show(row, found[0].tokens.get(shown..).unwrap_or(&[]), watch)?;
            results[row - first] = found;
        }
        if items.is_empty() {
            // Also of a call that is done: what its last callbacks did counts.
            cancel.check()?;
            break;
        }
        let mut draft = Vec::new();
        if let ([Item { search, lookup: Some(lookup), .. }], [token]) = (items.as_mut_slice(), tokens.as_slice()) {
            if lookup.follows(*token) {
                // What follows it is scored already.
                position += 1;
                cancel.check()?;
                continue;
            }
            let length = search.history(0).len();
            draft = lookup.draft(search.history(0), call.max_length.saturating_sub(length + 1));
            state.select(&going_on, &parents)?;
            state.truncate(length - 1)?;
        } else {
            state.select(&going_on, &parents)?;
        }
        position = 0;
        let wanted = Item::all_want(items.iter(), draft.len());
        logits = match draft.is_empty() {
            true => model.step(&mut state, tokens, wanted, cancel)?,
            false => model.step_all(&mut state, [tokens, draft].concat(), wanted, cancel)?,
        };
    }
    Ok(results)
}
