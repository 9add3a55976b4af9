//! The engine: requests from any thread into one batch that never stops, polled or told by callback.

use std::collections::VecDeque;
use std::ffi::{c_char, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use t5gemma_runtime::{
    Canceller, Draws, Engine, EngineOptions, EngineStats, Event, Generation, Hypothesis, PollResult, Request,
    SpecialTokens, TextStream,
};

use crate::call::{Call, Gate, Listed, Role, t5g_call};
use crate::error::{Code, Failure, fallible, free, guarded, value};
use crate::handle::{Handle, Held, Object};
use crate::input::{Array, Fields, Out, Record, UNSET, whole};
use crate::model::{Opened, source_tokens};
use crate::options::{generation_options, t5g_generation_options};
use crate::result::Answers;
use crate::sources::t5g_sources;
use crate::tokenizer::Written;

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

type Done = extern "C" fn(*mut c_void, Handle<Answers>, Handle<Failure>);

/// A `t5g_engine`.
pub struct Serving {
    engine: Engine,
    options: EngineOptions,
    opened: Arc<Opened>,
}

impl Object for Serving {
    const NAME: &'static str = "t5g_engine";
}

impl Serving {
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
            copies: self.engine.copies(),
        }
    }
}

/// A `t5g_request`.
pub struct Asked {
    running: Mutex<Running>,
    canceller: Canceller,
    gate: Arc<Gate>,
}

impl Object for Asked {
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
    text: Option<Written>,
    rows: Vec<Vec<Hypothesis>>,
    failed: Option<Failure>,
    has_ended: bool,
    opened: Arc<Opened>,
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
    fn next(&mut self, timeout: Duration) -> Result<Option<Told>, Failure> {
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

    fn take(&mut self, event: Event) -> Result<(), Failure> {
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
        }
        Ok(())
    }

    /// Waits for the end.
    fn finish(&mut self) -> Result<Answers, Failure> {
        while !self.has_ended || !self.untold.is_empty() {
            self.next(Duration::from_secs(3600))?;
        }
        Ok(self.answers())
    }

    fn answers(&self) -> Answers {
        Answers::new(self.opened.clone(), self.rows.clone(), self.seed, self.source_tokens)
    }

    fn tell(&mut self, told: Option<Told>) -> t5g_event {
        let unset = t5g_event::unset();
        match told {
            None => t5g_event { kind: if self.has_ended { END } else { NOTHING }, ..unset },
            Some(Told::Row(row)) => t5g_event { kind: ROW, row, ..unset },
            Some(Told::Piece { row, token, text }) => {
                self.text = text.map(Written::new);
                let text = self.text.as_ref();
                t5g_event {
                    kind: PIECE,
                    row,
                    token,
                    text: text.map_or(ptr::null(), Written::pointer),
                    text_size: text.map_or(0, Written::size),
                    ..unset
                }
            }
        }
    }
}

impl Asked {
    fn only(&self) -> Result<MutexGuard<'_, Running>, Failure> {
        match self.running.try_lock() {
            Ok(running) => Ok(running),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Failure::new(Code::Busy, "request: another thread is waiting on it").at("request"))
            }
        }
    }
}

/// Submits, and returns what is to be told of it.
fn submit(
    serving: &Held<Serving>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: &Call,
) -> Result<Running, Failure> {
    let opened = &serving.opened;
    let given = generation_options(options)?;
    let gate = Arc::new(Gate::default());
    let mut options = call.add_to(opened.model.generation_config().with_json(&given)?, &gate);
    if options.do_sample {
        options.seed = Some(options.seed.unwrap_or_else(Draws::random_seed));
    }
    let seed = options.seed.filter(|_| options.do_sample);
    let batch = opened.read(|reader| reader.batch(sources))?;
    let (rows, source_tokens) = (batch.rows(), source_tokens(&batch));
    let streams = match call.wants_text() {
        true => {
            let tokenizer = opened.model.tokenizer()?;
            (0..rows).map(|_| Some(tokenizer.stream(SpecialTokens::Skip))).collect()
        }
        false => Vec::new(),
    };
    call.check_cancellation()?;
    let deadline = call.deadline();
    let generation = serving.engine.submit(Request { deadline, ..Request::new(batch, options) })?;
    let canceller = generation.canceller();
    Ok(Running {
        streams,
        generation,
        untold: VecDeque::new(),
        text: None,
        rows: vec![Vec::new(); rows],
        failed: None,
        has_ended: false,
        opened: opened.clone(),
        seed,
        source_tokens,
        gate,
        _listed: call.list(move || canceller.cancel()),
    })
}

/// A number that is a bound, if it is given.
fn bound(value: i64, name: &str) -> Result<Option<usize>, Failure> {
    match whole(value, name)? {
        Some(0) => Err(Failure::argument(name, "at least 1, or T5G_UNSET", "0")),
        bound => Ok(bound),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_new(
    model: Handle<Opened>,
    options: Record<t5g_engine_options>,
    engine: Out<Handle<Serving>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (engine.check("engine")?, model.get("model")?);
        let given = options.optional("options")?.unwrap_or_else(t5g_engine_options::unset);
        let default = EngineOptions::default();
        let options = EngineOptions {
            max_rows: bound(given.max_rows, "options.max_rows")?.unwrap_or(default.max_rows),
            max_bytes: bound(given.max_bytes, "options.max_bytes")?.unwrap_or(default.max_bytes),
            max_waiting: bound(given.max_waiting, "options.max_waiting")?.unwrap_or(default.max_waiting),
            ..default
        };
        let devices = given.devices.get(given.device_count, "options.devices")?;
        let models = if devices.is_empty() { vec![opened.model.clone()] } else { opened.copies(devices)? };
        let engine = Engine::of_copies(&models, options.clone())?;
        place.put(Handle::new(Serving { engine, options, opened: opened.share() }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_submit(
    engine: Handle<Serving>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    request: Out<Handle<Asked>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, serving) = (request.check("request")?, engine.get("engine")?);
        let call = Call::read(call)?.of(Role::Submits)?;
        let running = submit(&serving, sources, options, &call)?;
        let (canceller, gate) = (running.generation.canceller(), running.gate.clone());
        place.put(Handle::new(Asked { running: Mutex::new(running), canceller, gate }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_call(
    engine: Handle<Serving>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    done: Option<Done>,
) -> Handle<Failure> {
    fallible(|| {
        let (serving, call) = (engine.get("engine")?, Call::read(call)?.of(Role::Tells)?);
        let done = done.ok_or_else(|| Failure::argument("done", "a function", "NULL"))?;
        let mut running = submit(&serving, sources, options, &call)?;
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
                Ok(running.answers())
            });
            // The request is over before the caller is told so.
            drop(running);
            match result {
                Ok(answers) => done(shown.user(), Handle::new(answers), Handle::NULL),
                Err(failure) => done(shown.user(), Handle::NULL, Handle::new(failure)),
            }
        };
        let started = thread::Builder::new().name("t5g-request".into()).spawn(tell);
        started.map_err(|error| Failure::new(Code::Internal, format!("no thread for the callback: {error}")))?;
        Ok(())
    })
}

/// Waits for the next thing, however long; nothing is the end.
fn next_or_end(running: &mut Running) -> Result<Option<Told>, Failure> {
    loop {
        match running.next(Duration::from_secs(3600))? {
            None if !running.has_ended => {}
            told => return Ok(told),
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_stats(engine: Handle<Serving>, counts: Record<t5g_engine_counts>) -> Handle<Failure> {
    fallible(|| {
        let serving = engine.get("engine")?;
        serving.engine.check_process()?;
        counts.put(serving.counts(serving.engine.stats()), "counts")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_stats_of_copy(
    engine: Handle<Serving>,
    copy: usize,
    counts: Record<t5g_engine_counts>,
) -> Handle<Failure> {
    fallible(|| {
        let serving = engine.get("engine")?;
        serving.engine.check_process()?;
        let copies = serving.engine.stats_of_copies();
        let refused = || Failure::argument("copy", format!("less than {}", copies.len()), copy.to_string());
        counts.put(serving.counts(*copies.get(copy).ok_or_else(refused)?), "counts")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_drain(engine: Handle<Serving>) -> Handle<Failure> {
    fallible(|| Ok(engine.get("engine")?.engine.drain()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_shutdown(engine: Handle<Serving>) -> Handle<Failure> {
    fallible(|| Ok(engine.get("engine")?.engine.shutdown()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_free(engine: Handle<Serving>) -> i32 {
    free(engine, "engine")
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_poll(request: Handle<Asked>, seconds: f64, event: Record<t5g_event>) -> Handle<Failure> {
    fallible(|| {
        let asked = request.get("request")?;
        event.size("event")?;
        let refused = || Failure::argument("seconds", "seconds to wait, or 0", seconds.to_string());
        if seconds.is_nan() || seconds < 0.0 {
            return Err(refused());
        }
        // Longer than any clock goes is an hour, and again.
        let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600));
        let mut running = asked.only()?;
        let told = running.next(timeout)?;
        let told = running.tell(told);
        event.put(told, "event")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_result(request: Handle<Asked>, result: Out<Handle<Answers>>) -> Handle<Failure> {
    fallible(|| {
        let (place, asked) = (result.check("result")?, request.get("request")?);
        let answers = asked.only()?.finish()?;
        place.put(Handle::new(answers));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_cancel(request: Handle<Asked>) -> Handle<Failure> {
    fallible(|| {
        request.get("request")?.canceller.cancel();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_free(request: Handle<Asked>) -> i32 {
    // Another thread may be waiting on it; what is no live request is for `free` to tell.
    value((), || {
        let asked = request.get("request")?;
        asked.canceller.cancel();
        asked.gate.close();
        Ok(())
    });
    free(request, "request")
}
