//! The memory of rows that share their steps, over the two cache layouts: every target row is an entry of its own, and the
//! members of a flight are the adjacent rows of one source.

use t5gemma_graphs::interface::CacheLayout;
use t5gemma_kernels::LogitsRequest;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::logits::Logits;
use crate::model::Model;
use crate::state::{First, Ragged, State};

/// Keys and values of rows that share their steps.
pub(super) enum Rows {
    /// Of rows of one length.
    Cohort(State),
    /// Of rows of any length.
    Ragged(Box<Ragged>),
}

/// Sources after their first step, to be added to rows in flight or to begin a flight.
pub(super) enum Begun {
    Cohort(State),
    Ragged(First),
}

/// A member that goes on: its first row, its number of rows, which member it is, and what each of its next rows continues.
pub(super) struct GoingOn<'a> {
    pub first: usize,
    pub rows: usize,
    pub member: usize,
    pub parents: &'a [usize],
}

impl Begun {
    /// Runs the first step of sources that were encoded already.
    pub fn start(
        model: &Model,
        sources: &Batch,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(Begun, Logits), Error> {
        let encoded = model.run_encoder(sources, cancel)?;
        Ok(match model.layout() {
            CacheLayout::Growing | CacheLayout::Static(_) => {
                let (state, logits) = model.start(encoded, prompts, wanted, cancel)?;
                (Begun::Cohort(state), logits)
            }
            CacheLayout::InPlace => {
                let (first, logits) = model.start_ragged(encoded, prompts, wanted, cancel)?;
                (Begun::Ragged(first), logits)
            }
        })
    }
}

impl Rows {
    /// Rows of items of a first step: of each its place in it, its source's tokens and its rows. They join `rows` where
    /// the layout lets them; otherwise they begin a flight, which is returned.
    pub fn join(
        rows: Option<&mut Rows>,
        begun: Begun,
        joining: &[(usize, usize, usize)],
    ) -> Result<Option<Rows>, Error> {
        let joined = |ragged: &mut Ragged, first: &First| {
            ragged.join(first, joining).map_err(Error::onnxruntime("adding rows to the cache"))
        };
        match (begun, rows) {
            (Begun::Cohort(mut state), _) => {
                let of_items: Vec<usize> =
                    joining.iter().flat_map(|&(item, _, rows)| std::iter::repeat_n(item, rows)).collect();
                state.select(&of_items, &of_items)?;
                Ok(Some(Rows::Cohort(state)))
            }
            (Begun::Ragged(first), Some(Rows::Ragged(ragged))) => joined(ragged, &first).map(|()| None),
            (Begun::Ragged(first), _) => {
                let mut ragged = Ragged::default();
                joined(&mut ragged, &first)?;
                Ok(Some(Rows::Ragged(Box::new(ragged))))
            }
        }
    }

    /// Runs a step: a token for each row.
    pub fn step(
        &mut self,
        model: &Model,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        match self {
            Rows::Cohort(state) => model.step(state, tokens, wanted, cancel),
            Rows::Ragged(ragged) => model.step_ragged(ragged, &tokens, wanted, cancel),
        }
    }

    /// Keeps the members that go on.
    pub fn select(&mut self, members: &[GoingOn]) -> Result<(), Error> {
        match self {
            Rows::Ragged(ragged) => {
                let continued: Vec<_> = members.iter().map(|member| (member.member, member.parents)).collect();
                ragged.select(&continued).map_err(Error::onnxruntime("reordering the cache"))
            }
            Rows::Cohort(state) => {
                // The rows of a member have one source: where a row stays in its place, so does what it has of that.
                let row = |member: &GoingOn, row: usize| member.first + row.min(member.rows - 1);
                let sources: Vec<usize> = members
                    .iter()
                    .flat_map(|member| (0..member.parents.len()).map(move |at| row(member, at)))
                    .collect();
                let parents: Vec<usize> = members
                    .iter()
                    .flat_map(|member| member.parents.iter().map(move |parent| member.first + parent))
                    .collect();
                state.select(&sources, &parents)
            }
        }
    }
}
