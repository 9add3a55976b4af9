//! A request of an engine: its events and its result.

use std::collections::VecDeque;
use std::ffi::c_char;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use t5gemma_runtime::{Canceller, Event, Generation, Hypothesis, Model, PollResult, TextStream};

use crate::boundary::{fallible, free, value};
use crate::cancellation::Registered;
use crate::error::{t5g_code, t5g_error};
use crate::gate::Gate;
use crate::handle::{Handle, Object};
use crate::input::{Fields, Out, Record};
use crate::result::{Facts, t5g_result};
use crate::tokenizer::t5g_text;

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

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_event {
    const OLDEST: usize = 48;

    fn unset() -> t5g_event {
        t5g_event { size: 0, kind: NOTHING, row: 0, token: -1, text: ptr::null(), text_size: 0 }
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

/// A request in flight and its results so far.
pub struct Running {
    texts: Texts,
    generation: Generation,
    /// Events that were received and not returned yet: one of the runtime may be several of the caller.
    pending: VecDeque<RequestEvent>,
    /// The text of the last event, which the caller may still read.
    text: Option<t5g_text>,
    rows: Vec<Vec<Hypothesis>>,
    failed: Option<t5g_error>,
    has_ended: bool,
    model: Arc<Model>,
    facts: Facts,
    /// Open to callbacks that change scores or tokens.
    gate: Arc<Gate>,
    /// Unregisters the request from the caller's cancellation when it is dropped.
    _registered: Option<Registered>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.gate.close();
    }
}

/// An event for the caller.
pub enum RequestEvent {
    /// A token of a row, or with token -1 the rest of its text.
    Piece { row: usize, token: i64, text: Option<String> },
    /// A row is finished.
    Row(usize),
}

/// A generation that an engine has accepted.
pub struct Submitted {
    pub generation: Generation,
    pub texts: Texts,
    pub facts: Facts,
}

/// The text of rows in progress: a stream for each row, if text is wanted.
pub struct Texts(pub Vec<Option<TextStream>>);

impl Texts {
    /// The text that a token adds to its row.
    pub fn token(&mut self, row: usize, token: i64) -> Result<Option<String>, t5g_error> {
        let stream = self.0.get_mut(row).and_then(Option::as_mut);
        Ok(stream.map(|stream| stream.push(token)).transpose()?)
    }

    /// The rest of a row's text, if there is any.
    pub fn rest(&mut self, row: usize) -> Result<Option<String>, t5g_error> {
        let Some(stream) = self.0.get_mut(row).and_then(Option::take) else { return Ok(None) };
        Ok(Some(stream.finish()?).filter(|text| !text.is_empty()))
    }
}

impl Running {
    /// A request that was submitted. `registered` is its registration with the caller's cancellation.
    pub fn new(submitted: Submitted, model: Arc<Model>, gate: Arc<Gate>, registered: Option<Registered>) -> Running {
        let Submitted { generation, texts, facts } = submitted;
        Running {
            texts,
            rows: vec![Vec::new(); generation.rows()],
            generation,
            pending: VecDeque::new(),
            text: None,
            failed: None,
            has_ended: false,
            model,
            facts,
            gate,
            _registered: registered,
        }
    }

    /// Waits up to `timeout` for the next event; `None` if there is none, or after the end.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<RequestEvent>, t5g_error> {
        let until = Instant::now().checked_add(timeout);
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(Some(event));
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
            Event::Token { row, token, .. } => {
                let text = self.texts.token(row, token)?;
                self.pending.push_back(RequestEvent::Piece { row, token, text });
            }
            Event::Row { row, hypotheses } => {
                self.rows[row] = hypotheses;
                if let Some(text) = self.texts.rest(row)? {
                    self.pending.push_back(RequestEvent::Piece { row, token: -1, text: Some(text) });
                }
                self.pending.push_back(RequestEvent::Row(row));
            }
            // Callers of the first version know no other kinds; the result tells how long the request waited.
            _ => {}
        }
        Ok(())
    }

    /// Waits for the end and returns the result.
    pub fn finish(&mut self) -> Result<t5g_result, t5g_error> {
        while !self.has_ended || !self.pending.is_empty() {
            self.next(Duration::from_secs(3600))?;
        }
        Ok(self.result())
    }

    /// The result.
    pub fn result(&self) -> t5g_result {
        let facts = Facts { stats: self.generation.stats().copied(), ..self.facts };
        t5g_result::new(self.model.clone(), self.rows.clone(), facts)
    }

    /// An event as C reads it; its text lives until the next one.
    fn event(&mut self, event: Option<RequestEvent>) -> t5g_event {
        let unset = t5g_event::unset();
        match event {
            None => t5g_event { kind: if self.has_ended { END } else { NOTHING }, ..unset },
            Some(RequestEvent::Row(row)) => t5g_event { kind: ROW, row, ..unset },
            Some(RequestEvent::Piece { row, token, text }) => {
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
    /// A request to be polled.
    pub fn new(running: Running) -> t5g_request {
        let (canceller, gate) = (running.generation.canceller(), running.gate.clone());
        t5g_request { running: Mutex::new(running), canceller, gate }
    }

    /// Locks the request, which is for one thread at a time.
    fn lock(&self) -> Result<MutexGuard<'_, Running>, t5g_error> {
        match self.running.try_lock() {
            Ok(running) => Ok(running),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(t5g_error::new(t5g_code::Busy, "request: another thread is using it").at("request"))
            }
        }
    }
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
        let refused = || t5g_error::argument("seconds", "seconds to wait, 0 or more", seconds.to_string());
        if seconds.is_nan() || seconds < 0.0 {
            return Err(refused());
        }
        // A time beyond the range of the clock is an hour.
        let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600));
        let mut running = request.lock()?;
        let next = running.next(timeout)?;
        event.put(running.event(next), "event")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_request_result(
    request: Handle<t5g_request>,
    result: Out<Handle<t5g_result>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, request) = (result.check("result")?, request.get("request")?);
        let found = request.lock()?.finish()?;
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
    // Another thread may be waiting for its events. `free` reports a handle that is not a live request.
    value((), || {
        let request = request.get("request")?;
        request.canceller.cancel();
        request.gate.close();
        Ok(())
    });
    free(request, "request")
}
