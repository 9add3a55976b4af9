//! The state that the engine's threads and callers share: the queue of requests, the copies of the model, and how a
//! request or the whole engine ends.

use std::collections::BTreeMap;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::line::{Line, Load, RequestId};
use super::sink::Outlet;
use super::{EngineOptions, EngineStats, Event};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::fork::InCall;
use crate::item::Call;
use crate::memory::MemoryModel;
use crate::model::Model;
use crate::stop::StoppingCriteria;

/// A request as the threads that serve it share it.
pub(super) struct ActiveRequest {
    pub id: RequestId,
    pub call: Call,
    /// Cancelled by its caller, by its deadline, or with the whole engine.
    pub cancel: Cancellation,
    pub outlet: Outlet,
    /// Set when its first source is admitted.
    stops: OnceLock<Arc<StoppingCriteria>>,
    /// Set with the queue locked, when the last message is sent.
    has_ended: AtomicBool,
    /// From its submission until the engine's threads are done with it.
    _in_call: InCall,
}

impl ActiveRequest {
    pub fn new(id: RequestId, call: Call, cancel: Cancellation, outlet: Outlet, in_call: InCall) -> ActiveRequest {
        let (stops, has_ended) = (OnceLock::new(), AtomicBool::new(false));
        ActiveRequest { id, call, cancel, outlet, stops, has_ended, _in_call: in_call }
    }

    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// The stopping criteria, whose clock starts with the first call.
    pub fn stops(&self) -> &Arc<StoppingCriteria> {
        self.stops.get_or_init(|| Arc::new(StoppingCriteria::new(&self.call.options)))
    }

    /// Tells the caller; a request whose sink has panicked is cancelled.
    pub fn send(&self, event: Event) {
        if !self.outlet.send(event) {
            self.cancel.cancel();
        }
    }
}

/// A copy of the model.
pub(super) struct ModelCopy {
    pub model: Arc<Model>,
    /// Stops its run in progress.
    pub stop: Cancellation,
}

/// What the engine's threads and its callers share.
pub(super) struct Shared {
    pub copies: Vec<ModelCopy>,
    pub options: EngineOptions,
    pub memory: MemoryModel,
    /// The process that the threads belong to.
    process: u32,
    queue: Mutex<Queue>,
    /// Notified when something was submitted, cancelled or closed.
    pub changed: Condvar,
    /// Notified when a request has ended or a thread has nothing left to do.
    pub ended: Condvar,
}

/// The requests that have not ended, and the counts of all.
#[derive(Default)]
pub(super) struct Queue {
    pub requests: BTreeMap<RequestId, Pending>,
    /// Requests with sources to be admitted.
    pub line: Line,
    pub phase: Phase,
    /// Counts what was submitted, cancelled, or begun by another thread.
    pub changes: u64,
    /// Threads that wait, because they have no rows in flight and there are none to admit.
    pub idle: usize,
    /// Threads that have not ended.
    pub alive: usize,
    pub submitted: u64,
    finished: u64,
    failed: u64,
    /// How long a source is in flight, on average of the recent ones.
    mean_flight: Option<Duration>,
    /// For each copy of the model, the statistics that are its own.
    pub copy_stats: Vec<EngineStats>,
}

/// A request that has not ended.
pub(super) struct Pending {
    pub request: Arc<ActiveRequest>,
    /// The next source to be admitted.
    pub next: usize,
    /// Sources that are not finished.
    pub unfinished: usize,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Phase {
    #[default]
    Open,
    /// No more requests are accepted.
    Draining,
    /// Everything ends.
    Closed,
}

impl Queue {
    /// The statistics of the queue and of these copies of the model together.
    pub fn stats(&self, copies: &[EngineStats]) -> EngineStats {
        let Load { requests, sources, rows, tokens, bytes } = self.line.load();
        let of_queue = EngineStats {
            submitted: self.submitted,
            finished: self.finished,
            failed: self.failed,
            waiting_requests: requests,
            waiting_sources: sources,
            waiting_rows: rows,
            waiting_tokens: tokens,
            waiting_bytes: bytes,
            ..EngineStats::default()
        };
        of_queue.with_copies(copies)
    }

    /// Counts a source that was in flight since `admitted`.
    pub fn count_flight(&mut self, admitted: Instant) {
        let time = admitted.elapsed();
        self.mean_flight = Some(self.mean_flight.map_or(time, |mean| (mean * 15 + time) / 16));
    }

    /// When the sources that wait now will have been admitted, judging by the recent ones: as many leave in the mean
    /// time of a flight as are in flight.
    pub fn retry_after(&self) -> Duration {
        let sources: usize = self.copy_stats.iter().map(|copy| copy.sources).sum();
        let mean = self.mean_flight.unwrap_or(Duration::from_secs(1)).as_secs_f64();
        let seconds = mean * self.line.load().sources as f64 / sources.max(1) as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_HINT).min(LONGEST_HINT)
    }
}

/// The longest time after which callers are told to try again.
const LONGEST_HINT: Duration = Duration::from_secs(3600);

impl Shared {
    pub fn new(models: Vec<Arc<Model>>, memory: MemoryModel, options: EngineOptions) -> Shared {
        let (copy_stats, alive) = (vec![EngineStats::default(); models.len()], models.len());
        Shared {
            copies: models.into_iter().map(|model| ModelCopy { model, stop: Cancellation::new() }).collect(),
            options,
            memory,
            process: process::id(),
            queue: Mutex::new(Queue { copy_stats, alive, ..Queue::default() }),
            changed: Condvar::new(),
            ended: Condvar::new(),
        }
    }

    pub fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that this is the process of the engine's threads. In a forked one the queue may be locked for ever.
    pub fn check_process(&self) -> Result<(), Error> {
        if self.process == process::id() { Ok(()) } else { Err(Error::Forked { process: self.process }) }
    }

    /// Lets the threads look at what has changed.
    pub fn wake(&self) {
        // With the lock taken, each thread is either about to look at the queue or waiting for `changed`.
        self.queue().changes += 1;
        self.changed.notify_all();
    }

    /// Ends a request, unless it has ended. A result that comes after the deadline becomes [`Error::Deadline`].
    pub fn end(&self, request: &ActiveRequest, result: Result<(), Error>) {
        let mut queue = self.queue();
        if queue.requests.remove(&request.id).is_none() {
            return;
        }
        queue.line.remove(request.id);
        let result = result.and_then(|()| request.cancel.check());
        match &result {
            Ok(()) => queue.finished += 1,
            Err(_) => queue.failed += 1,
        }
        request.has_ended.store(true, Ordering::SeqCst);
        drop(queue);
        request.outlet.end(result);
        self.ended.notify_all();
    }

    /// Ends everything at once.
    pub fn close(&self) {
        let mut queue = self.queue();
        queue.phase = Phase::Closed;
        queue.requests.values().for_each(|pending| pending.request.cancel.cancel());
        drop(queue);
        self.copies.iter().for_each(|copy| copy.stop.cancel());
        self.changed.notify_all();
        self.ended.notify_all();
    }
}

/// Closes the queue when the thread of a copy ends, by returning or by a panic.
pub(super) struct CloseOnDrop {
    pub shared: Arc<Shared>,
    pub copy: usize,
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.phase = Phase::Closed;
        queue.alive -= 1;
        queue.failed += queue.requests.len() as u64;
        queue.line.clear();
        let left = std::mem::take(&mut queue.requests);
        left.values().for_each(|pending| pending.request.has_ended.store(true, Ordering::SeqCst));
        let stats = &mut queue.copy_stats[self.copy];
        (stats.sources, stats.rows, stats.planned_bytes) = (0, 0, 0);
        drop(queue);
        left.values().for_each(|pending| pending.request.outlet.end(Err(Error::Closed)));
        self.shared.changed.notify_all();
        self.shared.ended.notify_all();
    }
}
