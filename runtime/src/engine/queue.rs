//! The state that the engine's threads and callers share: the queue of requests, the copies of the model, and how a
//! request or the whole engine ends.

use std::collections::{BTreeMap, VecDeque};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use super::{EngineOptions, EngineStats, Event};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::fork::InCall;
use crate::item::Call;
use crate::memory::MemoryModel;
use crate::model::Model;
use crate::stop::StoppingCriteria;

/// Identifies a request; ascending in the order of submission.
pub(super) type RequestId = u64;

/// What a caller receives.
pub(super) enum Message {
    Event(Event),
    /// The last message.
    Ended(Result<(), Error>),
}

/// A request as the threads that serve it share it.
pub(super) struct ActiveRequest {
    pub id: RequestId,
    pub call: Call,
    /// Cancelled by its caller, by its deadline, or with the whole engine.
    pub cancel: Cancellation,
    pub events: Sender<Message>,
    /// Set when its first source is admitted.
    stops: OnceLock<Arc<StoppingCriteria>>,
    /// Set with the queue locked, when the last message is sent.
    has_ended: AtomicBool,
    /// From its submission until the engine's threads are done with it.
    _in_call: InCall,
}

impl ActiveRequest {
    pub fn new(
        id: RequestId,
        call: Call,
        cancel: Cancellation,
        events: Sender<Message>,
        in_call: InCall,
    ) -> ActiveRequest {
        let (stops, has_ended) = (OnceLock::new(), AtomicBool::new(false));
        ActiveRequest { id, call, cancel, events, stops, has_ended, _in_call: in_call }
    }

    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// The stopping criteria, whose clock starts with the first call.
    pub fn stops(&self) -> &Arc<StoppingCriteria> {
        self.stops.get_or_init(|| Arc::new(StoppingCriteria::new(&self.call.options)))
    }

    pub fn send(&self, event: Event) {
        // A caller that no longer receives has cancelled the request.
        let _ = self.events.send(Message::Event(event));
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
    /// Requests with sources to be admitted; the next source is the first one's.
    pub waiting: VecDeque<RequestId>,
    pub phase: Phase,
    /// Threads that wait, because they have no rows in flight and there are none to admit.
    pub idle: usize,
    /// Threads that have not ended.
    pub alive: usize,
    pub submitted: u64,
    finished: u64,
    failed: u64,
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
    /// Sources that have not been admitted.
    pub fn waiting_sources(&self) -> usize {
        let waiting = self.waiting.iter().filter_map(|id| self.requests.get(id));
        waiting.map(|pending| pending.request.call.batch.rows() - pending.next).sum()
    }

    /// The statistics of the queue and of these copies of the model together.
    pub fn stats(&self, copies: &[EngineStats]) -> EngineStats {
        let of_queue = EngineStats {
            submitted: self.submitted,
            finished: self.finished,
            failed: self.failed,
            waiting_requests: self.waiting.len(),
            waiting_sources: self.waiting_sources(),
            ..EngineStats::default()
        };
        copies.iter().fold(of_queue, |sum, copy| EngineStats {
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

    /// Ends a request, unless it has ended. A result that comes after the deadline becomes [`Error::Deadline`].
    pub fn end(&self, request: &ActiveRequest, result: Result<(), Error>) {
        let mut queue = self.queue();
        if queue.requests.remove(&request.id).is_none() {
            return;
        }
        queue.waiting.retain(|&waiting| waiting != request.id);
        let result = result.and_then(|()| request.cancel.check());
        match &result {
            Ok(()) => queue.finished += 1,
            Err(_) => queue.failed += 1,
        }
        request.has_ended.store(true, Ordering::SeqCst);
        drop(queue);
        let _ = request.events.send(Message::Ended(result));
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
        queue.waiting.clear();
        // Their callers notice that the sender is gone.
        queue.requests.clear();
        let stats = &mut queue.copy_stats[self.copy];
        (stats.sources, stats.rows, stats.planned_bytes) = (0, 0, 0);
        drop(queue);
        self.shared.changed.notify_all();
        self.shared.ended.notify_all();
    }
}
