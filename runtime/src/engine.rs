//! `Engine`: continuous batching. Requests are submitted from any thread at any time; their rows join the rows in
//! flight between two steps, each with its own beams, lengths and options, and leave when they are finished. The result
//! of a request is what [`Model::generate_batch`] returns for it alone.
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
//!         _ => {}
//!     }
//! }
//! # Ok::<(), t5gemma_runtime::Error>(())
//! ```
//!
//! # Design
//! How rows of different lengths share a step depends on the model's cache layout. The graph for a cache in place takes
//! a position for each row (`cache_position`), so all rows in flight share every step, and a row may join at any. The
//! growing layout has one position for all rows and no mask over the target: rows can share steps only with those that
//! began with them. There, rows that are admitted together form a cohort, which runs its own steps in turn with the
//! other cohorts. (A mask and a position for each row would cost the portable graphs operators in every layer, and left
//! padding would change results.) So cohorts are exact but read the weights once each, and the in-place layout is the
//! one to serve with.
//!
//! Sources are encoded one by one, as when alone, so that rounding does not depend on other requests, and equal sources
//! are encoded once as long as the model's encoder cache holds them.
//!
//! A source is admitted only when the memory that it may come to need is free, so that nothing in flight has to be
//! evicted: see [`EngineOptions::max_bytes`]. Requests wait in a queue, which takes one source of each in turn. If a
//! source does not fit, the queue waits for it, so that none starves.
//!
//! A request ends at its deadline, whether a thread of the engine notices, before and after each run, or its caller,
//! who waits no longer than that for an event. The steps that it shares with others are not interrupted.
//!
//! Several copies of a model, each on its own device, share one queue: the thread of each takes the next source when it
//! has room, so that no device is idle while a source waits, and rows of one request may be computed by several. If few
//! sources wait, each takes only its share and leaves the next to an idle one.

mod admission;
mod begin;
mod generation;
mod line;
mod options;
mod queue;
mod request;
mod rows;
mod sink;
mod stats;
mod worker;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use t5gemma_graphs::interface::CacheLayout;

use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::item::Call;
use crate::memory::{Footprint, MemoryModel};
use crate::model::Model;
pub use generation::{Canceller, Generation, PollResult};
use line::{Load, RequestId, Waiting};
pub use options::EngineOptions;
use queue::{ActiveRequest, CloseOnDrop, Pending, Phase, Shared};
pub use request::{Event, Message, Priority, Request, RequestStats};
use sink::{Outlet, Sink};
pub use stats::EngineStats;
use worker::Worker;

/// Serves many requests at once, with one thread per copy of the model. Dropping it calls [`Engine::shutdown`].
///
/// A forked process has none of the engine's threads: there, every call of the engine and its requests fails with
/// [`Error::Forked`].
pub struct Engine {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    threads: Vec<ThreadId>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { copies, options, .. } = &*self.shared;
        f.debug_struct("Engine").field("copies", &copies.len()).field("options", options).finish_non_exhaustive()
    }
}

impl Engine {
    /// Whether all rows in flight share every step with this model; otherwise only rows that were admitted together do.
    pub fn shares_all_steps(model: &Model) -> bool {
        model.layout() == CacheLayout::InPlace
    }

    /// Starts a thread that generates with `model`. Other callers of the model take turns with it.
    ///
    /// # Errors
    /// Bounds of 0.
    pub fn new(model: Arc<Model>, options: EngineOptions) -> Result<Engine, Error> {
        Engine::start(MemoryModel::of(&model), vec![model], options)
    }

    /// Starts one thread per copy of a model, each copy opened on another device. They share one queue; the limits
    /// apply to each.
    ///
    /// # Errors
    /// No model, models that are not copies of one, or bounds of 0.
    pub fn of_copies(models: &[Arc<Model>], options: EngineOptions) -> Result<Engine, Error> {
        let Some(first) = models.first() else { return Err(Error::input("models", "at least one", "none")) };
        // Copies have graphs and weights of the same hashes.
        let (weights, graphs) = (&first.manifest().weights.record, &first.manifest().graphs);
        let is_copy = |model: &Model| model.manifest().weights.record == *weights && model.manifest().graphs == *graphs;
        if let Some(at) = models.iter().position(|model| !is_copy(model)) {
            return Err(Error::input(format!("models[{at}]"), "a copy of models[0]", "another model"));
        }
        if models.len() > 1 && models.iter().any(|model| model.captures_cuda_graphs()) {
            // A capture fails if another thread allocates memory meanwhile.
            let expected = "one model, because its steps are captured as CUDA graphs";
            return Err(Error::input("models", expected, models.len().to_string()));
        }
        Engine::start(MemoryModel::of(first), models.to_vec(), options)
    }

    fn start(memory: MemoryModel, models: Vec<Arc<Model>>, options: EngineOptions) -> Result<Engine, Error> {
        options.check()?;
        let shared = Arc::new(Shared::new(models, memory, options));
        let worker = |copy| {
            let of_worker = shared.clone();
            thread::spawn(move || {
                // Whether the thread returns or panics, no caller must keep waiting for it.
                let _guard = CloseOnDrop { shared: of_worker.clone(), copy };
                Worker::new(of_worker, copy).run();
            })
        };
        let workers: Vec<_> = (0..shared.copies.len()).map(worker).collect();
        let threads = workers.iter().map(|worker| worker.thread().id()).collect();
        Ok(Engine { shared, workers: Mutex::new(workers), threads })
    }

    /// Submits a request. The caller's thread checks it and compiles its constraints.
    ///
    /// # Errors
    /// Those of [`Model::generate_batch`]; [`Error::TooLarge`] for a source that can never be admitted, or a request that
    /// the queue can never hold; [`Error::Full`] if too much is waiting; [`Error::Closed`] after [`Engine::drain`] or
    /// [`Engine::shutdown`]; [`Error::Forked`]. A request whose deadline has passed is accepted and ends with
    /// [`Error::Deadline`].
    pub fn submit(&self, request: Request) -> Result<Generation, Error> {
        let rows = request.batch.rows();
        let (events, received) = mpsc::channel();
        let sink = move |message| {
            // A caller that no longer receives has cancelled the request.
            let _ = events.send(message);
        };
        let (id, cancel) = self.enqueue(request, Box::new(sink))?;
        Ok(Generation::new(self.shared.clone(), id, rows, cancel, received))
    }

    /// Submits a request that needs no thread of its own: its messages go to `sink`, whose last one is
    /// [`Message::Ended`], exactly once. The request goes on if the returned [`Canceller`] is dropped; once it is
    /// cancelled or its deadline has passed, it ends before the next step, in flight or waiting.
    ///
    /// The threads of the engine call the sink between steps, one at a time. It must not block, because every row in
    /// flight waits for it: let it hand the message on, for example into an unbounded channel (a request has at most
    /// one event per new token and two per row). It may submit and cancel requests, but not wait for the engine. If it
    /// panics, the request ends and the sink is not called again; other requests are not disturbed. It is not called
    /// in a forked process.
    ///
    /// # Errors
    /// As [`Engine::submit`]; the sink is not called then.
    pub fn submit_to(&self, request: Request, sink: impl FnMut(Message) + Send + 'static) -> Result<Canceller, Error> {
        let (_, cancel) = self.enqueue(request, Box::new(sink))?;
        Ok(Canceller::new(cancel, self.shared.clone()))
    }

    fn enqueue(&self, request: Request, sink: Sink) -> Result<(RequestId, Cancellation), Error> {
        let shared = &*self.shared;
        shared.check_process()?;
        let in_call = shared.copies[0].model.enter()?;
        let Request { batch, config, deadline, priority, tenant } = request;
        let cancel = deadline.map_or_else(Cancellation::new, Cancellation::until);
        let call = Call::new(&shared.copies[0].model, &batch, &config, &cancel)?;
        let sources: Vec<Waiting> = (0..call.batch.rows())
            .map(|row| {
                let footprint = Footprint::of(&call, row);
                shared.memory.check(&footprint, &shared.options)?;
                Ok(shared.memory.waiting(&call, &footprint))
            })
            .collect::<Result<_, Error>>()?;
        let load = Load::of(&sources);
        shared.options.check_alone(&load)?;
        let mut queue = shared.queue();
        if queue.phase != Phase::Open {
            return Err(Error::Closed);
        }
        let retry_after = queue.retry_after();
        shared.options.check_room(&queue.line.load(), &load, retry_after)?;
        let id = queue.submitted;
        queue.submitted += 1;
        let unfinished = sources.len();
        let request = ActiveRequest::new(id, call, cancel.clone(), Outlet::new(sink, load.tokens), in_call);
        queue.requests.insert(id, Pending { request: Arc::new(request), next: 0, unfinished });
        queue.line.push(id, priority, tenant.map(Arc::from), sources);
        queue.changes += 1;
        drop(queue);
        shared.changed.notify_all();
        Ok((id, cancel))
    }

    /// When to submit again if the queue is full: about when the sources that wait now will have been admitted, judging
    /// by how long recent ones were in flight. [`Error::Full`] carries it too.
    pub fn retry_after(&self) -> Duration {
        if self.check_process().is_err() { Duration::ZERO } else { self.shared.queue().retry_after() }
    }

    /// The number of copies of the model.
    pub fn copies(&self) -> usize {
        self.shared.copies.len()
    }

    /// The engine's statistics; all zero in a forked process, see [`Engine::check_process`].
    pub fn stats(&self) -> EngineStats {
        if self.check_process().is_err() {
            return EngineStats::default();
        }
        let queue = self.shared.queue();
        queue.stats(&queue.copy_stats)
    }

    /// The statistics per copy of the model: rows in flight and steps are its own, requests are shared by all.
    pub fn stats_of_copies(&self) -> Vec<EngineStats> {
        if self.check_process().is_err() {
            return vec![EngineStats::default(); self.copies()];
        }
        let queue = self.shared.queue();
        queue.copy_stats.iter().map(|&stats| queue.stats(&[stats])).collect()
    }

    /// Checks that this process has the engine's threads: it has not been forked from the one that has.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn check_process(&self) -> Result<(), Error> {
        self.shared.check_process()
    }

    /// Stops accepting requests, and waits until all accepted ones have ended and nothing is in flight:
    /// [`Engine::stats`] are final then.
    ///
    /// # Errors
    /// [`Error::Forked`], or a call from a function that the engine itself calls, such as a logits processor, which
    /// would wait for itself.
    pub fn drain(&self) -> Result<(), Error> {
        self.check_waiting()?;
        let mut queue = self.shared.queue();
        if queue.phase == Phase::Open {
            queue.phase = Phase::Draining;
        }
        loop {
            let is_done = match queue.phase {
                Phase::Closed => queue.alive == 0,
                _ => queue.requests.is_empty() && queue.idle == queue.alive,
            };
            if is_done {
                return Ok(());
            }
            queue = self.shared.ended.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stops immediately: unfinished requests end with [`Error::Cancelled`]. Returns when the threads have ended.
    ///
    /// # Errors
    /// As [`Engine::drain`].
    pub fn shutdown(&self) -> Result<(), Error> {
        self.check_waiting()?;
        self.shared.close();
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            // A panic was reported where it happened.
            let _ = worker.join();
        }
        Ok(())
    }

    /// Checks that this thread is not one of the engine's, which would wait for itself.
    fn check_waiting(&self) -> Result<(), Error> {
        self.check_process()?;
        if self.threads.contains(&thread::current().id()) {
            return Err(Error::Unsupported {
                what: "a callback of the engine cannot wait for the engine to end".into(),
                remedy: "call drain or shutdown from another thread".into(),
            });
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.check_process().is_ok() && self.shutdown().is_err() {
            // Dropped on one of its own threads, which ends after this call.
            self.shared.close();
        }
    }
}
