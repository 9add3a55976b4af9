//! The caches of rows that share steps, in the two ways that cache layouts allow. A member of a flight is the adjacent
//! target rows of one source.

use t5gemma_graphs::interface::CacheLayout;
use t5gemma_kernels::LogitsRequest;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::model::{Lane, Model};
use crate::state::{Continued, Joining, Prefilled, RaggedCache, State};
use crate::step_output::StepTensors;

/// Keys and values of rows that share their steps.
pub(super) enum Rows {
    /// Rows of one length.
    Cohort(State),
    /// Rows of any length.
    Ragged(Box<RaggedCache>),
}

/// Sources after their first step, which join rows in flight or begin a flight.
pub(super) enum NewRows {
    Cohort(State),
    Ragged(Prefilled),
}

/// A member that goes on.
pub(super) struct ContinuedMember<'a> {
    /// Its first row in the flight.
    pub first: usize,
    /// The number of its rows.
    pub rows: usize,
    /// Its index in the flight.
    pub member: usize,
    /// For each of its next rows, which of its rows that one continues.
    pub parents: &'a [usize],
}

impl<'a> ContinuedMember<'a> {
    /// Those of the members that go on, which have `parents`; `widths` are the numbers of rows of all.
    pub fn of(widths: &[usize], parents: impl Iterator<Item = Option<&'a [usize]>>) -> Vec<ContinuedMember<'a>> {
        let mut first = 0;
        let mut continued = Vec::new();
        for (member, (&rows, parents)) in widths.iter().zip(parents).enumerate() {
            continued.extend(parents.map(|parents| ContinuedMember { first, rows, member, parents }));
            first += rows;
        }
        continued
    }
}

impl NewRows {
    /// Runs the first step of sources that are encoded already.
    pub fn prefill(
        model: &Model,
        lane: Lane,
        sources: &Batch,
        prompts: Prompts,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(NewRows, StepTensors), Error> {
        let encoded = model.run_encoder(lane, sources, cancel)?;
        Ok(match model.layout() {
            CacheLayout::Growing | CacheLayout::Static(_) => {
                let (state, tensors) = model.prefill(lane, encoded, prompts, request, cancel)?;
                (NewRows::Cohort(state), tensors)
            }
            CacheLayout::InPlace => {
                let (prefilled, tensors) = model.prefill_ragged(lane, encoded, prompts, request, cancel)?;
                (NewRows::Ragged(prefilled), tensors)
            }
        })
    }

    /// The same for rows that join others before the last tokens of their prompts, whose logits come from the step that
    /// they share; only of a model whose rows share steps.
    pub fn prefill_up_to_last(
        model: &Model,
        lane: Lane,
        sources: &Batch,
        prompts: Prompts,
        cancel: &Cancellation,
    ) -> Result<NewRows, Error> {
        let encoded = model.run_encoder(lane, sources, cancel)?;
        Ok(NewRows::Ragged(model.prefill_up_to_last(lane, encoded, prompts, cancel)?))
    }
}

impl Rows {
    /// Adds new rows to `rows` if the layout allows it; otherwise they begin a flight, which is returned.
    pub fn join(rows: Option<&mut Rows>, new: NewRows, joining: &[Joining]) -> Result<Option<Rows>, Error> {
        let join = |cache: &mut RaggedCache, prefilled: &Prefilled| {
            cache.join(prefilled, joining).map_err(Error::onnxruntime("adding rows to the cache"))
        };
        match (new, rows) {
            (NewRows::Cohort(mut state), _) => {
                let items: Vec<usize> =
                    joining.iter().flat_map(|joining| std::iter::repeat_n(joining.item, joining.rows)).collect();
                state.select(&items, &items)?;
                Ok(Some(Rows::Cohort(state)))
            }
            (NewRows::Ragged(prefilled), Some(Rows::Ragged(cache))) => join(cache, &prefilled).map(|()| None),
            (NewRows::Ragged(prefilled), _) => {
                let mut cache = RaggedCache::default();
                join(&mut cache, &prefilled)?;
                Ok(Some(Rows::Ragged(Box::new(cache))))
            }
        }
    }

    /// The first row of each member in the outputs of a step; `widths` are the numbers of their rows.
    pub fn firsts(&self, widths: &[usize]) -> Vec<usize> {
        match self {
            Rows::Cohort(_) => widths.iter().scan(0, |row, width| Some(std::mem::replace(row, *row + width))).collect(),
            Rows::Ragged(cache) => cache.firsts().collect(),
        }
    }

    /// Runs a step of one token for each row.
    pub fn step(
        &mut self,
        model: &Model,
        tokens: Vec<i64>,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<StepTensors, Error> {
        match self {
            Rows::Cohort(state) => model.step(state, tokens, request, cancel),
            Rows::Ragged(cache) => model.step_ragged(cache, &tokens, request, cancel),
        }
    }

    /// Keeps the members that go on.
    pub fn select(&mut self, members: &[ContinuedMember]) -> Result<(), Error> {
        match self {
            Rows::Ragged(cache) => {
                let continued =
                    members.iter().map(|member| Continued { member: member.member, parents: member.parents });
                let continued: Vec<_> = continued.collect();
                cache.select(&continued).map_err(Error::onnxruntime("reordering the cache"))
            }
            Rows::Cohort(state) => {
                // The rows of a member have the same source, so a row that keeps its index can keep its copy of it too.
                let row = |member: &ContinuedMember, row: usize| member.first + row.min(member.rows - 1);
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
