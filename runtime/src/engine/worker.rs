//! A thread of the engine, of one copy of the model: admits rows, runs a step of each flight in turn, and tells callers what
//! came of it.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock, PoisonError};

use super::plan::Need;
use super::rows::{Begun, GoingOn, Rows};
use super::{Engine, EngineStats, Event, Id, Phase, Shared};
use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::item::{Call, Item};
use crate::logits::Said;
use crate::model::Model;
use crate::search::Search;
use crate::stop::StoppingCriteria;

/// Cohorts at most: each reads the weights for itself, and later ones would be smaller still.
const MOST_COHORTS: usize = 4;

/// What a caller is sent.
pub(super) enum Message {
    Event(Event),
    /// The last.
    Ended(Result<(), Error>),
}

/// A request as the threads that answer it share it.
pub(super) struct Running {
    pub id: Id,
    pub call: Call,
    /// By its caller, by its deadline, or with the whole engine.
    pub cancel: Cancellation,
    pub events: Sender<Message>,
    /// From when its first source is admitted.
    stops: OnceLock<Arc<StoppingCriteria>>,
    /// Set with the line locked, when the last message is sent.
    pub has_ended: AtomicBool,
}

impl Running {
    pub fn new(id: Id, call: Call, cancel: Cancellation, events: Sender<Message>) -> Running {
        Running { id, call, cancel, events, stops: OnceLock::new(), has_ended: AtomicBool::new(false) }
    }

    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    fn tell(&self, event: Event) {
        // Whoever has gone is noticed by the cancellation that this is.
        let _ = self.events.send(Message::Event(event));
    }
}

/// A source in flight.
struct Member {
    request: Arc<Running>,
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

/// The state of the thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// Which of the copies it is of.
    copy: usize,
    flights: Vec<Flight>,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, copy: usize) -> Worker {
        Worker { shared, copy, flights: Vec::new() }
    }

    /// Works until the engine is closed.
    pub fn run(mut self) {
        while self.wait() {
            self.give_up();
            self.admit();
            for at in 0..self.flights.len() {
                self.step(at);
            }
            self.flights.retain(|flight| !flight.members.is_empty());
            self.tell();
        }
        let unended: Vec<_> = self.shared.line().requests.values().map(|progress| progress.running.clone()).collect();
        for request in unended {
            self.end(&request, Err(Error::Cancelled));
        }
        self.flights.clear();
        self.tell();
    }

    /// Waits if there is nothing to do; false if the engine is closed.
    fn wait(&self) -> bool {
        let mut line = self.shared.line();
        line.idle += 1;
        while line.phase != Phase::Closed && self.flights.is_empty() && line.waiting.is_empty() {
            self.shared.ended.notify_all();
            line = self.shared.changed.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        line.idle -= 1;
        line.phase != Phase::Closed
    }

    /// Ends the requests that were cancelled or are too late.
    fn give_up(&self) {
        let ended: Vec<_> = (self.shared.line().requests.values())
            .filter_map(|progress| Some((progress.running.clone(), progress.running.cancel.check().err()?)))
            .collect();
        for (request, error) in ended {
            self.end(&request, Err(error));
        }
    }

    /// Takes from the line the sources that there is room for.
    fn admitted(&self) -> Vec<(Arc<Running>, usize, Need)> {
        let shared = &*self.shared;
        let is_shared = Engine::shares_all_steps(self.model());
        let mut admitted = Vec::new();
        if !is_shared && self.flights.len() >= MOST_COHORTS {
            return admitted;
        }
        // Flights are rectangles each; rows that can join one are part of it.
        let mut others: Vec<Need> = self.flights.iter().filter_map(Flight::need).collect();
        let mut own = if is_shared { others.pop() } else { None };
        let sources: usize = self.flights.iter().map(|flight| flight.members.len()).sum();
        let mut line = shared.line();
        let line = &mut *line;
        let share = line.waiting_sources().div_ceil(shared.copies.len());
        while let Some(&id) = line.waiting.front() {
            let Some(progress) = line.requests.get_mut(&id) else {
                line.waiting.pop_front();
                continue;
            };
            let has_work = !self.flights.is_empty() || !admitted.is_empty();
            if admitted.len() == share || (has_work && line.idle > 0) {
                break;
            }
            let call = &progress.running.call;
            let need = Need::of(call, progress.next);
            let with = own.map_or(need, |own| own.beside(need));
            let rows = others.iter().map(|other| other.rows).sum::<usize>().saturating_add(with.rows);
            let bytes = others.iter().map(|other| shared.plan.bytes(other)).sum::<usize>();
            let bytes = bytes.saturating_add(shared.plan.bytes(&with));
            let is_full = sources + admitted.len() >= shared.options.max_sources;
            if is_full
                || with.rows > shared.plan.side_by_side
                || rows > shared.options.max_rows
                || bytes > shared.options.max_bytes
            {
                break;
            }
            own = Some(with);
            admitted.push((progress.running.clone(), progress.next, need));
            progress.next += 1;
            let goes_on = progress.next < call.batch.rows();
            line.waiting.pop_front();
            if goes_on {
                line.waiting.push_back(id);
            }
        }
        admitted
    }

    /// Begins the sources that there is room for.
    fn admit(&mut self) {
        let mut admitted = self.admitted();
        // Prompts of one length share their first step.
        while let Some((request, ..)) = admitted.first() {
            let length = request.call.prompts.length;
            let (now, later) = admitted.into_iter().partition(|(request, ..)| request.call.prompts.length == length);
            admitted = later;
            self.begin(now);
        }
    }

    /// The copy of the model.
    fn model(&self) -> &Model {
        &self.shared.copies[self.copy].0
    }

    /// Runs the first step of sources whose prompts are of one length.
    fn begin(&mut self, sources: Vec<(Arc<Running>, usize, Need)>) {
        let shared = self.shared.clone();
        let (model, cancel) = &shared.copies[self.copy];
        let mut members = Vec::new();
        let mut batches = Vec::new();
        let mut prompts = Prompts { length: 0, ids: Vec::new() };
        for (request, row, need) in sources {
            // Another source of the request may have failed.
            if request.has_ended() {
                continue;
            }
            let call = &request.call;
            let stops = request.stops.get_or_init(|| Arc::new(StoppingCriteria::new(&call.options)));
            let alone = call.batch.alone(row);
            let encoded = match alone.encoder_outputs() {
                Some(_) => Ok(alone),
                None => model.encode(&alone, &request.cancel).and_then(|states| alone.with_encoder_outputs(states)),
            };
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
            members.push(Member { request, item, need, step: 0 });
        }
        if members.is_empty() {
            return;
        }
        let lengths: Vec<usize> = batches.iter().map(Batch::length).collect();
        let wanted = Item::all_want(members.iter().map(|member| &member.item), 0);
        let begun = Batch::joined(batches, 0).and_then(|batch| {
            // No more are admitted at a time than the serving plan's batch.
            let run = model.fit(&batch);
            Begun::start(model, &run, prompts.widened(run.rows()), wanted, cancel)
        });
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
        let (model, cancel) = &shared.copies[self.copy];
        let mut members = std::mem::take(&mut self.flights[at].members);
        let widths: Vec<usize> = members.iter().map(|member| member.item.search.width()).collect();
        let tokens: Vec<i64> = members.iter().flat_map(|member| member.item.search.next_tokens()).copied().collect();
        self.count_step(tokens.len());
        let wanted = Item::all_want(members.iter().map(|member| &member.item), 0);
        let logits = self.flights[at].rows.step(model, tokens, wanted, cancel);
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
                if going_on[index] && !member.request.has_ended() {
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
    fn take(&self, member: &mut Member, said: Said) -> bool {
        let (item, step) = (&mut member.item, member.step);
        member.step += 1;
        if member.request.has_ended() {
            return false;
        }
        // The item is not used again after a panic.
        let taken = catch_unwind(AssertUnwindSafe(|| item.take(self.model(), said, step)));
        match taken.unwrap_or(Err(Error::Panicked { row: item.row })) {
            Ok(true) => false,
            Ok(false) => {
                let row = item.row;
                for &token in item.settled() {
                    member.request.tell(Event::Token { row, token });
                }
                true
            }
            Err(error) => {
                self.end(&member.request, Err(error));
                false
            }
        }
    }

    /// Tells what a source's targets are, unless its request has ended.
    fn finish(&self, member: Member) {
        let Member { request, item, .. } = member;
        if request.has_ended() {
            return;
        }
        let row = item.row;
        let (hypotheses, shown) = item.finish();
        for &token in hypotheses[0].tokens.get(shown..).unwrap_or(&[]) {
            request.tell(Event::Token { row, token });
        }
        request.tell(Event::Row { row, hypotheses });
        let is_last = {
            let mut line = self.shared.line();
            let progress = line.requests.get_mut(&request.id);
            progress.is_some_and(|progress| {
                progress.left -= 1;
                progress.left == 0
            })
        };
        if is_last {
            self.end(&request, Ok(()));
        }
    }

    /// Ends the requests of sources whose run has failed.
    fn fail(&self, members: Vec<Member>, error: &Error) {
        for member in members {
            self.end(&member.request, Err(error.clone()));
        }
    }

    fn end(&self, request: &Running, result: Result<(), Error>) {
        self.shared.end(request, result);
    }

    fn count_step(&self, rows: usize) {
        let doing = &mut self.shared.line().doing[self.copy];
        doing.steps += 1;
        doing.stepped_rows += rows as u64;
    }

    /// Brings the statistics up to date.
    fn tell(&self) {
        let needs: Vec<Need> = self.flights.iter().filter_map(Flight::need).collect();
        let doing = &mut self.shared.line().doing[self.copy];
        *doing = EngineStats {
            sources: self.flights.iter().map(|flight| flight.members.len()).sum(),
            rows: self.flights.iter().flat_map(|flight| &flight.members).map(|m| m.item.search.width()).sum(),
            planned_bytes: needs.iter().map(|need| self.shared.plan.bytes(need)).sum(),
            ..*doing
        };
    }
}
