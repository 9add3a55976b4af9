//! A thread of the engine, for one copy of the model: it admits sources, runs a step of each flight in turn, and sends
//! callers the events.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::queue::{ActiveRequest, ModelCopy, Phase, Shared};
use super::rows::{ContinuedMember, NewRows, Rows};
use super::{Engine, EngineStats, Event};
use crate::batch::{Batch, Prompts};
use crate::error::Error;
use crate::item::{Item, ItemStatus};
use crate::memory::Footprint;
use crate::model::Model;
use crate::search::Search;
use crate::state::Joining;
use crate::step_output::StepOutput;

/// Upper bound on cohorts: each reads the weights for itself, and later ones would be smaller still.
const MOST_COHORTS: usize = 4;

/// A source that leaves the queue.
struct Admitted {
    request: Arc<ActiveRequest>,
    /// Its row in the request.
    row: usize,
    footprint: Footprint,
}

impl Admitted {
    fn prompt_length(&self) -> usize {
        self.request.call.prompts.length
    }
}

/// A source in flight.
struct ActiveSource {
    request: Arc<ActiveRequest>,
    item: Item,
    footprint: Footprint,
    admitted: Instant,
    /// The number of its next step.
    step: usize,
}

/// Rows that share their steps.
struct Flight {
    rows: Rows,
    members: Vec<ActiveSource>,
}

impl Flight {
    fn footprint(&self) -> Option<Footprint> {
        self.members.iter().map(|member| member.footprint).reduce(Footprint::beside)
    }
}

/// The state of the thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// The index of its copy of the model.
    copy: usize,
    flights: Vec<Flight>,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, copy: usize) -> Worker {
        Worker { shared, copy, flights: Vec::new() }
    }

    /// Runs until the engine is closed.
    pub fn run(mut self) {
        while self.wait() {
            self.end_cancelled();
            self.admit();
            for at in 0..self.flights.len() {
                self.step(at);
            }
            self.flights.retain(|flight| !flight.members.is_empty());
            self.update_stats();
        }
        let pending: Vec<_> = self.shared.queue().requests.values().map(|pending| pending.request.clone()).collect();
        for request in pending {
            self.end(&request, Err(Error::Cancelled));
        }
        self.flights.clear();
        self.update_stats();
    }

    /// Waits while there is nothing to do, and returns whether the engine is still open.
    fn wait(&self) -> bool {
        let mut queue = self.shared.queue();
        queue.idle += 1;
        while queue.phase != Phase::Closed && self.flights.is_empty() && queue.line.is_empty() {
            self.shared.ended.notify_all();
            queue = self.shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.idle -= 1;
        queue.phase != Phase::Closed
    }

    /// Ends the requests that were cancelled or whose deadline has passed.
    fn end_cancelled(&self) {
        let ended: Vec<_> = (self.shared.queue().requests.values())
            .filter_map(|pending| Some((pending.request.clone(), pending.request.cancel.check().err()?)))
            .collect();
        for (request, error) in ended {
            self.end(&request, Err(error));
        }
    }

    /// Takes the sources from the queue that there is room for.
    fn take_admissible(&self) -> Vec<Admitted> {
        let shared = &*self.shared;
        let is_shared = Engine::shares_all_steps(self.model());
        let mut admitted = Vec::new();
        if !is_shared && self.flights.len() >= MOST_COHORTS {
            return admitted;
        }
        // Each flight is a rectangle; sources that can join one become part of it.
        let mut others: Vec<Footprint> = self.flights.iter().filter_map(Flight::footprint).collect();
        let mut own = if is_shared { others.pop() } else { None };
        let sources: usize = self.flights.iter().map(|flight| flight.members.len()).sum();
        let mut queue = shared.queue();
        let queue = &mut *queue;
        let share = queue.line.load().sources.div_ceil(shared.copies.len());
        while let Some(id) = queue.line.first() {
            let Some(pending) = queue.requests.get_mut(&id) else {
                queue.line.remove(id);
                continue;
            };
            let has_work = !self.flights.is_empty() || !admitted.is_empty();
            if admitted.len() == share || (has_work && queue.idle > 0) {
                break;
            }
            let call = &pending.request.call;
            let footprint = Footprint::of(call, pending.next);
            let with = own.map_or(footprint, |own| own.beside(footprint));
            let rows = others.iter().map(|other| other.rows).sum::<usize>().saturating_add(with.rows);
            let bytes = others.iter().map(|other| shared.memory.bytes(other)).sum::<usize>();
            let bytes = bytes.saturating_add(shared.memory.bytes(&with));
            let is_full = sources + admitted.len() >= shared.options.max_sources;
            if is_full
                || with.rows > shared.memory.max_shared_rows
                || rows > shared.options.max_rows
                || bytes > shared.options.max_bytes
            {
                break;
            }
            own = Some(with);
            admitted.push(Admitted { request: pending.request.clone(), row: pending.next, footprint });
            pending.next += 1;
            queue.line.take();
        }
        admitted
    }

    /// Begins the sources that there is room for.
    fn admit(&mut self) {
        let mut admitted = self.take_admissible();
        // Sources whose prompts have the same length share their first step.
        while let Some(first) = admitted.first() {
            let length = first.prompt_length();
            let (now, later) = admitted.into_iter().partition(|admitted| admitted.prompt_length() == length);
            admitted = later;
            self.begin(now);
        }
    }

    /// The copy of the model.
    fn model(&self) -> &Model {
        &self.shared.copies[self.copy].model
    }

    /// Runs the first step of sources whose prompts have the same length.
    fn begin(&mut self, sources: Vec<Admitted>) {
        let shared = self.shared.clone();
        let ModelCopy { model, stop } = &shared.copies[self.copy];
        let mut members = Vec::new();
        let mut batches = Vec::new();
        let mut prompts = Prompts { length: 0, ids: Vec::new() };
        let mut source_tokens = 0;
        for Admitted { request, row, footprint } in sources {
            // Another source of the request may have failed.
            if request.has_ended() {
                continue;
            }
            request.send(Event::Admitted { row });
            let admitted = Instant::now();
            let call = &request.call;
            let stops = request.stops();
            let alone = call.batch.alone(row);
            let encoded = match alone.encoder_outputs() {
                Some(_) => Ok(alone),
                None => model.encode(&alone, &request.cancel).and_then(|states| alone.with_encoder_outputs(states)),
            };
            request.outlet.encoded(admitted.elapsed());
            match encoded {
                Ok(batch) => batches.push(batch),
                Err(error) => {
                    self.end(&request, Err(error));
                    continue;
                }
            }
            let item = call.item(row, Search::new, stops);
            prompts.length = call.prompts.length;
            prompts.ids.extend_from_slice(call.prompt(row));
            source_tokens += footprint.source as u64;
            members.push(ActiveSource { request, item, footprint, admitted, step: 0 });
        }
        if members.is_empty() {
            return;
        }
        shared.queue().copy_stats[self.copy].source_tokens += source_tokens;
        let lengths: Vec<usize> = batches.iter().map(Batch::length).collect();
        let logits_request = Item::joint_request(members.iter().map(|member| &member.item), 0);
        let begun = Batch::joined(batches, 0).and_then(|batch| {
            // At most the serving plan's batch is admitted at a time.
            let run = model.fit(&batch);
            NewRows::prefill(model, &run, prompts.widened(run.rows()), logits_request, stop)
        });
        let begun = begun.and_then(|(new, mut tensors)| {
            let statuses: Vec<ItemStatus> = {
                let mut output = tensors.output()?;
                let rows = members.iter_mut().enumerate();
                rows.map(|(row, member)| self.advance(member, output.rows(row, 1))).collect()
            };
            Ok((new, statuses))
        });
        self.count_step(members.len());
        let (new, statuses) = match begun {
            Ok(begun) => begun,
            Err(error) => return self.fail(members, &error),
        };
        let (mut joining, mut running) = (Vec::new(), Vec::new());
        for (item, (member, status)) in members.into_iter().zip(statuses).enumerate() {
            match status {
                ItemStatus::Running => {
                    joining.push(Joining { item, source: lengths[item], rows: member.item.search.width() });
                    running.push(member);
                }
                ItemStatus::Finished => self.finish(member),
            }
        }
        if running.is_empty() {
            return;
        }
        let flight = self.flights.iter_mut().find(|flight| matches!(flight.rows, Rows::Ragged(_)));
        match Rows::join(flight.map(|flight| &mut flight.rows), new, &joining) {
            Ok(Some(rows)) => self.flights.push(Flight { rows, members: running }),
            Ok(None) => {
                let flight = self.flights.iter_mut().find(|flight| matches!(flight.rows, Rows::Ragged(_)));
                flight.expect("rows have just joined it").members.extend(running);
            }
            Err(error) => {
                // The state of the rows in flight is unknown now.
                let all = self.flights.drain(..).flat_map(|flight| flight.members).chain(running).collect();
                self.fail(all, &error);
            }
        }
    }

    /// Runs a step of a flight.
    fn step(&mut self, at: usize) {
        let shared = self.shared.clone();
        let ModelCopy { model, stop } = &shared.copies[self.copy];
        let mut members = std::mem::take(&mut self.flights[at].members);
        let widths: Vec<usize> = members.iter().map(|member| member.item.search.width()).collect();
        let tokens: Vec<i64> = members.iter().flat_map(|member| member.item.search.next_tokens()).copied().collect();
        self.count_step(tokens.len());
        let logits_request = Item::joint_request(members.iter().map(|member| &member.item), 0);
        let stepped = self.flights[at].rows.step(model, tokens, logits_request, stop);
        let statuses = stepped.and_then(|mut tensors| {
            let (mut output, mut first) = (tensors.output()?, 0);
            let mut statuses = Vec::with_capacity(members.len());
            for (member, width) in members.iter_mut().zip(&widths) {
                statuses.push(self.advance(member, output.rows(first, *width)));
                first += width;
            }
            Ok(statuses)
        });
        // A request that fails takes its other sources with it, and one that was cancelled leaves as soon as possible.
        self.end_cancelled();
        let continued = statuses.and_then(|statuses| {
            let mut first = 0;
            let mut continued = Vec::new();
            for (index, (member, &rows)) in members.iter().zip(&widths).enumerate() {
                if statuses[index] == ItemStatus::Running && !member.request.has_ended() {
                    let parents = member.item.search.parents();
                    continued.push(ContinuedMember { first, rows, member: index, parents });
                }
                first += rows;
            }
            let kept: HashSet<usize> = continued.iter().map(|member| member.member).collect();
            if !kept.is_empty() {
                self.flights[at].rows.select(&continued)?;
            }
            Ok((statuses, kept))
        });
        match continued {
            Ok((statuses, kept)) => {
                let mut left = Vec::with_capacity(kept.len());
                for (index, member) in members.into_iter().enumerate() {
                    if kept.contains(&index) {
                        left.push(member);
                    } else if statuses[index] == ItemStatus::Finished {
                        self.finish(member);
                    }
                }
                self.flights[at].members = left;
            }
            Err(error) => self.fail(members, &error),
        }
    }

    /// Advances a source by the output of a step. One that fails ends its request; sources of a request that has ended
    /// are finished.
    fn advance(&self, member: &mut ActiveSource, output: StepOutput) -> ItemStatus {
        let (item, step) = (&mut member.item, member.step);
        member.step += 1;
        if member.request.has_ended() {
            return ItemStatus::Finished;
        }
        // The item is not used again after a panic.
        let advanced = catch_unwind(AssertUnwindSafe(|| item.advance(self.model(), output, step)));
        match advanced.unwrap_or(Err(Error::Panicked { row: item.row })) {
            Ok(ItemStatus::Finished) => ItemStatus::Finished,
            Ok(ItemStatus::Running) => {
                let row = item.row;
                for &token in item.settled() {
                    member.request.send(Event::Token { row, token });
                }
                ItemStatus::Running
            }
            Err(error) => {
                self.end(&member.request, Err(error));
                ItemStatus::Finished
            }
        }
    }

    /// Sends the results of a source, unless its request has ended.
    fn finish(&self, member: ActiveSource) {
        let ActiveSource { request, item, admitted, .. } = member;
        if request.has_ended() {
            return;
        }
        let item = item.finish();
        let row = item.row;
        for &token in item.unshown() {
            request.send(Event::Token { row, token });
        }
        let new_tokens: usize = item.hypotheses.iter().map(|hypothesis| hypothesis.tokens.len()).sum();
        request.send(Event::Row { row, hypotheses: item.hypotheses });
        let is_last = {
            let mut queue = self.shared.queue();
            queue.count_flight(admitted);
            queue.copy_stats[self.copy].new_tokens += new_tokens as u64;
            let pending = queue.requests.get_mut(&request.id);
            pending.is_some_and(|pending| {
                pending.unfinished -= 1;
                pending.unfinished == 0
            })
        };
        if is_last {
            self.end(&request, Ok(()));
        }
    }

    /// Ends the requests of sources whose run has failed.
    fn fail(&self, members: Vec<ActiveSource>, error: &Error) {
        for member in members {
            self.end(&member.request, Err(error.clone()));
        }
    }

    fn end(&self, request: &ActiveRequest, result: Result<(), Error>) {
        self.shared.end(request, result);
    }

    fn count_step(&self, rows: usize) {
        let stats = &mut self.shared.queue().copy_stats[self.copy];
        stats.steps += 1;
        stats.stepped_rows += rows as u64;
    }

    fn update_stats(&self) {
        let footprints: Vec<Footprint> = self.flights.iter().filter_map(Flight::footprint).collect();
        let members = || self.flights.iter().flat_map(|flight| &flight.members);
        let stats = &mut self.shared.queue().copy_stats[self.copy];
        *stats = EngineStats {
            sources: members().count(),
            rows: members().map(|member| member.item.search.width()).sum(),
            planned_bytes: footprints.iter().map(|footprint| self.shared.memory.bytes(footprint)).sum(),
            ..*stats
        };
    }
}
