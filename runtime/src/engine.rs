//! `Engine`: continuous batching. Requests are submitted from any thread at any time; their rows join the rows in flight
//! between two steps, each with its own beams, lengths and options, and leave when they are finished. What a request gets
//! is what [`Model::generate_batch`] gives it alone.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use t5gemma_runtime::{Batch, Engine, EngineOptions, Event, Model, Request};
//! let model = Arc::new(Model::open("model")?);
//! let engine = Engine::new(model.clone(), EngineOptions::default())?;
//! let batch = Batch::padded(&[model.tokenizer()?.encode("The quick brown fox")?], 0)?;
//! for event in engine.submit(Request::new(batch, model.generation_config().clone()))? {
//!     match event? {
//!         Event::Token { token, .. } => println!("{token}"),
//!         Event::Row { hypotheses, .. } => println!("{:?}", hypotheses[0].finish_reason),
//!     }
//! }
//! # Ok::<(), t5gemma_runtime::Error>(())
//! ```
//!
//! # Design
//! How rows of different lengths share a step depends on the model's cache layout. One that is written in place is told each
//! row's position (`cache_position`), so all rows in flight share every step, and a row may join at any. The growing layout
//! has one position for all rows and no mask over the target: rows can share steps only with those that began with them.
//! There, rows that are admitted together form a cohort, which runs its own steps in turn with the other cohorts; a mask
//! and positions of each row's own would cost the portable graphs operators in every layer, and padding on the left would
//! change results. So cohorts are exact but read the weights once each, and the in-place layout is the one to serve with.
//!
//! Sources are encoded one by one, as when alone, so that rounding does not depend on who else is there, and equal
//! sources are encoded once as long as the model's encoder cache holds them.
//!
//! A source's row is admitted only when the memory that it may come to need is free, so that nothing in flight has to be
//! given up: see [`EngineOptions::max_bytes`]. Requests wait in a line, each of which gives one row in turn; the row that
//! does not fit is waited for, so none is passed over for ever.
//!
//! A request ends at its deadline whoever notices: a thread of the engine before and after each run, or its caller, who waits no
//! longer than that for an event. The steps that it shares with others are not interrupted.
//!
//! Several copies of a model, each on a device of its own, have one line: the thread of each takes the next row when it has
//! room, so that no device is without work while a row waits, and rows of one request may be computed by several. Of few rows
//! each takes its share only, and leaves the next to one that has none.

mod plan;
mod rows;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::process;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use t5gemma_graphs::interface::CacheLayout;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::Hypothesis;
use crate::item::Call;
use crate::model::Model;
use crate::options::GenerationConfig;
use plan::{Need, Plan};
use worker::{Message, Running, Worker};

/// The bounds of an [`Engine`]: of rows and bytes for each copy of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Target rows in flight at most: the beams or samples of all sources together. 64 by default.
    pub max_rows: usize,
    /// Bytes of keys, values and logits that rows in flight may come to need at most, each row counted with the longest
    /// source and the longest target of all; 4 GiB by default. The weights and the scratch memory of a run come on top.
    pub max_bytes: usize,
    /// Sources in flight at most; as many as there are rows for by default.
    pub max_sources: usize,
    /// Requests that wait for all of their rows to be admitted at most; 1024 by default. Of all copies together.
    pub max_waiting: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { max_rows: 64, max_bytes: 4 << 30, max_sources: usize::MAX, max_waiting: 1024 }
    }
}

impl EngineOptions {
    /// Refuses bounds within which nothing can be done.
    fn check(&self) -> Result<(), Error> {
        let EngineOptions { max_rows, max_bytes, max_sources, max_waiting } = *self;
        let bounds = [
            ("max_rows", max_rows),
            ("max_bytes", max_bytes),
            ("max_sources", max_sources),
            ("max_waiting", max_waiting),
        ];
        match bounds.into_iter().find(|&(_, bound)| bound == 0) {
            Some((name, _)) => Err(Error::input(name, "at least 1", "0")),
            None => Ok(()),
        }
    }
}

/// What is asked of an [`Engine`].
#[derive(Clone, Debug)]
pub struct Request {
    /// The sources, which are admitted one by one.
    pub batch: Batch,
    /// How their targets are generated. `max_time` begins when the first source is admitted.
    pub options: GenerationConfig,
    /// When the request is given up, done or not, waiting or in flight.
    pub deadline: Option<Instant>,
}

impl Request {
    /// A request without a deadline.
    pub fn new(batch: Batch, options: GenerationConfig) -> Request {
        Request { batch, options, deadline: None }
    }
}

/// What happens to a request, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next token of a source row's first hypothesis is certain.
    Token {
        /// The source's row in the request's batch.
        row: usize,
        /// The token.
        token: i64,
    },
    /// A source row is finished; all its tokens have been told.
    Row {
        /// The source's row in the request's batch.
        row: usize,
        /// The `num_return_sequences` hypotheses, of beams the best first.
        hypotheses: Vec<Hypothesis>,
    },
}

/// What an [`Engine`] has done and is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests that were taken, the later ones too.
    pub submitted: u64,
    /// Requests that were answered.
    pub finished: u64,
    /// Requests that ended with an error, those cancelled or too late included.
    pub failed: u64,
    /// Requests of which a source has not been admitted.
    pub waiting_requests: usize,
    /// Sources that have not been admitted.
    pub waiting_sources: usize,
    /// Sources in flight.
    pub sources: usize,
    /// Target rows in flight.
    pub rows: usize,
    /// Bytes that the rows in flight may come to need, as [`EngineOptions::max_bytes`] counts.
    pub planned_bytes: usize,
    /// Runs of a decoder graph so far.
    pub steps: u64,
    /// Target rows in all of them together: divided by `steps`, how well steps were shared.
    pub stepped_rows: u64,
}

/// Generates for many at once, on a thread for each copy of the model. Dropping it is [`Engine::shutdown`].
///
/// A process that is forked has none of the engine's threads: there, everything that is asked of the engine and its requests fails
/// with [`Error::Forked`].
pub struct Engine {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    threads: Vec<ThreadId>,
}

/// What the engine's threads and its callers share.
struct Shared {
    /// The copies of the model, each with what stops its run in progress.
    copies: Vec<(Arc<Model>, Cancellation)>,
    options: EngineOptions,
    plan: Plan,
    /// Whose threads they are.
    process: u32,
    line: Mutex<Line>,
    /// Something was submitted, cancelled or closed.
    changed: Condvar,
    /// A request has ended, or a thread has nothing left to do.
    ended: Condvar,
}

/// What tells requests apart, in the order of their submission.
type Id = u64;

/// The requests that have not ended, and what is told of all.
#[derive(Default)]
struct Line {
    requests: BTreeMap<Id, Progress>,
    /// Those with sources to be admitted; the next source is the first's.
    waiting: VecDeque<Id>,
    phase: Phase,
    /// Threads that wait, because they have no rows in flight and there are none to admit.
    idle: usize,
    /// Threads that have not ended.
    alive: usize,
    submitted: u64,
    finished: u64,
    failed: u64,
    /// What each copy of the model is doing: the fields that are not the line's.
    doing: Vec<EngineStats>,
}

/// A request that has not ended.
struct Progress {
    running: Arc<Running>,
    /// The next source to be admitted.
    next: usize,
    /// Sources that are not finished.
    left: usize,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// Nothing more is taken.
    Draining,
    /// Nothing more is done.
    Closed,
}

impl Line {
    /// Sources that have not been admitted.
    fn waiting_sources(&self) -> usize {
        let waiting = self.waiting.iter().filter_map(|id| self.requests.get(id));
        waiting.map(|progress| progress.running.call.batch.rows() - progress.next).sum()
    }

    /// What is told of one copy of the model, or of several together.
    fn stats(&self, copies: &[EngineStats]) -> EngineStats {
        let of_line = EngineStats {
            submitted: self.submitted,
            finished: self.finished,
            failed: self.failed,
            waiting_requests: self.waiting.len(),
            waiting_sources: self.waiting_sources(),
            ..EngineStats::default()
        };
        copies.iter().fold(of_line, |sum, copy| EngineStats {
            sources: sum.sources + copy.sources,
            rows: sum.rows + copy.rows,
            planned_bytes: sum.planned_bytes + copy.planned_bytes,
            steps: sum.steps + copy.steps,
            stepped_rows: sum.stepped_rows + copy.stepped_rows,
            ..sum
        })
    }
}

impl Shared {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That this is the process of the engine's threads. In another the line may be locked for ever.
    fn check_process(&self) -> Result<(), Error> {
        match self.process == process::id() {
            true => Ok(()),
            false => Err(Error::Forked { process: self.process }),
        }
    }

    /// Ends a request, unless it has ended. What is answered too late is not answered.
    fn end(&self, request: &Running, result: Result<(), Error>) {
        let mut line = self.line();
        if line.requests.remove(&request.id).is_none() {
            return;
        }
        line.waiting.retain(|&waiting| waiting != request.id);
        let result = result.and_then(|()| request.cancel.check());
        match &result {
            Ok(()) => line.finished += 1,
            Err(_) => line.failed += 1,
        }
        request.has_ended.store(true, Ordering::SeqCst);
        drop(line);
        let _ = request.events.send(Message::Ended(result));
        self.ended.notify_all();
    }

    /// Ends everything at once.
    fn close(&self) {
        let mut line = self.line();
        line.phase = Phase::Closed;
        line.requests.values().for_each(|progress| progress.running.cancel.cancel());
        drop(line);
        self.copies.iter().for_each(|(_, stop)| stop.cancel());
        self.changed.notify_all();
        self.ended.notify_all();
    }
}

/// Closes the line when a thread of a copy ends, however it does.
struct Closing {
    shared: Arc<Shared>,
    copy: usize,
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut line = self.shared.line();
        line.phase = Phase::Closed;
        line.alive -= 1;
        line.failed += line.requests.len() as u64;
        line.waiting.clear();
        // Their callers notice that nobody is left to tell them anything.
        line.requests.clear();
        let doing = &mut line.doing[self.copy];
        (doing.sources, doing.rows, doing.planned_bytes) = (0, 0, 0);
        drop(line);
        self.shared.changed.notify_all();
        self.shared.ended.notify_all();
    }
}

impl Engine {
    /// Whether all rows in flight share every step with this model; otherwise only those do that were admitted together.
    pub fn shares_all_steps(model: &Model) -> bool {
        model.layout() == CacheLayout::InPlace
    }

    /// Starts a thread that generates with `model`, which may be used by others meanwhile; they take turns.
    ///
    /// # Errors
    /// Bounds of 0.
    pub fn new(model: Arc<Model>, options: EngineOptions) -> Result<Engine, Error> {
        Engine::start(Plan::of(&model), vec![model], options)
    }

    /// Starts a thread for each of several copies of a model, opened on devices of their own, with these bounds for each; all
    /// take what is submitted from one line.
    ///
    /// # Errors
    /// No model, models that are not copies of one, or bounds of 0.
    pub fn of_copies(models: &[Arc<Model>], options: EngineOptions) -> Result<Engine, Error> {
        let Some(first) = models.first() else { return Err(Error::input("models", "at least one", "none")) };
        // Graphs and weights, as their hashes tell.
        let (weights, graphs) = (&first.manifest().weights.record, &first.manifest().graphs);
        let is_copy = |model: &Model| model.manifest().weights.record == *weights && model.manifest().graphs == *graphs;
        if let Some(at) = models.iter().position(|model| !is_copy(model)) {
            return Err(Error::input(format!("models[{at}]"), "a copy of models[0]", "another model"));
        }
        if models.len() > 1 && models.iter().any(|model| model.captures()) {
            // What one captures fails when another takes memory meanwhile.
            let expected = "one model, where steps are captured as CUDA graphs";
            return Err(Error::input("models", expected, models.len().to_string()));
        }
        Engine::start(Plan::of(first), models.to_vec(), options)
    }

    fn start(plan: Plan, models: Vec<Arc<Model>>, options: EngineOptions) -> Result<Engine, Error> {
        options.check()?;
        let (doing, alive) = (vec![EngineStats::default(); models.len()], models.len());
        let shared = Arc::new(Shared {
            copies: models.into_iter().map(|model| (model, Cancellation::new())).collect(),
            options,
            plan,
            process: process::id(),
            line: Mutex::new(Line { doing, alive, ..Line::default() }),
            changed: Condvar::new(),
            ended: Condvar::new(),
        });
        let worker = |copy| {
            let of_worker = shared.clone();
            thread::spawn(move || {
                // Whether it returns or panics, nobody shall wait for it any more.
                let _closing = Closing { shared: of_worker.clone(), copy };
                Worker::new(of_worker, copy).run();
            })
        };
        let workers: Vec<_> = (0..shared.copies.len()).map(worker).collect();
        let threads = workers.iter().map(|worker| worker.thread().id()).collect();
        Ok(Engine { shared, workers: Mutex::new(workers), threads })
    }

    /// Submits a request. It is checked here, by the caller's thread, where its constraints are compiled too.
    ///
    /// # Errors
    /// What [`Model::generate_batch`] refuses; [`Error::TooLarge`] for a source that can never be admitted; [`Error::Busy`] if
    /// too many requests are waiting; [`Error::Closed`] after [`Engine::drain`] or [`Engine::shutdown`]; [`Error::Forked`]. One
    /// whose deadline has passed is taken, and fails by it.
    pub fn submit(&self, request: Request) -> Result<Generation, Error> {
        self.shared.check_process()?;
        let Request { batch, options, deadline } = request;
        let cancel = deadline.map_or_else(Cancellation::new, Cancellation::until);
        let call = Call::new(&self.shared.copies[0].0, &batch, &options, &cancel)?;
        for row in 0..call.batch.rows() {
            self.shared.plan.check(&Need::of(&call, row), &self.shared.options)?;
        }
        let rows = call.batch.rows();
        let (events, received) = mpsc::channel();
        let mut line = self.shared.line();
        if line.phase != Phase::Open {
            return Err(Error::Closed);
        }
        if line.waiting.len() >= self.shared.options.max_waiting {
            return Err(Error::Busy { waiting: line.waiting.len() });
        }
        let id = line.submitted;
        line.submitted += 1;
        let running = Arc::new(Running::new(id, call, cancel.clone(), events));
        line.requests.insert(id, Progress { running: running.clone(), next: 0, left: rows });
        line.waiting.push_back(id);
        drop(line);
        if let Err(error) = cancel.check() {
            self.shared.end(&running, Err(error));
        }
        self.shared.changed.notify_all();
        Ok(Generation { events: received, rows, id, cancel, shared: self.shared.clone(), has_ended: false })
    }

    /// The copies of the model that it generates with.
    pub fn copies(&self) -> usize {
        self.shared.copies.len()
    }

    /// What the engine has done and is doing. Of an engine of another process nothing, see [`Engine::check_process`].
    pub fn stats(&self) -> EngineStats {
        if self.check_process().is_err() {
            return EngineStats::default();
        }
        let line = self.shared.line();
        line.stats(&line.doing)
    }

    /// The same of each copy of the model: what is in flight and the steps are its own, and the requests those of all.
    pub fn stats_of_copies(&self) -> Vec<EngineStats> {
        if self.check_process().is_err() {
            return vec![EngineStats::default(); self.copies()];
        }
        let line = self.shared.line();
        line.doing.iter().map(|&doing| line.stats(&[doing])).collect()
    }

    /// That the engine's threads are this process's, and not those of one that it was forked from.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn check_process(&self) -> Result<(), Error> {
        self.shared.check_process()
    }

    /// Takes no more requests, and waits until all that were taken have ended and nothing is in flight: [`Engine::stats`] are then
    /// final.
    ///
    /// # Errors
    /// [`Error::Forked`], or a function given with options that calls this on a thread of the engine, for which that would wait.
    pub fn drain(&self) -> Result<(), Error> {
        self.check_waiting()?;
        let mut line = self.shared.line();
        if line.phase == Phase::Open {
            line.phase = Phase::Draining;
        }
        loop {
            let is_done = match line.phase {
                Phase::Closed => line.alive == 0,
                _ => line.requests.is_empty() && line.idle == line.alive,
            };
            if is_done {
                return Ok(());
            }
            line = self.shared.ended.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends everything at once: requests that are not done end with [`Error::Cancelled`]. Returns when the threads have
    /// ended.
    ///
    /// # Errors
    /// As [`Engine::drain`].
    pub fn shutdown(&self) -> Result<(), Error> {
        self.check_waiting()?;
        self.shared.close();
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            // Its panic was reported where it happened.
            let _ = worker.join();
        }
        Ok(())
    }

    /// That this thread can wait for the engine's.
    fn check_waiting(&self) -> Result<(), Error> {
        self.check_process()?;
        match self.threads.contains(&thread::current().id()) {
            false => Ok(()),
            true => Err(Error::Unsupported {
                what: "a function that the engine calls cannot wait for the engine to end".into(),
                remedy: "drain it or shut it down from another thread".into(),
            }),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.check_process().is_ok() && self.shutdown().is_err() {
            // On a thread of its own, which ends after this call.
            self.shared.close();
        }
    }
}

/// A request that an [`Engine`] was given: the events of its rows, as an iterator that waits for them and ends after the
/// last row or an error. Dropping it cancels the request.
pub struct Generation {
    events: Receiver<Message>,
    rows: usize,
    id: Id,
    cancel: Cancellation,
    shared: Arc<Shared>,
    has_ended: bool,
}

impl Generation {
    /// The number of source rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Ends the request at the next step with [`Error::Cancelled`], unless it is done before.
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// A way to cancel the request from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller { cancel: self.cancel.clone(), shared: self.shared.clone() }
    }

    /// The next event, if it comes within `timeout`; [`PollResult::Ended`] when there are no more.
    pub fn next_timeout(&mut self, timeout: Duration) -> PollResult {
        if self.has_ended {
            return PollResult::Ended;
        }
        match self.receive(Some(timeout)) {
            Some(message) => self.take(message).map_or(PollResult::Ended, PollResult::Event),
            None => PollResult::TimedOut,
        }
    }

    /// The next message, if it comes within `timeout`. At its deadline the request is ended, whatever keeps the engine.
    fn receive(&self, timeout: Option<Duration>) -> Option<Message> {
        if let Err(error) = self.shared.check_process() {
            return Some(Message::Ended(Err(error)));
        }
        let left = self.cancel.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let received = match [timeout, left].into_iter().flatten().min() {
            Some(wait) => self.events.recv_timeout(wait),
            None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout)
                if left.is_some_and(|left| timeout.is_none_or(|timeout| left <= timeout)) =>
            {
                let running = self.shared.line().requests.get(&self.id).map(|progress| progress.running.clone());
                if let Some(running) = running {
                    self.shared.end(&running, Err(Error::Deadline));
                }
                // Whoever has ended it sends the last message.
                Some(self.events.recv().unwrap_or(Message::Ended(Err(Error::Closed))))
            }
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Message::Ended(Err(Error::Closed))),
        }
    }

    /// Waits for all rows and returns what [`Model::generate_batch`] returns.
    ///
    /// # Errors
    /// What a run can fail by; [`Error::Cancelled`], [`Error::Deadline`]; [`Error::Closed`] if the engine's thread is gone;
    /// [`Error::Forked`].
    pub fn wait(mut self) -> Result<Vec<Vec<Hypothesis>>, Error> {
        let mut rows = vec![Vec::new(); self.rows];
        for event in self.by_ref() {
            if let Event::Row { row, hypotheses } = event? {
                rows[row] = hypotheses;
            }
        }
        Ok(rows)
    }

    fn take(&mut self, message: Message) -> Option<Result<Event, Error>> {
        match message {
            Message::Event(event) => Some(Ok(event)),
            Message::Ended(result) => {
                self.has_ended = true;
                result.err().map(Err)
            }
        }
    }
}

/// What waiting for an event came to.
#[derive(Clone, Debug)]
pub enum PollResult {
    /// An event, or why the request failed, behind which nothing comes.
    Event(Result<Event, Error>),
    /// Nothing happened in that time.
    TimedOut,
    /// Everything has been told.
    Ended,
}

impl Iterator for Generation {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Result<Event, Error>> {
        if self.has_ended {
            return None;
        }
        let message = self.receive(None)?;
        self.take(message)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.has_ended {
            self.cancel();
        }
    }
}

/// Cancels one request, from any thread.
#[derive(Clone)]
pub struct Canceller {
    cancel: Cancellation,
    shared: Arc<Shared>,
}

impl Canceller {
    /// See [`Generation::cancel`].
    pub fn cancel(&self) {
        if self.shared.check_process().is_err() {
            return;
        }
        self.cancel.cancel();
        // The lock is taken so that a thread is either before looking or waiting.
        drop(self.shared.line());
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_shared_and_its_generations_travel_between_threads() {
        fn check_shared<T: Send + Sync>() {}
        fn check_sent<T: Send>() {}
        check_shared::<Engine>();
        check_shared::<Canceller>();
        check_sent::<Generation>();
    }
}
