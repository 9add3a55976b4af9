//! `run`: the loop of a job. One thread reads and tokenizes, the engine's threads generate, and this one submits rows,
//! writes windows in their order and finishes shards.
//!
//! # Design
//! Few windows exist at a time: the reader needs a permit for each, and gets one back when a window has been written.
//! While the last rows of a window are in flight, those of the next one already join them, also across shards, so that
//! the engine does not run empty. Rows of a window run longest first: neighbours then have similar lengths, and running
//! out of memory happens early.

mod steps;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread;
use std::time::Duration;

use serde_json::{Map, Value};
use t5gemma_protocol::TokenizedRequest;
use t5gemma_runtime::{Cancellation, Engine, EngineOptions, Error, Event as EngineEvent, Hypothesis, Message};

use crate::answer::{Answered, ResultColumn};
use crate::columns::Columns;
use crate::error::BatchError;
use crate::reader::{Read, Reading};
use crate::settings::Settings;
use crate::shards::Shard;
use crate::store::Store;
use crate::worker::{Generating, Worker, is_of_row};
use crate::writer::{Totals, Writer};
use steps::{Active, Step};

/// The most windows that exist at a time: one whose last rows are in flight, one whose rows join them, one being read.
const WINDOWS: usize = 3;

/// How often to look whether the job was cancelled, and to report progress.
const PATIENCE: Duration = Duration::from_millis(100);

/// What to run.
#[derive(Debug)]
pub struct Job<'a> {
    /// The shards whose outputs are missing.
    pub shards: &'a [Shard],
    /// Where outputs are written.
    pub store: &'a Store,
    /// What decides on their bytes.
    pub settings: &'a Settings,
    /// The columns of all shards.
    pub columns: &'a Columns,
    /// The model.
    pub worker: Worker<'a>,
    /// Rows that are sorted by length at a time. Bytes of vectors and scores may depend on it, others not.
    pub window_rows: usize,
}

/// What happens while a job runs.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The output of a shard is complete; `is_new` is false if another process has written it meanwhile.
    Done {
        /// The shard.
        shard: &'a Shard,
        /// Its rows.
        rows: u64,
        /// How many of them have an error.
        errors: u64,
        /// Whether this process's output was published.
        is_new: bool,
    },
    /// A shard cannot be finished.
    Failed {
        /// The shard.
        shard: &'a Shard,
        /// Why, with the file.
        problem: String,
    },
    /// Several times a second.
    Running(Progress),
}

/// How far a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Rows that have been answered.
    pub rows: u64,
    /// Tokens of their sources and targets.
    pub tokens: u64,
    /// Which part of the input's bytes has been answered, from 0 to 1.
    pub part: f64,
}

/// What a job has done.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// Shards whose outputs were written.
    pub written: usize,
    /// Shards whose outputs another process has written meanwhile.
    pub written_elsewhere: usize,
    /// Shards that failed.
    pub failed: usize,
    /// Rows and tokens of the written shards.
    totals: Totals,
}

impl Summary {
    /// Rows and tokens of the written shards by name.
    pub fn totals(&self) -> Map<String, Value> {
        self.totals.to_json()
    }
}

/// What the threads tell the loop.
enum Told {
    Read(Read),
    Ended { window: u64, row: usize, result: Result<Vec<Hypothesis>, Error> },
}

/// Computes the missing outputs of a job and publishes each when it is complete.
///
/// # Errors
/// An output folder that was begun with other settings or cannot be written, an engine that cannot be started, and a
/// cancellation; a shard that fails is an event, and the others go on.
pub fn run(job: &Job, cancel: &Cancellation, on_event: &mut dyn FnMut(Event)) -> Result<Summary, BatchError> {
    job.store.prepare()?;
    job.settings.begin(job.store)?;
    let engine = match &job.worker {
        Worker::Generate(generating) if generating.fixed_batches.is_none() => Some(start(generating)?),
        _ => None,
    };
    let results = job.worker.results(job.columns);
    let abandoned: Vec<AtomicBool> = job.shards.iter().map(|_| AtomicBool::new(false)).collect();
    let tokenize = |fields| job.worker.tokenize(fields);
    let reading = Reading {
        shards: job.shards,
        abandoned: &abandoned,
        columns: job.columns,
        task: job.worker.task(),
        results: &results,
        window_rows: job.window_rows.max(1),
        tokenize: &tokenize,
    };
    let (sender, told) = mpsc::channel();
    let (permit, permits) = mpsc::channel();
    thread::scope(|scope| {
        let of_reader = sender.clone();
        scope.spawn(move || reading.run(&permits, &|read| of_reader.send(Told::Read(read)).is_ok()));
        let mut running = Running {
            job,
            results: &results,
            vectors: job.worker.width_beside(job.columns),
            abandoned: &abandoned,
            engine: engine.as_ref(),
            in_flight: 0,
            sender,
            told,
            permit,
            steps: VecDeque::new(),
            first_window: 0,
            current: None,
            summary: Summary::default(),
            progress: Progress::default(),
            bytes_done: 0.0,
            is_read: false,
            on_event,
        };
        // Dropped before the scope ends, so that the reader does not wait for a permit.
        let result = running.run(cancel);
        let summary = std::mem::take(&mut running.summary);
        drop(running);
        result.map(|()| summary)
    })
}

fn start(generating: &Generating) -> Result<Engine, Error> {
    let EngineOptions { max_rows, max_bytes, max_sources, .. } = generating.engine.clone();
    let options = EngineOptions::default().max_rows(max_rows).max_bytes(max_bytes).max_sources(max_sources);
    Engine::of_copies(&generating.models, options.max_waiting(usize::MAX))
}

struct Running<'a, 'j> {
    job: &'a Job<'j>,
    results: &'a [ResultColumn],
    /// The numbers of a vector that is written beside the output, if any is.
    vectors: Option<usize>,
    abandoned: &'a [AtomicBool],
    engine: Option<&'a Engine>,
    /// Rows that were submitted and have not ended.
    in_flight: usize,
    sender: Sender<Told>,
    told: Receiver<Told>,
    permit: Sender<()>,
    steps: VecDeque<Step>,
    /// The number of the first step, counted from the beginning.
    first_window: u64,
    /// The output that the first step belongs to.
    current: Option<Writer>,
    summary: Summary,
    progress: Progress,
    /// Bytes of the input that were answered in earlier shards.
    bytes_done: f64,
    is_read: bool,
    on_event: &'a mut dyn FnMut(Event),
}

impl Running<'_, '_> {
    fn run(&mut self, cancel: &Cancellation) -> Result<(), BatchError> {
        for _ in 0..WINDOWS {
            let _ = self.permit.send(());
        }
        loop {
            self.receive();
            cancel.check()?;
            self.work(cancel)?;
            self.write();
            (self.on_event)(Event::Running(self.progress));
            if let Some(writer) = &mut self.current {
                writer.renew();
            }
            if self.is_read && self.steps.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes what the threads have told; waits for it if there is nothing else to do.
    fn receive(&mut self) {
        let mut can_wait = !self.can_work();
        loop {
            let told = match can_wait {
                true => self.told.recv_timeout(PATIENCE),
                false => self.told.try_recv().map_err(|error| match error {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                }),
            };
            can_wait = false;
            match told {
                Ok(Told::Read(Read::Begin { shard, carried })) => self.steps.push_back(Step::Begin { shard, carried }),
                Ok(Told::Read(Read::Window { shard, window })) => {
                    self.steps.push_back(Step::Window(Box::new(Active::new(shard, window))));
                }
                Ok(Told::Read(Read::End { shard, result })) => self.steps.push_back(Step::End { shard, result }),
                Ok(Told::Read(Read::Finished)) => self.is_read = true,
                Ok(Told::Ended { window, row, result }) => self.ended(window, row, result),
                // This loop has a sender itself.
                Err(_) => return,
            }
        }
    }

    /// The windows with rows to submit, in order.
    fn windows(&mut self) -> impl Iterator<Item = (u64, &mut Active)> {
        let first = self.first_window;
        self.steps.iter_mut().enumerate().filter_map(move |(at, step)| match step {
            Step::Window(active) if !active.todo.is_empty() => Some((first + at as u64, &mut **active)),
            _ => None,
        })
    }

    fn can_work(&mut self) -> bool {
        self.in_flight < self.most_in_flight() && self.windows().next().is_some()
    }

    /// The most rows that are submitted at a time: those in flight and as many that wait, so that none of the engine's
    /// places is ever empty.
    fn most_in_flight(&self) -> usize {
        match &self.job.worker {
            Worker::Generate(generating) if generating.fixed_batches.is_none() => {
                let Generating { engine, options, models, .. } = &**generating;
                let of_source = options.num_beams.max(options.num_return_sequences).max(1);
                let sources = engine.max_sources.min(engine.max_rows.div_ceil(of_source)).clamp(1, 1 << 16);
                (2 * sources).max(64) * models.len()
            }
            _ => 1,
        }
    }

    /// Submits rows, or runs a batch of them.
    fn work(&mut self, cancel: &Cancellation) -> Result<(), BatchError> {
        let job = self.job;
        if let (Worker::Generate(generating), Some(engine)) = (&job.worker, self.engine) {
            while self.can_work() {
                self.submit(generating, engine);
            }
            return Ok(());
        }
        let most = job.worker.batch_rows();
        let Some((_, active)) = self.windows().next() else { return Ok(()) };
        let rows = active.batch(most);
        let requests: Vec<&TokenizedRequest> = rows.iter().filter_map(|&row| active.requests[row].as_ref()).collect();
        match job.worker.answers(&requests, cancel) {
            Ok(answers) => rows.into_iter().zip(answers).for_each(|(row, answer)| active.answer(row, answer)),
            Err(Error::Cancelled) => return Err(Error::Cancelled.into()),
            Err(error) => {
                let shard = active.shard;
                self.fail(shard, format!("{}: {error}", self.job.shards[shard].source));
            }
        }
        Ok(())
    }

    /// Submits the next row to the engine.
    fn submit(&mut self, generating: &Generating, engine: &Engine) {
        let sender = self.sender.clone();
        let Some((window, active)) = self.windows().next() else { return };
        let Some(row) = active.todo.pop_front() else { return };
        let request = active.requests[row].as_ref().expect("rows to do have requests");
        let mut found = Vec::new();
        let sink = move |message| match message {
            Message::Event(EngineEvent::Row { hypotheses, .. }) => found = hypotheses,
            Message::Event(_) => {}
            Message::Ended { result, .. } => {
                let result = result.map(|()| std::mem::take(&mut found));
                // Nobody receives any more once the job has ended.
                let _ = sender.send(Told::Ended { window, row, result });
            }
        };
        match generating.request(request).and_then(|request| engine.submit_to(request, sink)) {
            Ok(_) => self.in_flight += 1,
            Err(error) if is_of_row(&error) => {
                let problem = (generating.explain)(&error, &request.options);
                active.answer(row, Err(problem));
            }
            Err(error) => {
                let shard = active.shard;
                self.fail(shard, format!("{}: {error}", self.job.shards[shard].source));
            }
        }
    }

    /// Takes the result of a row.
    fn ended(&mut self, window: u64, row: usize, result: Result<Vec<Hypothesis>, Error>) {
        self.in_flight -= 1;
        let Worker::Generate(generating) = &self.job.worker else { return };
        let Some(at) = window.checked_sub(self.first_window) else { return };
        let Some(Step::Window(active)) = self.steps.get_mut(at as usize) else { return };
        let Some(request) = &active.requests[row] else { return };
        match result {
            Ok(hypotheses) => {
                let answer = generating.answer(request, &hypotheses);
                active.answer(row, answer);
            }
            Err(error) if is_of_row(&error) => {
                let problem = (generating.explain)(&error, &request.options);
                active.answer(row, Err(problem));
            }
            Err(error) => {
                let shard = active.shard;
                self.fail(shard, format!("{}: {error}", self.job.shards[shard].source));
            }
        }
    }

    /// Gives a shard up. Its windows are dropped as they come.
    fn fail(&mut self, shard: usize, problem: String) {
        if self.abandoned[shard].swap(true, Ordering::Relaxed) {
            return;
        }
        self.summary.failed += 1;
        for step in &mut self.steps {
            if let Step::Window(active) = step
                && active.shard == shard
            {
                active.todo.clear();
            }
        }
        (self.on_event)(Event::Failed { shard: &self.job.shards[shard], problem });
    }

    fn is_abandoned(&self, shard: usize) -> bool {
        self.abandoned[shard].load(Ordering::Relaxed)
    }

    /// Takes the steps that can be taken, in order.
    fn write(&mut self) {
        loop {
            match self.steps.front() {
                None => return,
                Some(Step::Window(active)) if active.left > 0 && !self.is_abandoned(active.shard) => return,
                Some(_) => {}
            }
            let step = self.steps.pop_front().expect("looked at just above");
            self.first_window += 1;
            let job = self.job;
            match step {
                Step::Begin { shard, carried } => {
                    let name = &job.shards[shard].name;
                    match Writer::new(job.store, name, carried.as_ref(), job.columns, self.results, self.vectors) {
                        Ok(writer) => self.current = Some(writer),
                        Err(error) => self.fail(shard, error.to_string()),
                    }
                }
                Step::Window(active) => {
                    let _ = self.permit.send(());
                    if !self.is_abandoned(active.shard) {
                        self.write_window(*active);
                    }
                }
                Step::End { shard, result } => {
                    let _ = self.permit.send(());
                    self.end(shard, result);
                }
            }
        }
    }

    fn write_window(&mut self, active: Active) {
        let Active { shard, chunks, answers, part_read, .. } = active;
        let answers: Vec<Answered> = answers.into_iter().map(|answer| answer.expect("no row is left")).collect();
        let Some(writer) = &mut self.current else { return };
        self.progress.rows += answers.len() as u64;
        let tokens =
            |answer: &Answered| answer.as_ref().map_or(0, |answer| answer.source_tokens + answer.target_tokens);
        self.progress.tokens += answers.iter().map(tokens).sum::<usize>() as u64;
        if let Err(error) = writer.write(self.job.store, chunks, &answers) {
            self.current = None;
            self.fail(shard, error.to_string());
        }
        self.progress.part = self.part(self.bytes_done + part_read * self.job.shards[shard].bytes as f64);
    }

    fn part(&self, bytes: f64) -> f64 {
        bytes / self.job.shards.iter().map(|shard| shard.bytes).sum::<u64>().max(1) as f64
    }

    fn end(&mut self, number: usize, result: Result<(), String>) {
        let (job, writer) = (self.job, self.current.take());
        let shard = &job.shards[number];
        self.bytes_done += shard.bytes as f64;
        self.progress.part = self.part(self.bytes_done);
        if let Err(problem) = result {
            return self.fail(number, format!("{}: {problem}", shard.source));
        }
        let Some(writer) = writer.filter(|_| !self.is_abandoned(number)) else { return };
        let totals = writer.totals;
        match writer.finish(job.store, job.settings) {
            Ok(is_new) => {
                match is_new {
                    true => self.summary.written += 1,
                    false => self.summary.written_elsewhere += 1,
                }
                self.summary.totals.add(totals);
                let Totals { rows, errors, .. } = totals;
                (self.on_event)(Event::Done { shard, rows, errors, is_new });
            }
            Err(error) => self.fail(number, error.to_string()),
        }
    }
}
