//! A thread of the engine, for one copy of the model: it admits sources, runs a step of each flight in turn, and sends
//! callers the events.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::begin::{ActiveSource, Admitted, Aside, Beginning, Begun, Pace, begin};
use super::queue::{ActiveRequest, ModelCopy, Phase, Shared};
use super::rows::{ContinuedMember, Rows};
use super::{Engine, EngineStats, Event};
use crate::error::Error;
use crate::item::{Item, ItemStatus};
use crate::memory::Footprint;
use crate::model::{Lane, Model};
use crate::state::Joining;
use crate::step_output::StepOutput;

/// Upper bound on cohorts: each reads the weights for itself, and later ones would be smaller still.
const MOST_COHORTS: usize = 4;

/// Sources up to these lengths, and longer ones, are in different flights of a model whose rows share steps.
const CLASSES: [usize; 2] = [512, 2048];

/// How often deadlines are looked at while the other thread begins sources and there are no steps.
const PATIENCE: Duration = Duration::from_millis(20);

/// Rows that share their steps. If rows of all lengths can, sources of similar length still have flights of their own:
/// the memory of a flight is a rectangle, and one long source would multiply that of all its rows.
struct Flight {
    rows: Rows,
    members: Vec<ActiveSource>,
    class: usize,
}

impl Flight {
    /// Whether a request of its rows has not ended.
    fn goes_on(&self) -> bool {
        self.members.iter().any(|member| !member.request.has_ended())
    }

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
    aside: Option<Aside>,
    pace: Pace,
    /// Whether there was no room for the first source of the queue.
    is_full: bool,
    /// The count of changes when it last looked at the queue.
    seen: u64,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, copy: usize) -> Worker {
        // A capture of CUDA graphs fails if another thread allocates memory meanwhile.
        let is_alone = shared.copies[copy].model.captures_cuda_graphs();
        let aside = if is_alone { None } else { Aside::start(&shared, copy) };
        Worker { shared, copy, flights: Vec::new(), aside, pace: Pace::default(), is_full: false, seen: 0 }
    }

    /// Runs until the engine is closed.
    pub fn run(mut self) {
        while self.wait() {
            self.end_cancelled();
            self.admit();
            self.update_stats();
            let start = Instant::now();
            self.end_cancelled();
            for at in 0..self.flights.len() {
                self.remove_ended(at);
                self.step(at);
            }
            if !self.flights.is_empty() {
                self.pace.count_step(start.elapsed());
            }
            self.flights.retain(|flight| !flight.members.is_empty());
            self.update_stats();
        }
        let pending: Vec<_> = self.shared.queue().requests.values().map(|pending| pending.request.clone()).collect();
        for request in pending {
            self.end(&request, Err(Error::Cancelled));
        }
        self.flights.clear();
        self.aside = None;
        self.update_stats();
    }

    /// Waits while there is nothing to do, and returns whether the engine is still open.
    fn wait(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut queue = shared.queue();
        loop {
            if queue.phase == Phase::Closed {
                return false;
            }
            let is_changed = std::mem::replace(&mut self.seen, queue.changes) != queue.changes;
            let is_beginning = !self.beginning().is_empty();
            let can_admit = !queue.line.is_empty() && (is_changed || !(self.is_full && is_beginning));
            if !self.flights.is_empty() || can_admit || (is_beginning && is_changed) {
                return true;
            }
            if is_beginning {
                let (locked, waited) =
                    shared.changed.wait_timeout(queue, PATIENCE).unwrap_or_else(PoisonError::into_inner);
                if waited.timed_out() {
                    return true;
                }
                queue = locked;
            } else {
                queue.idle += 1;
                shared.ended.notify_all();
                queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
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

    /// The sources that the other thread begins, with their classes.
    fn beginning(&self) -> &[(usize, Footprint)] {
        self.aside.as_ref().map_or(&[], Aside::waiting)
    }

    /// The class of a source.
    fn class(&self, footprint: &Footprint) -> usize {
        let is_shared = Engine::shares_all_steps(self.model());
        if is_shared { CLASSES.iter().filter(|&&longest| footprint.source > longest).count() } else { 0 }
    }

    /// The rectangles of memory that are taken, with the class of each. Only those of rows that can share steps grow.
    fn rectangles(&self) -> Vec<(usize, Footprint)> {
        let flights = self.flights.iter().filter_map(|flight| Some((flight.class, flight.footprint()?)));
        let all = flights.chain(self.beginning().iter().copied());
        if !Engine::shares_all_steps(self.model()) {
            return all.collect();
        }
        let mut merged: Vec<(usize, Footprint)> = Vec::new();
        for (class, footprint) in all {
            match merged.iter_mut().find(|(other, _)| *other == class) {
                Some((_, with)) => *with = with.beside(footprint),
                None => merged.push((class, footprint)),
            }
        }
        merged
    }

    /// Takes the sources from the queue that there is room for: those to begin now, which take no longer than a step if
    /// others wait for them, and those that take longer.
    fn take_admissible(&self) -> (Vec<Admitted>, Vec<Admitted>) {
        let shared = &*self.shared;
        let is_shared = Engine::shares_all_steps(self.model());
        let (mut now, mut long) = (Vec::new(), Vec::new());
        if !is_shared && self.flights.len() + self.beginning().len() >= MOST_COHORTS {
            return (now, long);
        }
        let mut rectangles = self.rectangles();
        // New sources of a model whose rows cannot join others are a rectangle of their own.
        let fixed = if is_shared { 0 } else { rectangles.len() };
        let in_flight: usize = self.flights.iter().map(|flight| flight.members.len()).sum();
        let sources = in_flight + self.beginning().len();
        let mut queue = shared.queue();
        let queue = &mut *queue;
        let budget = self.pace.budget(queue.line.load().sources, in_flight);
        let mut spent = Duration::ZERO;
        let share = queue.line.load().sources.div_ceil(shared.copies.len());
        while let Some(id) = queue.line.first() {
            let Some(pending) = queue.requests.get_mut(&id) else {
                queue.line.remove(id);
                continue;
            };
            let taken = now.len() + long.len();
            let has_work = sources + taken > 0;
            if taken == share || (has_work && queue.idle > 0) {
                break;
            }
            let call = &pending.request.call;
            let footprint = Footprint::of(call, pending.next);
            let class = self.class(&footprint);
            let own = rectangles[fixed..].iter().position(|(other, _)| *other == class).map(|at| fixed + at);
            let with = own.map_or(footprint, |own| rectangles[own].1.beside(footprint));
            let others = || rectangles.iter().enumerate().filter(|(at, _)| Some(*at) != own).map(|(_, other)| &other.1);
            let rows = others().map(|other| other.rows).sum::<usize>().saturating_add(with.rows);
            let bytes = others().map(|other| shared.memory.bytes(other)).sum::<usize>();
            let bytes = bytes.saturating_add(shared.memory.bytes(&with));
            if sources + taken >= shared.options.max_sources
                || with.rows > shared.memory.max_shared_rows
                || rows > shared.options.max_rows
                || bytes > shared.options.max_bytes
            {
                break;
            }
            let time = self.pace.beginning(footprint.source);
            let is_long = self.aside.is_some() && has_work && self.pace.is_long(footprint.source);
            // Cohorts are begun together, since each reads the weights for itself.
            let waits = is_shared && in_flight > 0 && !now.is_empty() && spent + time > budget;
            if !is_long && waits {
                break;
            }
            match own {
                Some(own) => rectangles[own].1 = with,
                None => rectangles.push((class, with)),
            }
            let request = pending.request.clone();
            let shares_step = is_shared
                && request.call.takes_logits_alone()
                && self.flights.iter().any(|flight| flight.class == class && flight.goes_on());
            let at = Instant::now();
            let admitted = Admitted { request, row: pending.next, footprint, at, class, shares_step };
            if is_long {
                long.push(admitted);
            } else {
                spent += time;
                now.push(admitted);
            }
            pending.next += 1;
            queue.line.take();
        }
        (now, long)
    }

    /// Begins the sources that there is room for, and lets those join that the other thread has begun.
    fn admit(&mut self) {
        let begun = self.aside.as_mut().map(Aside::take).unwrap_or_default();
        begun.into_iter().for_each(|beginning| self.join(beginning));
        let (mut now, long) = self.take_admissible();
        self.is_full = now.is_empty() && long.is_empty();
        let tokens: usize = now.iter().chain(&long).map(|source| source.footprint.source).sum();
        self.shared.queue().copy_stats[self.copy].source_tokens += tokens as u64;
        for Admitted { request, row, .. } in now.iter().chain(&long) {
            // The clock of `max_time` starts here.
            request.stops();
            request.send(Event::Admitted { row: *row });
        }
        for source in long {
            now.extend(match &mut self.aside {
                Some(aside) => aside.give(source),
                None => Some(source),
            });
        }
        if now.is_empty() {
            return;
        }
        let (start, shared) = (Instant::now(), self.shared.clone());
        let tokens: usize = now.iter().map(|source| source.footprint.source).sum();
        let beginning = begin(&shared.copies[self.copy], Lane::Main, now);
        self.pace.count_beginning(tokens, start.elapsed());
        self.join(beginning);
    }

    /// The copy of the model.
    fn model(&self) -> &Model {
        &self.shared.copies[self.copy].model
    }

    /// Adds sources to the rows in flight.
    fn join(&mut self, beginning: Beginning) {
        for (request, error) in beginning.failed {
            self.end(&request, Err(error));
        }
        for begun in beginning.begun {
            self.join_begun(begun);
        }
    }

    fn join_begun(&mut self, begun: Begun) {
        let Begun { mut members, lengths, class, result } = begun;
        let advanced = result.and_then(|(new, tensors)| {
            let Some(mut tensors) = tensors else {
                return Ok((new, vec![ItemStatus::Running; members.len()]));
            };
            let statuses: Vec<ItemStatus> = {
                let mut output = tensors.output()?;
                let rows = members.iter_mut().enumerate();
                rows.map(|(row, member)| self.advance(member, output.rows(row, 1))).collect()
            };
            Ok((new, statuses))
        });
        self.count_step(members.len());
        let (new, statuses) = match advanced {
            Ok(advanced) => advanced,
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
        let is_its = |flight: &&mut Flight| matches!(flight.rows, Rows::Ragged(_)) && flight.class == class;
        let flight = self.flights.iter_mut().find(is_its);
        match Rows::join(flight.map(|flight| &mut flight.rows), new, &joining) {
            Ok(Some(rows)) => self.flights.push(Flight { rows, members: running, class }),
            Ok(None) => {
                let flight = self.flights.iter_mut().find(is_its);
                flight.expect("rows have just joined it").members.extend(running);
            }
            Err(error) => {
                // The state of the rows in flight is unknown now.
                let all = self.flights.drain(..).flat_map(|flight| flight.members).chain(running).collect();
                self.fail(all, &error);
            }
        }
    }

    /// Removes the rows of requests that have ended since the last step, so that the next one is without them.
    fn remove_ended(&mut self, at: usize) {
        let Flight { rows, members, .. } = &mut self.flights[at];
        // Other threads end requests too, so this is asked once.
        let goes_on: Vec<bool> = members.iter().map(|member| !member.request.has_ended()).collect();
        if goes_on.iter().all(|&goes_on| goes_on) {
            return;
        }
        let widths: Vec<usize> = members.iter().map(|member| member.item.search.width()).collect();
        let same: Vec<usize> = (0..widths.iter().copied().max().unwrap_or(0)).collect();
        let parents = widths.iter().zip(&goes_on).map(|(&rows, &goes_on)| goes_on.then(|| &same[..rows]));
        let kept = ContinuedMember::of(&widths, parents);
        let selected = if kept.is_empty() { Ok(()) } else { rows.select(&kept) };
        let members = std::mem::take(members).into_iter().zip(goes_on);
        let left = members.filter_map(|(member, goes_on)| goes_on.then_some(member)).collect();
        match selected {
            Ok(()) => self.flights[at].members = left,
            Err(error) => self.fail(left, &error),
        }
    }

    /// Runs a step of a flight.
    fn step(&mut self, at: usize) {
        if self.flights[at].members.is_empty() {
            return;
        }
        let shared = self.shared.clone();
        let ModelCopy { model, stop } = &shared.copies[self.copy];
        let mut members = std::mem::take(&mut self.flights[at].members);
        let widths: Vec<usize> = members.iter().map(|member| member.item.search.width()).collect();
        let tokens: Vec<i64> = members.iter().flat_map(|member| member.item.search.next_tokens()).copied().collect();
        self.count_step(tokens.len());
        let logits_request = Item::joint_request(members.iter().map(|member| &member.item), 0);
        let stepped = self.flights[at].rows.step(model, tokens, logits_request, stop);
        let firsts = self.flights[at].rows.firsts(&widths);
        let statuses = stepped.and_then(|mut tensors| {
            let mut output = tensors.output()?;
            let mut statuses = Vec::with_capacity(members.len());
            for (member, (&first, &width)) in members.iter_mut().zip(firsts.iter().zip(&widths)) {
                statuses.push(self.advance(member, output.rows(first, width)));
            }
            Ok(statuses)
        });
        // A request that fails takes its other sources with it, and one that was cancelled leaves as soon as possible.
        self.end_cancelled();
        let continued = statuses.and_then(|statuses| {
            let parents = members.iter().zip(&statuses).map(|(member, &status)| {
                let goes_on = status == ItemStatus::Running && !member.request.has_ended();
                goes_on.then(|| member.item.search.parents())
            });
            let continued = ContinuedMember::of(&widths, parents);
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
                for (token, logprobs) in item.settled_with_logprobs() {
                    member.request.send(Event::Token { row, token, logprobs });
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
        for (token, logprobs) in item.unshown_with_logprobs() {
            request.send(Event::Token { row, token, logprobs });
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
        let (rectangles, beginning) = (self.rectangles(), self.beginning());
        let members = || self.flights.iter().flat_map(|flight| &flight.members);
        let stats = &mut self.shared.queue().copy_stats[self.copy];
        *stats = EngineStats {
            sources: members().count() + beginning.len(),
            rows: members().map(|member| member.item.search.width()).sum::<usize>()
                + beginning.iter().map(|(_, footprint)| footprint.rows).sum::<usize>(),
            planned_bytes: rectangles.iter().map(|(_, footprint)| self.shared.memory.bytes(footprint)).sum(),
            ..*stats
        };
    }
}
