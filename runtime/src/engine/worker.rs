//! The engine's thread: admits rows, runs a step of each flight in turn, and tells callers what came of it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::plan::Need;
use super::rows::{Begun, GoingOn, Rows};
use super::{Engine, Event, Phase, Shared};
use crate::batch::{Batch, Prompts};
use crate::error::Error;
use crate::item::{Call, Item};
use crate::model::Said;
use crate::search::Search;
use crate::stop::Stops;

/// Cohorts at most: each reads the weights for itself, and later ones would be smaller still.
const MOST_COHORTS: usize = 4;

/// What a caller is sent.
pub(super) enum Message {
    Event(Event),
    /// The last.
    Ended(Result<(), Error>),
}

/// A request as it is handed to the thread.
pub(super) struct Submitted {
    pub call: Call,
    pub deadline: Option<Instant>,
    pub events: Sender<Message>,
    pub cancelled: Arc<AtomicBool>,
}

/// A request that has not ended.
struct Running {
    submitted: Submitted,
    /// The next source to be admitted.
    next: usize,
    /// Sources that are not finished.
    left: usize,
    /// From when its first source is admitted.
    stops: Option<Arc<Stops>>,
}

/// What tells requests apart, in the order of their submission.
type Id = u64;

/// A source in flight.
struct Member {
    request: Id,
    item: Item,
    need: Need,
    step: usize,
}

/// Rows that share their steps.
struct Flight {
    rows: Rows,
    members: Vec<Member>,
}

impl Flight {
    fn need(&self) -> Option<Need> {
        self.members.iter().map(|member| member.need).reduce(Need::beside)
    }
}

/// The state of the engine's thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    requests: HashMap<Id, Running>,
    /// Requests with sources to be admitted; the next source is the first's.
    line: VecDeque<Id>,
    flights: Vec<Flight>,
    next_id: Id,
}

impl Worker {
    pub fn new(shared: Arc<Shared>) -> Worker {
        Worker { shared, requests: HashMap::new(), line: VecDeque::new(), flights: Vec::new(), next_id: 0 }
    }

    /// Works until the engine is closed.
    pub fn run(mut self) {
        while self.take_submitted() {
            self.give_up();
            self.admit();
            for at in 0..self.flights.len() {
                self.step(at);
            }
            self.flights.retain(|flight| !flight.members.is_empty());
            self.tell();
        }
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            self.end(id, Err(Error::Cancelled));
        }
        self.flights.clear();
        self.tell();
    }

    /// Takes what was submitted, and waits if there is nothing to do; false if the engine is closed.
    fn take_submitted(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut line = shared.line();
        loop {
            let submitted = std::mem::take(&mut line.submitted);
            let is_closed = line.phase == Phase::Closed;
            if !submitted.is_empty() || is_closed || !self.requests.is_empty() {
                drop(line);
                for submitted in submitted {
                    let left = submitted.call.batch.rows();
                    self.requests.insert(self.next_id, Running { submitted, next: 0, left, stops: None });
                    self.line.push_back(self.next_id);
                    self.next_id += 1;
                }
                return !is_closed;
            }
            line = shared.changed.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the requests that were cancelled or are too late.
    fn give_up(&mut self) {
        let now = Instant::now();
        let ended: Vec<(Id, Error)> = (self.requests.iter())
            .filter_map(|(&id, Running { submitted, .. })| {
                if submitted.cancelled.load(Ordering::SeqCst) {
                    return Some((id, Error::Cancelled));
                }
                submitted.deadline.is_some_and(|deadline| now >= deadline).then_some((id, Error::Deadline))
            })
            .collect();
        for (id, error) in ended {
            self.end(id, Err(error));
        }
    }

    /// Begins the sources that there is room for.
    fn admit(&mut self) {
        let mut admitted: Vec<(Id, usize, Need)> = Vec::new();
        let shared = self.shared.clone();
        let is_shared = Engine::shares_all_steps(&shared.model);
        if !is_shared && self.flights.len() >= MOST_COHORTS {
            return;
        }
        // Flights are rectangles each; rows that can join one are part of it.
        let mut others: Vec<Need> = self.flights.iter().filter_map(Flight::need).collect();
        let mut own = if is_shared { others.pop() } else { None };
        while let Some(&id) = self.line.front() {
            let Some(running) = self.requests.get_mut(&id) else {
                self.line.pop_front();
                continue;
            };
            let need = Need::of(&running.submitted.call, running.next);
            let with = own.map_or(need, |own| own.beside(need));
            let rows = others.iter().map(|other| other.rows).sum::<usize>().saturating_add(with.rows);
            let bytes = others.iter().map(|other| shared.plan.bytes(other)).sum::<usize>();
            let bytes = bytes.saturating_add(shared.plan.bytes(&with));
            if rows > shared.options.max_rows || bytes > shared.options.max_bytes {
                break;
            }
            own = Some(with);
            admitted.push((id, running.next, need));
            running.next += 1;
            self.line.pop_front();
            if running.next < running.submitted.call.batch.rows() {
                self.line.push_back(id);
            }
        }
        // Before their first events: who has seen one knows that there is room in the line.
        self.tell();
        // Prompts of one length share their first step.
        while let Some(&(id, ..)) = admitted.first() {
            let length_of =
                |worker: &Worker, id: &Id| worker.requests.get(id).map(|running| running.submitted.call.prompts.length);
            let length = length_of(self, &id);
            let (now, later) = admitted.into_iter().partition(|(id, ..)| length_of(self, id) == length);
            admitted = later;
            self.begin(now);
        }
    }

    /// Runs the first step of sources whose prompts are of one length.
    fn begin(&mut self, sources: Vec<(Id, usize, Need)>) {
        let shared = self.shared.clone();
        let (model, cancel) = (&shared.model, &shared.stop);
        let mut members = Vec::new();
        let mut batches = Vec::new();
        let mut prompts = Prompts { length: 0, ids: Vec::new() };
        for (id, row, need) in sources {
            // Another source of the request may have failed.
            let Some(running) = self.requests.get_mut(&id) else { continue };
            let call = &running.submitted.call;
            let alone = call.batch.alone(row);
            let encoded = match alone.encoder_outputs() {
                Some(_) => Ok(alone),
                None => model.encode(&alone, cancel).and_then(|states| alone.with_encoder_outputs(states)),
            };
            match encoded {
                Ok(batch) => batches.push(batch),
                Err(error) => {
                    self.end(id, Err(error));
                    continue;
                }
            }
            let stops = running.stops.get_or_insert_with(|| Arc::new(Stops::new(&call.options)));
            let item = call.item(row, Search::new, stops);
            prompts.length = call.prompts.length;
            prompts.ids.extend_from_slice(call.prompt(row));
            members.push(Member { request: id, item, need, step: 0 });
        }
        if members.is_empty() {
            return;
        }
        let lengths: Vec<usize> = batches.iter().map(Batch::length).collect();
        let wanted = Item::all_want(members.iter().map(|member| &member.item), 0);
        let begun = Batch::joined(batches, 0).and_then(|batch| Begun::start(model, &batch, prompts, wanted, cancel));
        let begun = begun.and_then(|(begun, mut logits)| {
            let going_on: Vec<bool> = {
                let mut said = logits.said()?;
                members.iter_mut().enumerate().map(|(row, member)| self.take(member, said.rows(row, 1))).collect()
            };
            Ok((begun, going_on))
        });
        self.count_step(members.len());
        let (begun, going_on) = match begun {
            Ok(begun) => begun,
            Err(error) => return self.fail(members, &error),
        };
        let mut joining = Vec::new();
        let mut kept = Vec::new();
        for (item, (member, goes_on)) in members.into_iter().zip(going_on).enumerate() {
            match goes_on {
                true => {
                    joining.push((item, lengths[item], member.item.search.width()));
                    kept.push(member);
                }
                false => self.finish(member),
            }
        }
        if kept.is_empty() {
            return;
        }
        let flight = self.flights.iter_mut().find(|flight| matches!(flight.rows, Rows::Ragged(_)));
        match Rows::join(flight.map(|flight| &mut flight.rows), begun, &joining) {
            Ok(Some(rows)) => self.flights.push(Flight { rows, members: kept }),
            Ok(None) => {
                let flight = self.flights.iter_mut().find(|flight| matches!(flight.rows, Rows::Ragged(_)));
                flight.expect("rows have just joined it").members.extend(kept);
            }
            Err(error) => {
                // What the rows in flight are in is not known any more.
                let all = self.flights.drain(..).flat_map(|flight| flight.members).chain(kept).collect();
                self.fail(all, &error);
            }
        }
    }

    /// Runs a step of a flight.
    fn step(&mut self, at: usize) {
        let shared = self.shared.clone();
        let mut members = std::mem::take(&mut self.flights[at].members);
        let widths: Vec<usize> = members.iter().map(|member| member.item.search.width()).collect();
        let tokens: Vec<i64> = members.iter().flat_map(|member| member.item.search.next_tokens()).copied().collect();
        self.count_step(tokens.len());
        let wanted = Item::all_want(members.iter().map(|member| &member.item), 0);
        let logits = self.flights[at].rows.step(&shared.model, tokens, wanted, &shared.stop);
        let going_on = logits.and_then(|mut logits| {
            let (mut said, mut first) = (logits.said()?, 0);
            let mut going_on = Vec::with_capacity(members.len());
            for (member, width) in members.iter_mut().zip(&widths) {
                going_on.push(self.take(member, said.rows(first, *width)));
                first += width;
            }
            Ok(going_on)
        });
        // A request that fails takes its other sources with it; one that was cancelled leaves as soon as it can.
        self.give_up();
        let going_on = going_on.and_then(|going_on| {
            let mut first = 0;
            let mut continued = Vec::new();
            for (index, (member, &rows)) in members.iter().zip(&widths).enumerate() {
                if going_on[index] && self.requests.contains_key(&member.request) {
                    continued.push(GoingOn { first, rows, member: index, parents: member.item.search.parents() });
                }
                first += rows;
            }
            let kept: HashSet<usize> = continued.iter().map(|member| member.member).collect();
            if !kept.is_empty() {
                self.flights[at].rows.select(&continued)?;
            }
            Ok((going_on, kept))
        });
        match going_on {
            Ok((going_on, kept)) => {
                let mut left = Vec::with_capacity(kept.len());
                for (index, member) in members.into_iter().enumerate() {
                    match (kept.contains(&index), going_on[index]) {
                        (true, _) => left.push(member),
                        (false, false) => self.finish(member),
                        (false, true) => {}
                    }
                }
                self.flights[at].members = left;
            }
            Err(error) => self.fail(members, &error),
        }
    }

    /// Gives a member what a step says of it, and tells whether it goes on. One that fails ends its request.
    fn take(&mut self, member: &mut Member, said: Said) -> bool {
        let (item, step) = (&mut member.item, member.step);
        member.step += 1;
        if !self.requests.contains_key(&member.request) {
            return false;
        }
        // The item is not used again after a panic.
        let taken = catch_unwind(AssertUnwindSafe(|| item.take(&self.shared.model, said, step)));
        match taken.unwrap_or(Err(Error::Panicked { row: item.row })) {
            Ok(true) => false,
            Ok(false) => {
                let row = item.row;
                let events = &self.requests[&member.request].submitted.events;
                for &token in item.settled() {
                    // Whoever has gone is noticed by the cancellation that this is.
                    let _ = events.send(Message::Event(Event::Token { row, token }));
                }
                true
            }
            Err(error) => {
                self.end(member.request, Err(error));
                false
            }
        }
    }

    /// Tells what a source's targets are, unless its request has ended.
    fn finish(&mut self, member: Member) {
        let Some(running) = self.requests.get_mut(&member.request) else { return };
        let row = member.item.row;
        let (hypotheses, shown) = member.item.finish();
        let events = &running.submitted.events;
        for &token in hypotheses[0].tokens.get(shown..).unwrap_or(&[]) {
            let _ = events.send(Message::Event(Event::Token { row, token }));
        }
        let _ = events.send(Message::Event(Event::Row { row, hypotheses }));
        running.left -= 1;
        if running.left == 0 {
            self.end(member.request, Ok(()));
        }
    }

    /// Ends the requests of sources whose run has failed.
    fn fail(&mut self, members: Vec<Member>, error: &Error) {
        let requests: HashSet<Id> = members.iter().map(|member| member.request).collect();
        for id in requests {
            self.end(id, Err(error.clone()));
        }
    }

    fn end(&mut self, id: Id, result: Result<(), Error>) {
        let Some(running) = self.requests.remove(&id) else { return };
        self.line.retain(|&waiting| waiting != id);
        {
            let mut line = self.shared.line();
            match &result {
                Ok(()) => line.stats.finished += 1,
                Err(_) => line.stats.failed += 1,
            }
        }
        let _ = running.submitted.events.send(Message::Ended(result));
        self.shared.ended.notify_all();
    }

    fn count_step(&self, rows: usize) {
        let mut line = self.shared.line();
        line.stats.steps += 1;
        line.stats.stepped_rows += rows as u64;
    }

    /// Brings the statistics up to date.
    fn tell(&self) {
        let needs: Vec<Need> = self.flights.iter().filter_map(Flight::need).collect();
        let waiting = self.line.iter().filter_map(|id| self.requests.get(id));
        let waiting_sources: usize = waiting.map(|running| running.submitted.call.batch.rows() - running.next).sum();
        let mut line = self.shared.line();
        // What was submitted meanwhile is not in the line yet.
        let not_taken: usize = line.submitted.iter().map(|submitted| submitted.call.batch.rows()).sum();
        line.stats.waiting_requests = self.line.len() + line.submitted.len();
        line.stats.waiting_sources = waiting_sources + not_taken;
        line.stats.sources = self.flights.iter().map(|flight| flight.members.len()).sum();
        line.stats.rows = self.flights.iter().flat_map(|flight| &flight.members).map(|m| m.item.search.width()).sum();
        line.stats.planned_bytes = needs.iter().map(|need| self.shared.plan.bytes(need)).sum();
    }
}
