//! The callbacks of `t5g_engine_call`: what an engine's threads call with the messages of a request.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use t5gemma_runtime::{Canceller, Error, Event, Hypothesis, Message, Model};

use crate::boundary::guarded;
use crate::call::Progress;
use crate::cancellation::Registered;
use crate::error::t5g_error;
use crate::gate::Gate;
use crate::handle::Handle;
use crate::request::Texts;
use crate::result::{Facts, t5g_result};

pub type Done = extern "C" fn(*mut c_void, Handle<t5g_result>, Handle<t5g_error>);

/// What a running request and its submission share. The request may end before its submission returns.
#[derive(Default)]
pub struct Link {
    is_stopped: AtomicBool,
    state: Mutex<LinkState>,
}

#[derive(Default)]
struct LinkState {
    has_ended: bool,
    canceller: Option<Canceller>,
    /// The registration with the caller's cancellation.
    registered: Option<Registered>,
}

impl Link {
    fn state(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes the submission.
    pub fn accept(&self, canceller: Canceller, registered: Option<Registered>) {
        let mut state = self.state();
        if !state.has_ended {
            (state.canceller, state.registered) = (Some(canceller), registered);
            drop(state);
            if self.is_stopped.load(Ordering::SeqCst) {
                self.stop();
            }
        }
    }

    /// Cancels the request.
    fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        let canceller = self.state().canceller.clone();
        if let Some(canceller) = canceller {
            canceller.cancel();
        }
    }

    fn end(&self) {
        let mut state = self.state();
        state.has_ended = true;
        let left = (state.canceller.take(), state.registered.take());
        drop(state);
        drop(left);
    }
}

/// The callbacks of one request, with its results so far.
pub struct Reports {
    pub progress: Progress,
    pub done: Done,
    pub texts: Texts,
    pub rows: Vec<Vec<Hypothesis>>,
    pub facts: Facts,
    pub model: Arc<Model>,
    /// Open to callbacks that change scores or tokens.
    pub gate: Arc<Gate>,
    pub link: Arc<Link>,
    /// What ended the request from here.
    pub failed: Option<t5g_error>,
}

impl Reports {
    /// Reports a message of the engine.
    pub fn receive(&mut self, message: Message) {
        match message {
            Message::Event(event) => {
                if self.failed.is_none()
                    && let Err(failure) = guarded(|| self.event(event))
                {
                    self.failed = Some(failure);
                    self.link.stop();
                }
            }
            Message::Ended { result, stats } => {
                self.facts.stats = Some(stats);
                self.link.end();
                self.gate.close();
                let result = guarded(|| {
                    match self.failed.take() {
                        Some(failure) => return Err(failure),
                        None => result?,
                    }
                    Ok(t5g_result::new(self.model.clone(), std::mem::take(&mut self.rows), self.facts))
                });
                let user = self.progress.user();
                match result {
                    Ok(result) => (self.done)(user, Handle::new(result), Handle::NULL),
                    Err(failure) => (self.done)(user, Handle::NULL, Handle::new(failure)),
                }
            }
        }
    }

    fn event(&mut self, event: Event) -> Result<(), t5g_error> {
        let (progress, texts) = (self.progress, &mut self.texts);
        let answer = match event {
            Event::Admitted { row } => progress.admitted(row),
            Event::Token { row, token, .. } => progress.piece(row, token, texts.token(row, token)?),
            Event::Row { row, hypotheses } => {
                self.rows[row] = hypotheses;
                match texts.rest(row)? {
                    Some(text) => progress.piece(row, -1, Some(text)),
                    None => return Ok(()),
                }
            }
            _ => return Ok(()),
        };
        if answer.is_break() { Err(Error::Cancelled.into()) } else { Ok(()) }
    }
}
