//! The engine: requests from any thread into one batch that never stops, polled or told by callback.

use std::collections::VecDeque;
use std::ffi::{c_char, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use t5gemma_runtime::{
    Canceller, Draws, Engine, EngineOptions, EngineStats, Event, Generation, Hypothesis, Model, PollResult, Request,
    SpecialTokens, TextStream,
};

use crate::boundary::{fallible, free, guarded, value};
use crate::call::{Call, Gate, Listed, Role, t5g_call};
use crate::error::{t5g_code, t5g_error};
use crate::handle::{Handle, Held, Object};
use crate::input::{Array, Fields, Out, Record, UNSET, whole};
use crate::model::{source_tokens, t5g_model};
use crate::options::{generation_options, t5g_generation_options};
use crate::result::t5g_result;
use crate::sources::t5g_sources;
use crate::tokenizer::t5g_text;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_engine_options {
    size: usize,
    max_rows: i64,
    max_bytes: i64,
    max_waiting: i64,
    devices: Array<i64>,
    device_count: usize,
}

// SAFETY: words, of which any are a value.
unsafe impl Fields for t5g_engine_options {
    const OLDEST: usize = 32;

    fn unset() -> t5g_engine_options {
        t5g_engine_options {
            size: 0,
            max_rows: UNSET,
            max_bytes: UNSET,
            max_waiting: UNSET,
            devices: Array::NULL,
            device_count: 0,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_engine_counts {
    size: usize,
    submitted: u64,
    finished: u64,
    failed: u64,
    waiting_requests: usize,
    waiting_sources: usize,
    sources: usize,
    rows: usize,
    planned_bytes: usize,
    steps: u64,
    stepped_rows: u64,
    max_rows: usize,
    max_bytes: usize,
    max_waiting: usize,
    copies: usize,
}

// SAFETY: words, of which any are a value.
unsafe impl Fields for t5g_engine_counts {
    const OLDEST: usize = 112;

    fn unset() -> t5g_engine_counts {
        t5g_engine_counts {
            size: 0,
            submitted: 0,
            finished: 0,
            failed: 0,
            waiting_requests: 0,
            waiting_sources: 0,
            sources: 0,
            rows: 0,
            planned_bytes: 0,
            steps: 0,
            stepped_rows: 0,
            max_rows: 0,
            max_bytes: 0,
            max_waiting: 0,
            copies: 0,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_event {
    size: usize,
    kind: i64,
    row: usize,
    token: i64,
    text: *const c_char,
    text_size: usize,
}

const NOTHING: i64 = 0;
const PIECE: i64 = 1;
const ROW: i64 = 2;
const END: i64 = 3;

// SAFETY: words, of which any are a value.
unsafe impl Fields for t5g_event {
    const OLDEST: usize = 48;

    fn unset() -> t5g_event {
        t5g_event { size: 0, kind: NOTHING, row: 0, token: -1, text: ptr::null(), text_size: 0 }
    }
}

type Done = extern "C" fn(*mut c_void, Handle<t5g_result>, Handle<t5g_error>);

/// A `t5g_engine`.
pub struct t5g_engine {
    inner: Engine,
    options: EngineOptions,
    model: Arc<t5g_model>,
}

impl Object for t5g_engine {
    const NAME: &'static str = "t5g_engine";
}

impl t5g_engine {
    fn counts(&self, found: EngineStats) -> t5g_engine_counts {
        t5g_engine_counts {
            size: 0,
            submitted: found.submitted,
            finished: found.finished,
            failed: found.failed,
            waiting_requests: found.waiting_requests,
            waiting_sources: found.waiting_sources,
            sources: found.sources,
            rows: found.rows,
            planned_bytes: found.planned_bytes,
            steps: found.steps,
            stepped_rows: found.stepped_rows,
            max_rows: self.options.max_rows,
            max_bytes: self.options.max_bytes,
            max_waiting: self.options.max_waiting,
            copies: self.inner.copies(),
        }
    }
}

/// A `t5g_request`.
pub struct t5g_request {
    running: Mutex<Running>,
    canceller: Canceller,
    gate: Arc<Gate>,
}

impl Object for t5g_request {
    const NAME: &'static str = "t5g_request";
}

/// A request and what has come of it.
struct Running {
    /// One for each row, where text is wanted.
    streams: Vec<Option<TextStream>>,
    generation: Generation,
    /// What has been received and not been told: an event may be told as several.
    untold: VecDeque<Told>,
    /// The text told last, which the caller may still read.
    text: Option<t5g_text>,
    rows: Vec<Vec<Hypothesis>>,
    failed: Option<t5g_error>,
    has_ended: bool,
    model: Arc<Model>,
    seed: Option<u64>,
    source_tokens: usize,
    /// Open to the callbacks that change what is generated.
    gate: Arc<Gate>,
    /// The caller's cancellation reaches this request for as long as it lives.
    _listed: Option<Listed>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.gate.close();
    }
}

/// What a caller is told.
enum Told {
    Piece { row: usize, token: i64, text: Option<String> },
    Row(usize),
}

impl Running {
    /// The next thing to tell, within `timeout`: nothing if there is none by then.
    fn next(&mut self, timeout: Duration) -> Result<Option<Told>, t5g_error> {
        let until = Instant::now().checked_add(timeout);
        loop {
            if let Some(told) = self.untold.pop_front() {
                return Ok(Some(told));
            }
            if let Some(failure) = &self.failed {
                return Err(failure.clone());
            }
            let left = until.map_or(timeout, |until| until.saturating_duration_since(Instant::now()));
            if self.has_ended {
                return Ok(None);
            }
            match self.generation.next_timeout(left) {
                PollResult::TimedOut => return Ok(None),
                PollResult::Ended => {
                    self.gate.close();
                    self.has_ended = true;
                }
                PollResult::Event(Err(error)) => {
                    self.gate.close();
                    self.failed = Some(error.into());
                }
                PollResult::Event(Ok(event)) => {
                    if let Err(failure) = self.take(event) {
                        self.generation.cancel();
                        self.gate.close();
                        self.failed = Some(failure);
                    }
                }
            }
        }
    }

    fn take(&mut self, event: Event) -> Result<(), t5g_error> {
        match event {
            Event::Token { row, token } => {
                let stream = self.streams.get_mut(row).and_then(Option::as_mut);
                let text = stream.map(|stream| stream.push(token)).transpose()?;
                self.untold.push_back(Told::Piece { row, token, text });
            }
            Event::Row { row, hypotheses } => {
                self.rows[row] = hypotheses;
                if let Some(stream) = self.streams.get_mut(row).and_then(Option::take) {
                    let text = stream.finish()?;
                    if !text.is_empty() {
                        self.untold.push_back(Told::Piece { row, token: -1, text: Some(text) });
                    }
                }
                self.untold.push_back(Told::Row(row));
            }
            // A new event has to get a kind in the header first.
            _ => {}
        }
        Ok(())
    }

    /// Waits for the end.
    fn finish(&mut self) -> Result<t5g_result, t5g_error> {
        while !self.has_ended || !self.untold.is_empty() {
            self.next(Duration::from_secs(3600))?;
        }
        Ok(self.result())
    }

    fn result(&self) -> t5g_result {
        t5g_result::new(self.model.clone(), self.rows.clone(), self.seed, self.source_tokens)
    }

    fn tell(&mut self, told: Option<Told>) -> t5g_event {
        let unset = t5g_event::unset();
        match told {
            None => t5g_event { kind: if self.has_ended { END } else { NOTHING }, ..unset },
            Some(Told::Row(row)) => t5g_event { kind: ROW, row, ..unset },
            Some(Told::Piece { row, token, text }) => {
                self.text = text.map(t5g_text::new);
                let text = self.text.as_ref();
                t5g_event {
                    kind: PIECE,
                    row,
                    token,
                    text: text.map_or(ptr::null(), t5g_text::pointer),
                    text_size: text.map_or(0, t5g_text::size),
                    ..unset
                }
            }
        }
    }
}

impl t5g_request {
    fn only(&self) -> Result<MutexGuard<'_, Running>, t5g_error> {
        match self.running.try_lock() {
            Ok(running) => Ok(running),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(t5g_error::new(t5g_code::Busy, "request: another thread is waiting on it").at("request"))
            }
        }
    }
}

/// Submits, and returns what is to be told of it.
fn submit(
    engine: &Held<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: &Call,
) -> Result<Running, t5g_error> {
    let model = &engine.model;
    let given = generation_options(options)?;
    let gate = Arc::new(Gate::default());
    let mut options = call.add_to(model.inner.generation_config().with_json(&given)?, &gate);
    if options.do_sample {
        options.seed = Some(options.seed.unwrap_or_else(Draws::random_seed));
    }
    let seed = options.seed.filter(|_| options.do_sample);
    let batch = model.read(|reader| reader.batch(sources))?;
    let (rows, source_tokens) = (batch.rows(), source_tokens(&batch));
    let streams = match call.wants_text() {
        true => {
            let tokenizer = model.inner.tokenizer()?;
            (0..rows).map(|_| Some(tokenizer.stream(SpecialTokens::Skip))).collect()
        }
        false => Vec::new(),
    };
    call.check_cancellation()?;
    let deadline = call.deadline();
    let mut request = Request::new(batch, options);
    request.deadline = deadline;
    let generation = engine.inner.submit(request)?;
    let canceller = generation.canceller();
    Ok(Running {
        streams,
        generation,
        untold: VecDeque::new(),
        text: None,
        rows: vec![Vec::new(); rows],
        failed: None,
        has_ended: false,
        model: model.inner.clone(),
        seed,
        source_tokens,
        gate,
        _listed: call.list(move || canceller.cancel()),
    })
}

/// A number that is a bound, if it is given.
fn bound(value: i64, name: &str) -> Result<Option<usize>, t5g_error> {
    match whole(value, name)? {
        Some(0) => Err(t5g_error::argument(name, "at least 1, or T5G_UNSET", "0")),
        bound => Ok(bound),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_new(
    model: Handle<t5g_model>,
    options: Record<t5g_engine_options>,
    engine: Out<Handle<t5g_engine>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (engine.check("engine")?, model.get("model")?);
        let given = options.optional("options")?.unwrap_or_else(t5g_engine_options::unset);
        let default = EngineOptions::default();
        let options = EngineOptions::default()
            .max_rows(bound(given.max_rows, "options.max_rows")?.unwrap_or(default.max_rows))
            .max_bytes(bound(given.max_bytes, "options.max_bytes")?.unwrap_or(default.max_bytes))
            .max_waiting(bound(given.max_waiting, "options.max_waiting")?.unwrap_or(default.max_waiting));
        let devices = given.devices.get(given.device_count, "options.devices")?;
        let models = if devices.is_empty() { vec![model.inner.clone()] } else { model.copies(devices)? };
        let inner = Engine::of_copies(&models, options.clone())?;
        place.put(Handle::new(t5g_engine { inner, options, model: model.share() }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_submit(
    engine: Handle<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    request: Out<Handle<t5g_request>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, engine) = (request.check("request")?, engine.get("engine")?);
        let call = Call::read(call)?.of(Role::Submits)?;
        let running = submit(&engine, sources, options, &call)?;
        let (canceller, gate) = (running.generation.canceller(), running.gate.clone());
        place.put(Handle::new(t5g_request { running: Mutex::new(running), canceller, gate }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_call(
    engine: Handle<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    done: Option<Done>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (engine, call) = (engine.get("engine")?, Call::read(call)?.of(Role::Tells)?);
        let done = done.ok_or_else(|| t5g_error::argument("done", "a function", "NULL"))?;
        let mut running = submit(&engine, sources, options, &call)?;
        let shown = call.shown();
        let tell = move || {
            let result = guarded(|| {
                while let Some(told) = next_or_end(&mut running)? {
                    if let Told::Piece { row, token, text } = told
                        && shown.piece(row, token, text).is_break()
                    {
                        running.generation.cancel();
                        return Err(t5gemma_runtime::Error::Cancelled.into());
                    }
                }
                Ok(running.result())
            });
            // The request is over before the caller is told so.
            drop(running);
            match result {
                Ok(result) => done(shown.user(), Handle::new(result), Handle::NULL),
                Err(failure) => done(shown.user(), Handle::NULL, Handle::new(failure)),
            }
        };
        let started = thread::Builder::new().name("t5g-request".into()).spawn(tell);
        started.map_err(|error| t5g_error::new(t5g_code::Internal, format!("no thread for the callback: {error}")))?;
        Ok(())
    })
}

/// Waits for the next thing, however long; nothing is the end.
fn next_or_end(running: &mut Running) -> Result<Option<Told>, t5g_error> {
    loop {
        match running.next(Duration::from_secs(3600))? {
            None if !running.has_ended => {}
            told => return Ok(told),
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_stats(engine: Handle<t5g_engine>, counts: Record<t5g_engine_counts>) -> Handle<t5g_error> {
    fallible(|| {
        let engine = engine.get("engine")?;
        engine.inner.check_process()?;
        counts.put(engine.counts(engine.inner.stats()), "counts")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_stats_of_copy(
    engine: Handle<t5g_engine>,
    copy: usize,
    counts: Record<t5g_engine_counts>,
) -> Handle<t5g_error> {
    fallible(|| {
        let engine = engine.get("engine")?;
        engine.inner.check_process()?;
        let copies = engine.inner.stats_of_copies();
        let refused = || t5g_error::argument("copy", format!("less than {}", copies.len()), copy.to_string());
        counts.put(engine.counts(*copies.get(copy).ok_or_else(refused)?), "counts")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_drain(engine: Handle<t5g_engine>) -> Handle<t5g_error> {
    fallible(|| Ok(engine.get("engine")?.inner.drain()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_shutdown(engine: Handle<t5g_engine>) -> Handle<t5g_error> {
    fallible(|| Ok(engine.get("engine")?.inner.shutdown()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_free(engine: Handle<t5g_engine>) -> i32 {
    free(engine, "engine")
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_poll(
    request: Handle<t5g_request>,
    seconds: f64,
    event: Record<t5g_event>,
) -> Handle<t5g_error> {
    fallible(|| {
        let request = request.get("request")?;
        event.size("event")?;
        let refused = || t5g_error::argument("seconds", "seconds to wait, or 0", seconds.to_string());
        if seconds.is_nan() || seconds < 0.0 {
            return Err(refused());
        }
        // Longer than any clock goes is an hour, and again.
        let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600));
        let mut running = request.only()?;
        let told = running.next(timeout)?;
        let told = running.tell(told);
        event.put(told, "event")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_result(
    request: Handle<t5g_request>,
    result: Out<Handle<t5g_result>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, request) = (result.check("result")?, request.get("request")?);
        let found = request.only()?.finish()?;
        place.put(Handle::new(found));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_cancel(request: Handle<t5g_request>) -> Handle<t5g_error> {
    fallible(|| {
        request.get("request")?.canceller.cancel();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_free(request: Handle<t5g_request>) -> i32 {
    // Another thread may be waiting on it; what is no live request is for `free` to tell.
    value((), || {
        let request = request.get("request")?;
        request.canceller.cancel();
        request.gate.close();
        Ok(())
    });
    free(request, "request")
}
