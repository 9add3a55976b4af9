//! `Generation`: the caller's side of a submitted request, an iterator over its events.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::line::RequestId;
use super::queue::Shared;
use super::request::{Event, Message, RequestStats};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::hypothesis::Hypothesis;

/// A request that was submitted to an [`Engine`](crate::Engine): an iterator over the events of its rows, which waits
/// for them and ends after the last row or an error. Dropping it cancels the request.
pub struct Generation {
    events: Receiver<Message>,
    rows: usize,
    id: RequestId,
    cancel: Cancellation,
    shared: Arc<Shared>,
    has_ended: bool,
    stats: Option<RequestStats>,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Generation { rows, id, has_ended, .. } = self;
        f.debug_struct("Generation")
            .field("id", id)
            .field("rows", rows)
            .field("has_ended", has_ended)
            .finish_non_exhaustive()
    }
}

impl Generation {
    pub(super) fn new(
        shared: Arc<Shared>,
        id: RequestId,
        rows: usize,
        cancel: Cancellation,
        events: Receiver<Message>,
    ) -> Generation {
        Generation { events, rows, id, cancel, shared, has_ended: false, stats: None }
    }

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
        Canceller::new(self.cancel.clone(), self.shared.clone())
    }

    /// Times and counts of the request, once its last event or error was returned; `None` before, and if the engine
    /// could not tell them, as in a forked process.
    pub fn stats(&self) -> Option<&RequestStats> {
        self.stats.as_ref()
    }

    /// Waits for the next event for at most `timeout`.
    pub fn next_timeout(&mut self, timeout: Duration) -> PollResult {
        if self.has_ended {
            return PollResult::Ended;
        }
        match self.receive(Some(timeout)) {
            Some(message) => self.take(message).map_or(PollResult::Ended, PollResult::Event),
            None => PollResult::TimedOut,
        }
    }

    /// The next message, if it comes within `timeout`. At its deadline the request is ended, whatever the engine is
    /// doing.
    fn receive(&self, timeout: Option<Duration>) -> Option<Message> {
        let lost = |error| Message::Ended { result: Err(error), stats: RequestStats::default() };
        if let Err(error) = self.shared.check_process() {
            return Some(lost(error));
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
                let request = self.shared.queue().requests.get(&self.id).map(|pending| pending.request.clone());
                if let Some(request) = request {
                    self.shared.end(&request, Err(Error::Deadline));
                }
                // Whoever has ended it sends the last message.
                Some(self.events.recv().unwrap_or_else(|_| lost(Error::Closed)))
            }
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(lost(Error::Closed)),
        }
    }

    /// Waits for all rows and returns what [`Model::generate_batch`](crate::Model::generate_batch) returns.
    ///
    /// # Errors
    /// A failed run; [`Error::Cancelled`], [`Error::Deadline`]; [`Error::Closed`] if the engine's thread is gone;
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
            Message::Ended { result, stats } => {
                self.has_ended = true;
                self.stats = Some(stats);
                result.err().map(Err)
            }
        }
    }
}

/// The result of waiting for an event.
#[derive(Clone, Debug)]
pub enum PollResult {
    /// An event, or the error that ended the request.
    Event(Result<Event, Error>),
    /// Nothing happened in that time.
    TimedOut,
    /// There are no more events.
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

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").field("cancellation", &self.cancel).finish_non_exhaustive()
    }
}

impl Canceller {
    pub(super) fn new(cancel: Cancellation, shared: Arc<Shared>) -> Canceller {
        Canceller { cancel, shared }
    }

    /// See [`Generation::cancel`].
    pub fn cancel(&self) {
        if self.shared.check_process().is_err() {
            return;
        }
        self.cancel.cancel();
        self.shared.wake();
    }
}
