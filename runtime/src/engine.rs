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
mod generation;
mod queue;
mod rows;
mod worker;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Instant;

use t5gemma_graphs::interface::CacheLayout;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::Hypothesis;
use crate::item::Call;
use crate::memory::{Footprint, MemoryModel};
use crate::model::Model;
use crate::options::GenerationConfig;
pub use generation::{Canceller, Generation, PollResult};
use queue::{ActiveRequest, CloseOnDrop, Pending, Phase, Shared};
use worker::Worker;

/// The limits of an [`Engine`]; those of rows, bytes and sources apply to each copy of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Maximum number of target rows in flight: the beams or samples of all sources together. 64 by default.
    pub max_rows: usize,
    /// Maximum bytes of keys, values and logits that the rows in flight may eventually need, each row counted with the
    /// longest source and the longest target of all; 4 GiB by default. Weights and scratch memory come on top.
    pub max_bytes: usize,
    /// Maximum number of sources in flight; by default limited only by the rows.
    pub max_sources: usize,
    /// Maximum number of requests with sources waiting to be admitted, for all copies together; 1024 by default.
    pub max_waiting: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { max_rows: 64, max_bytes: 4 << 30, max_sources: usize::MAX, max_waiting: 1024 }
    }
}

impl EngineOptions {
    /// Sets [`EngineOptions::max_rows`].
    pub fn max_rows(self, max_rows: usize) -> EngineOptions {
        EngineOptions { max_rows, ..self }
    }

    /// Sets [`EngineOptions::max_bytes`].
    pub fn max_bytes(self, max_bytes: usize) -> EngineOptions {
        EngineOptions { max_bytes, ..self }
    }

    /// Sets [`EngineOptions::max_sources`].
    pub fn max_sources(self, max_sources: usize) -> EngineOptions {
        EngineOptions { max_sources, ..self }
    }

    /// Sets [`EngineOptions::max_waiting`].
    pub fn max_waiting(self, max_waiting: usize) -> EngineOptions {
        EngineOptions { max_waiting, ..self }
    }

    /// Rejects limits within which nothing can run.
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

/// A request to an [`Engine`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// The sources, which are admitted one by one.
    pub batch: Batch,
    /// The generation options. The clock of `max_time` starts when the first source is admitted.
    pub config: GenerationConfig,
    /// When the request, waiting or in flight, ends with [`Error::Deadline`] if it is not done.
    pub deadline: Option<Instant>,
}

impl Request {
    /// A request without a deadline.
    pub fn new(batch: Batch, config: GenerationConfig) -> Request {
        Request { batch, config, deadline: None }
    }

    /// Sets [`Request::deadline`].
    pub fn deadline(self, deadline: Instant) -> Request {
        Request { deadline: Some(deadline), ..self }
    }
}

/// An event of a request.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The next token of a source row's first hypothesis is final.
    Token {
        /// The source's row in the request's batch.
        row: usize,
        /// The token.
        token: i64,
    },
    /// A source row is finished; it follows the events of all its tokens.
    Row {
        /// The source's row in the request's batch.
        row: usize,
        /// The `num_return_sequences` hypotheses; those of beam search are best first.
        hypotheses: Vec<Hypothesis>,
    },
}

/// Statistics of an [`Engine`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests that were accepted, including those that have ended.
    pub submitted: u64,
    /// Requests that succeeded.
    pub finished: u64,
    /// Requests that ended with an error, including cancellations and deadlines.
    pub failed: u64,
    /// Requests with a source that has not been admitted.
    pub waiting_requests: usize,
    /// Sources that have not been admitted.
    pub waiting_sources: usize,
    /// Sources in flight.
    pub sources: usize,
    /// Target rows in flight.
    pub rows: usize,
    /// Bytes that the rows in flight may eventually need, counted as for [`EngineOptions::max_bytes`].
    pub planned_bytes: usize,
    /// Runs of a decoder graph.
    pub steps: u64,
    /// Target rows of all these runs; divided by `steps`, the average number of rows that shared a step.
    pub stepped_rows: u64,
}

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
    /// Those of [`Model::generate_batch`]; [`Error::TooLarge`] for a source that can never be admitted; [`Error::Busy`]
    /// if too many requests are waiting; [`Error::Closed`] after [`Engine::drain`] or [`Engine::shutdown`];
    /// [`Error::Forked`]. A request whose deadline has passed is accepted and ends with [`Error::Deadline`].
    pub fn submit(&self, request: Request) -> Result<Generation, Error> {
        self.shared.check_process()?;
        let in_call = self.shared.copies[0].model.enter()?;
        let Request { batch, config, deadline } = request;
        let cancel = deadline.map_or_else(Cancellation::new, Cancellation::until);
        let call = Call::new(&self.shared.copies[0].model, &batch, &config, &cancel)?;
        for row in 0..call.batch.rows() {
            self.shared.memory.check(&Footprint::of(&call, row), &self.shared.options)?;
        }
        let rows = call.batch.rows();
        let (events, received) = mpsc::channel();
        let mut queue = self.shared.queue();
        if queue.phase != Phase::Open {
            return Err(Error::Closed);
        }
        if queue.waiting.len() >= self.shared.options.max_waiting {
            return Err(Error::Busy { waiting: queue.waiting.len() });
        }
        let id = queue.submitted;
        queue.submitted += 1;
        let request = Arc::new(ActiveRequest::new(id, call, cancel.clone(), events, in_call));
        queue.requests.insert(id, Pending { request: request.clone(), next: 0, unfinished: rows });
        queue.waiting.push_back(id);
        drop(queue);
        if let Err(error) = cancel.check() {
            self.shared.end(&request, Err(error));
        }
        self.shared.changed.notify_all();
        Ok(Generation::new(self.shared.clone(), id, rows, cancel, received))
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
